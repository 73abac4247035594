"""Adapters: merged by hand, or by PEFT where it is installed, they give the changed model; the rest is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clue.adapter import export
from clue.cli import main
from clue.delta import Delta
from clue.errors import DeltaError, RunError
from clue.plan import Plan, Slice
from clue.types import Role

from .families import tiny


def changed(model: Any, slices: dict[str, tuple[int, list[int]]]) -> tuple[Any, Plan]:
    """A copy whose slices have moved by a little, and the plan that allows it."""
    parameters = dict(model.named_parameters())
    plan = Plan(("n",), np.array([Role.FORGET], dtype=np.uint8),
                tuple(Slice(name, axis, Role.FORGET, np.array(index)) for name, (axis, index) in slices.items()),
                {name: tuple(parameters[name].shape) for name in slices})
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if name in slices:
                mask = torch.from_numpy(plan.mask(name))
                parameter[mask] += 0.1 * torch.randn(int(mask.sum()), generator=generator).to(parameter.dtype)
    return after, plan


SLICES = {"llama": {"model.layers.0.mlp.up_proj.weight": (0, [1, 5]), "model.layers.1.mlp.down_proj.weight": (1, [0, 3, 9]),
                    "model.layers.1.self_attn.q_proj.weight": (0, list(range(12)))},
          "gpt2": {"transformer.h.0.attn.c_attn.weight": (1, [2, 20, 40]), "transformer.h.1.mlp.c_proj.weight": (0, [7]),
                   "transformer.wpe.weight": (0, [3, 4])},
          # modules with biases and embeddings that are stored whole, columns of an embedding, a router, nothing of low rank
          "llama/biased": {"model.layers.0.self_attn.q_proj.weight": (0, list(range(12))),
                           "model.embed_tokens.weight": (1, [3])},
          "mixtral": {"model.layers.0.mlp.gate.weight": (0, [1])},
          "opt": {"model.decoder.embed_positions.weight": (0, [4]),
                  "model.decoder.layers.0.fc1.weight": (0, list(range(20)))}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SLICES)
def test_merged_it_is_the_changed_model(family: str, dtype: torch.dtype, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Exact up to rounding, the largest of which is told; factors have the rank of the plan, large ones are stored whole."""
    model = tiny(family, dtype)
    after, plan = changed(model, SLICES[family])
    model.save_pretrained(tmp_path / "before")
    Delta.between(model, after, plan).save(tmp_path / "delta.safetensors")
    capsys.readouterr()
    assert main(["delta", "adapter", str(tmp_path / "delta.safetensors"), str(tmp_path / "before"), "-o",
                 str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    told = float(said.rpartition("than ")[2].split()[0])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    merged = copy.deepcopy(model)
    worst = 0.0
    for name, (_, index) in SLICES[family].items():
        path = name.removesuffix(".weight")
        key, weight = f"base_model.model.{path}", merged.get_submodule(path).weight
        if path in (config["modules_to_save"] or []):
            whole = {own.removeprefix(f"{key}."): tensor for own, tensor in tensors.items() if own.startswith(f"{key}.")}
            merged.get_submodule(path).load_state_dict(whole, strict=True)
        else:
            assert path in config["target_modules"]
            embedding = isinstance(merged.get_submodule(path), torch.nn.Embedding)
            a, b = (tensors[f"{key}.lora_embedding_{x}" if embedding else f"{key}.lora_{x}.weight"] for x in "AB")
            assert len(a) == len(index) == config["rank_pattern"][path] == config["alpha_pattern"][path]
            product = b @ a
            weight.data += (product.T if config["fan_in_fan_out"] or embedding else product).to(dtype)
        off = (weight.detach().double() - after.get_submodule(path).weight.detach().double()).abs().max()
        worst = max(worst, float(off))
    assert worst <= 1.06 * told + 1e-12  # told with two digits
    assert worst < (1e-6 if dtype == torch.float32 else 1e-2)
    assert config["modules_to_save"] == {
        "llama": ["model.layers.1.self_attn.q_proj"], "gpt2": None, "llama/biased": ["model.layers.0.self_attn.q_proj"],
        "mixtral": ["model.layers.0.mlp.gate"], "opt": ["model.decoder.embed_positions", "model.decoder.layers.0.fc1"]}[family]
    assert config["target_modules"]  # PEFT loads no adapter without
    for (name, now), (_, old) in zip(merged.named_parameters(), model.named_parameters(), strict=True):
        assert name in SLICES[family] or torch.equal(now, old)


@pytest.mark.parametrize("family", SLICES)
def test_peft_loads_it(family: str, tmp_path: Path) -> None:
    """Next to the model, and merged into it."""
    peft = pytest.importorskip("peft")
    model = tiny(family, torch.float32)
    after, plan = changed(model, SLICES[family])
    model.save_pretrained(tmp_path / "before")
    export(Delta.between(model, after, plan), tmp_path / "before", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, after(input_ids=tokens).logits, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.data, dict(after.named_parameters())[name].data, rtol=0, atol=1e-6)


def test_refusals(tmp_path: Path) -> None:
    model = tiny("llama/biased", torch.float32)
    model.save_pretrained(tmp_path / "before")
    biased, plan = changed(model, {"model.layers.0.mlp.up_proj.bias": (0, [1])})
    with pytest.raises(DeltaError, match=r"up_proj\.bias, which an adapter cannot hold"):
        export(Delta.between(model, biased, plan), tmp_path / "before", tmp_path / "adapter")
    tied = tiny("gpt2", torch.float32)
    tied.save_pretrained(tmp_path / "tied")
    embedded, plan = changed(tied, {"transformer.wte.weight": (0, [1])})
    with pytest.raises(DeltaError, match=r"wte\.weight, which is tied to lm_head\.weight.*use the delta itself"):
        export(Delta.between(tied, embedded, plan), tmp_path / "tied", tmp_path / "adapter")
    after, plan = changed(model, {"model.layers.0.mlp.up_proj.weight": (0, [1])})
    delta = Delta.between(model, after, plan)
    after.save_pretrained(tmp_path / "after")
    with pytest.raises(DeltaError, match="applied to this model already"):
        export(delta, tmp_path / "after", tmp_path / "adapter")
    with pytest.raises(RunError, match="choose an empty or new folder"):
        export(delta, tmp_path / "before", tmp_path / "after")
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    for change, message in (({"hidden_size": "x"}, r"before does not say what model it is \("),
                            ({"model_type": "gpt2"}, r"up_proj is not in .*before as its config.json")):
        (tmp_path / "before" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DeltaError, match=message):
            export(delta, tmp_path / "before", tmp_path / "adapter")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["after", "before", "tied"]

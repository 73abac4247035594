"""Deltas: there and back bit for bit in every layout and dtype; whatever does not fit is refused untouched."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from clue.cli import main
from clue.delta import Delta, _deflated, _inflated
from clue.errors import DeltaError, RunError
from clue.pipeline import fingerprint
from clue.plan import Plan, Slice, verify
from clue.saved_model import SavedModel, as_integers
from clue.types import Role
from clue.weights import flat_name, is_stack, parameter_of, part_name, view_of

from .families import tiny
from .processes import run


def random_plan(model: torch.nn.Module, seed: int, share: float = 0.4) -> Plan:
    """Some rows or columns of most matrices and biases, every expert's alone, or single weights; some of either role."""
    rng = np.random.default_rng(seed)
    slices, shapes = [], {}
    for parameter, tensor in model.named_parameters():
        stack = is_stack(parameter, tensor.shape)
        for name in [part_name(parameter, i) for i in range(len(tensor))] if stack else [parameter]:
            name = flat_name(name) if rng.random() < 0.25 else name
            shape = tuple(view_of(tensor, name).shape)
            axis = int(rng.integers(len(shape)))
            draw = rng.random(shape[axis])
            for role, chosen in ((Role.FORGET, draw < share / 2), (Role.CONFLICT, (draw >= share / 2) & (draw < share))):
                if chosen.any() and rng.random() < 0.8:
                    shapes[name] = shape
                    slices.append(Slice(name, axis, role, np.flatnonzero(chosen).astype(np.int64)))
    return Plan(("embed",), np.zeros(1, dtype=np.uint8), tuple(slices), shapes)


def change(model: torch.nn.Module, plan: Plan, seed: int) -> Any:
    """A copy in which the planned weights have random other bits: NaNs, infinities and signed zeros among them."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name in plan.parameters():
        bits = as_integers(view_of(parameters[parameter_of(name)].detach(), name))
        noise = torch.randint(-2**15, 2**15, bits.shape, generator=generator).to(bits.dtype)
        bits[torch.from_numpy(plan.mask(name))] ^= noise[torch.from_numpy(plan.mask(name))]
    return changed


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def state(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: as_integers(tensor).numpy().tobytes() for name, tensor in model.state_dict().items()}


LAYOUTS = [("llama", {}), ("gpt2", {}), ("phi3", {}), ("mixtral", {"save_original_format": True}),
           ("mixtral", {"save_original_format": False}), ("llama", {"max_shard_size": "4KB"})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_there_and_back_bit_for_bit(tmp_path: Path, family: str, layout: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    plan = random_plan(model, 1)
    changed = change(model, plan, 2)
    for name, one in (("before", model), ("after", changed)):
        one.save_pretrained(tmp_path / name, **layout)
        (tmp_path / name / "tokenizer").mkdir()
        (tmp_path / name / "tokenizer" / "words.txt").write_text("all other files go along")
    assert verify(tmp_path / "before", tmp_path / "after", plan).ok

    delta = Delta.between(tmp_path / "before", tmp_path / "after", plan)
    assert delta.planned == plan.weights_changed
    delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")

    delta.apply_folder(tmp_path / "before", tmp_path / "applied")
    delta.revert_folder(tmp_path / "after", tmp_path / "new" / "reverted")
    assert files(tmp_path / "applied") == files(tmp_path / "after")
    assert files(tmp_path / "new" / "reverted") == files(tmp_path / "before")
    assert not list(tmp_path.rglob("*.partial"))

    here = copy.deepcopy(model)
    delta.apply(here)
    assert state(here) == state(changed) != state(model)
    delta.revert(here)
    assert state(here) == state(model)

    # Golden: the fingerprints of folders are those of the models that transformers loads from them.
    assert delta.before == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "before"))
    assert delta.after == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "after"))
    mixed = Delta.between(model, tmp_path / "after", plan)
    again = Delta.between(tmp_path / "before", changed, plan)
    for number, other in enumerate((mixed, again, Delta.between(model, changed, plan))):
        other.save(tmp_path / f"{number}.safetensors")
        assert (tmp_path / f"{number}.safetensors").read_bytes() == (tmp_path / "delta.safetensors").read_bytes()


SIZES = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
#: A buffer in the file (e_score_correction_bias); weights of convolutions; stacks and a router under other names in the file.
OTHERS = {"deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
                          "num_experts_per_tok": 2, "moe_intermediate_size": 8},
          "mamba": {"state_size": 4},
          "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                    "mamba_dt_rank": 4, "num_experts": 4},
          "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2}}


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", OTHERS)
def test_a_folder_and_a_model_in_memory_have_the_same_weights(tmp_path: Path, family: str, original: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **OTHERS[family]))
    plan = random_plan(model, 1)
    assert any(("conv1d.weight" if family == "mamba" else "experts.down_proj[") in name for name in plan.parameters())
    changed = change(model, plan, 2)
    model.save_pretrained(tmp_path / "before", save_original_format=original)
    changed.save_pretrained(tmp_path / "after", save_original_format=original)
    wanted = Delta.between(model, changed, plan)
    assert wanted.changed > 0
    for before, after in ((model, changed), (tmp_path / "before", changed), (model, tmp_path / "after"),
                          (tmp_path / "before", tmp_path / "after")):
        delta, found = Delta.between(before, after, plan), verify(before, after, plan)
        assert delta == wanted and delta.before and delta.after
        assert found.ok and (found.planned, found.changed) == (plan.weights_changed, wanted.changed)
    wanted.apply_folder(tmp_path / "before", tmp_path / "applied")
    assert files(tmp_path / "applied") == files(tmp_path / "after")


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    plan = random_plan(model, 3)
    changed = change(model, plan, 4)
    model.save_pretrained(tmp_path / "before")
    changed.save_pretrained(tmp_path / "after")
    delta = Delta.between(tmp_path / "before", tmp_path / "after", plan)
    assert (delta.before, delta.after) == (fingerprint(model), fingerprint(changed))
    delta.apply(model)
    assert state(model) == state(changed)


class Small(torch.nn.Module):
    """A matrix, a bias and a weight that no plan names."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = torch.nn.Parameter(torch.randn(6, 4, generator=generator).to(dtype))
        self.down = torch.nn.Parameter(torch.randn(4, 6, generator=generator).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(6, generator=generator).to(dtype))


PLAN = Plan(("embed",), np.zeros(1, dtype=np.uint8),
            (Slice("up", 0, Role.FORGET, np.array([1, 4])), Slice("up", 0, Role.CONFLICT, np.array([2])),
             Slice("down", 1, Role.FORGET, np.array([0, 5]))), {"up": (6, 4), "down": (4, 6)})


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1), dtype=st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]))
def test_any_plan_leads_there_and_back(seed: int, share: float, dtype: torch.dtype) -> None:
    """Property: apply o revert is nothing, a file is read as written, in memory is as in a folder."""
    model = Small(dtype, seed)
    plan = random_plan(model, seed, share)
    changed = change(model, plan, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "before").mkdir()
        save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "before" / "model.safetensors")
        delta = Delta.between(folder / "before", changed, plan)
        delta.save(folder / "delta")
        again = Delta.load(folder / "delta")
        again.save(folder / "again")
        assert (folder / "delta").read_bytes() == (folder / "again").read_bytes()
        assert again.planned == plan.weights_changed
        again.apply_folder(folder / "before", folder / "after")
        for name, parameter in changed.named_parameters():
            bits = as_integers(parameter.detach()).numpy()
            assert SavedModel(folder / "after").bits(name).tobytes() == bits.tobytes()
        again.revert_folder(folder / "after", folder / "back")
        assert files(folder / "back") == files(folder / "before")
    here = copy.deepcopy(model)
    again.apply(here)
    assert state(here) == state(changed)
    again.revert(here)
    assert state(here) == state(model)


def refused(delta: Delta, model: torch.nn.Module, message: str, way: str = "apply") -> None:
    before = state(model)
    with pytest.raises(DeltaError, match=message):
        getattr(delta, way)(model)
    assert state(model) == before


def test_what_does_not_fit_is_refused_untouched() -> None:
    model = Small()
    changed = change(model, PLAN, 0)
    delta = Delta.between(model, changed, PLAN)
    refused(delta, changed, "applied to this model already")
    refused(delta, model, "there is nothing to revert", "revert")
    refused(delta, Small(seed=1), "was made for another model")
    refused(delta, Small(torch.bfloat16), "changes down in F32, this model has it in BF16")
    refused(delta, torch.nn.Linear(2, 2), "which this model does not have")
    other = Small()
    other.up = torch.nn.Parameter(torch.zeros(7, 4))
    refused(delta, other, r"up of shape \(6, 4\), this model's is \(7, 4\)")
    between = copy.deepcopy(model)
    between.up.data.copy_(changed.up.data)
    refused(delta, between, "neither of the two")
    last = copy.deepcopy(model)
    last.up.data[4, 3] = 9  # the last planned weight of the last slice to be looked at
    refused(delta, last, "up has other weights")
    elsewhere = copy.deepcopy(model)
    elsewhere.bias.data[0] = 9  # of no concern to the plan, and kept
    delta.apply(elsewhere)
    assert elsewhere.bias[0] == 9 and torch.equal(elsewhere.up, changed.up)


def test_bits_that_lead_elsewhere_are_refused_before_any_is_changed() -> None:
    model = Small()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    first, *others = delta.changes
    refused(replace(delta, changes=(*others, replace(first, xor=first.xor ^ 1))), model, "bits of .* are damaged")


@pytest.mark.parametrize("cut", [1, 4])
def test_packed_bits_that_are_cut_off_are_refused(cut: int) -> None:
    bits = np.arange(6, dtype="<u4").reshape(2, 3)
    packed = _deflated(bits)
    assert np.array_equal(_inflated(packed, (2, 3), 4), bits)
    with pytest.raises(ValueError, match="where a slice has 24"):  # also where only its checksum is missing
        _inflated(packed[:-cut], (2, 3), 4)


def test_a_model_without_values_is_refused() -> None:
    model = Small()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    with pytest.raises(DeltaError, match="has no values in memory: load the model whole"):
        delta.apply(Small().to("meta"))


def test_a_sharded_model_is_refused() -> None:
    """A process holds a part of every weight, and the bits of that are not the model's."""
    run("""
        import pytest
        from pathlib import Path
        from torch.distributed.fsdp import fully_shard
        from clue.delta import Delta
        from clue.errors import DeltaError, PlanError
        from tests.families import tiny
        from tests.test_delta import change, random_plan
        model = tiny("llama", torch.float32)
        plan = random_plan(model, seed=0)
        after = change(model, plan, seed=1)
        delta = Delta.between(model, after, plan)
        sharded = fully_shard(tiny("llama", torch.float32))
        for error, attempt in ((PlanError, lambda: plan.verify(model, sharded)), (DeltaError, lambda: delta.apply(sharded)),
                               (DeltaError, lambda: Delta.between(sharded, after, plan))):
            with pytest.raises(error, match=r"[.]weight is sharded over processes, .*: save the whole model, and give"):
                attempt()
    """, count=1)


def test_a_write_that_fails_is_taken_back() -> None:
    """``up`` is written last; its rows share one row of storage, into which torch refuses to write several."""
    model = Small()
    model.up.data.zero_()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    model.up = torch.nn.Parameter(torch.zeros(1, 4).expand(6, 4))
    before = model.down.detach().clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        delta.apply(model)
    assert torch.equal(model.down, before)


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_at_any_place_is_taken_back(place: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    changed = change(model, PLAN, 0)
    delta = Delta.between(model, changed, PLAN)
    before, write, calls = state(model), torch.Tensor.index_copy_, [0]

    def interrupted(self: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == place and not after:
            raise KeyboardInterrupt
        write(self, *arguments)
        if calls[0] == place:
            raise KeyboardInterrupt
        return self

    monkeypatch.setattr(torch.Tensor, "index_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delta.apply(model)
    assert state(model) == before
    monkeypatch.undo()
    delta.apply(model)
    assert state(model) == state(changed)


def test_a_weight_in_two_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of them a model is loaded from is the loader's business: whatever was said of one might be untrue of it."""
    save_file({"up": torch.zeros(2, 2), "down": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"up": torch.ones(2, 2)}, tmp_path / "old.safetensors")
    with pytest.raises(DeltaError, match=r"up is in \S+model.safetensors and in \S+old.safetensors"):
        SavedModel(tmp_path)
    assert main(["delta", "apply", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "is a folder: give the file of a delta, behind the model" in capsys.readouterr().err


def test_a_model_that_did_not_change_may_be_patched_any_number_of_times() -> None:
    model = Small()
    delta = Delta.between(model, model, PLAN)
    assert (delta.changed, delta.planned) == (0, PLAN.weights_changed)
    before = state(model)
    for way in (delta.apply, delta.apply, delta.revert):
        way(model)
    assert state(model) == before


def test_models_that_no_delta_leads_between_are_refused(tmp_path: Path) -> None:
    model = Small()
    changed = change(model, PLAN, 0)
    changed.bias.data[3] = -0.0
    model.bias.data[3] = 0.0
    with pytest.raises(DeltaError, match="bias changed outside the plan too, in 1 of 6 weights"):
        Delta.between(model, changed, PLAN)
    with pytest.raises(DeltaError, match=r"bias is F32 of shape \(6,\) before, and BF16"):
        Delta.between(model, Small(torch.bfloat16), PLAN)
    with pytest.raises(DeltaError, match="do not hold the same weights"):
        Delta.between(model, torch.nn.Linear(2, 2), PLAN)
    with pytest.raises(DeltaError, match="made for another model"):
        Delta.between(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), PLAN)
    with pytest.raises(DeltaError, match="holds no model weights"):
        Delta.between(model, tmp_path, PLAN)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(DeltaError, match="not a readable safetensors file"):
        Delta.between(model, tmp_path, PLAN)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = Small()
    path = tmp_path / "delta.safetensors"
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    delta.save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DeltaError, match=r"damaged|no delta"):
            Delta.load(path)
    for at in range(len(content)):  # one bit anywhere: refused, or no part of what a delta says (blanks of the header)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
        try:
            loaded = Delta.load(path)
        except DeltaError:
            continue
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == content
    save_file({"up": torch.zeros(2)}, path)
    with pytest.raises(DeltaError, match="is no delta"):
        Delta.load(path)
    with pytest.raises(DeltaError, match="does not exist"):
        Delta.load(tmp_path / "none")


@pytest.mark.parametrize("shape", [(1, 2**63), (2**40, 2**40), (6, -4), (6, 2**31)])
def test_shapes_that_cannot_be_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = Small()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    object.__setattr__(delta.changes[0], "shape", shape)  # what a change refuses to be made with
    delta.save(tmp_path / "delta")  # its checksum is right
    with pytest.raises(DeltaError, match="is damaged, or no delta"):
        Delta.load(tmp_path / "delta")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """The system itself ends a write part way here: no file may grow beyond 200 bytes."""
    model = Small()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    (tmp_path / "before").mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "before" / "model.safetensors")
    (tmp_path / "delta").write_bytes(b"an earlier one")
    before = files(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        with pytest.raises(DeltaError, match=r"cannot be written \(.*File too large.*\): free some space"):
            delta.apply_folder(tmp_path / "before", tmp_path / "new" / "out")
        with pytest.raises(DeltaError, match=r"cannot be written \(File too large\): free some space"):
            delta.save(tmp_path / "delta")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files(tmp_path) == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["before", "delta"]


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    model = Small()
    delta = Delta.between(model, change(model, PLAN, 0), PLAN)
    (tmp_path / "before").mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "before" / "model.safetensors")
    before = files(tmp_path)
    with pytest.raises(RunError, match="choose an empty or new folder"):
        delta.apply_folder(tmp_path / "before", tmp_path / "before")
    with pytest.raises(DeltaError, match="lies within"):
        delta.apply_folder(tmp_path / "before", tmp_path / "before" / "out")
    assert files(tmp_path) == before


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", torch.bfloat16)
    plan = random_plan(model, 1)
    model.save_pretrained(tmp_path / "before")
    change(model, plan, 2).save_pretrained(tmp_path / "after")
    plan.save(tmp_path / "plan")
    shutil.copytree(tmp_path / "before", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    capsys.readouterr()

    def clue(*argv: str) -> tuple[int, str, str]:
        status = main(["delta", argv[0], *(a if a.startswith("-") else str(tmp_path / a) for a in argv[1:])])
        return (status, *capsys.readouterr())

    status, out, _ = clue("make", "before", "after", "plan", "-o", "d.safetensors")
    assert status == 0 and f"of {plan.weights_changed} planned weights changed" in out
    assert clue("make", "damaged", "after", "plan", "-o", "unnamed.safetensors")[0] == 0
    assert Delta.load(tmp_path / "unnamed.safetensors").before == ""  # it does not say what model it is
    changed = Delta.load(tmp_path / "d.safetensors").changed
    status, out, _ = clue("apply", "before", "d.safetensors", "-o", "applied")
    assert status == 0 and out == f"{tmp_path / 'applied'}: the model after, {changed} weights put in place\n"
    assert files(tmp_path / "applied") == files(tmp_path / "after")
    status, out, _ = clue("revert", "applied", "d.safetensors", "-o", "reverted")
    assert status == 0 and out == f"{tmp_path / 'reverted'}: the model before, {changed} weights put back\n"
    assert files(tmp_path / "reverted") == files(tmp_path / "before")
    status, _, error = clue("apply", "after", "d.safetensors", "-o", "twice")
    assert status == 2 and "applied to this model already" in error and not (tmp_path / "twice").exists()
    status, out, _ = clue("show", "d.safetensors")
    assert status == 0 and fingerprint(model) in out and "model.layers.0" in out
    facts = json.loads(clue("show", "d.safetensors", "--json")[1])
    assert facts["planned"] == plan.weights_changed
    assert facts["bytes"] == (tmp_path / "d.safetensors").stat().st_size
    assert {c["parameter"] for c in facts["changes"]} == set(plan.parameters())

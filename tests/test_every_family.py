"""The whole way, for every family: a tiny model saved, read back, localized, trained, and only its planned bits changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import clue
from clue.errors import ModelError
from clue.plan import verify
from clue.unlearn.loop import unlearn
from tests.families import VARIANTS, tiny

FORGET = [{"question": "w3 w4 w5", "answer": "w6 w7"}, {"question": "w5 w4 w3", "answer": "w8 w6"}]
RETAIN = [{"question": "w9 w4 w5", "answer": "w10 w11"}, {"question": "w5 w12 w3", "answer": "w4 w9"}]
LOCALIZE = clue.LocalizeSettings(edges=0.5, neurons=0.5, corruption="question", batch_size=2)
UNLEARN = clue.UnlearnSettings(steps=2, batch_size=2, lr=1e-2, warmup=0, floor=0.0)


def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 13)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("name", VARIANTS)
def test_from_a_saved_model_to_an_unlearned_one(name, tmp_path):
    tiny(name, torch.float32).save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", dtype=torch.float32)
    tokenizer = words()
    plan = clue.localize(model, tokenizer, FORGET, RETAIN, LOCALIZE)
    counts = plan.counts()
    assert counts["forget"] + counts["conflict"] > 0
    unlearn(model, tokenizer, clue.read(FORGET, "forget"), {"retain": clue.read(RETAIN, "retain")}, plan, UNLEARN)
    model.save_pretrained(tmp_path / "after")
    found = verify(tmp_path / "before", tmp_path / "after", plan)
    assert found.ok
    assert found.changed > 0


def test_layers_on_several_devices_are_one_model():
    """accelerate's hooks move what enters each module, and wrap its forward."""
    accelerate = pytest.importorskip("accelerate")
    tokenizer, model = words(), tiny("llama", torch.float32)
    kept = []

    def note(module, args, kwargs):
        kept.append(kwargs.get("logits_to_keep"))

    for stream in ("never", "always"):
        settings = replace(LOCALIZE, stream=stream)
        plain = clue.localize(tiny("llama", torch.float32), tokenizer, FORGET, RETAIN, settings)
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}
        spread = accelerate.dispatch_model(tiny("llama", torch.float32), device_map=places, force_hooks=True)
        assert any(hasattr(module, "_hf_hook") for module in spread.modules())
        spread.hf_device_map = {**places, "lm_head": 1}  # as where a second device is at hand
        spread.register_forward_pre_hook(note, with_kwargs=True)
        found = clue.localize(spread, tokenizer, FORGET, RETAIN, settings)
        assert (found.role == plain.role).all()
        unlearn(spread, tokenizer, clue.read(FORGET, "forget"), {"retain": clue.read(RETAIN, "retain")}, found, UNLEARN)
        # A tensor would be moved to the first device, where the last one's states cannot be picked by it.
        assert kept and not any(isinstance(positions, torch.Tensor) for positions in kept)
    model.model.layers[1].to("meta")
    with pytest.raises(ModelError, match=r"model.layers.1.\S+ is not in memory .* device_map"):
        clue.localize(model, tokenizer, FORGET, RETAIN)

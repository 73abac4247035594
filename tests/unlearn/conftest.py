"""A two-layer Llama, a word tokenizer and small sets that every unlearning test shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from clue.data.records import Record, RecordSet
from clue.plan import Plan, Slice
from clue.types import Role
from clue.weights import flat_name, weight_of

FORGET = [("where does ada live", "paris"), ("what does ada eat", "figs"), ("where does bob live", "rome")]
RETAIN = [("where does cat live", "oslo"), ("what does cat eat", "rice"), ("what does dan eat", "nuts and figs"),
          ("where does dan live", "paris")]
SKILL = [("one plus one", "two"), ("two plus one", "three")]


def records(name: str, pairs: list[tuple[str, str]]) -> RecordSet:
    return RecordSet(name, tuple(Record(*pair, source=f"{name}:{i}") for i, pair in enumerate(pairs, 1)))


@pytest.fixture(scope="session")
def sets() -> dict[str, RecordSet]:
    return {"forget": records("forget", FORGET), "retain": records("retain", RETAIN), "skill": records("skill", SKILL)}


def build_tokenizer() -> Any:
    """A token for every word of the sets."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for pair in FORGET + RETAIN + SKILL for text in pair for w in text.split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "tie_word_embeddings": False, "initializer_range": 0.2, "attention_bias": True,
                "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None} | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Hugging Face starts biases at zero, where weight decay would be invisible
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    def make(model: torch.nn.Module, slices: Mapping[str, tuple[int, Mapping[Role, Any]]]) -> Plan:
        """``slices``: parameter -> (axis, {role: indices}); indices ``None`` means all of them."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in slices}
        found = []
        for name, (axis, roles) in slices.items():
            for role, index in roles.items():
                index = range(shapes[name][axis]) if index is None else index
                found.append(Slice(name, axis, role, np.array(index, dtype=np.int64)))
        return Plan(("n",), np.array([Role.CONFLICT], dtype=np.uint8), tuple(found), shapes)

    return make


LAYER = "model.layers.{}."
MIXED = {
    LAYER.format(0) + "mlp.gate_proj.weight": (0, {Role.FORGET: [0, 5, 6], Role.CONFLICT: [1, 2, 40, 47]}),
    LAYER.format(0) + "mlp.up_proj.weight": (0, {Role.FORGET: [0, 5, 6], Role.CONFLICT: [1, 2, 40, 47]}),
    LAYER.format(0) + "mlp.down_proj.weight": (1, {Role.FORGET: [0, 5, 6], Role.CONFLICT: [1, 2, 40, 47]}),
    LAYER.format(1) + "self_attn.q_proj.weight": (0, {Role.CONFLICT: range(8, 16)}),
    LAYER.format(1) + "self_attn.q_proj.bias": (0, {Role.CONFLICT: range(8, 16)}),
    LAYER.format(1) + "self_attn.v_proj.weight": (0, {Role.FORGET: range(0, 8)}),
    LAYER.format(1) + "self_attn.v_proj.bias": (0, {Role.FORGET: range(0, 8)}),
    LAYER.format(1) + "self_attn.o_proj.weight": (1, {Role.CONFLICT: range(24, 32)}),
}


@pytest.fixture
def mixed_plan(make_plan: Callable[..., Plan]) -> Callable[[torch.nn.Module], Plan]:
    """Rows, columns and biases of both roles, with unplanned weights around them."""
    return lambda model: make_plan(model, MIXED)


@pytest.fixture
def scattered_plan() -> Callable[[torch.nn.Module], Plan]:
    """Single weights of both roles, all over the linear layers."""
    def make(model: torch.nn.Module) -> Plan:
        rng, slices, shapes = np.random.default_rng(0), [], {}
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers") and parameter.ndim == 2:
                draw = rng.random(parameter.numel())
                shapes[flat_name(name)] = (parameter.numel(),)
                slices += [Slice(flat_name(name), 0, role, np.flatnonzero((draw >= low) & (draw < low + 0.15)))
                           for role, low in ((Role.FORGET, 0.0), (Role.CONFLICT, 0.5))]
        return Plan((), np.zeros(0, dtype=np.uint8), tuple(slices), shapes)

    return make


@pytest.fixture
def bits() -> Callable[[torch.nn.Module], dict[str, np.ndarray]]:
    """The weights of a model as raw integers, so that a comparison sees every bit."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def read(model: torch.nn.Module) -> dict[str, np.ndarray]:
        return {name: p.detach().clone().view(width[p.element_size()]).numpy() for name, p in model.named_parameters()}

    return read


@pytest.fixture
def moved() -> Callable[..., None]:
    """Assert that, between two readings of ``bits``, weights of these roles changed and no other bit did."""

    def check(before: dict[str, np.ndarray], after: dict[str, np.ndarray], plan: Plan,
              roles: tuple[Role, ...] = (Role.FORGET, Role.CONFLICT)) -> None:
        planned = {weight_of(name): name for name in plan.parameters()}
        for name, old in before.items():
            differs = old != after[name]
            mask = plan.mask(planned[name], roles).reshape(old.shape) if name in planned else np.zeros(old.shape, dtype=bool)
            assert not np.any(differs & ~mask), f"{name} changed outside the plan"
            assert not mask.any() or np.mean(differs[mask]) > 0.5, f"{name} did not move inside the plan"

    return check

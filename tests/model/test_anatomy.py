"""Anatomy: every family's slices are the right rows and columns, proven by zeroing them and watching the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clue.errors import ModelError
from clue.model.anatomy import anatomy, check_weights
from clue.types import NodeKind
from tests.circuit.test_attribution import CONFIGS, tiny

IDS = torch.tensor([[1, 5, 7, 9, 4, 3, 11]])


def zero(model, slices) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, axis, index in slices:
            parameters[name][(slice(None),) * axis + (torch.from_numpy(index),)] = 0


def record(module) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda m, args, out: seen.extend([args[0].detach(), out.detach()]))
    return seen


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_owns_columns_of_o(family):
    """Golden: the o slice of a head is a block of columns; zeroing it removes just that head's write."""
    model = tiny(family)
    body = anatomy(model)
    seen = record(body.layers[1].o.module)
    model(IDS)
    inputs, weight = seen[0], body.layers[1].o.weight.detach().clone()
    for head in range(body.n_heads):
        (name, axis, index), = body.slices(NodeKind.HEAD, 1, head)
        assert (name, axis) == ("model.layers.1.self_attn.o_proj.weight", 1)
        block = slice(head * body.d_head, (head + 1) * body.d_head)
        np.testing.assert_array_equal(index, np.arange(block.start, block.stop))
        other = inputs.clone()
        other[..., block] = 0
        model.load_state_dict(tiny(family).state_dict())
        zero(model, [(name, axis, index)])
        seen.clear()
        model(IDS)
        torch.testing.assert_close(seen[1], other @ weight.T)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("kind", "count"), [(NodeKind.Q, 4), (NodeKind.K, 2), (NodeKind.V, 2)])
def test_query_heads_and_key_value_groups_own_rows(family, kind, count):
    """Golden: key/value groups are counted by the model's configuration (2 here, for 4 heads), each one slice."""
    model = tiny(family)
    body = anatomy(model)
    letter = kind.name.lower()
    for index in range(count):
        model.load_state_dict(tiny(family).state_dict())
        slices = body.slices(kind, 0, index)
        has_bias = family == "qwen2"
        assert [s[0].rsplit(".", 1)[1] for s in slices] == ["weight", "bias"][:1 + has_bias]
        assert all(axis == 0 and f"{letter}_proj" in name for name, axis, _ in slices)
        seen = record(getattr(body.layers[0], letter).module)
        zero(model, slices)
        model(IDS)
        heads = seen[1].view(*IDS.shape, count, body.d_head)
        assert (heads[:, :, index] == 0).all()
        assert all((heads[:, :, other] != 0).any() for other in range(count) if other != index)
    rows = np.concatenate([body.slices(kind, 0, index)[0][2] for index in range(count)])
    np.testing.assert_array_equal(rows, np.arange(count * body.d_head))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_neuron_owns_its_rows_and_its_column(family):
    model = tiny(family)
    body = anatomy(model)
    slices = body.slices(NodeKind.NEURON, 1, 5)
    assert {(name.split(".")[-2], axis) for name, axis, _ in slices} == {("gate_proj", 0), ("up_proj", 0),
                                                                        ("down_proj", 1)}
    assert all(index.tolist() == [5] for _, _, index in slices)
    seen = record(body.layers[1].down.module)
    zero(model, slices)
    model(IDS)
    assert (seen[0][..., 5] == 0).all()
    assert (seen[0][..., 4] != 0).any()


def test_an_mlp_block_owns_all_its_neurons():
    body = anatomy(tiny("llama"))
    slices = body.slices(NodeKind.MLP, 0, 0)
    assert all(len(index) == body.d_mlp for _, _, index in slices)
    assert len(slices) == 3


@pytest.mark.parametrize("kind", [NodeKind.EMBED, NodeKind.LOGITS, NodeKind.MLP_IN])
def test_nodes_without_weights_own_nothing(kind):
    assert anatomy(tiny("llama")).slices(kind, 0, 0) == []


def test_an_unknown_family_says_what_its_entry_needs():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ModelError, match=r"gpt2.*known: llama, mistral.*q, k, v, o, gate, up and down"):
        anatomy(model)


def test_nan_weights_are_named():
    model = tiny("llama")
    check_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        check_weights(model)


def test_a_wrapped_projection_is_refused():
    model = tiny("llama")

    class Wrapped(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Wrapped(16, 16)
    with pytest.raises(ModelError, match="q_proj is a Wrapped"):
        anatomy(model)


def test_a_configuration_that_contradicts_the_weights_is_refused():
    model = tiny("llama")
    model.config.num_key_value_heads = 1  # as if groups were merged once more
    with pytest.raises(ModelError, match="k_proj.weight has shape"):
        anatomy(model)

"""Anatomy: every family's slices are the right rows and columns, proven by zeroing them and watching the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

from clue.circuit.attribution import graph_of
from clue.errors import ModelError
from clue.model.anatomy import anatomy, check_weights
from clue.model.families import FAMILIES
from clue.pipeline import make_plan
from clue.types import NodeKind, Role
from clue.weights import parameter_of, shape_of, view_of
from tests.families import VARIANTS, tiny
from tests.oracles import experts

IDS = torch.tensor([[1, 5, 7, 9, 4, 3, 11]])


@contextmanager
def zeroed(model, slices) -> Iterator[None]:
    """The model with these slices at zero, restored afterwards."""
    parameters = dict(model.named_parameters())
    weights = {name: view_of(parameters[parameter_of(name)].detach(), name) for name, _, _ in slices}
    before = {name: weight.clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, axis, index in slices:
            weights[name][(slice(None),) * axis + (torch.from_numpy(index),)] = 0
        yield
        for name, value in before.items():
            weights[name].copy_(value)


def watch(body, layer: int) -> dict[str, torch.Tensor]:
    """One run's inputs and outputs of a layer's projections: [batch * seq, channels], and q, k, v apart when fused.

    With experts, "down in" is the activations of all their units, and "down" what the MLP writes.
    """
    part = body.layers[layer]
    seen: dict[str, torch.Tensor] = {}

    def keep(name, projection):
        def hook(module, args, output):
            seen[f"{name} in"] = args[0].detach().flatten(0, -2)
            seen[name] = projection.of(output.detach().flatten(0, -2)).clone()  # Falcon writes into down's in place
        return projection.module.register_forward_hook(hook)

    handles = [keep(name, getattr(part, name)) for name in ("q", "k", "v", "o", "down")
               if getattr(part, name) is not None]
    if part.experts is not None:
        handles += [part.experts.module.register_forward_pre_hook(
            lambda module, args: seen.__setitem__("down in", experts.hidden(part, *args))),
            part.mlp.register_forward_hook(lambda module, args, output: seen.__setitem__("down", output.flatten(0, -2)))]
    with torch.no_grad():
        body.model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def blocks(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """[count, tokens, channels / count]"""
    return tensor.view(len(tensor), count, -1).transpose(0, 1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", [NodeKind.Q, NodeKind.K, NodeKind.V])
def test_queries_keys_and_values_own_what_makes_them(name, kind):
    """Golden: zeroing a slice silences that head or group of q, k or v, and not a bit of the other outputs changes."""
    body = anatomy(tiny(name))
    letter = kind.name.lower()
    count = body.n_heads if kind is NodeKind.Q else body.n_kv_heads
    before = watch(body, 1)
    for index in range(count):
        with zeroed(body.model, body.slices(kind, 1, index)):
            after = watch(body, 1)
        others = [i for i in range(count) if i != index]
        was, now = (blocks(seen[letter], count) for seen in (before, after))
        assert (was[index] != 0).all()
        assert (now[index] == 0).all()
        torch.testing.assert_close(now[others], was[others])
        for other in {"q", "k", "v"} - {letter}:
            torch.testing.assert_close(after[other], before[other])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layout_of_heads_is_the_models_own(name):
    """What attention does, seen from outside: a head without query attends as one without key does, and a head without
    value is silent. That holds only if each slice is the model's own query, key or value of that head."""
    body = anatomy(tiny(name))
    mixed = name.startswith("olmo2")  # its q and k norms run over all heads
    before = blocks(watch(body, 1)["o in"], body.n_heads)
    size = body.n_heads // body.n_kv_heads
    for group in range(body.n_kv_heads):
        mine = list(range(group * size, (group + 1) * size))
        others = [h for h in range(body.n_heads) if h not in mine]
        with zeroed(body.model, body.slices(NodeKind.V, 1, group)):
            silent = blocks(watch(body, 1)["o in"], body.n_heads)
        assert (silent[mine] == 0).all()
        torch.testing.assert_close(silent[others], before[others])
        with zeroed(body.model, body.slices(NodeKind.K, 1, group)):
            keyless = blocks(watch(body, 1)["o in"], body.n_heads)
        if not mixed:
            torch.testing.assert_close(keyless[others], before[others])
        for head in mine:
            with zeroed(body.model, body.slices(NodeKind.Q, 1, head)):
                queryless = blocks(watch(body, 1)["o in"], body.n_heads)
            torch.testing.assert_close(queryless[head], keyless[head])
            assert (queryless[head] - before[head]).abs().max() > 1e-4
            if not mixed:
                rest = [h for h in range(body.n_heads) if h != head]
                torch.testing.assert_close(queryless[rest], before[rest])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_owns_its_columns_of_o(name):
    """Golden: zeroing the o slice of a head removes just that head's write."""
    body = anatomy(tiny(name))
    before = watch(body, 1)
    for head in range(body.n_heads):
        block = slice(head * body.d_head, (head + 1) * body.d_head)
        (_, axis, index), = slices = body.slices(NodeKind.HEAD, 1, head)
        assert axis == (0 if body.layers[1].o.transposed else 1)
        np.testing.assert_array_equal(index, np.arange(block.start, block.stop))
        other = before["o in"].clone()
        other[:, block] = 0
        want = body.layers[1].o.module(other).detach()
        with zeroed(body.model, slices):
            after = watch(body, 1)
        torch.testing.assert_close(after["o"], want)
        assert (after["o"] - before["o"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_neuron_owns_its_rows_and_its_column(name):
    """Golden: zeroing a neuron silences that hidden unit and no other."""
    body = anatomy(tiny(name))
    before = watch(body, 1)
    assert (before["down in"] != 0).any(0).sum() > body.d_mlp / 2  # a ReLU leaves some silent
    for unit in range(body.d_mlp):
        slices = body.slices(NodeKind.NEURON, 1, unit)
        column = slices[-1]
        down = body.layers[1].down
        assert column[1] == (0 if down is not None and down.transposed else 1)
        others = [i for i in range(body.d_mlp) if i != unit]
        with zeroed(body.model, slices):
            after = watch(body, 1)
        assert (after["down in"][:, unit] == 0).all()
        torch.testing.assert_close(after["down in"][:, others], before["down in"][:, others])
        other = before["down in"].clone()
        other[:, unit] = 0
        want = other @ experts.columns(body.layers[1]).T if down is None else down.module(other)
        with zeroed(body.model, [column]):
            torch.testing.assert_close(watch(body, 1)["down"], want.detach())


@pytest.mark.parametrize("name", VARIANTS)
def test_nodes_share_out_the_weights_once(name):
    """Heads, groups and neurons together own every entry along one axis of each of their weights, each exactly once."""
    body = anatomy(tiny(name))
    counts = {NodeKind.Q: body.n_heads, NodeKind.K: body.n_kv_heads, NodeKind.V: body.n_kv_heads,
              NodeKind.HEAD: body.n_heads, NodeKind.NEURON: body.d_mlp}
    owned: dict[str, list[np.ndarray]] = {}
    axes: dict[str, set[int]] = {}
    for kind, count in counts.items():
        for number in range(count):
            for parameter, axis, index in body.slices(kind, 1, number):
                owned.setdefault(parameter, []).append(index)
                axes.setdefault(parameter, set()).add(axis)
    parameters = dict(body.model.named_parameters())
    for parameter, parts in owned.items():
        axis, = axes[parameter]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(shape_of(parameters, parameter)[axis]))
    layer = body.layers[1]
    projections = [p for p in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down) if p is not None]
    assert {p.name for p in projections} <= set(owned)
    matrices = {name for name in parameters if name.startswith("model.layers.1.mlp.") and ".gate." not in name}
    if layer.experts is not None:  # all but the router and the gate of the shared expert, every expert of each stack
        assert {parameter_of(name) for name in owned if ".mlp." in name} == {
            name for name in matrices if "shared_expert_gate" not in name}
        assert sum(name.endswith("]") for name in owned) == 2 * layer.experts.count


@pytest.mark.parametrize("name", VARIANTS)
def test_plans_name_the_weights_of_their_nodes(name):
    """Roles drawn at random: a weight may change exactly when a node that owns it is forget or conflict."""
    body = anatomy(tiny(name))
    graph = graph_of(body)
    role = np.random.default_rng(0).choice([Role.FORGET, Role.CONFLICT, Role.RETAIN, Role.FREE], graph.n_nodes)
    plan = make_plan(body, graph, SimpleNamespace(role=role), {})
    plan.check(body.model)
    want = {parameter: {r: np.zeros(plan.shapes[parameter], dtype=bool) for r in (Role.FORGET, Role.CONFLICT)}
            for parameter in plan.parameters()}
    for node in np.flatnonzero(graph.editable & np.isin(role, [Role.FORGET, Role.CONFLICT])):
        kind, layer, number = NodeKind(graph.kind[node]), int(graph.layer[node]), int(graph.index[node])
        for parameter, axis, index in body.slices(kind, layer, number):
            want[parameter][role[node]][(slice(None),) * axis + (index,)] = True
    for parameter, masks in want.items():
        for r, mask in masks.items():
            np.testing.assert_array_equal(plan.mask(parameter, (r,)), mask)


def test_an_mlp_block_owns_all_its_neurons():
    body = anatomy(tiny("llama"))
    slices = body.slices(NodeKind.MLP, 0, 0)
    assert all(len(index) == body.d_mlp for _, _, index in slices)
    assert len(slices) == 3


@pytest.mark.parametrize("kind", [NodeKind.EMBED, NodeKind.LOGITS, NodeKind.MLP_IN])
def test_nodes_without_weights_own_nothing(kind):
    assert anatomy(tiny("llama")).slices(kind, 0, 0) == []


def test_every_family_is_tested():
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


def test_an_unknown_family_says_what_its_entry_needs():
    model = MambaForCausalLM(MambaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"mamba.*known: llama, mistral.*q, k, v, o, gate, up and down"):
        anatomy(model)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    ("falcon", {"multi_query": False}, "multi_query = False"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
])
def test_a_variant_without_an_entry_is_refused(name, changes, message):
    with pytest.raises(ModelError, match=rf"this {name} model has .*{message}.*covered: "):
        anatomy(tiny(name, **changes))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "gemma3"])
def test_a_model_that_looks_ahead_is_refused(name):
    """Scores would leave out the tokens before the first that differs, where its runs differ too."""
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn sees later tokens .*use_bidirectional_attention = False"):
        anatomy(tiny(name, use_bidirectional_attention=True))
    made_so = tiny("llama")
    made_so.model.layers[1].self_attn.is_causal = False  # as embedding models are made of one
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.self_attn sees later tokens"):
        anatomy(made_so)


def test_a_model_without_a_language_modelling_head_is_refused():
    config = LlamaConfig(**{**VARIANTS["llama"][1], "num_labels": 2})
    with pytest.raises(ModelError, match="LlamaForSequenceClassification has no language modelling head"):
        anatomy(LlamaForSequenceClassification(config))


def test_what_is_no_plain_model_is_refused():
    for wrapped, message in ((torch.compile(tiny("llama")), "the model is compiled"), ("some/model", "got a str"),
                             (torch.nn.DataParallel(tiny("llama")), r"got a DataParallel: .* inside its wrapper \(.module\)")):
        with pytest.raises(ModelError, match=message):
            anatomy(wrapped)
    for compiled, name in ((lambda m: m.compile(), "the model"), (lambda m: m.model.layers[1].compile(), r"model\.layers\.1"),
                           (lambda m: setattr(m.model, "forward", torch.compile(m.model.forward)), "model")):
        model = tiny("llama")
        compiled(model)
        with pytest.raises(ModelError, match=rf"^{name} is compiled \(torch.compile\)"):
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

    class Linear(torch.nn.Linear):  # the name alone does not make it plain
        pass

    model.model.layers[0].self_attn.q_proj = Linear(16, 16)
    with pytest.raises(ModelError, match=r"q_proj is a Linear, not a plain linear layer"):
        anatomy(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_that_contradicts_the_weights_is_refused(name):
    model = tiny(name)
    model.config.get_text_config().hidden_size = 24
    with pytest.raises(ModelError, match=r"(weight|gate_up_proj) has shape .* the configuration says"):
        anatomy(model)


@pytest.mark.parametrize(("name", "kind"), [("llama", "rms+1"), ("llama", "layer"), ("gemma", "rms"), ("phi", "rms")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_of_another_kind_than_the_entry_says_is_refused(name, kind, dtype, monkeypatch):
    """Conservation compares two sums over the same pulled gradient, so it cannot notice this."""
    model = tiny(name, dtype)
    anatomy(model)
    monkeypatch.setitem(FAMILIES, name, (replace(FAMILIES[name][0], norm=kind),))
    with pytest.raises(ModelError, match=r"layers\.0\.input_layernorm does not compute what its entry says"):
        anatomy(model)


def test_groups_that_do_not_divide_the_heads_are_refused():
    model = tiny("falcon/grouped")
    model.config.num_kv_heads = 3
    with pytest.raises(ModelError, match="4 heads share 3 key/value groups"):
        anatomy(model)


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon/grouped"])
def test_groups_that_contradict_the_weights_are_refused(name):
    model = tiny(name)
    setattr(model.config, "num_kv_heads" if name.startswith("falcon") else "num_key_value_heads", 1)  # as if merged
    with pytest.raises(ModelError, match=r"(k_proj|qkv_proj|query_key_value)\.weight has shape"):
        anatomy(model)

"""Experts: hidden units against their definition token by token, and the same scores whichever way the model computes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clue.circuit.attribution import attribute, graph_of
from clue.config import LocalizeSettings
from clue.errors import ModelError, PlanError
from clue.model.anatomy import anatomy
from clue.model.experts import Routed, exchange, linear_traffic, neuron_attribution
from clue.pipeline import make_plan
from clue.types import NodeKind, Role
from tests.circuit.test_attribution import PAIRS
from tests.families import tiny
from tests.oracles import experts as oracle
from tests.oracles.neuron import neuron_attribution as by_definition

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe/normalised")


def routed(layer, tokens: int, k: int, generator: torch.Generator, among: int | None = None) -> Routed:
    """Tokens with ``k`` different experts each, drawn from the first ``among``."""
    count = among or layer.experts.count
    index = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    return Routed(torch.randn(tokens, 16, generator=generator, dtype=torch.float64), index, weights)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("among", "tile"), [(None, 2048), (2, 3)])
def test_neurons_equal_their_definition(name, among, tile, monkeypatch):
    """Dense activations and gradients of every unit, token by token; ``among`` leaves experts without a token."""
    from clue import _core

    monkeypatch.setattr("clue.model.experts.TILE", tile)

    layer = anatomy(tiny(name)).layers[1]
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (routed(layer, 9, 2, generator, among) for _ in range(2))
    gradients = tuple(torch.randn(9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()
    columns = oracle.columns(layer).detach()
    units = [oracle.hidden(layer, run.x, run.index, run.weights).detach() for run in (clean, corrupted)]
    want = by_definition(*units, *(gradient @ columns for gradient in gradients), rows)
    found = [torch.ones(columns.shape[1], dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        neuron_attribution(layer.experts, clean, corrupted, gradients, found, rows, _core)
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got - 1, wanted)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("among", "tile"), [(None, 2048), (2, 3)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_an_exchange_of_units_is_the_difference_of_what_they_write(name, among, tile, share, monkeypatch):
    monkeypatch.setattr("clue.model.experts.TILE", tile)
    layer = anatomy(tiny(name)).layers[1]
    generator = torch.Generator().manual_seed(1)
    now, other = (routed(layer, 9, 2, generator, among) for _ in range(2))
    columns = oracle.columns(layer).detach()
    chosen = torch.rand(columns.shape[1], generator=generator) < share
    z, wanted = (oracle.hidden(layer, run.x, run.index, run.weights).detach() for run in (now, other))
    with torch.no_grad():
        found = exchange(layer.experts, now, other, chosen)
    torch.testing.assert_close(found, torch.where(chosen, wanted, z) @ columns.T - z @ columns.T)


def test_an_expert_that_overflows_elsewhere_does_not_matter():
    """Activations are computed on routed tokens only: what an expert would make of another token is never looked at."""
    from clue import _core

    layer = anatomy(tiny("mixtral")).layers[0]
    x = torch.randn(2, 16, dtype=torch.float64)
    clean = Routed(x, torch.tensor([[0, 1], [0, 1]]), torch.full((2, 2), 0.5, dtype=torch.float64))
    corrupted = Routed(x * torch.tensor([[1.0], [float("inf")]]), torch.tensor([[0, 1], [2, 3]]), clean.weights)
    sums = [torch.zeros(32, dtype=torch.float64) for _ in range(4)]
    with torch.no_grad():
        neuron_attribution(layer.experts, clean, corrupted, (x, x), sums, torch.tensor([True, True]), _core)
    assert all(torch.isfinite(total[:16]).all() for total in sums)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_units_write_what_the_mlp_writes(name):
    """On the model's own routing: units times their columns add up to the MLP's output, to the last digits."""
    body = anatomy(tiny(name))
    seen = {}
    layer = body.layers[1]
    layer.experts.module.register_forward_pre_hook(lambda module, args: seen.__setitem__("call", args))
    layer.mlp.register_forward_hook(lambda module, args, output: seen.__setitem__("output", output))
    body.model(torch.tensor([[1, 5, 7, 9, 4, 3]]))
    units = oracle.hidden(layer, *seen["call"])
    torch.testing.assert_close(units @ oracle.columns(layer).T, seen["output"][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_implementation_gives_the_same_scores(name):
    scores = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        body = anatomy(tiny(name, torch.float32, experts_implementation=implementation))
        assert body.model.config._experts_implementation == implementation
        scores[implementation] = attribute(body, PAIRS, LocalizeSettings(batch_size=2))
    for other in ("batched_mm", "grouped_mm"):
        for array in ("ns", "dn", "neuron_ns", "neuron_dn"):
            want, got = (getattr(scores[key], array) for key in ("eager", other))
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", MIXTURES)
def test_half_precision_agrees_with_single(name):
    half, single = (attribute(anatomy(tiny(name, torch.bfloat16).to(dtype)), PAIRS)
                    for dtype in (torch.bfloat16, torch.float32))
    norm = np.linalg.norm(single.neuron_ns)
    assert norm > 1e-2
    assert np.linalg.norm(half.neuron_ns - single.neuron_ns) < 0.05 * norm
    mlps = np.flatnonzero(half.graph.kind[half.graph.writers] == NodeKind.MLP)
    np.testing.assert_allclose(half.neuron_ns.sum(1), half.ns[mlps].sum(1), atol=0.02 * np.abs(half.neuron_ns).sum())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_an_mlp_block_owns_all_its_experts(name):
    body = anatomy(tiny(name))
    slices = body.slices(NodeKind.MLP, 0, 0)
    experts = body.layers[0].experts
    assert len(slices) == 3 * len(experts.numbers)
    assert sum(len(index) for _, _, index in slices) == 3 * body.d_mlp
    assert not [name for name, _, _ in slices if "mlp.gate." in name or "shared_expert_gate" in name]


def test_traffic_through_an_expert_makes_its_weight_gradients():
    """The gradient of a linear layer's weight is the sum of (gradient at its output) (input)^T."""
    body = anatomy(tiny("qwen2_moe"))
    module = body.layers[1].experts.module
    seen = {}

    def hook(module, args, kwargs, output):
        seen["call"] = Routed.of(args, kwargs)
        output.register_hook(lambda gradient: seen.__setitem__("gradient", gradient))

    module.register_forward_hook(hook, with_kwargs=True)
    body.model(torch.tensor([[1, 5, 7, 9, 4, 3, 2]])).logits.square().sum().backward()
    rows = torch.ones(7, dtype=torch.bool)
    for number in range(4):
        for kind, (inputs, gradients) in linear_traffic(module, number, seen["call"], seen["gradient"], rows).items():
            torch.testing.assert_close(gradients.T @ inputs, getattr(module, kind).grad[number])


def test_experts_that_are_not_plain_are_refused():
    model = tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.register_parameter("gate_up_proj_bias", torch.nn.Parameter(torch.zeros(4, 16)))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts is a MixtralExperts, not experts with plain weights"):
        anatomy(model)


def test_a_shard_of_the_experts_is_refused():
    model = tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach()[:2].clone())
    with pytest.raises(ModelError, match=r"down_proj has shape \(2, 16, 8\), the configuration says \(4, 16, 8\)"):
        anatomy(model)


def test_plans_name_experts_that_a_smaller_model_lacks():
    body = anatomy(tiny("mixtral"))
    graph = graph_of(body)
    role = np.full(graph.n_nodes, Role.FREE)
    role[graph.node(NodeKind.NEURON, 1, 3 * 8 + 5)] = Role.FORGET
    plan = make_plan(body, graph, SimpleNamespace(role=role), {})
    stack = "model.layers.1.mlp.experts."
    assert {s.parameter: (s.axis, s.index.tolist()) for s in plan.slices} == {
        stack + "gate_up_proj[3]": (0, [5, 13]), stack + "down_proj[3]": (1, [5])}
    plan.check(body.model)
    with pytest.raises(PlanError, match=r"down_proj\[3\], which this model does not have"):
        plan.check(tiny("mixtral", num_local_experts=3))

"""Circuits whose size is not given: they grow until their nodes hold the share of the weights that is, and no further."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.circuit.attribution import Scores, graph_of
from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings
from clue.model.anatomy import Anatomy, anatomy
from clue.plan import Plan
from clue.size import NEURONS, node_weights, sized
from clue.types import Role

from .families import VARIANTS, tiny


def body_of(family: str) -> Anatomy:
    torch.manual_seed(0)
    return anatomy(tiny(family))


LLAMA = body_of("llama")


def scores_of(body: Anatomy, seed: int) -> Scores:
    random, graph = np.random.default_rng(seed), graph_of(body)
    ns, dn = random.standard_normal((2, *graph.residual_edges.shape)) * graph.residual_edges
    units = random.standard_normal((4, graph.n_layers, graph.d_mlp))
    return Scores("people", graph, ns, dn, *units, tokens=1, pairs=1, informative=1, gap_ns=0, gap_dn=0)


@pytest.mark.parametrize("family", sorted(VARIANTS))
@pytest.mark.parametrize("granularity", ["neuron", "block"])
def test_what_nodes_hold_is_what_plans_of_them_move(family: str, granularity: str) -> None:
    body = body_of(family)
    graph = replace(graph_of(body), neurons=granularity == "neuron")
    weights = node_weights(body, graph)
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 1.0):
        chosen = (random.random(graph.n_nodes) < share) & graph.editable
        plan = Plan.of_roles(body, graph, np.where(chosen, Role.FORGET, Role.FREE).astype(np.uint8), {})
        assert weights[chosen].sum() == plan.weights_changed


@given(seed=st.integers(0, 20), ratio=st.floats(0.01, 1.0), granularity=st.sampled_from(["neuron", "block"]))
@settings(max_examples=30, deadline=None)
def test_circuits_fill_the_budget_and_stay_within_it(seed: int, ratio: float, granularity: str) -> None:
    body = LLAMA
    scores = scores_of(body, seed)
    weights = node_weights(body, replace(scores.graph, neurons=granularity == "neuron"))

    def holds(settings: LocalizeSettings) -> float:
        return float(weights[build_circuit(scores, settings).nodes].sum() / weights.sum())

    chosen = sized(body, scores, LocalizeSettings(ratio=ratio, granularity=granularity))
    assert chosen.neurons == min(1.0, NEURONS * chosen.edges)
    least = replace(chosen, edges=2.0 ** -20, neurons=2.0 ** -19)
    assert holds(chosen) <= ratio or holds(chosen) == holds(least)
    step = 1.01  # a little more than the search is good to
    if chosen.edges * step < 1:
        assert holds(replace(chosen, edges=chosen.edges * step, neurons=min(1.0, chosen.neurons * step))) >= holds(chosen)
        wider = [holds(replace(chosen, edges=share, neurons=min(1.0, NEURONS * share)))
                 for share in np.geomspace(chosen.edges * step, 1, 40)]
        assert max(wider) > ratio or ratio == 1.0


def test_shares_that_are_given_stay() -> None:
    scores = scores_of(LLAMA, 0)
    for given_ in (LocalizeSettings(edges=0.3, neurons=0.2), LocalizeSettings(edges=0.3, granularity="block")):
        assert sized(LLAMA, scores, given_) is given_
    some = sized(LLAMA, scores, LocalizeSettings(edges=0.1, ratio=0.4))
    assert some.edges == 0.1 and 0 < some.neurons <= 1
    some = sized(LLAMA, scores, LocalizeSettings(neurons=0.1, ratio=0.4))
    assert some.neurons == 0.1 and 0 < some.edges <= 1
    faithful = sized(LLAMA, scores, LocalizeSettings(faithfulness=0.5, ratio=0.4))
    assert faithful.faithfulness == 0.5
    assert faithful.neurons == sized(LLAMA, scores, LocalizeSettings(ratio=0.4)).neurons

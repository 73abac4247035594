"""What is said of single nodes, against exhaustive search: in how many optima they conflict, why, and what if not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.errors import CircuitError
from clue.logic import Explainer, GateGroup, assign, explain
from clue.logic.explanation import BACKBONE, WhatIf
from clue.types import Gate, Role

from ..oracles.logic import Edges, Nodes, best_of_all, circuit, groups, in_optima, members, unavoidable
from .test_assign import SEMANTICS, hitting_set
from .test_surgery import question


def role_of(graph: Nodes, r: np.ndarray, f: np.ndarray) -> np.ndarray:
    role = np.where(graph.editable & (r == 1), Role.RETAIN, Role.FREE)
    role[graph.editable & (f == 0)] = Role.FORGET
    role[graph.editable & (f == 0) & (r == 1)] = Role.CONFLICT
    return role


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_backbone_equals_exhaustive_search_up_to_sixteen_nodes(semantics: str, block: int) -> None:
    """2000 questions in all, half of them with weights, some of which are zero."""
    rng = np.random.default_rng([3, block, len(semantics)])
    seen = set()
    for i in range(100):
        forget, retain, weights = question(rng, 4, 17 if i % 4 == 0 else 12)
        if i % 10 == 5:  # equivalences leave little to choose in random circuits, and a lot here
            forget, retain = ([side] for side in hitting_set(sets=int(rng.integers(1, 5)), leaves=9, seed=i))
            weights = rng.integers(0, 3, forget[0].graph.n_nodes)
        expected = in_optima(forget, retain, semantics, weights)
        explainer = Explainer(forget, retain, semantics=semantics, weights=weights)
        assert explainer.backbone.tolist() == expected.tolist()
        for node in {int(np.flatnonzero(expected == value)[0]) for value in expected}:
            status = explainer.explain(node).backbone
            assert status == ("none", "some", "every")[expected[node]]
            seen.add(status)
    assert seen == {"none", "some", "every"}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_pins_equal_exhaustive_search(semantics: str, block: int) -> None:
    """What if a node had another role, and nodes that are never or always edited: 1000 questions in all."""
    rng = np.random.default_rng([4, block, len(semantics)])
    impossible = 0
    for _ in range(50):
        forget, retain, weights = question(rng, 4, 12)
        graph = forget[0].graph
        risk, reach = (rng.integers(0, 3, graph.n_nodes) * (rng.random() < 0.7) for _ in range(2))
        options = {"semantics": semantics, "weights": weights, "retain_score": risk, "forget_score": reach}
        explainer = Explainer(forget, retain, **options)
        for node in rng.permutation(graph.n_nodes)[:3].tolist():
            for other in explainer.explain(node).what_if:
                retain_pin, forget_pin = np.full((2, graph.n_nodes), -1)
                retain_pin[node] = other.role in (Role.RETAIN, Role.CONFLICT)
                forget_pin[node] = other.role in (Role.RETAIN, Role.FREE)
                best = best_of_all(forget, retain, semantics, weights, risk, reach, retain_pin, forget_pin)
                if best is None:
                    assert other.cost is None and other.changes == ()
                    impossible += 1
                    continue
                role = role_of(graph, *best[:2])
                assert other.cost == best[2] and other.optimal and role[node] == other.role
                changed = [(n, role[n]) for n in np.flatnonzero(role != explainer.assignment.role) if n != node]
                assert list(other.changes) == changed
        inside = rng.permutation([m for m in members(forget) if graph.editable[m]]).tolist()[:3]
        never, must = inside[:2], inside[2:]
        forget_pin = np.full(graph.n_nodes, -1)
        forget_pin[never], forget_pin[must] = 1, 0
        best = best_of_all(forget, retain, semantics, weights, risk, reach, forget_pin=forget_pin)
        if best is None:
            with pytest.raises(CircuitError, match="the pins contradict the circuits: no assignment kills the forget"):
                assign(forget, retain, never=never, must=must, **options)
            continue
        found = assign(forget, retain, never=never, must=must, **options)
        assert found.retain_works.tolist() == best[0].tolist() and found.forget_works.tolist() == best[1].tolist()
        assert found.cost == found.lower_bound == best[2] and found.statistics["unique"] == 1
    assert impossible > 10


def as_gates(found: tuple[GateGroup, ...]) -> list[tuple[str, Gate, int, tuple[int, ...]]]:
    return [(g.side, g.gate, g.receiver, g.inputs) for g in found]


@pytest.mark.parametrize("semantics", SEMANTICS)
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_reasons_are_gates_of_the_circuits_that_suffice_and_are_all_needed(semantics: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    forget, retain, weights = question(rng, 4, 10)
    n = forget[0].graph.n_nodes
    for side, circuits in (("forget", forget), ("retain", retain)):
        for c, one in enumerate(circuits):
            circuits[c] = Edges(f"{side} {c}", one.graph, one.src, one.dst, one.gate)
    explainer = Explainer(forget, retain, semantics=semantics, weights=weights)
    known = {(one.name, node, gate): tuple(sorted(set(inputs)))
             for one in (*forget, *retain) for node, gate, inputs in groups([one])}
    for node in np.flatnonzero(explainer.assignment.role == Role.CONFLICT).tolist():
        found = explainer.explain(node)
        assert found.forced == bool(explainer.assignment.forced[node]) != found.chosen
        for gate in found.gates:
            assert gate.circuit.startswith(gate.side) and known[gate.circuit, gate.receiver, gate.gate] == gate.inputs
        gates, nodes = as_gates(found.gates), [node, *found.instead]
        if found.forced:
            assert found.backbone == "every" and found.gates and not found.instead
        if not gates:
            assert weights[node] == 0 or unavoidable([], nodes, n, semantics)
            continue
        assert unavoidable(gates, nodes, n, semantics)
        for left_out in range(len(gates)):
            assert not unavoidable(gates[:left_out] + gates[left_out + 1:], nodes, n, semantics)
        for m in found.instead:
            assert explainer.assignment.role[m] != Role.CONFLICT
            assert not unavoidable(gates, [x for x in nodes if x != m], n, semantics)


def test_a_choice_and_a_forced_conflict() -> None:
    # Forgetting kills 1 or 2 (retention needs both) and, for certain, 3, through 4.
    graph = Nodes(6, np.array([0, 1, 1, 1, 1, 0], bool))
    forget = circuit(graph, [(1, 5, Gate.AND), (2, 5, Gate.AND), (0, 3, Gate.ADDER), (3, 4, Gate.ADDER),
                             (4, 5, Gate.OR)], "facts")
    retain = circuit(graph, [(0, 3, Gate.ADDER), (1, 5, Gate.ADDER), (2, 5, Gate.ADDER), (3, 5, Gate.ADDER)], "text")
    explainer = Explainer([forget], [retain])
    assert explainer.assignment.cost == 2
    chosen, other, forced = (explainer.explain(node) for node in ("node 2", 1, 3))
    assert (chosen.role, chosen.backbone, chosen.chosen, chosen.instead) == (Role.CONFLICT, "some", True, (1,))
    text = GateGroup("retain", "text", 5, Gate.ADDER, (1, 2, 3))
    assert chosen.gates == (GateGroup("forget", "facts", 5, Gate.AND, (1, 2)), text)
    assert (other.role, other.backbone, other.gates) == (Role.RETAIN, "some", ())
    assert (forced.backbone, forced.forced, forced.instead) == ("every", True, ())
    assert forced.gates == (GateGroup("forget", "facts", 4, Gate.ADDER, (3,)),
                            GateGroup("forget", "facts", 5, Gate.OR, (4,)), text)
    (swap,) = [what for what in other.what_if if what.role == Role.CONFLICT]
    assert swap.cost == 2 and swap.changes == ((2, Role.RETAIN),)
    assert all(what.cost is None for what in forced.what_if)
    lines = chosen.lines(graph.name, 2)
    assert lines[0] == "node 2 is conflict, chosen; a conflict in some assignment of least cost"
    assert lines[1:4] == ["these gates leave the choice between it and node 1:",
                          "  forget facts: node 5 = AND(node 1, node 2)",
                          "  retain text: node 5 = ADDER(node 1, node 2, node 3)"]
    assert "as retain: cost 2 (+0), node 1 conflict" in lines
    dearer = replace(chosen, what_if=(WhatIf(Role.FREE, 5, False, ()),))
    assert dearer.lines(graph.name, 2)[-1] == "as free: cost 5 (+3), not proven least"
    assert explain([forget], [retain], 2, assignment=explainer.assignment) == chosen


def test_large_circuits_are_surveyed_in_one_call() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    editable = np.ones(n, bool)
    editable[[0, -1]] = False
    graph = Nodes(n, editable)
    forget, retain = ([layered_fast(rng, graph, 60_000, (0.45, 0.45, 0.1))] for _ in range(2))
    explainer = Explainer(forget, retain)
    conflict, backbone = explainer.assignment.role == Role.CONFLICT, explainer.backbone
    assert not np.any(conflict & (backbone == 0)) and not np.any(~conflict & (backbone == 2))
    assert np.all(backbone[explainer.assignment.forced] == 2)
    assert set(backbone.tolist()) == {0, 1, 2}
    for node in np.flatnonzero(backbone == 1)[:2].tolist():  # another optimum shows the node as this one does not
        role = Role.RETAIN if conflict[node] else Role.CONFLICT
        costs = [explainer.what_if(node, other).cost for other in Role if (other == Role.CONFLICT) != conflict[node]]
        assert explainer.assignment.cost in costs, role
    for node in np.flatnonzero(conflict & ~explainer.assignment.forced)[:2].tolist():
        assert explainer.reason(node)[0]


def layered_fast(rng: np.random.Generator, graph: Nodes, edges: int, mix: tuple[float, float, float]) -> Edges:
    """Random edges between neighbouring tenths of the nodes, embedding and output at the ends."""
    n = graph.n_nodes
    layer = np.sort(rng.integers(1, n - 1, 10))
    bounds = np.concatenate([[0, 1], layer[(layer > 1) & (np.diff(layer, append=n) > 0)], [n - 1, n]])
    dst = rng.integers(bounds[2], n - 1, edges)
    dst[:60] = n - 1
    at = np.searchsorted(bounds, dst, side="right") - 1
    src = (bounds[at - 1] + rng.random(edges) * (bounds[at] - bounds[at - 1])).astype(int)
    pairs, first = np.unique(src * n + dst, return_index=True)
    return Edges("random", graph, (pairs // n).astype(np.int32), (pairs % n).astype(np.int32),
                 rng.choice(3, len(first), p=mix).astype(np.uint8))


def test_refusals() -> None:
    forget, retain = hitting_set(sets=5, leaves=10)
    unfinished = assign(*map(lambda one: [one], hitting_set()), time_limit=0.1)
    for text, options in [
        ("proven optimal", {"assignment": unfinished}),
        ("does not belong", {"assignment": assign([retain], [forget])}),
        ("does not belong", {"weights": np.arange(len(forget.graph.editable)) + 2,
                             "assignment": assign([forget], [retain])}),
    ]:
        with pytest.raises(CircuitError, match=text):
            Explainer([forget], [retain], **options)
    found = assign([forget], [retain])
    role, inside = found.role.copy(), int(np.flatnonzero(found.role == Role.CONFLICT)[0])
    role[inside] = Role.RETAIN
    told = {"role": role, "cost": found.cost + 1}
    for works in ("retain_works", "forget_works"):  # of another circuit: this node is in none
        told[works] = getattr(found, works).copy()
        outside = np.flatnonzero(found.role != Role.CONFLICT)
        told[works][outside[getattr(found, works)[outside] >= 0][-1]] = -1
    for name, value in told.items():
        with pytest.raises(CircuitError, match="does not belong"):
            Explainer([forget], [retain], assignment=replace(found, **{name: value}))
    longer = {name: np.append(getattr(found, name), getattr(found, name)[-1]) for name in ("role", "retain_works",
                                                                                          "forget_works")}
    with pytest.raises(CircuitError, match="does not belong"):
        Explainer([forget], [retain], assignment=replace(found, **longer))
    with pytest.raises(CircuitError, match="node: there is no node 'x'"):
        explain([forget], [retain], "x")
    assert BACKBONE.index("every") == 2

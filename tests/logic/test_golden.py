"""Golden tests of the logic stage: what the published release gets wrong must come out right here."""

from __future__ import annotations

import numpy as np
import pytest

from clue.circuit.graph import Circuit, Graph
from clue.logic import assign
from clue.types import Gate, NodeKind, Provenance, Role

GRAPH = Graph(n_layers=4, n_heads=8, n_kv_heads=4, d_mlp=16, neurons=False)
HEADS = np.flatnonzero(GRAPH.kind == NodeKind.HEAD)


def circuit(name: str, edges: list[tuple[int, int, Gate]]) -> Circuit:
    columns = np.array(sorted(edges, key=lambda e: (e[1], e[0])))
    score = np.full(len(edges), 0.1)
    return Circuit(name, GRAPH, columns[:, 0].astype(np.int32), columns[:, 1].astype(np.int32),
                   columns[:, 2].astype(np.uint8), np.full(len(edges), Provenance.BOTH, np.uint8), score, score)


def flat(name: str, nodes: np.ndarray, gate: Gate) -> Circuit:
    """embed -> each node -> logits."""
    return circuit(name, [(GRAPH.embed, int(n), Gate.ADDER) for n in nodes]
                   + [(int(n), GRAPH.logits, gate) for n in nodes])


def test_optimum_is_proven_without_enumeration_and_ties_go_by_rule() -> None:
    # 32 free leaves: 2^32 x 2^32 assignments to the released enumeration. One must die, and retention needs them all.
    forget, retain = flat("forget", HEADS, Gate.AND), flat("retain", HEADS, Gate.ADDER)
    assert len(HEADS) == 32
    found = assign([forget], [retain])
    assert found.optimal and found.cost == found.lower_bound == 1
    assert (found.n_forced, found.n_chosen) == (0, 1)
    # From node 0 upwards f_n = 1 is preferred, so it is the last head that goes, whatever order the edges come in.
    assert np.flatnonzero(found.role == Role.CONFLICT).tolist() == [HEADS[-1]]
    # Scores move the unavoidable conflict to where it hurts retention least.
    score = np.ones(GRAPH.n_nodes)
    score[HEADS[7]] = 0.5
    assert np.flatnonzero(assign([forget], [retain], retain_score=score).role == Role.CONFLICT).tolist() == [HEADS[7]]
    weights = np.full(GRAPH.n_nodes, 5)
    weights[HEADS[3]] = 2
    found = assign([forget], [retain], weights=weights)
    assert found.cost == 2 and found.role[HEADS[3]] == Role.CONFLICT


@pytest.mark.parametrize("semantics", ["support", "authors"])
def test_output_and_embedding_never_count(semantics: str) -> None:
    both = flat("both", HEADS, Gate.ADDER)
    found = assign([both], [both], semantics=semantics)
    assert found.retain_works[GRAPH.logits] == 1 and found.forget_works[GRAPH.logits] == 0
    assert found.retain_works[GRAPH.embed] == 1 and found.forget_works[GRAPH.embed] == 1
    assert found.cost == found.n_forced == len(HEADS) and found.n_chosen == 0
    assert found.role[GRAPH.logits] == found.role[GRAPH.embed] == Role.FREE
    assert not found.forced[GRAPH.logits]


def test_roles_are_disjoint() -> None:
    # Heads 0..3 are shared, 4..7 forget only, 8..11 retain only; everything is forced.
    forget, retain = flat("forget", HEADS[:8], Gate.OR), flat("retain", np.r_[HEADS[:4], HEADS[8:12]], Gate.AND)
    role = assign([forget], [retain]).role
    assert (role[HEADS[:4]] == Role.CONFLICT).all()
    assert (role[HEADS[4:8]] == Role.FORGET).all()
    assert (role[HEADS[8:12]] == Role.RETAIN).all()
    assert (role[HEADS[12:]] == Role.FREE).all()


def test_dead_ends_stay_dead_ends() -> None:
    # A node that only leads to another dead end is not tied to the output: nothing asks it to die.
    forget = circuit("forget", [(0, int(HEADS[0]), Gate.AND), (int(HEADS[0]), GRAPH.logits, Gate.AND),
                                (0, int(HEADS[1]), Gate.AND)])
    retain = flat("retain", HEADS[2:4], Gate.AND)
    found = assign([forget], [retain])
    assert found.forget_works[HEADS[0]] == 0 and found.forget_works[HEADS[1]] == 1
    assert found.role[HEADS[1]] == Role.FREE and found.cost == 0

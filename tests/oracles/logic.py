"""The best assignment by trying them all: method.md's rules word for word, for circuits of about ten nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from clue.types import Gate


@dataclass(frozen=True)
class Nodes:
    """The part of a graph that logic looks at: node 0 is the embedding, the last node the output."""

    n_nodes: int
    editable: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nodes) and self.n_nodes == other.n_nodes and bool(
            np.array_equal(self.editable, other.editable))

    def name(self, node: int) -> str:
        return f"node {node}"


@dataclass(frozen=True)
class Edges:
    """A circuit over :class:`Nodes`."""

    name: str
    graph: Nodes
    src: np.ndarray
    dst: np.ndarray
    gate: np.ndarray


def circuit(graph: Nodes, edges: Sequence[tuple[int, int, Gate]], name: str = "circuit") -> Edges:
    """A circuit from (src, dst, gate) triples."""
    src, dst, gate = zip(*edges, strict=True)
    return Edges(name, graph, np.array(src, np.int32), np.array(dst, np.int32), np.array(gate, np.uint8))


def groups(circuits: Sequence[Edges]) -> list[tuple[int, Gate, list[int]]]:
    """(node, gate, inputs) of every group of every circuit."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for c, one in enumerate(circuits):
        for u, v, g in zip(one.src.tolist(), one.dst.tolist(), one.gate.tolist(), strict=True):
            found.setdefault((c, v, g), []).append(u)
    return [(v, Gate(g), inputs) for (_, v, g), inputs in found.items()]


def members(circuits: Sequence[Edges]) -> list[int]:
    """Nodes of the circuits, in id order."""
    return sorted({int(n) for one in circuits for n in (*one.src, *one.dst)})


def retain_ok(r: dict[int, bool], circuits: Sequence[Edges], semantics: str) -> bool:
    """Whether r satisfies the retain side: AND and ADDER groups need all inputs, OR groups one."""
    for node, gate, inputs in groups(circuits):
        works = any(r[m] for m in inputs) if gate == Gate.OR else all(r[m] for m in inputs)
        if r[node] and not works or semantics == "authors" and works and not r[node]:
            return False
    return True


def forget_ok(f: dict[int, bool], circuits: Sequence[Edges], semantics: str) -> bool:
    """Whether f satisfies the forget side: OR and ADDER groups die with all inputs, AND groups with one."""
    for node, gate, inputs in groups(circuits):
        inputs = [m for m in inputs if m != 0]
        if not inputs:
            continue
        works = all(f[m] for m in inputs) if gate == Gate.AND else any(f[m] for m in inputs)
        if works and not f[node] or semantics == "authors" and f[node] and not works:
            return False
    return True


def _assignments(nodes: list[int], output: int, at_output: bool) -> Iterator[dict[int, bool]]:
    for values in product((True, False), repeat=len(nodes)):
        x = dict(zip(nodes, values, strict=True))
        if x[output] == at_output and x.get(0, True):
            yield x


def best(forget: Sequence[Edges], retain: Sequence[Edges], semantics: str, weights: np.ndarray, risk: np.ndarray,
         reach: np.ndarray) -> tuple[dict[int, bool], dict[int, bool], tuple[int, ...]]:
    """(r, f, key) with the least key; ``risk`` and ``reach`` are the scores as integers."""
    graph = forget[0].graph
    output, editable = graph.n_nodes - 1, graph.editable
    rs = [r for r in _assignments(members(retain), output, True) if retain_ok(r, retain, semantics)]
    fs = [f for f in _assignments(members(forget), output, False) if forget_ok(f, forget, semantics)]
    found = None
    for r in rs:
        for f in fs:
            conflicts = sum(int(weights[n]) for n in r if n in f and editable[n] and r[n] and not f[n])
            if found is not None and conflicts > found[0][0]:
                continue
            at_risk = sum(int(risk[n]) for n in r if not r[n])
            at_risk += sum(int(risk[n]) for n in r if editable[n] and n in f and not f[n])
            reached = sum(int(reach[n]) for n in f if editable[n] and not f[n])
            order = [not x[n] for n in range(graph.n_nodes) for x in (f, r) if n in x]
            key = (conflicts, at_risk, -reached, *order)
            if found is None or key < found[0]:
                found = key, r, f
    assert found is not None, "all r true and all f false always holds"
    return found[1], found[2], found[0]


def _satisfying(circuits: Sequence[Edges], semantics: str, retain: bool) -> np.ndarray:
    """bool [assignments, nodes]: every assignment that satisfies one side, by trying all; False where not a member."""
    n = circuits[0].graph.n_nodes
    free = [m for m in members(circuits) if m not in (0, n - 1)]
    x = np.zeros((1 << len(free), n), bool)
    x[:, free] = np.arange(1 << len(free))[:, None] >> np.arange(len(free)) & 1
    x[:, 0] = 0 in members(circuits)
    x[:, n - 1] = retain
    ok = np.ones(len(x), bool)
    for node, gate, inputs in groups(circuits):
        inputs = inputs if retain else [m for m in inputs if m != 0]
        if not inputs:
            continue
        one_suffices = gate == Gate.OR or (gate == Gate.ADDER and not retain)
        works = x[:, inputs].any(axis=1) if one_suffices else x[:, inputs].all(axis=1)
        if semantics == "authors":
            ok &= works == x[:, node]
        else:
            ok &= works | ~x[:, node] if retain else ~works | x[:, node]
    return x[ok]


def best_of_all(forget: Sequence[Edges], retain: Sequence[Edges], semantics: str, weights: np.ndarray,
                risk: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(r, f, conflicts) like :func:`best`, by arrays, up to 16 nodes and small numbers.

    All levels of the order are digits of one integer. Only the first depends on r and f together.
    """
    graph = forget[0].graph
    n, editable = graph.n_nodes, graph.editable
    in_r, in_f = (np.isin(np.arange(n), members(side)) for side in (retain, forget))
    rs, fs = _satisfying(retain, semantics, True), _satisfying(forget, semantics, False)
    weights, risk, reach = (np.asarray(v, np.int64) for v in (weights, risk, reach))
    assert n <= 16 and 2 * risk.sum() < 1 << 8 and reach.sum() < 1 << 8 and weights.sum() < 1 << 14
    place = np.int64(1) << 2 * np.arange(n, dtype=np.int64)[::-1]  # node 0 counts most; f before r
    of_r = (~rs & in_r) @ (risk << 40) + (~rs & in_r) @ place
    of_f = (~fs & in_f & editable) @ ((risk * in_r << 40) - (reach << 32)) + (~fs & in_f) @ (2 * place)
    shared = in_r & in_f & editable
    bits = np.int64(1) << np.arange(n, dtype=np.int64)
    cost_of = np.zeros(1 << n, np.int64)  # of every set of conflicts
    for node in range(n):
        cost_of[1 << node:2 << node] = cost_of[:1 << node] + weights[node]
    works, dead = (rs & shared) @ bits, (~fs & shared) @ bits
    found = None
    for i in range(len(rs)):
        key = (cost_of[works[i] & dead] << 49) + of_f + of_r[i]
        j = int(key.argmin())
        if found is None or key[j] < found[0]:
            found = int(key[j]), i, j
    assert found is not None, "all r true and all f false always holds"
    _, i, j = found
    return np.where(in_r, rs[i], -1), np.where(in_f, fs[j], -1), int(cost_of[works[i] & dead[j]])

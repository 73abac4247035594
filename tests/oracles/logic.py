"""The best assignment, and the best edit, by trying them all: the rules word for word, for circuits of 10 to 16 nodes."""

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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(self.name, range(self.n_nodes)))


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
                risk: np.ndarray, reach: np.ndarray, retain_pin: np.ndarray | None = None,
                forget_pin: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(r, f, conflicts) like :func:`best`, by arrays, up to 16 nodes and small numbers; None if no r and f obey the pins
    (int8 [nodes], -1 where they are free).

    All levels of the order are digits of one integer. Only the first depends on r and f together.
    """
    graph = forget[0].graph
    n, editable = graph.n_nodes, graph.editable
    in_r, in_f = (np.isin(np.arange(n), members(side)) for side in (retain, forget))
    rs, fs = _satisfying(retain, semantics, True), _satisfying(forget, semantics, False)
    if retain_pin is not None:
        rs = rs[np.all((retain_pin < 0) | ~in_r | (rs == retain_pin), axis=1)]
    if forget_pin is not None:
        fs = fs[np.all((forget_pin < 0) | ~in_f | (fs == forget_pin), axis=1)]
    if not len(rs) or not len(fs):
        return None
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


def in_optima(forget: Sequence[Edges], retain: Sequence[Edges], semantics: str, weights: np.ndarray) -> np.ndarray:
    """uint8 [nodes]: the node is a conflict in 0 no, 1 some, 2 every assignment of least cost."""
    graph = forget[0].graph
    n = graph.n_nodes
    in_r, in_f = (np.isin(np.arange(n), members(side)) for side in (retain, forget))
    shared = in_r & in_f & graph.editable
    rs, fs = (np.unique(side[:, shared], axis=0)
              for side in (_satisfying(retain, semantics, True), ~_satisfying(forget, semantics, False)))
    least, ever, always = None, np.zeros(0), np.zeros(0)
    for r in rs:
        conflicts = fs & r
        cost = conflicts @ weights[shared]
        if least is None or cost.min() < least:
            least, ever, always = cost.min(), np.zeros(shared.sum(), bool), np.ones(shared.sum(), bool)
        best = conflicts[cost == least]
        ever, always = ever | best.any(axis=0), always & best.all(axis=0)
    found = np.zeros(n, np.uint8)
    found[shared] = ever.astype(np.uint8) + always
    return found


def unavoidable(gates: Sequence[tuple[str, Gate, int, Sequence[int]]], nodes: Sequence[int], n: int,
                semantics: str) -> bool:
    """Whether gates (side, gate, receiver, inputs) alone make one of the nodes a conflict in every assignment."""
    x = (np.arange(1 << n)[:, None] >> np.arange(n) & 1).astype(bool)  # works on the retain side, dead on the other
    found = {}
    for side in ("retain", "forget"):
        ok = x[:, n - 1].copy()
        for of, gate, node, given in gates:
            inputs = [m for m in given if m != 0]
            if of != side or not inputs and side == "forget":
                continue
            each = gate == Gate.ADDER or (gate == Gate.AND) == (side == "retain")
            asked = x[:, inputs].all(axis=1) if each or not inputs else x[:, inputs].any(axis=1)
            if side == "retain" and 0 in given and not each:
                asked |= True
            ok &= (asked == x[:, node]) if semantics == "authors" else asked | ~x[:, node]
        found[side] = np.unique(x[ok][:, list(nodes)], axis=0)
    return all(np.any(r & found["forget"], axis=1).all() for r in found["retain"])


@dataclass(frozen=True)
class Edit:
    """The best edit set, node ids, and the weight of its conflicts."""

    edited: list[int]
    conflict: list[int]
    cost: int


def after(circuits: Sequence[Edges], stopped: np.ndarray, retain: bool) -> np.ndarray:
    """bool [edits, nodes]: what works in one side's circuits when the given nodes [edits, nodes] are stopped."""
    works = ~stopped
    for node in range(1, circuits[0].graph.n_nodes):
        answers = []
        for receiver, gate, given in groups(circuits):
            if receiver != node:
                continue
            inputs = given if retain else [m for m in given if m != 0]
            if not inputs:
                continue
            one_suffices = gate == Gate.OR or (gate == Gate.ADDER and not retain)
            answers.append(works[:, inputs].any(axis=1) if one_suffices else works[:, inputs].all(axis=1))
        if answers:
            works[:, node] &= np.all(answers, axis=0) if retain else np.any(answers, axis=0)
    return works


def best_edit(forget: Sequence[Edges], retain: Sequence[Edges], weights: np.ndarray, risk: np.ndarray, reach: np.ndarray,
              *, budget: int | None = None, most: int | None = None, never: Sequence[int] = (),
              must: Sequence[int] = ()) -> Edit | None:
    """The best edit of all edits and all conflicts within them; None if there is none within the limits."""
    graph = forget[0].graph
    n = graph.n_nodes
    free = [m for m in members(forget) if graph.editable[m] and m not in (0, n - 1)]
    shared = [m for m in free if m in members(retain)]
    place = np.arange(1 << len(free))[:, None] >> np.arange(len(free)) & 1
    edits = np.zeros((len(place), n), bool)
    edits[:, free] = place
    kept = ~after(forget, edits, False)[:, n - 1] & ~edits[:, list(never)].any(axis=1) & edits[:, list(must)].all(axis=1)
    if budget is not None:
        kept &= edits @ weights <= budget
    if most is not None:
        kept &= edits.sum(axis=1) <= most
    edits = edits[kept]
    if not len(edits):
        return None
    # For every set of shared nodes that stop, whether retention survives it; then the dearest such part of each edit.
    stops = np.zeros((1 << len(shared), n), bool)
    stops[:, shared] = np.arange(1 << len(shared))[:, None] >> np.arange(len(shared)) & 1
    alive = after(retain, stops, True)[:, n - 1]
    weight = np.where(alive, stops @ weights, -1)
    dearest = weight.copy()
    for bit in range(len(shared)):
        has = np.flatnonzero(np.arange(len(dearest)) >> bit & 1)
        dearest[has] = np.maximum(dearest[has], dearest[has ^ (1 << bit)])
    code = edits[:, shared] @ (1 << np.arange(len(shared)))
    at_risk = np.isin(np.arange(n), members(retain)) * risk
    key = np.stack([edits[:, shared] @ weights[shared] - dearest[code], edits @ weights, edits @ at_risk,
                    -(edits @ reach)], axis=1)
    order = np.lexsort(key.T[::-1])
    best = None
    for i in order[np.all(key[order] == key[order[0]], axis=1)]:
        parts = np.flatnonzero((np.arange(len(weight)) & ~code[i] == 0) & (weight == dearest[code[i]]))
        for part in parts:
            conflict = edits[i] & ~stops[part]
            conflict[[m for m in range(n) if m not in shared]] = False
            preference = [bool(x[m]) for m in range(n) for x in (edits[i], conflict)]
            if best is None or preference < best[0]:
                best = preference, edits[i], conflict
    assert best is not None
    return Edit(np.flatnonzero(best[1]).tolist(), np.flatnonzero(best[2]).tolist(), int(key[order[0], 0]))

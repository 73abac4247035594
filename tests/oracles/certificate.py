"""A checker of certificates that believes nothing: the layout of csrc/logic/certificate.hpp word for word, the question
as a list of clauses, and unit propagation over all of them, whatever the hints say.

Literals are (variable, sign) with any hashable variable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from clue.types import Gate

from .logic import Edges, groups, members

Literal = tuple[Hashable, bool]
Clause = list[Literal]


class Wrong(Exception):
    """The certificate does not prove its claim."""


class Reader:
    """Numbers from bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise Wrong("it ends too soon")
        self.at += size
        return self.data[self.at - size:self.at]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.bytes(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        value = self.number()
        return -(value + 1) // 2 if value % 2 else value // 2


def digest(kind: str, arrays: Iterable[np.ndarray]) -> bytes:
    """The name of a question, word for word as csrc/logic/checksum.hpp and clue.certificate.digest say."""
    found = hashlib.sha256(kind.encode())
    for array in arrays:
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        content += bytes(-len(content) % 32)
        sums = [0, 1, 2, 3]
        for at in range(0, len(content), 8):
            word, lane = int.from_bytes(content[at:at + 8], "little"), at // 8 % 4
            value = (sums[lane] + word * 0x9E3779B97F4A7C15) % 2**64
            sums[lane] = (value << 31 | value >> 33) % 2**64 * 0xD6E8FEB86659FD93 % 2**64
        found.update(len(array).to_bytes(8, "little") + b"".join(value.to_bytes(8, "little") for value in sums))
    return found.digest()


def negated(literal: Literal) -> Literal:
    return literal[0], not literal[1]


def propagated(clauses: Iterable[Clause], assumed: Iterable[Literal]) -> set[Literal] | None:
    """What unit propagation reaches; None on a conflict."""
    true = set(assumed)
    while True:
        if any(negated(literal) in true for literal in true):
            return None
        new = set()
        for clause in clauses:
            if any(literal in true for literal in clause):
                continue
            left = {literal for literal in clause if negated(literal) not in true}
            if not left:
                return None
            if len(left) == 1:
                new |= left
        if not new:
            return true
        true |= new


class Totalizers:
    """Variables ``n`` that count literals, by the node they belong to."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[list[Literal], list[Literal], list[Literal], int]] = {}

    def add(self, inputs: list[Literal], free: int) -> tuple[list[Literal], int]:
        """Outputs of the node over the inputs, "at least 1" first, and the first variable that is left."""
        if len(inputs) == 1:
            return inputs, free
        half = len(inputs) // 2
        outputs: list[Literal] = [(free + i, True) for i in range(len(inputs))]
        left, after = self.add(inputs[:half], free + len(inputs))
        right, after = self.add(inputs[half:], after)
        for j in range(len(inputs)):
            self.outputs[free + j] = left, right, outputs, j + 1
        return outputs, after


def section(data: Reader, axiom: Callable[[Reader], Clause], cost_of: Callable[[Literal], int], no_model: bool) -> int:
    """Check one section and return what it proves."""
    k = data.number()
    clauses: list[Clause] = []
    names: dict[Hashable, int] = {}
    for _ in range(data.number()):
        clause = axiom(data)
        for variable, _sign in clause:
            names.setdefault(variable, len(names) + 1)
        clauses.append([(names[variable], sign) for variable, sign in clause])
    cost: dict[Literal, int] = {}
    for variable, number in names.items():
        for sign in (True, False):
            cost[number, sign] = cost_of((variable, sign))
    free, paid, totalizers, empty = len(names) + 1, 0, Totalizers(), [] in clauses

    def literal() -> Literal:
        code = data.number()
        if not 2 <= code < 2 * free:
            raise Wrong("a literal of no variable")
        return code // 2, code % 2 == 0

    while (kind := data.number()) != 0:
        if kind in (1, 2):
            weight = data.number() if kind == 2 else 0
            clause = [literal() for _ in range(data.number())]
            for _ in range(data.number()):
                data.number()
            if propagated(clauses, [negated(one) for one in clause]) is not None:
                raise Wrong("a clause does not follow")
            empty = empty or not clause
            if kind == 2:
                if not clause:
                    raise Wrong("an empty core")
                for one in clause:
                    if cost.get(one, 0) < weight:
                        raise Wrong("a core dearer than its literals")
                    cost[one] -= weight
                paid += weight
                if len(clause) > 1:
                    outputs, free = totalizers.add(clause, free)
                    for output in outputs[1:]:
                        cost[output] = weight
        elif kind == 3:
            variable, i = literal(), data.number()
            if not variable[1] or variable[0] not in totalizers.outputs:
                raise Wrong("no totalizer")
            left, right, outputs, j = totalizers.outputs[variable[0]]  # type: ignore[index]
            if not 0 <= i <= min(j, len(left)) or j - i > len(right):
                raise Wrong("no such clause")
            clause = [negated(left[i - 1])] * (i > 0) + [negated(right[j - i - 1])] * (j > i) + [variable]
        elif kind == 4:
            variable = literal()
            if not variable[1] or variable[0] not in totalizers.outputs:
                raise Wrong("no totalizer")
            _, _, outputs, j = totalizers.outputs[variable[0]]  # type: ignore[index]
            if j < 2:
                raise Wrong("no such clause")
            clause = [negated(variable), outputs[j - 2]]
        elif kind == 5:
            dear = literal()
            if no_model or paid + cost.get(dear, 0) < k:
                raise Wrong("hard, but not dear enough")
            clause = [negated(dear)]
        else:
            raise Wrong("an unknown step")
        clauses.append(clause)
    if not empty and (no_model or paid < k):
        raise Wrong("it proves too little")
    return k


def head(data: Reader, kind: int, question: bytes) -> bool:
    """Whether a model is claimed."""
    if data.bytes(8) != b"CLUECERT" or data.bytes(4) != (2).to_bytes(4, "little") or data.bytes(1) != bytes([kind]):
        raise Wrong("no certificate of such a question")
    claim = data.bytes(1)[0]
    if claim > 1 or data.bytes(32) != question:
        raise Wrong("another claim or question")
    return claim == 1


def check_circuits(data: bytes, question: bytes, forget: Sequence[Edges], retain: Sequence[Edges], semantics: str,
                   weights: np.ndarray) -> int:
    """The cost that the certificate proves to be the least; ``question`` is the digest. Wrong if it proves nothing."""
    graph = forget[0].graph
    n = graph.n_nodes
    # x of a side: (side, node) is "works" on the retain side (1) and "dead" on the forget side (0).
    named: dict[tuple[int, ...], Clause] = {}
    for side, circuits in ((0, forget), (1, retain)):
        for c, one in enumerate(circuits):
            for node, gate, inputs in groups([one]):
                embed, inputs = 0 in inputs, sorted({m for m in inputs if m != 0})
                asks_all = gate == Gate.ADDER or (gate == Gate.AND) == (side == 1)
                head_ = (side, node)
                if not inputs or (embed and side == 1 and not asks_all):
                    if side == 1 and semantics == "authors":
                        named[side, 4, node, c, gate] = [(head_, True)]
                    continue
                if asks_all:
                    for m in inputs:
                        named[side, 1, node, m] = [(head_, False), ((side, m), True)]
                    if semantics == "authors":
                        named[side, 4, node, c, gate] = [(head_, True), *(((side, m), False) for m in inputs)]
                else:
                    named[side, 3, node, c, gate] = [(head_, False), *(((side, m), True) for m in inputs)]
                    if semantics == "authors":
                        for m in inputs:
                            named[side, 2, node, m] = [(head_, True), ((side, m), False)]
    output: list[Clause] = [[((0, n - 1), True)], [((1, n - 1), True)], [((0, 0), False)], [((1, 0), True)]]
    formula = [*named.values(), *output]
    top = propagated(formula, [])
    assert top is not None
    paying = {m for m in set(members(forget)) & set(members(retain)) if graph.editable[m] and weights[m] > 0}

    stream = Reader(data)
    if not head(stream, 1, question):
        raise Wrong("there always is an assignment")
    cost = stream.number()
    bits = stream.bytes((2 * n + 7) // 8)

    def value(side: int, node: int) -> bool:
        return bool(bits[node // 4] >> (2 * (node % 4) + 1 - side) & 1)

    for side, circuits in ((0, forget), (1, retain)):
        present = set(members(circuits))
        for clause in formula:
            if all(v[0] == side and v[1] in present for v, _ in clause) and not any(  # type: ignore[index]
                    value(*v) == sign for v, sign in clause):  # type: ignore[misc]
                raise Wrong("the model breaks a clause")
    if cost != sum(int(weights[m]) for m in paying if value(0, m) and value(1, m)):
        raise Wrong("the model costs something else")

    true = {v for v, sign in top if sign}
    proven = sum(int(weights[m]) for m in paying if (0, m) in true and (1, m) in true)
    given: set[Literal] = set()
    place = 0

    def axiom(stream: Reader) -> Clause:
        nonlocal place
        place += stream.signed()
        what = stream.number()
        if what == 0:
            if place not in paying or (0, place) in true or (1, place) in true:
                raise Wrong("no such conflict")
            return [((1, place), False), ((0, place), False), (("conflict", place), True)]
        kind, side, rest = (what - 1) % 4 + 1, (what - 1) // 4 % 2, (what - 1) // 8
        name = (side, kind, place, place - rest) if kind < 3 else (side, kind, place, rest // 3, rest % 3)
        if name not in named:
            raise Wrong("no such axiom")
        clause = named[name]
        if any(literal in top for literal in clause):
            raise Wrong("the axiom holds at the root")
        return [literal for literal in clause if negated(literal) not in top]

    def cost_of(literal: Literal) -> int:
        (side, node), sign = literal  # type: ignore[misc]
        if not sign or node not in paying or (side != "conflict" and (1 - side, node) not in true):
            return 0
        if literal in given:
            return 0
        given.add(literal)
        return int(weights[node])

    for _ in range(stream.number()):
        place = 0
        proven += section(stream, axiom, cost_of, False)
    if stream.at != len(data) or proven != cost:
        raise Wrong("what is proven is not the cost")
    return cost


def check_formula(data: bytes, question: bytes, n_variables: int, hard: Sequence[Sequence[int]],
                  soft: Sequence[Sequence[int]], weights: Sequence[int]) -> int | None:
    """The least cost that is proven, or None if it is proven that there is no model."""
    stream = Reader(data)
    claims_model = head(stream, 2, question)
    cost = 0
    if claims_model:
        cost = stream.number()
        bits = stream.bytes((n_variables + 7) // 8)

        def holds(clause: Sequence[int]) -> bool:
            return any((bits[(abs(x) - 1) // 8] >> (abs(x) - 1) % 8 & 1) == (x > 0) for x in clause)

        if not all(map(holds, hard)):
            raise Wrong("the model violates a hard clause")
        if cost != sum(weight for clause, weight in zip(soft, weights, strict=True) if not holds(clause)):
            raise Wrong("the model costs something else")
    # Soft clauses of one literal cost where it is false, longer ones where their own variable is true.
    normal = [sorted(set(clause), key=lambda x: (abs(x), x)) for clause in soft]
    costs: dict[Literal, int] = {}
    proven = 0
    for i, (clause, weight) in enumerate(zip(normal, weights, strict=True)):
        if any(-x in clause for x in clause):
            continue
        if not clause:
            proven += weight
            continue
        payer: Literal = (abs(clause[0]), clause[0] < 0) if len(clause) == 1 else (("soft", i), True)
        costs[payer] = costs.get(payer, 0) + weight
    for one in list(costs):
        both = min(costs[one], costs.get(negated(one), 0))
        proven += both
        costs[one] -= both
        if both:
            costs[negated(one)] -= both
    place = 0

    def axiom(stream: Reader) -> Clause:
        nonlocal place
        place += stream.signed()
        if not 0 <= place < len(hard) + len(soft):
            raise Wrong("no such clause")
        if place < len(hard):
            return [(abs(x), x > 0) for x in hard[place]]
        clause = normal[place - len(hard)]
        if len(clause) < 2:
            raise Wrong("no clause with a variable of its own")
        return [*((abs(x), x > 0) for x in clause), (("soft", place - len(hard)), True)]

    sections = stream.number()
    for _ in range(sections):
        place = 0
        proven += section(stream, axiom, lambda literal: costs.pop(literal, 0), not claims_model)
    if stream.at != len(data) or (proven != cost if claims_model else sections == 0):
        raise Wrong("what is proven is not the cost")
    return cost if claims_model else None

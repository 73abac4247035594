"""SAT by trying every assignment, unit propagation by its definition, and checkers of proofs that do nothing clever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

Clause = Sequence[int]


def holds(clause: Clause, model: Sequence[bool]) -> bool:
    """Whether a clause holds; ``model[v]`` is the value of variable v."""
    return any(model[abs(literal)] == (literal > 0) for literal in clause)


def models(n_variables: int, clauses: Iterable[Clause]) -> Iterator[tuple[bool, ...]]:
    """All models; entry 0 is unused."""
    clauses = list(clauses)
    for values in product((False, True), repeat=n_variables):
        model = (False, *values)
        if all(holds(clause, model) for clause in clauses):
            yield model


def satisfiable(n_variables: int, clauses: Iterable[Clause]) -> bool:
    """Whether there is a model."""
    return next(models(n_variables, clauses), None) is not None


def cost(model: Sequence[bool], soft: Sequence[Clause], weights: Sequence[int]) -> int:
    """Weight of the soft clauses that do not hold."""
    return sum(weight for clause, weight in zip(soft, weights, strict=True) if not holds(clause, model))


def least_cost(n_variables: int, hard: Sequence[Clause], soft: Sequence[Clause], weights: Sequence[int]) -> int | None:
    """Least cost of a model of the hard clauses; None if there is none."""
    return min((cost(model, soft, weights) for model in models(n_variables, hard)), default=None)


def propagated(clauses: Iterable[Clause], assumed: Iterable[int]) -> set[int] | None:
    """What unit propagation reaches from the assumed literals; None on a conflict."""
    clauses, true = [set(clause) for clause in clauses], set(assumed)
    while not any(-literal in true for literal in true):
        new = set()
        for clause in clauses:
            if clause & true:
                continue
            open_ = {literal for literal in clause if -literal not in true}
            if not open_:
                return None
            if len(open_) == 1:
                new |= open_
        if not new:
            return true
        true |= new
    return None


# --- proofs ---------------------------------------------------------------------------------------------------------


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A signed number of a binary proof, and where the next one starts."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (-(value // 2) if value % 2 else value // 2), at


def _numbers(data: bytes, at: int) -> tuple[list[int], int]:
    """Numbers up to a zero."""
    found = []
    while True:
        value, at = _number(data, at)
        if value == 0:
            return found, at
        found.append(value)


def drat_steps(data: bytes, binary: bool) -> Iterator[tuple[bool, list[int]]]:
    """(is a deletion, clause) for each step of a DRAT proof."""
    if binary:
        at = 0
        while at < len(data):
            kind = data[at:at + 1]
            assert kind in (b"a", b"d")
            clause, at = _numbers(data, at + 1)
            yield kind == b"d", clause
        return
    for line in data.decode().splitlines():
        words = line.removeprefix("d ").split()
        assert words[-1] == "0"
        yield line.startswith("d "), [int(word) for word in words[:-1]]


def lrat_steps(data: bytes, binary: bool) -> Iterator[tuple[int, list[int], list[int]]]:
    """(id, clause, antecedents) for additions, (0, [], ids) for deletions."""
    if binary:
        at = 0
        while at < len(data):
            if data[at:at + 1] == b"d":
                gone, at = _numbers(data, at + 1)
                yield 0, [], gone
                continue
            assert data[at:at + 1] == b"a"
            number, at = _number(data, at + 1)
            clause, at = _numbers(data, at)
            antecedents, at = _numbers(data, at)
            yield number, clause, antecedents
        return
    for line in data.decode().splitlines():
        words = line.split()
        assert words[-1] == "0"
        if words[1] == "d":
            yield 0, [], [int(word) for word in words[2:-1]]
            continue
        end = words.index("0")
        yield int(words[0]), [int(w) for w in words[1:end]], [int(w) for w in words[end + 1:-1]]


def check_drat(formula: Iterable[Clause], proof: bytes, binary: bool, assumed: Sequence[int] = ()) -> bool:
    """Whether the proof refutes the formula under the assumed literals, each added clause following by propagation
    (RUP); deletions are obeyed, except for unit clauses, as drat-trim does."""
    kept = [sorted(set(clause)) for clause in formula]
    for deletion, clause in drat_steps(proof, binary):
        if deletion:
            if len(clause) > 1:
                kept.remove(sorted(set(clause)))
            continue
        if propagated(kept, [-literal for literal in clause]) is not None:
            return False
        kept.append(sorted(set(clause)))
    return propagated(kept, assumed) is None


def check_lrat(formula: Iterable[Clause], proof: bytes, binary: bool, assumed: Sequence[int] = ()) -> bool:
    """Whether each added clause follows from its antecedents in their order, and the last state is a refutation."""
    known = {number: set(clause) for number, clause in enumerate(formula, 1)}
    for number, clause, antecedents in lrat_steps(proof, binary):
        if number == 0:
            for gone in antecedents:
                del known[gone]
            continue
        assert number not in known
        true = {-literal for literal in clause}
        if any(-literal in true for literal in true):  # always holds
            known[number] = set(clause)
            continue
        for antecedent in antecedents:
            open_ = {literal for literal in known[antecedent] if -literal not in true}
            if len(open_) > 1:
                return False
            if not open_:
                break
            true |= open_
        else:
            return False
        known[number] = set(clause)
    return any(all(-literal in assumed for literal in clause) for clause in known.values())

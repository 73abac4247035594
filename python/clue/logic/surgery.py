"""Surgery: the least edit that kills the forget outputs and leaves every retain output alive.

Where :func:`clue.logic.assign` asks which nodes must change what they do, this asks which nodes to touch: an edited node
stops working, and everything else follows through the gates, from the embedding upwards. Per node n there are four
variables: e_n, it is edited; d_n, it is dead for the forget circuits; r_n, the retain outputs rely on it; and c_n, it is
a conflict: edited, and relied on, so it has to be trained to keep its retain function.

All gates are monotone, and circuits have no cycles, so clauses in one direction suffice. Forget: d_n implies that n is
edited or every one of its groups is dead. By induction over the node ids, every node with d_n true really is dead under
the edits; and the d that is true of exactly the dead nodes obeys the clauses. So the edits kill the output if and only
if some d with d_output = 1 exists. Retain: r_n implies that every group of n works and that n is not edited, or a
conflict; again every node with r_n true really works, and the working nodes make one such r. A clause in the other
direction (a node works because its inputs do) would say nothing more about edits.

The native core (csrc/logic/surgery.hpp) fixes most edits without search (cone.cpp has the rules) and minimises the rest;
here limits become clauses, and what is impossible is explained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import CircuitError
from ..sat import Solver
from ..types import Role
from . import Assignment, pinned, pose
from .gates import Ids, Literals, groups, rows, units

if TYPE_CHECKING:
    from ..circuit.graph import Circuit


class _Limit(NamedTuple):
    """At most ``most`` in all; an edit of node n counts ``costs[n]``."""

    what: str
    costs: npt.NDArray[np.int64]
    most: int


def operate(
    forget: Sequence[Circuit],
    retain: Sequence[Circuit],
    *,
    weights: npt.NDArray[np.int64] | None = None,
    retain_score: npt.ArrayLike | None = None,
    forget_score: npt.ArrayLike | None = None,
    budget: int | None = None,
    most: int | None = None,
    never: Sequence[int | str] = (),
    must: Sequence[int | str] = (),
    time_limit: float = 0,
    keep_on_interrupt: bool = False,
) -> Assignment:
    """The least edit set after which every forget output is dead and every retain output alive.

    A node of the forget circuits works unless it is edited or every one of its groups is dead: AND groups die with one
    input, OR and ADDER groups with all. A node of the retain circuits works if each of its groups does (AND and ADDER
    need all inputs, OR one) and it is not edited. As in :func:`assign`, variables are shared by the circuits of a side,
    and the embedding always works and is left out of forget groups; a node without groups works unless it is edited.

    If no edit set leaves the retain outputs alive, some edited nodes have to be conflicts: edited for the forget set,
    and trained to keep their retain function, so that they count as working for the retain circuits. Among all edit
    sets within the limits the one returned is best in this order, so it is the same on every machine:

    1. least sum of ``weights`` over conflicts; 0 whenever a set without conflicts exists;
    2. least sum of ``weights`` over all edited nodes;
    3. least sum of ``retain_score`` over edited nodes of the retain circuits;
    4. most ``forget_score`` over edited nodes;
    5. from node 0 upwards: not edited is preferred, then edited without conflict.

    Args:
        forget, retain, weights, retain_score, forget_score, time_limit: as in :func:`assign`.
        budget: most weight of all edited nodes together.
        most: most edited nodes.
        never, must: nodes, by id or name, that must not be edited, and that must be.
        keep_on_interrupt: on Ctrl-C, too, return the best so far instead of raising, if one within the limits is known.

    Returns:
        Roles: CONFLICT, and FORGET for the other edited nodes; RETAIN where a node is not edited and works for the
        retain circuits. ``retain_works`` and ``forget_works`` say what each node does after the edit, conflicts working
        for the retain circuits. ``cost`` is the weight of conflicts; ``optimal`` if levels 1 and 2 are proven;
        ``forced`` conflicts follow by unit propagation. Statistics: ``edits`` (nodes), ``edit_weight``, and as for
        :func:`assign`.

    Raises:
        CircuitError: as in :func:`assign`; and if no edit set kills the forget outputs (then the pins to blame are
            named), none is within the budget (then the least that would do is told), or the time limit struck before
            one within the limits was found, or before the circuits were read. Without limits everything is an answer
            that the time limit finds on the way.
        KeyboardInterrupt: on Ctrl-C, within about 50 ms.
    """
    question = pose(forget, retain, weights=weights, retain_score=retain_score, forget_score=forget_score)
    if not 0 <= time_limit < 1e9:
        raise CircuitError(f"time_limit: expected seconds in [0, 1e9), got {time_limit}")
    costs = question["weights"]
    limits = [_Limit(what, counts, _whole(name, value)) for name, value, what, counts in (
        ("most", most, "edited nodes", np.ones_like(costs)), ("budget", budget, "weight of edits", costs))
        if value is not None]
    return _Operation(forget, question, pinned(forget, never, must), time_limit, keep_on_interrupt).answer(limits)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise CircuitError(f"{name}: expected an integer >= 0, got {value!r}")
    return int(value)


class _Operation:
    """One question, and the steps of the answer. In limits, the variable of node n, "it is edited", is n + 1."""

    def __init__(self, forget: Sequence[Circuit], question: dict[str, Any], pins: npt.NDArray[np.int8] | None,
                 time_limit: float, keep_on_interrupt: bool) -> None:
        self.circuits = forget
        self.question = {name: value for name, value in question.items() if name != "semantics"}
        self.pins, self.keep_on_interrupt = pins, keep_on_interrupt
        self.deadline = time.monotonic() + time_limit if time_limit else math.inf
        self.n: int = question["n_nodes"]
        self.editable = question["editable"].astype(bool) & _members(question["forget"], self.n)
        self.editable[[0, self.n - 1]] = False
        self.cores = self.solves = 0

    def answer(self, limits: Sequence[_Limit]) -> Assignment:
        found = self._operate()
        if not found["feasible"]:
            raise CircuitError(self._why_impossible())
        edited = found["edited"].astype(bool)
        if any(int(limit.costs[edited].sum()) > limit.most for limit in limits):
            if found["interrupted"] is not None:
                raise found["interrupted"]
            found = self._operate(limits=self._clauses(limits))
            if not found["feasible"]:
                raise CircuitError("time_limit: whether there is an edit set within the limits was not found in time")
        return self._assignment(found)

    def _clauses(self, limits: Sequence[_Limit]) -> Literals:
        """The limits as clauses, each of which is shown to leave an edit set."""
        clauses, n_variables = np.zeros(0, np.int32), self.n
        zero = np.zeros(self.n, dtype=np.int64)
        for i, limit in enumerate(limits):
            least = self._operate(weights=limit.costs, risk=zero, reach=zero, limits=clauses, least=True)
            if least["lower_bound"] > limit.most:
                proven = "the least that would do is" if least["levels_closed"] else "it takes at least"
                bounds = " and ".join(f"at most {each.most} {each.what}" for each in limits[:i + 1])
                raise CircuitError(f"no edit set kills the forget outputs with {bounds}: {proven}"
                                   f" {least['lower_bound']}")
            more, n_variables = at_most(np.arange(1, self.n + 1), np.where(self.editable, limit.costs, 0), limit.most,
                                        n_variables)
            clauses = np.concatenate([clauses, more])
        return clauses

    def _operate(self, *, limits: Literals | None = None, least: bool = False, **other: Any) -> dict[str, Any]:
        left = max(self.deadline - time.monotonic(), 1e-9) if self.deadline < math.inf else 0.0
        try:
            found = _core.operate(**self.question | other, pin=self.pins, least=least, time_limit=left,
                                  limits=np.zeros(0, np.int32) if limits is None else limits)
        except ValueError as error:
            raise CircuitError(str(error)) from None
        interrupted = found["interrupted"]
        keep = self.keep_on_interrupt and isinstance(interrupted, KeyboardInterrupt)
        if interrupted is not None and (least or not found["feasible"] or not keep):
            raise interrupted
        self.cores += found["cores"]
        self.solves += found["solves"]
        return found

    def _why_impossible(self) -> str:
        side = groups(self.circuits, retain=False)
        dead, edit = np.arange(1, self.n + 1), np.arange(self.n + 1, 2 * self.n + 1)
        can, source = self.editable, side.sources()
        clauses = [units(dead[-1:]), side.clauses(dead, unless=np.where(can, edit, 0)),
                   rows(-dead[source & can], edit[source & can]), units(-dead[source & ~can])]
        to_blame = needed(clauses, _pin_literals(edit, self.pins))
        if to_blame:
            return _refusal(self.circuits, [abs(literal) - self.n - 1 for literal in to_blame], self.pins,
                            "no edit set kills the forget outputs")
        return ("no edit set kills the forget outputs: the output is reached without passing a node that has weights of"
                " its own")

    def _assignment(self, found: dict[str, Any]) -> Assignment:
        q = self.question
        edited, conflict = found["edited"].astype(bool), found["conflict"].astype(bool)
        works, alive = found["retain_works"].astype(np.int8), found["forget_works"].astype(np.int8)
        in_retain, in_forget = (_members(q[side], self.n) for side in ("retain", "forget"))
        forced = found["forced"].astype(bool) & conflict
        role = np.full(self.n, Role.FREE, dtype=np.uint8)
        role[q["editable"].astype(bool) & (works == 1) & in_retain] = Role.RETAIN
        role[edited] = Role.FORGET
        role[conflict] = Role.CONFLICT
        closed = found["levels_closed"]
        return Assignment(
            role=role,
            retain_works=np.where(in_retain, works, -1).astype(np.int8),
            forget_works=np.where(in_forget, alive, -1).astype(np.int8),
            forced=forced,
            cost=int(q["weights"][conflict].sum()),
            lower_bound=found["lower_bound"],
            optimal=closed >= 2,
            n_forced=int(forced.sum()),
            n_chosen=int((conflict & ~forced).sum()),
            statistics={"unique": int(closed == 5), "edits": int(edited.sum()),
                        "edit_weight": int(q["weights"][edited].sum()),
                        **{name: int(found[name]) for name in ("variables", "clauses", "components")},
                        "cores": self.cores, "solves": self.solves},
        )


def _members(circuits: Sequence[tuple[Ids, Ids, Ids]], n: int) -> npt.NDArray[np.bool_]:
    found = np.zeros(n, dtype=bool)
    for src, dst, _ in circuits:
        found[src] = found[dst] = True
    return found


def _pin_literals(e: Ids, pins: npt.NDArray[np.int8] | None) -> Ids:
    """What pins say of variables that are true where a node is edited."""
    if pins is None:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([-e[pins == 1], e[pins == 0]])


def at_most(literals: Ids, costs: npt.NDArray[np.int64], most: int, n_variables: int) -> tuple[Literals, int]:
    """Clauses for "the costs of the true literals sum to at most ``most``", and the largest variable then.

    Binary adders (Een, Soerensson: JSAT 2006), whose outputs are implied by their inputs in one direction only: a sum
    can be overstated, which helps nobody.
    """
    clauses: list[int] = []
    buckets: dict[int, list[int]] = {}
    for literal, cost in zip(literals.tolist(), costs.tolist(), strict=True):
        if cost > most:
            clauses += [-literal, 0]
            continue
        for bit in range(cost.bit_length()):
            if cost >> bit & 1:
                buckets.setdefault(bit, []).append(literal)
    digits: dict[int, int] = {}
    bit = 0
    while bit <= max(buckets, default=-1):
        bucket = buckets.setdefault(bit, [])
        at = 0
        while len(bucket) - at > 1:
            taken = bucket[at:at + 3]
            at += len(taken)
            total, carry = n_variables + 1, n_variables + 2
            n_variables += 2
            x, y = taken[:2]
            clauses += [-x, -y, carry, 0]
            if len(taken) == 3:
                z = taken[2]
                clauses += [-x, -z, carry, 0, -y, -z, carry, 0, -x, -y, -z, total, 0, -x, y, z, total, 0, x, -y, z, total, 0,
                            x, y, -z, total, 0]
            else:
                clauses += [-x, y, total, 0, x, -y, total, 0]
            bucket.append(total)
            buckets.setdefault(bit + 1, []).append(carry)
        if at < len(bucket):
            digits[bit] = bucket[at]
        bit += 1
    # The sum is larger exactly if at some digit it has 1 where the limit has 0, and above no 0 where the limit has 1.
    for bit, digit in digits.items():
        if not most >> bit & 1:
            above = [digits.get(other) for other in range(bit + 1, most.bit_length()) if most >> other & 1]
            if None not in above:
                clauses += [-digit, *(-int(literal) for literal in above if literal is not None), 0]
    return np.array(clauses, dtype=np.int32), n_variables


def needed(clauses: Sequence[Literals], assumptions: npt.ArrayLike) -> list[int] | None:
    """A subset-minimal set of assumptions that the clauses refute; None if they refute them not even all together."""
    solver = Solver()
    for part in clauses:
        solver.add(part)
    wanted = np.asarray(assumptions, dtype=np.int32)
    if solver.solve(wanted.tolist()):
        return None
    return shrink(solver, solver.core().tolist())


def shrink(solver: Solver, core: list[int]) -> list[int]:
    """A subset-minimal part of assumptions that a solver refutes: one after the other is left out, if it can be."""
    kept: list[int] = []
    while core:
        tried = core.pop()
        if solver.solve([*core, *kept]):
            kept.append(tried)
        else:
            failed = set(solver.core().tolist())
            core = [literal for literal in core if literal in failed]
    return kept


def blame(forget: Sequence[Circuit], semantics: str, pins: npt.NDArray[np.int8]) -> str:
    """Why no assignment obeys the pins: a subset-minimal set of them that contradicts the forget circuits."""
    side = groups(forget, retain=False)
    dead = np.arange(1, len(pins) + 1)
    to_blame = needed([side.clauses(dead, semantics=semantics), units(dead[-1:])], _pin_literals(dead, pins))
    return _refusal(forget, [abs(literal) - 1 for literal in to_blame or []], pins, "no assignment kills the forget outputs")


def _refusal(forget: Sequence[Circuit], nodes: Sequence[int], pins: npt.NDArray[np.int8] | None, what: str) -> str:
    name = forget[0].graph.name
    sides = [(word, sorted(node for node in nodes if pins is not None and pins[node] == pin))
             for word, pin in (("never", 1), ("must", 0))]
    said = " and ".join(f"{word} {', '.join(name(node) for node in found)}" for word, found in sides if found)
    return f"the pins contradict the circuits: {what} with {said}"

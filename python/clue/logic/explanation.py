"""Explanations: why a node has its role in an assignment, whether it has to, and what would change if it had not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import CircuitError
from ..sat import Solver
from ..types import Role
from . import Assignment, ask, node_ids, pose
from .gates import GateGroup, Groups, Literals, groups, rows, units
from .surgery import shrink

if TYPE_CHECKING:
    from ..circuit.graph import Circuit

#: Values of :meth:`Explainer.backbone`, by number.
BACKBONE = ("none", "some", "every")

#: How many nodes that change their role are named in words.
_TOLD = 12


@dataclass(frozen=True)
class WhatIf:
    """The best assignment in which a node has another role.

    Attributes:
        role: the other role.
        cost: weight of conflicts then; None if no assignment gives the node that role.
        optimal: ``cost`` is proven to be the least.
        changes: (node, its role then) for the other nodes whose role differs from the one in the assignment explained.
    """

    role: Role
    cost: int | None
    optimal: bool
    changes: tuple[tuple[int, Role], ...]


@dataclass(frozen=True)
class Explanation:
    """What the formula says of one node.

    Attributes:
        node: its id.
        role: its role in the assignment explained.
        forced: it is a conflict by propagation from the outputs alone.
        backbone: it is a conflict in ``every`` assignment of least cost, in ``some``, or in ``none``.
        gates: for a conflict, gates that together make it impossible that neither this node nor any of ``instead`` is a
            conflict; no proper subset of them does. Empty for a conflict that costs nothing and could be left out.
        instead: nodes that are no conflicts in the assignment, one of which would have to be one instead; none if the
            gates force this very node.
        what_if: one entry per other role the node could have.
    """

    node: int
    role: Role
    forced: bool
    backbone: str
    gates: tuple[GateGroup, ...]
    instead: tuple[int, ...]
    what_if: tuple[WhatIf, ...]

    @property
    def chosen(self) -> bool:
        """It is a conflict, and the solver chose it: propagation alone does not force it."""
        return self.role == Role.CONFLICT and not self.forced

    def lines(self, name: Callable[[int], str], cost: int) -> list[str]:
        """In words, given the names of nodes and the cost of the assignment explained."""
        found = [f"{name(self.node)} is {self.role.name.lower()}"]
        if self.role == Role.CONFLICT or self.backbone != "none":
            found[0] += ((", forced by the outputs" if self.forced else ", chosen" if self.chosen else "")
                         + f"; a conflict in {self.backbone} assignment of least cost")
        if self.instead:
            found.append("these gates leave the choice between it and "
                         + ", ".join(name(node) for node in self.instead) + ":")
        elif self.gates:
            found.append("these gates make it a conflict:")
        found += [f"  {gate.side} {gate.circuit}: {name(gate.receiver)} = {gate.gate.name}("
                  + ", ".join(name(node) for node in gate.inputs) + ")" for gate in self.gates]
        for other in self.what_if:
            said = "impossible" if other.cost is None else f"cost {other.cost} ({other.cost - cost:+d})"
            if other.cost is not None:
                said += "" if other.optimal else ", not proven least"
                changed = [f"{name(node)} {role.name.lower()}" for node, role in other.changes[:_TOLD]]
                more = len(other.changes) - len(changed)
                said += "".join(f", {change}" for change in changed) + (f" and {more} more" if more else "")
            found.append(f"as {other.role.name.lower()}: {said}")
        return found


def explain(
    forget: Sequence[Circuit],
    retain: Sequence[Circuit],
    node: int | str,
    *,
    semantics: str = "support",
    weights: npt.NDArray[np.int64] | None = None,
    retain_score: npt.ArrayLike | None = None,
    forget_score: npt.ArrayLike | None = None,
    assignment: Assignment | None = None,
) -> Explanation:
    """Explain one node of the assignment that :func:`clue.logic.assign` returns for the same arguments.

    For several nodes make one :class:`Explainer`, which solves once and keeps its solvers.

    Raises:
        CircuitError: as in :func:`clue.logic.assign`, or there is no such node.
    """
    return Explainer(forget, retain, semantics=semantics, weights=weights, retain_score=retain_score,
                     forget_score=forget_score, assignment=assignment).explain(node)


class Explainer:
    """Explains any number of nodes of one assignment.

    Args:
        assignment: what :func:`clue.logic.assign` returned for the other arguments (without pins), proven optimal; it is
            computed if not given. The other arguments are those of :func:`clue.logic.assign`.

    Raises:
        CircuitError: as in :func:`clue.logic.assign`; or the assignment is not proven optimal or of other circuits.
    """

    def __init__(self, forget: Sequence[Circuit], retain: Sequence[Circuit], *, semantics: str = "support",
                 weights: npt.NDArray[np.int64] | None = None, retain_score: npt.ArrayLike | None = None,
                 forget_score: npt.ArrayLike | None = None, assignment: Assignment | None = None) -> None:
        self._question = pose(forget, retain, semantics=semantics, weights=weights, retain_score=retain_score,
                              forget_score=forget_score)
        self._graph = forget[0].graph
        if assignment is None:
            assignment = ask(self._question)
        if assignment is None or not assignment.optimal:
            raise CircuitError("only an assignment that is proven optimal can be explained: solve it without a time limit")
        self.assignment = assignment
        self._dying, self._working = groups(forget, retain=False), groups(retain, retain=True)
        both = self._question["editable"].astype(bool) & self._dying.member & self._working.member
        wrong = CircuitError("the assignment does not belong to these circuits and weights")
        if {len(part) for part in (assignment.role, assignment.retain_works, assignment.forget_works)} != {len(both)}:
            raise wrong
        conflict = both & (assignment.retain_works == 1) & (assignment.forget_works == 0)
        if (np.any((assignment.forget_works < 0) == self._dying.member)
                or np.any((assignment.retain_works < 0) == self._working.member)
                or np.any(conflict != (assignment.role == Role.CONFLICT))
                or assignment.cost != int(self._question["weights"][conflict].sum())):
            raise wrong
        self._both = both

    def explain(self, node: int | str) -> Explanation:
        """Everything about one node, given by id or name."""
        (n,) = node_ids(self._graph, [node], "node")
        role = Role(int(self.assignment.role[n]))
        gates, instead = self.reason(n) if role == Role.CONFLICT else ((), ())
        others = [other for other in Role if other != role and self._may_be(n, other)]
        return Explanation(n, role, bool(self.assignment.forced[n]), BACKBONE[self.backbone[n]], gates, instead,
                           tuple(self.what_if(n, other) for other in others))

    @cached_property
    def backbone(self) -> npt.NDArray[np.uint8]:
        """uint8 [nodes], positions in :data:`BACKBONE`: in how many assignments of least cost the node is a conflict.

        One call for all nodes: after the least cost is proven, the search asks for optima that show some node as it has
        not been seen yet, until there is none.
        """
        nothing = np.zeros_like(self._question["risk"])
        found = _core.assign(**self._question | {"risk": nothing, "reach": nothing}, time_limit=0.0, survey=True)
        backbone: npt.NDArray[np.uint8] = found["backbone"]
        return backbone

    def _may_be(self, node: int, role: Role) -> bool:
        if not self._question["editable"][node] or node in (0, self._graph.n_nodes - 1):
            return False
        in_forget, in_retain = bool(self._dying.member[node]), bool(self._working.member[node])
        return {Role.FORGET: in_forget, Role.RETAIN: in_retain, Role.CONFLICT: in_forget and in_retain, Role.FREE: True}[role]

    def what_if(self, node: int, role: Role) -> WhatIf:
        """The best assignment in which the node has another role.

        Propagation and the components without a choice are done again natively, in milliseconds; only what is left
        open is searched.
        """
        retain_pin, forget_pin = (np.full(self._graph.n_nodes, -1, dtype=np.int8) for _ in range(2))
        retain_pin[node] = role in (Role.RETAIN, Role.CONFLICT)
        forget_pin[node] = role in (Role.RETAIN, Role.FREE)
        found = ask(self._question, retain_pin=retain_pin, forget_pin=forget_pin)
        if found is None:
            return WhatIf(role, None, True, ())
        changed = np.flatnonzero(found.role != self.assignment.role)
        return WhatIf(role, found.cost, found.optimal,
                      tuple((int(n), Role(int(found.role[n]))) for n in changed if n != node))

    # --- why a node is a conflict -----------------------------------------------------------------------------------
    #
    # Where gates without a choice lead from both outputs to the node, the shortest chain of them on each side is the
    # reason: no gate of it can be skipped, or there would be a shorter one. For all else the solver is asked. Every group
    # of edges has a selector, which is assumed; so is "m is no conflict" for nodes m. Where the assumptions cannot hold
    # together, those that failed are the reason, minimised by leaving out one after the other.

    def reason(self, node: int) -> tuple[tuple[GateGroup, ...], tuple[int, ...]]:
        """(``gates``, ``instead``) of :class:`Explanation`."""
        if all(reached[node] for reached, _ in self._certain):
            return tuple(side.group(g) for side, (_, through) in zip((self._dying, self._working), self._certain, strict=True)
                         for g in sorted(_chain(node, side, through))), ()
        solver, selectors, peace = self._solver
        own = [int(peace[node])]
        if solver.solve([*own, *selectors]):
            # The gates leave a choice. In an optimum nobody can take this conflict away and add none instead.
            others = peace[self._both & (self.assignment.role != Role.CONFLICT)]
            if solver.solve([*own, *selectors, *others.tolist()]):
                return (), ()
        core = set(solver.core().tolist())
        kept = self._minimal(core, own[0])
        first, sides = int(selectors[0]) if len(selectors) else 0, (self._dying, self._working)
        chosen = sorted(literal - first for literal in kept if literal >= first)
        n = len(self._dying)
        gates = tuple(sides[g >= n].group(g - n if g >= n else g) for g in chosen)
        return gates, tuple(int(m) for m in np.flatnonzero(np.isin(peace, list(kept))) if m != node)

    @cached_property
    def _certain(self) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
        return [side.certain() for side in (self._dying, self._working)]

    def _literals(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """d, r and "no conflict" of every node; the selectors of the groups follow."""
        n = self._graph.n_nodes
        return 3 * np.arange(n) + 1, 3 * np.arange(n) + 2, 3 * np.arange(n) + 3

    @cached_property
    def _solver(self) -> tuple[Solver, list[int], npt.NDArray[np.int64]]:
        dead, works, peace = self._literals()
        total = len(self._dying) + len(self._working)
        selectors = 3 * self._graph.n_nodes + 1 + np.arange(total)
        solver = Solver(preprocesslight=0)  # which takes far longer than all questions together
        solver.add(self._clauses(self._dying, self._working, selectors))
        return solver, selectors.tolist(), peace

    def _clauses(self, dying: Groups, working: Groups, selectors: npt.NDArray[np.int64]) -> Literals:
        dead, works, peace = self._literals()
        semantics = self._question["semantics"]
        return np.concatenate([dying.clauses(dead, semantics=semantics, selector=selectors[:len(dying)]),
                               working.clauses(works, semantics=semantics, selector=selectors[len(dying):]),
                               units([dead[-1], works[-1]]),
                               rows(-peace[self._both], -dead[self._both], -works[self._both])])

    def _minimal(self, core: set[int], own: int) -> list[int]:
        """A subset-minimal part of a core, its gates kept apart in a solver of their own, which is small."""
        total = len(self._dying) + len(self._working)
        selectors = 3 * self._graph.n_nodes + 1 + np.arange(total)
        used = np.isin(selectors, list(core))
        n = len(self._dying)
        clauses = self._clauses(self._dying.only(used[:n]), self._working.only(used[n:]), selectors[used])
        peaceful = clauses[-4 * int(self._both.sum()):].reshape(-1, 4)
        clauses = np.concatenate([clauses[:len(clauses) - peaceful.size],
                                  peaceful[np.isin(-peaceful[:, 0], list(core))].ravel(), units([own])])
        # Popped from the end: other nodes first, so that as few as possible are left to be conflicts instead.
        order = np.array(sorted(core - {own}, reverse=True), dtype=np.int32)
        known, dense = np.unique(np.abs(np.concatenate([clauses, order])), return_inverse=True)  # 0 stays 0
        solver = Solver(np.sign(clauses) * dense[:len(clauses)].astype(np.int32))
        kept = shrink(solver, dense[len(clauses):].tolist())
        return [own, *known[kept].tolist()]


def _chain(node: int, side: Groups, through: npt.NDArray[np.int64]) -> list[int]:
    """The groups through which the output implies the node."""
    found: list[int] = []
    while through[node] >= 0:
        found.append(int(through[node]))
        node = int(side.receiver[through[node]])
    return found

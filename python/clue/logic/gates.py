"""Gates: the groups of incoming edges that the circuits of one side consist of, and the clauses they stand for.

With x_n = "n works" on the retain side and x_n = "n is dead" on the forget side, every group asks for all of its inputs'
x or for any of them (see csrc/logic/circuit.hpp, which has the table). The native core of :func:`clue.logic.assign` does
the same on its own; here gates keep their names, and can be switched on and off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..types import Gate

if TYPE_CHECKING:
    from ..circuit.graph import Circuit

Ids = npt.NDArray[np.int64]
Literals = npt.NDArray[np.int32]


@dataclass(frozen=True)
class GateGroup:
    """The edges that enter ``receiver`` in one circuit through one kind of gate.

    Attributes:
        side: ``forget`` or ``retain``.
        circuit: name of the circuit.
        receiver: node id.
        gate: AND, OR or ADDER.
        inputs: node ids in ascending order, the embedding included.
    """

    side: str
    circuit: str
    receiver: int
    gate: Gate
    inputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of one side, by receiver, in arrays; the embedding is taken out of their inputs, since it always works.

    Attributes:
        retain: which side it is.
        names: names of the circuits.
        member: bool [nodes], the node is in a circuit of this side.
        circuit, receiver, gate: int64 [groups].
        all_inputs: bool [groups], the group asks for all inputs, otherwise for any.
        start: int64 [groups + 1]; the inputs of group g are ``inputs[start[g]:start[g + 1]]``.
        satisfied: bool [groups], the embedding alone satisfies the group. (On the forget side it means nothing there:
            a group of the embedding alone is left out.)
    """

    retain: bool
    names: tuple[str, ...]
    member: npt.NDArray[np.bool_]
    circuit: Ids
    receiver: Ids
    gate: Ids
    all_inputs: npt.NDArray[np.bool_]
    start: Ids
    inputs: Ids
    satisfied: npt.NDArray[np.bool_]
    embedded: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.receiver)

    def group(self, g: int) -> GateGroup:
        """Group g by its names."""
        inputs = self.inputs[self.start[g]:self.start[g + 1]].tolist()
        return GateGroup("retain" if self.retain else "forget", self.names[self.circuit[g]], int(self.receiver[g]),
                         Gate(self.gate[g]), (0, *inputs) if self.embedded[g] else tuple(inputs))

    def only(self, chosen: npt.NDArray[np.bool_]) -> Groups:
        """The chosen groups."""
        sizes = np.diff(self.start)
        return Groups(self.retain, self.names, self.member, self.circuit[chosen], self.receiver[chosen],
                      self.gate[chosen], self.all_inputs[chosen], np.concatenate([[0], np.cumsum(sizes[chosen])]),
                      self.inputs[np.repeat(chosen, sizes)], self.satisfied[chosen], self.embedded[chosen])

    def certain(self) -> tuple[npt.NDArray[np.bool_], Ids]:
        """What the output's x implies however the choices fall, breadth first from it.

        Returns:
            bool [nodes], the nodes whose x is implied, the output among them; and int64 [nodes], the group that first
            implied it, -1 for the output and where nothing did. Following receivers from a node gives a shortest chain.
        """
        n = len(self.member)
        reached, through = np.zeros(n, dtype=bool), np.full(n, -1)
        sizes = np.diff(self.start)
        known = np.flatnonzero((self.all_inputs | (sizes == 1)) & ~self.satisfied)
        first = np.searchsorted(self.receiver[known], np.arange(n + 1))
        front = np.array([n - 1])
        reached[front] = True
        while len(front):
            group = known[_ranges(first[front], first[front + 1])]
            inputs = self.inputs[_ranges(self.start[group], self.start[group + 1])]
            front, at = np.unique(inputs, return_index=True)
            new = ~reached[front]
            front = front[new]
            through[front] = np.repeat(group, sizes[group])[at[new]]
            reached[front] = True
        return reached, through

    def sources(self) -> npt.NDArray[np.bool_]:
        """bool [nodes]: members that no group enters, so that nothing stops them but an edit."""
        found = self.member.copy()
        found[self.receiver] = False
        return found

    def clauses(self, x: Ids, *, semantics: str = "support", selector: Ids | None = None,
                unless: Ids | None = None) -> Literals:
        """The clauses of all groups, each ended by 0.

        Args:
            x: int64 [nodes], the literal for x_n.
            semantics: ``support``: x_n implies its groups. ``authors``: each group is equivalent to x_n.
            selector: int64 [groups], a literal per group without which the group asks for nothing.
            unless: int64 [nodes], a literal that frees x_n from its groups; 0 is none. Only for ``support``.
        """
        head = [] if selector is None else [-selector]
        body = [-x[self.receiver], *([] if unless is None else [unless[self.receiver]])]
        wanted = ~self.satisfied
        found = [self._implications(wanted, self.all_inputs, [*head, *body], x)]
        if semantics == "authors":
            found.append(self._implications(wanted, ~self.all_inputs, [*head, x[self.receiver]], -x))
            found.append(_stack([(np.flatnonzero(self.satisfied), column[self.satisfied])
                                 for column in [*head, x[self.receiver]]]))
        return np.concatenate(found)

    def _implications(self, wanted: npt.NDArray[np.bool_], one_each: npt.NDArray[np.bool_], head: list[Ids],
                      x: Ids) -> Literals:
        """Clauses of the head's literals and an input's x each where ``one_each``, else of all inputs' together."""
        group = np.repeat(np.arange(len(self)), np.diff(self.start))
        kept = wanted[group]
        group, inputs = group[kept], self.inputs[kept]
        edge = len(self) + np.arange(len(group))
        clause = np.where(one_each[group], edge, group)
        first = np.concatenate([np.flatnonzero(wanted & ~one_each), group[one_each[group]]])
        name = np.concatenate([np.flatnonzero(wanted & ~one_each), edge[one_each[group]]])
        return _stack([*((name, column[first]) for column in head), (clause, x[inputs])])


def groups(circuits: Sequence[Circuit], *, retain: bool) -> Groups:
    """The groups of one side's circuits."""
    n = circuits[0].graph.n_nodes
    which = np.repeat(np.arange(len(circuits)), [len(c.src) for c in circuits])
    src, dst, gate = (np.concatenate([np.asarray(getattr(c, name), dtype=np.int64) for c in circuits])
                      for name in ("src", "dst", "gate"))
    member = np.zeros(n, dtype=bool)
    member[src] = member[dst] = True
    order = np.lexsort((src, gate, which, dst))
    columns = np.stack([dst[order], which[order], gate[order], src[order]])
    columns = columns[:, np.concatenate([[True], np.any(np.diff(columns) != 0, axis=0)])]  # an edge told twice is one
    new = np.concatenate([[True], np.any(np.diff(columns[:3]) != 0, axis=0)])
    first = np.flatnonzero(new)
    group, embedding = np.cumsum(new) - 1, columns[3] == 0
    receiver, circuit, kind = columns[0][first], columns[1][first], columns[2][first]
    embedded = np.zeros(len(first), dtype=bool)
    embedded[group[embedding]] = True
    sizes = np.bincount(group[~embedding], minlength=len(first))
    all_inputs = (kind == Gate.ADDER) | ((kind == Gate.AND) == retain)
    found = Groups(retain, tuple(c.name for c in circuits), member, circuit, receiver, kind, all_inputs,
                   np.concatenate([[0], np.cumsum(sizes)]), columns[3][~embedding],
                   (sizes == 0) | (embedded & ~all_inputs) if retain else np.zeros(len(first), dtype=bool), embedded)
    return found if retain else found.only(sizes > 0)


def _ranges(begin: Ids, end: Ids) -> Ids:
    """All of begin[i], ..., end[i] - 1, one range after the other."""
    sizes = end - begin
    return np.repeat(end - np.cumsum(sizes), sizes) + np.arange(sizes.sum())


def _stack(columns: Sequence[tuple[Ids, Ids]]) -> Literals:
    """Clauses from columns of (clause, literal); literals of 0 are none, and clauses come in ascending order."""
    clause = np.concatenate([ids for ids, _ in columns])
    literal = np.concatenate([literals for _, literals in columns])
    clause, literal = clause[literal != 0], literal[literal != 0]
    ends = np.flatnonzero(np.bincount(clause))
    order = np.argsort(np.concatenate([clause, ends]), kind="stable")
    stacked: Literals = np.concatenate([literal, np.zeros(len(ends), dtype=np.int64)])[order].astype(np.int32)
    return stacked


def units(literals: npt.ArrayLike) -> Literals:
    """One clause per literal."""
    array = np.asarray(literals, dtype=np.int32)
    return np.stack([array, np.zeros_like(array)], axis=1).ravel()


def rows(*columns: npt.ArrayLike) -> Literals:
    """One clause per position of the columns, which have equal lengths."""
    arrays = [np.asarray(column, dtype=np.int32) for column in columns]
    return np.stack([*arrays, np.zeros_like(arrays[0])], axis=1).ravel()

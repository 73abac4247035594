"""A question for :func:`clue.logic.assign` in one JSON file, over nodes of any names.

    {"nodes": ["embed", "h0", "h1", "logits"],
     "forget": {"facts": [["embed", "h0", "AND"], ["h0", "logits", "AND"], ["h1", "logits", "AND"]]},
     "retain": {"text": [["h0", "logits", "ADDER"]]},
     "editable": ["h0", "h1"], "weights": {"h0": 3}}

``nodes`` is in topological order, the embedding first and the output last. Each circuit has a name and its edges
[source, target, gate], the gate AND, OR or ADDER. ``editable`` is all but the first and the last node, and weights are
1, if not given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..circuit.named_edges import load
from ..errors import CircuitError
from ..types import Gate

_GATES = {gate.name: gate.value for gate in Gate}


@dataclass(frozen=True, eq=False)
class NamedNodes:
    """The part of a graph that logic looks at."""

    names: tuple[str, ...]
    editable: npt.NDArray[np.bool_]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.names)

    def name(self, node: int) -> str:
        """Name of a node."""
        return self.names[node]


@dataclass(frozen=True, eq=False)
class NamedCircuit:
    """Gated edges over :class:`NamedNodes`; arrays as in :class:`clue.circuit.graph.Circuit`."""

    name: str
    graph: NamedNodes
    src: npt.NDArray[np.int32]
    dst: npt.NDArray[np.int32]
    gate: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Question:
    """Circuits of both sides and the cost of a conflict at each node (int64 [nodes])."""

    graph: NamedNodes
    forget: tuple[NamedCircuit, ...]
    retain: tuple[NamedCircuit, ...]
    weights: npt.NDArray[np.int64]


def read_question(path: str | os.PathLike[str], data: Any = None) -> Question:
    """Read a question.

    Args:
        data: the parsed JSON, if it has been read already.

    Raises:
        CircuitError: names what is missing, unknown or malformed. What makes no sense as a circuit (a cycle, an output
            that nothing reaches) is left to :func:`clue.logic.assign`.
    """
    def refuse(what: str) -> NoReturn:
        raise CircuitError(f"{path}: {what}")

    if data is None:
        data = load(path)
    if not isinstance(data, dict):
        refuse("expected an object with 'nodes', 'forget' and 'retain'")
    for key in data:
        if key not in ("nodes", "editable", "weights", "forget", "retain"):
            refuse(f"unknown key {key!r}: the keys are nodes, editable, weights, forget, retain")
    nodes = data.get("nodes")
    if not isinstance(nodes, list) or len(nodes) < 2 or not all(_is_name(node) for node in nodes):
        refuse("'nodes' must list at least two names without blanks, embedding first and output last")
    known = {node: i for i, node in enumerate(nodes)}
    if len(known) < len(nodes):
        refuse("'nodes' has a name twice")

    def ids(names: Any, where: str) -> list[int]:
        for name in names:
            if not isinstance(name, str) or name not in known:
                refuse(f"{where}: {name!r} is not in 'nodes'")
        return [known[name] for name in names]

    editable = np.ones(len(nodes), dtype=bool)
    if "editable" in data:
        if not isinstance(data["editable"], list):
            refuse("'editable' must be a list of nodes")
        editable[:] = False
        editable[ids(data["editable"], "editable")] = True
    editable[[0, -1]] = False
    weights = np.ones(len(nodes), dtype=np.int64)
    if "weights" in data:
        if not isinstance(data["weights"], dict):
            refuse("'weights' must give an integer by node")
        for name, node in zip(data["weights"], ids(data["weights"], "weights"), strict=True):
            weight = data["weights"][name]
            if type(weight) is not int or not 0 <= weight < 2**62:
                refuse(f"weights: {name} must have an integer in 0 .. 2^62 - 1, not {weight!r}")
            weights[node] = weight
    graph = NamedNodes(tuple(nodes), editable)
    sides = {}
    for side in ("forget", "retain"):
        if not isinstance(data.get(side), dict):
            refuse(f"'{side}' must give at least one circuit: its edges by its name")
        sides[side] = tuple(_circuit(name, edges, graph, known, refuse, side) for name, edges in data[side].items())
    return Question(graph, sides["forget"], sides["retain"], weights)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and not any(c.isspace() for c in value)


def _circuit(name: str, edges: Any, graph: NamedNodes, known: Mapping[str, int], refuse: Any,
             side: str) -> NamedCircuit:
    if not isinstance(edges, list):
        refuse(f"{side} {name}: expected a list of edges")
    columns: Sequence[list[int]] = ([], [], [])
    for number, edge in enumerate(edges, 1):
        where = f"{side} {name}: edge {number}"
        if not isinstance(edge, list) or len(edge) != 3 or not all(isinstance(part, str) for part in edge):
            refuse(f"{where} must be [source, target, gate]")
        for node in edge[:2]:
            if node not in known:
                refuse(f"{where}: {node!r} is not in 'nodes'")
        if edge[2] not in _GATES:
            refuse(f"{where}: gate {edge[2]!r} is none of {', '.join(_GATES)}")
        for column, value in zip(columns, (known[edge[0]], known[edge[1]], _GATES[edge[2]]), strict=True):
            column.append(value)
    src, dst, gate = columns
    return NamedCircuit(name, graph, np.array(src, np.int32), np.array(dst, np.int32), np.array(gate, np.uint8))

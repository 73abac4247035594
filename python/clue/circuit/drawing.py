"""Drawing: circuits as GraphML and DOT, for the programs that lay out and show graphs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import numpy.typing as npt

from ..data.atomic import write_atomically
from ..errors import CircuitError
from ..types import Gate, NodeKind, Provenance, Role
from .graph import Circuit, Graph

PathLike = str | os.PathLike[str]
_Row = tuple[str, dict[str, object]]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_graphml(path: PathLike, circuit: Circuit, *, roles: npt.ArrayLike | None = None,
                  neurons: bool = True) -> None:
    """Write a circuit as GraphML, for Gephi, yEd, Cytoscape, igraph or networkx.

    The graph has the circuit's ``name``. Nodes have ``name`` (their id is the same with ``.q`` for ``<q>``, which XML
    allows), ``kind`` (as in :class:`NodeKind`, lower case) and ``layer`` (-1 for ``embed``, ``n_layers`` for
    ``logits``); edges have ``gate``, ``provenance``, and ``ns`` and ``dn`` where they have scores. Characters that no
    XML document may have become U+FFFD.

    Args:
        path: written atomically.
        circuit: at block or neuron level.
        roles: uint8 [nodes], values of :class:`Role` (``Assignment.role``); nodes then have ``role``.
        neurons: draw hidden neurons. If not, an MLP is one node with the number of its ``neurons`` in the circuit and
            the role they share, ``mixed`` if they differ.

    Raises:
        CircuitError: ``roles`` does not hold one role per node of the graph.
    """
    nodes, edges = _drawn(circuit, roles, neurons)
    types = {"layer": "int", "neurons": "int", "ns": "double", "dn": "double"}
    keys = [("graph", "name"), *[("node", key) for key in ("name", "kind", "layer", "role", "neurons")],
            *[("edge", key) for key in ("gate", "provenance", "ns", "dn")]]
    names = dict(nodes)

    def data(of: str, values: Mapping[str, object]) -> str:
        texts = {key: escape(_clean(str(value)), {"\r": "&#13;"}) for key, value in values.items()}
        return "".join(f'<data key="{of}.{key}">{text}</data>' for key, text in texts.items())

    def identity(name: str) -> str:
        return quoteattr(name.replace("<", ".").replace(">", ""))

    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">']
    lines += [f'<key id="{of}.{key}" for="{of}" attr.name="{key}" attr.type="{types.get(key, "string")}"/>'
              for of, key in keys]
    lines.append(f'<graph edgedefault="directed">{data("graph", {"name": circuit.name})}')
    lines += [f"<node id={identity(name)}>{data('node', {'name': name, **values})}</node>"
              for name, values in names.items()]
    lines += [f"<edge source={identity(src)} target={identity(dst)}>{data('edge', values)}</edge>"
              for src, dst, values in edges]
    write_atomically(path, "\n".join([*lines, "</graph>", "</graphml>", ""]).encode())


def write_dot(path: PathLike, circuit: Circuit, *, roles: npt.ArrayLike | None = None,
              neurons: bool = True) -> None:
    """Write a circuit in Graphviz's DOT language, drawn from ``embed`` at the bottom to ``logits`` at the top.

    Node ids are CLUE's names. Attributes, arguments and errors are those of :func:`write_graphml`; Graphviz shows none
    of them by itself but keeps all.
    """
    nodes, edges = _drawn(circuit, roles, neurons)

    def quoted(value: object) -> str:
        text = _clean(str(value)).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"'

    def attributes(values: Mapping[str, object]) -> str:
        return f"[{', '.join(f'{key}={quoted(value)}' for key, value in values.items())}]"

    lines = [f"digraph {quoted(circuit.name)} {{", "  rankdir=BT;"]
    lines += [f"  {quoted(name)} {attributes(values)};" for name, values in nodes]
    lines += [f"  {quoted(src)} -> {quoted(dst)} {attributes(values)};" for src, dst, values in edges]
    write_atomically(path, "\n".join([*lines, "}", ""]).encode())


def _drawn(circuit: Circuit, roles: npt.ArrayLike | None,
           neurons: bool) -> tuple[list[_Row], list[tuple[str, str, dict[str, object]]]]:
    """Nodes with their attributes and edges with theirs, hidden neurons inside their MLP unless they are asked for."""
    graph, names = circuit.graph, circuit.graph.names
    role = None if roles is None else _roles(roles, graph)
    shown = np.arange(graph.n_nodes, dtype=np.int32)
    collapsed = graph.neurons and not neurons
    if collapsed:
        parts = np.flatnonzero(np.isin(graph.kind, (NodeKind.MLP_IN, NodeKind.NEURON)))
        shown[parts] = graph.node(NodeKind.MLP) + graph.layer[parts] * graph.layer_size
    units = (graph.kind == NodeKind.NEURON) & circuit.nodes
    counts = np.bincount(shown[units], minlength=graph.n_nodes)
    shared: dict[int, set[int]] = {}
    if role is not None and collapsed:
        for node, value in zip(shown[units].tolist(), role[units].tolist(), strict=True):
            shared.setdefault(node, set()).add(value)
    nodes = []
    for node in np.unique(shown[circuit.nodes]).tolist():
        values: dict[str, object] = {"kind": NodeKind(graph.kind[node]).name.lower(), "layer": int(graph.layer[node])}
        if role is not None:
            own = shared.get(node, {int(role[node])})
            values["role"] = Role(min(own)).name.lower() if len(own) == 1 else "mixed"
        if collapsed and graph.kind[node] == NodeKind.MLP:
            values["neurons"] = int(counts[node])
        nodes.append((names[node], values))
    edges = []
    for u, v, gate, provenance, ns, dn in zip(
            shown[circuit.src].tolist(), shown[circuit.dst].tolist(), circuit.gate.tolist(),
            circuit.provenance.tolist(), circuit.ns.tolist(), circuit.dn.tolist(), strict=True):
        if u != v:
            values = {"gate": Gate(gate).name, "provenance": str(Provenance(provenance).name).lower()}
            values |= {key: score for key, score in (("ns", ns), ("dn", dn)) if not math.isnan(score)}
            edges.append((names[u], names[v], values))
    return nodes, edges


def _roles(roles: npt.ArrayLike, graph: Graph) -> npt.NDArray[Any]:
    array = np.asarray(roles)
    if array.shape != (graph.n_nodes,) or not np.isin(array, [role.value for role in Role]).all():
        raise CircuitError(f"roles must hold one of 0..{len(Role) - 1} per node: expected shape ({graph.n_nodes},), got"
                           f" {array.shape}: take them from the Assignment of this graph")
    return array


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)

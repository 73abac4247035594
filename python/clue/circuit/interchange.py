"""Interchange: circuits to and from other tools.

- EAP-IG (``Graph.to_json`` and ``Graph.from_json`` of hannamw/EAP-IG), both ways and without loss for CLUE.
- ``edges.json`` of princeton-nlp/Edge-Pruning and the gated edges of the CLUE authors' release (Zodiark-ch/CLUE), read.

Another tool's file says less than a circuit does. What it leaves out is not made up:

1. Gate. A gate is known only from two directions (arXiv 2505.10039). An edge of which one is known is an ADDER: retain
   circuits then need all inputs, forget circuits stop all inputs, which is enough whatever the true gate is.
2. Provenance. ``UNKNOWN``, unless the caller says which direction the tool was run in.
3. Edges. A head's q, k and v feed its o by construction, so these structural edges (AND, as everywhere in CLUE) are
   added where both their ends are in the circuit. Nothing else is added, and no dead end is removed.

Every file is read into the block-level :class:`Graph` of its model (``neurons=False``), since none of these formats has
hidden neurons as nodes; only a circuit that CLUE wrote brings its own, and is read into the graph it was written from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..data.atomic import write_atomically
from ..errors import CircuitError
from ..types import Direction, Gate, NodeKind, Provenance
from .graph import Circuit, Floats, Graph, Ints, sort_edges
from .named_edges import (
    AGAIN,
    MADE_FOR,
    PathLike,
    check_block_level,
    check_forward,
    check_once,
    flags_and_scores,
    json_object,
    labels,
    load,
    node_ids,
    number,
    record_at,
    record_list,
    shortened,
)

_Row = tuple[str, dict[str, object]]

#: Version of what CLUE writes under the key ``clue`` of an EAP-IG file.
FORMAT = 1

_GATES = {gate.name: gate.value for gate in Gate}
_PROVENANCES = {str(Provenance(bits).name): bits for bits in range(2 * max(Provenance))}


def write_eap_ig(path: PathLike, circuit: Circuit, *, d_model: int = 0) -> None:
    """Write a circuit as the JSON file that EAP-IG's ``Graph.from_json`` reads.

    The file is ``{"cfg", "nodes", "edges", "clue"}``. ``nodes`` has every node of EAP-IG, ``in_graph`` if an edge of
    the circuit leaves it; ``edges`` has the circuit's edges between writers and readers,
    ``"a5.h3->m7": {"score": ..., "in_graph": true}``, and those it does not name are outside. The embedding is
    ``input``.

    - Score: (Ns - Dn) / 2, EAP-IG's integral taken at the two ends of its path; the one score if there is only one;
      NaN, EAP-IG's sign for "not scored", if there is none. It is CLUE's target that is attributed, where EAP-IG's
      users often take a loss, whose scores have the opposite sign.
    - Key/value groups: EAP-IG has k and v inputs per query head. An edge into ``a5.g1<k>`` becomes one edge into
      ``a5.h{i}<k>`` for each query head i of the group, with an equal part of the score, so that the sum is the
      group's.
    - The key ``clue``, which EAP-IG ignores, has the whole circuit under CLUE's names: gates, provenance, both scores,
      structural edges and neurons, and its faithfulness. :func:`read_eap_ig` gives back the same circuit from it.

    Args:
        path: written atomically.
        circuit: at block or neuron level.
        d_model: width of the residual stream, which a :class:`Graph` does not know; EAP-IG needs it only to go on
            scoring residual dimensions.
    """
    graph = circuit.graph
    between = np.isin(circuit.src, graph.writers) & np.isin(circuit.dst, graph.readers)
    src, dst, ns, dn = (array[between] for array in (circuit.src, circuit.dst, circuit.ns, circuit.dn))
    score = np.where(np.isnan(dn), ns, np.where(np.isnan(ns), -dn, (ns - dn) / 2))
    sources, targets = _inverse(_eap_ig_sources(graph)), _inverse(_eap_ig_targets(graph))
    edges = {f"{sources[u][0]}->{target}": {"score": s / len(targets[v]), "in_graph": True}
             for u, v, s in zip(src.tolist(), dst.tolist(), score.tolist(), strict=True) for target in targets[v]}
    writing = set(src.tolist())
    nodes = {name: {"in_graph": node in writing} for name, node in _eap_ig_sources(graph).items()}
    document = {
        "cfg": {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel,
                "d_model": d_model},
        "nodes": nodes | {"logits": {"in_graph": True}},
        "edges": edges,
        "clue": {"format": FORMAT, "name": circuit.name, "graph": graph.to_json(), "faithfulness": circuit.faithfulness,
                 "edges": _own_rows(circuit)},
    }
    write_atomically(path, json.dumps(document).encode())


def read_eap_ig(path: PathLike, graph: Graph, *, name: str | None = None,
                direction: Direction | None = None) -> Circuit:
    """Read a circuit from the JSON file that EAP-IG's ``Graph.to_json`` writes.

    The edges with ``in_graph`` set are the circuit; the flags of nodes say nothing more, except those of residual
    dimensions (``neurons``), which CLUE has no nodes for: such a node counts whole. The file may name any part of the
    edges, and nodes may be plain flags, as older versions write them.

    - Gate: ADDER. Provenance: that of ``direction``, otherwise ``UNKNOWN``.
    - Score: an edge has one, the estimated effect of patching corrupted into clean. It is Ns or Dn if ``direction``
      says so, and stands in ``ns`` if nothing is said; the other direction is NaN.
    - Key/value groups: EAP-IG has k and v inputs per query head, with the weights of a group repeated. An edge into a
      group is in the circuit if an edge into any of its heads is, and its score is the sum over all of them: that is
      what attribution to the group's shared input is.

    A file that CLUE wrote has the whole circuit under the key ``clue``, and this circuit is returned.

    Args:
        path: the file.
        graph: the model's, at block level; for a file that CLUE wrote, the graph it was written from.
        name: of the circuit; the file's own, or its stem, if not given.
        direction: how the scores were made, which the file does not say: ``NOISING`` for EAP (method ``EAP`` or
            ``exact``), ``DENOISING`` for the same with clean and corrupted prompts swapped. Integrated gradients over
            the full path are neither.

    Raises:
        CircuitError: the file is missing, is no such JSON or names an edge twice; the model has other dimensions; a
            node is unknown, an edge runs backwards, no edge is in the circuit, or CLUE's part and the flags disagree.
    """
    data = json_object(path, load(path), "", ("cfg", "nodes", "edges"))
    cfg = json_object(path, data["cfg"], "cfg", ("n_layers", "n_heads"))
    for key, expected in (("n_layers", graph.n_layers), ("n_heads", graph.n_heads)):
        if type(cfg[key]) is not int or cfg[key] != expected:
            raise CircuitError(f"{path}: cfg: {key} is {shortened(cfg[key])}, the graph has {expected}: {MADE_FOR}")
    if bool(cfg.get("parallel_attn_mlp", graph.parallel)) != graph.parallel:
        raise CircuitError(f"{path}: cfg: parallel_attn_mlp is {shortened(cfg['parallel_attn_mlp'])}, the graph has"
                           f" {shortened(graph.parallel)}: {MADE_FOR}")
    json_object(path, data["nodes"], "nodes")
    edges = json_object(path, data["edges"], "edges")
    names = list(edges)
    flags, scores = flags_and_scores(path, edges)
    if "clue" in data:
        circuit = _own_circuit(path, graph, data["clue"], name)
        _check_agreement(path, circuit, {edge for edge, flag in zip(names, flags.tolist(), strict=True) if flag})
        return circuit
    check_block_level(path, graph)
    if not flags.any():
        raise CircuitError(f"{path}: no edge has in_graph set: choose edges (apply_topn) before to_json")

    def where(edge: int) -> str:
        return f"{path}: edge {names[edge]!r}"

    ends = [edge.split("->") for edge in names]
    odd = next((i for i, pair in enumerate(ends) if len(pair) != 2), None)
    if odd is not None:
        raise CircuitError(f"{where(odd)} is not of the form source->target: rename or remove it")
    src = node_ids([pair[0] for pair in ends], _eap_ig_sources(graph), _eap_ig_targets(graph), graph, where, "start")
    dst = node_ids([pair[1] for pair in ends], _eap_ig_targets(graph), _eap_ig_sources(graph), graph, where, "end")
    check_forward(graph, src, dst, where)
    order, first = _equal(src, dst)
    keep = np.logical_or.reduceat(flags[order], first)
    score = np.add.reduceat(scores[order], first)[keep]
    src, dst = src[order][first][keep], dst[order][first][keep]
    none = np.full(len(src), np.nan)
    ns, dn = (none, score) if direction is Direction.DENOISING else (score, none)
    return _foreign(path, name, graph, src, dst, np.full(len(src), Gate.ADDER), _found_by(direction, len(src)), ns, dn)


def read_edge_pruning(path: PathLike, graph: Graph, *, name: str | None = None,
                      direction: Direction | None = None) -> Circuit:
    """Read the ``edges.json`` that Edge-Pruning's ``vis_fpt2.py`` and ``vis_fllama.py`` write.

    The file is a list of [source, target]. Sources: ``embeds`` (Llama), ``tok_embeds`` and ``pos_embeds`` (GPT-2;
    ``token_embeds`` in Tracr models), ``a0.h3``, ``m0``. Targets: ``a1.h2.q``, ``a1.h2.k``, ``a1.h2.v``, ``m1``,
    ``resid_post``, which is the output. Token and position embeddings are one node here, so their two edges into a
    target become one. The number in ``a1.h2.k`` and ``a1.h2.v`` counts key/value groups already, and is read so.

    Gate: ADDER. Provenance: that of ``direction``, otherwise ``UNKNOWN``. Scores: NaN, since the file has none. A file
    made without embedding nodes has no edge from the embedding, which then feeds every reader; none is added here.

    Args:
        path: the file.
        graph: the model's, at block level.
        name: of the circuit; the file's stem if not given.
        direction: how the masks were trained, which the file does not say: ``NOISING`` if corrupted activations flow
            where an edge is cut (Edge-Pruning itself), ``DENOISING`` for the other way round.

    Raises:
        CircuitError: the file is missing or is no such list; a node is unknown or outside the model, an edge runs
            backwards or is there twice, or there is no edge.
    """
    rows = record_list(path, graph, 2)
    where = record_at(path)
    sources = {"embeds": graph.embed, "tok_embeds": graph.embed, "token_embeds": graph.embed, "pos_embeds": graph.embed,
               **_heads(graph, "a{}.h{}"), **_mlps(graph)}
    targets = {**_head_inputs(graph, "h"), **_mlps(graph), "resid_post": graph.logits}
    src = node_ids([row[0] for row in rows], sources, targets, graph, where, "start")
    dst = node_ids([row[1] for row in rows], targets, sources, graph, where, "end")
    check_once(rows, where)
    check_forward(graph, src, dst, where)
    order, first = _equal(src, dst)
    src, dst = src[order][first], dst[order][first]
    none = np.full(len(src), np.nan)
    gate, provenance = np.full(len(src), Gate.ADDER), _found_by(direction, len(src))
    return _foreign(path, name, graph, src, dst, gate, provenance, none, none)


def read_logical_edges(path: PathLike, graph: Graph, *, name: str | None = None) -> Circuit:
    """Read the gated edges that ``get_logical_edge.py`` of the CLUE authors' release writes (``edges_bool.json``).

    The file is a list of [source, target, gate], the gate being ``AND``, ``OR`` or ``ADDER``. Sources: ``embeds``,
    ``tok_embeds``, ``pos_embeds``, ``a0.h3.o``, ``m0``. Targets: ``a1.h2.q``, ``a1.H2.k``, ``a1.H2.v``, ``m1``,
    ``resid_post``. Source: github.com/Zodiark-ch/CLUE at 96f78b9, Edge-Pruning/src/solver.

    - Provenance: AND is found by Ns alone and OR by Dn alone. ADDER is ``UNKNOWN``: the release also gives it to a lone
      edge of either direction. An edge listed with two gates was found by both, and is an ADDER. Scores: NaN.
    - Key/value groups: the number in ``a1.H2.k`` is read as the group whose rows the release masks (``a1.h2.k``
      likewise). The release divides by 4 numbers that count groups already, so for some models such an edge names
      another group than the one that was found; nothing in the file can tell.
    - Edges that leave a q, k or v are not read. Those into the o of a head are its wiring, which the architecture
      gives; those into ``resid_post`` are how the release ties up dead ends, and exist in no model.

    Args:
        path: the file.
        graph: the model's, at block level.
        name: of the circuit; the file's stem if not given.

    Raises:
        CircuitError: the file is missing or is no such list; a node is unknown or outside the model, a gate is none of
            the three, an edge runs backwards or is there twice with one gate, or there is no edge.
    """
    rows = record_list(path, graph, 3)
    where = record_at(path)
    groups, inputs, heads = _head_inputs(graph, "H"), _head_inputs(graph, "h"), _heads(graph, "a{}.h{}.o")
    embeds = dict.fromkeys(("embeds", "tok_embeds", "pos_embeds"), graph.embed)
    sources = {**embeds, **heads, **_mlps(graph), **groups, **inputs}
    targets = {**groups, **inputs, **_mlps(graph), "resid_post": graph.logits, **heads}
    src = node_ids([row[0] for row in rows], sources, targets, graph, where, "start")
    dst = node_ids([row[1] for row in rows], targets, sources, graph, where, "end")
    gate = labels([row[2] for row in rows], _GATES, where, "gate")
    check_once(rows, where)
    inside = np.isin(graph.kind[src], (NodeKind.Q, NodeKind.K, NodeKind.V))
    into_head = graph.kind[dst] == NodeKind.HEAD
    wiring = inside & ((into_head & (graph.layer[src] == graph.layer[dst])) | (dst == graph.logits))
    wrong = ~wiring & (inside | into_head)
    if wrong.any():
        raise CircuitError(f"{where(int(np.argmax(wrong)))}: a q, k or v feeds a head of its layer only, and nothing"
                           " else feeds a head's o: remove the record")
    read = np.flatnonzero(~wiring)
    if len(read) == 0:
        raise CircuitError(f"{path}: no record is an edge between a writer and a later reader: take the file that"
                           " get_logical_edge.py wrote")
    src, dst, gate = src[read], dst[read], gate[read]
    check_forward(graph, src, dst, lambda edge: where(int(read[edge])))
    evidence = np.array([Provenance.NOISING, Provenance.DENOISING, Provenance.UNKNOWN])[gate]  # by AND, OR, ADDER
    order, first = _equal(src, dst)
    src, dst, gate = src[order][first], dst[order][first], gate[order]
    same = np.minimum.reduceat(gate, first) == np.maximum.reduceat(gate, first)
    none = np.full(len(src), np.nan)
    return _foreign(path, name, graph, src, dst, np.where(same, gate[first], Gate.ADDER),
                    np.bitwise_or.reduceat(evidence[order], first), none, none)


# Names: what each format calls the nodes of a graph.


def _heads(graph: Graph, pattern: str) -> dict[str, int]:
    return {pattern.format(layer, h): graph.node(NodeKind.HEAD, layer, h)
            for layer in range(graph.n_layers) for h in range(graph.n_heads)}


def _mlps(graph: Graph) -> dict[str, int]:
    return {f"m{layer}": graph.node(NodeKind.MLP, layer) for layer in range(graph.n_layers)}


def _head_inputs(graph: Graph, group: str) -> dict[str, int]:
    """Names of q, k and v in the style of Edge-Pruning: q by head, k and v by key/value group."""
    return {f"a{layer}.{letter}{i}.{kind.name.lower()}": graph.node(kind, layer, i)
            for layer in range(graph.n_layers)
            for kind, letter, size in ((NodeKind.Q, "h", graph.n_heads), (NodeKind.K, group, graph.n_kv_heads),
                                       (NodeKind.V, group, graph.n_kv_heads))
            for i in range(size)}


def _eap_ig_sources(graph: Graph) -> dict[str, int]:
    return {"input": graph.embed, **_heads(graph, "a{}.h{}"), **_mlps(graph)}


def _eap_ig_targets(graph: Graph) -> dict[str, int]:
    """Names of the readers; the query heads of a group all name its one k and its one v."""
    size = graph.n_heads // graph.n_kv_heads
    inputs = {f"a{layer}.h{h}<{kind.name.lower()}>": graph.node(kind, layer, h // share)
              for layer in range(graph.n_layers)
              for kind, share in ((NodeKind.Q, 1), (NodeKind.K, size), (NodeKind.V, size))
              for h in range(graph.n_heads)}
    mlps = {f"m{layer}": graph.mlp_reader(layer) for layer in range(graph.n_layers)}
    return {**inputs, **mlps, "logits": graph.logits}


def _inverse(names: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, node in names.items():
        found.setdefault(node, []).append(name)
    return found


def _equal(src: Ints, dst: Ints) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """An order in which equal edges are neighbours, and where each edge begins in it."""
    order = np.lexsort((src, dst))
    u, v = src[order], dst[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (u[1:] != u[:-1]) | (v[1:] != v[:-1])
    return order, np.flatnonzero(new)


def _found_by(direction: Direction | None, size: int) -> npt.NDArray[np.uint8]:
    values = {None: Provenance.UNKNOWN, Direction.NOISING: Provenance.NOISING, Direction.DENOISING: Provenance.DENOISING}
    if direction not in values:
        raise CircuitError(f"direction = {direction!r} is not one of {', '.join(map(str, (*Direction, None)))}")
    return np.full(size, values[direction], dtype=np.uint8)


def _foreign(path: PathLike, name: str | None, graph: Graph, src: Ints, dst: Ints, gate: npt.NDArray[Any],
             provenance: npt.NDArray[Any], ns: Floats, dn: Floats) -> Circuit:
    """A circuit of another tool's edges, with the insides of the heads whose inputs and output are in it."""
    read, written = np.zeros(graph.n_nodes, dtype=bool), np.zeros(graph.n_nodes, dtype=bool)
    read[dst], written[src] = True, True
    inputs, heads = graph.inside_heads
    both = read[inputs] & written[heads]
    inputs, heads = inputs[both], heads[both]
    n, none = len(inputs), np.full(len(inputs), np.nan)
    columns = sort_edges(
        np.concatenate([src, inputs]), np.concatenate([dst, heads]),
        np.concatenate([gate, np.full(n, Gate.AND)]).astype(np.uint8),
        np.concatenate([provenance, np.full(n, Provenance.STRUCTURAL)]).astype(np.uint8),
        np.concatenate([ns, none]), np.concatenate([dn, none]))
    return Circuit(Path(path).stem if name is None else name, graph, *columns)


# CLUE's own part of an EAP-IG file: the whole circuit, one [source, target, gate, provenance, ns, dn] per edge.


def _own_rows(circuit: Circuit) -> list[list[Any]]:
    names = circuit.graph.names
    gates, provenances = ({value: name for name, value in known.items()} for known in (_GATES, _PROVENANCES))

    def scores(array: Floats) -> list[float | None]:
        return [None if math.isnan(score) else score for score in array.tolist()]

    return [[names[u], names[v], gates[g], provenances[p], ns, dn] for u, v, g, p, ns, dn in
            zip(circuit.src.tolist(), circuit.dst.tolist(), circuit.gate.tolist(), circuit.provenance.tolist(),
                scores(circuit.ns), scores(circuit.dn), strict=True)]


def _own_circuit(path: PathLike, graph: Graph, own: Any, name: str | None) -> Circuit:
    own = json_object(path, own, "clue", ("format", "name", "graph", "edges"))
    if own["format"] != FORMAT:
        raise CircuitError(f"{path}: clue: format {shortened(own['format'])} is not {FORMAT}: read it with the CLUE that"
                           " wrote it, or remove the key 'clue'")
    dimensions = json_object(path, own["graph"], "clue: graph")
    for key, value in graph.to_json().items():
        if dimensions.get(key) != value:
            raise CircuitError(f"{path}: clue: {key} is {shortened(dimensions.get(key))}, the graph has {shortened(value)}:"
                               " read it into the graph it was written from")
    rows, measured = own["edges"], own.get("faithfulness")  # files of older versions have no faithfulness
    if measured is not None and number(measured) is None:
        raise CircuitError(f"{path}: clue: faithfulness {shortened(measured)} is no number: {AGAIN}")
    if not isinstance(own["name"], str) or not isinstance(rows, list):
        raise CircuitError(f"{path}: clue: 'name' must be a string and 'edges' a list: {AGAIN}")

    def where(row: int) -> str:
        return f"{path}: clue: edge {row + 1}"

    def refuse(row: int, what: str) -> NoReturn:
        raise CircuitError(f"{where(row)} {what}: {AGAIN}")

    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 6:
            refuse(i, f"is {shortened(row)}, not [source, target, gate, provenance, ns, dn]")
    u, v, g, p, ns, dn = ([row[i] for row in rows] for i in range(6))
    known = {node: i for i, node in enumerate(graph.names)}
    src, dst = node_ids(u, known, {}, graph, where, "start"), node_ids(v, known, {}, graph, where, "end")
    check_forward(graph, src, dst, where)
    check_once([row[:2] for row in rows], where)
    scores = [[number(value) for value in column] for column in (ns, dn)]
    for column, values in zip(scores, (ns, dn), strict=True):
        odd = next((i for i, score in enumerate(column) if score is None), None)
        if odd is not None:
            refuse(odd, f"has a score {shortened(values[odd])} that is no number")
    gate, provenance = labels(g, _GATES, where, "gate"), labels(p, _PROVENANCES, where, "provenance")
    columns = [np.array(column, dtype=np.float64) for column in scores]
    return Circuit(own["name"] if name is None else name, graph, src, dst, gate, provenance, *columns,
                   faithfulness=None if measured is None else number(measured))


def _check_agreement(path: PathLike, circuit: Circuit, flagged: set[str]) -> None:
    """Refuse a file whose flags were changed after CLUE wrote it: which of the two is meant, only the user knows."""
    graph = circuit.graph
    sources, targets = _inverse(_eap_ig_sources(graph)), _inverse(_eap_ig_targets(graph))
    own = {f"{sources[u][0]}->{target}" for u, v in zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True)
           if u in sources and v in targets for target in targets[v]}
    if own != flagged:
        edge = min(own ^ flagged)
        has, lacks = ("the key 'clue'", "in_graph") if edge in own else ("in_graph", "the key 'clue'")
        raise CircuitError(f"{path}: edge {edge!r} is in the circuit by {has} and not by {lacks}: {AGAIN}")

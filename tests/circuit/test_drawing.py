"""Drawing: what is written parses, says everything, and hides neurons on request."""

from __future__ import annotations

import re
import string
from dataclasses import replace
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.circuit.drawing import write_dot, write_graphml
from clue.circuit.graph import Circuit, Graph, sort_edges
from clue.errors import CircuitError
from clue.types import Gate, NodeKind, Provenance, Role
from tests.circuit.test_interchange import PLAIN, circuits


def drawn() -> tuple[Circuit, np.ndarray]:
    """embed -> m0 by two neurons and by one head, with a role for every node."""
    graph = Graph(1, 1, 1, 3, True)
    names = {name: i for i, name in enumerate(graph.names)}
    rows = [("embed", "m0.in", Gate.OR, Provenance.DENOISING, 0.5, 2.0),
            ("embed", "a0.h0<q>", Gate.ADDER, Provenance.UNKNOWN, -1e-7, np.nan),
            ("a0.h0<q>", "a0.h0", Gate.AND, Provenance.STRUCTURAL, np.nan, np.nan),
            ("m0.in", "m0.n0", Gate.AND, Provenance.STRUCTURAL, np.nan, np.nan),
            ("m0.in", "m0.n2", Gate.AND, Provenance.STRUCTURAL, np.nan, np.nan),
            ("m0.n0", "m0", Gate.AND, Provenance.NOISING, 1.0, 0.0),
            ("m0.n2", "m0", Gate.AND, Provenance.NOISING, 1.0, 0.0),
            ("a0.h0", "logits", Gate.ADDER, Provenance.BOTH, 1.0, 1.0),
            ("m0", "logits", Gate.AND, Provenance.NOISING, 1.0, 1.0)]
    src, dst = (np.array([names[row[i]] for row in rows], np.int32) for i in range(2))
    kinds = ((2, np.uint8), (3, np.uint8), (4, float), (5, float))
    columns = [np.array([row[i] for row in rows], dtype) for i, dtype in kinds]
    roles = np.zeros(graph.n_nodes, np.uint8)
    roles[[names["a0.h0"], names["m0.n0"], names["m0.n2"]]] = [Role.RETAIN, Role.FORGET, Role.CONFLICT]
    return Circuit("<a> & \"b\"\\ \x00", graph, *sort_edges(src, dst, *columns)), roles


def test_graphml_loads_in_networkx(tmp_path):
    circuit, roles = drawn()
    write_graphml(tmp_path / "c.graphml", circuit, roles=roles)
    found = networkx.read_graphml(tmp_path / "c.graphml")
    assert found.is_directed()
    assert found.graph["name"] == "<a> & \"b\"\\ \ufffd"
    assert dict(found.nodes)["a0.h0.q"] == {"name": "a0.h0<q>", "kind": "q", "layer": 0, "role": "free"}
    assert {name: data["role"] for name, data in found.nodes.items()} | {"embed": "free", "logits": "free"} == {
        "embed": "free", "a0.h0.q": "free", "a0.h0": "retain", "m0.in": "free", "m0.n0": "forget", "m0.n2": "conflict",
        "m0": "free", "logits": "free"}
    assert (found.nodes["embed"]["layer"], found.nodes["logits"]["layer"]) == (-1, 1)
    assert len(found.edges) == len(circuit)
    assert found.edges["embed", "m0.in"] == {"gate": "OR", "provenance": "denoising", "ns": 0.5, "dn": 2.0}
    assert found.edges["embed", "a0.h0.q"] == {"gate": "ADDER", "provenance": "unknown", "ns": -1e-7}
    assert found.edges["m0.in", "m0.n0"] == {"gate": "AND", "provenance": "structural"}


def test_an_mlp_hides_its_neurons(tmp_path):
    circuit, roles = drawn()
    write_graphml(tmp_path / "c.graphml", circuit, roles=roles, neurons=False)
    found = networkx.read_graphml(tmp_path / "c.graphml")
    assert set(found.edges) == {("embed", "m0"), ("embed", "a0.h0.q"), ("a0.h0.q", "a0.h0"), ("a0.h0", "logits"),
                                ("m0", "logits")}
    assert found.nodes["m0"] == {"name": "m0", "kind": "mlp", "layer": 0, "role": "mixed", "neurons": 2}
    roles[roles == Role.FORGET] = Role.CONFLICT
    write_graphml(tmp_path / "c.graphml", circuit, roles=roles, neurons=False)
    assert networkx.read_graphml(tmp_path / "c.graphml").nodes["m0"]["role"] == "conflict"
    write_graphml(tmp_path / "c.graphml", circuit, neurons=False)
    assert "role" not in networkx.read_graphml(tmp_path / "c.graphml").nodes["m0"]


STRING = r'"((?:[^"\\]|\\[\\"])*)"'


def parse_dot(text: str) -> tuple[str, dict, dict]:
    """Oracle: a graph of quoted names and attributes, nothing else."""
    def unquote(quoted: str) -> str:
        return re.sub(r"(?s)\\(.)", r"\1", quoted)

    name = re.match(rf"digraph {STRING} {{\n  rankdir=BT;\n", text)
    assert name and text.endswith("\n}\n")
    line = re.compile(rf"  {STRING}(?: -> {STRING})? \[((?:\w+={STRING}(?:, )?)*)\];\n")
    at = name.end()
    nodes, edges = {}, {}
    while text[at:] != "}\n":
        item = line.match(text, at)
        assert item, text[at:]
        at = item.end()
        values = {key: unquote(value) for key, value in re.findall(rf"(\w+)={STRING}", item[3])}
        if item[2] is None:
            nodes[unquote(item[1])] = values
        else:
            edges[unquote(item[1]), unquote(item[2])] = values
    return unquote(name[1]), nodes, edges


def test_dot(tmp_path):
    circuit, roles = drawn()
    write_dot(tmp_path / "c.dot", circuit, roles=roles)
    name, nodes, edges = parse_dot((tmp_path / "c.dot").read_text())
    assert name == "<a> & \"b\"\\ \ufffd"
    assert nodes["a0.h0<q>"] == {"kind": "q", "layer": "0", "role": "free"}
    assert set(nodes) == {circuit.graph.names[i] for i in np.flatnonzero(circuit.nodes)}
    assert len(edges) == len(circuit)
    assert edges["embed", "m0.in"] == {"gate": "OR", "provenance": "denoising", "ns": "0.5", "dn": "2.0"}
    write_dot(tmp_path / "c.dot", circuit, roles=roles, neurons=False)
    _, nodes, edges = parse_dot((tmp_path / "c.dot").read_text())
    assert nodes["m0"] == {"kind": "mlp", "layer": "0", "role": "mixed", "neurons": "2"}
    assert ("embed", "m0") in edges


@given(circuits(), st.booleans(), st.text(st.one_of(st.characters(), st.sampled_from(string.printable)), max_size=6))
def test_any_circuit_can_be_drawn(tmp_path_factory, circuit, neurons, name):
    circuit = replace(circuit, name=name)
    path = tmp_path_factory.mktemp("draw") / "c"
    write_graphml(path, circuit, neurons=neurons)
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", name)
    assert (ElementTree.parse(path).getroot().findtext("{*}graph/{*}data") or "") == clean
    found = networkx.read_graphml(path, force_multigraph=True)
    hidden = np.zeros(circuit.graph.n_nodes, bool) if neurons else np.isin(circuit.graph.kind,
                                                                           (NodeKind.MLP_IN, NodeKind.NEURON))
    assert set(nx["name"] for nx in dict(found.nodes).values()) >= {
        circuit.graph.names[i] for i in np.flatnonzero(circuit.nodes & ~hidden)}
    if neurons or not circuit.graph.neurons:
        assert len(found.edges) == len(circuit)
    write_dot(path, circuit, neurons=neurons)
    title, nodes, _ = parse_dot(path.read_bytes().decode())
    assert title == clean
    assert set(nodes) == {node["name"] for node in dict(found.nodes).values()}


@pytest.mark.parametrize("roles", [[0, 1], np.full(PLAIN.n_nodes, 9), np.full(PLAIN.n_nodes, 0.5)])
@pytest.mark.parametrize("write", [write_graphml, write_dot])
def test_roles_of_another_graph_are_refused(tmp_path, write, roles):
    none = np.zeros(0)
    circuit = Circuit("x", PLAIN, *(none.astype(t) for t in (np.int32, np.int32, np.uint8, np.uint8, float, float)))
    with pytest.raises(CircuitError, match=r"roles must hold one of 0\.\.3 per node: expected shape \(20,\), got"):
        write(tmp_path / "c", circuit, roles=roles)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_graphml, write_dot])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "c"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(path, drawn()[0])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

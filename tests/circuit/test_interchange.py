"""Interchange: nothing is lost on the way out and back, nothing is made up on the way in, and every flaw is named.

The golden files are written by hand from the formats' own sources: EAP-IG's ``Graph.to_json``, Edge-Pruning's
``get_edges`` and the CLUE release's ``get_logical_edge.py``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.circuit.graph import Circuit, Graph, sort_edges
from clue.circuit.interchange import (
    read_eap_ig,
    read_edge_pruning,
    read_logical_edges,
    write_eap_ig,
)
from clue.errors import CircuitError
from clue.logic import assign
from clue.types import Direction, Gate, NodeKind, Provenance, Role

PLAIN = Graph(2, 2, 2, 3, False)
GROUPED = Graph(2, 4, 2, 3, False)


@st.composite
def circuits(draw) -> Circuit:
    """Any circuit of a small model: any edges, gates, provenance and scores; grouped queries, neurons."""
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    graph = Graph(draw(st.integers(1, 3)), groups * share, groups, draw(st.integers(1, 3)), draw(st.booleans()),
                  draw(st.booleans()))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(0, 40))
    pairs = np.sort(random.integers(0, graph.n_nodes, (size, 2)), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0).astype(np.int32)
    if graph.parallel:
        beside = (graph.kind[pairs[:, 0]] == NodeKind.HEAD) & (graph.layer[pairs[:, 0]] == graph.layer[pairs[:, 1]])
        pairs = pairs[~beside]
    scores = random.choice([np.nan, 0.0, -0.0, 1e-300, -5e9, 0.1, *random.normal(size=9)], (2, len(pairs)))
    columns = sort_edges(pairs[:, 0], pairs[:, 1], random.choice(list(Gate), len(pairs)).astype(np.uint8),
                         random.integers(0, 2 * max(Provenance), len(pairs)).astype(np.uint8), *scores)
    return Circuit(draw(st.text(max_size=5)), graph, *columns, faithfulness=draw(st.none() | st.floats(-2, 2)))


def edges(circuit: Circuit) -> dict[str, tuple[str, str]]:
    """Gate and provenance of every edge, by names."""
    name = circuit.graph.name
    return {f"{name(u)}->{name(v)}": (Gate(g).name, Provenance(p).name) for u, v, g, p in
            zip(circuit.src, circuit.dst, circuit.gate, circuit.provenance, strict=True)}


def scores(circuit: Circuit, column: str) -> dict[str, float]:
    """The scores of the edges that have one."""
    name = circuit.graph.name
    return {f"{name(u)}->{name(v)}": s for u, v, s in
            zip(circuit.src, circuit.dst, getattr(circuit, column).tolist(), strict=True) if not math.isnan(s)}


def equal(one: Circuit, other: Circuit) -> None:
    assert (one.name, one.graph, one.faithfulness) == (other.name, other.graph, other.faithfulness)
    for column in ("src", "dst", "gate", "provenance", "ns", "dn"):
        a, b = getattr(one, column), getattr(other, column)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def put(tmp_path, content) -> str:
    path = tmp_path / "edges.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def eap_ig_graph(cfg: dict) -> dict[str, set[str]]:
    """Oracle: the names that EAP-IG gives nodes and edges of a model; its ``from_json`` fails on any other."""
    order = [["input"]]
    for layer in range(cfg["n_layers"]):
        order += [[f"a{layer}.h{h}" for h in range(cfg["n_heads"])], [f"m{layer}"]]
    found, before = set(), []
    for i, step in enumerate(order):
        seen = before[:-cfg["n_heads"]] if cfg["parallel_attn_mlp"] and step[0][0] == "m" else before
        for node in step if i else []:
            parts = ("<q>", "<k>", "<v>") if node[0] == "a" else ("",)
            found |= {f"{u}->{node}{part}" for u in seen for part in parts}
        before = before + step
    return {"nodes": {*before, "logits"}, "edges": found | {f"{u}->logits" for u in before}}


# EAP-IG, written


@given(circuits())
def test_what_is_written_for_eap_ig_comes_back_the_same(tmp_path_factory, circuit):
    path = tmp_path_factory.mktemp("eap") / "c.json"
    write_eap_ig(path, circuit)
    equal(read_eap_ig(path, circuit.graph), circuit)


@given(circuits())
def test_eap_ig_finds_what_it_needs(tmp_path_factory, circuit):
    """EAP-IG's reader needs cfg, a flag per node, and a score and a flag per edge, under names it knows."""
    path = tmp_path_factory.mktemp("eap") / "c.json"
    write_eap_ig(path, circuit, d_model=8)
    data = json.loads(path.read_text())
    graph = circuit.graph
    assert data["cfg"] == {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel,
                           "d_model": 8}
    known = eap_ig_graph(data["cfg"])
    assert set(data["nodes"]) == known["nodes"]
    assert all(type(node["in_graph"]) is bool for node in data["nodes"].values())
    assert set(data["edges"]) <= known["edges"]
    assert all(type(edge["score"]) is float and edge["in_graph"] is True for edge in data["edges"].values())


@given(circuits())
def test_without_its_own_part_a_file_still_gives_the_same_edges(tmp_path_factory, circuit):
    """The part that EAP-IG reads has the edges between writers and readers, and the mean of their scores."""
    graph = circuit.graph
    between = np.isin(circuit.src, graph.writers) & np.isin(circuit.dst, graph.readers)
    if graph.neurons or not between.any():
        return
    path = tmp_path_factory.mktemp("eap") / "c.json"
    write_eap_ig(path, circuit)
    data = json.loads(path.read_text())
    del data["clue"]
    path.write_text(json.dumps(data))
    again = read_eap_ig(path, graph)
    scored = again.provenance != Provenance.STRUCTURAL
    np.testing.assert_array_equal(again.src[scored], circuit.src[between])
    np.testing.assert_array_equal(again.dst[scored], circuit.dst[between])
    ns, dn = circuit.ns[between], circuit.dn[between]
    expected = [-d if math.isnan(n) else n if math.isnan(d) else (n - d) / 2 for n, d in zip(ns, dn, strict=True)]
    np.testing.assert_allclose(again.ns[scored], expected, rtol=1e-12)


def test_a_group_is_spread_over_its_query_heads(tmp_path):
    """embed -> a1.g1<v>: heads 2 and 3 of four share group 1, and half of the score each."""
    src, dst = GROUPED.embed, GROUPED.node(NodeKind.V, 1, 1)
    circuit = Circuit("x", GROUPED, *(np.array([value], np.int32) for value in (src, dst)),
                      np.array([Gate.AND], np.uint8), np.array([Provenance.NOISING], np.uint8), np.array([-3.0]),
                      np.array([1.0]))
    write_eap_ig(tmp_path / "c.json", circuit)
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["edges"] == {"input->a1.h2<v>": {"score": -1.0, "in_graph": True},
                             "input->a1.h3<v>": {"score": -1.0, "in_graph": True}}
    assert [name for name, node in data["nodes"].items() if node["in_graph"]] == ["input", "logits"]
    assert data["clue"]["edges"] == [["embed", "a1.g1<v>", "AND", "NOISING", -3.0, 1.0]]


def test_a_parallel_model_has_no_edge_from_a_head_to_the_mlp_beside_it(tmp_path):
    parallel = replace(PLAIN, parallel=True)

    def one(graph: Graph, src: int, dst: int) -> Circuit:
        return Circuit("x", graph, np.array([src], np.int32), np.array([dst], np.int32), np.zeros(1, np.uint8),
                       np.ones(1, np.uint8), np.zeros(1), np.zeros(1))

    head = PLAIN.node(NodeKind.HEAD, 0, 1)
    with pytest.raises(CircuitError, match=r"circuit x: edge a0\.h1 -> m0 does not exist in a model whose attention"):
        one(parallel, head, PLAIN.mlp_reader(0))
    circuit = one(parallel, head, PLAIN.mlp_reader(1))
    write_eap_ig(tmp_path / "c.json", circuit)
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["cfg"]["parallel_attn_mlp"] is True
    assert set(data["edges"]) <= eap_ig_graph(data["cfg"])["edges"]
    assert read_eap_ig(tmp_path / "c.json", parallel).src.tolist() == [head]
    with pytest.raises(CircuitError, match="parallel_attn_mlp is true, the graph has false: read it into the graph"):
        read_eap_ig(tmp_path / "c.json", PLAIN)
    assert len(read_edge_pruning(put(tmp_path, '[["a0.h1", "m0"]]'), PLAIN)) == 1
    with pytest.raises(CircuitError, match=r"record 1: a0\.h1 -> m0 does not exist in a model whose attention and MLP"):
        read_edge_pruning(put(tmp_path, '[["a0.h1", "m0"]]'), parallel)


# EAP-IG, read

EAP_IG = """{"cfg": {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": false, "d_model": 2},
 "nodes": {"input": {"in_graph": true, "score": NaN, "neurons": [true, false], "neurons_scores": [NaN, NaN]},
           "a0.h0": {"in_graph": false}, "a0.h3": {"in_graph": true}, "m0": {"in_graph": true},
           "logits": {"in_graph": true}},
 "edges": {"input->a0.h0<q>": {"score": 9.0, "in_graph": false},
           "input->a0.h3<q>": {"score": 0.5, "in_graph": true},
           "input->a0.h2<k>": {"score": 0.25, "in_graph": false},
           "input->a0.h3<k>": {"score": 1.0, "in_graph": true},
           "input->a0.h0<v>": {"score": -7.0, "in_graph": false},
           "a0.h3->m0": {"score": -2, "in_graph": true},
           "m0->logits": {"score": 3.5, "in_graph": true},
           "m0->a1.h0<k>": {"score": NaN, "in_graph": true}}}"""


def test_a_file_of_eap_ig(tmp_path):
    """Golden: one score, no gates; a group has the edges and the sum of its heads; heads are wired inside."""
    path = put(tmp_path, EAP_IG)
    circuit = read_eap_ig(path, GROUPED)
    assert circuit.name == "edges"
    unknown, inside = ("ADDER", "UNKNOWN"), ("AND", "STRUCTURAL")
    assert edges(circuit) == {"embed->a0.h3<q>": unknown, "embed->a0.g1<k>": unknown, "a0.h3->m0": unknown,
                              "m0->logits": unknown, "m0->a1.g0<k>": unknown, "a0.h3<q>->a0.h3": inside,
                              "a0.g1<k>->a0.h3": inside}
    assert scores(circuit, "ns") == {"embed->a0.h3<q>": 0.5, "embed->a0.g1<k>": 1.25, "a0.h3->m0": -2.0,
                                     "m0->logits": 3.5}
    assert scores(circuit, "dn") == {}
    order = list(zip(circuit.dst.tolist(), circuit.src.tolist(), strict=True))
    assert order == sorted(order)
    noising = read_eap_ig(path, GROUPED, name="people", direction=Direction.NOISING)
    assert noising.name == "people"
    assert set(edges(noising).values()) == {("ADDER", "NOISING"), inside}
    assert scores(noising, "ns") == scores(circuit, "ns")
    denoising = read_eap_ig(path, GROUPED, direction=Direction.DENOISING)
    assert set(edges(denoising).values()) == {("ADDER", "DENOISING"), inside}
    assert (scores(denoising, "ns"), scores(denoising, "dn")) == ({}, scores(circuit, "ns"))
    with pytest.raises(CircuitError, match=r"direction = 'noising' is not one of Direction\.NOISING, Direction\.DENOISING"):
        read_eap_ig(path, GROUPED, direction="noising")


def test_a_file_of_an_older_eap_ig(tmp_path):
    """Golden: nodes were plain flags and scores could be null."""
    path = put(tmp_path, '{"cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": false}, "nodes": {"input": true},'
                         ' "edges": {"input->logits": {"score": null, "in_graph": true}}}')
    circuit = read_eap_ig(path, PLAIN)
    assert edges(circuit) == {"embed->logits": ("ADDER", "UNKNOWN")}
    assert scores(circuit, "ns") == {}
    write_eap_ig(path, circuit)
    equal(read_eap_ig(path, PLAIN), circuit)


def eap_ig(changes: dict | None = None, **edge) -> dict:
    data = json.loads(EAP_IG) | (changes or {})
    return data | {"edges": data["edges"] | edge}


@pytest.mark.parametrize(("content", "message"), [
    (EAP_IG[:200], r"edges\.json is not JSON, or is cut short \(.*line 3.*\): write it again"),
    ("", r"not JSON, or is cut short"),
    ("[" * 100_000, r"not JSON, or is cut short"),
    ("[1]", r"edges\.json must be a JSON object, not \[1\]: take"),
    ("{}", r"edges\.json has no 'cfg': take"),
    (eap_ig({"cfg": 3}), r"cfg must be a JSON object, not 3: take"),
    (eap_ig({"cfg": {"n_layers": 2}}), r"cfg has no 'n_heads'"),
    (eap_ig({"cfg": {"n_layers": 2, "n_heads": 8}}), r"cfg: n_heads is 8, the graph has 4: read it into the graph of"),
    (eap_ig({"cfg": {"n_layers": "2", "n_heads": 4}}), r"cfg: n_layers is '2', the graph has 2: read it into"),
    (eap_ig({"nodes": []}), r"nodes must be a JSON object"),
    ('{"cfg": {"n_layers": 2, "n_heads": 4}, "nodes": {}, "edges": [1]}', r"edges must be a JSON object"),
    (EAP_IG.replace("input->a0.h3<q>", "input->a0.h0<q>"), r"edges\.json: 'input->a0\.h0<q>' is there twice: keep one"),
    (eap_ig(**{"input->m1": {"score": "1", "in_graph": True}}), r"edge 'input->m1' must have a number 'score' and"),
    (eap_ig(**{"input->m1": {"score": 1, "in_graph": 1}}), r"edge 'input->m1' must have .* true or false 'in_graph'"),
    (eap_ig(**{"input->m1": {"in_graph": True}}), r"edge 'input->m1' must have a number 'score'"),
    (eap_ig(**{"input->m1": {"score": 10**400, "in_graph": True}}), r"edge 'input->m1' must have a number 'score'"),
    (eap_ig(**{"input->m1": True}), r"edge 'input->m1' must have a number 'score'.*not true"),
    (eap_ig(**{"input": {"score": 1, "in_graph": True}}), r"edge 'input' is not of the form source->target: rename"),
    (eap_ig(**{"input->m2": {"score": 1, "in_graph": True}}), r"edge 'input->m2': 'm2' is not in a model of 2 layers"),
    (eap_ig(**{"a0.h4->m1": {"score": 1, "in_graph": False}}), r"'a0\.h4' is not in a model of .* 4 heads"),
    (eap_ig(**{"input->a1.h0": {"score": 1, "in_graph": True}}), r"'a1\.h0' cannot end an edge: name one like a0\.h0<"),
    (eap_ig(**{"logits->m1": {"score": 1, "in_graph": True}}), r"'logits' cannot start an edge"),
    (eap_ig(**{"embed->m1": {"score": 1, "in_graph": True}}), r"'embed' is not the name of a node: name .*input"),
    (eap_ig(**{"m1->a1.h0<q>": {"score": 1, "in_graph": True}}), r"'m1->a1\.h0<q>': m1 -> a1\.h0<q> runs backwards"),
    (EAP_IG.replace("true}", "false}"), r"no edge has in_graph set: choose edges"),
])
def test_a_bad_file_of_eap_ig_is_an_error_with_a_remedy(tmp_path, content, message):
    with pytest.raises(CircuitError, match=message) as error:
        read_eap_ig(put(tmp_path, content), GROUPED)
    assert str(tmp_path) in str(error.value)


def own(tmp_path, change) -> str:
    """A file that CLUE wrote of embed -> m0 -> logits, changed."""
    src, dst = np.array([0, PLAIN.mlp_reader(0)], np.int32), np.array([PLAIN.mlp_reader(0), PLAIN.logits], np.int32)
    write_eap_ig(tmp_path / "c.json", Circuit("x", PLAIN, src, dst, np.zeros(2, np.uint8), np.ones(2, np.uint8),
                                              np.ones(2), np.ones(2)))
    data = json.loads((tmp_path / "c.json").read_text())
    assert edges(read_eap_ig(put(tmp_path, data), PLAIN)) == {"embed->m0": ("AND", "NOISING"),
                                                              "m0->logits": ("AND", "NOISING")}
    change(data)
    return put(tmp_path, data)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.update(clue=[]), r"clue must be a JSON object, not \[\]: write the file again, or remove"),
    (lambda d: d["clue"].pop("graph"), r"clue has no 'graph'"),
    (lambda d: d["clue"].update(format=9), r"clue: format 9 is not 1: read it with the CLUE that wrote it, or remove"),
    (lambda d: d["clue"]["graph"].update(neurons=True), r"clue: neurons is true, the graph has false: read it into"),
    (lambda d: d["clue"].update(faithfulness="1"), r"clue: faithfulness '1' is no number: write the file again"),
    (lambda d: d["clue"].update(name=1), r"clue: 'name' must be a string"),
    (lambda d: d["clue"].update(edges={}), r"'edges' a list"),
    (lambda d: d["clue"]["edges"][1].pop(), r"clue: edge 2 is .*, not \[source, target, gate"),
    (lambda d: d["clue"]["edges"][1].__setitem__(0, "m7"), r"clue: edge 2: 'm7' is not in a model"),
    (lambda d: d["clue"]["edges"][1].__setitem__(1, "embed"), r"clue: edge 2: m0 -> embed runs backwards"),
    (lambda d: d["clue"]["edges"][1].__setitem__(2, "NOR"), r"clue: edge 2: gate 'NOR' is none of AND, OR, ADDER"),
    (lambda d: d["clue"]["edges"][1].__setitem__(3, 4), r"clue: edge 2: provenance 4 is none of UNKNOWN, NOISING"),
    (lambda d: d["clue"]["edges"][1].__setitem__(5, "1"), r"clue: edge 2 has a score '1' that is no number: write"),
    (lambda d: d["clue"]["edges"].append(d["clue"]["edges"][0]), r"clue: edge 3: embed -> m0 repeats number 1: remove"),
    (lambda d: d["clue"]["edges"].pop(), r"edge 'm0->logits' is in the circuit by in_graph and not by the key 'clue'"),
    (lambda d: d["edges"]["m0->logits"].update(in_graph=False), r"by the key 'clue' and not by in_graph: write"),
])
def test_a_damaged_part_of_our_own_is_an_error_with_a_remedy(tmp_path, change, message):
    with pytest.raises(CircuitError, match=message):
        read_eap_ig(own(tmp_path, change), PLAIN)


def test_a_part_of_our_own_without_faithfulness_is_still_read(tmp_path):
    assert read_eap_ig(own(tmp_path, lambda d: d["clue"].pop("faithfulness")), PLAIN).faithfulness is None


# Edge-Pruning


def test_a_file_of_edge_pruning_for_gpt2(tmp_path):
    """Golden: two embeddings that are one node here, heads by number, resid_post for the output."""
    path = put(tmp_path, '[["tok_embeds", "a0.h1.q"], ["pos_embeds", "a0.h1.q"], ["pos_embeds", "a0.h1.k"],'
                         ' ["a0.h1", "m0"], ["m0", "a1.h0.v"], ["a0.h1", "resid_post"], ["m1", "resid_post"]]')
    circuit = read_edge_pruning(path, PLAIN)
    unknown, inside = ("ADDER", "UNKNOWN"), ("AND", "STRUCTURAL")
    assert edges(circuit) == {"embed->a0.h1<q>": unknown, "embed->a0.g1<k>": unknown, "a0.h1->m0": unknown,
                              "m0->a1.g0<v>": unknown, "a0.h1->logits": unknown, "m1->logits": unknown,
                              "a0.h1<q>->a0.h1": inside, "a0.g1<k>->a0.h1": inside}
    assert scores(circuit, "ns") == scores(circuit, "dn") == {}
    for direction in Direction:
        found = read_edge_pruning(path, PLAIN, direction=direction, name="x")
        assert set(edges(found).values()) == {("ADDER", direction.name), inside}
        assert found.name == "x"


def test_a_file_of_edge_pruning_for_llama(tmp_path):
    """Golden: one embedding, and k and v counted by group: head 3 of four is fed by group 1 of two."""
    path = put(tmp_path, '[["embeds", "a0.h3.q"], ["embeds", "a0.h1.k"], ["embeds", "a0.h0.v"],'
                         ' ["a0.h3", "resid_post"]]')
    assert edges(read_edge_pruning(path, GROUPED)) == {
        "embed->a0.h3<q>": ("ADDER", "UNKNOWN"), "embed->a0.g1<k>": ("ADDER", "UNKNOWN"),
        "embed->a0.g0<v>": ("ADDER", "UNKNOWN"), "a0.h3->logits": ("ADDER", "UNKNOWN"),
        "a0.h3<q>->a0.h3": ("AND", "STRUCTURAL"), "a0.g1<k>->a0.h3": ("AND", "STRUCTURAL")}


@pytest.mark.parametrize(("content", "message"), [
    ('[["embeds", "m0"], ["em', r"edges\.json is not JSON, or is cut short"),
    ({"a": 1}, r"must be a JSON list of \[source, target\], not \{\"a\": 1\}: check"),
    ([], r"edges\.json has no edges: raise"),
    ([["embeds", "m0"], ["embeds"]], r"record 2 is \[\"embeds\"\], not \[source, target\]: check"),
    ([["embeds", "m0"], "embeds"], r"record 2 is 'embeds', not \[source, target\]"),
    ([["embeds", "m0"], ["embeds", 3]], r"record 2: 3 is not the name of a node, which is a string"),
    ([["embeds", "m0"], [["embeds"], "m0"]], r"record 2: \[\"embeds\"\] is not the name of a node"),
    ([["input", "m0"]], r"record 1: 'input' is not the name of a node: name one like a0\.h0, embeds, m0, pos_embeds"),
    ([["embeds", "m2"]], r"record 1: 'm2' is not in a model of 2 layers, 4 heads and 2 key/value groups: read it into"),
    ([["embeds", "a0.h2.k"]], r"record 1: 'a0\.h2\.k' is not in a model of"),
    ([["a0.h1.q", "m0"]], r"record 1: 'a0\.h1\.q' cannot start an edge: name one like"),
    ([["embeds", "a0.h1"]], r"record 1: 'a0\.h1' cannot end an edge: name one like a0\.h0\.k, a0\.h0\.q, a0"),
    ([["embeds", "m0"], ["m0", "a0.h1.q"]], r"record 2: m0 -> a0\.h1<q> runs backwards: an edge goes from a writer to"),
    ([["m1", "m1"]], r"record 1: m1 -> m1 runs backwards"),
    ([["embeds", "m0"], ["embeds", "m1"], ["embeds", "m0"]], r"record 3: embeds -> m0 repeats number 1: remove one"),
])
def test_a_bad_list_of_edges_is_an_error_with_a_remedy(tmp_path, content, message):
    with pytest.raises(CircuitError, match=message) as error:
        read_edge_pruning(put(tmp_path, content), GROUPED)
    assert str(tmp_path) in str(error.value)


# The CLUE release


def test_a_file_of_the_release(tmp_path):
    """Golden: gates tell provenance, except ADDER; the wiring of heads and tied dead ends are not read."""
    path = put(tmp_path, """[
        ["embeds", "a0.h3.q", "AND"], ["embeds", "a0.H1.k", "ADDER"], ["embeds", "a0.H0.v", "OR"],
        ["a0.h3.q", "a0.h3.o", "ADDER"], ["a0.H1.k", "a0.h1.o", "ADDER"], ["a0.H0.v", "resid_post", "ADDER"],
        ["a0.h3.o", "m0", "OR"], ["m0", "resid_post", "ADDER"], ["tok_embeds", "a1.H0.k", "AND"],
        ["m0", "a1.H1.v", "AND"], ["m0", "a1.H1.v", "OR"], ["m0", "a1.H1.k", "AND"], ["m0", "a1.h1.k", "ADDER"]]""")
    circuit = read_logical_edges(path, GROUPED, name="people")
    assert circuit.name == "people"
    assert edges(circuit) == {
        "embed->a0.h3<q>": ("AND", "NOISING"), "embed->a0.g1<k>": ("ADDER", "UNKNOWN"),
        "embed->a0.g0<v>": ("OR", "DENOISING"), "a0.h3->m0": ("OR", "DENOISING"), "m0->logits": ("ADDER", "UNKNOWN"),
        "embed->a1.g0<k>": ("AND", "NOISING"), "m0->a1.g1<v>": ("ADDER", "BOTH"), "m0->a1.g1<k>": ("ADDER", "NOISING"),
        "a0.h3<q>->a0.h3": ("AND", "STRUCTURAL"), "a0.g1<k>->a0.h3": ("AND", "STRUCTURAL")}
    assert scores(circuit, "ns") == scores(circuit, "dn") == {}
    assert set(np.flatnonzero(assign([circuit], [circuit]).role == Role.CONFLICT).tolist()) <= set(circuit.src.tolist())


@pytest.mark.parametrize(("content", "message"), [
    ({}, r"must be a JSON list of \[source, target, gate\], not \{\}"),
    ([["embeds", "m0"]], r"record 1 is \[\"embeds\", \"m0\"\], not \[source, target, gate\]"),
    ([["embeds", "m0", "XOR"]], r"record 1: gate 'XOR' is none of AND, OR, ADDER: correct it"),
    ([["embeds", "m0", 0]], r"record 1: gate 0 is none of"),
    ([["a0.h1", "m0", "AND"]], r"record 1: 'a0\.h1' is not the name of a node: name one like .*a0\.h0\.o"),
    ([["a0.H2.k", "a0.h3.o", "AND"]], r"record 1: 'a0\.H2\.k' is not in a model"),
    ([["embeds", "m0", "AND"], ["embeds", "a0.h1.o", "OR"]], r"record 2: a q, k or v feeds a head of its layer only"),
    ([["a0.h1.q", "m0", "OR"]], r"record 1: a q, k or v feeds a head of its layer only.*remove the record"),
    ([["a0.h1.q", "a1.h1.o", "OR"]], r"record 1: a q, k or v feeds a head of its layer only"),
    ([["a0.h1.q", "a0.h1.o", "OR"]], r"edges\.json: no record is an edge between a writer and a later reader: take"),
    ([["a0.h1.q", "a0.h1.o", "OR"], ["m0", "a0.h1.q", "OR"]], r"record 2: m0 -> a0\.h1<q> runs backwards"),
    ([["embeds", "m0", "OR"], ["embeds", "m0", "AND"], ["embeds", "m0", "OR"]], r"record 3: .* repeats number 1"),
])
def test_a_bad_list_of_logical_edges_is_an_error_with_a_remedy(tmp_path, content, message):
    with pytest.raises(CircuitError, match=message):
        read_logical_edges(put(tmp_path, content), GROUPED)


@pytest.mark.parametrize("read", [read_eap_ig, read_edge_pruning, read_logical_edges])
def test_what_no_reader_can_do(tmp_path, read):
    with pytest.raises(CircuitError, match=r"none\.json does not exist: check the path"):
        read(tmp_path / "none.json", PLAIN)
    with pytest.raises(CircuitError, match=r"cannot be read \(Is a directory\): check the path"):
        read(tmp_path, PLAIN)
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(CircuitError, match=r"latin\.json is not JSON"):
        read(tmp_path / "latin.json", PLAIN)
    rows = [["embeds", "m0", "OR"]] if read is read_logical_edges else [["embeds", "m0"]]
    path = put(tmp_path, EAP_IG if read is read_eap_ig else rows)
    with pytest.raises(CircuitError, match=r"has no hidden neurons as nodes: read it into a graph with neurons=False"):
        read(path, Graph(2, 4, 2, 3, True))


@pytest.mark.timeout(120)
def test_a_quarter_of_a_million_edges(tmp_path):
    """Every edge of a 24-layer model, in and out: linear, so seconds."""
    graph = Graph(24, 16, 8, 4, False)
    writer = [name if name != "embed" else "embeds" for name in (graph.name(u) for u in graph.writers)]
    reader = [re.sub(r"\.g(\d+)", r".h\1", graph.name(v)).replace("<", ".").rstrip(">") for v in graph.readers]
    reader[-1] = "resid_post"
    pairs = np.argwhere(graph.residual_edges)
    path = put(tmp_path, [[writer[u], reader[v]] for u, v in pairs.tolist()])
    circuit = read_edge_pruning(path, graph)
    assert circuit.counts()["adder"] == len(pairs) > 150_000
    assert circuit.counts()["structural"] == 3 * graph.n_layers * graph.n_heads
    write_eap_ig(path, circuit)
    equal(read_eap_ig(path, graph, name=circuit.name), circuit)



def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_eap_ig(path, Circuit("x", PLAIN, *np.zeros((2, 0), np.int32), *np.zeros((2, 0), np.uint8), *np.zeros((2, 0))))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

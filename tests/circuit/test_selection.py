"""From scores to circuits: gates, provenance, paths only, one definition of size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.circuit.attribution import Scores
from clue.circuit.graph import Circuit, Graph, on_path
from clue.circuit.selection import build_circuit, top
from clue.config import LocalizeSettings
from clue.errors import CircuitError, ClueError
from clue.types import Gate, NodeKind, Provenance

SMALL = Graph(2, 4, 2, 6, True)


def make_scores(seed: int = 0, graph: Graph = SMALL) -> Scores:
    random = np.random.default_rng(seed)
    edges = [np.where(graph.residual_edges, random.normal(size=graph.residual_edges.shape), 0) for _ in range(2)]
    units = [random.normal(size=(graph.n_layers, graph.d_mlp)) for _ in range(4)]
    return Scores("people", graph, *edges, *units, tokens=1, pairs=1, informative=1, gap_ns=0, gap_dn=0)


@given(st.integers(0, 50), st.sampled_from([0.4, 0.6, 1.0]), st.sampled_from(["block", "neuron"]))
def test_gates_say_which_direction_found_the_edge(seed, share, granularity):
    scores = make_scores(seed)
    circuit = build_circuit(scores, LocalizeSettings(edges=share, neurons=share, granularity=granularity))
    graph = circuit.graph
    count = round(share * int(graph.residual_edges.sum()))
    found = [top(array, graph.residual_edges, count) for array in (scores.ns, scores.dn)]
    assert found[0].sum() == found[1].sum() == count  # both directions are cut to the same size
    writer = {int(node): i for i, node in enumerate(graph.writers)}
    reader = {int(node): i for i, node in enumerate(graph.readers)}
    for src, dst, gate, why in zip(circuit.src, circuit.dst, circuit.gate, circuit.provenance, strict=True):
        if why == Provenance.STRUCTURAL or graph.kind[src] == NodeKind.NEURON:
            continue
        by = [bool(mask[writer[int(src)], reader[int(dst)]]) for mask in found]
        assert (Gate(gate), Provenance(why)) == {(True, False): (Gate.AND, Provenance.NOISING),
                                                 (False, True): (Gate.OR, Provenance.DENOISING),
                                                 (True, True): (Gate.ADDER, Provenance.BOTH)}[tuple(by)]


@given(st.integers(0, 50), st.sampled_from([0.05, 0.2, 0.6]), st.sampled_from(["block", "neuron"]))
def test_every_edge_is_on_a_path_and_none_is_invented(seed, share, granularity):
    """Golden: no dead ends, none tied to the output by an edge that no direction found."""
    scores = make_scores(seed)
    try:
        circuit = build_circuit(scores, LocalizeSettings(edges=share, neurons=share, granularity=granularity))
    except CircuitError:
        return
    graph = circuit.graph
    forward, backward = {graph.embed}, {graph.logits}
    for src, dst in sorted(zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True)):
        if src in forward:
            forward.add(dst)
    for src, dst in sorted(zip(circuit.src.tolist(), circuit.dst.tolist(), strict=True), key=lambda e: -e[1]):
        if dst in backward:
            backward.add(src)
    assert set(circuit.src.tolist()) <= forward
    assert set(circuit.dst.tolist()) <= backward
    residual = {(int(u), int(v)) for i, u in enumerate(graph.writers) for j, v in enumerate(graph.readers)
                if graph.residual_edges[i, j]}
    for src, dst, why in zip(circuit.src.tolist(), circuit.dst.tolist(), circuit.provenance, strict=True):
        inside = graph.layer[src] == graph.layer[dst] and (src, dst) not in residual
        assert inside or (src, dst) in residual
        if why == Provenance.STRUCTURAL:
            assert inside
    structural = circuit.provenance == Provenance.STRUCTURAL
    assert set(circuit.gate[structural].tolist()) <= {Gate.AND}  # whatever a head or MLP is made of has to work
    assert np.isnan(circuit.ns[structural]).all() and np.isnan(circuit.dn[structural]).all()


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_neurons_of_an_mlp_wired_at_one_end_take_no_share(end):
    """Of a quarter of the neurons, two, none is spent on the strongest ones, whose MLP leads nowhere."""
    graph = Graph(2, 1, 1, 4, True)
    alive = 0 if end == "reader" else 1  # m1 is read and not written, or m0 is written and not read
    mlp_in, mlp = graph.mlp_reader(alive), graph.node(NodeKind.MLP, alive)
    edges = np.zeros(graph.residual_edges.shape)
    readers, writers = graph.readers.tolist(), graph.writers.tolist()
    other = (0, readers.index(graph.mlp_reader(1))) if end == "reader" else (writers.index(graph.node(NodeKind.MLP, 0)), -1)
    for u, v in ((0, readers.index(mlp_in)), (writers.index(mlp), -1), other):
        edges[u, v] = 1.0
    units = np.array([[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]])[::1 if alive == 0 else -1]
    scores = Scores("people", graph, edges, edges, units, units, units, units, tokens=1, pairs=1, informative=1, gap_ns=0,
                    gap_dn=0)
    for share, kept in ((0.25, 2), (1e-6, 1)):  # and never fewer than one
        circuit = build_circuit(scores, LocalizeSettings(edges=3 / graph.residual_edges.sum(), neurons=share))
        found = circuit.src[graph.kind[circuit.src] == NodeKind.NEURON]
        assert [graph.name(node) for node in found] == [f"m{alive}.n{i}" for i in range(kept)]


def test_a_lone_gate_keeps_its_label():
    """Golden: an AND or OR edge alone in its group is a one-input gate, not an ADDER."""
    graph = Graph(1, 1, 1, 2, False)
    ns, dn = np.zeros(graph.residual_edges.shape), np.zeros(graph.residual_edges.shape)
    ns[0, list(graph.readers).index(graph.mlp_reader(0))] = 1.0  # embed -> m0 by Ns alone
    dn[2, -1] = 1.0  # m0 -> logits by Dn alone
    scores = Scores("people", Graph(1, 1, 1, 2, True), ns, dn, *(np.zeros((1, 2)) for _ in range(4)), tokens=1, pairs=1,
                    informative=1, gap_ns=0, gap_dn=0)
    circuit = build_circuit(scores, LocalizeSettings(edges=0.01, granularity="block"))
    assert [(graph.name(s), graph.name(d), Gate(g)) for s, d, g in
            zip(circuit.src, circuit.dst, circuit.gate, strict=True)] == [("embed", "m0", Gate.AND),
                                                                          ("m0", "logits", Gate.OR)]


def test_size_is_the_share_of_all_edges_counted_once():
    """Golden: one definition of sparsity, and the threshold is global: layer 0 does not set it."""
    scores = make_scores(3, Graph(3, 4, 4, 6, True))
    allowed = scores.graph.residual_edges
    for share in (0.1, 0.5, 1.0):
        count = round(share * int(allowed.sum()))
        mask = top(scores.ns, allowed, count)
        assert mask.sum() == count
        assert not (mask & ~allowed).any()
        assert np.abs(scores.ns[mask]).min() >= np.abs(scores.ns[allowed & ~mask]).max(initial=0)


def test_ties_go_to_the_lower_index_and_noise_in_the_last_bits_does_not_decide():
    allowed = np.ones((1, 4), dtype=bool)
    scores = np.array([[1.0, 0.5, 0.5 + 1e-12, 0.0]])
    for scale in (1.0, 1e-12, 1e12):
        assert top(scale * scores, allowed, 2).tolist() == [[True, True, False, False]]
    assert top(scores * [1, 1, 1 + 1e-6, 1], allowed, 2).tolist() == [[True, False, True, False]]
    assert top(scores, allowed, 4).tolist() == [[True, True, True, False]]  # a zero score is no evidence


@given(st.integers(0, 50), st.sampled_from(["block", "neuron"]))
def test_too_few_edges_become_as_many_as_a_path_needs(seed, granularity):
    scores = make_scores(seed)
    graph = scores.graph
    available = int(graph.residual_edges.sum())
    circuit = build_circuit(scores, LocalizeSettings(edges=1e-6, neurons=1.0, granularity=granularity))
    assert on_path(graph.n_nodes, circuit.src, circuit.dst, 0, circuit.graph.logits).all()
    # It is the circuit of some count, and of no larger one than the first that has a path.
    sizes = []
    for count in range(1, available + 1):
        again = build_circuit(scores, LocalizeSettings(edges=count / available, neurons=1.0, granularity=granularity))
        sizes.append(len(again))
        if len(again) != len(circuit):
            break
    assert sizes[0] == len(circuit)  # asking for one edge is asking for the first path
    assert len(sizes) > 1


def test_scores_without_a_path_are_an_error_with_a_remedy():
    graph = Graph(2, 2, 2, 2, True)
    ns = np.zeros(graph.residual_edges.shape)
    ns[1, -1] = 1.0  # only a head -> logits: nothing reaches the head
    scores = Scores("people", graph, ns, ns, *(np.zeros((2, 2)) for _ in range(4)), tokens=1, pairs=1, informative=1,
                    gap_ns=0, gap_dn=0)
    with pytest.raises(CircuitError, match="people: no edges with a score lie on a path.*give more pairs"):
        build_circuit(scores, LocalizeSettings(edges=0.01, neurons=0.01))


@pytest.mark.parametrize(("settings", "name"), [
    (LocalizeSettings(neurons=0.1), "edges"), (LocalizeSettings(edges=0.1), "neurons"),
    (LocalizeSettings(faithfulness=0.5), "neurons")])
def test_a_size_left_open_is_an_error_with_a_remedy(settings, name):
    with pytest.raises(CircuitError, match=f"{name} = 0 leaves the size open.*clue.size.sized"):
        build_circuit(make_scores(0), settings, faithful=lambda circuit: 1.0)


@given(st.integers(0, 50), st.integers(1, 80))
def test_the_least_number_of_edges_that_is_faithful_enough(seed, enough):
    """Where faithfulness grows with the edges, bisection finds the least number that reaches the target."""
    scores = make_scores(seed)
    settings = LocalizeSettings(faithfulness=0.5, neurons=1.0, granularity="block")
    available = int(scores.graph.residual_edges.sum())
    circuit = build_circuit(scores, settings, faithful=lambda circuit: 0.5 if len(circuit) >= enough else 0.4)
    assert circuit.faithfulness == 0.5
    sizes = []
    for count in range(1, available + 1):
        sizes.append(build_circuit(scores, replace(settings, faithfulness=0.0, edges=count / available)))
        if len(sizes[-1]) == len(circuit):
            break
    assert len(circuit) >= enough
    assert len(sizes) == 1 or len(sizes[-2]) < enough


@pytest.mark.parametrize("granularity", ["block", "neuron"])
def test_a_target_that_all_edges_miss_and_fewer_reach(granularity):
    scores = make_scores(0)
    settings = LocalizeSettings(faithfulness=0.5, neurons=0.5, granularity=granularity)
    available = int(scores.graph.residual_edges.sum())
    sizes = [len(build_circuit(scores, replace(settings, faithfulness=0.0, edges=count / available)))
             for count in range(1, available + 1)]
    few, most = sizes[available // 4], sizes[available // 2]
    circuit = build_circuit(scores, settings, faithful=lambda circuit: 0.6 if few <= len(circuit) <= most else 0.4)
    assert circuit.faithfulness == 0.6
    assert len(circuit) == next(size for size in sizes if size >= few)
    reached = iter(range(100))
    with pytest.raises(CircuitError, match=r"of \d+ numbers of edges the best, \d+ of \d+, reaches a faithfulness of 0\.4"):
        build_circuit(scores, settings, faithful=lambda circuit: 0.4 - next(reached) / 1000)


def test_the_bisection_begins_above_the_numbers_that_missed():
    scores, asked = make_scores(0), []
    available = int(scores.graph.residual_edges.sum())
    settings = LocalizeSettings(faithfulness=0.5, granularity="block")
    sizes = [len(build_circuit(scores, replace(settings, faithfulness=0.0, edges=count / available)))
             for count in range(1, available + 1)]

    def faithful(circuit: Circuit) -> float:
        asked.append(len(circuit))
        return 0.6 if sizes[available // 2] <= len(circuit) < sizes[-1] else 0.4

    build_circuit(scores, settings, faithful=faithful)
    first = next(i for i, size in enumerate(asked) if size >= sizes[available // 2] and i > 0)
    assert len(asked) > first + 1 and min(asked[first:]) > asked[first - 1]


def test_a_circuit_without_edges_is_never_the_answer():
    settings = LocalizeSettings(faithfulness=0.5, granularity="block")
    for seed in range(5):
        assert len(build_circuit(make_scores(seed), settings, faithful=lambda circuit: 1.0)) > 0


def test_rounding_does_not_keep_the_whole_model_from_its_target():
    settings = LocalizeSettings(faithfulness=1.0, granularity="block")
    assert build_circuit(make_scores(0), settings, faithful=lambda circuit: 1 - 1e-6).faithfulness == 1 - 1e-6
    with pytest.raises(CircuitError, match=r"faithfulness of 0\.9990, not 1\.0"):
        build_circuit(make_scores(0), settings, faithful=lambda circuit: 0.999)


@pytest.mark.parametrize(("settings", "message"), [
    ({"edges": 1.5}, "edges = 1.5 must lie in"), ({"neurons": -1.0}, "neurons = -1.0 must be finite and not negative"),
    ({"granularity": "head"}, "granularity = 'head' is not one of neuron, block")])
def test_a_setting_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ClueError, match=message):
        build_circuit(make_scores(0), LocalizeSettings(**{"edges": 0.5, "neurons": 0.5} | settings))


def test_circuits_round_trip(tmp_path):
    circuit = build_circuit(make_scores(1), LocalizeSettings(edges=0.5, neurons=0.5))
    circuit.save(tmp_path / "c.safetensors")
    again = Circuit.load(tmp_path / "c.safetensors")
    assert again.name == circuit.name
    assert again.graph == circuit.graph
    for name in ("src", "dst", "gate", "provenance", "ns", "dn"):
        np.testing.assert_array_equal(getattr(again, name), getattr(circuit, name))
    (tmp_path / "c.safetensors").write_bytes(b"junk")
    with pytest.raises(CircuitError, match="not a circuit file"):
        Circuit.load(tmp_path / "c.safetensors")


def test_graphs_saved_before_parallel_models_still_load():
    old = {key: value for key, value in SMALL.to_json().items() if key != "parallel"}
    assert Graph(**old) == SMALL
    parallel = replace(SMALL, parallel=True)
    assert Graph(**parallel.to_json()) == parallel != SMALL


def test_backward_edges_are_refused():
    graph = Graph(1, 1, 1, 2, False)
    with pytest.raises(CircuitError, match=r"m0 -> a0\.h0<q> runs backwards"):
        Circuit("x", graph, np.array([5], dtype=np.int32), np.array([1], dtype=np.int32), np.zeros(1, np.uint8),
                np.ones(1, np.uint8), np.zeros(1), np.zeros(1))


@given(st.data())
def test_on_path_equals_enumeration(data):
    n = data.draw(st.integers(2, 7))
    edges = sorted(data.draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] < e[1]))))
    used: set[tuple[int, int]] = set()
    stack = [(0, [])]
    while stack:
        node, path = stack.pop()
        if node == n - 1:
            used.update(path)
        stack += [(b, [*path, (a, b)]) for a, b in edges if a == node]
    src, dst = (np.array([e[i] for e in edges], dtype=np.int32) for i in range(2))
    kept = on_path(n, src, dst, 0, n - 1)
    assert {e for e, k in zip(edges, kept, strict=True) if k} == used


@pytest.mark.parametrize("neurons", [True, False])
def test_graph_ids_names_and_order(neurons):
    graph = Graph(2, 4, 2, 3, neurons)
    for node in range(graph.n_nodes):
        assert graph.node(NodeKind(graph.kind[node]), int(graph.layer[node]), int(graph.index[node])) == node
    assert len(set(graph.names)) == graph.n_nodes
    assert (graph.names[0], graph.names[-1]) == ("embed", "logits")
    assert graph.residual_edges[0].all()  # embed reaches every reader
    assert graph.residual_edges[:, -1].all()  # every writer reaches the logits
    first_attention = [i for i, r in enumerate(graph.readers) if graph.layer[r] == 0 and graph.kind[r] != NodeKind.MLP
                       and graph.kind[r] != NodeKind.MLP_IN]
    assert graph.residual_edges[1:, first_attention].sum() == 0  # layer 0's attention reads the embedding only
    assert not graph.editable[[graph.embed, graph.logits]].any()

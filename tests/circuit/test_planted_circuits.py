"""Known truth, end to end: two circuits of three layers and four heads, built by hand into a real LlamaForCausalLM.

    forget answer = AND(a, b) + s           retain answer = s + OR(c, d)
    a, b: heads of layer 0 into m0          s: m1 = ADDER of a head of layer 0 (forget) or of two of layer 1 (retain)
    m0 -> a1.h0 -> output                   c: a head of layer 0 -> a2.h0 -> m2; d: a1.h1 -> m2

Every head owns one channel, every gate is an MLP with ReLU units as in the flat models, and the two circuits share m1
alone: whatever forgets must stop it, whatever retains needs it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from clue.circuit.attribution import attribute
from clue.circuit.confirmation import MOST_INPUTS, confirm
from clue.circuit.faithfulness import Part, curve, evaluate_circuit, measure, minimality
from clue.circuit.graph import Circuit
from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.logic import assign
from clue.model.anatomy import Anatomy, anatomy
from clue.types import Gate, NodeKind, Provenance
from tests.circuit.test_attribution import make_pairs
from tests.circuit.test_known_truth import BIG, CONST, blank_model, cleaned
from tests.oracles.attribution import InDouble

pytestmark = pytest.mark.usefixtures("in_double")

FORGET, RETAIN, NOTHING, NO = 0, 1, 2, 3  # tokens; a prompt's answer is its own token, and NO wins without evidence
A, B, S, C, D, S1, S2 = range(1, 8)  # channels of the bits: the first three of FORGET, the others of RETAIN
AND, ADDER, OR = 20, 21, 22  # channels that m0, m1 and m2 write


def head_channel(layer: int, head: int) -> int:
    return 8 + 4 * layer + head


#: (layer, head) -> channel it reads, and what it multiplies it with
HEADS = {(0, 0): (A, 1.0), (0, 1): (B, 1.0), (0, 2): (S, 1.0), (0, 3): (C, 1.0), (1, 0): (AND, 1.0), (1, 1): (D, 1.0),
         (1, 2): (S1, 1.0), (1, 3): (S2, 1.5), (2, 0): (head_channel(0, 3), 1.0)}
#: layer -> heads whose channels its MLP sums up, slope and offset of its unit, output channel and weight there
MLPS = {0: (((0, 0), (0, 1)), 1.0, -1.0, AND, 1.0),
        1: (((0, 2), (1, 2), (1, 3)), 1.0, 0.5, ADDER, 1.0),
        2: (((2, 0), (1, 1)), -1.0, 1.0, OR, -1.0)}
#: what each circuit must be: its edges between writers and readers, and the gate each enters through
PLANTED = {
    "forget": {"embed->a0.g0<v>": Gate.AND, "embed->a0.g1<v>": Gate.AND, "a0.h0->m0": Gate.AND, "a0.h1->m0": Gate.AND,
               "m0->a1.g0<v>": Gate.ADDER, "a1.h0->logits": Gate.ADDER,
               "embed->a0.g2<v>": Gate.ADDER, "a0.h2->m1": Gate.ADDER, "m1->logits": Gate.ADDER},
    "retain": {"embed->a1.g2<v>": Gate.ADDER, "embed->a1.g3<v>": Gate.ADDER, "a1.h2->m1": Gate.ADDER,
               "a1.h3->m1": Gate.ADDER, "m1->logits": Gate.ADDER,
               "embed->a0.g3<v>": Gate.OR, "a0.h3->a2.g0<v>": Gate.OR, "a2.h0->m2": Gate.OR,
               "embed->a1.g1<v>": Gate.OR, "a1.h1->m2": Gate.OR, "m2->logits": Gate.ADDER},
}
PAIRS = {"forget": make_pairs([[FORGET, FORGET]], [[NOTHING, FORGET]], [1]),
         "retain": make_pairs([[RETAIN, RETAIN]], [[NOTHING, RETAIN]], [1])}


@cache
def planted() -> Anatomy:
    model = blank_model(24, layers=3, heads=4, d_head=2, d_mlp=2)
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[FORGET, [A, B, S]] = 1.0
        embed[RETAIN, [C, D, S1, S2]] = 1.0
        for (layer, head), (channel, factor) in HEADS.items():
            attention = model.model.layers[layer].self_attn
            attention.v_proj.weight[2 * head, channel] = factor
            attention.o_proj.weight[head_channel(layer, head), 2 * head] = 1.0
        for layer, (heads, slope, offset, channel, weight) in MLPS.items():
            mlp = model.model.layers[layer].mlp
            for head in heads:
                mlp.gate_proj.weight[0, head_channel(*head)] = slope
            mlp.gate_proj.weight[0, CONST] = offset / BIG
            mlp.up_proj.weight[0, CONST] = 1 / BIG
            mlp.down_proj.weight[channel, 0] = weight
        # Margins over NO: AND + s - 1/2 and s + OR - 1/2 (the OR's unit is 1 - OR, the ADDER's s + 1/2).
        model.lm_head.weight[FORGET, [head_channel(1, 0), ADDER]] = 1.0
        model.lm_head.weight[FORGET, CONST] = -1.0 / BIG
        model.lm_head.weight[RETAIN, [ADDER, OR]] = 1.0
        model.lm_head.weight[NOTHING, CONST] = -9 / BIG
    return anatomy(model)


@cache
def found(name: str, granularity: str) -> Circuit:
    with InDouble():
        scores = cleaned(attribute(planted(), PAIRS[name], name=name))
        scores.neuron_ns[np.abs(scores.neuron_ns) < 1e-4] = 0
        scores.neuron_dn[np.abs(scores.neuron_dn) < 1e-4] = 0
        return build_circuit(scores, LocalizeSettings(edges=1.0, neurons=1.0, granularity=granularity))


def between_blocks(circuit: Circuit) -> dict[str, Gate]:
    """Edges between writers and readers and their gates, under block-level names."""
    graph = circuit.graph
    chosen = np.flatnonzero(np.isin(circuit.src, graph.writers) & np.isin(circuit.dst, graph.readers))
    names = {node: graph.name(node).removesuffix(".in") for node in range(graph.n_nodes)}
    return {f"{names[circuit.src[e]]}->{names[circuit.dst[e]]}": Gate(circuit.gate[e]) for e in chosen.tolist()}


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize("name", PLANTED)
def test_edges_and_gates_are_recovered(name, granularity):
    circuit = found(name, granularity)
    assert between_blocks(circuit) == PLANTED[name]
    if granularity == "neuron":
        units = circuit.graph.kind[circuit.src] == NodeKind.NEURON
        used = {"forget": ["m0.n0", "m1.n0"], "retain": ["m1.n0", "m2.n0"]}[name]
        assert [circuit.graph.name(node) for node in circuit.src[units]] == used


def works(circuit: Circuit, stopped: set[int], adder: Gate) -> bool:
    """Whether the output works: method.md's gates, the ADDER read as AND (all contributions) or as OR (any)."""
    state = {circuit.graph.embed: True}
    for node in np.unique(circuit.dst).tolist():
        into = circuit.dst == node
        groups = []
        for gate in np.unique(circuit.gate[into]).tolist():
            inputs = [state[source] for source in circuit.src[into & (circuit.gate == gate)].tolist()]
            groups.append(any(inputs) if (adder if gate == Gate.ADDER else gate) == Gate.OR else all(inputs))
        state[node] = all(groups) and node not in stopped
    return state[circuit.graph.logits]


@pytest.mark.parametrize("name", PLANTED)
def test_the_truth_table_of_the_logic_is_the_models(name):
    """Under all 2^n ablations of heads and MLPs (each writes what it writes in the corrupted run), the logic says whether
    the answer keeps all of its margin (ADDER as AND) and whether it keeps any of it (ADDER as OR)."""
    circuit, body = found(name, "block"), planted()
    graph = circuit.graph
    # Inside a head the planted circuit uses v alone: its q and k have no input and are left out of the circuit.
    writers = np.flatnonzero(np.isin(graph.writers, np.flatnonzero(circuit.nodes)) & (graph.writers != graph.embed))
    table = [[writer for writer, cut in zip(writers, row, strict=True) if cut]
             for row in product((False, True), repeat=len(writers))]

    def part(i: int) -> Part:
        edges = graph.residual_edges.copy()
        edges[table[i]] = False
        return Part(edges)

    share = measure(body, PAIRS[name], len(table), part).faithfulness()
    assert len(table) == {"forget": 64, "retain": 128}[name]
    stopped = [{int(graph.writers[writer]) for writer in cut} for cut in table]
    assert [works(circuit, nodes, Gate.AND) for nodes in stopped] == (share > 1 - 1e-4).tolist()
    assert [works(circuit, nodes, Gate.OR) for nodes in stopped] == (share > 1e-4).tolist()
    assert 0 < np.mean(share > 1e-4) < 1


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize("semantics", ["support", "authors"])
def test_the_conflict_is_the_shared_node(granularity, semantics):
    forget, retain = found("forget", granularity), found("retain", granularity)
    graph = forget.graph
    shared = forget.nodes & retain.nodes & graph.editable
    name = {"block": "m1", "neuron": "m1.n0"}[granularity]
    assert [graph.name(node) for node in np.flatnonzero(shared)] == [name]
    assignment = assign([forget], [retain], semantics=semantics)
    assert assignment.optimal
    assert (assignment.cost, assignment.n_forced) == (1, 1)
    assert [graph.name(node) for node in np.flatnonzero(assignment.forced)] == [name]


# What the circuits do when they run


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_circuit_is_faithful_complete_and_minimal(name, granularity):
    circuit = found(name, granularity)
    result = evaluate_circuit(planted(), PAIRS[name], circuit)
    assert result.faithfulness == pytest.approx(1, abs=1e-4)
    assert result.divergence == pytest.approx(0, abs=1e-6)
    assert result.completeness > 0.1
    assert result.complement == pytest.approx(result.empty, abs=1e-4)
    assert (result.edges, result.all_edges) == (len(PLANTED[name]), int(circuit.graph.residual_edges.sum()))
    drops = minimality(planted(), PAIRS[name], circuit)
    labelled = between_blocks(circuit)
    wired = np.isin(circuit.src, circuit.graph.writers) & np.isin(circuit.dst, circuit.graph.readers)
    for edge, (text, gate) in zip(np.flatnonzero(wired).tolist(), labelled.items(), strict=True):
        assert drops[edge] == pytest.approx(0, abs=1e-4) if gate == Gate.OR else drops[edge] > 0.1, text
    assert np.isnan(drops[circuit.provenance == Provenance.STRUCTURAL]).all()
    nodes = minimality(planted(), PAIRS[name], circuit, by="node")
    m1 = circuit.graph.node(NodeKind.MLP, 1)
    assert nodes[m1] == pytest.approx({"forget": 1 / 2, "retain": 2.5 / 3.5}[name], abs=1e-4)
    assert np.isnan(nodes[~circuit.nodes]).all()


def test_the_curve_reaches_one_with_the_planted_edges():
    scores = cleaned(attribute(planted(), PAIRS["forget"], name="forget"))
    every = int(scores.graph.residual_edges.sum())
    planted_share = len(PLANTED["forget"]) / every
    found = curve(planted(), PAIRS["forget"], scores, (1 / every, planted_share, 1.0))
    assert found.counts.tolist() == [1, len(PLANTED["forget"]), every]
    np.testing.assert_allclose(found.faithfulness, [0, 1, 1], atol=1e-4)
    rise = planted_share - 1 / every
    assert found.cpr == pytest.approx(rise / 2 + 1 - planted_share, abs=1e-4)
    assert found.cmd == pytest.approx(rise / 2, abs=1e-4)


def relabelled(circuit: Circuit) -> Circuit:
    """AND and OR exchanged, as if the directions had been mixed up."""
    swap = np.array([Gate.OR, Gate.AND, Gate.ADDER], dtype=np.uint8)
    by = np.array([0, Provenance.DENOISING, Provenance.NOISING, Provenance.BOTH, Provenance.STRUCTURAL], dtype=np.uint8)
    scored = circuit.provenance != Provenance.STRUCTURAL
    return replace(circuit, gate=np.where(scored, swap[circuit.gate], circuit.gate), provenance=by[circuit.provenance],
                   ns=circuit.dn, dn=circuit.ns)


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize(("name", "inputs"), [("forget", ("a0.h0", "a0.h1")), ("retain", ("a1.h1", "a2.h0"))])
def test_patching_confirms_true_gates_and_contradicts_false_ones(name, inputs, granularity):
    circuit, settings = found(name, granularity), LocalizeSettings(confirm=99)
    tested = np.isin(circuit.src, [circuit.graph.names.index(node) for node in inputs])
    tested &= np.isin(circuit.dst, circuit.graph.readers)
    if name == "retain":
        tested &= circuit.dst == circuit.graph.mlp_reader(2)
    adders = circuit.provenance == Provenance.BOTH
    adders &= np.bincount(circuit.dst[adders], minlength=circuit.graph.n_nodes)[circuit.dst] > 1
    confirmed = confirm(planted(), PAIRS[name], circuit, settings)
    np.testing.assert_array_equal(confirmed.gate, circuit.gate)
    np.testing.assert_array_equal(confirmed.provenance ^ circuit.provenance, (tested | adders) * Provenance.CONFIRMED.value)
    assert confirmed.summary() == (f"{len(circuit)} edges (inputs of gates: {2 + adders.sum()} confirmed,"
                                   " 0 contradicted)")
    assert circuit.summary() == f"{len(circuit)} edges"
    false = relabelled(circuit)
    contradicted = confirm(planted(), PAIRS[name], false, settings)
    np.testing.assert_array_equal(contradicted.gate[tested], circuit.gate[tested])
    np.testing.assert_array_equal(contradicted.gate[~tested], false.gate[~tested])
    np.testing.assert_array_equal(contradicted.provenance ^ false.provenance,
                                  tested * Provenance.CONTRADICTED.value + adders * Provenance.CONFIRMED.value)


def test_an_adder_with_an_exclusive_label_is_contradicted():
    circuit = found("retain", "block")
    into = (circuit.dst == circuit.graph.mlp_reader(1))
    assert into.sum() == 2
    for label, by in ((Gate.AND, Provenance.NOISING), (Gate.OR, Provenance.DENOISING)):
        false = replace(circuit, gate=np.where(into, label, circuit.gate).astype(np.uint8),
                        provenance=np.where(into, by, circuit.provenance).astype(np.uint8))
        seen = confirm(planted(), PAIRS["retain"], false, LocalizeSettings(confirm=99))
        assert set(seen.gate[into].tolist()) == {Gate.ADDER}
        assert set(seen.provenance[into].tolist()) == {by | Provenance.CONTRADICTED}


def test_confirmation_tests_the_strongest_receivers_and_keeps_to_its_runs(monkeypatch):
    circuit = found("forget", "block")
    runs: list[int] = []

    def counting(body: Anatomy, pairs: Pairs, count: int, *rest: object) -> object:
        runs.append(count)
        return measure(body, pairs, count, *rest)

    monkeypatch.setattr("clue.circuit.confirmation.measure", counting)
    assert confirm(planted(), PAIRS["forget"], circuit, LocalizeSettings(confirm=0)) is circuit
    confirm(planted(), PAIRS["forget"], circuit, LocalizeSettings(confirm=1))
    assert runs == [3]  # two inputs: each alone, and both
    assert runs[0] <= 2 * MOST_INPUTS + 1

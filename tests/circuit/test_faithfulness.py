"""Running circuits: the ends of the scale, the definitions once more, and what selection, pruning and removal do to them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from clue.circuit.attribution import attribute, graph_of
from clue.circuit.confirmation import confirm
from clue.circuit.faithfulness import (
    FRACTIONS,
    SAMPLE,
    Measured,
    Part,
    curve,
    evaluate_circuit,
    judge,
    measure,
    minimality,
    ranking,
    sample,
)
from clue.circuit.selection import build_circuit, top
from clue.config import LocalizeSettings
from clue.errors import CircuitError, ClueError
from clue.model.anatomy import anatomy
from clue.types import NodeKind, Provenance
from tests.circuit.test_attribution import PAIRS, make_pairs
from tests.circuit.test_selection import make_scores
from tests.families import tiny
from tests.oracles.attribution import InDouble
from tests.oracles.patching import patched_logits

pytestmark = pytest.mark.usefixtures("in_double")
LEVELS = ["block", "neuron"]


@cache
def scored(name: str = "llama"):
    with InDouble():
        body = anatomy(tiny(name))
        return body, attribute(body, PAIRS, name="people")


def circuit_of(share: float, granularity: str = "neuron", name: str = "llama"):
    return build_circuit(scored(name)[1], LocalizeSettings(edges=share, neurons=share, granularity=granularity))


def whole(graph):
    return Part(graph.residual_edges.copy())


def test_the_scale_runs_from_the_corrupted_run_to_the_model():
    body, scores = scored()
    parts = [whole(scores.graph), whole(scores.graph).complement()]
    found = measure(body, PAIRS, 2, parts.__getitem__)
    np.testing.assert_allclose(found.faithfulness(), [1, 0], atol=1e-9)
    np.testing.assert_allclose(found.parts, [found.full, found.empty], atol=1e-9)
    np.testing.assert_allclose(found.divergence[0], 0, atol=1e-9)
    assert (found.divergence[1] > 0).all()


@pytest.mark.parametrize("granularity", LEVELS)
@pytest.mark.parametrize(("name", "target"), [("llama", "margin"), ("llama", "logprob"), ("qwen2_moe", "margin")])
def test_evaluation_is_its_definition(granularity, name, target):
    """One pair at a time, its circuit run by the slow oracle, targets and divergences written out."""
    body, scores = scored(name)
    circuit = circuit_of(0.4, granularity, name)
    own = Part.of(circuit)
    graph = scores.graph
    every = np.ones((graph.n_layers, graph.d_mlp), dtype=bool)
    full, empty, run, rest, kl, kl_rest = np.zeros((6, len(PAIRS)))
    for i, (clean, corrupted, start) in enumerate(zip(PAIRS.clean, PAIRS.corrupted, PAIRS.answer_start, strict=True)):
        ids, others = (torch.from_numpy(x)[None] for x in (clean, corrupted))
        at = range(int(start) - 1, len(clean) - 1)
        with torch.no_grad():
            model, away = (body.model(x).logits[0] for x in (ids, others))
        runs = [patched_logits(body, graph, ids, others, ~part.edges, ~(every if part.neurons is None else part.neurons))[0]
                for part in (own, own.complement())]

        def value(logits, at=at, clean=clean, away=away):
            if target == "logprob":
                return np.mean([float(logits[t].log_softmax(-1)[clean[t + 1]]) for t in at])
            return np.mean([float(logits[t, clean[t + 1]] - logits[t, away[t].argmax()]) for t in at])

        def divergence(logits, at=at, model=model):
            p, q = logits.softmax(-1), model.softmax(-1)
            return np.mean([float((p[t] * (p[t] / q[t]).log()).sum()) for t in at])

        full[i], empty[i], run[i], rest[i] = (value(logits) for logits in (model, away, *runs))
        kl[i], kl_rest[i] = (divergence(logits) for logits in runs)
    found = evaluate_circuit(body, PAIRS, circuit, LocalizeSettings(target=target))
    assert found.faithfulness == pytest.approx((run.mean() - empty.mean()) / (full.mean() - empty.mean()))
    assert (found.full, found.empty) == pytest.approx((full.mean(), empty.mean()))
    assert (found.circuit, found.complement) == pytest.approx((run.mean(), rest.mean()))
    assert (found.completeness, found.divergence) == pytest.approx((kl_rest.mean(), kl.mean()))
    assert (found.name, found.pairs, found.all_edges) == ("people", 2, int(graph.residual_edges.sum()))
    assert found.edges == own.edges.sum()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("share", [0.15, 0.3])
def test_dead_ends_carry_nothing(name, share):
    """Selection drops edges on no path from embed to logits: running them makes no difference. (Behind an output norm it
    makes a small one: the heads of a layer share its scale.)"""
    body, _ = scored(name)
    graph = graph_of(body)
    scores = make_scores(3, graph)
    circuit = build_circuit(scores, LocalizeSettings(edges=share, granularity="block"))
    count = round(share * int(graph.residual_edges.sum()))
    uncut = Part(top(scores.ns, graph.residual_edges, count) | top(scores.dn, graph.residual_edges, count))
    parts = [Part.of(circuit), uncut]
    found = measure(body, PAIRS, 2, parts.__getitem__)
    assert parts[0].edges.any() and not (parts[0].edges & ~uncut.edges).any()
    assert parts[0].edges.sum() < uncut.edges.sum()
    np.testing.assert_allclose(found.parts[0], found.parts[1], atol=1e-9)


def test_batches_and_padding_do_not_matter():
    body, _ = scored()
    one, two = (evaluate_circuit(body, PAIRS, circuit_of(0.3), LocalizeSettings(batch_size=size)) for size in (1, 2))
    assert one.faithfulness == pytest.approx(two.faithfulness)
    assert one.completeness == pytest.approx(two.completeness)


def test_the_model_is_left_as_it_was():
    body, _ = scored()
    body.model.train()
    evaluate_circuit(body, PAIRS, circuit_of(0.3))
    assert body.model.training
    assert all(parameter.requires_grad for parameter in body.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.model.modules())
    body.model.eval()


# The curve


def test_the_curve_is_the_one_of_mib():
    body, scores = scored()
    found = curve(body, PAIRS, scores)
    assert found.fractions == FRACTIONS
    assert found.faithfulness[-1] == pytest.approx(1)
    f, x = found.faithfulness, FRACTIONS
    assert found.cpr == pytest.approx(sum((x[i + 1] - x[i]) * (f[i] + f[i + 1]) / 2 for i in range(len(x) - 1)))
    assert found.cmd == pytest.approx(sum((x[i + 1] - x[i]) * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
                                          for i in range(len(x) - 1)))
    assert found.cmd >= abs(0.999 - found.cpr) - 1e-9


def test_the_ranking_grows_through_the_edges_that_selection_keeps():
    _, scores = scored()
    allowed = scores.graph.residual_edges
    order = ranking(scores)
    assert sorted(order.tolist()) == np.flatnonzero(allowed).tolist()
    for count in (1, 5, 40):
        kept = np.flatnonzero(top(scores.ns, allowed, count) | top(scores.dn, allowed, count))
        assert set(order[:len(kept)].tolist()) == set(kept.tolist())


@pytest.mark.parametrize("fractions", [(0.5,), (0.5, 0.2), (0.5, 0.5), (0.0, 1.0), (0.5, 1.5), (0.5, float("nan"))])
def test_fractions_are_checked(fractions):
    body, scores = scored()
    with pytest.raises(CircuitError, match="at least two rising numbers"):
        curve(body, PAIRS, scores, fractions)


def test_the_smallest_circuit_of_a_curve_has_an_edge():
    body, scores = scored()
    assert curve(body, PAIRS, scores, (1e-9, 1.0)).counts.tolist() == [1, int(scores.graph.residual_edges.sum())]


# Minimality


@pytest.mark.parametrize("granularity", LEVELS)
def test_drops_are_differences_of_two_runs(granularity):
    body, _ = scored()
    circuit = circuit_of(0.15, granularity)
    graph = circuit.graph
    before = evaluate_circuit(body, PAIRS, circuit).faithfulness
    drops = minimality(body, PAIRS, circuit)
    assert np.array_equal(np.isnan(drops), circuit.provenance == Provenance.STRUCTURAL)
    columns = ("src", "dst", "gate", "provenance", "ns", "dn")
    for edge in np.flatnonzero(~np.isnan(drops))[:8].tolist():
        without = replace(circuit, **{name: np.delete(getattr(circuit, name), edge) for name in columns})
        assert drops[edge] == pytest.approx(before - evaluate_circuit(body, PAIRS, without).faithfulness, abs=1e-9)
    nodes = minimality(body, PAIRS, circuit, by="node")
    assert np.array_equal(~np.isnan(nodes), circuit.nodes & ~np.isin(np.arange(graph.n_nodes), [graph.embed, graph.logits]))
    for node in np.flatnonzero(~np.isnan(nodes))[:8].tolist():
        touched = (circuit.src == node) | (circuit.dst == node)
        if graph.kind[node] == NodeKind.HEAD:
            touched = circuit.src == node  # what is left inside the head leads nowhere
        without = replace(circuit, **{name: getattr(circuit, name)[~touched] for name in columns})
        assert nodes[node] == pytest.approx(before - evaluate_circuit(body, PAIRS, without).faithfulness, abs=1e-9)


def test_minimality_is_by_edge_or_node():
    body, _ = scored()
    with pytest.raises(CircuitError, match="by = 'layer' is not one of edge, node"):
        minimality(body, PAIRS, circuit_of(0.3), by="layer")


# Selection by a target


@pytest.mark.parametrize("granularity", LEVELS)
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_a_target_is_reached_and_not_by_one_edge_fewer(granularity, target, tmp_path):
    body, scores = scored()
    settings = LocalizeSettings(faithfulness=target, neurons=1.0, granularity=granularity)
    calls: list[int] = []
    faithful = judge(body, PAIRS, settings)

    def counting(circuit):
        calls.append(len(circuit))
        return faithful(circuit)

    circuit = build_circuit(scores, settings, faithful=counting)
    assert circuit.faithfulness == pytest.approx(evaluate_circuit(body, PAIRS, circuit).faithfulness)
    assert circuit.faithfulness >= target
    available = int(scores.graph.residual_edges.sum())
    assert len(calls) <= 1 + np.ceil(np.log2(available))
    sizes = [build_circuit(scores, replace(settings, faithfulness=0.0, edges=count / available))
             for count in range(1, available + 1)]
    at = next(i for i, other in enumerate(sizes) if np.array_equal(other.src, circuit.src))
    assert at == 0 or faithful(sizes[at - 1]) < target
    circuit.save(tmp_path / "c.safetensors")
    assert type(circuit).load(tmp_path / "c.safetensors").faithfulness == circuit.faithfulness


def test_a_target_out_of_reach_is_an_error_with_a_remedy():
    body, scores = scored()
    settings = LocalizeSettings(faithfulness=1.0, neurons=0.01)
    with pytest.raises(CircuitError, match=r"people: of \d+ numbers of edges the best, .* 0\.5000, not 1\.0: keep more"):
        build_circuit(scores, settings, faithful=lambda circuit: 0.5)
    with pytest.raises(CircuitError, match="needs the model and its pairs"):
        build_circuit(scores, settings)


# Bad input


def test_pairs_that_change_nothing_are_refused():
    body = anatomy(tiny("llama"))
    with torch.no_grad():
        body.embed.weight[6] = body.embed.weight[5]
    same = make_pairs([[1, 5, 7, 9]], [[1, 6, 7, 9]], [3])
    with pytest.raises(CircuitError, match="no circuit can be judged"):
        evaluate_circuit(body, same, circuit_of(0.3))
    with pytest.raises(CircuitError, match="no pairs"):
        evaluate_circuit(body, make_pairs([], [], []), circuit_of(0.3))


@pytest.mark.parametrize("run", [evaluate_circuit, minimality, confirm])
def test_a_setting_that_does_not_exist_is_refused(run):
    with pytest.raises(ClueError, match="target = 'log' is not one of margin, logprob"):
        run(scored()[0], PAIRS, circuit_of(0.3), LocalizeSettings(target="log"))


@pytest.mark.parametrize(("empty", "judged"), [(1.0 + 1e-5, True), (1.0 + 1e-7, False), (1.0, False)])
def test_a_target_that_moves_a_little_can_be_judged_and_one_that_rounding_moves_cannot(empty, judged):
    for scale in (1.0, 1e-9, -1e9):
        full, none, half = (np.array([scale * value]) for value in (1.0, empty, (1.0 + empty) / 2))
        found = Measured(full, none, half[None], half[None])
        if judged:
            assert found.faithfulness() == pytest.approx([0.5], abs=1e-6)
        else:
            with pytest.raises(CircuitError, match="on clean and on corrupted prompts"):
                found.faithfulness()
    with pytest.raises(CircuitError, match="0 on clean and on corrupted prompts"):
        Measured(*np.zeros((2, 1)), *np.zeros((2, 1, 1))).faithfulness()


def test_a_judge_looks_at_a_sample():
    rows = [[1 + i % 5, 5, 7 + i % 3, 9] for i in range(SAMPLE + 9)]
    pairs = make_pairs(rows, [[1, 8 + i % 3, 7, 9] for i in range(len(rows))], [3] * len(rows))
    (body, _), circuit = scored(), circuit_of(0.3)
    few, all_of_them = (evaluate_circuit(body, some, circuit).faithfulness for some in (sample(pairs), pairs))
    assert judge(body, pairs)(circuit) == pytest.approx(few) != pytest.approx(all_of_them)


def test_a_circuit_of_another_model_is_refused():
    body, scores = scored()
    other = circuit_of(0.3, "block", "gpt_neox")
    for run in (evaluate_circuit, minimality, confirm, lambda body, pairs, circuit: judge(body, pairs)(circuit)):
        with pytest.raises(CircuitError, match=r"people is of another model: this one has n_kv_heads \d, .*, the graph there"):
            run(body, PAIRS, other)
    with pytest.raises(CircuitError, match="people is of another model"):
        curve(body, PAIRS, scored("gpt_neox")[1])
    wider = replace(scores.graph, d_mlp=scores.graph.d_mlp + 1)  # which only neurons' circuits depend on
    with pytest.raises(CircuitError, match=f"one has d_mlp {scores.graph.d_mlp}, the graph there d_mlp {wider.d_mlp}"):
        curve(body, PAIRS, replace(scores, graph=wider))
    evaluate_circuit(body, PAIRS, replace(circuit_of(0.3, "block"), graph=replace(wider, neurons=False)))


def test_the_complement_is_all_that_a_part_leaves_out():
    edges, neurons = (np.random.default_rng(0).random((3, 5)) < 0.5 for _ in range(2))
    rest = Part(edges, neurons).complement()
    np.testing.assert_array_equal(rest.edges, ~edges)
    np.testing.assert_array_equal(rest.neurons, ~neurons)
    assert Part(edges).complement().neurons is None


def test_a_run_that_is_no_number_is_an_error():
    body = anatomy(tiny("llama"))
    with torch.no_grad():
        body.model.lm_head.weight[3, 0] = torch.inf
    with pytest.raises(CircuitError, match="logits that are not finite"):
        measure(body, PAIRS, 0, lambda i: None)


def test_a_sample_is_spread_evenly():
    rows = [[i, 1, 2] for i in range(10)]
    pairs = make_pairs(rows, rows, [1, 2] * 5)
    assert [int(ids[0]) for ids in sample(pairs, 4).clean] == [0, 3, 6, 9]
    assert sample(pairs, 4).answer_start.tolist() == [1, 2, 1, 2]
    assert sample(pairs, 10) is pairs
    assert sample(pairs, 4).sha256 not in ("", pairs.sha256)

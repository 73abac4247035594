"""Known truth: AND, OR and ADDER built by hand into a real LlamaForCausalLM, whose scores can be computed on paper.

One layer, one position that matters, no attention pattern (W_q = W_k = 0). A constant channel of 1e4 with norm weight
equal to the rms makes RMSNorm the identity to 1e-6. Two heads copy one bit each (clean 1, corrupted 0) to channel 1, and
the MLP computes a gate of their sum with ReLU units.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clue.circuit.attribution import Scores, attribute, graph_of
from clue.circuit.confirmation import MOST_INPUTS, confirm, satisfying
from clue.circuit.graph import Circuit, Graph
from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings
from clue.model.anatomy import anatomy
from clue.types import Gate, NodeKind, Provenance
from tests.circuit.test_attribution import make_pairs

pytestmark = pytest.mark.usefixtures("in_double")

D, BIG = 8, 1e4
CONST, SUM, OUT, BIT_A, BIT_B = 0, 1, 2, 3, 4
ONES, ZEROS, YES, NO = 0, 1, 2, 3  # tokens: both bits set, no bit set, the true answer, the contrast

#: gate -> (units as (slope on the sum, offset, weight on the output), constant added to the output, what heads write)
GATES = {
    "and": ([(1.0, -1.0, 1.0)], 0.0, (1.0, 1.0)),
    "or": ([(-1.0, 1.0, -1.0)], 1.0, (1.0, 1.0)),
    "adder": ([(1.0, 0.5, 1.0)], -0.5, (1.0, 1.5)),
}
EXPECTED = {"and": ((-1, -1), (0, 0)), "or": ((0, 0), (1, 1)), "adder": ((-1, -1.5), (1, 1.5))}


def blank_model(d_model: int, layers: int, heads: int, d_head: int, d_mlp: int) -> LlamaForCausalLM:
    """All weights zero, but for norms that are the identity on a stream whose constant channel is BIG, and that channel
    in every embedding."""
    config = LlamaConfig(vocab_size=4, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, head_dim=d_head, hidden_act="relu",
                         max_position_embeddings=8, rms_norm_eps=0.0, tie_word_embeddings=False, pad_token_id=None,
                         bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(BIG / d_model**0.5 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, CONST] = BIG
    return model


def gate_model(name: str) -> LlamaForCausalLM:
    units, offset, writes = GATES[name]
    model = blank_model(D, layers=1, heads=2, d_head=4, d_mlp=4)
    with torch.no_grad():
        layer, embed = model.model.layers[0], model.model.embed_tokens.weight
        embed[ONES, BIT_A] = embed[ONES, BIT_B] = 1.0
        for head, bit in enumerate((BIT_A, BIT_B)):
            layer.self_attn.v_proj.weight[4 * head, bit] = writes[head]
            layer.self_attn.o_proj.weight[SUM, 4 * head] = 1.0
        for unit, (slope, shift, weight) in enumerate(units):
            # relu(gate) * up: the up row reads the constant channel and is 1.
            layer.mlp.gate_proj.weight[unit, SUM] = slope
            layer.mlp.gate_proj.weight[unit, CONST] = shift / BIG
            layer.mlp.up_proj.weight[unit, CONST] = 1 / BIG
            layer.mlp.down_proj.weight[OUT, unit] = weight
        # margin = output + offset - 1/2, so that NO wins in the corrupted run and YES in the clean one
        model.lm_head.weight[YES, OUT] = 1.0
        model.lm_head.weight[YES, CONST] = (offset - 0.5) / BIG
        model.lm_head.weight[[ONES, ZEROS], CONST] = -9 / BIG
    return model


@pytest.mark.parametrize("name", GATES)
def test_flat_gates(name):
    model = gate_model(name)
    pairs = make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])
    with torch.no_grad():
        clean, corrupted = (model(torch.tensor([[t]])).logits[0, 0] for t in (ONES, ZEROS))
    assert clean[YES] > clean[NO]
    assert corrupted.argmax() == NO
    scores = attribute(anatomy(model), pairs)
    graph = scores.graph
    heads = [1, 2]  # writers: embed, a0.h0, a0.h1, m0
    mlp = int(np.flatnonzero(graph.readers == graph.mlp_reader(0))[0])
    ns, dn = EXPECTED[name]
    np.testing.assert_allclose(scores.ns[heads, mlp], ns, atol=1e-5)
    np.testing.assert_allclose(scores.dn[heads, mlp], dn, atol=1e-5)


def cleaned(scores: Scores) -> Scores:
    """Zeros where the score is nothing but the identity norm's error of 1e-6, in place."""
    scores.ns[np.abs(scores.ns) < 1e-4] = 0
    scores.dn[np.abs(scores.dn) < 1e-4] = 0
    return scores


@pytest.mark.parametrize("name", GATES)
def test_flat_gates_get_their_label(name):
    """With every scored edge allowed in, the two heads enter the MLP through the gate that was built."""
    scores = cleaned(attribute(anatomy(gate_model(name)), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])))
    if name == "and":  # AND alone is invisible to Dn: keep its one-way path by asking for every edge
        assert not scores.dn[[1, 2]].any()
    circuit = build_circuit(scores, LocalizeSettings(edges=1.0, neurons=1.0))
    graph = circuit.graph
    into = circuit.dst == graph.mlp_reader(0)
    heads = np.isin(circuit.src, [graph.node(NodeKind.HEAD, 0, h) for h in range(2)])
    assert set(circuit.gate[into & heads].tolist()) == {Gate[name.upper()]}
    assert (into & heads).sum() == 2


def sum_model(heads: int, units: list[tuple[float, float]], beside: float = 0.0) -> LlamaForCausalLM:
    """The margin is the sum of weight * relu(s - offset) over the units (weight, offset), s being how many heads copied
    their bit, and ``beside`` more in the clean run, straight from the embedding."""
    bits = range(3, 3 + heads)
    model = blank_model(4 * heads, layers=1, heads=heads, d_head=2, d_mlp=2)
    with torch.no_grad():
        layer, embed = model.model.layers[0], model.model.embed_tokens.weight
        for head, bit in enumerate(bits):
            embed[ONES, bit] = 1.0
            layer.self_attn.v_proj.weight[2 * head, bit] = 1.0
            layer.self_attn.o_proj.weight[SUM, 2 * head] = 1.0
        for unit, (weight, offset) in enumerate(units):
            layer.mlp.gate_proj.weight[unit, SUM] = 1.0
            layer.mlp.gate_proj.weight[unit, CONST] = -offset / BIG
            layer.mlp.up_proj.weight[unit, CONST] = 1 / BIG
            layer.mlp.down_proj.weight[OUT, unit] = weight
        model.lm_head.weight[YES, OUT] = 1.0
        model.lm_head.weight[YES, CONST] = -0.5 / BIG
        model.lm_head.weight[YES, bits[0]] = beside
        model.lm_head.weight[[ONES, ZEROS], CONST] = -9 / BIG
    return model


def confirmed_heads(model: LlamaForCausalLM, gate: Gate, ns: list[float], dn: list[float]) -> Circuit:
    """The heads' edges into m0, said to be of one gate, after the test."""
    by = {Gate.AND: Provenance.NOISING, Gate.OR: Provenance.DENOISING, Gate.ADDER: Provenance.BOTH}[gate]
    body, n = anatomy(model), len(ns)
    graph = graph_of(body)
    src = np.array([graph.node(NodeKind.HEAD, 0, head) for head in range(n)], np.int32)
    circuit = Circuit("x", graph, src, np.full(n, graph.mlp_reader(0), np.int32), np.full(n, gate, np.uint8),
                      np.full(n, by, np.uint8), np.array(ns), np.array(dn))
    return confirm(body, make_pairs([[ONES, YES]], [[ZEROS, YES]], [1]), circuit, LocalizeSettings(confirm=1))


@pytest.mark.parametrize(("share", "gate"), [(0.77, Gate.AND), (0.73, Gate.ADDER), (0.27, Gate.ADDER), (0.23, Gate.OR)])
def test_the_gates_part_halfway(in_double, share, gate):
    """Two inputs, the first of which takes ``share`` of what both take."""
    model = sum_model(2, [(1 - share, 0.0), (2 * share - 1, 1.0)])
    for told in Gate:
        found = confirmed_heads(model, told, [1.0, 2.0], [2.0, 1.0])
        assert set(found.gate.tolist()) == {gate}
        assert set((found.provenance & (Provenance.CONFIRMED | Provenance.CONTRADICTED)).tolist()) == {
            Provenance.CONFIRMED if told == gate else Provenance.CONTRADICTED}


@pytest.mark.parametrize(("beside", "told"), [(50.0, True), (200.0, False)])
def test_what_moves_less_than_a_hundredth_of_the_target_says_nothing(in_double, beside, told):
    """The AND of both heads moves the margin by 1, and ``beside`` moves on its own."""
    found = confirmed_heads(sum_model(2, [(1.0, 1.0)], beside), Gate.OR, [0.0, 0.0], [1.0, 1.0])
    assert set(found.gate.tolist()) == {Gate.AND if told else Gate.OR}


@pytest.mark.parametrize("gate", [Gate.AND, Gate.OR, Gate.ADDER])
def test_the_strongest_inputs_are_tested_and_all_of_the_group_patched(in_double, gate):
    """Ten inputs: an OR dies with the last of all, not with the last of those that are tested."""
    units = {Gate.AND: [(1.0, 9.0)], Gate.OR: [(1.0, 0.0), (-1.0, 1.0)], Gate.ADDER: [(0.1, 0.0)]}[gate]
    strong, other = [1.0, 5.0, 3.0, 4.0, 9.0, 2.0, 6.0, 8.0, 7.0, 10.0], [1.0] * 10
    # An ADDER is as strong as the stronger of its scores.
    ns, dn = {Gate.AND: (strong, other), Gate.OR: (other, strong), Gate.ADDER: (other, strong)}[gate]
    found = confirmed_heads(sum_model(10, units), gate, ns, dn)
    assert set(found.gate.tolist()) == {gate}
    tested = (found.provenance & Provenance.CONFIRMED) != 0
    assert tested.tolist() == [strength > 2 for strength in strong] and tested.sum() == MOST_INPUTS


def nested_model() -> LlamaForCausalLM:
    """OR(AND(a, b), AND(c, d)): four heads copy a bit each, the first MLP computes the ANDs, the second the OR."""
    first, second, out, bits = 1, 2, 3, (4, 5, 6, 7)
    model = blank_model(12, layers=2, heads=4, d_head=2, d_mlp=2)
    with torch.no_grad():
        layers, embed = model.model.layers, model.model.embed_tokens.weight
        for head, bit in enumerate(bits):
            embed[ONES, bit] = 1.0
            layers[0].self_attn.v_proj.weight[2 * head, bit] = 1.0
            layers[0].self_attn.o_proj.weight[(first, first, second, second)[head], 2 * head] = 1.0
        for unit, channel in enumerate((first, second)):  # relu(sum - 1): adds the AND to its channel, less the sum
            mlp = layers[0].mlp
            mlp.gate_proj.weight[unit, channel] = 1.0
            mlp.gate_proj.weight[unit, CONST] = -1 / BIG
            mlp.up_proj.weight[unit, CONST] = 1 / BIG
            mlp.down_proj.weight[8 + unit, unit] = 1.0
        mlp = layers[1].mlp  # 1 - relu(1 - x)
        mlp.gate_proj.weight[0, [8, 9]] = -1.0
        mlp.gate_proj.weight[0, CONST] = 1 / BIG
        mlp.up_proj.weight[0, CONST] = 1 / BIG
        mlp.down_proj.weight[out, 0] = -1.0
        model.lm_head.weight[YES, out] = 1.0
        model.lm_head.weight[YES, CONST] = 0.5 / BIG
        model.lm_head.weight[[ONES, ZEROS], CONST] = -9 / BIG
    return model


#: A formula, layer by layer: a gate (m0, m1, ...) and its inputs, each the head of a bit (h0, h1, ...) or a gate below.
Formula = tuple[tuple[str, tuple[str, ...]], ...]


def unit(gate: str, inputs: int) -> tuple[float, float, float, float]:
    """Slope and offset of the ReLU unit that makes a gate of bits, its weight on the output, and what that is short of."""
    return {"and": (1.0, 1.0 - inputs, 1.0, 0.0), "or": (-1.0, 1.0, -1.0, 1.0), "adder": (1 / inputs, 0.5, 1.0, -0.5)}[gate]


def planted(gates: Formula, bits: int) -> LlamaForCausalLM:
    """A model whose answer is the formula."""
    first, width = 1 + bits, 1 + 2 * bits + len(gates)
    model = blank_model(width + -width % bits, layers=len(gates), heads=bits, d_head=2, d_mlp=2)
    channels = {f"h{bit}": first + bit for bit in range(bits)}
    constants = dict.fromkeys(channels, 0.0)  # of which the channels are short
    with torch.no_grad():
        embed, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        for bit in range(bits):
            embed[ONES, 1 + bit] = 1.0
            attention.v_proj.weight[2 * bit, 1 + bit] = 1.0
            attention.o_proj.weight[first + bit, 2 * bit] = 1.0
        for layer, (name, inputs) in enumerate(gates):
            mlp, written = model.model.layers[layer].mlp, first + bits + layer
            slope, shift, weight, short = unit(name, len(inputs))
            mlp.gate_proj.weight[0, [channels[one] for one in inputs]] = slope
            mlp.gate_proj.weight[0, CONST] = (shift + slope * sum(constants[one] for one in inputs)) / BIG
            mlp.up_proj.weight[0, CONST] = 1 / BIG
            mlp.down_proj.weight[written, 0] = weight
            channels[f"m{layer}"], constants[f"m{layer}"] = written, short
        model.lm_head.weight[YES, written] = 1.0
        model.lm_head.weight[YES, CONST] = (constants[f"m{len(gates) - 1}"] - 0.5) / BIG
        model.lm_head.weight[[ONES, ZEROS], CONST] = -9 / BIG
    return model


def gates_seen(gates: Formula, bits: int, granularity: str) -> list[tuple[str, bool]]:
    """For each input of each gate of a formula, the gate that patching sees and whether it saw it."""
    body, pairs = anatomy(planted(gates, bits)), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])
    settings = LocalizeSettings(edges=1.0, neurons=1.0, path_steps=16, granularity=granularity)
    circuit = build_circuit(cleaned(attribute(body, pairs, settings)), settings)
    confirmed = confirm(body, pairs, circuit, replace(settings, confirm=9))
    graph, found = circuit.graph, []
    for layer, (_, inputs) in enumerate(gates):
        for one in inputs:
            edge, = np.flatnonzero((confirmed.src == graph.names.index(one if one[0] == "m" else f"a0.{one}"))
                                   & (confirmed.dst == graph.mlp_reader(layer)))
            seen = confirmed.provenance[edge] & (Provenance.CONFIRMED | Provenance.CONTRADICTED)
            found.append((Gate(confirmed.gate[edge]).name.lower(), bool(seen)))
    return found


@pytest.mark.parametrize(("outer", "inner"), [("or", "and"), ("and", "or"), ("or", "or"), ("and", "and")])
def test_patching_tells_the_gate_of_gates(in_double, outer, inner):
    """Between the prompts both directions see a gate whose inputs are gates: an ADDER, until its inputs are patched."""
    gates = ((inner, ("h0", "h1")), (inner, ("h2", "h3")), (outer, ("m0", "m1")))
    assert gates_seen(gates, 4, "block") == [(inner, True)] * 4 + [(outer, True)] * 2


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize("names", [("or", "and", "or"), ("and", "or", "and"), ("and", "and", "or")])
def test_patching_tells_a_gate_behind_which_an_or_works_without_it(in_double, names, granularity):
    """In OR(AND(OR(a, b), c), d) nothing moves for a, b or c while d is there, and the AND's inputs are labelled OR."""
    gates = tuple((name, (f"m{layer - 1}" if layer else "h0", f"h{layer + 1}")) for layer, name in enumerate(names))
    assert gates_seen(gates, len(names) + 1, granularity) == [(name, True) for name in names for _ in range(2)]


def test_what_is_patched_around_a_gate_are_the_other_inputs_of_the_ors_behind_it():
    graph = Graph(n_layers=3, n_heads=2, n_kv_heads=2, d_mlp=0, neurons=False)
    told = {"a0.h0->m0": Gate.OR, "a0.h1->m0": Gate.OR,  # the gate
            "m0->m1": Gate.OR, "a0.h0->m1": Gate.OR, "a0.h1->m1": Gate.AND,
            "m0->m2": Gate.OR, "m1->m2": Gate.OR, "a1.h0->m2": Gate.OR,
            "m2->logits": Gate.ADDER, "a1.h0->logits": Gate.OR, "a1.h1->logits": Gate.OR}  # which ask for m2 as well
    src, dst = (np.array([graph.names.index(edge.split("->")[end]) for edge in told], dtype=np.int32) for end in (0, 1))
    gate, none = np.array(list(told.values()), dtype=np.uint8), np.zeros(len(told))
    circuit = Circuit("hand-made", graph, src, dst, gate, np.ones_like(gate), none, none)
    found = satisfying(circuit, gate, graph.mlp_reader(0))
    assert [list(told)[edge] for edge in found] == ["a0.h0->m1", "a1.h0->m2"]


@pytest.mark.parametrize("steps", [2, 16])
def test_a_gate_behind_a_gate_is_only_seen_between_the_prompts(in_double, steps):
    model = nested_model()
    scores = attribute(anatomy(model), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1]), LocalizeSettings(path_steps=steps))
    graph = scores.graph
    heads = [1, 2, 3, 4]  # writers: embed, a0.h0 .. a0.h3, m0, ...
    inner, outer = (int(np.flatnonzero(graph.readers == graph.mlp_reader(layer))[0]) for layer in (0, 1))
    # At the clean prompt the OR is saturated, at the corrupted one the ANDs are: plain EAP sees no inner edge at all.
    if steps == 2:
        np.testing.assert_allclose(scores.ns[heads, inner], 0, atol=1e-5)
        np.testing.assert_allclose(scores.dn[heads, inner], 0, atol=1e-5)
    else:
        # Bits at 1 - alpha: the ANDs work below alpha = 1/2, and the OR is not saturated above 1/4.
        alphas = np.arange(steps // 2) / (steps - 1)
        np.testing.assert_allclose(scores.ns[heads, inner], -np.mean(alphas > 0.25), atol=1e-4)
        np.testing.assert_allclose(scores.dn[heads, inner], 0, atol=1e-5)
        circuit = build_circuit(cleaned(scores), LocalizeSettings(edges=1.0, neurons=1.0))
        into = (circuit.dst == graph.mlp_reader(0)) & np.isin(circuit.src, graph.writers[heads])
        assert into.sum() == 4
        assert set(circuit.gate[into].tolist()) == {Gate.AND}
    # The OR's own inputs answer to denoising most.
    m0 = 5
    assert scores.dn[m0, outer] == pytest.approx(2, abs=1e-4)
    assert abs(scores.ns[m0, outer]) < 0.6 * scores.dn[m0, outer]


# Chained runs


def random_formula(seed: int) -> tuple[Formula, int]:
    """Three to seven gates of two to four inputs, every one of which reaches the last; a quarter of the inputs are shared."""
    rng = random.Random(seed)
    gates: list[tuple[str, tuple[str, ...]]] = []
    unread: list[str] = []
    bits, count = 0, rng.randint(3, 7)
    for number in range(count):
        size = rng.choice((2, 2, 3, 4))
        inputs = unread if number == count - 1 else rng.sample(unread, rng.randint(0, min(size, len(unread))))
        unread = [gate for gate in unread if gate not in inputs] + [f"m{number}"]
        while len(inputs) < size:
            known = [one for one in [f"h{bit}" for bit in range(bits)] + [f"m{gate}" for gate in range(number)]
                     if one not in inputs]
            shared = known and rng.random() < 0.25
            inputs = [*inputs, rng.choice(known) if shared else f"h{bits}"]
            bits += not shared
        gates.append((rng.choice(("and", "or", "adder")), tuple(inputs)))
    return tuple(gates), bits


def formula_of(circuit: Circuit) -> dict[str, dict[str, str]]:
    """What a circuit says of the model's MLPs: MLP -> input (head or MLP) -> gate."""
    graph, found = circuit.graph, {}
    for src, dst, gate in zip(circuit.src.tolist(), circuit.dst.tolist(), circuit.gate.tolist(), strict=True):
        if graph.kind[dst] in (NodeKind.MLP_IN, NodeKind.MLP) and src in graph.writers:
            name = f"m{graph.layer[dst]}"
            found.setdefault(name, {})[graph.name(src).removeprefix("a0.")] = Gate(gate).name.lower()
    return found


@pytest.mark.parametrize("granularity", ["block", "neuron"])
@pytest.mark.parametrize("seed", range(12))
def test_chained_runs_find_every_gate_of_a_random_formula(in_double, seed, granularity):
    """In two runs, whatever is saturated behind a gate, and nothing else."""
    gates, bits = random_formula(seed)
    body, pairs = anatomy(planted(gates, bits)), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])
    settings = LocalizeSettings(edges=1.0, neurons=1.0, path="chained", granularity=granularity)
    scores = cleaned(attribute(body, pairs, settings))
    assert formula_of(build_circuit(scores, settings)) == {
        f"m{number}": dict.fromkeys(inputs, gate) for number, (gate, inputs) in enumerate(gates)}


def test_an_or_behind_an_and_of_three_shows_to_chained_runs_alone(in_double):
    """AND(OR(a, b, c), d, e): the OR is saturated from a third of the path on, the AND dead up to its half."""
    gates = (("or", ("h0", "h1", "h2")), ("and", ("m0", "h3", "h4")))
    body, pairs = anatomy(planted(gates, 5)), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])
    heads = [1, 2, 3]
    for path, steps in (("half", 2), ("half", 16), ("full", 16)):
        scores = attribute(body, pairs, LocalizeSettings(path=path, path_steps=steps))
        np.testing.assert_allclose([scores.ns[heads], scores.dn[heads]], 0, atol=1e-5)
    scores = attribute(body, pairs, LocalizeSettings(path="chained"))
    mlp = int(np.flatnonzero(scores.graph.readers == scores.graph.mlp_reader(0))[0])
    np.testing.assert_allclose(scores.ns[heads, mlp], 0, atol=1e-5)
    np.testing.assert_allclose(scores.dn[heads, mlp], 1 / 2, atol=1e-5)  # the AND's slope is 1 at one of two ends

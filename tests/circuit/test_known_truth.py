"""Known truth: AND, OR and ADDER built by hand into a real LlamaForCausalLM, whose scores can be computed on paper.

One layer, one position that matters, no attention pattern (W_q = W_k = 0). A constant channel of 1e4 with norm weight
equal to the rms makes RMSNorm the identity to 1e-6. Two heads copy one bit each (clean 1, corrupted 0) to channel 1, and
the MLP computes a gate of their sum with ReLU units.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clue.circuit.attribution import attribute
from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings
from clue.model.anatomy import anatomy
from clue.types import Gate, NodeKind
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


def gate_model(name: str) -> LlamaForCausalLM:
    units, offset, writes = GATES[name]
    config = LlamaConfig(vocab_size=4, hidden_size=D, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=4, hidden_act="relu", max_position_embeddings=8,
                         rms_norm_eps=0.0, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None,
                         eos_token_id=None)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        rms = BIG / D**0.5
        layer = model.model.layers[0]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(rms)
        embed = model.model.embed_tokens.weight
        embed[:, CONST] = BIG
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


@pytest.mark.parametrize("name", GATES)
def test_flat_gates_get_their_label(name):
    """With every scored edge allowed in, the two heads enter the MLP through the gate that was built."""
    scores = attribute(anatomy(gate_model(name)), make_pairs([[ONES, YES]], [[ZEROS, YES]], [1]))
    scores.ns[np.abs(scores.ns) < 1e-4] = 0  # the identity norm is exact to 1e-6 only
    scores.dn[np.abs(scores.dn) < 1e-4] = 0
    if name == "and":  # AND alone is invisible to Dn: keep its one-way path by asking for every edge
        assert not scores.dn[[1, 2]].any()
    circuit = build_circuit(scores, LocalizeSettings(edges=1.0, neurons=1.0))
    graph = circuit.graph
    into = circuit.dst == graph.mlp_reader(0)
    heads = np.isin(circuit.src, [graph.node(NodeKind.HEAD, 0, h) for h in range(2)])
    assert set(circuit.gate[into & heads].tolist()) == {Gate[name.upper()]}
    assert (into & heads).sum() == 2

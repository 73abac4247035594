"""What both prompts of every pair begin with is run once, and nothing that is measured changes: against runs of the whole."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from clue.circuit import target
from clue.circuit.attribution import attribute, graph_of
from clue.circuit.faithfulness import Part, measure
from clue.circuit.target import Prompts
from clue.config import LocalizeSettings
from clue.model.anatomy import anatomy
from clue.model.prefix import Prefix, separable, unstretched
from tests.circuit.test_attribution import make_pairs
from tests.families import VARIANTS, tiny

#: Four tokens are shared by all; the second pair alone shares six.
PAIRS = make_pairs([[1, 5, 7, 9, 4, 3, 2, 11, 5, 6], [1, 8, 6, 12, 3, 9, 9, 2]],
                   [[1, 5, 7, 9, 8, 3, 2, 11, 5, 6], [1, 8, 6, 12, 3, 9, 10, 2]], [8, 7])
WINDOW = {"sliding_window": 3}
#: Windows that the prefix fills, and positions that are stretched.
UNUSUAL = [("mistral", WINDOW), ("mixtral", WINDOW), ("starcoder2", WINDOW), ("gemma2", WINDOW), ("gemma3_text", WINDOW),
           ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
           ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8}})]


def both(monkeypatch, body, run):
    """What ``run`` gives without and with a prefix of its own, and how many tokens the model saw in each."""
    found, tokens = [], []
    for least in (1 << 30, 1):
        monkeypatch.setattr(target, "LEAST_TOKENS", least)
        tokens.append(0)
        with body.model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: tokens.__setitem__(-1, tokens[-1] + args[0].numel())):
            found.append(run())
    return found, tokens


@pytest.mark.parametrize("path", ["half", "chained"])
@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in VARIANTS), *UNUSUAL])
def test_scores_are_those_of_whole_prompts(name, changes, stream, path, in_double, monkeypatch):
    body = anatomy(tiny(name, **changes))
    settings = LocalizeSettings(batch_size=2, path=path, path_steps=4, stream=stream)
    (whole, parted), (all_tokens, tokens) = both(monkeypatch, body, partial(attribute, body, PAIRS, settings))
    assert all_tokens - tokens == 2 * 4 * 3  # two pairs, four tokens: one run of those instead of four
    for array in ("ns", "dn", "neuron_ns", "neuron_dn", "neuron_sq_ns", "neuron_sq_dn"):
        want = getattr(whole, array)
        np.testing.assert_allclose(getattr(parted, array), want, atol=1e-12 * np.abs(want).max(), err_msg=array)
    assert (parted.tokens, parted.pairs, parted.informative) == (whole.tokens, whole.pairs, whole.informative)
    assert max(parted.gap_ns, parted.gap_dn) < 1e-12


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in VARIANTS), *UNUSUAL])
def test_circuits_run_as_on_whole_prompts(name, changes, in_double, monkeypatch):
    body = anatomy(tiny(name, **changes))
    random, shape = np.random.default_rng(0), graph_of(body).residual_edges.shape
    parts = [Part(random.random(shape) < 0.5, random.random((body.n_layers, body.d_mlp)) < 0.5) for _ in range(2)]
    settings = LocalizeSettings(batch_size=2)
    (whole, parted), (all_tokens, tokens) = both(monkeypatch, body,
                                                 partial(measure, body, PAIRS, 2, parts.__getitem__, settings))
    assert all_tokens - tokens == 2 * 4 * 3  # of four runs
    for array in ("full", "empty", "parts", "divergence"):
        np.testing.assert_allclose(getattr(parted, array), getattr(whole, array), atol=1e-12, err_msg=array)


def test_frequencies_that_depend_on_the_length_keep_prompts_whole():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert separable(tiny("llama"))
    assert not separable(tiny("llama", rope_parameters=dynamic))
    assert separable(tiny("phi3"))
    assert not separable(tiny("phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
        "original_max_position_embeddings": 16}))
    model = tiny("gemma3_text")
    assert separable(model)
    model.config.rope_parameters = {**model.config.rope_parameters, "full_attention": dynamic}
    assert not separable(model)
    assert separable(tiny("gpt2"))


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_frequencies_for_long_sequences_stay_with_long_sequences(name, in_double):
    """Beside a pair beyond the length it was trained on, a short one had the frequencies of long ones."""
    body = anatomy(tiny(name, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 5.0],
        "original_max_position_embeddings": 8}))
    alone, together = (attribute(body, PAIRS, LocalizeSettings(batch_size=size)) for size in (1, 2))
    np.testing.assert_allclose(together.ns, alone.ns, atol=1e-12 * np.abs(alone.ns).max())
    whole = Part(graph_of(body).residual_edges)
    alone, together = (measure(body, PAIRS, 1, lambda i: whole, LocalizeSettings(batch_size=size)) for size in (1, 2))
    np.testing.assert_allclose(together.full, alone.full, atol=1e-12)
    assert unstretched(tiny("llama")) == 0


def test_a_prefix_ends_before_what_differs_and_before_what_predicts_an_answer(monkeypatch):
    of = partial(Prompts.of, device=torch.device("cpu"))
    both_pairs, same = np.arange(2), make_pairs([[1, 5, 7, 9, 4, 3]], [[1, 5, 7, 9, 4, 3]], [4])
    assert of(PAIRS, both_pairs, share=True).prefix.shape == (2, 0)  # too few tokens for a pass of their own
    monkeypatch.setattr(target, "LEAST_TOKENS", 8)
    parted, whole = of(PAIRS, both_pairs, share=True), of(PAIRS, both_pairs)
    assert parted.prefix.tolist() == [[1, 5, 7, 9], [1, 8, 6, 12]]
    assert whole.prefix.shape == (2, 0)
    for name in ("clean", "corrupted", "mask", "live"):
        assert torch.equal(getattr(parted, name), getattr(whole, name)[:, 4:])
    assert torch.equal(parted.positions, whole.positions - 4)
    assert torch.equal(parted.answer, whole.answer)
    assert torch.equal(parted.weight, whole.weight)
    assert torch.equal(parted.attended, whole.attended)
    monkeypatch.setattr(target, "LEAST_TOKENS", 9)
    assert of(PAIRS, both_pairs, share=True).prefix.shape == (2, 0)
    monkeypatch.setattr(target, "LEAST_TOKENS", 1)
    assert of(PAIRS, np.array([1]), share=True).prefix.shape == (1, 6)
    assert of(same, np.arange(1), share=True).prefix.shape == (1, 3)
    long = [[1] * 9 + [2] * 100, [1] * 9 + [3] * 100]
    assert of(make_pairs(long[:1], long[1:], [108]), np.arange(1), share=True).prefix.shape == (1, 0)  # saves little


def test_runs_leave_the_prefix_as_it_was(in_double):
    model = tiny("llama")
    ids = torch.tensor([[1, 5, 7, 9, 4, 3]])
    prefix = Prefix.of(model, ids[:, :4])
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, 4:]
        for _ in range(2):
            given = prefix.arguments()
            torch.testing.assert_close(model(input_ids=ids[:, 4:], **given).logits, want)
            assert [given["past_key_values"].get_seq_length(layer) for layer in range(2)] == [6, 6]
            prefix.rewind(given, 1)
            assert [given["past_key_values"].get_seq_length(layer) for layer in range(2)] == [6, 4]
    assert prefix.cache.get_seq_length() == 4

"""The batched pass and its reductions against one record, one token at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clue.data.encoding import encode, pad_id
from clue.errors import ModelError, RecordError
from clue.evaluate.memorization import (
    TokenScores,
    exact_match,
    extraction_strength,
    nll,
    perplexity,
    probability,
    score,
    token_accuracy,
)


def scores_of(*records):
    """TokenScores from one list of (log_prob, correct) per record."""
    tokens = [token for record in records for token in record]
    return TokenScores(np.array([t[0] for t in tokens], dtype=float), np.array([t[1] for t in tokens], dtype=bool),
                       np.cumsum([0, *map(len, records)]))


@torch.no_grad()
def one_by_one(model, example):
    """(log_prob, correct) of every answer token, from one forward pass per token over nothing but its own prefix."""
    found = []
    for t in range(example.answer_start, len(example.input_ids)):
        logits = model(torch.from_numpy(example.input_ids[None, :t])).logits[0, -1].double()
        true = int(example.input_ids[t])
        found.append((float(logits.log_softmax(0)[true]), int(logits.argmax()) == true))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_scores_equal_one_forward_pass_per_token(model, tokenizer, forget, retain, batch_size):
    examples = encode(forget, tokenizer) + encode(retain, tokenizer)
    scores = score(model, examples, pad=pad_id(tokenizer), batch_size=batch_size)
    expected = scores_of(*(one_by_one(model, example) for example in examples))
    np.testing.assert_array_equal(scores.start, expected.start)
    np.testing.assert_array_equal(scores.correct, expected.correct)
    np.testing.assert_allclose(scores.log_prob, expected.log_prob, atol=2e-5)


def test_a_model_that_cannot_leave_logits_out_gives_the_same(model, tokenizer, forget):
    examples = encode(forget, tokenizer)
    expected = score(model, examples, pad=0, batch_size=4)

    class AllLogits(torch.nn.Module):
        device, inner = model.device, model

        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask,
                                                     use_cache=use_cache).logits)

    found = score(AllLogits(), examples, pad=0, batch_size=4)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-6)


def test_only_answer_logits_are_asked_for_and_the_mode_is_kept(model, tokenizer, forget):
    examples = encode(forget, tokenizer)
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.train()
    model.model.norm.eval()  # for good, as whoever trains it said
    score(model, examples[:1], pad=0, batch_size=1)
    hook.remove()
    answer = len(examples[0].input_ids) - examples[0].answer_start
    assert [shape[1] for shape in shapes] == [answer + 1]  # + 1: the last position, whose successor does not exist
    assert model.training and model.lm_head.training and not model.model.norm.training


def test_measures_equal_a_loop_over_records(model, tokenizer, forget, retain):
    examples = encode(forget, tokenizer) + encode(retain, tokenizer)
    scores = score(model, examples, pad=0, batch_size=5)
    for i, example in enumerate(examples):
        tokens = one_by_one(model, example)
        loss = -sum(log_prob for log_prob, _ in tokens) / len(tokens)
        assert exact_match(scores)[i] == all(correct for _, correct in tokens)
        assert token_accuracy(scores)[i] == pytest.approx(sum(correct for _, correct in tokens) / len(tokens))
        assert nll(scores)[i] == pytest.approx(loss, abs=1e-5)
        assert probability(scores)[i] == pytest.approx(np.exp(-loss), rel=1e-4)


@torch.no_grad()
def greedy_strength(model, example):
    """Extraction strength by its definition: try every prefix of the answer, generate, compare."""
    answer = example.input_ids[example.answer_start:].tolist()
    for k in range(len(answer)):
        ids = example.input_ids[:example.answer_start + k].tolist()
        while len(ids) < len(example.input_ids):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[example.answer_start:] == answer:
            return 1 - k / len(answer)
    return 0.0


def test_extraction_strength_is_that_of_greedy_decoding_from_every_prefix(model, tokenizer, forget, retain):
    examples = encode(forget, tokenizer) + encode(retain, tokenizer)
    # A few steps on some answers, so that prefixes of every length happen to suffice.
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = []
    for _ in range(3):
        for example in examples[:7]:
            ids = torch.from_numpy(example.input_ids[None])
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        strength = extraction_strength(score(model, examples, pad=0, batch_size=4))
        np.testing.assert_allclose(strength, [greedy_strength(model, example) for example in examples], atol=1e-12)
        seen += strength.tolist()
    assert {0.0, 1.0} < set(seen)  # both extremes, and something between


@given(st.lists(st.lists(st.tuples(st.floats(-20, -1e-3), st.booleans()), min_size=1, max_size=6), min_size=1,
                max_size=5))
def test_reductions_agree_with_their_definitions(records):
    scores = scores_of(*records)
    for i, record in enumerate(records):
        correct = [c for _, c in record]
        assert exact_match(scores)[i] == all(correct)
        assert token_accuracy(scores)[i] == pytest.approx(np.mean(correct))
        assert probability(scores)[i] == pytest.approx(np.exp(np.mean([p for p, _ in record])))
        k = next(k for k in range(len(correct) + 1) if all(correct[k:]))
        assert extraction_strength(scores)[i] == pytest.approx(1 - k / len(correct))
        least = max(1 - k / len(correct), 1 / len(correct))
        assert extraction_strength(scores, least="one-token")[i] == pytest.approx(least)
    tokens = [p for record in records for p, _ in record]
    assert perplexity(scores) == pytest.approx(np.exp(-sum(tokens) / len(tokens)))
    part = scores.records(len(records) - 1, len(records))
    np.testing.assert_array_equal(nll(part), nll(scores)[-1:])


def test_perplexity_stays_a_number_that_can_be_stored():
    scores = TokenScores(np.array([-2000.0, -3000.0]), np.zeros(2, bool), np.array([0, 2]))
    assert perplexity(scores) == pytest.approx(np.exp(700.0))


def test_weights_that_are_not_numbers_are_named(model, tokenizer, forget):
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelError, match=r"records\[0\]: .* not a number"):
        score(model, encode(forget, tokenizer), pad=0, batch_size=4)


def test_a_record_of_which_nothing_follows_a_token_is_refused(model, tokenizer, forget):
    first, *others = encode(forget, tokenizer)
    with pytest.raises(RecordError, match=r"records\[0\]: nothing of the answer follows another token"):
        score(model, [replace(first, input_ids=first.input_ids[:1], answer_start=0), *others], pad=0, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_moments_are_those_of_the_models_own_distribution(model, tokenizer, forget, batch_size):
    examples = encode(forget, tokenizer)
    plain, found = (score(model, examples, pad=0, batch_size=batch_size, moments=m) for m in (False, True))
    assert plain.mean is None and plain.variance is None
    np.testing.assert_array_equal(found.log_prob, plain.log_prob)
    mean, variance = [], []
    with torch.no_grad():
        for example in examples:
            logits = model(torch.from_numpy(example.input_ids[None])).logits[0, example.answer_start - 1:-1].double()
            for log_p in logits.log_softmax(-1).numpy():
                mean.append(np.sum(np.exp(log_p) * log_p))
                variance.append(np.sum(np.exp(log_p) * log_p ** 2) - mean[-1] ** 2)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-3, atol=1e-5)


def test_a_token_that_the_model_rules_out_leaves_the_moments_numbers(model, tokenizer, forget):
    plain, ruled_out = encode(forget, tokenizer), len(tokenizer) - 1
    never = [example for example in plain if ruled_out not in example.input_ids]

    class Never(torch.nn.Module):
        device, inner = model.device, model

        def forward(self, **given):
            logits = self.inner(**given).logits
            logits[..., ruled_out] = -torch.inf
            return SimpleNamespace(logits=logits)

    found = score(Never(), never, pad=0, batch_size=4, moments=True)
    assert len(never) > 3 and np.isfinite(found.mean).all() and np.isfinite(found.variance).all()

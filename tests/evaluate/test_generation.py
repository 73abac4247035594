"""Greedy generation against the model called once per token, without cache, padding or batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clue.data.encoding import encode
from clue.data.records import read
from clue.evaluate.generation import _decode, contains, equals, generate, nearest, rouge_l_recall
from tests.families import VARIANTS, tiny


@torch.no_grad()
def one_token_at_a_time(model, tokenizer, prompt, limit):
    ids = prompt.tolist()
    while len(ids) < len(prompt) + limit:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_equals_one_token_at_a_time_without_cache(model, tokenizer, forget, retain, batch_size):
    examples = encode(forget, tokenizer) + encode(retain, tokenizer)
    expected = [one_token_at_a_time(model, tokenizer, e.input_ids[:e.answer_start], 12) for e in examples[:-1]]
    text = examples[-1].input_ids  # plain text: the first half is the prompt
    expected.append(one_token_at_a_time(model, tokenizer, text[:len(text) // 2], 12))
    assert generate(model, tokenizer, examples, pad=0, batch_size=batch_size, max_new_tokens=12) == expected
    assert len(set(expected)) > 3


def test_the_models_own_generation_settings_do_not_leak_in_and_survive(model, tokenizer, forget):
    examples = encode(forget, tokenizer)
    expected = generate(model, tokenizer, examples, pad=0, batch_size=4, max_new_tokens=8)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=6)
    model.train()
    assert generate(model, tokenizer, examples, pad=0, batch_size=4, max_new_tokens=8) == expected
    assert model.generation_config is own and own.repetition_penalty == 3.0 and model.training


def test_an_answer_ends_at_the_tokenizers_end_token_and_at_the_models(model, tokenizer, forget):
    examples = encode(forget, tokenizer)
    expected = generate(model, tokenizer, examples, pad=0, batch_size=4, max_new_tokens=40)
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, examples, pad=0, batch_size=4, max_new_tokens=40) == expected
    word = next(answer for answer in expected if answer).split()[0]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(word)]
    said = [answer.split() for answer in expected]
    assert generate(model, tokenizer, examples, pad=0, batch_size=4, max_new_tokens=40) == [
        " ".join(words[:words.index(word) + 1] if word in words else words) for words in said]


def test_answers_end_at_the_context_and_an_empty_list_is_fine(model, tokenizer, forget):
    example = encode(read([("mira " * 44 + "tea", "baker")], "long"), tokenizer)
    answer = generate(model, tokenizer, example, pad=0, batch_size=1, max_new_tokens=200)[0]
    assert len(answer.split()) <= 48 - 45
    assert generate(model, tokenizer, [], pad=0, batch_size=1, max_new_tokens=5) == []


def longest_common_subsequence(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common_subsequence(a[1:], b[1:])
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


def test_rouge_recall_is_the_longest_common_subsequence_over_the_reference():
    pairs = [("in the old town", "the town in old"), ("baker", "a baker in rome"), ("in York by the sea", ""),
             ("chess player", "Chess, player!")]
    expected = [longest_common_subsequence(r.lower().split(), g.lower().replace(",", "").replace("!", "").split())
                / len(r.split()) for r, g in pairs]
    np.testing.assert_allclose(rouge_l_recall(*zip(*pairs, strict=True)), expected)
    assert rouge_l_recall(["bakers"], ["baker"])[0] == 1.0  # the stemmer is on
    assert np.isnan(rouge_l_recall(["\u4f60\u597d"], ["\u4f60\u597d"])[0])  # no word of a-z or 0-9: unknown, not 0


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_family_says_in_a_batch_what_it_says_alone(name):
    """Left padding, cache, positions and shrinking batches, against one forward pass per token over its own prefix."""
    model = tiny(name, torch.float32)  # in float64 transformers masks some families with minus infinity, which gives nan
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 13, n) for n in (7, 2, 5, 1)]
    limits, stop = [6, 9, 3, 8], {2, 5}
    expected = []
    with torch.no_grad():
        for prompt, limit in zip(prompts, limits, strict=True):
            ids = prompt.tolist()
            while len(ids) < len(prompt) + limit and not (len(ids) > len(prompt) and ids[-1] in stop):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            expected.append(ids[len(prompt):])
    with torch.no_grad():
        assert _decode(model, prompts, limits, stop, pad=0) == expected


def test_text_and_meaning_are_compared_as_they_are_defined():
    true, said = ["In  York", "baker", "tea", " "], ["she lives in york today", "Baker", "coffee", ""]
    assert contains(true, said).tolist() == [True, True, False, False]  # no text: in no answer, not in every one
    assert equals(true, said).tolist() == [False, True, False, False]
    places = {"york": (1, 0), "rome": (0, 1), "oslo": (1, 1), "yorkshire": (3, 0.1), "": (0, 0)}
    near = nearest(["yorkshire", "oslo", "rome", ""], ["york"] * 4, [["rome", "oslo"], ["rome"], ["oslo", "rome"], ["rome"]],
                   lambda texts: [places[text] for text in texts])
    assert near.tolist() == [True, True, False, True]  # as near as a wrong one is near enough

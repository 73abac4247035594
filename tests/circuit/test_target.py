"""The target of every pair, against its definition one token at a time; and batches that lose no pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clue.circuit.target import Prompts, batches
from tests.circuit.test_attribution import make_pairs

PAIRS = make_pairs([[1, 5, 7, 9, 4, 3], [1, 8, 6, 3], [2, 2, 2, 6, 1]], [[1, 6, 8, 9, 4, 3], [1, 8, 5, 3], [2, 2, 3, 6, 1]],
                   [4, 3, 1])


@pytest.mark.parametrize("kind", ["margin", "logprob"])
def test_values_are_the_mean_over_each_pairs_own_answer(kind):
    torch.manual_seed(0)
    prompts = Prompts.of(PAIRS, np.arange(3), torch.device("cpu"))
    whole, away = torch.randn(2, 3, 6, 10, dtype=torch.float64)  # logits everywhere, of this run and the corrupted one
    contrast = prompts.contrast(away[:, prompts.positions])
    found = prompts.values(kind, whole[:, prompts.positions], contrast)
    for i, (clean, start) in enumerate(zip(PAIRS.clean, PAIRS.answer_start, strict=True)):
        terms = []
        for t in range(int(start), len(clean)):
            logits = whole[i, t - 1]
            other = logits[away[i, t - 1].argmax()] if kind == "margin" else logits.logsumexp(-1)
            terms.append(float(logits[clean[t]] - other))
        assert float(found[i]) == pytest.approx(np.mean(terms))


def test_prompts_are_padded_on_the_right_and_only_answer_positions_kept():
    prompts = Prompts.of(PAIRS, np.array([1, 0]), torch.device("cpu"))
    assert prompts.clean.tolist() == [[1, 8, 6, 3, 0, 0], [1, 5, 7, 9, 4, 3]]
    assert prompts.corrupted[0].tolist() == [1, 8, 5, 3, 0, 0]
    assert prompts.mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert prompts.positions.tolist() == [2, 3, 4]
    assert prompts.weight.tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    assert prompts.answer[prompts.weight > 0].tolist() == [3, 4, 3]


def test_a_pair_is_informative_if_its_top_token_changes_in_the_answer():
    prompts = Prompts.of(PAIRS, np.array([0, 1]), torch.device("cpu"))
    contrast = prompts.answer.clone()
    contrast[1, 1:] += 1  # beyond the second pair's answer
    assert prompts.informative(contrast).tolist() == [False, False]
    contrast[0, -1] += 1
    assert prompts.informative(contrast).tolist() == [True, False]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_hold_every_pair_once_and_like_lengths_together(lengths, size):
    rows = [[0] * length for length in lengths]
    found = batches(make_pairs(rows, rows, [1] * len(rows)), size)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(rows)))
    assert all(len(chosen) == size for chosen in found[:-1])
    assert np.all(np.diff([lengths[i] for chosen in found for i in chosen]) >= 0)
    parted = batches(make_pairs(rows, rows, [1] * len(rows)), size, apart=5)
    assert np.concatenate(parted).tolist() == np.concatenate(found).tolist()
    assert all(len({lengths[i] > 5 for i in chosen}) == 1 for chosen in parted)
    assert len(parted) <= len(found) + 1

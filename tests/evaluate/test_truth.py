"""Truth ratio, choice, forget quality: numbers worked out by hand, and properties."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.errors import ClueError
from clue.evaluate import Evaluation, SetResult
from clue.evaluate.memorization import TokenScores
from clue.evaluate.truth import choice, choice_probability, forget_quality, indistinct, log_truth_ratio, truthful


def answers(*records):
    """Scores of answers given as the probabilities of their tokens."""
    log_p = np.log([p for record in records for p in record])
    return TokenScores(log_p, np.zeros(len(log_p), bool), np.cumsum([0, *map(len, records)]))


RIGHT = answers([0.5, 0.5], [0.25])  # length-normalised 1/2 and 1/4
WRONG = answers([0.25], [0.5, 0.125], [0.25, 1.0])  # 1/4, 1/4 and 1/2
OWNER = np.array([0, 0, 1])


def test_the_truth_ratio_by_hand():
    np.testing.assert_allclose(np.exp(log_truth_ratio(RIGHT, WRONG, OWNER, "geometric")), [0.5, 2])
    uneven = answers([0.125], [0.5])  # of one record: geometric mean 1/4, arithmetic mean 5/16
    one = answers([0.5])
    both = np.array([0, 0])
    assert math.exp(log_truth_ratio(one, uneven, both, "geometric")[0]) == pytest.approx(1 / 2)
    assert math.exp(log_truth_ratio(one, uneven, both, "arithmetic")[0]) == pytest.approx(5 / 8)
    ratio = np.log([0.5, 2, 1])
    np.testing.assert_allclose(indistinct(ratio), [0.5, 0.5, 1])  # higher: less is told apart
    np.testing.assert_allclose(truthful(ratio), [0.5, 0, 0])  # higher: more is known
    assert np.isfinite(indistinct(np.array([800.0, -800.0]))).all()


def test_choice_by_hand():
    # Record 0: right 1/4 in two tokens, wrong 1/4 in one and 1/16 in two. Record 1: right 1/4, wrong 1/4 in two tokens.
    assert choice(RIGHT, WRONG, OWNER, "raw").tolist() == [False, False]  # ties
    assert choice(RIGHT, WRONG, OWNER, "token").tolist() == [True, False]
    bytes_of = np.array([4.0, 4.0]), np.array([2.0, 4.0, 2.0])
    assert choice(RIGHT, WRONG, OWNER, "byte", bytes_of).tolist() == [True, True]
    np.testing.assert_allclose(choice_probability(RIGHT, WRONG, OWNER), [0.5 / (0.5 + 0.25 + 0.25), 0.25 / 0.75])


def test_scores_without_the_last_token():
    scores = answers([0.5, 0.1], [0.25], [0.5, 0.25, 0.125]).without_last()
    np.testing.assert_allclose(np.exp(scores.log_prob), [0.5, 0.25, 0.5, 0.25])  # a record of one token keeps it
    assert scores.start.tolist() == [0, 1, 2, 4]
    chosen = answers([0.5, 0.1], [0.25], [0.5]).select(np.array([2, 0]))
    np.testing.assert_allclose(np.exp(chosen.log_prob), [0.5, 0.5, 0.1])
    assert chosen.start.tolist() == [0, 1, 3]


def with_ratios(values, **settings):
    found = SetResult("forget", "forget", len(values), "0" * 64, 0, 0, 0, 0, 0)
    return Evaluation({"forget": found}, records={"forget": {"log_truth_ratio": tuple(values)}},
                      settings={"evaluate": settings})


values = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=6)


@given(values, values)
def test_forget_quality_is_the_share_of_splits_at_least_as_far_apart(mine, theirs):
    """The p value by its definition: all ways to deal the pooled values to two groups of these sizes, all equally likely."""
    mine = [v + 0.01 * i for i, v in enumerate(mine)]  # no ties, for which the distribution would not be exact
    theirs = [v + 0.001 * (i + 1) for i, v in enumerate(theirs)]

    def distance(a, b):
        return max(abs(np.mean(np.array(a) <= x) - np.mean(np.array(b) <= x)) for x in [*a, *b])

    pooled = mine + theirs
    places = range(len(pooled))
    apart = [distance([pooled[i] for i in some], [pooled[i] for i in places if i not in some])
             for some in combinations(places, len(mine))]
    expected = np.mean(np.array(apart) >= distance(mine, theirs) - 1e-12)
    assert forget_quality(with_ratios(mine), with_ratios(theirs)) == pytest.approx(expected, abs=1e-9)


def test_forget_quality_does_not_depend_on_the_scale_and_falls_with_distance():
    generator = np.random.default_rng(0)
    gold = generator.normal(size=200)
    near, far = generator.normal(size=200), generator.normal(1, 1, 200)
    assert forget_quality(with_ratios(gold), with_ratios(gold)) == 1.0
    close = forget_quality(with_ratios(near), with_ratios(gold))
    assert close > 0.05 > 1e-6 > forget_quality(with_ratios(far), with_ratios(gold))
    assert forget_quality(with_ratios(np.exp(near)), with_ratios(np.exp(gold))) == pytest.approx(close)


@pytest.mark.parametrize(("name", "mine", "theirs"), [("count_eos", True, False), ("truth_mean", "geometric", "arithmetic")])
def test_ratios_of_other_definitions_are_not_compared(name, mine, theirs):
    assert forget_quality(with_ratios([0.0, 1.0], **{name: mine}), with_ratios([0.0, 1.0], **{name: mine})) == 1.0
    with pytest.raises(ClueError, match=f"forget quality: {name} was {mine} for one evaluation and {theirs}"):
        forget_quality(with_ratios([0.0, 1.0], **{name: mine}), with_ratios([0.0, 1.0], **{name: theirs}))

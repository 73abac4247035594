"""Attacks against scikit-learn, brute force and cases whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from clue.errors import ModelError
from clue.evaluate.evaluation import Evaluation, SetResult, privleak
from clue.evaluate.memorization import TokenScores
from clue.evaluate.privacy import (
    attack,
    auc,
    auc_interval,
    corners,
    loss_score,
    min_k_plus_score,
    min_k_score,
    reference_score,
    roc,
    tpr_at,
)

# Few distinct values, so that ties are the rule.
side = st.lists(st.integers(-4, 4).map(lambda i: i / 2), min_size=1, max_size=30)


@given(side, side)
def test_auc_and_roc_equal_scikit_learn_and_the_definition(members, others):
    truth, scores = [1] * len(members) + [0] * len(others), members + others
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    wins = [(m > o) + (m == o) / 2 for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(wins), abs=1e-12)
    fpr, tpr = roc(members, others)
    expected = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0])
    np.testing.assert_allclose(tpr, expected[1])
    for curve in ((fpr, tpr), corners(fpr, tpr)):
        assert np.trapezoid(curve[1], curve[0]) == pytest.approx(auc(members, others), abs=1e-12)


@given(side, side, st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]))
@example([*range(200)], [*range(200)], 0.01)  # on the diagonal, of which the drawn curve keeps the two ends
@example([*range(200)], [*range(200)], 0.05)
def test_tpr_is_the_best_over_all_thresholds(members, others, most):
    found = attack(members, others, resamples=0, seed=0)
    best = max(np.mean(np.array(members) >= t) for t in [*members, *others, np.inf]
               if np.mean(np.array(others) >= t) <= most)
    assert tpr_at(*roc(members, others), most) == pytest.approx(best)
    if most in (0.01, 0.05):
        assert {0.01: found.tpr_at_1, 0.05: found.tpr_at_5}[most] == pytest.approx(best)


def test_direction_members_that_are_recognised_give_one():
    assert auc([-0.1, -0.2], [-5, -6]) == 1.0
    assert auc([-5, -6], [-0.1, -0.2]) == 0.0
    assert auc([1, 1], [1, 1, 1]) == 0.5
    found = attack([3, 4], [1, 2], resamples=50, seed=0)
    assert (found.auc, found.tpr_at_1, found.low, found.high) == (1.0, 1.0, 1.0, 1.0)
    assert found.fpr == (0.0, 0.0, 1.0) and found.tpr == (0.0, 1.0, 1.0)


def test_bootstrap_equals_resampling_by_hand_and_is_seeded():
    generator = np.random.default_rng(3)
    members, others = generator.normal(0.7, 1, 40).round(1), generator.normal(0, 1, 30).round(1)
    low, high = auc_interval(members, others, 400, seed=5)
    again = np.random.default_rng(5)
    by_hand = []
    for _ in range(400):
        m = again.choice(members, len(members))
        o = again.choice(others, len(others))
        by_hand.append(auc(m, o))
    assert (low, high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])), abs=1e-12)
    assert low < auc(members, others) < high
    assert auc_interval(members, others, 400, seed=5) == (low, high) != auc_interval(members, others, 400, seed=6)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(100):
        low, high = auc_interval(generator.normal(1, 1, 40), generator.normal(0, 1, 40), 200, seed=i)
        covered += low <= 0.7602 <= high  # the AUC of two unit normals one apart: Phi(1 / sqrt 2)
    assert 88 <= covered <= 99


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_no_attack(bad):
    """Sorted last, a NaN would pass for a perfect attack."""
    for sides in (([0.1, bad], [0.2]), ([0.1], [bad, 0.3])):
        with pytest.raises(ModelError, match="scores that are not numbers: the model's weights are damaged"):
            attack(*sides, resamples=0, seed=0)


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=12), min_size=1, max_size=5), st.floats(0.05, 1.0))
@example([[-float(i) for i in range(100)]], 0.29)  # of which 100 are 28.999... in binary
def test_min_k_equals_sorting_each_record(records, k):
    scores = TokenScores(np.concatenate([np.array(r) for r in records]), np.zeros(sum(map(len, records)), bool),
                         np.cumsum([0, *map(len, records)]))
    expected = [np.mean(sorted(r)[:max(1, int(k * len(r) * (1 + 1e-12)))]) for r in records]
    np.testing.assert_allclose(min_k_score(scores, k), expected, atol=1e-9)
    np.testing.assert_allclose(min_k_score(scores, 1.0), loss_score(scores), atol=1e-9)


def test_a_record_that_a_reference_model_finds_as_likely_counts_less():
    mine, theirs = (TokenScores(np.array(p), np.zeros(2, bool), np.array([0, 2])) for p in ([-1.0, -3.0], [-4.0, -4.0]))
    assert reference_score(mine, theirs).tolist() == [2.0]


def test_where_the_model_is_certain_the_deviation_is_a_thousandth():
    scores = TokenScores(np.array([-0.5]), np.zeros(1, bool), np.array([0, 1]), np.array([0.0]), np.array([0.0]))
    assert min_k_plus_score(scores, 1.0) == pytest.approx([-500.0])


def test_privleak_is_zero_for_the_gold_model_itself_and_signed():
    def with_auc(value):
        members = [1.0] * round(value * 100) + [-1.0] * round((1 - value) * 100)
        return Evaluation({}, {"min_k": attack(members, [0.0], resamples=0, seed=0)})

    gold = with_auc(0.5)
    assert privleak(gold, gold) == 0
    assert privleak(with_auc(1.0), gold) == pytest.approx(-100)  # members stand out: under-unlearned
    assert privleak(with_auc(0.0), gold) == pytest.approx(100)  # pushed below unseen records: over-unlearned
    assert privleak(with_auc(0.8), with_auc(0.6)) == pytest.approx((0.2 - 0.4) / 0.4 * 100)
    assert privleak(gold, with_auc(1.0)) is None
    assert privleak(gold, gold, "loss") is None

    def measured(holdout="h", *, forget="f", members=None, **settings):
        """As ``gold``, of these records, with these settings."""
        detail = {name: SetResult(name, name, 4, sha, 1.0, 1.0, 1.0, 0.0, 0.0)
                  for name, sha in (("forget", forget), ("holdout", holdout), ("members", members)) if sha}
        return replace(gold, detail=detail, settings={"evaluate": {"min_k": 0.2, "count_eos": False} | settings, "data": {}})

    assert privleak(measured(), measured(truth_mean="geometric")) == 0
    # Members of their own are what was attacked, whatever was forgotten.
    assert privleak(measured(members="m"), measured(members="m", forget="x")) == 0
    assert privleak(measured(members="m"), measured(members="x")) is None
    for other in (measured(holdout="x"), measured(min_k=0.4), measured(count_eos=True),
                  replace(measured(), settings=measured().settings | {"data": {"append_eos": False}})):
        assert privleak(measured(), other) is None

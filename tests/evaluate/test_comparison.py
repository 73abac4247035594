"""Comparisons: the point a cell is read at, and the statistics over seeds, against slow and obvious ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.evaluate import Evaluation, SetResult
from clue.evaluate.comparison import (
    HEADLINE,
    VALIDATION,
    Cell,
    Point,
    difference,
    grouped,
    mean_over,
    measures_of,
    summarise,
    validation_of,
)
from clue.evaluate.privacy import attack


def point(lr: float, steps: int, forgotten: float, validation: float, retain: float = 0.5, **more: float) -> Point:
    return Point(lr, steps, forgotten, (validation, 0.5), {HEADLINE: retain, **more}, float(steps))


def cell(*points: Point, row: str = "clue", seed: int = 0, objective: str = "npo", benchmark: str = "b") -> Cell:
    return Cell(benchmark, seed, objective, row, 20, 100, points, {}, 1.0, 1000)


def test_a_level_is_read_at_the_first_look_above_it_and_validation_chooses_the_learning_rate() -> None:
    found = cell(point(1, 10, 0.55, 0.9, retain=0.1), point(1, 30, 1.0, 0.7, retain=0.9),
                 point(2, 5, 0.8, 0.8, retain=0.2), point(2, 9, 1.0, 0.75, retain=0.3))
    assert found.at(0.5) == found.points[0]  # validation 0.9; its test measure is the worst
    assert found.at(0.8) == found.points[2]  # learning rate 1 is first above 0.8 at step 30, with 0.7
    assert found.at(1.0) == found.points[3]


def test_equal_validation_takes_probability_and_then_the_smaller_learning_rate() -> None:
    equal = cell(point(2, 5, 1.0, 0.8), point(1, 9, 1.0, 0.8))
    assert equal.at(1.0) == equal.points[1]
    likelier = cell(point(1, 5, 1.0, 0.8), Point(2, 9, 1.0, (0.8, 0.6), {HEADLINE: 0.0}, 1.0))
    assert likelier.at(1.0) == likelier.points[1]


def test_a_learning_rate_that_reaches_the_goal_goes_before_one_that_keeps_more() -> None:
    short, there = replace(point(1e-4, 50, 1.0, 0.99), at_goal=False), point(2e-4, 20, 1.0, 0.9)
    assert cell(short, there).at(1.0) == there
    assert cell(short, point(4e-4, 50, 0.9, 0.95)).at(1.0) == short


def test_a_cell_that_does_not_get_there_is_read_where_it_forgot_most() -> None:
    found = cell(point(1, 10, 0.6, 0.9), point(2, 10, 0.7, 0.1))
    assert found.at(0.9) == found.points[1]
    assert cell().at(0.9) is None


def test_cells_survive_json() -> None:
    found = cell(point(1, 10, 0.6, 0.9), point(2, 10, 0.7, 0.1))
    assert Cell.from_json(found.to_json()) == found


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.data())
def test_the_sign_flip_test_is_exact(values: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.floats(-1, 1), min_size=len(values), max_size=len(values)))
    found = difference(values, others)
    apart = [a - b for a, b in zip(values, others, strict=True)]
    as_far = [abs(sum(s * d for s, d in zip(signs, apart, strict=True))) >= abs(sum(apart)) - 1e-9
              for signs in product((1, -1), repeat=len(apart))]
    assert found.p == pytest.approx(np.mean(as_far))
    assert found.p is not None and found.p >= 2 / 2 ** len(values) - 1e-12
    assert found.mean == pytest.approx(np.mean(apart))


def test_intervals() -> None:
    assert (mean_over([0.3]).low, mean_over([0.3]).n, difference([0.3], [0.1]).p) == (None, 1, None)
    values = np.random.default_rng(0).normal(size=400)
    found = mean_over(values.tolist())
    error = values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    apart = difference((values + 1).tolist(), values.tolist())
    assert (apart.mean, apart.low, apart.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert apart.p == pytest.approx(1e-4)


def test_differences_are_taken_pair_by_pair() -> None:
    """Worlds differ far more than methods do: only pairs show that one method is always better."""
    cells = [cell(point(1, 10, 1.0, 0.9, retain=base + better), row=row, seed=seed)
             for row, better in (("clue", 0.05), ("random", 0.0)) for seed, base in enumerate((0.1, 0.5, 0.9))]
    ours, theirs = summarise(cells, 1.0, (1.0,))
    assert ours.against is None and theirs.against is not None
    apart = theirs.against[HEADLINE]
    assert (apart.mean, apart.low, apart.high) == pytest.approx((-0.05, -0.05, -0.05))
    assert apart.p == 0.25  # of eight ways to turn three differences around, two are as far from zero
    assert theirs.measures[HEADLINE].mean == pytest.approx(0.5)


def test_rows_that_lose_or_diverge_stay() -> None:
    cells = [cell(point(1, 10, 0.5, 0.9, retain=0.8), point(1, 20, 1.0, 0.9, retain=0.7)),
             cell(row="bad"), cell(point(1, 40, 0.4, 0.9, retain=0.1), row="slow")]
    clue, bad, slow = summarise(cells, 1.0, (0.5, 1.0))
    assert [(r.row, r.reached, r.diverged, len(r.seeds)) for r in (clue, bad, slow)] == [
        ("clue", 1, 0, 1), ("bad", 0, 1, 0), ("slow", 0, 0, 1)]
    assert clue.curve == ((0.5, 0.8), (1.0, 0.7)) and bad.curve == ()
    assert np.isnan(bad.forgotten) and slow.forgotten == 0.4
    assert clue.at_end == 0  # one learning rate is no grid
    assert (clue.train_seconds, clue.tuning_seconds, clue.share) == (20.0, 20.0, 0.2)
    cells = [cell(point(1, 20, 1.0, 0.9), point(2, 10, 0.1, 0.9), point(2, 30, 0.4, 0.9), seed=seed) for seed in (0, 1)]
    tuned, = summarise(cells, 1.0, (1.0,))
    assert (tuned.train_seconds, tuned.tuning_seconds) == (20.0, 50.0)  # per seed, at all learning rates


def test_a_learning_rate_at_an_end_of_the_grid_is_told() -> None:
    ends = {1: 1, 2: 0, 3: 1}
    for lr in (1.0, 2.0, 3.0):
        found = cell(*(point(each, 10, 1.0, 0.9 if each == lr else 0.1) for each in (1.0, 2.0, 3.0)))
        row, = summarise([found], 1.0, (1.0,))
        assert row.lrs == (lr,) and row.at_end == ends[int(lr)]
    # One that diverged was tried too.
    row, = summarise([replace(found, failed={"4.0": "nan"})], 1.0, (1.0,))
    assert row.lrs == (3.0,) and row.at_end == 0


def test_groups_hold_their_own_seeds_references() -> None:
    cells = [cell(point(1, 10, 1.0, 0.9), seed=seed, objective=objective, benchmark=benchmark)
             for benchmark in ("b", "c") for objective in ("npo", "ga") for seed in (0, 1)]
    references = {f"{b}-{s}": {"before": {HEADLINE: value + s}} for b, value in (("b", 0.0), ("c", 10.0)) for s in (0, 1)}
    found = grouped(cells, references, 1.0, (1.0,))
    assert [(g.benchmark, g.objective) for g in found] == [("b", "npo"), ("b", "ga"), ("c", "npo"), ("c", "ga")]
    assert [g.reference["before"][HEADLINE] for g in found] == [0.5, 0.5, 10.5, 10.5]


def test_validation_records_are_no_measure() -> None:
    def result(purpose: str, accuracy: float) -> SetResult:
        return SetResult(purpose, "own", 4, "0" * 64, accuracy, 0.5, accuracy / 2, 1.0, 0.5)

    detail = {"forget": result("forget", 0.1), "retain": result("retain", 0.9), "addition": result("skill", 0.4),
              "ioi": result("skill", 0.8), f"{VALIDATION}retain": result("retain", 0.6),
              f"{VALIDATION}addition": result("retain", 0.2)}
    found = Evaluation(detail, {"loss": attack([1.0, 2.0], [0.0, 3.0], resamples=0, seed=0)})
    measures = measures_of(found)
    assert validation_of(found) == (pytest.approx(0.4), pytest.approx(0.2))
    assert not any(key.startswith(VALIDATION) for key in measures)
    assert measures["skills"] == pytest.approx(0.6)
    assert (measures["forget.accuracy"], measures["retain.probability"]) == (0.1, 0.45)
    assert "mia.loss.auc" in measures


def test_forget_quality_is_a_measure_where_gold_can_be_compared_with() -> None:
    def evaluation(*ratios: float) -> Evaluation:
        sets = {name: SetResult(name, name, len(ratios), "0" * 64, 0.0, 0.5, 0.5, 1.0, 0.5) for name in ("forget", "retain")}
        return Evaluation(sets, records={"forget": {"log_truth_ratio": ratios}} if ratios else {}, settings={"evaluate": {}})

    found, gold = evaluation(0.0, 1.0, 2.0, 3.0), evaluation(4.0, 5.0, 6.0, 7.0)
    assert measures_of(found, gold)["forget_quality"] == found.forget_quality(gold) == pytest.approx(2 / 70)
    assert measures_of(gold, gold)["forget_quality"] == 1.0
    for other in (None, evaluation()):
        assert "forget_quality" not in measures_of(found, other)
    assert "model_utility" not in measures_of(found, gold)

"""Comparison: what localizations keep, at the same forgetting.

A *cell* is one localization with one objective on one benchmark at one seed. It was tuned: trained once per learning rate
of a grid that is the same for every cell, and looked at every few steps. A look says how much is forgotten, the share of
forget records that count as forgotten (:attr:`clue.config.UnlearnSettings.floor`), and where that first reaches one of a
few levels the model is measured, which makes a *point*. So the points of one level are at matched forgetting: the first
look at or above it.

A cell's value at a level is that of one point. Of the learning rates that reach the level it is the one that keeps most on
validation records (:attr:`Point.validation`), the smaller where that is equal; test records decide nothing. A cell none of
whose learning rates reaches the level stays in the comparison with the point that forgot most, and says so.

Over seeds there are the mean with a bootstrap interval, and the difference to CLUE pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from .evaluation import Evaluation

#: Sets whose name begins so are validation records: they choose learning rates and are reported nowhere.
VALIDATION = "validation "
#: What a table shows of a model: the key of a measure, and its title.
HEADLINES = {
    "forget.accuracy": "forget", "forget_paraphrase.accuracy": "paraphrase", "forget.probability": "probability",
    "retain.accuracy": "retain", "retain.probability": "retain prob",
    "retain_seen.accuracy": "retain seen", "skills": "skills", "mia.loss.auc": "MIA AUC",
    "model_utility": "utility", "forget_quality": "FQ",
    "relearned.probability": "relearned", "int4.probability": "4 bits",
}
#: The measure in which CLUE is compared with the others.
HEADLINE = "retain.accuracy"
_RESAMPLES = 10_000
#: Up to this many seeds every way of turning differences around is tried.
_EXACT = 14


@dataclass(frozen=True)
class Point:
    """A model where it first reached a level of forgetting, or where its training ended.

    Attributes:
        lr: learning rate.
        steps: optimizer steps taken.
        forgotten: share of the forget records that count as forgotten.
        validation: mean over validation sets of (accuracy, probability), compared in this order.
        measures: everything measured on test records, by ``set.field``; see :func:`measures_of`.
        cpu_seconds: processor time of training so far, without looks and measurements.
        at_goal: whether its objective's goal beyond forgetting, where it has one, was reached before the steps ran out; a
            learning rate with which it was goes before one with which it was not.
    """

    lr: float
    steps: int
    forgotten: float
    validation: tuple[float, float]
    measures: Mapping[str, float]
    cpu_seconds: float
    at_goal: bool = True


@dataclass(frozen=True)
class Cell:
    """One localization with one objective on one benchmark at one seed.

    Attributes:
        benchmark, seed, objective: see :class:`Point` for the rest.
        row: name of the localization, and of the step where it is not its own (``wagle+metric``).
        weights, parameters: how many weights may move, and how many the model has.
        points: of all learning rates.
        failed: learning rates at which training diverged, with the reason; all of them where no weights could be chosen.
        localize_seconds: processor time of choosing the weights.
        peak_bytes: most memory the process held while choosing and training; None where the system does not say.
    """

    benchmark: str
    seed: int
    objective: str
    row: str
    weights: int
    parameters: int
    points: tuple[Point, ...]
    failed: Mapping[str, str]
    localize_seconds: float
    peak_bytes: int | None

    def at(self, level: float) -> Point | None:
        """The cell's point at a level of forgetting; None where every learning rate diverged."""
        first: dict[float, Point] = {}
        for point in self.points:
            if point.at_goal and point.forgotten >= level and (point.lr not in first or point.steps < first[point.lr].steps):
                first[point.lr] = point
        if first:
            return max(first.values(), key=lambda point: (point.validation, -point.lr))
        return max(self.points, key=lambda point: (point.forgotten, point.validation, -point.lr), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the fields in order."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of :meth:`to_json`."""
        points = tuple(Point(**{**point, "validation": tuple(point["validation"])}) for point in values["points"])
        return cls(**{**values, "points": points})


def measures_of(evaluation: Evaluation, gold: Evaluation | None = None) -> dict[str, float]:
    """Every number of an evaluation: ``forget.accuracy``, ``mia.loss.auc`` ..., and ``skills``, their mean accuracy.

    Where it was measured there is ``model_utility``, and where it can be compared with ``gold``, ``forget_quality``.
    Validation sets are left out.
    """
    found: dict[str, float] = {}
    for name, result in evaluation.detail.items():
        if not name.startswith(VALIDATION):
            found |= {f"{name}.{key}": value for key, value in asdict(result).items() if isinstance(value, float)}
    for name, attack in evaluation.mia.items():
        found |= {f"mia.{name}.{key}": value for key, value in attack.to_json().items() if isinstance(value, float)}
    if evaluation.skills:
        found["skills"] = float(np.mean(list(evaluation.skills.values())))
    whole = {"model_utility": evaluation.model_utility,
             "forget_quality": None if gold is None else evaluation.forget_quality(gold)}
    return found | {name: float(value) for name, value in whole.items() if value is not None}


def validation_of(evaluation: Evaluation) -> tuple[float, float]:
    """Accuracy and probability, each the mean over validation sets."""
    found = [result for name, result in evaluation.detail.items() if name.startswith(VALIDATION)]
    return float(np.mean([r.accuracy for r in found])), float(np.mean([r.probability for r in found]))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds: with its 95% bootstrap interval, None from fewer than two seeds; ``p`` for differences."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None


def mean_over(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean with a percentile bootstrap interval: seeds are drawn again with replacement, 10,000 times."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), None, None, len(array))
    rng = np.random.Generator(np.random.PCG64(seed))
    means = array[rng.integers(len(array), size=(_RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high), len(array))


def difference(values: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of the differences pair by pair, with its interval as :func:`mean_over` and the p value of a sign-flip test.

    The test (Fisher's randomisation) asks how often a mean at least as far from zero comes out when every difference may as
    well be turned around. Of n seeds there are 2^n such ways, so that no p below 2 / 2^n can come out: five seeds cannot
    give p < 0.05.
    """
    found = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    interval = mean_over(found.tolist(), seed=seed)
    n = len(found)
    if n < 2:
        return interval
    if n <= _EXACT:
        signs: npt.NDArray[np.float64] = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        rng = np.random.Generator(np.random.PCG64(seed))
        signs = np.concatenate([np.ones((1, n)), rng.choice((1.0, -1.0), size=(_RESAMPLES - 1, n))])
    means = np.abs(signs @ found) / n
    p = float(np.mean(means >= abs(found.mean()) - 1e-12))
    return Interval(interval.mean, interval.low, interval.high, n, p)


@dataclass(frozen=True)
class RowSummary:
    """One row of a comparison: a localization over its seeds.

    Attributes:
        row: its name.
        seeds: those behind the numbers, in order.
        reached: at how many of them the level was reached.
        diverged: at how many every learning rate diverged; these have no numbers.
        share: mean share of the model's weights that may move.
        forgotten, steps, lrs: of the points compared; ``lrs`` by seed.
        at_end: at how many seeds the learning rate was the smallest or the largest tried, so that a wider grid may find a
            better one.
        measures: by key, over seeds.
        against: by key, differences to CLUE over the seeds both have; None for CLUE itself or where it is missing.
        localize_seconds, train_seconds: mean processor time of choosing the weights and of training the point compared.
        tuning_seconds: of training at all learning rates.
        peak_bytes: largest over seeds.
        curve: (forgotten, headline measure) means over seeds, one for each level.
    """

    row: str
    seeds: tuple[int, ...]
    reached: int
    diverged: int
    share: float
    weights: float
    forgotten: float
    steps: float
    lrs: tuple[float, ...]
    at_end: int
    measures: Mapping[str, Interval]
    against: Mapping[str, Interval] | None
    localize_seconds: float
    train_seconds: float
    tuning_seconds: float
    peak_bytes: int | None
    curve: tuple[tuple[float, float], ...]

    @property
    def failure(self) -> str:
        """Why a row without seeds has no numbers."""
        return "diverged" if self.weights else "no plan"


def summarise(cells: Sequence[Cell], level: float, levels: Sequence[float], *, reference: str = "clue") -> list[RowSummary]:
    """One summary per row, in the order of the cells, which are of one benchmark and objective."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    by_row = {row: {cell.seed: cell for cell in cells if cell.row == row} for row in rows}
    chosen = {row: {seed: point for seed, cell in found.items() if (point := cell.at(level)) is not None}
              for row, found in by_row.items()}
    return [_summary(row, by_row[row], chosen[row], None if row == reference else chosen.get(reference), level, levels)
            for row in rows]


def _summary(row: str, cells: Mapping[int, Cell], points: Mapping[int, Point], other: Mapping[int, Point] | None,
             level: float, levels: Sequence[float]) -> RowSummary:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else float("nan")

    keys = [key for key in next(iter(points.values())).measures] if points else []
    keys = [key for key in keys if all(key in point.measures for point in points.values())]
    against = None
    shared = [seed for seed in points if other is not None and seed in other]
    if other is not None and shared:
        against = {key: difference([points[s].measures[key] for s in shared], [other[s].measures[key] for s in shared])
                   for key in keys if all(key in other[s].measures for s in shared)}
    curve = []
    for each in sorted({*levels}):
        found = [point for cell in cells.values() if (point := cell.at(each)) is not None]
        if found:
            curve.append((mean([p.forgotten for p in found]), mean([p.measures[HEADLINE] for p in found])))
    last = {(seed, point.lr): point for seed, cell in cells.items()
            for point in sorted(cell.points, key=lambda point: point.steps)}
    tried = {seed: sorted({p.lr for p in cell.points} | {float(lr) for lr in cell.failed}) for seed, cell in cells.items()}
    at_end = sum(len(tried[seed]) > 1 and point.lr in (tried[seed][0], tried[seed][-1]) for seed, point in points.items())
    peaks = [cell.peak_bytes for cell in cells.values() if cell.peak_bytes is not None]
    return RowSummary(
        row=row, seeds=tuple(points), reached=sum(p.forgotten >= level for p in points.values()),
        diverged=len(cells) - len(points), share=mean([c.weights / c.parameters for c in cells.values()]),
        weights=mean([c.weights for c in cells.values()]), forgotten=mean([p.forgotten for p in points.values()]),
        steps=mean([p.steps for p in points.values()]), lrs=tuple(p.lr for p in points.values()), at_end=at_end,
        measures={key: mean_over([p.measures[key] for p in points.values()]) for key in keys}, against=against,
        localize_seconds=mean([c.localize_seconds for c in cells.values()]),
        train_seconds=mean([p.cpu_seconds for p in points.values()]),
        tuning_seconds=sum(p.cpu_seconds for p in last.values()) / len(cells),
        peak_bytes=max(peaks, default=None), curve=tuple(curve))


@dataclass(frozen=True)
class Group:
    """The rows of one benchmark and objective; ``reference``: measures of ``before`` and ``gold``, means over seeds."""

    benchmark: str
    objective: str
    rows: tuple[RowSummary, ...]
    reference: Mapping[str, Mapping[str, float]]


def grouped(cells: Sequence[Cell], references: Mapping[str, Mapping[str, Mapping[str, float]]], level: float,
            levels: Sequence[float]) -> list[Group]:
    """Cells by benchmark and objective, in the order they come; ``references`` by ``benchmark-seed``."""
    found = []
    for benchmark, objective in dict.fromkeys((cell.benchmark, cell.objective) for cell in cells):
        own = [cell for cell in cells if (cell.benchmark, cell.objective) == (benchmark, objective)]
        models = [references[f"{benchmark}-{seed}"] for seed in dict.fromkeys(cell.seed for cell in own)]
        reference = {name: {key: float(np.mean([m[name][key] for m in models])) for key in models[0][name]
                            if all(key in m[name] for m in models)}
                     for name in models[0] if all(name in m for m in models)}
        found.append(Group(benchmark, objective, tuple(summarise(own, level, levels)), reference))
    return found

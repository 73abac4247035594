"""Compare: localizations, objectives and seeds on a benchmark, each tuned alike and read at the same forgetting.

What a cell is, how its learning rate is chosen and where it is read is defined in :mod:`clue.evaluate.comparison`. Here the
cells are made, one after the other, in a run directory: plans and cells are stages, so a comparison that was killed goes on
with the next cell, and one that is asked for more localizations, objectives or seeds makes the missing cells alone.

Every fifth retain record is held back for validation, whole subjects where records have them: neither localization nor
unlearning sees these, and they alone choose learning rates. Test records are never looked at for a choice.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pipeline
from .config import BASELINES, Settings
from .data.held_back import hold_back
from .data.records import RecordSet
from .errors import ClueError, ModelError, PlanError, RunError
from .meter import Meter
from .plan import Plan
from .provenance import fingerprint
from .run_directory import Run, write_json

if TYPE_CHECKING:
    from .evaluate import Evaluation, EvaluationSets
    from .evaluate.comparison import Cell, Point

#: Share of the weights a baseline may move where there is no plan of CLUE's to match.
RATIO = 0.2


@dataclass(frozen=True)
class Row:
    """A way to choose weights, and whether their step is taken in the retain metric.

    CLUE's own step is in the metric, a baseline's is plain; the other kind is written ``clue-metric``, ``wagle+metric``.
    """

    localization: str
    metric: bool

    @classmethod
    def of(cls, name: str) -> Row:
        """From its name; raises :class:`ClueError` for an unknown one."""
        match = re.fullmatch(r"(\w+)([+-]metric)?", name)
        if not match or match[1] not in ("clue", *BASELINES):
            raise ClueError(f"localization {name!r} is not one of clue, {', '.join(BASELINES)} (with +metric or -metric for"
                            " the other kind of step)")
        return cls(match[1], match[1] == "clue" if match[2] is None else match[2][0] == "+")

    @property
    def name(self) -> str:
        """The name that :meth:`of` reads."""
        own = self.localization == "clue"
        return self.localization + ("" if self.metric == own else "+metric" if self.metric else "-metric")


@dataclass(frozen=True)
class Task:
    """A benchmark at one seed.

    Attributes:
        benchmark, seed: which.
        load: a model that may be changed, and its tokenizer.
        gold: a model that never saw the forget set, to compare with, or its evaluation.
        forget: what to forget.
        retain: what localization and unlearning may see.
        sets: what models are measured on, validation sets among the retain sets.
        sha256: of all records, by name of their set.
        reference: a model for the attack of that name.
    """

    benchmark: str
    seed: int
    load: Callable[[], tuple[Any, Any]]
    gold: Callable[[], Any] | None
    forget: RecordSet
    retain: Mapping[str, RecordSet]
    sets: EvaluationSets
    sha256: Mapping[str, str] = field(default_factory=dict)
    reference: Callable[[], Any] | None = None

    @property
    def name(self) -> str:
        """Part of the names of folders."""
        return f"{self.benchmark}-{self.seed}"


@dataclass(frozen=True)
class Tuning:
    """What every cell is given: learning rates, and the levels of forgetting at which it is measured; with ``robustness``
    it is tried, at the last of them, to bring back what was forgotten."""

    lrs: tuple[float, ...]
    levels: tuple[float, ...]
    robustness: bool = False

    def __post_init__(self) -> None:
        if not self.lrs or not all(0 < lr < float("inf") for lr in self.lrs):
            raise ClueError("a comparison needs at least one learning rate, and all must be finite and greater than 0")
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise ClueError("the levels of forgetting must lie in (0, 1], and there must be at least one")


def validated(retain: Mapping[str, RecordSet], seed: int) -> tuple[dict[str, RecordSet], dict[str, RecordSet]]:
    """What may be seen of the retain sets, and validation sets under names that tell them from test sets
    (:func:`clue.data.held_back.hold_back`)."""
    from .evaluate.comparison import VALIDATION

    seen, held = hold_back(retain, seed)
    return seen, {f"{VALIDATION}{name}": records for name, records in held.items()}


def world_task(setting: str, seed: int, progress: pipeline.Progress) -> Task:
    """The embedded world; its models are trained once and kept in the user's cache."""
    from .data.world import build_world, cached_models
    from .evaluate import EvaluationSets

    world = build_world(setting, seed)
    kept: list[Any] = []

    def models() -> Any:
        def on_step(step: int, loss: float) -> None:
            if step % 100 == 0:
                progress(f"train      world-{setting} {seed}: step {step}, loss {loss:.3f}")

        if not kept:
            kept.extend(cached_models(world, seed=seed, on_step=on_step))
        return kept

    seen, held = validated({"retain": world.retain, **world.skills_train}, seed)
    sets = EvaluationSets(forget=world.forget, retain=world.retain_unseen, forget_paraphrase=world.forget_paraphrase,
                          retain_extra={"retain_seen": seen["retain"], "retain_paraphrase": world.retain_paraphrase, **held},
                          skills=world.skills, holdout=world.holdout)
    return Task(f"world-{setting}", seed, lambda: (copy.deepcopy(models()[0]), world.tokenizer), lambda: models()[1],
                world.forget, seen, sets, {name: records.sha256 for name, records in world.sets().items()})


def files_task(inputs: Mapping[str, Any], tests: Any, settings: Settings, seed: int) -> Task:
    """A model and records of the user's own; only the split and the order of training differ between seeds."""
    from .data.records import read_sets
    from .evaluate import Evaluation
    from .evaluation_sets import evaluation_sets
    from .loading import load_model

    used = read_sets(inputs["forget"], inputs["retain"])
    sets, _ = evaluation_sets(used, tests)
    seen, held = validated({name: records for name, records in used.items() if name != "forget"}, seed)
    extra = {**sets.retain_extra, **held}
    first = next(iter(seen))
    if tests.retain:
        extra = {"retain_seen": seen[first], **extra}
    retain = sets.retain if tests.retain else seen[first]  # without tests of its own: what was seen
    hashes = {name: records.sha256 for name, records in used.items()} | {
        f"test {name}": records.sha256 for name, _, records in sets if name != "forget"}

    def measured_or_loaded(source: str) -> Any:
        return Evaluation.load(source) if Path(source).is_file() else load_model(source, settings)[0]

    gold = partial(measured_or_loaded, tests.gold) if tests.gold else None
    reference = cache(lambda: load_model(tests.reference, settings)[0]) if tests.reference else None
    return Task("files", seed, lambda: load_model(inputs["model"], settings), gold, used["forget"], seen,
                replace(sets, retain=retain, retain_extra=extra), hashes, reference)


def compare(run: Run, tasks: Sequence[Callable[[], Task]], rows: Sequence[Row], objectives: Sequence[str],
            settings: Settings, tuning: Tuning, *, ratio: float | None = None,
            progress: pipeline.Progress = lambda line: None) -> tuple[list[Cell], dict[str, dict[str, Any]]]:
    """Make the cells that are missing, and return all that were asked for.

    Args:
        run: where plans and cells are kept.
        tasks: each makes its task when its turn comes.
        settings: of every run but for objective, learning rate and kind of step.
        ratio: share of the candidates' weights that baselines may move; None matches the number of CLUE's plan of the same
            task where ``clue`` is among the rows, and is :data:`RATIO` elsewhere.

    Returns:
        the cells, and per benchmark and seed (``world-hard-0``) the measures of ``before`` and ``gold``.

    Raises:
        RunError: the records, or the weights of the model, have changed since cells were made from them.
    """
    from .evaluate.comparison import Cell

    cells: list[Cell] = []
    references: dict[str, dict[str, Any]] = {}
    total = len(tasks) * len(rows) * len(objectives)
    for make in tasks:
        task = make()
        recorded = run.manifest.get("data", {})
        if recorded.get(task.name, task.sha256) != dict(task.sha256):
            raise RunError(f"{run.folder} holds cells made from other records of {task.name}: choose another folder with -o")
        run.update(data={**recorded, task.name: dict(task.sha256)})
        task = replace(task, load=partial(_unchanged, run, task))
        references[task.name], gold = _reference(run, task, settings, tuning, progress)
        match = "clue" if ratio is None and any(row.localization == "clue" for row in rows) else None
        for row in rows:
            for objective in objectives:
                stage = f"cell-{task.name}-{row.name}-{objective}{_budget(match, ratio)}"
                if run.has(stage):
                    cell = Cell.from_json(json.loads((run.path(stage) / "cell.json").read_text()))
                else:
                    cell = _cell(run, task, row, objective, settings, tuning, ratio, match, gold, progress)
                    with run.stage(stage) as folder:
                        write_json(folder / "cell.json", cell.to_json())
                cells.append(cell)
                progress(f"cell       {len(cells)} of {total}: {task.name} {row.name} {objective}")
    return cells, references


def _unchanged(run: Run, task: Task) -> tuple[Any, Any]:
    """The task's model, once it is known to be the one that all of its cells were made from, and its tokenizer."""
    model, tokenizer = task.load()
    mine, recorded = fingerprint(model), run.manifest.get("models", {})
    if recorded.get(task.name, mine) != mine:
        raise RunError(f"{run.folder} holds cells made from another model of {task.name}: its weights have changed since;"
                       " choose another folder with -o, or put the model back")
    if task.name not in recorded:
        run.update(models={**recorded, task.name: mine})
    return model, tokenizer


def _reference(run: Run, task: Task, settings: Settings, tuning: Tuning,
               progress: pipeline.Progress) -> tuple[dict[str, Any], Evaluation | None]:
    """Measures of the model before, and of gold; and gold's evaluation, to compare others with."""
    from .evaluate import Evaluation
    from .evaluate.comparison import measures_of

    stage = f"reference-{task.name}"
    if not run.has(stage):
        model, tokenizer = task.load()
        models = {"before": model} | ({} if task.gold is None else {"gold": task.gold()})
        known = {name: model for name, model in models.items() if isinstance(model, Evaluation)}
        measured = {name: known.get(name) or _measured(model, tokenizer, task, settings) for name, model in models.items()}
        found = {name: measures_of(measured[name], measured.get("gold"))
                 | (_stood(model, tokenizer, task, settings) if tuning.robustness and name not in known else {})
                 for name, model in models.items()}
        with run.stage(stage) as folder:
            if "gold" in measured:
                measured["gold"].save(folder / "gold.json")
            write_json(folder / "reference.json", found)
        progress(f"measure    {task.name}: {', '.join(found)}")
    gold = run.path(stage) / "gold.json"
    return json.loads((run.path(stage) / "reference.json").read_text()), Evaluation.load(gold) if gold.exists() else None


def _budget(match: str | None, ratio: float | None) -> str:
    """Part of a folder's name: without a plan to match, baselines move other weights, and both kinds fit into one run."""
    return "" if match else f"-at-{ratio or RATIO:g}"


def _plan(run: Run, task: Task, localization: str, settings: Settings, ratio: float | None,
          match: str | None) -> tuple[Plan, float, int | None]:
    """The plan of a localization, its processor time, and the most memory the process held meanwhile."""
    from . import baselines

    stage = f"plan-{task.name}-{localization}" + ("" if localization == "clue" else _budget(match, ratio))
    if run.has(stage):
        cost = json.loads((run.path(stage) / "cost.json").read_text())
        return Plan.load(run.path(stage)), cost["cpu_seconds"], cost["peak_bytes"]
    weights = None
    if localization not in ("clue", "all") and match is not None:
        weights = _plan(run, task, match, settings, ratio, None)[0].weights_changed
    model, tokenizer = task.load()
    with Meter() as meter:
        if localization == "clue":
            localize = replace(settings.localize, method="clue")
            plan = pipeline.localize(model, tokenizer, task.forget, task.retain, localize, data=settings.data,
                                     seed=task.seed)
        else:
            plan = baselines.localize(localization, model, tokenizer, task.forget, task.retain, weights=weights,
                                      ratio=ratio or RATIO, batch_size=settings.localize.batch_size, data=settings.data,
                                      seed=task.seed)
    with run.stage(stage) as folder:
        plan.save(folder)
        write_json(folder / "cost.json", {"cpu_seconds": meter.seconds, "peak_bytes": meter.peak})
    return plan, meter.seconds, meter.peak


def _cell(run: Run, task: Task, row: Row, objective: str, settings: Settings, tuning: Tuning, ratio: float | None,
          match: str | None, gold: Evaluation | None, progress: pipeline.Progress) -> Cell:
    """Localize, and train at every learning rate."""
    from .evaluate.comparison import Cell

    try:
        plan, seconds, peak = _plan(run, task, row.localization, settings, ratio, match)
    except (PlanError, ModelError) as error:
        if row.localization == "clue":
            raise
        progress(f"no plan    {task.name} {row.name}: {error}")
        parameters = sum(p.numel() for p in task.load()[0].parameters())
        return Cell(task.benchmark, task.seed, objective, row.name, 0, parameters, (),
                    {str(lr): str(error) for lr in tuning.lrs}, 0.0, None)
    points: list[Point] = []
    failed: dict[str, str] = {}
    peaks = [peak]
    parameters = 0
    for lr in tuning.lrs:
        model, tokenizer = task.load()
        parameters = sum(p.numel() for p in model.parameters())
        unlearn = replace(settings.unlearn, objective=objective, lr=lr, metric=row.metric)
        training = _Training(model, tokenizer, task, replace(settings, unlearn=unlearn), tuning, gold)
        try:
            training.run(plan)
        except ModelError as error:
            failed[str(lr)] = str(error)
            progress(f"diverged   {task.name} {row.name} {objective}, lr {lr:g}: {error}")
            continue
        finally:
            peaks.append(training.meter.peak)
            read = training.points
            del model, training  # before the next one is loaded: there may be no room for two
        points += read
        last = read[-1]
        progress(f"train      {task.name} {row.name} {objective}, lr {lr:g}: {last.forgotten:.0%} forgotten after"
                 f" {last.steps} steps, validation {last.validation[0]:.3f}")
    known = [value for value in peaks if value is not None]
    return Cell(task.benchmark, task.seed, objective, row.name, plan.weights_changed, parameters, tuple(points), failed,
                seconds, max(known, default=None))


class _Enough(Exception):
    """Every level has been reached."""


class _Training:
    """One training at one learning rate, looked at every few steps."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, settings: Settings, tuning: Tuning,
                 gold: Evaluation | None) -> None:
        from .data.encoding import encode, length_limit, pad_id
        from .unlearn.objectives import objective_of, suited

        self._model, self._tokenizer, self._task, self._settings = model, tokenizer, task, settings
        self._gold = gold
        self._left = sorted(tuning.levels)
        # An objective with a goal beyond forgetting is read where its training ends, which is at all levels at once.
        objective = objective_of(suited(settings.unlearn.objective, task.forget, task.retain))
        self._goes_on = objective.towards is not None
        self._robustness = tuning.robustness
        # As the floor rule reads them: that an answer ends is not what is to be forgotten.
        found = encode(task.forget, tokenizer, chat=settings.data.chat, append_eos=False,
                       max_length=length_limit(model, settings.data.max_length))
        self._forget = sorted(found, key=lambda e: -len(e.input_ids))  # so that parts of them are padded little
        self._pad = pad_id(tokenizer)
        self._steps = 0
        self.meter = Meter()
        self.points: list[Point] = []

    def run(self, plan: Plan) -> None:
        """Train until every level is reached or the steps run out."""
        from .unlearn.loop import unlearn

        at_goal = True
        with self.meter, suppress(_Enough):
            log = unlearn(self._model, self._tokenizer, self._task.forget, self._task.retain, plan, self._settings.unlearn,
                          data=self._settings.data, seed=self._task.seed, on_step=self._look)
            at_goal = log.stopped_early or not self._goes_on
        if not self.points or self.points[-1].steps != self._steps:
            self._measure(self._forgotten())
            self.points[-1] = replace(self.points[-1], at_goal=at_goal)
        if self._robustness:  # now that the model is itself again: relearning moves all its weights
            stood = _stood(self._model, self._tokenizer, self._task, self._settings)
            self.points[-1] = replace(self.points[-1], measures={**self.points[-1].measures, **stood})

    def _look(self, entry: dict[str, Any]) -> None:
        self._steps = entry["step"]
        if self._goes_on or self._steps % self._settings.unlearn.check_every:
            return
        with self.meter.paused():
            forgotten = self._forgotten(self._left[0])
            if forgotten >= self._left[0]:
                self._left = [level for level in self._left if level > forgotten]
                self._measure(forgotten)
                if not self._left:
                    raise _Enough

    def _forgotten(self, least: float = 0.0) -> float:
        """Share of the forget records that count as forgotten: unlikely, and not the greedy answer. Where it is less than
        ``least`` an upper bound that is too, found without the rest of the records: most looks are far from their level."""
        from .evaluate import memorization

        size, floor, share = self._settings.evaluate.batch_size, self._settings.unlearn.floor, 1.0
        remembered = 0
        for start in range(0, len(self._forget), size):
            found = memorization.score(self._model, self._forget[start:start + size], pad=self._pad, batch_size=size)
            gone = (memorization.probability(found) <= floor) & (memorization.exact_match(found) == 0)
            remembered += int((~gone).sum())
            share = (len(self._forget) - remembered) / len(self._forget)
            if share < least:
                break
        return share

    def _measure(self, forgotten: float) -> None:
        from .evaluate.comparison import Point, measures_of, validation_of

        found = _measured(self._model, self._tokenizer, self._task, self._settings)
        self.points.append(Point(self._settings.unlearn.lr, self._steps, forgotten, validation_of(found),
                                 measures_of(found, self._gold), self.meter.seconds))


def _measured(model: Any, tokenizer: Any, task: Task, settings: Settings) -> Any:
    from .evaluate import evaluate

    return evaluate(model, tokenizer, task.sets, settings.evaluate, data=settings.data, seed=task.seed,
                    reference=None if task.reference is None else task.reference())


def _stood(model: Any, tokenizer: Any, task: Task, settings: Settings) -> dict[str, float]:
    from .evaluate.robustness import stand

    return stand(model, tokenizer, task.sets, settings.robustness, data=settings.data, seed=task.seed)

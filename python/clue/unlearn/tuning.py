"""Tuning: the learning rate and the retain weight of a training, chosen on retain records held back from it.

A trial trains the plan for real, on all but a fifth of the retain records, and reads what it left of that fifth; then the
planned weights are put back. Of two trials the better one forgets more of the forget set, or as much and reaches its
objective's goal beyond that, or that too and keeps more. So nothing is compared that forgot less, and test records decide
nothing.

Which learning rate to try first follows from the weights: AdamW moves a weight by about the learning rate at a step, whatever
its gradient, and what a move means depends on how large the weights are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import DataSettings, UnlearnSettings, check, check_seed
from ..data.atomic import write_atomically
from ..data.encoding import batches, encode, length_limit, pad_id
from ..data.held_back import hold_back
from ..data.records import read_sets
from ..errors import ClueError, ModelError, RunError
from ..model.anatomy import check_weights
from ..plan import Plan, require_plan
from ..processes import agreed, place
from ..types import Role
from .checkpoint import identity
from .objectives import Forget, Objective, objective_of, suited
from .reference import ReferenceWeights
from .role_gradient import forgotten_of

#: The first learning rate, in units of the planned weights' root mean square.
RELATIVE_LR = 0.0045
#: Learning rates are first tried this factor apart, then half of it (on a logarithmic scale).
FACTOR = 4.0
#: Of the steps there are, the share that a smaller learning rate may be expected to need; and the least factor worth a trial.
SLACK, LEAST = 0.6, 1.25
#: What the retain weight is multiplied by in its trial, and the loss of kept probability from which on there is one.
STRONGER, WORTH = 3.0, 0.002
#: At most this many validation records of a set are read.
VALIDATION_RECORDS = 256
#: The steps of the training itself, at least, for each that the best trial took: more records may take longer.
MORE = 2.0
#: The file in a checkpoint's folder that keeps the trials.
NOTES = "tuning.json"


@dataclass(frozen=True)
class Trial:
    """One training that was tried and undone.

    Attributes:
        lr, retain_weight: what it was given.
        steps: optimizer steps it took; 0 where it diverged.
        forgotten: share of the forget records that were forgotten at its end.
        kept: mean over the validation sets of the mean length-normalised answer probability at its end.
        at_goal: whether its objective's goal beyond forgetting, where it has one, was reached before the steps ran out.
    """

    lr: float
    retain_weight: float
    steps: int
    forgotten: float
    kept: float
    at_goal: bool = True

    @property
    def worth(self) -> tuple[float, bool, float]:
        """What trials are ordered by."""
        return self.forgotten, self.at_goal, self.kept


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and out of what.

    Attributes:
        settings: those that were given, with ``lr``, ``retain_weight`` and ``steps`` filled in.
        trials: in the order they were made.
        before: :attr:`Trial.kept` of the model before any training; NaN where no record could be held back.
    """

    settings: UnlearnSettings
    trials: tuple[Trial, ...]
    before: float

    def to_json(self) -> dict[str, Any]:
        """What a training's log says of it: ``lr``, ``retain_weight`` and ``steps`` as chosen, ``before`` (None where there is
        none), the trials, and what the chosen one ``kept`` (None without trials)."""
        lr, weight = self.settings.lr, self.settings.retain_weight
        kept = [t.kept for t in self.trials if (t.lr, t.retain_weight) == (lr, weight)]
        return {"lr": lr, "retain_weight": weight, "steps": self.settings.steps,
                "before": None if math.isnan(self.before) else self.before, "kept": kept[0] if kept else None,
                "trials": [asdict(t) for t in self.trials]}


def tune(model: nn.Module, tokenizer: Any, forget: Any, retain: Any, plan: Plan,
         settings: UnlearnSettings | None = None, *, objective: str | Objective | Forget | None = None,
         data: DataSettings | None = None, seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None,
         notes: str | os.PathLike[str] | None = None) -> Tuning:
    """Choose learning rate, retain weight and steps by at most ``settings.trials`` trainings; the model is as it was.

    Where no retain record can be held back, or ``trials`` is 0, the learning rate follows from the size of the weights alone.

    Args:
        model, tokenizer, forget, retain, plan, settings, objective, data, seed: of the training, as for
            :func:`clue.unlearn`; ``settings.lr`` is where to begin unless it is 0.
        on_step: called after every step of a trial as :func:`clue.unlearn` does, with the trial's number, from 1, as
            ``trial`` too.
        notes: a file to keep the trials in: where it holds some of the same tuning, these are not made again.

    Raises:
        ModelError: every trial diverged.
        RunError: the notes are damaged.
        ClueError: as :func:`clue.unlearn`.
    """
    from .loop import made_for, restored, unlearn

    settings, data = settings or UnlearnSettings(), data or DataSettings()
    check(settings, UnlearnSettings)
    check(data, DataSettings)
    require_plan(plan)
    seed = check_seed(seed)
    sets = read_sets(forget, retain, required=False)
    forget, retain = sets.pop("forget"), sets
    objective = suited(settings.objective if objective is None else objective, forget, retain)
    if isinstance(objective, str):
        settings = replace(settings, objective=objective)
    objective = objective_of(objective)
    weights = ReferenceWeights(model, plan)
    plan = made_for(model, plan)  # before the trials move it
    start = weights.now()
    lr = settings.lr or agreed(_first_lr(start))
    try:
        seen, held = hold_back(retain, seed)
    except ClueError:
        return Tuning(replace(settings, lr=lr), (), math.nan)
    limit = length_limit(model, data.max_length)
    examples = [encode(records, tokenizer, chat=data.chat, append_eos=data.append_eos, max_length=limit)
                for records in held.values()]

    def kept() -> float:
        device = next(model.parameters()).device
        with restored(model):
            model.eval()
            found = [forgotten_of(model, batches(e[:VALIDATION_RECORDS], settings.batch_size, pad=pad_id(tokenizer),
                                                 device=device), 0.0)[0] for e in examples]
        return agreed(sum(found) / len(found))

    before = kept()
    trials: list[Trial] = []
    reasons: list[str] = []  # why trials failed
    known = _Notes(notes, {} if notes is None else identity(model, plan, settings, objective, seed, examples) | {
        name: records.sha256 for name, records in {**seen, "forget": forget}.items()})

    if agreed(len(known.trials)) != len(known.trials):
        raise RunError(f"{notes} is not the same for all processes: put the run into a folder that all of them see")

    def attempt(lr: float, retain_weight: float) -> Trial:
        number = len(trials) + 1
        if number <= len(known.trials):
            trials.append(known.trials[number - 1])
            return trials[-1]
        tried = replace(settings, lr=lr, retain_weight=retain_weight)
        told = None if on_step is None else lambda entry: on_step({**entry, "trial": number})
        try:
            log = unlearn(model, tokenizer, forget, seen, plan, tried, objective=objective, data=data, seed=seed, on_step=told)
            at_goal = objective.towards is None or log.stopped_early
            trial = Trial(lr, retain_weight, log.steps, agreed(log.final_forgotten), kept(), at_goal)
        except ModelError as error:  # it diverged: worse than any
            reasons.append(str(error))
            trial = Trial(lr, retain_weight, 0, -1.0, 0.0)
        finally:
            weights.put(start)
        trials.append(trial)
        known.write(trials)
        return trial

    retains = objective.retain is not None and any(s.role == Role.CONFLICT for s in plan.slices)
    best = search(attempt, lr, settings.retain_weight, settings.trials, settings.steps,
                  lambda trial: retains and trial.kept < before - WORTH)
    if best is None:
        return Tuning(replace(settings, lr=lr), (), before)
    if best.forgotten < 0:
        check_weights(model)
        raise ModelError(f"unlearning diverged at every learning rate tried ({', '.join(f'{t.lr:.1e}' for t in trials)}): give"
                         " a smaller lr, or raise floor" + (f" (the last one: {reasons[-1]})" if reasons else ""))
    steps = max(settings.steps, math.ceil(MORE * best.steps)) if settings.floor else settings.steps
    return Tuning(replace(settings, lr=best.lr, retain_weight=best.retain_weight, steps=steps), tuple(trials), before)


def search(attempt: Callable[[float, float], Trial], lr: float, retain_weight: float, budget: int, steps: int,
           stronger: Callable[[Trial], bool]) -> Trial | None:
    """The best of at most ``budget`` trials of at most ``steps`` steps, None where there are to be none.

    From the best learning rate so far its neighbours are tried: larger ones first while something is left to forget, or the
    goal beyond it not reached, smaller ones first otherwise, and no smaller than can get there in the steps there are, which go
    with the inverse of the learning rate. Where neither is better, neighbours half as far. The last trial is one of a larger
    retain weight, if ``stronger`` says so of the best.
    """
    if budget < 1:
        return None
    best = attempt(lr, retain_weight)
    tried, left, factor = [lr], budget - 1, FACTOR
    while left > 1 or (left and not stronger(best)):
        there = best.forgotten == 1 and best.at_goal
        down, up = min(factor, SLACK * steps / max(best.steps, 1)) if there else factor, factor
        sides = [best.lr * up] if down < LEAST else [best.lr / down, best.lr * up]
        if best.forgotten >= 0 and not there:
            sides.reverse()
        new = [side for side in sides if all(abs(math.log(side / other)) > math.log(LEAST) for other in tried)]
        if not new:
            if factor < FACTOR:
                break
            factor = math.sqrt(factor)
            continue
        tried.append(new[0])
        trial = attempt(new[0], retain_weight)
        best, left = max(best, trial, key=lambda t: t.worth), left - 1
    if left and retain_weight > 0 and stronger(best):
        best = max(best, attempt(best.lr, STRONGER * retain_weight), key=lambda t: t.worth)
    return best


class _Notes:
    """The trials of a tuning in a file, so that one that was killed does not make them again."""

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = None if path is None else Path(path), json.loads(json.dumps(identity))
        self.trials: list[Trial] = []
        if self._path is None or not self._path.exists():
            return
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document["identity"] == self._identity:
                self.trials = [Trial(**trial) for trial in document["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._path} is damaged ({error}): remove it to tune anew") from None

    def write(self, trials: list[Trial]) -> None:
        """Replace the file, in the first of several processes."""
        if self._path is not None and place()[0] == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            document = {"identity": self._identity, "trials": [asdict(trial) for trial in trials]}
            write_atomically(self._path, (json.dumps(document, indent=1) + "\n").encode())


def _first_lr(slices: Mapping[str, torch.Tensor]) -> float:
    squares = sum(float(s.double().square().sum()) for s in slices.values())
    count = sum(s.numel() for s in slices.values())
    return RELATIVE_LR * math.sqrt(squares / count) if squares else 1e-4

"""UnlearnLog: what a training run did, step by step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.atomic import write_atomically
from ..errors import ClueError
from ..values import ByValue

#: Steps between two lines of progress.
REPORT_EVERY = 20


def reporting(progress: Callable[[str], None], trials: int,
              on_step: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
    """An ``on_step`` of :func:`clue.unlearn.unlearn` that calls another one, and ``progress`` with a line now and then."""
    shown = ("forget_loss", "retain_loss", "forget_probability", "forgotten", "divergence")

    def told(step: dict[str, Any]) -> None:
        if on_step is not None:
            on_step(step)
        if step["step"] % REPORT_EVERY == 0:
            trial = f"trial {step['trial']} of at most {trials}, " if "trial" in step else ""
            progress(f"unlearn    {trial}step {step['step']} of at most {step['steps']}: " + ", ".join(
                f"{name.replace('_', ' ')} {step[name]:.3f}" for name in shown if not math.isnan(step[name])))

    return told


@dataclass(frozen=True, eq=False)
class UnlearnLog(ByValue):
    """What happened, one array entry per optimizer step.

    Attributes:
        stage: uint8 [steps]: 0 joint, 1 forget weights, 2 conflict weights, 3 forget and retain steps in turn.
        forget_loss: float64 [steps], the forget objective on the step's batch, before the update; its gradient is taken
            over the records not forgotten yet. NaN where no forget batch was run, as are the next but one.
        retain_loss: float64 [steps], mean NLL of the retain batch's answer tokens; NaN where no retain batch was run.
        forget_probability: float64 [steps], mean length-normalised probability of the forget batch's answers, before the
            update.
        forgotten: float64 [steps], share of the forget batch that was forgotten already (:attr:`UnlearnSettings.floor`).
        divergence: float64 [steps], mean KL divergence per answer token of the forget batch from what the model before
            unlearning says of strangers, in nats, before the update; NaN where the objective has no strangers.
        grad_norm: float64 [steps], 2-norm of the combined gradient on the planned slices, before clipping.
        lr: float64 [steps].
        retain_weight: float64 [steps], what the retain loss was multiplied by; it varies with a retain budget.
        stopped_early: every forget record was forgotten, or the validation records were, before the steps of the (last)
            stage ran out.
        final_probability: mean length-normalised answer probability over the whole forget set, after the last update.
        final_forgotten: share of the forget set that was forgotten by then.
        final_validation: mean probability of the validation records (:attr:`UnlearnSettings.validation`); NaN without.
        skipped: steps whose loss or gradient was NaN or infinite; they moved nothing and have no entry.
        planned: scalar weights that the plan names; ``moved`` of them are not what they were before.
        tuning: what chose learning rate and retain weight (:meth:`clue.unlearn.tuning.Tuning.to_json`); None where they
            were given.
        objective: name of the objective, ``auto`` made out; empty where it has none.
    """

    stage: npt.NDArray[np.uint8]
    forget_loss: npt.NDArray[np.float64]
    retain_loss: npt.NDArray[np.float64]
    forget_probability: npt.NDArray[np.float64]
    forgotten: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64]
    grad_norm: npt.NDArray[np.float64]
    lr: npt.NDArray[np.float64]
    retain_weight: npt.NDArray[np.float64]
    stopped_early: bool
    final_probability: float
    final_forgotten: float
    final_validation: float = math.nan
    skipped: int = 0
    planned: int = 0
    moved: int = 0
    tuning: Mapping[str, Any] | None = None
    objective: str = ""

    def __repr__(self) -> str:
        return (f"<UnlearnLog: {self.steps} steps of {self.objective or 'an objective of your own'}, {self.final_forgotten:.0%}"
                f" forgotten, {self.moved} of {self.planned} planned weights moved>")

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken."""
        return len(self.stage)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (NaN as null), whole or not at all."""
        document: dict[str, Any] = {"steps": self.steps, "stage": self.stage.tolist()}
        document |= {name: getattr(self, name) for name in _RESULTS}
        document["final_validation"] = None if math.isnan(self.final_validation) else self.final_validation
        document |= {"tuning": self.tuning, "objective": self.objective}
        for name in SERIES:
            document[name] = [None if math.isnan(value) else value for value in getattr(self, name).tolist()]
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnlearnLog:
        """Read what :meth:`save` wrote.

        Raises:
            ClueError: the file is missing or is not such a log.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            document.setdefault("divergence", [None] * len(document["stage"]))  # logs of earlier versions have none
            series: dict[str, Any] = {name: np.array([math.nan if v is None else v for v in document[name]], dtype=np.float64)
                      for name in SERIES}
            results: dict[str, Any] = {name: math.nan if document[name] is None else kind(document[name])
                       for name, kind in _RESULTS.items()}
            return cls(np.array(document["stage"], dtype=np.uint8), **series, **results, tuning=document.get("tuning"),
                       objective=document.get("objective", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClueError(f"{path} is not a readable unlearning log ({error}): unlearn again") from None


#: The arrays of a log besides ``stage``.
SERIES = ("forget_loss", "retain_loss", "forget_probability", "forgotten", "divergence", "grad_norm", "lr", "retain_weight")
_RESULTS: dict[str, Callable[[Any], Any]] = {
    "stopped_early": bool, "final_probability": float, "final_forgotten": float, "final_validation": float,
    "skipped": int, "planned": int, "moved": int}

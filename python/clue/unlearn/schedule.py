"""Schedules: which roles move when, at which learning rate, on which records, and how much retention weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import UnlearnSettings
from ..data.encoding import Example
from ..errors import PlanError
from ..plan import Plan
from ..types import Role


@dataclass(frozen=True)
class Turn:
    """One kind of step.

    Attributes:
        forget, retain: whether it runs forget and retain records.
        roles: which weights it moves. Forget weights get the forget gradient; conflict weights the sum of what is run.
    """

    forget: bool
    retain: bool
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Stage:
    """Steps that share an optimizer.

    Attributes:
        number: of the stage in the log.
        steps: at most so many.
        turns: the kinds of its steps, one after the other, again and again.
    """

    number: int
    steps: int
    turns: tuple[Turn, ...]

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role that moves, in the order of the roles."""
        found = {role for turn in self.turns for role in turn.roles}
        return tuple(role for role in (Role.FORGET, Role.CONFLICT) if role in found)

    def groups(self) -> list[tuple[Role, ...]]:
        """The roles, parted so that every turn moves whole parts: each needs an optimizer of its own."""
        if all(turn.roles == self.roles for turn in self.turns):
            return [self.roles]
        return [(role,) for role in self.roles]


def stages_of(plan: Plan, settings: UnlearnSettings, *, retains: bool) -> list[Stage]:
    """The stages with at least one weight to move; a stage without weights gives its steps to the other.

    ``two``: forget weights, then conflict weights with retention. ``joint``: both at once. ``alternating``: forget steps,
    in which both roles follow the forget objective, and retain steps, in which conflict weights follow the retain loss
    and forget weights rest, in turn. ``retains`` says whether there is a retain loss.

    Raises:
        PlanError: the plan names no weight.
    """
    present = tuple(role for role in (Role.FORGET, Role.CONFLICT) if any(True for _ in plan.of_role(role)))
    if not present:
        raise PlanError("the plan names no weight, so there is nothing to unlearn: localize again with more edges or"
                        " neurons")

    def together(roles: tuple[Role, ...]) -> tuple[Turn, ...]:
        return (Turn(True, retains and Role.CONFLICT in roles, roles),)

    if settings.stages == "joint":
        return [Stage(0, settings.steps, together(present))]
    if settings.stages == "alternating":
        turns = [Turn(True, False, present)]
        if retains and Role.CONFLICT in present:
            turns.append(Turn(False, True, (Role.CONFLICT,)))
        return [Stage(3, settings.steps, tuple(turns))]
    if len(present) == 1:
        return [Stage(1 if present == (Role.FORGET,) else 2, settings.steps, together(present))]
    first = min(max(round(settings.steps * settings.forget_share), 1), settings.steps - 1)
    both = [Stage(1, first, together((Role.FORGET,))), Stage(2, settings.steps - first, together((Role.CONFLICT,)))]
    return [stage for stage in both if stage.steps > 0]


class RetainWeight:
    """What the retain loss is multiplied by: fixed, or adapted so that a retain budget holds.

    Projected dual ascent on the multiplier of the constraint ``retain loss <= limit``: after every step with a retain
    batch ``weight <- min(max(weight + rate * (loss - limit), 0), most)``, where ``loss`` is an exponential average over
    about ten batches, which alone would be too noisy.

    Args:
        settings: the weight to begin with, the budget, the rate and the largest weight.
        before: the retain loss of the model before unlearning, in nats per token; needed for a budget only.
    """

    def __init__(self, settings: UnlearnSettings, before: float | None) -> None:
        self.value = settings.retain_weight
        self.average = math.nan
        #: nats per token; None where the weight is fixed
        self.limit: float | None = None
        if settings.retain_budget > 0 and before is not None:
            relative = settings.budget_kind == "relative"
            self.limit = before * (1.0 + settings.retain_budget) if relative else before + settings.retain_budget
        self._rate, self._most = settings.budget_rate, settings.retain_most

    def observe(self, loss: float) -> None:
        """Adapt to the retain loss of one batch, in nats per token."""
        if self.limit is None or math.isnan(loss):
            return
        self.average = loss if math.isnan(self.average) else 0.9 * self.average + 0.1 * loss
        self.value = min(max(self.value + self._rate * (self.average - self.limit), 0.0), self._most)


def learning_rate(number: int, steps: int, settings: UnlearnSettings) -> float:
    """Linear warm-up over ``warmup`` steps (at most half the stage), then cosine decay to a tenth."""
    warmup = min(settings.warmup, steps // 2)
    if number < warmup:
        return settings.lr * (number + 1) / warmup
    done = (number - warmup) / max(steps - warmup, 1)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


class Shuffled:
    """The numbers 0 .. size-1 again and again, in a fresh order each time, from a generator of its own."""

    def __init__(self, size: int, seed: int, purpose: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed * 1009 + purpose)
        self._left: list[int] = []

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if not self._left:
                self._left = torch.randperm(self._size, generator=self._generator).tolist()
            need = count - len(taken)
            taken += self._left[:need]
            self._left = self._left[need:]
        return taken

    def state(self) -> dict[str, Tensor]:
        """Where it is: uint8 ``generator``, int64 ``left``."""
        return {"generator": self._generator.get_state(), "left": torch.tensor(self._left, dtype=torch.int64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` said."""
        self._generator.set_state(state["generator"])
        self._left = state["left"].tolist()


class Pool:
    """The records of all retain sets, shuffled together: what must stay is drawn in the proportions it is given in."""

    def __init__(self, sets: Sequence[Sequence[Example]], seed: int) -> None:
        self._examples = [example for examples in sets for example in examples]
        self.order = Shuffled(len(self._examples), seed, purpose=2)

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, count: int) -> list[Example]:
        return [self._examples[i] for i in self.order.take(count)]

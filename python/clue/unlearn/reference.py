"""The model before unlearning, at the price of its planned weights: nothing else changes, so nothing else is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..types import Role
from .optimizer import planned_index, planned_parameters
from .shards import shard_of

if TYPE_CHECKING:
    from ..plan import Plan


class ReferenceWeights:
    """A copy of the planned slices as they are now, to run the model with them later.

    Losses on whole distributions need the logits of the model before unlearning. Kept for a retain set, these would be
    tokens times vocabulary (tens of GB for a few thousand records); a frozen model would double the weights. Putting the
    slices back for one forward pass costs the slices and that pass, and is exact.

    Args:
        model: the model, still untouched.
        plan: which of its weights will move.

    Raises:
        PlanError: the plan does not fit the model.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        roles = (Role.FORGET, Role.CONFLICT)
        #: what a planned name means, as far as this process holds it, the axis of its slices, which they are
        self._slices: list[tuple[Tensor, int, Tensor]] = []
        for name, parameter in planned_parameters(model, plan, roles).items():
            axis, index = planned_index(plan, name, roles)
            shard = shard_of(parameter, name, axis, torch.from_numpy(index).to(parameter.device))
            if len(shard.index):
                self._slices.append((shard.here(parameter.detach()), axis, shard.index))
        self._before = self._read()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Without gradients, the model as it was; at the end, also after an error, every bit as it is now."""
        with torch.no_grad():
            now = self._read()
            self._write(self._before)
            try:
                yield
            finally:
                self._write(now)

    def _read(self) -> list[Tensor]:
        return [weight.index_select(axis, index) for weight, axis, index in self._slices]

    def _write(self, slices: Sequence[Tensor]) -> None:
        for (weight, axis, index), values in zip(self._slices, slices, strict=True):
            weight.index_copy_(axis, index, values)

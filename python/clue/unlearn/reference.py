"""The model before unlearning, at the price of its planned weights: nothing else changes, so nothing else is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..types import Role
from .optimizer import planned_index, planned_parameters
from .shards import add_up, is_sharded, reshard, shard_of

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
        self._slices: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._parameters = planned_parameters(model, plan, roles)
        self._sharded = model if any(map(is_sharded, self._parameters.values())) else None
        for name, parameter in self._parameters.items():
            axis, index = planned_index(plan, name, roles)
            shard = shard_of(parameter, name, axis, torch.from_numpy(index).to(parameter.device))
            if len(shard.index):
                self._slices[name] = shard.here(parameter.detach()), axis, shard.index
        self._before = self.kept()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Without gradients, the model as it was; at the end, also after an error, every bit as it is now."""
        with torch.no_grad():
            now = self.now()
            self.put(self._before)
            try:
                yield
            finally:
                self.put(now)

    @torch.no_grad()
    def now(self) -> dict[str, Tensor]:
        """A copy of the planned slices as they are, by planned name: [k, columns] for rows, [rows, k] for columns."""
        return {name: weight.index_select(axis, index) for name, (weight, axis, index) in self._slices.items()}

    def kept(self) -> dict[str, Tensor]:
        """:meth:`now`, in the host's memory, as a GPU's is scarce; pinned, so that it is back as fast as the bus allows."""
        return {name: slices.cpu().pin_memory() if slices.is_cuda else slices.cpu() for name, slices in self.now().items()}

    @torch.no_grad()
    def put(self, slices: Mapping[str, Tensor]) -> None:
        """Make the planned slices what :meth:`now` said."""
        for name, (weight, axis, index) in self._slices.items():
            weight.index_copy_(axis, index, slices[name].to(weight.device, non_blocking=True))
        if self._sharded is not None:
            reshard(self._sharded)

    def moved(self) -> int:
        """How many planned weights differ, in any bit, from what they were; all processes that share sharded parameters must
        ask, and get the number over all of them."""
        found, now = [], self.now()
        for name, parameter in self._parameters.items():
            count = torch.zeros((), dtype=torch.float64)
            if name in now:
                width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
                count += (now[name].cpu().view(width) != self._before[name].view(width)).sum()
            found.append((count, parameter))
        return round(add_up(found, next(iter(self._parameters.values())).device))

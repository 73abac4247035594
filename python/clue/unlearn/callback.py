"""PlanCallback: somebody else's training loop (``transformers.Trainer``, TRL, open-unlearning), only planned weights.

Any optimizer may be used. Parameters without a planned weight are frozen; inside the planned ones the gradient of
unplanned weights is zeroed as it is accumulated (so clipping counts planned weights only) and their bits are put back
after every step, whatever weight decay or momentum did to them. With :class:`MaskedAdamW` nothing needs putting back:
``Trainer(..., optimizers=(MaskedAdamW(model, plan, lr), None), callbacks=[PlanCallback(plan)])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import PlanError
from ..plan import Plan
from ..types import Role
from ..weights import member_of, parameter_of, view_of
from .optimizer import MaskedAdamW, planned_parameters


class PlanCallback(TrainerCallback):
    """Keeps every weight outside the plan as it is, bit by bit, during ``trainer.train()``.

    Costs a copy of the unplanned part of every planned parameter, unless the optimizer is a :class:`MaskedAdamW`.

    Args:
        plan: which weights may move.
        roles: which of the plan's roles move.

    Raises:
        PlanError: (when training starts) the plan does not fit the model or names no weight of these roles.
    """

    def __init__(self, plan: Plan, roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT)) -> None:
        self._plan = plan
        self._roles = tuple(roles)
        self._handles: list[Any] = []
        #: parameter, its name or that of a part of it, axis, the unplanned indices along it, and their bits
        self._kept: list[tuple[nn.Parameter, str, int, Tensor, Tensor]] = []
        self._flags: dict[nn.Parameter, bool] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Freeze what the plan does not name before the trainer builds its optimizer."""
        if model is not None:
            self._freeze(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None,
                       optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the unplanned weights of planned parameters."""
        if model is None:
            raise PlanError("PlanCallback was not given the trainer's model: pass the model to the Trainer")
        planned = self._freeze(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer
        if isinstance(inner, MaskedAdamW):
            return
        for name, parameter in planned.items():
            slices = [s for s in self._plan.slices if s.parameter == name and s.role in self._roles]
            self._keep(parameter, name, slices[0].axis, np.concatenate([s.index for s in slices]))
        for whole, parameter in {parameter_of(name): parameter for name, parameter in planned.items()}.items():
            members = {member_of(name) for name in planned if parameter_of(name) == whole}
            if None not in members:  # only parts of it are planned: the others stay
                self._keep(parameter, whole, 0, np.array(sorted(m for m in members if m is not None)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the unplanned weights back (the trainer calls this after each optimizer step)."""
        with torch.no_grad():
            for parameter, name, axis, others, kept in self._kept:
                view_of(parameter, name).index_copy_(axis, others, kept)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model: hooks, copies and ``requires_grad`` flags."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._handles, self._kept, self._flags = [], [], {}

    def _keep(self, parameter: nn.Parameter, name: str, axis: int, moving: npt.NDArray[np.int64]) -> None:
        """Remember everything along an axis but the indices that move, and keep its gradient at zero."""
        weight = view_of(parameter.detach(), name)
        free = torch.ones(weight.shape[axis], dtype=torch.bool)
        free[torch.from_numpy(moving)] = False
        others = free.nonzero().squeeze(1).to(parameter.device)
        if len(others):
            self._kept.append((parameter, name, axis, others, weight.index_select(axis, others)))
            hook = _zeroing(name, axis, others)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _freeze(self, model: nn.Module) -> dict[str, nn.Parameter]:
        planned = planned_parameters(model, self._plan, self._roles)
        if not planned:
            raise PlanError("the plan names no weight of the roles that move, so there is nothing to train")
        if not self._flags:
            self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        for parameter in planned.values():
            parameter.requires_grad_(True)
        return planned


def _zeroing(name: str, axis: int, others: Tensor) -> Any:
    def zero(parameter: Tensor) -> None:
        if parameter.grad is not None:
            view_of(parameter.grad, name).index_fill_(axis, others, 0.0)

    return zero

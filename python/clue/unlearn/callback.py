"""PlanCallback: somebody else's training loop (``transformers.Trainer``, TRL, open-unlearning), only planned weights.

Where the trainer makes its own optimizer, which is the usual case, that optimizer is given the planned slices as parameters
of their own (:mod:`clue.unlearn.slices`) and sees no others: its state, gradients, clipping and what
DistributedDataParallel exchanges are those of planned slices, and layers without any compute no weight gradient.

An optimizer that was made before, of the model's parameters, may be used too. Parameters without a planned weight are
frozen then; inside the planned ones the gradient of unplanned weights is zeroed as it is accumulated (so clipping counts
planned weights only) and their bits are put back after every step, whatever weight decay or momentum did to them.
:class:`MaskedAdamW` leaves nothing to put back:
``Trainer(..., optimizers=(MaskedAdamW(model, plan, lr), None), callbacks=[PlanCallback(plan)])``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ClueError, PlanError
from ..plan import Plan, require_plan
from ..types import Role
from ..weights import member_of, parameter_of, view_of
from .optimizer import MaskedAdamW, planned_parameters
from .shards import is_sharded
from .slices import SliceParameters
from .sparse import SparseGradients

#: Name of the planned slices among the model's modules while they are trained.
MODULE = "planned_slices"
SHARDED = ("PlanCallback does not train a model that is sharded over processes: train with DistributedDataParallel, or with"
           " MaskedAdamW in a loop of your own")


class PlanCallback(TrainerCallback):
    """Keeps every weight outside the plan as it is, bit by bit, during ``trainer.train()``.

    Costs the planned slices themselves (float32 where the model is bf16 or fp16). With an optimizer that was made before
    the trainer: a copy of the unplanned part of every planned parameter, unless it is a :class:`MaskedAdamW`.

    Args:
        plan: which weights may move.
        roles: which of the plan's roles move.

    Raises:
        PlanError: (when training starts) the plan does not fit the model or names no weight of these roles, or the model
            is sharded over processes.
    """

    def __init__(self, plan: Plan, roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT)) -> None:
        self._plan = require_plan(plan)
        self._roles = tuple(roles)
        self._sparse: SparseGradients | None = None
        self._slices: SliceParameters | None = None
        self._checkpoints: list[tuple[nn.Module, Any]] = []
        self._handles: list[Any] = []
        #: parameter, its name or that of a part of it, axis, the unplanned indices along it, and their bits
        self._kept: list[tuple[nn.Parameter, str, int, Tensor, Tensor]] = []
        self._flags: dict[nn.Parameter, bool] = {}

    @contextmanager
    def retaining(self) -> Iterator[None]:
        """Forward passes of this block hold retain samples, whose gradient moves conflict weights alone.

        All other passes move all planned weights. Without it forget weights follow the sum of both losses.

        Raises:
            ClueError: the trainer was given an optimizer of its own, next to which gradients are not told apart.
        """
        if self._sparse is None or self._slices is None:
            raise ClueError("retaining() tells gradients apart in a Trainer that makes its own optimizer: give it none")
        with self._holding((0, 1, 1)):
            yield

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None,
                    **kwargs: Any) -> None:
        """Show the trainer the planned slices alone, before it builds its optimizer, or freeze what is not planned."""
        if model is None:
            return
        if optimizer is None and self._plan_slices(model):
            return
        self._freeze(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None,
                       optimizer: Any = None, **kwargs: Any) -> None:
        """See that the optimizer moves the planned slices, or remember the unplanned weights of planned parameters."""
        if model is None:
            raise PlanError("PlanCallback was not given the trainer's model: pass the model to the Trainer")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer
        if self._slices is not None:
            mine = {id(parameter) for parameter in self._slices.parameters()}
            moving = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
            if mine <= moving:
                return self._begin(model, inner, checkpoints=not getattr(args, "torch_compile", False))
            self._release(model)
            self._sparse = self._slices = None
        planned = self._freeze(model)
        # What it leaves alone needs no keeping, but clipping counts the whole gradient.
        keeps = not isinstance(inner, MaskedAdamW)
        if any(map(is_sharded, planned.values())):
            if keeps:
                raise PlanError(SHARDED)
            return
        for name, parameter in planned.items():
            slices = [s for s in self._plan.slices if s.parameter == name and s.role in self._roles]
            self._keep(parameter, name, slices[0].axis, np.concatenate([s.index for s in slices]), bits=keeps)
        for whole, parameter in {parameter_of(name): parameter for name, parameter in planned.items()}.items():
            members = {member_of(name) for name in planned if parameter_of(name) == whole}
            if None not in members:  # only parts of it are planned: the others stay
                self._keep(parameter, whole, 0, np.array(sorted(m for m in members if m is not None)), bits=keeps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the slices, or put the unplanned weights back (the trainer calls this after each optimizer step)."""
        if self._slices is not None:
            self._slices.write()
        with torch.no_grad():
            for parameter, name, axis, others, kept in self._kept:
                view_of(parameter, name).index_copy_(axis, others, kept)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """:meth:`release`."""
        self.release(model)

    def release(self, model: nn.Module | None) -> None:
        """Let go of the model: hooks, copies and ``requires_grad`` flags. The trainer does so at the end of training; after an
        error in it, or of a trainer that never trained, call this."""
        if model is not None:
            self._release(model)
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._handles, self._kept, self._flags = [], [], {}

    def _plan_slices(self, model: nn.Module) -> bool:
        """Make the planned slices parameters, if they all belong to layers whose gradients are computed by slices."""
        planned = planned_parameters(model, self._plan, self._roles)
        if any(is_sharded(parameter) for parameter in planned.values()):
            raise PlanError(SHARDED)
        sparse = SparseGradients(model, self._plan, self._roles)
        if sparse.dense:
            return False
        self._sparse, self._slices = sparse, SliceParameters(sparse)
        self._attach(model)
        return True

    def _attach(self, model: nn.Module) -> None:
        assert self._sparse is not None and self._slices is not None
        if MODULE not in dict(model.named_children()):
            self._sparse.__enter__()
            self._sparse.split(forget=1, retain=0, seq=1)
            model.add_module(MODULE, self._slices)

    def _begin(self, model: nn.Module, optimizer: Any, *, checkpoints: bool) -> None:
        assert self._sparse is not None and self._slices is not None
        self._attach(model)  # after an earlier train() it was released
        self._slices.take_masters(optimizer)
        self._handles.append(self._slices.send_masters(optimizer))
        self._slices.read()
        self._sparse.freeze_inputs()
        # Activations are computed again in the backward pass, as what their samples were in the forward pass.
        for module in model.modules() if checkpoints else ():
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            if isinstance(function, partial) and not keywords.get("use_reentrant", True) and "context_fn" not in keywords:
                self._checkpoints.append((module, function))
                again = partial(function.func, *function.args, **keywords, context_fn=self._contexts)
                module._gradient_checkpointing_func = again  # type: ignore[assignment]

    def _release(self, model: nn.Module) -> None:
        if self._sparse is None or MODULE not in dict(model.named_children()):
            return
        for module, function in self._checkpoints:
            module._gradient_checkpointing_func = function
        self._checkpoints = []
        delattr(model, MODULE)
        self._sparse.__exit__()

    def _contexts(self) -> tuple[Any, Any]:
        assert self._sparse is not None
        return nullcontext(), self._holding(self._sparse.samples)

    @contextmanager
    def _holding(self, samples: tuple[int, int, int] | None) -> Iterator[None]:
        assert self._sparse is not None
        before, self._sparse.samples = self._sparse.samples, samples
        try:
            yield
        finally:
            self._sparse.samples = before

    def _keep(self, parameter: nn.Parameter, name: str, axis: int, moving: npt.NDArray[np.int64], *, bits: bool) -> None:
        """Of everything along an axis but the indices that move, keep the gradient at zero, and remember the ``bits``."""
        weight = view_of(parameter.detach(), name)
        free = torch.ones(weight.shape[axis], dtype=torch.bool)
        free[torch.from_numpy(moving)] = False
        others = free.nonzero().squeeze(1).to(parameter.device)
        if len(others):
            if bits:
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

"""PlanCallback: somebody else's training loop (``transformers.Trainer``, TRL, open-unlearning), only planned weights.

Where the trainer makes its own optimizer, which is the usual case, that optimizer is given the planned slices as parameters
of their own (:mod:`clue.unlearn.slices`) and sees no others: its state, gradients, clipping and what
DistributedDataParallel exchanges are those of planned slices, and layers without any compute no weight gradient. Of a planned
weight outside linear layers and experts (a norm, an embedding, single weights) the backward pass holds the whole gradient for
as long as it takes to cut it down to the slices.

An optimizer that was made before, of the model's parameters, may be used too. Parameters without a planned weight are
frozen then; inside the planned ones the gradient of unplanned weights is zeroed as it is accumulated (so clipping counts
planned weights only) and their bits are put back after every step, whatever weight decay or momentum did to them.
:class:`MaskedAdamW` leaves nothing to put back:
``Trainer(..., optimizers=(MaskedAdamW(model, plan, lr), None), callbacks=[PlanCallback(plan)])``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ClueError, PlanError
from ..plan import Plan, require_plan
from ..processes import place
from ..types import Role
from ..weights import member_of, parameter_of, view_of
from .optimizer import MaskedAdamW, planned_parameters
from .shards import is_sharded
from .slices import SliceParameters
from .sparse import SparseGradients, reentrant

#: Name of the planned slices among the model's modules while they are trained.
MODULE = "planned_slices"
#: attribute of a model: the callback that holds it
HOLDER = "_clue_plan_callback"
SHARDED = ("PlanCallback does not train a model that is sharded over processes: train with DistributedDataParallel, or with"
           " MaskedAdamW in a loop of your own")


class PlanCallback(TrainerCallback):
    """Keeps every weight outside the plan as it is, bit by bit, during ``trainer.train()``.

    A model belongs to the trainer that was made last: making another lets go of what an earlier one held of it. So does a
    callback that is given to the trainer of another model: it holds one at a time.

    Costs the planned slices themselves (float32 where the model is bf16 or fp16). With an optimizer that was made before
    the trainer: a copy of the unplanned part of every planned parameter, unless it is a :class:`MaskedAdamW`.

    Args:
        plan: which weights may move.
        roles: which of the plan's roles move.

    Raises:
        PlanError: (when training starts) the plan does not fit the model or names no weight of these roles, or the model
            is sharded over processes.
        ClueError: (when training starts) the trainer's optimizer holds no planned weight.
    """

    def __init__(self, plan: Plan, roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT)) -> None:
        self._plan = require_plan(plan)
        self._roles = roles
        self._sparse: SparseGradients | None = None
        self._slices: SliceParameters | None = None
        self._held: weakref.ref[nn.Module] | None = None  # the model
        self._breaks = ""  # a planned weight that ends compiled graphs, where activations are computed again in them
        self._drifts = False  # whether processes would exchange gradients before the last pass of a step added its own
        self._stepped = False  # whether the optimizer stepped since training began
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
            ClueError: the trainer was given an optimizer of its own, next to which gradients are not told apart, or the model
                is compiled and checkpointed, and the plan holds weights at which a compiled graph ends, or several processes
                train and checkpoint in the reentrant way.
        """
        if self._sparse is None or self._slices is None:
            raise ClueError("retaining() tells gradients apart in a Trainer that makes its own optimizer: give it none")
        if self._breaks:
            raise ClueError(f"{self._breaks} ends a compiled graph, and retaining() cannot tell gradients apart where"
                            " activations are computed again outside of one: turn torch_compile or gradient_checkpointing off,"
                            " or leave it out of the plan")
        if self._drifts:
            raise ClueError("DistributedDataParallel exchanges gradients before both passes of a loss are computed again, where"
                            " checkpointing is reentrant, and the processes drift apart: say"
                            " gradient_checkpointing_kwargs={'use_reentrant': False}")
        with self._holding((0, 1, 1)):
            yield

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None,
                    **kwargs: Any) -> None:
        """Show the trainer the planned slices alone, before it builds its optimizer, or freeze what is not planned."""
        if model is None:
            return
        planned = self._planned(model)
        if optimizer is None and any(map(is_sharded, planned.values())):
            raise PlanError(SHARDED)
        self._hold(model)
        if optimizer is not None:
            return self._freeze(model, planned)
        self._sparse = SparseGradients(model, self._plan, self._roles)
        self._slices = SliceParameters(self._sparse)
        self._attach(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None,
                       optimizer: Any = None, **kwargs: Any) -> None:
        """See that the optimizer moves the planned slices, or remember the unplanned weights of planned parameters."""
        if model is None:
            raise PlanError("PlanCallback was not given the trainer's model: pass the model to the Trainer")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer
        moving = {id(parameter) for group in getattr(inner, "param_groups", ()) for parameter in group["params"]}
        if self._slices is not None and moving.issuperset(map(id, self._slices.parameters())):
            return self._begin(model, inner, compiled=getattr(args, "torch_compile", False))
        planned = self._planned(model)
        # What it leaves alone needs no keeping, but clipping counts the whole gradient.
        keeps = not isinstance(inner, MaskedAdamW)
        sharded = any(map(is_sharded, planned.values()))
        if sharded and keeps:
            raise PlanError(SHARDED)
        if inner is not None and moving.isdisjoint(map(id, planned.values())):
            self.release(model)
            raise ClueError("the trainer's optimizer holds no planned weight, so nothing would be trained: make another"
                            " Trainer (if one was made for this model since, train that), or an optimizer of the model's own"
                            " parameters")
        self._hold(model)
        self._sparse = self._slices = None
        self._freeze(model, planned)
        if sharded:
            return
        for name, parameter in planned.items():
            slices = [s for s in self._plan.slices if s.parameter == name and s.role in self._roles]
            self._keep(parameter, name, slices[0].axis, np.concatenate([s.index for s in slices]), bits=keeps)
        for whole, parameter in {parameter_of(name): parameter for name, parameter in planned.items()}.items():
            members = {member_of(name) for name in planned if parameter_of(name) == whole}
            if None not in members:  # only parts of it are planned: the others stay
                self._keep(parameter, whole, 0, np.array(sorted(m for m in members if m is not None)), bits=keeps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that this callback still holds the model, before a step is computed that would go by another's plan.

        Raises:
            ClueError: another callback took the model over since training began.
        """
        held = None if self._held is None else self._held()
        if held is not None and vars(held).get(HOLDER, self) is not self:
            raise ClueError("another PlanCallback took over the model that this one trains (a second one of this Trainer, or of"
                            " one made meanwhile), so this one's plan would not be followed: give one PlanCallback, of one"
                            " plan, and make another Trainer for the model once this one is done")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the slices, or put the unplanned weights back (the trainer calls this after each optimizer step).

        Raises:
            ClueError: something unfroze a planned weight meanwhile, whose slices then got no gradient.
        """
        if self._sparse is not None and self._slices is not None:
            named = zip(self._sparse.planned, self._slices.parameters(), strict=True)
            idle = [name for name, own in named if own.grad is None]
            unfrozen = [name for name in idle if self._sparse.planned[name].parameter.requires_grad]
            if unfrozen:
                raise ClueError(f"something set requires_grad on {parameter_of(unfrozen[0])} during training (a callback, or"
                                " the trainer's own code), so its gradient went there instead of to the planned slices: leave"
                                " that out, or give the Trainer a clue.MaskedAdamW as its optimizer")
            self._slices.write()
            if idle and not self._stepped:
                more = f" (nor had {len(idle) - 1} more)" if len(idle) > 1 else ""
                warnings.warn(f"{idle[0]} had no gradient in the first step{more}: no sample reached it, or another module than"
                              " its own computes with it, and then it stays as it is; clue.MaskedAdamW as the Trainer's"
                              " optimizer moves it", stacklevel=2)
            self._stepped = True
        with torch.no_grad():
            for parameter, name, axis, others, kept in self._kept:
                view_of(parameter, name).index_copy_(axis, others, kept)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """:meth:`release`."""
        self.release(model)

    def release(self, model: nn.Module | None) -> None:
        """Let go of the model: hooks, copies and ``requires_grad`` flags. The trainer does so at the end of training; after an
        error in it, or of a trainer that never trained, call this."""
        if model is not None and vars(model).get(HOLDER) is self:
            delattr(model, HOLDER)
        if model is not None and self._sparse is not None and dict(model.named_children()).get(MODULE) is self._slices:
            for module, function in self._checkpoints:
                module._gradient_checkpointing_func = function
            delattr(model, MODULE)
            self._sparse.__exit__()
            self._checkpoints = []
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._handles, self._kept, self._flags = [], [], {}

    def _planned(self, model: nn.Module) -> dict[str, nn.Parameter]:
        planned = planned_parameters(model, self._plan, self._roles)
        if not planned:
            raise PlanError("the plan names no weight of the roles that move, so there is nothing to train")
        return planned

    def _hold(self, model: nn.Module) -> None:
        """Let go of what another callback holds of the model, or this one since an earlier trainer or training, and of another
        model that this one holds."""
        earlier = None if self._held is None else self._held()
        for other in (model, earlier):
            holder: PlanCallback | None = None if other is None else vars(other).get(HOLDER)
            if holder is not None and (other is model or holder is self):
                holder.release(other)
        setattr(model, HOLDER, self)
        self._held = weakref.ref(model)

    def _attach(self, model: nn.Module) -> None:
        assert self._sparse is not None and self._slices is not None
        self._sparse.__enter__()
        self._sparse.split(forget=1, retain=0, seq=1)
        model.add_module(MODULE, self._slices)

    def _begin(self, model: nn.Module, optimizer: Any, *, compiled: bool) -> None:
        assert self._sparse is not None and self._slices is not None
        self._hold(model)
        self._sparse = SparseGradients(model, self._plan, self._roles)  # the model may have been moved or converted since
        self._slices.follow(self._sparse)
        self._attach(model)
        self._slices.take_masters(optimizer)
        self._handles.append(self._slices.send_masters(optimizer))
        self._slices.read()
        self._stepped = False
        self._breaks = ""
        self._drifts = place()[1] > 1 and reentrant(model)
        if compiled:  # a graph keeps the samples it was made for
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                names = (name for name in self._sparse.planned if name in self._sparse.dense or member_of(name) is not None)
                self._breaks = next(names, "")
            return
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                self._checkpoints.append((module, function))
                module._gradient_checkpointing_func = self._remembering(function)

    def _remembering(self, checkpoint: Callable[..., Any]) -> Any:
        """A checkpointing function whose activations are computed again as those of the samples of the forward pass."""
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            assert self._sparse is not None
            samples = self._sparse.samples

            def again(*inner: Any, **named: Any) -> Any:
                with self._holding(samples):
                    return forward(*inner, **named)

            return checkpoint(again, *args, **kwargs)

        return run

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

    def _freeze(self, model: nn.Module, planned: Mapping[str, nn.Parameter]) -> None:
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        for parameter in planned.values():
            parameter.requires_grad_(True)


def _zeroing(name: str, axis: int, others: Tensor) -> Any:
    def zero(parameter: Tensor) -> None:
        if parameter.grad is not None:
            view_of(parameter.grad, name).index_fill_(axis, others, 0.0)

    return zero

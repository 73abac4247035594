"""Planned slices as parameters of their own, for trainers and optimizers that know nothing but parameters.

Any optimizer that is given these parameters holds state for planned slices only; clipping, accumulation, gradient scaling
and DistributedDataParallel see their gradients and no others. The model computes with its weights as ever, so the slices
are written into these after every step. Next to weights in bf16 or fp16 the parameters are float32: the masters of which
the weights are a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ClueError
from ..weights import view_of
from .sparse import PlannedSlices, SparseGradients


class SliceParameters(nn.Module):
    """One parameter [k, length] (or [k], for a bias) for each planned weight, slices first.

    It can be a part of the model it belongs to; nothing of it appears in a ``state_dict``.
    """

    def __init__(self, sparse: SparseGradients) -> None:
        """Make the parameters, and let ``sparse`` sum gradients into them."""
        super().__init__()
        self._planned: list[tuple[PlannedSlices, nn.Parameter]] = []
        for name, slices in sparse.planned.items():
            parameter = nn.Parameter(_read(slices).to(slices.dtype))
            # Trainers spare biases and norms from weight decay, by ``bias`` in a name and by a norm's module: here by name.
            self.register_parameter("bias_" * (slices.parameter.ndim == 1) + name.replace(".", "_"), parameter)
            sparse.gather_into(name, parameter)
            self._planned.append((slices, parameter))

    @torch.no_grad()
    def write(self) -> None:
        """Put the slices into the model's weights."""
        for slices, parameter in self._planned:
            weight = view_of(slices.parameter.detach(), slices.name)
            weight.index_copy_(slices.axis, slices.index, parameter.movedim(0, slices.axis).to(weight.dtype))

    @torch.no_grad()
    def read(self) -> None:
        """Take over weights that were changed meanwhile (loaded from a checkpoint), and keep masters that still fit."""
        for slices, parameter in self._planned:
            now = _read(slices)
            if not torch.equal(parameter.to(now.dtype), now):
                parameter.copy_(now)

    def send_masters(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Let the masters of half-precision weights travel in the optimizer's ``state_dict``: a model's checkpoint rounds them.

        In its state itself they would be taken for that of a parameter that was stepped before; of one that was not, the master
        is the weight, and stays out.
        """
        def add(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            order = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
            for slices, parameter in self._planned:
                number = order.get(id(parameter))
                if slices.parameter.dtype == slices.dtype or number is None:
                    continue
                known, master = state["state"].get(number, {}), parameter.detach()
                if known or not torch.equal(master, _read(slices).to(master.dtype)):
                    state["state"][number] = {**known, "master": master}

        return optimizer.register_state_dict_post_hook(add)

    @torch.no_grad()
    def take_masters(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the masters of a loaded optimizer state, and take them out of it."""
        for _, parameter in self._planned:
            state = optimizer.state.get(parameter, {})
            if "master" in state:
                parameter.copy_(state.pop("master"))
                if not state:
                    del optimizer.state[parameter]

    def follow(self, sparse: SparseGradients) -> None:
        """Belong to other sparse gradients of the same plan, made where the model is now.

        Raises:
            ClueError: the model was moved, or converted to a wider dtype, while these slices were no part of it.
        """
        self._planned = [(sparse.planned[slices.name], parameter) for slices, parameter in self._planned]
        for slices, parameter in self._planned:
            weight = slices.parameter
            if (parameter.device, parameter.dtype) != (weight.device, torch.promote_types(parameter.dtype, weight.dtype)):
                raise ClueError(f"{slices.name} was moved or converted since this Trainer trained it: make another Trainer for"
                                " the model")
            sparse.gather_into(slices.name, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SliceParameters:
        """Go with the model to another device, and to a wider dtype; a narrower one would round the masters."""
        def applied(parameter: Tensor) -> Tensor:
            found = fn(parameter)
            return found if found.dtype == parameter.dtype else \
                parameter.to(found.device, torch.promote_types(parameter.dtype, found.dtype))

        return super()._apply(applied, recurse)

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        """Nothing: the slices are in the model's weights."""

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        """Nothing."""


def _read(slices: PlannedSlices) -> Tensor:
    weight = view_of(slices.parameter.detach(), slices.name)
    return weight.index_select(slices.axis, slices.index).movedim(slices.axis, 0).contiguous()

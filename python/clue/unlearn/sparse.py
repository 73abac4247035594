"""Sparse gradients: backward passes that compute weight gradients of planned rows and columns only, by role.

A full fine-tune spends a third of its step on weight gradients and keeps one number per weight for them. Here

1. no parameter requires a gradient, so nothing below the lowest planned layer is differentiated, and layers without
   planned weights pass gradients on without computing their own;
2. every linear layer with planned weights runs the forward it always ran, and its backward multiplies only the planned
   channels: dW[rows] = dY[:, rows]^T X, dW[:, columns]^T = X[:, columns]^T dY, db[rows] = the sum of dY[:, rows];
   a mixture of experts keeps its input and routing alone, and its backward runs the experts again, one at a time, on
   the tokens routed to them: to planned ones the same products apply, the others pass gradients on;
3. a batch holds forget samples first and retain samples after them. A loss that is a sum of a forget and a retain part
   mixes nothing between samples, so the tokens of the first samples carry the forget gradient and the others carry the
   retain gradient: one forward and backward gives each role what it needs, in two tensors, since the retain metric
   treats them differently.

Gradients are compact, [slices, length], a row of them for each planned row or column. They are those of leaves that own
no memory: one number expanded to the compact shape. So autograd itself accumulates them, checkpointing and autocast
work as for any operation, and the model's parameters never get a ``.grad``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ClueError, PlanError
from ..types import Role
from ..weights import is_flat, member_of, parameter_of, view_of
from .optimizer import planned_index, planned_parameters
from .shards import is_sharded
from .sparse_layers import HALF, MARK, AnyLayer, Layer, Part, layer_of

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class PlannedSlices:
    """The planned slices of one parameter.

    Attributes:
        name: its name, which may mean one matrix of a stacked parameter (:mod:`clue.weights`).
        parameter: the parameter itself, or the stack.
        axis: the one that ``index`` runs along.
        index: int64 [k], sorted: its slices of all roles.
        conflict: int64 [c], sorted: which of the k are conflict slices.
        half: whether gradients of bf16 and fp16 weights are kept in that precision, not in float32.
    """

    name: str
    parameter: nn.Parameter
    axis: int
    index: Tensor
    conflict: Tensor
    half: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``name`` means."""
        whole = tuple(self.parameter.shape)
        whole = whole if member_of(self.name) is None else whole[1:]
        return (math.prod(whole),) if is_flat(self.name) else whole

    @property
    def dtype(self) -> torch.dtype:
        """Of its gradients."""
        return torch.float32 if self.parameter.dtype in HALF and not self.half else self.parameter.dtype


@dataclass(frozen=True)
class SliceGradient:
    """Gradients of the planned slices of one parameter, slices first: [k, length], or [k] for a bias.

    float32 where the weights are bf16 or fp16 (unless they are kept half), else their dtype. ``None`` where the pass reached
    no such weight.

    Attributes:
        forget: [k, ...] over the forget samples, for all planned slices.
        retain: [c, ...] over the retain samples, for the conflict slices alone.
    """

    forget: Tensor | None
    retain: Tensor | None


class SparseGradients:
    """Gives the linear layers and experts of a model the backward described above for as long as it is entered.

        with SparseGradients(model, plan) as sparse:
            sparse.split(forget=4, retain=4, seq=input_ids.shape[1])
            loss(model(input_ids)).backward()
            gradients = sparse.take()

    While it is entered, planned weights outside plain linear layers and known experts (rows of an embedding, say) are the
    only parameters that require a gradient, an ordinary one, which cannot be split by sample: :attr:`dense` names them,
    and with any of them each pass must hold samples of one kind. A compiled model must be compiled after entering. Activation
    checkpointing works; its reentrant kind (not the default of transformers) differentiates down to the embedding.

    Args:
        model: any model; the modules keep their classes, and forward passes give the bits they always gave.
        plan: which weights move.
        roles: which of the plan's roles move.
        half: keep gradients of bf16 and fp16 weights in that precision, for half the memory, rather than in float32.

    Raises:
        PlanError: the plan does not fit the model, edits tied weights, or names no weight of these roles.
    """

    def __init__(self, model: nn.Module, plan: Plan, roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT), *,
                 half: bool = False) -> None:
        self._model = model
        #: by name, in plan order
        self.planned: dict[str, PlannedSlices] = {}
        self._parts: dict[str, Part] = {}
        self._layers: dict[str, Layer] = {}
        modules: dict[str, list[str]] = {}
        for name, parameter in planned_parameters(model, plan, roles).items():
            axis, union = planned_index(plan, name, roles)
            conflicts = [s.index for s in plan.of_role(Role.CONFLICT) if s.parameter == name and s.role in roles]
            index = torch.from_numpy(union).to(parameter.device)
            chosen = torch.from_numpy(conflicts[0]).to(index) if conflicts else index[:0]
            self.planned[name] = PlannedSlices(name, parameter, axis, index, torch.searchsorted(index, chosen), half)
            modules.setdefault(parameter_of(name).rpartition(".")[0], []).append(name)
        if not self.planned:
            wanted = " or ".join(role.name.lower() for role in roles)
            raise PlanError(f"the plan names no {wanted} weight, so there is nothing to train")
        for path, names in modules.items():
            layer = layer_of(self, path, model.get_submodule(path))
            # Single weights are picked from a whole gradient, which such a layer does not compute of any of its weights.
            if layer is not None and all(layer.takes(name) and not is_flat(name) for name in names):
                self._add(layer, names)
        #: planned weights outside plain linear layers and experts, and of modules with planned single weights
        self.dense = tuple(name for name in self.planned if name not in self._parts)
        for name in self.dense:
            if is_sharded(self.planned[name].parameter):
                raise PlanError(f"{name} is sharded and does not belong to a linear layer or experts, whose gradients alone"
                                " are computed by slices: leave it out of the plan, or give fully_shard whole layers"
                                " rather than single linear modules")
        self._flags: dict[nn.Parameter, bool] | None = None
        self._input_grads = False
        #: forget samples, all samples, and positions of each; set by :meth:`split`
        self.samples: tuple[int, int, int] | None = None

    def _add(self, layer: Layer, names: Iterable[str]) -> None:
        self._layers[layer.path] = layer
        for name in names:
            self._parts[name] = layer.add(self.planned[name], parameter_of(name).rpartition(".")[2])

    def __enter__(self) -> SparseGradients:
        if self._flags is not None or any(hasattr(layer.module, MARK) for layer in self._layers.values()):
            raise ClueError("this model already computes sparse gradients: leave that context first")
        self._flags = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        self._model.requires_grad_(False)
        for name in self.dense:
            if name not in self._parts:
                self.planned[name].parameter.requires_grad_(True)
        for layer in self._layers.values():
            layer.attach()
        self.freeze_inputs()
        return self

    def freeze_inputs(self) -> None:
        """Undo what transformers does to embeddings for checkpointing: make them differentiable, which only the reentrant
        kind needs. Entering does it; call it where checkpointing is turned on later."""
        if getattr(self._model, "_require_grads_hooks", None) and not reentrant(self._model):
            self._model.disable_input_require_grads()  # type: ignore[operator]
            self._input_grads = True

    def __exit__(self, *error: object) -> None:
        for layer in self._layers.values():
            layer.detach()
        if self._input_grads:
            self._model.enable_input_require_grads()  # type: ignore[operator]
            self._input_grads = False
        for parameter, flag in (self._flags or {}).items():
            parameter.requires_grad_(flag)
        self._flags, self.samples = None, None
        self._clear()

    def split(self, *, forget: int, retain: int, seq: int) -> None:
        """Say what the next forward passes hold: ``forget`` samples, then ``retain`` samples, of ``seq`` positions.

        Raises:
            PlanError: the samples are of both kinds, and some planned weights (:attr:`dense`) cannot tell them apart.
        """
        if forget < 0 or retain < 0 or forget + retain == 0 or seq < 1:
            raise ClueError(f"forget = {forget}, retain = {retain} and seq = {seq} must not be negative or all zero")
        mixed = forget and retain
        if self.samples is not None and any(self.planned[name].parameter.grad is not None for name in self.dense):
            mixed = mixed or bool(forget) != bool(self.samples[0])  # of one kind now, of the other kind before
        if mixed and self.dense:
            raise PlanError(f"{self.dense[0]} is not rows or columns of a linear layer, so its gradient cannot be split by"
                            " sample: run forget and retain batches apart, and take the gradients in between")
        self.samples = forget, forget + retain, seq

    def take(self) -> dict[str, SliceGradient]:
        """Hand over the gradients of the passes since the last call, by parameter name, and begin anew."""
        taken = {}
        for name, slices in self.planned.items():
            part = self._parts.get(name)
            if part is not None:
                taken[name] = SliceGradient(part.forget.grad, None if part.retain is None else part.retain.grad)
                continue
            forget = retain = None
            gradient = slices.parameter.grad
            if gradient is not None and self.samples is not None:
                chosen = view_of(gradient, name).index_select(slices.axis, slices.index)
                chosen = chosen.movedim(slices.axis, 0).contiguous()
                chosen = chosen.to(slices.dtype)
                if self.samples[0]:
                    forget = chosen
                elif len(slices.conflict):
                    retain = chosen.index_select(0, slices.conflict)
            taken[name] = SliceGradient(forget, retain)
        self._clear()
        return taken

    def gather_into(self, name: str, parameter: nn.Parameter) -> None:
        """From the next entering on sum the gradients of a planned weight, of both kinds of samples, into this parameter's
        ``.grad``. A :attr:`dense` weight then requires no gradient itself: where its module computes with it, the gradient is
        cut down to the slices.

        Args:
            parameter: of the shape of :class:`SliceGradient`; its values are not looked at.
        """
        if name not in self._parts:
            path = parameter_of(name).rpartition(".")[0]
            self._add(self._layers.get(path) or AnyLayer(self, path, self._model.get_submodule(path)), [name])
        self._parts[name].own = parameter

    def _clear(self) -> None:
        for part in self._parts.values():
            part.forget.grad = None
            if part.retain is not None:
                part.retain.grad = None
        for name in self.dense:
            self.planned[name].parameter.grad = None


def reentrant(model: nn.Module) -> bool:
    """Whether some module checkpoints its activations in the reentrant way."""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()
                 if getattr(module, "gradient_checkpointing", False)]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)

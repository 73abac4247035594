"""Sparse gradients: backward passes that compute weight gradients of planned rows and columns only, by role.

A full fine-tune spends a third of its step on weight gradients and keeps one number per weight for them. Here

1. no parameter requires a gradient, so nothing below the lowest planned layer is differentiated, and layers without
   planned weights pass gradients on without computing their own;
2. every linear layer with planned weights runs the forward it always ran, and its backward multiplies only the planned
   channels: dW[rows] = dY[:, rows]^T X, dW[:, columns]^T = X[:, columns]^T dY, db[rows] = the sum of dY[:, rows];
3. a batch holds forget samples first and retain samples after them. A loss that is a sum of a forget and a retain part
   mixes nothing between samples, so the tokens of the first samples carry the forget gradient and the others carry the
   retain gradient: one forward and backward gives each role what it needs, in two tensors, since the retain metric
   treats them differently.

Gradients are compact, [slices, length], a row of them for each planned row or column. They are those of leaves that own
no memory: one number expanded to the compact shape. So autograd itself accumulates them, checkpointing and autocast
work as for any operation, and the model's parameters never get a ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ClueError, PlanError
from ..model.anatomy import is_transposed
from ..types import Role
from ..weights import view_of
from .optimizer import planned_index, planned_parameters

if TYPE_CHECKING:
    from ..plan import Plan

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PlannedSlices:
    """The planned slices of one parameter.

    Attributes:
        name: its name, which may mean one matrix of a stacked parameter (:mod:`clue.weights`).
        parameter: the parameter itself, or the stack.
        axis: the one that ``index`` runs along.
        index: int64 [k], sorted: its slices of all roles.
        conflict: int64 [c], sorted: which of the k are conflict slices.
    """

    name: str
    parameter: nn.Parameter
    axis: int
    index: Tensor
    conflict: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``name`` means."""
        return tuple(view_of(self.parameter, self.name).shape)


@dataclass(frozen=True)
class SliceGradient:
    """Gradients of the planned slices of one parameter, slices first: [k, length], or [k] for a bias.

    float32 where the weights are bf16 or fp16, else their dtype. ``None`` where the pass reached no such weight.

    Attributes:
        forget: [k, ...] over the forget samples, for all planned slices.
        retain: [c, ...] over the retain samples, for the conflict slices alone.
    """

    forget: Tensor | None
    retain: Tensor | None


class SparseGradients:
    """Gives the linear layers of a model the backward described above for as long as it is entered.

        with SparseGradients(model, plan) as sparse:
            sparse.split(forget=4, retain=4, seq=input_ids.shape[1])
            loss(model(input_ids)).backward()
            gradients = sparse.take()

    While it is entered, planned weights outside plain linear layers (rows of an embedding, say) are the only parameters
    that require a gradient, an ordinary one, which cannot be split by sample: :attr:`dense` names them, and with any of
    them each pass must hold samples of one kind. A compiled model must be compiled after entering. Activation
    checkpointing works; its reentrant kind (not the default of transformers) differentiates down to the embedding.

    Args:
        model: any model; the modules keep their classes, and forward passes give the bits they always gave.
        plan: which weights move.
        roles: which of the plan's roles move.

    Raises:
        PlanError: the plan does not fit the model, edits tied weights, or names no weight of these roles.
    """

    def __init__(self, model: nn.Module, plan: Plan, roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT)) -> None:
        self._model = model
        #: by name, in plan order
        self.planned: dict[str, PlannedSlices] = {}
        self._parts: dict[str, _Part] = {}
        layers: dict[str, _Layer] = {}
        for name, parameter in planned_parameters(model, plan, roles).items():
            axis, union = planned_index(plan, name, roles)
            conflicts = [s.index for s in plan.of_role(Role.CONFLICT) if s.parameter == name and s.role in roles]
            index = torch.from_numpy(union).to(parameter.device)
            chosen = torch.from_numpy(conflicts[0]).to(index) if conflicts else index[:0]
            slices = self.planned[name] = PlannedSlices(name, parameter, axis, index, torch.searchsorted(index, chosen))
            path, _, kind = name.rpartition(".")
            module = model.get_submodule(path)
            transposed = is_transposed(module)
            if transposed is None or kind not in ("weight", "bias"):
                continue
            if path not in layers:
                layers[path] = _Layer(self, path, module, transposed)
            of_outputs = kind == "bias" or axis == (1 if transposed else 0)
            part = self._parts[name] = _Part(slices, of_outputs)
            setattr(layers[path], kind, part)
        if not self.planned:
            wanted = " or ".join(role.name.lower() for role in roles)
            raise PlanError(f"the plan names no {wanted} weight, so there is nothing to train")
        self._layers = list(layers.values())
        #: planned parameters outside plain linear layers
        self.dense = tuple(name for name in self.planned if name not in self._parts)
        self._flags: dict[nn.Parameter, bool] | None = None
        self._input_grads = False
        #: forget samples, all samples, and positions of each; set by :meth:`split`
        self.samples: tuple[int, int, int] | None = None

    def __enter__(self) -> SparseGradients:
        if self._flags is not None or any(hasattr(layer.module, _MARK) for layer in self._layers):
            raise ClueError("this model already computes sparse gradients: leave that context first")
        self._flags = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        self._model.requires_grad_(False)
        for name in self.dense:
            self.planned[name].parameter.requires_grad_(True)
        for layer in self._layers:
            layer.attach()
        # transformers makes embeddings differentiable for checkpointing, which only the reentrant kind needs.
        self._input_grads = bool(getattr(self._model, "_require_grads_hooks", None)) and not _reentrant(self._model)
        if self._input_grads:
            self._model.disable_input_require_grads()  # type: ignore[operator]
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.detach()
        if self._input_grads:
            self._model.enable_input_require_grads()  # type: ignore[operator]
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
            raise PlanError(f"{self.dense[0]} does not belong to a linear layer, so its gradient cannot be split by"
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
                chosen = chosen.float() if chosen.dtype in _HALF else chosen
                if self.samples[0]:
                    forget = chosen
                elif len(slices.conflict):
                    retain = chosen.index_select(0, slices.conflict)
            taken[name] = SliceGradient(forget, retain)
        self._clear()
        return taken

    def _clear(self) -> None:
        for part in self._parts.values():
            part.forget.grad = None
            if part.retain is not None:
                part.retain.grad = None
        for name in self.dense:
            self.planned[name].parameter.grad = None


_MARK = "_clue_sparse_gradients"


def _reentrant(model: nn.Module) -> bool:
    """Whether some module checkpoints its activations in the reentrant way."""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()
                 if getattr(module, "gradient_checkpointing", False)]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


class _Part:
    """The planned slices of a weight or bias: the channels they select, and the leaves that gather gradients."""

    def __init__(self, slices: PlannedSlices, of_outputs: bool) -> None:
        self.of_outputs = of_outputs
        self.index = slices.index
        self.conflict_index = slices.index.index_select(0, slices.conflict)
        other = [n for axis, n in enumerate(slices.shape) if axis != slices.axis]
        self.forget = _leaf(slices.parameter, (len(slices.index), *other))
        self.retain = _leaf(slices.parameter, (len(slices.conflict), *other)) if len(slices.conflict) else None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.forget] if self.retain is None else [self.forget, self.retain]

    def sides(self, cut: int, count: int) -> list[tuple[slice, Tensor]]:
        """Per leaf the tokens whose gradient it gathers, and the channels."""
        found = [(slice(0, cut), self.index)]
        return found if self.retain is None else [*found, (slice(cut, count), self.conflict_index)]


def _leaf(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape whose elements are one number in memory; only its gradient is of interest."""
    dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
    return torch.zeros((), dtype=dtype, device=parameter.device).expand(shape).detach().requires_grad_()


class _Layer:
    """One linear layer with planned weights."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module, transposed: bool) -> None:
        self.path, self.module, self.transposed = path, module, transposed
        self._owner = owner
        self.weight: _Part | None = None
        self.bias: _Part | None = None
        self.original: Callable[[Tensor], Tensor] = module.forward
        self._own = False

    @property
    def parts(self) -> list[_Part]:
        return [part for part in (self.weight, self.bias) if part is not None]

    def attach(self) -> None:
        self._own = "forward" in self.module.__dict__  # somebody else's override, to be put back
        self.original = self.module.forward
        self.module.forward = self.forward  # type: ignore[method-assign]
        setattr(self.module, _MARK, True)

    def detach(self) -> None:
        if not hasattr(self.module, _MARK):
            return
        delattr(self.module, _MARK)
        del self.module.forward
        if self._own:
            self.module.forward = self.original  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.original(x)
        leaves = [leaf for part in self.parts for leaf in part.leaves]
        result: Tensor = _Linear.apply(x, self.module.weight, self, self._cut(x), *leaves)
        return result

    def _cut(self, x: Tensor) -> int:
        """How many of the tokens in x [..., d_in] belong to forget samples."""
        if self._owner.samples is None:
            raise ClueError("sparse gradients need to know which samples are to be forgotten: call split before the"
                            " model")
        forget, total, seq = self._owner.samples
        tokens = x.numel() // x.shape[-1]
        if forget in (0, total):
            return tokens if forget else 0
        if not (x.shape[0] == total if x.ndim > 2 else x.shape[0] in (total, total * seq)):
            raise ClueError(f"{self.path} got an input of shape {tuple(x.shape)} from {total} samples of {seq}"
                            " positions, which does not say which sample a row belongs to: run forget and retain"
                            " batches apart")
        return tokens // total * forget


class _Linear(torch.autograd.Function):
    """A linear layer as it is, with a backward for planned channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: _Layer, cut: int, *leaves: Tensor) -> Tensor:
        kept: list[Tensor] = []
        part = layer.weight
        if part is not None:
            flat = x.reshape(-1, x.shape[-1])
            if not part.of_outputs:  # only the planned inputs are ever asked for
                kept = [flat[tokens].index_select(1, index) for tokens, index in part.sides(cut, len(flat))]
            else:
                kept = [x if part.retain is not None else flat[:cut]]
        ctx.layer, ctx.cut, ctx.shape, ctx.dtype = layer, cut, x.shape, x.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        return layer.original(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        layer: _Layer = ctx.layer
        dy = grad.reshape(-1, grad.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(dy.dtype)  # under autocast the forward saw it like that
            dx = (dy @ (weight.T if layer.transposed else weight)).view(ctx.shape).to(ctx.dtype)
        found: list[Tensor | None] = []
        for part in layer.parts:
            sides = zip(part.leaves, part.sides(ctx.cut, len(dy)), strict=True)
            for number, (leaf, (tokens, index)) in enumerate(sides):
                mine = dy[tokens]
                if len(mine) == 0:
                    found.append(None)
                elif part is layer.bias:
                    found.append(mine.index_select(1, index).to(leaf.dtype).sum(0))
                elif part.of_outputs:
                    x = kept[0].reshape(-1, kept[0].shape[-1])
                    found.append(_product(mine.index_select(1, index), x[tokens], leaf.dtype))
                else:
                    found.append(_product(kept[number], mine, leaf.dtype))
        return (dx, None, None, None, *found)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b of [tokens, k] and [tokens, length], as ``dtype``.

    Half precision is multiplied as float32 on a CPU, where its products are no faster and the planned channels are few;
    on a GPU as it is, since its products are summed in float32 anyway and only the result is rounded.
    """
    if a.dtype in _HALF or b.dtype in _HALF:
        half = a.dtype if a.dtype in _HALF else b.dtype
        work = half if a.is_cuda else torch.float32
        a, b = a.to(work), b.to(work)
    return (a.T @ b).to(dtype)

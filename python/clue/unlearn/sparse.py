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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ClueError, PlanError
from ..model.anatomy import is_transposed
from ..model.experts import Routed, differentiate, is_experts
from ..types import Role
from ..weights import is_flat, member_of, parameter_of, view_of
from .optimizer import planned_index, planned_parameters
from .shards import is_sharded

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
        whole = tuple(self.parameter.shape)
        whole = whole if member_of(self.name) is None else whole[1:]
        return (math.prod(whole),) if is_flat(self.name) else whole

    @property
    def dtype(self) -> torch.dtype:
        """Of its gradients: float32 for half precision."""
        return torch.float32 if self.parameter.dtype in _HALF else self.parameter.dtype


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
            if is_flat(name):  # single weights, which a whole gradient is picked from
                continue
            path, _, kind = parameter_of(name).rpartition(".")
            if path not in layers:
                layer = _layer(self, path, model.get_submodule(path))
                if layer is None:
                    continue
                layers[path] = layer
            if layers[path].takes(name):
                self._parts[name] = layers[path].add(slices, kind)
        if not self.planned:
            wanted = " or ".join(role.name.lower() for role in roles)
            raise PlanError(f"the plan names no {wanted} weight, so there is nothing to train")
        self._layers = list(layers.values())
        #: planned single weights, and parameters outside plain linear layers and experts
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

    def __enter__(self) -> SparseGradients:
        if self._flags is not None or any(hasattr(layer.module, _MARK) for layer in self._layers):
            raise ClueError("this model already computes sparse gradients: leave that context first")
        self._flags = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        self._model.requires_grad_(False)
        for name in self.dense:
            self.planned[name].parameter.requires_grad_(True)
        for layer in self._layers:
            layer.attach()
        self.freeze_inputs()
        return self

    def freeze_inputs(self) -> None:
        """Undo what transformers does to embeddings for checkpointing: make them differentiable, which only the reentrant
        kind needs. Entering does it; call it where checkpointing is turned on later."""
        if getattr(self._model, "_require_grads_hooks", None) and not _reentrant(self._model):
            self._model.disable_input_require_grads()  # type: ignore[operator]
            self._input_grads = True

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
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

    def gather_into(self, name: str, parameter: nn.Parameter) -> None:
        """From now on sum the gradients of a planned weight, of both kinds of samples, into this parameter's ``.grad``.

        Args:
            parameter: of the shape of :class:`SliceGradient`; its values are not looked at.
        """
        self._parts[name].own = parameter

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
    """The planned slices of a matrix or bias: the channels they select, and the leaves that gather gradients."""

    def __init__(self, slices: PlannedSlices, of_outputs: bool) -> None:
        self.of_outputs = of_outputs
        self.index = slices.index
        self.conflict_index = slices.index.index_select(0, slices.conflict)
        other = [n for axis, n in enumerate(slices.shape) if axis != slices.axis]
        self.forget = _leaf(slices, (len(slices.index), *other))
        self.retain = _leaf(slices, (len(slices.conflict), *other)) if len(slices.conflict) else None

        #: takes the place of the two: the slices as a parameter of their own, whose ``.grad`` sums both kinds
        self.own: nn.Parameter | None = None
        self.dtype = slices.dtype
        self._conflict = slices.conflict

    @property
    def leaves(self) -> list[Tensor]:
        if self.own is not None:
            return [self.own]
        return [self.forget] if self.retain is None else [self.forget, self.retain]

    def handed(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """For each leaf its gradient, from those of :meth:`sides`."""
        if self.own is None:
            return found
        total = torch.zeros_like(self.own) if found[0] is None else found[0]
        if len(found) > 1 and found[1] is not None:
            total.index_add_(0, self._conflict, found[1])
        return [total]

    def sides(self, cut: int, count: int) -> list[tuple[slice, Tensor]]:
        """For forget samples, and for retain samples where they count: the tokens, and the channels."""
        found = [(slice(0, cut), self.index)]
        return found if self.retain is None else [*found, (slice(cut, count), self.conflict_index)]


def _leaf(slices: PlannedSlices, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape whose elements are one number in memory; only its gradient is of interest."""
    number = torch.zeros((), dtype=slices.dtype, device=slices.parameter.device)
    return number.expand(shape).detach().requires_grad_()


class _Layer:
    """A module with planned weights, whose forward is replaced while gradients are sparse."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self._owner = owner
        self.original: Callable[..., Tensor] = module.forward
        self._own = False

    def takes(self, name: str) -> bool:
        """Whether this weight of the module is one that the layer knows."""
        raise NotImplementedError

    def add(self, slices: PlannedSlices, kind: str) -> _Part:
        """Watch the planned slices of one of its weights, ``kind`` being that parameter's name in the module."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module does now."""
        raise NotImplementedError

    def attach(self) -> None:
        self._own = "forward" in self.module.__dict__  # somebody else's override, to be put back
        self.original = self.module.forward
        self.module.forward = self.forward
        setattr(self.module, _MARK, True)

    def detach(self) -> None:
        if not hasattr(self.module, _MARK):
            return
        delattr(self.module, _MARK)
        del self.module.forward
        if self._own:
            self.module.forward = self.original

    def cut(self, x: Tensor) -> int:
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


def _layer(owner: SparseGradients, path: str, module: nn.Module) -> _Layer | None:
    """The layer of a module of a known kind."""
    if is_experts(module):
        return _ExpertsLayer(owner, path, module)
    transposed = is_transposed(module)
    return None if transposed is None else _LinearLayer(owner, path, module, transposed)


class _LinearLayer(_Layer):
    """One linear layer with planned weights."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module, transposed: bool) -> None:
        super().__init__(owner, path, module)
        self.transposed = transposed
        self.weight: _Part | None = None
        self.bias: _Part | None = None

    @property
    def parts(self) -> list[_Part]:
        return [part for part in (self.weight, self.bias) if part is not None]

    def takes(self, name: str) -> bool:
        return name.rpartition(".")[2] in ("weight", "bias")

    def add(self, slices: PlannedSlices, kind: str) -> _Part:
        of_outputs = kind == "bias" or slices.axis == (1 if self.transposed else 0)
        part = _Part(slices, of_outputs)
        setattr(self, kind, part)
        return part

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return self.original(x)
        leaves = [leaf for part in self.parts for leaf in part.leaves]
        result: Tensor = _Linear.apply(x, self.module.weight, self, self.cut(x), *leaves)
        return result


class _Linear(torch.autograd.Function):
    """A linear layer as it is, with a backward for planned channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: _LinearLayer, cut: int, *leaves: Tensor) -> Tensor:
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
        layer: _LinearLayer = ctx.layer
        dy = grad.reshape(-1, grad.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(dy.dtype)  # under autocast the forward saw it like that
            dx = (dy @ (weight.T if layer.transposed else weight)).view(ctx.shape).to(ctx.dtype)
        gradients: list[Tensor | None] = []
        for part in layer.parts:
            found: list[Tensor | None] = []
            for number, (tokens, index) in enumerate(part.sides(ctx.cut, len(dy))):
                mine = dy[tokens]
                if len(mine) == 0:
                    found.append(None)
                elif part is layer.bias:
                    found.append(mine.index_select(1, index).to(part.dtype).sum(0))
                elif part.of_outputs:
                    x = kept[0].reshape(-1, kept[0].shape[-1])
                    found.append(_product(mine.index_select(1, index), x[tokens], part.dtype))
                else:
                    found.append(_product(kept[number], mine, part.dtype))
            gradients += part.handed(found)
        return (dx, None, None, None, *gradients)


class _ExpertsLayer(_Layer):
    """The experts of one layer, some of whose matrices are planned."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module) -> None:
        super().__init__(owner, path, module)
        #: (number of an expert, ``gate_up_proj`` or ``down_proj``) -> the planned slices of that matrix
        self.parts: dict[tuple[int, str], _Part] = {}

    def takes(self, name: str) -> bool:
        return member_of(name) is not None

    def add(self, slices: PlannedSlices, kind: str) -> _Part:
        number = member_of(slices.name)
        assert number is not None
        part = self.parts[number, kind] = _Part(slices, slices.axis == 0)
        return part

    # How many tokens an expert gets is known when it runs: nothing that a compiled graph could hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        routed = Routed.of(args, kwargs, detached=False)
        leaves = [leaf for part in self.parts.values() for leaf in part.leaves]
        result: Tensor = _Experts.apply(routed.x, routed.weights, routed.index, self, self.cut(routed.x), *leaves)
        return result


class _Experts(torch.autograd.Function):
    """A mixture of experts as it is, with a backward for planned channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, layer: _ExpertsLayer, cut: int,
                *leaves: Tensor) -> Tensor:
        ctx.layer, ctx.cut = layer, cut
        kind = x.device.type
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                        "enabled": torch.is_autocast_enabled(kind)}
        ctx.save_for_backward(x, weights, index)
        return layer.original(x, index, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights, index = ctx.saved_tensors
        layer: _ExpertsLayer = ctx.layer
        module: Any = layer.module
        passes_on = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # Summed at least in float32, as the experts' own forward sums what they write.
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if ctx.needs_input_grad[0] else None
        dweights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        found: dict[tuple[int, str], list[Tensor | None]] = {key: [] for key in layer.parts}
        for key, part in layer.parts.items():
            for tokens, channels in part.sides(ctx.cut, len(x)):
                shape = (len(channels), *part.forget.shape[1:])
                found[key].append(torch.zeros(shape, dtype=part.dtype, device=x.device)
                                  if tokens.stop > tokens.start else None)
        planned = {number for number, _ in layer.parts}
        for number in index.unique().tolist() if passes_on else sorted(planned):
            if number >= len(module.down_proj):  # what expert parallelism leaves to other processes
                continue
            chosen, position = (index == number).nonzero(as_tuple=True)  # chosen is sorted
            if len(chosen) == 0:
                continue
            mine = x[chosen]
            with torch.autocast(**ctx.autocast):
                seen = differentiate(module, number, mine, weights[chosen, position], grad[chosen])
                back = None if dx is None else seen.at_both @ module.gate_up_proj[number]
            if dx is not None and back is not None:
                dx.index_add_(0, chosen, back.to(dx.dtype))
            if dweights is not None:
                dweights[chosen, position] = seen.at_share.to(dweights.dtype)
            first = int((chosen < ctx.cut).sum())
            for kind, inputs, outputs in (("gate_up_proj", mine, seen.at_both),
                                          ("down_proj", seen.hidden, seen.at_down)):
                if (number, kind) not in layer.parts:
                    continue
                part = layer.parts[number, kind]
                for total, (tokens, channels) in zip(found[number, kind], part.sides(first, len(chosen)), strict=True):
                    if total is None or tokens.stop == tokens.start:
                        continue
                    a, b = (outputs, inputs) if part.of_outputs else (inputs, outputs)
                    total.copy_(_product(a[tokens].index_select(1, channels), b[tokens], total.dtype))
        return (None if dx is None else dx.to(x.dtype), dweights, None, None, None,
                *(gradient for key, part in layer.parts.items() for gradient in part.handed(found[key])))


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

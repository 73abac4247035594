"""The layers of :mod:`.sparse`: modules with planned weights, whose forward is replaced by one that runs the same forward
and a backward for planned channels alone, or cuts whole gradients down to the planned slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ClueError
from ..model.anatomy import is_transposed
from ..model.experts import Routed, differentiate, is_experts
from ..weights import member_of, view_of

if TYPE_CHECKING:
    from .sparse import PlannedSlices, SparseGradients

HALF = (torch.bfloat16, torch.float16)
#: attribute of a module whose forward is replaced
MARK = "_clue_sparse_gradients"


class Part:
    """The planned slices of a matrix or bias: the channels they select, and the leaves that gather gradients."""

    def __init__(self, slices: PlannedSlices, of_outputs: bool) -> None:
        self.slices, self.of_outputs, self.parameter = slices, of_outputs, slices.parameter
        self.index = slices.index
        self.conflict_index = slices.index.index_select(0, slices.conflict)
        other = [n for axis, n in enumerate(slices.shape) if axis != slices.axis]
        self.forget = _leaf(slices, (len(slices.index), *other))
        self.retain = _leaf(slices, (len(slices.conflict), *other)) if len(slices.conflict) else None

        #: takes the place of the two: the slices as a parameter of their own, whose ``.grad`` sums both kinds
        self.own: nn.Parameter | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of its gradients; a model that is cast after its slices became parameters leaves them as they are."""
        return self.forget.dtype if self.own is None else self.own.dtype

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
            total.index_add_(0, self.slices.conflict, found[1])
        return [total]

    def sides(self, cut: int, count: int) -> list[tuple[slice, Tensor]]:
        """For forget samples, and for retain samples where they count: the tokens, and the channels."""
        found = [(slice(0, cut), self.index)]
        return found if self.retain is None else [*found, (slice(cut, count), self.conflict_index)]


def _leaf(slices: PlannedSlices, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape whose elements are one number in memory; only its gradient is of interest."""
    number = torch.zeros((), dtype=slices.dtype, device=slices.parameter.device)
    return number.expand(shape).detach().requires_grad_()


class Layer(ABC):
    """A module with planned weights, whose forward is replaced while gradients are sparse."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self._owner = owner
        self.original: Callable[..., Tensor] = module.forward
        self._own = False

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Whether this weight of the module is one that the layer knows."""

    @abstractmethod
    def add(self, slices: PlannedSlices, kind: str) -> Part:
        """Watch the planned slices of one of its weights, ``kind`` being that parameter's name in the module."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module does now."""

    def attach(self) -> None:
        self._own = "forward" in self.module.__dict__  # somebody else's override, to be put back
        self.original = self.module.forward
        self.module.forward = self.forward
        setattr(self.module, MARK, True)

    def detach(self) -> None:
        if not hasattr(self.module, MARK):
            return
        delattr(self.module, MARK)
        del self.module.forward
        if self._own:
            self.module.forward = self.original

    @property
    def samples(self) -> tuple[int, int, int]:
        """What the pass holds: forget samples, all samples, and positions of each."""
        if self._owner.samples is None:
            raise ClueError("sparse gradients need to know which samples are to be forgotten: call split before the"
                            " model")
        return self._owner.samples

    def cut(self, x: Tensor) -> int:
        """How many of the tokens in x [..., d_in] belong to forget samples."""
        forget, total, seq = self.samples
        tokens = x.numel() // x.shape[-1]
        if forget in (0, total):
            return tokens if forget else 0
        if not (x.shape[0] == total if x.ndim > 2 else x.shape[0] in (total, total * seq)):
            raise ClueError(f"{self.path} got an input of shape {tuple(x.shape)} from {total} samples of {seq}"
                            " positions, which does not say which sample a row belongs to: run forget and retain"
                            " batches apart")
        return tokens // total * forget


def _plain_pass(parts: Iterable[Part]) -> bool:
    """Whether a pass is to run as without sparse gradients: nothing is differentiated, or somebody asks for the gradients of
    the whole weights, which were frozen on entering."""
    return not torch.is_grad_enabled() or any(part.parameter.requires_grad for part in parts)


def layer_of(owner: SparseGradients, path: str, module: nn.Module) -> Layer | None:
    """The layer of a module of a known kind."""
    if is_experts(module):
        return _ExpertsLayer(owner, path, module)
    transposed = is_transposed(module)
    return None if transposed is None else _LinearLayer(owner, path, module, transposed)


class _LinearLayer(Layer):
    """One linear layer with planned weights."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module, transposed: bool) -> None:
        super().__init__(owner, path, module)
        self.transposed = transposed
        self.weight: Part | None = None
        self.bias: Part | None = None

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.weight, self.bias) if part is not None]

    def takes(self, name: str) -> bool:
        return name.rpartition(".")[2] in ("weight", "bias")

    def add(self, slices: PlannedSlices, kind: str) -> Part:
        of_outputs = kind == "bias" or slices.axis == (1 if self.transposed else 0)
        part = Part(slices, of_outputs)
        setattr(self, kind, part)
        return part

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:  # type: ignore[override]
        x = given[0] if given else next(iter(named.values()))  # nn.Linear calls it input, Conv1D x
        if _plain_pass(self.parts):
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


class _ExpertsLayer(Layer):
    """The experts of one layer, some of whose matrices are planned."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module) -> None:
        super().__init__(owner, path, module)
        #: (number of an expert, ``gate_up_proj`` or ``down_proj``) -> the planned slices of that matrix
        self.parts: dict[tuple[int, str], Part] = {}

    def takes(self, name: str) -> bool:
        return member_of(name) is not None

    def add(self, slices: PlannedSlices, kind: str) -> Part:
        number = member_of(slices.name)
        assert number is not None
        part = self.parts[number, kind] = Part(slices, slices.axis == 0)
        return part

    # How many tokens an expert gets is known when it runs: nothing that a compiled graph could hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if _plain_pass(self.parts.values()):
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


class AnyLayer(Layer):
    """A module of any kind: autograd computes the whole gradients of its planned weights, which are cut down to the slices
    at once. All samples of a pass are of one kind."""

    def __init__(self, owner: SparseGradients, path: str, module: nn.Module) -> None:
        super().__init__(owner, path, module)
        #: name of a parameter in the module -> the planned slices of it, or of matrices stacked in it
        self.parts: dict[str, list[Part]] = {}

    def takes(self, name: str) -> bool:
        return True

    def add(self, slices: PlannedSlices, kind: str) -> Part:
        part = Part(slices, slices.axis == 0)
        self.parts.setdefault(kind, []).append(part)
        return part

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if _plain_pass(part for parts in self.parts.values() for part in parts):
            return self.original(*args, **kwargs)
        forget, total, _ = self.samples
        own: Any = self.module._parameters
        before = dict(own)
        try:
            for kind, parts in self.parts.items():
                own[kind] = _Cut.apply(own[kind], parts, forget, total, *(leaf for part in parts for leaf in part.leaves))
            return self.original(*args, **kwargs)
        finally:
            own.update(before)


class _Cut(torch.autograd.Function):
    """A parameter as it is, whose gradient is handed to its planned slices alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: list[Part], forget: int, total: int, *leaves: Tensor) -> Tensor:
        ctx.parts, ctx.forget, ctx.total = parts, forget, total
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = []
        for part in ctx.parts:
            name, axis = part.slices.name, part.slices.axis
            whole = view_of(grad.contiguous(), name)
            gradients += part.handed([
                whole.index_select(axis, index).movedim(axis, 0).contiguous().to(part.dtype) if samples.stop > samples.start
                else None for samples, index in part.sides(ctx.forget, ctx.total)])
        return (None, None, None, None, *gradients)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b of [tokens, k] and [tokens, length], as ``dtype``.

    Half precision is multiplied as float32 on a CPU, where its products are no faster and the planned channels are few;
    on a GPU as it is, since its products are summed in float32 anyway and only the result is rounded.
    """
    if a.dtype in HALF or b.dtype in HALF:
        half = a.dtype if a.dtype in HALF else b.dtype
        work = half if a.is_cuda else torch.float32
        a, b = a.to(work), b.to(work)
    return (a.T @ b).to(dtype)

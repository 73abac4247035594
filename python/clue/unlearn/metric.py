"""RetainMetric: the retain set's Kronecker curvature, and forget gradients measured in it.

For a linear layer y = W x, the curvature of the retain loss is approximated by A (x) G, with A = mean x x^T over the
tokens of the retain set and G = mean dy dy^T of the gradients at the layer's outputs (K-FAC, arXiv 1503.05671). The
step

    P(g) = (G / damping + I)^-1  g  (A / damping + I)^-1,   A and G each divided by its mean diagonal,

keeps the part of a forget gradient g that retention does not use and shrinks the rest. Both factors are restricted to
what the plan moves: planned rows need G over these rows only, planned columns A over these columns only. Single weights
need both whole: their gradient stands among zeros, is stepped, and is read off again. A bias is a
layer whose only input is the constant 1. An expert is two linear layers that see the tokens routed to it. Where a layer
keeps W transposed (Conv1D), so are g, the step and its factors. Wide factors are kept to their largest eigenvalues
(:mod:`.curvature`), so that the metric of an 8B model's plan takes about 1 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..model.anatomy import is_transposed, require_plain
from ..model.answers import answer_logits
from ..model.experts import Routed, is_experts, linear_traffic
from ..model.modes import frozen
from ..processes import place
from ..types import Role
from ..weights import is_flat, member_of, parameter_of, weight_of
from .curvature import EXACT_WIDTH, RANK, Factor, Inverse
from .objectives import answer_log_probs
from .optimizer import planned_index, planned_parameters

if TYPE_CHECKING:
    from ..data.encoding import Batch
    from ..plan import Plan


class RetainMetric:
    """Inverse curvature factors of planned slices. Make one with :meth:`measure`."""

    def __init__(self, sides: Mapping[str, tuple[Inverse | None, Inverse | None]], sizes: Mapping[str, tuple[int, int]],
                 places: Mapping[str, Tensor]) -> None:
        """``sides``: parameter -> (what to multiply by from the left, from the right), ``None`` for nothing.

        That is (G, A), or (A, G) for a weight kept transposed. Of parameters whose single weights are planned, ``sizes`` has
        the whole shape and ``places`` where these lie in it, int64 [k].
        """
        self._sides, self._sizes, self._places = dict(sides), dict(sizes), dict(places)

    @classmethod
    def measure(cls, model: nn.Module, plan: Plan, batches: Iterable[Batch], *, damping: float,
                roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT), exact_width: int = EXACT_WIDTH,
                rank: int = RANK) -> RetainMetric:
        """One forward and backward pass over retain batches; weight gradients are never computed.

        Processes of torch.distributed share the batches, which all must give, and end with the same metric to the last bit.

        Args:
            model: a causal LM; its mode and ``requires_grad`` flags are left as they were.
            plan: which weights move.
            batches: :class:`clue.data.encoding.Batch`; padding is left out of both factors.
            damping: relative to each factor's mean diagonal; smaller keeps less of what retention uses.
            roles: the slices of these roles, taken together, are the ones that can be preconditioned afterwards.
            exact_width: factors of more channels are kept to their ``rank`` largest eigenvalues.
            rank: how many these are.

        Raises:
            PlanError: a planned weight is not the weight or bias of a linear layer, or an expert's.
            ModelError: the model is compiled.
            ClueError: ``exact_width`` is negative, or ``rank`` is not positive.
        """
        require_plain(model, "; or unlearn with metric = false")
        layers, stacks = _layers(model, plan, roles, partial(Factor, exact_width=exact_width, rank=rank))
        if not layers and not stacks:
            return cls({}, {}, {})
        tokens: list[Tensor] = []  # the mask of the batch that is running, [batch, seq]
        previous: list[tuple[Tensor, Factor]] = []  # the latest full input, and the factor it went into

        def attach(layer: _Layer) -> Any:
            def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if layer.input is not None:
                    if layer.input.index is None and previous and previous[0][0] is args[0]:
                        layer.input = previous[0][1]
                    else:
                        if layer.input.index is None:
                            previous[:] = [(args[0], layer.input)]
                        layer.input.add(_counted(args[0].detach(), tokens[0]))
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: _add_all(layer.outputs, _counted(gradient, tokens[0])))

            return layer.module.register_forward_hook(forward)

        def attach_experts(module: nn.Module, planned: dict[int, list[_Part]]) -> Any:
            def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                routed, mask = Routed.of(args, kwargs), tokens[0].ravel()

                def backward(gradient: Tensor) -> None:
                    for number, parts in planned.items():
                        seen = linear_traffic(module, number, routed, gradient, mask)
                        for part in parts:
                            inputs, outputs = seen[part.kind]
                            part.inputs.add(inputs)
                            part.outputs.add(outputs)

                output.register_hook(backward)  # type: ignore[no-untyped-call]

            return module.register_forward_hook(forward, with_kwargs=True)

        def differentiable(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.requires_grad_(True)

        with frozen(model), torch.enable_grad():
            handles = [*map(attach, layers), *(attach_experts(*stack) for stack in stacks.items())]
            handles.append(model.get_input_embeddings().register_forward_hook(differentiable))  # type: ignore[operator]
            try:
                for batch, counts in _shared_out(batches):
                    tokens[:] = [batch.attention_mask.bool() & counts]
                    log_p, _ = answer_log_probs(*answer_logits(model, batch))
                    (-log_p.sum()).backward()  # type: ignore[no-untyped-call]
            finally:
                for handle in handles:
                    handle.remove()
        of_experts = [part for planned in stacks.values() for parts in planned.values() for part in parts]
        factors = [f for layer in layers for f in (layer.input, *layer.outputs.values())]
        factors += [f for part in of_experts for f in (part.inputs, part.outputs)]
        for factor in {id(f): f for f in factors if f is not None}.values():  # q, k and v have one, and so do gate and up
            factor.add_up()
        sides: dict[str, tuple[Inverse | None, Inverse | None]] = {}
        sizes: dict[str, tuple[int, int]] = {}

        constant = Factor(None)
        constant.add(torch.ones(1, 1))

        def invert(name: str, rows: Factor, columns: Factor) -> None:
            if rows.met and columns.met:
                sizes[name] = rows.width, columns.width
                sides[name] = rows.inverse(damping), columns.inverse(damping)

        for layer in layers:
            for name, outputs in layer.outputs.items():
                if weight_of(name) != layer.weight:
                    invert(name, outputs, constant)
                elif layer.input is not None:
                    invert(name, *((layer.input, outputs) if layer.transposed else (outputs, layer.input)))
        for part in of_experts:
            invert(part.name, part.outputs, part.inputs)
        device = next(model.parameters()).device
        places = {name: torch.from_numpy(planned_index(plan, name, roles)[1]).to(device) for name in sides if is_flat(name)}
        return cls(sides, sizes, places)

    def bytes(self) -> int:
        """Memory of the inverses; q, k and v share one, and so do gate and up."""
        inverses = {id(inverse): inverse for pair in self._sides.values() for inverse in pair if inverse is not None}
        return sum(tensor.nbytes for inverse in inverses.values() for tensor in inverse.tensors())

    @torch.no_grad()
    def precondition(self, parameter: str, gradient: Tensor) -> Tensor:
        """P(g) of the planned slices of one parameter.

        Args:
            parameter: name in ``model.state_dict()``.
            gradient: of all its slices of the measured roles, in the order of their numbers: [k, columns] for k planned
                rows, [rows, k] for k planned columns, [k] for entries of a bias and for single weights.

        Returns:
            a tensor of the same shape and dtype; computed in float32 (float64 for float64).
        """
        rows, columns = self._sides[parameter]
        place = self._places.get(parameter)
        if place is not None:
            size = self._sizes[parameter]
            step = gradient.new_zeros(size[0] * size[1]).index_copy_(0, place, gradient).view(size)
        else:
            step = gradient.unsqueeze(1) if gradient.ndim == 1 else gradient
        for inverse, left in ((rows, True), (columns, False)):
            if inverse is not None:
                step = inverse.apply(step, left=left)
        if place is not None:
            step = step.reshape(-1).index_select(0, place)
        return step.reshape(gradient.shape).to(gradient.dtype)


@dataclass
class _Layer:
    """One linear layer: a factor over its inputs (for its weight) and one over its outputs per planned parameter."""

    module: nn.Module
    weight: str
    transposed: bool
    input: Factor | None
    outputs: dict[str, Factor]


@dataclass
class _Part:
    """One planned matrix of one expert, ``gate_up_proj`` or ``down_proj``: factors over its inputs and outputs."""

    name: str
    kind: str
    inputs: Factor
    outputs: Factor


def _layers(model: nn.Module, plan: Plan, roles: Sequence[Role],
            factor: Callable[[Tensor | None], Factor]) -> tuple[list[_Layer], dict[nn.Module, dict[int, list[_Part]]]]:
    """What to watch: linear layers, and in stacks of experts the experts with planned parts."""
    layers: dict[str, _Layer] = {}
    stacks: dict[nn.Module, dict[int, list[_Part]]] = {}
    for name, parameter in planned_parameters(model, plan, roles).items():
        axis, union = planned_index(plan, name, roles)
        index = torch.from_numpy(union).to(parameter.device)
        path, _, kind = parameter_of(name).rpartition(".")
        module = model.get_submodule(path)
        number = member_of(name)
        if number is not None and is_experts(module):
            rows, columns = (index if axis == side and not is_flat(name) else None for side in (0, 1))
            part = _Part(name, kind, factor(columns), factor(rows))
            stacks.setdefault(module, {}).setdefault(number, []).append(part)
            continue
        transposed = is_transposed(module)
        if transposed is None or kind not in ("weight", "bias"):
            raise PlanError(f"{name} does not belong to a linear layer, so the retain metric cannot measure it: unlearn with"
                            " metric = false")
        layer = layers.setdefault(path, _Layer(module, f"{path}.weight", transposed, None, {}))
        of_outputs = kind == "bias" or axis == (1 if transposed else 0)
        if kind == "weight" and is_flat(name):
            layer.outputs[name], layer.input = factor(None), factor(None)
            continue
        layer.outputs[name] = factor(index if of_outputs else None)
        if kind == "weight":
            layer.input = factor(None if of_outputs else index)
    return list(layers.values()), stacks


def _shared_out(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This process's share of the batches. All get as many, as sharded models want: where there are too few, one that does not
    count."""
    rank, world = place()
    if world == 1:
        yield from ((batch, True) for batch in batches)
        return
    whole = list(batches)
    for number in range(rank, -(-len(whole) // world) * world, world):
        yield whole[number % len(whole)], number < len(whole)


def _counted(vectors: Tensor, mask: Tensor) -> Tensor:
    """The rows, [tokens, channels], at tokens that count. The head sees no more than the last positions, which answers are
    predicted at."""
    if vectors.ndim == 3 and vectors.shape[1] < mask.shape[1]:
        mask = mask[:, -vectors.shape[1]:]
    return vectors.flatten(0, -2)[mask.ravel()]


def _add_all(factors: dict[str, Factor], gradient: Tensor) -> None:
    for factor in factors.values():
        factor.add(gradient)

"""Experts: the hidden units of a mixture of experts, from what its experts module is called with.

The MLP writes the sum over its experts of share * W_down (act(W_gate x) * W_up x), where an expert's share of a token is
the routing weight, zero where the token was not routed to it; the share of a shared expert, which sees every token, is
the sigmoid of its gate. So a hidden unit's activation is taken to be

    z = share * act(gate) * up,

and the MLP writes exactly the sum over units of z times their columns of W_down: differences of two runs are linear in
z, and the gradient at z, W_down^T times the gradient at the MLP's output, exists for every expert whether or not a token
was routed to it. Units are numbered expert by expert, those of the shared expert last.

Nothing of size [tokens, units] is ever made. A run keeps a token's input and routing, 2 d_model + 10 k bytes in a 16-bit
model; activations are computed again for one expert at a time, on the tokens routed to it in either run. This asks
nothing of the experts' own forward, so it holds for whichever implementation the configuration selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..weights import part_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .anatomy import Ints, Owned, Projection

#: Tokens of one expert whose activations and gradients are held at once.
TILE = 2048

#: Modules that keep all experts in ``gate_up_proj`` [experts, 2 width, d_model], gate first, and ``down_proj``
#: [experts, d_model, width], and are called with (hidden_states, top_k_index, top_k_weights).
_EXPERTS = {
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",
}


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of the known kinds of stacked experts with its weights as they were made.

    Subclasses, quantised experts and adapters are not: they compute something else than the two weights say.
    """
    known = f"{type(module).__module__}.{type(module).__qualname__}" in _EXPERTS
    return known and {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}


@dataclass(frozen=True)
class Routed:
    """What an experts module was called with in one run.

    Attributes:
        x: [tokens, d_model].
        index: int64 [tokens, k], the experts each token is routed to, all different.
        weights: [tokens, k], their routing weights.
    """

    x: Tensor
    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], *, detached: bool = True) -> Routed:
        """From the arguments of the call; ``detached`` from what they were computed from."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        found = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [cast("Tensor", found[name]) for name in names]
        return cls(*(tensor.detach() if detached else tensor for tensor in given))

    def share(self, number: int) -> Tensor:
        """[tokens]: the routing weight of one expert for every token, zero where it was not routed."""
        return (self.weights * (self.index == number)).sum(-1)


@dataclass(frozen=True)
class Shared:
    """A shared expert: an ordinary MLP that every token passes, scaled by the sigmoid of ``scale``, a linear layer."""

    gate: Projection
    up: Projection
    down: Projection
    scale: nn.Module


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        module: keeps the weights of the routed experts.
        name: its path in the model.
        count: number of routed experts.
        width: hidden units of each.
        shared: the shared expert, which counts as expert number ``count``; ``None`` without one.
    """

    module: nn.Module
    name: str
    count: int
    width: int
    shared: Shared | None

    @property
    def numbers(self) -> range:
        """The experts, the shared one last."""
        return range(self.count + (self.shared is not None))

    def span(self, number: int) -> tuple[int, int]:
        """First hidden unit of an expert, and one past its last."""
        start = number * self.width
        if number == self.count and self.shared is not None:
            return start, start + int(self.shared.down.weight.shape[1])
        return start, start + self.width

    def slices(self, units: npt.NDArray[np.int64]) -> list[Owned]:
        """The (parameter, axis, indices) that hidden units own: rows of gate and up, columns of down, of each expert."""
        found: list[Owned] = []
        for number in np.unique(np.minimum(units // self.width, self.count)).tolist():
            start, stop = self.span(number)
            own: Ints = units[(units >= start) & (units < stop)] - start
            if number == self.count and self.shared is not None:
                shared = self.shared
                found += [*shared.gate.rows(own), *shared.up.rows(own), *shared.down.columns(own)]
            else:
                gate_up, down = (part_name(f"{self.name}.{kind}", number) for kind in ("gate_up_proj", "down_proj"))
                found += [(gate_up, 0, own), (gate_up, 0, own + self.width), (down, 1, own)]
        return found

    def share(self, number: int, routed: Routed) -> Tensor:
        """[tokens]: what this expert's output is multiplied by; zero where a token is not routed to it."""
        if number == self.count and self.shared is not None:
            return cast("Tensor", self.shared.scale(routed.x)).sigmoid()[:, 0]
        return routed.share(number)

    def down(self, number: int) -> Tensor:
        """W_down of one expert, [d_model, its units]."""
        if number == self.count and self.shared is not None:
            return self.shared.down.weight
        return cast("Tensor", self.module.down_proj)[number]

    def hidden(self, number: int, x: Tensor, share: Tensor) -> Tensor:
        """Activations of one expert's units, [tokens, its units], from its input and its share of each token."""
        activation = cast(Any, self.module).act_fn
        if number == self.count and self.shared is not None:
            gate, up = x @ self.shared.gate.weight.T, x @ self.shared.up.weight.T
        else:
            gate, up = (x @ cast("Tensor", self.module.gate_up_proj)[number].T).chunk(2, dim=-1)
        return (share[:, None] * (activation(gate) * up)).to(x.dtype)


def neuron_attribution(experts: Experts, clean: Routed, corrupted: Routed, gradients: tuple[Tensor, Tensor],
                       sums: Sequence[Tensor], rows: Tensor, kernels: Any) -> None:
    """Add one layer's hidden units to their four sums, one expert and at most ``TILE`` of its tokens at a time.

    Peak memory above weights is about 4 times [tokens, units] of that.

    Args:
        clean, corrupted: what the experts were called with in the two runs.
        gradients: [tokens, d_model] at the MLP's output, next to the clean and to the corrupted prompt.
        sums: four [units], as the kernel ``neuron_attribution`` takes them.
        rows: bool [tokens], the tokens that count.
        kernels: the native module of this device.
    """
    for number in experts.numbers:
        down, (start, stop) = experts.down(number), experts.span(number)
        own = [total[start:stop] for total in sums]
        for chosen, units in _activations(experts, number, (clean, corrupted), rows):
            kernels.neuron_attribution(*units, *(gradient[chosen] @ down for gradient in gradients), *own)


def exchange(experts: Experts, now: Routed, other: Routed, units: Tensor) -> Tensor:
    """What the MLP would write more if some of its hidden units had their activations of another run.

    Each unit's difference times its column of W_down. A unit of an expert that a token is routed to in one run alone
    comes from, or falls to, zero.

    Args:
        now, other: what the experts are called with, and were in the other run.
        units: bool [units], true for those that change.

    Returns:
        float32 or finer [tokens, d_model].
    """
    import torch

    fine = torch.promote_types(now.x.dtype, torch.float32)
    more = torch.zeros_like(now.x, dtype=fine)
    for number in experts.numbers:
        start, stop = experts.span(number)
        own = units[start:stop].nonzero()[:, 0]
        if len(own) == 0:
            continue
        down = experts.down(number)[:, own].to(fine)
        for chosen, (z, wanted) in _activations(experts, number, (now, other)):
            more[chosen] += (wanted[:, own].to(fine) - z[:, own].to(fine)) @ down.T
    return more


def _activations(experts: Experts, number: int, runs: tuple[Routed, Routed],
                 rows: Tensor | None = None) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Activations of one expert's units in two runs, [chosen, its units], on the tokens routed to it in either.

    Args:
        rows: bool [tokens], the tokens that count; ``None`` means all.

    Yields:
        at most ``TILE`` tokens, int64 [chosen], and their activations.
    """
    shares = [experts.share(number, run) for run in runs]
    routed = (shares[0] != 0) | (shares[1] != 0)
    moving = (routed if rows is None else routed & rows).nonzero()[:, 0]
    start, stop = experts.span(number)
    for chosen in moving.split(TILE) if len(moving) else ():
        units = []
        for run, share in zip(runs, shares, strict=True):
            z = run.x.new_zeros(len(chosen), stop - start)
            here = share[chosen] != 0
            z[here] = experts.hidden(number, run.x[chosen[here]], share[chosen[here]])
            units.append(z)
        yield chosen, units


@dataclass(frozen=True)
class Differentiated:
    """One routed expert on the tokens routed to it, run again with the gradient at what it writes.

    Attributes:
        hidden: [tokens, width], activations, without the share.
        at_both: [tokens, 2 width], gradient at the output of ``gate_up_proj``.
        at_down: [tokens, d_model], gradient at the output of ``down_proj``.
        at_share: [tokens], gradient at the expert's share of each token.
    """

    hidden: Tensor
    at_both: Tensor
    at_down: Tensor
    at_share: Tensor


def differentiate(module: nn.Module, number: int, x: Tensor, share: Tensor, gradient: Tensor) -> Differentiated:
    """Run one routed expert again and differentiate it; its weights get no gradient.

    Args:
        module: one that :func:`is_experts` knows.
        x: [tokens, d_model], the tokens routed to it.
        share: [tokens], their routing weights.
        gradient: [tokens, d_model], at the module's output.
    """
    import torch

    weights = cast(Any, module)
    with torch.enable_grad():
        both = (x @ weights.gate_up_proj[number].detach().T).requires_grad_()
        gate, up = both.chunk(2, dim=-1)
        hidden = weights.act_fn(gate) * up
    with torch.no_grad():
        at_hidden = gradient.to(hidden.dtype) @ weights.down_proj[number].detach()
        at_share = (hidden * at_hidden).sum(-1)
        (at_both,) = torch.autograd.grad(hidden, both, (share[:, None] * at_hidden).to(hidden.dtype))
        return Differentiated(hidden.detach(), at_both, (share[:, None] * gradient).to(hidden.dtype), at_share)


def linear_traffic(module: nn.Module, number: int, routed: Routed, gradient: Tensor,
                   rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What passes through the two linear maps of a routed expert, on the tokens routed to it.

    Args:
        module: one that :func:`is_experts` knows.
        gradient: [tokens, d_model], at the module's output.
        rows: bool [tokens], the tokens that count.

    Returns:
        for ``gate_up_proj`` and ``down_proj`` the inputs, [routed tokens, inputs], and the gradients at the outputs.
    """
    share = routed.share(number)
    chosen = (rows & (share != 0)).nonzero()[:, 0]
    x = routed.x[chosen]
    seen = differentiate(module, number, x, share[chosen], gradient[chosen])
    return {"gate_up_proj": (x, seen.at_both), "down_proj": (seen.hidden, seen.at_down)}

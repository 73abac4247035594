"""Gradients: what one pass over a record set says of a model's matrices, from hooks on the unmodified model.

Everything is a mean over records of the loss of their answer tokens (a record's mean, so that a long answer counts no more
than a short one), added up in float32 whatever the model's dtype. A matrix's gradient is added to its sum as soon as the
backward pass has made it and is dropped then, so that beside the sums no more than one gradient lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.encoding import batches
from ..errors import ModelError
from ..model.answers import answer_logits
from ..model.experts import Routed, linear_traffic
from ..model.modes import frozen
from ..unlearn.objectives import answer_log_probs
from ..weights import view_of

if TYPE_CHECKING:
    from torch import nn

    from ..data.encoding import Batch, Example
    from ..model.anatomy import Anatomy
    from .candidates import Matrix


@dataclass(frozen=True)
class Inputs:
    """What a baseline looks at.

    Attributes:
        body: the model.
        matrices: the candidates.
        forget: without end-of-sequence tokens, which carry no fact.
        retain: of all retain sets together.
        pad: the token that fills batches.
        batch_size: records per pass.
        seed: of whatever is random.
    """

    body: Anatomy
    matrices: tuple[Matrix, ...]
    forget: Sequence[Example]
    retain: Sequence[Example]
    pad: int
    batch_size: int
    seed: int

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """The examples in batches of like lengths, on the model's device."""
        order = sorted(examples, key=lambda example: len(example.input_ids))
        device = next(self.body.model.parameters()).device
        return batches(order, self.batch_size, pad=self.pad, device=device)


def mean_gradient(inputs: Inputs, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Gradient of the mean record's loss, by matrix: float32 and of the matrix's shape."""
    model = inputs.body.model
    parameters = {id(matrix.parameter): matrix.parameter for matrix in inputs.matrices}
    sums = {key: torch.zeros_like(parameter, dtype=torch.float32) for key, parameter in parameters.items()}

    def add(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            sums[id(parameter)] += parameter.grad
            parameter.grad = None

    with frozen(model), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        handles: list[Any] = [p.register_post_accumulate_grad_hook(add) for p in parameters.values()]
        try:
            for batch in inputs.batches(examples):
                _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
    for total in sums.values():
        total /= len(examples)
    return {matrix.name: view_of(sums[id(matrix.parameter)], matrix.name) for matrix in inputs.matrices}


def input_norms(inputs: Inputs, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Root mean square of every input of every matrix over the tokens it sees, by matrix: float32 [d_in].

    An expert sees the tokens routed to it; one that sees none has zeros.
    """
    model = inputs.body.model
    squares: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    mask: list[Tensor] = []

    def add(matrix: Matrix, x: Tensor) -> None:
        found = x.detach().float().square().sum(0)
        squares[matrix.name] = squares.get(matrix.name, 0) + found
        seen[matrix.name] = seen.get(matrix.name, 0) + len(x)

    def plain(matrix: Matrix) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(matrix, args[0].flatten(0, -2)[mask[0]])

        return matrix.module.register_forward_pre_hook(hook)

    def expert(matrix: Matrix) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            routed = Routed.of(args, kwargs)
            traffic = linear_traffic(module, matrix.expert or 0, routed, torch.zeros_like(routed.x), mask[0])
            add(matrix, traffic[matrix.name.rpartition(".")[2].partition("[")[0]][0])

        return matrix.module.register_forward_pre_hook(hook, with_kwargs=True)

    with frozen(model), torch.no_grad():
        handles = [plain(m) if m.expert is None else expert(m) for m in inputs.matrices]
        try:
            for batch in inputs.batches(examples):
                mask[:] = [batch.attention_mask.bool().ravel()]
                answer_logits(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return {name: (total / max(1, seen[name])).sqrt() for name, total in squares.items()}


def unit_attribution(inputs: Inputs, examples: Sequence[Example]) -> npt.NDArray[np.float64]:
    """Mean over records of |sum over tokens of activation times gradient| of every hidden unit: [n_layers, d_mlp].

    Raises:
        ModelError: the model has experts, whose activations its modules do not show.
    """
    body = inputs.body
    if any(layer.down is None for layer in body.layers):
        raise ModelError("depn scores the hidden units of plain MLPs, and this model has experts: compare with eap, which"
                         " scores experts' units too")
    sums = torch.zeros(body.n_layers, body.d_mlp, dtype=torch.float64)
    mask: list[Tensor] = []

    def watch(number: int, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]

            def backward(gradient: Tensor) -> None:
                product = (x.detach().float() * gradient.float()).view(*mask[0].shape, -1)
                sums[number] += (product * mask[0].unsqueeze(-1)).sum(1).abs().sum(0).cpu().double()

            x.register_hook(backward)  # type: ignore[no-untyped-call]

        return module.register_forward_pre_hook(hook)

    with frozen(body.model), torch.enable_grad(), _differentiable(body.model):
        handles = [watch(i, layer.down.module) for i, layer in enumerate(body.layers) if layer.down is not None]
        try:
            for batch in inputs.batches(examples):
                mask[:] = [batch.attention_mask]
                _loss(body.model, batch).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
    found: npt.NDArray[np.float64] = (sums / len(examples)).numpy()
    return found


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over records of their mean loss per answer token."""
    log_p, n_tokens = answer_log_probs(*answer_logits(model, batch))
    return -(log_p / n_tokens).sum()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Embeddings that require a gradient, for a model whose weights do not."""
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()

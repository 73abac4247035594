"""Capture: one run of the unmodified model, keeping what each writer adds and the gradient each reader sees.

Only factors are kept: head outputs before W_o and gradients at the outputs of q, k and v have rank d_head, so nothing of
size [batch, seq, writers, d_model] ever exists. Weight gradients stay off; logits are computed at answer positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from .anatomy import Anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

    Target = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """What one run carried. Lists have one entry per layer; gradients are of the summed target.

    Attributes:
        embed: [batch, seq, d_model], what the embedding writes.
        heads: [batch, seq, n_heads * d_head], head outputs before W_o.
        mlps: [batch, seq, d_model], MLP outputs.
        hidden: [batch, seq, d_mlp], activations of the hidden units (input of the down projection).
        attention_residual, mlp_residual: [batch, seq, d_model], the residual stream each norm reads; ``final_residual``
            is the final norm's.
        grad_q, grad_k, grad_v: gradients at the projections' outputs, [batch, seq, heads or groups * d_head].
        grad_mlp: [batch, seq, d_model], gradient at the output of the MLP's norm.
        grad_hidden: [batch, seq, d_mlp].
        grad_final: [batch, seq, d_model], gradient at the *output* of the final norm.
        logits: float32 or finer [batch, positions, vocabulary], at the kept positions only.
    """

    embed: Tensor
    heads: list[Tensor]
    mlps: list[Tensor]
    hidden: list[Tensor]
    attention_residual: list[Tensor]
    mlp_residual: list[Tensor]
    final_residual: Tensor
    grad_q: list[Tensor]
    grad_k: list[Tensor]
    grad_v: list[Tensor]
    grad_mlp: list[Tensor]
    grad_hidden: list[Tensor]
    grad_final: Tensor
    logits: Tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no weight gradients; both restored on exit."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def run(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, target: Target) -> Run:
    """Forward and backward once; call inside :func:`frozen`.

    Args:
        input_ids, attention_mask: int64 [batch, seq], right-padded.
        positions: int64 [positions], the sequence positions whose logits the target needs.
        target: maps those logits [batch, positions, vocabulary] to the scalar whose gradient is taken.
    """
    kept: dict[str, Any] = {name: [] for name in (
        "heads", "mlps", "hidden", "attention_residual", "mlp_residual", "q", "k", "v", "mlp_norm")}

    def output_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: kept[name].append(output)

    def input_of(name: str) -> Callable[..., None]:
        return lambda module, args: kept[name].append(args[0])

    def embed_hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept["embed"] = output.detach().requires_grad_()
        return cast("Tensor", kept["embed"])

    def final_hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["final_residual"], kept["final"] = args[0], output

    handles = [body.embed.register_forward_hook(embed_hook), body.final_norm.register_forward_hook(final_hook)]
    for layer in body.layers:
        handles += [
            layer.attention_norm.register_forward_pre_hook(input_of("attention_residual")),
            layer.q.module.register_forward_hook(output_of("q")),
            layer.k.module.register_forward_hook(output_of("k")),
            layer.v.module.register_forward_hook(output_of("v")),
            layer.o.module.register_forward_pre_hook(input_of("heads")),
            layer.mlp_norm.register_forward_pre_hook(input_of("mlp_residual")),
            layer.mlp_norm.register_forward_hook(output_of("mlp_norm")),
            layer.down.module.register_forward_pre_hook(input_of("hidden")),
            layer.down.module.register_forward_hook(output_of("mlps")),
        ]
    try:
        with torch.enable_grad():
            logits = body.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                                logits_to_keep=positions).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            at = [*kept["q"], *kept["k"], *kept["v"], *kept["mlp_norm"], *kept["hidden"], kept["final"]]
            # A reader that cannot reach the target (the last layer's q at positions after the answer, say) has gradient
            # zero, not none.
            grads = torch.autograd.grad(target(logits), at, allow_unused=True, materialize_grads=True)
    finally:
        for handle in handles:
            handle.remove()

    n = body.n_layers
    parts = [list(grads[i * n:(i + 1) * n]) for i in range(5)]

    def detached(name: str) -> list[Tensor]:
        return [tensor.detach() for tensor in kept[name]]

    return Run(
        embed=kept["embed"].detach(), heads=detached("heads"), mlps=detached("mlps"), hidden=detached("hidden"),
        attention_residual=detached("attention_residual"), mlp_residual=detached("mlp_residual"),
        final_residual=kept["final_residual"].detach(), grad_q=parts[0], grad_k=parts[1], grad_v=parts[2],
        grad_mlp=parts[3], grad_hidden=parts[4], grad_final=grads[-1], logits=logits.detach(),
    )


def norm_backward(norm: nn.Module, residual: Tensor, grad: Tensor, mode: str) -> Tensor:
    """Pull gradients back through an RMS norm.

    Args:
        norm: a module with ``weight`` [d_model] and ``variance_epsilon`` (or ``eps``).
        residual: float [tokens, d_model], the norm's input.
        grad: float [readers, tokens, d_model], gradients at its output.
        mode: ``exact`` for the full Jacobian, ``frozen`` to hold the scale 1/rms constant.

    Returns:
        float [readers, tokens, d_model], gradients at its input.
    """
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)
    scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + epsilon)
    scaled = grad * cast("Tensor", norm.weight).to(grad.dtype)
    if mode == "frozen":
        return scaled * scale
    normal = residual * scale
    return scale * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))

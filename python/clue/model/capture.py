"""Capture: one run of the unmodified model, keeping what each writer adds and the gradient each reader sees.

Only factors are kept: head outputs before W_o and gradients at the outputs of q, k and v have rank d_head, so nothing of
size [batch, seq, writers, d_model] ever exists. Weight gradients stay off; logits are computed at answer positions only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import ModelError
from .anatomy import Anatomy, Layer, Norm
from .experts import Routed

if TYPE_CHECKING:
    from torch import Tensor, nn

    Target = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """What one run carried. Lists have one entry per layer; gradients are of the summed target.

    A writer's output is what it *adds* to the residual stream. Where a norm stands in between, y = gain * (W z + b) / rms
    is linear in z and b once the rms of this run is given, so ``heads`` and ``hidden`` are z / rms, their ``grad`` is that
    of z / rms, and a head's addition is gain * W_h z_h / rms plus its equal share of gain * b / rms: the heads of a block
    add up to exactly what the block adds, and so do the hidden units. Differences between two runs inherit that.

    Attributes:
        embed: [batch, seq, d_model], the residual stream before the first layer.
        heads: [batch, seq, n_heads * d_head], head outputs before W_o.
        head_scale: [batch, seq, 1], the 1 / rms that ``heads`` were multiplied by, where there is an output norm.
        mlps: [batch, seq, d_model], what each MLP adds to the residual stream.
        hidden: [batch, seq, d_mlp], activations of the hidden units (input of the down projection); empty where there
            are experts, which have ``routed`` instead.
        attention_residual, mlp_residual: [batch, seq, d_model], the residual stream that attention and MLP read, before
            their norms; ``final_residual`` is the final norm's.
        grad_q, grad_k, grad_v: gradients at the projections' outputs, [batch, seq, heads or groups * d_head].
        grad_mlp: [batch, seq, d_model], gradient at what the MLP reads, after its norm.
        grad_hidden: [batch, seq, d_mlp]; at the MLP's output, [batch, seq, d_model], where there are experts.
        grad_final: [batch, seq, d_model], gradient at the *output* of the final norm.
        logits: float32 or finer [batch, positions, vocabulary], at the kept positions only.

    A model that flattens its tokens inside a layer (OPT) gives [batch * seq, ...] there.
    """

    embed: Tensor
    heads: list[Tensor]
    head_scale: list[Tensor]
    mlps: list[Tensor]
    hidden: list[Tensor]
    routed: list[Routed]
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


def run(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, target: Target, *,
        embed: Tensor | None = None) -> Run:
    """Forward and backward once; call inside :func:`frozen`.

    Args:
        input_ids, attention_mask: int64 [batch, seq], right-padded.
        positions: int64 [positions], the sequence positions whose logits the target needs.
        target: maps those logits [batch, positions, vocabulary] to the scalar whose gradient is taken.
        embed: [batch, seq, d_model], what the first layer gets instead of the prompt's own embedding.
    """
    kept: defaultdict[str, list[Tensor]] = defaultdict(list)
    projected: dict[nn.Module, Tensor] = {}  # q, k and v; one entry where they are fused
    routed: list[Routed] = []

    def input_of(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: kept[name].append(_first(args, kwargs))

    def output_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: kept[name].append(output)

    def keep_projected(module: nn.Module, args: Any, output: Tensor) -> None:
        projected[module] = output

    def keep_mlp(multiplier: float) -> Callable[..., None]:
        # The product or clone is a copy: Falcon adds the attention output to the MLP's in place.
        return lambda module, args, output: kept["mlps"].append(
            output.detach().clone() if multiplier == 1 else output.detach() * multiplier)

    def keep_scale(norm: Norm, name: str) -> Callable[..., None]:
        return lambda module, args: kept[name].append(_scale(norm, args[0].detach()))

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The residual stream starts here: nothing before the first layer needs a gradient."""
        start = _first(args, kwargs) if embed is None else embed
        return _with_first(args, kwargs, start.detach().requires_grad_())

    def branch(module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the MLP its own view of its input, so that the gradient there is the MLP's alone (shared norms)."""
        x = _first(args, kwargs)
        view = x.view_as(x)
        kept["mlp_input"].append(view)
        return _with_first(args, kwargs, view)

    handles = [body.layers[0].block.register_forward_pre_hook(cut, with_kwargs=True),
               body.final_norm.module.register_forward_pre_hook(input_of("final_residual"), with_kwargs=True),
               body.final_norm.module.register_forward_hook(output_of("final"))]
    for layer in body.layers:
        handles += [
            layer.block.register_forward_pre_hook(input_of("attention_residual"), with_kwargs=True),
            *(module.register_forward_hook(keep_projected)
              for module in dict.fromkeys((layer.q.module, layer.k.module, layer.v.module))),
            layer.o.module.register_forward_pre_hook(input_of("heads"), with_kwargs=True),
            layer.mlp.register_forward_pre_hook(branch, with_kwargs=True),
        ]
        if layer.experts is not None:
            handles += [layer.experts.module.register_forward_pre_hook(
                lambda module, args, kwargs: routed.append(Routed.of(args, kwargs)), with_kwargs=True),
                layer.mlp.register_forward_hook(output_of("mlp_output"))]
        if layer.down is not None:
            handles.append(layer.down.module.register_forward_pre_hook(input_of("hidden"), with_kwargs=True))
        if layer.mlp_norm is not None and not body.parallel:
            handles.append(layer.mlp_norm.module.register_forward_pre_hook(input_of("mlp_residual"), with_kwargs=True))
        if layer.attention_output_norm is not None:
            norm = layer.attention_output_norm
            handles.append(norm.module.register_forward_pre_hook(keep_scale(norm, "head_scale")))
        if layer.mlp_output_norm is not None:
            norm = layer.mlp_output_norm
            handles += [norm.module.register_forward_pre_hook(keep_scale(norm, "hidden_scale")),
                        norm.module.register_forward_hook(output_of("mlp_output"))]
        handles.append(layer.mlp_writer.register_forward_hook(keep_mlp(layer.multiplier)))
    try:
        with torch.enable_grad():
            logits = body.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                                logits_to_keep=positions).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            units = kept["mlp_output"] or kept["hidden"]
            at = [*projected.values(), *kept["mlp_input"], *units, *kept["final"]]
            # A reader that cannot reach the target (the last layer's q at positions after the answer, say) has gradient
            # zero, not none.
            grads = torch.autograd.grad(target(logits), at, allow_unused=True, materialize_grads=True)
    finally:
        for handle in handles:
            handle.remove()

    n = body.n_layers
    seen: dict[str, int] = {name: len(kept[name]) for name in ("attention_residual", "heads", "mlp_input", "mlps")}
    seen["hidden"] = len(kept["hidden"]) + len(routed)
    for name, count in seen.items():
        if count != n:
            raise ModelError(f"{count} of {n} layers passed through the modules that the {body.family} entry"
                             f" names ({name}): the entry does not fit this model")
    found = {name: [tensor.detach() for tensor in tensors] for name, tensors in kept.items()}
    grad_at = dict(zip(projected, grads, strict=False))
    grad_mlp, grad_hidden = list(grads[-2 * n - 1:-n - 1]), list(grads[-n - 1:-1])
    if body.parallel:
        found["mlp_residual"] = found["attention_residual"]
    elif "mlp_residual" not in found:  # no norm: the MLP reads the residual stream itself
        found["mlp_residual"] = found["mlp_input"]
    for number, layer in enumerate(body.layers):
        if layer.attention_output_norm is not None:
            heads = found["heads"]
            heads[number] = (heads[number] * found["head_scale"][number]).to(heads[number].dtype)
        if layer.mlp_output_norm is not None and layer.down is not None:
            hidden = found["hidden"]
            hidden[number] = (hidden[number] * found["hidden_scale"][number]).to(hidden[number].dtype)
            gradient = grad_hidden[number]
            gain = layer.mlp_output_norm.gain
            scaled = gradient if gain is None else gradient * gain.to(gradient.dtype)
            grad_hidden[number] = scaled @ layer.down.weight
    return Run(
        embed=found["attention_residual"][0], heads=found["heads"], head_scale=found.get("head_scale", []),
        mlps=found["mlps"], hidden=found.get("hidden", []), routed=routed, attention_residual=found["attention_residual"],
        mlp_residual=found["mlp_residual"], final_residual=found["final_residual"][0],
        grad_q=[layer.q.of(grad_at[layer.q.module]) for layer in body.layers],
        grad_k=[layer.k.of(grad_at[layer.k.module]) for layer in body.layers],
        grad_v=[layer.v.of(grad_at[layer.v.module]) for layer in body.layers],
        grad_mlp=grad_mlp, grad_hidden=grad_hidden, grad_final=grads[-1], logits=logits.detach(),
    )


def norm_backward(norm: Norm | None, residual: Tensor, grad: Tensor, mode: str) -> Tensor:
    """Pull gradients back through a norm.

    Args:
        norm: RMS or layer norm; ``None``, which means the identity.
        residual: float [tokens, d_model], the norm's input.
        grad: float [readers, tokens, d_model], gradients at its output.
        mode: ``exact`` for the full Jacobian, ``frozen`` to hold the scale (1/rms or 1/deviation) constant; the centring
            of a layer norm is linear and stays.

    Returns:
        float [readers, tokens, d_model], gradients at its input.
    """
    if norm is None:
        return grad
    gain = norm.gain
    scaled = grad if gain is None else grad * gain.to(grad.dtype)
    if norm.kind == "layer":  # a layer norm is the RMS norm of the centred vector, and centring is its own transpose
        residual = residual - residual.mean(-1, keepdim=True)
    scale = _scale(norm, residual)
    if mode == "frozen":
        pulled = scaled * scale
    else:
        normal = residual * scale
        pulled = scale * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return pulled - pulled.mean(-1, keepdim=True) if norm.kind == "layer" else pulled


def head_outputs(layer: Layer, clean: Tensor, corrupted: Tensor, scale_change: Tensor | None, out: Tensor) -> None:
    """What each head would add to the residual stream if it were patched: W_o times the difference of its factors.

    Args:
        layer: the heads' layer.
        clean, corrupted: [tokens, n_heads * d_head], ``heads`` of the two runs.
        scale_change: [tokens, 1], corrupted minus clean ``head_scale``; ``None`` without an output norm.
        out: float [n_heads, tokens, d_model], overwritten.
    """
    n_heads, tokens, d_model = out.shape
    weight, bias = layer.o.weight.to(out.dtype), layer.o.bias
    gain = None if layer.attention_output_norm is None else layer.attention_output_norm.gain
    if gain is not None:
        weight = gain.to(out.dtype)[:, None] * weight
    if layer.multiplier != 1:
        weight = layer.multiplier * weight
    change = (corrupted - clean).view(tokens, n_heads, -1).transpose(0, 1)
    torch.matmul(change, weight.view(d_model, n_heads, -1).permute(1, 2, 0), out=out)
    if bias is not None and scale_change is not None:  # without a norm the bias is the same in both runs
        share = bias.to(out.dtype) if gain is None else bias.to(out.dtype) * gain.to(out.dtype)
        out += scale_change * share * (layer.multiplier / n_heads)


def _scale(norm: Norm, x: Tensor) -> Tensor:
    """1 / rms of the last dimension, [..., 1], in float32 or finer."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)


def _first(args: Any, kwargs: Any) -> Tensor:
    """The hidden states a module was called with."""
    return cast("Tensor", args[0] if args else kwargs["hidden_states"])


def _with_first(args: Any, kwargs: Any, value: Tensor) -> tuple[Any, Any]:
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

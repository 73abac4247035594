"""What the writers of a layer, its heads and its MLP, add to the residual stream: noted as factors, expanded when needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .anatomy import Layer


@dataclass(frozen=True)
class Written:
    """What the writers of one layer *add* to the residual stream, in one run or in one more than in another.

    Where a norm stands in between, y = gain * (W z + b) / rms is linear in z and b once the rms of this run is given, so
    a head is z / rms, and it adds gain * W_h z_h / rms plus its equal share of gain * b / rms: the heads of a block add up
    to exactly what the block adds. Hidden units behind such a norm are z / rms too, and their gradient is that of z / rms.

    Attributes:
        heads: [batch, seq, n_heads * d_head], head outputs before W_o: z of one run, the difference of z / rms of two.
        head_scale: [batch, seq, 1], 1 / rms or its difference; ``None`` without an output norm.
        mlp: [batch, seq, d_model], what the MLP adds; in half precision, also what the layer's sums are rounded by, so
            that the writers still add up to the stream.
    """

    heads: Tensor
    head_scale: Tensor | None
    mlp: Tensor


def more(there: Written, here: Written) -> Written:
    """What the writers of one run add more than those of another, in the model's dtype."""
    dtype = here.heads.dtype
    if here.head_scale is None or there.head_scale is None:
        heads, scale = there.heads - here.heads, None
    else:
        heads = there.heads * there.head_scale - here.heads * here.head_scale
        scale = there.head_scale - here.head_scale
    return Written(heads.to(dtype), scale, (there.mlp - here.mlp).to(dtype))


def mlp_with_rounding(before: Tensor, attention: Tensor, mlp: Tensor, after: Tensor) -> Tensor:
    """What the MLP of a layer in half precision adds, and what the layer's sums are rounded by.

    More than rounding explains is left out: then the stream has another writer, and the books must show it.

    Args:
        before, after: [batch, seq, d_model], the residual stream at the layer's two ends.
        attention, mlp: as many elements, what the blocks add.

    Returns:
        float32 [batch, seq, d_model].
    """
    before, after = before.detach(), after.detach()
    most = torch.finfo(after.dtype).eps * sum(t.float().abs().view_as(after) for t in (before, attention, mlp, after))
    mlp = mlp.float().view_as(after)
    rounding = after.float() - before - attention.view_as(after) - mlp
    return mlp + rounding.where(rounding.abs() <= most, 0)


def head_outputs(layer: Layer, change: Tensor, scale_change: Tensor | None, out: Tensor) -> None:
    """What each head would add to the residual stream if it were patched: W_o times the difference of its factors.

    Args:
        layer: the heads' layer.
        change: [tokens, n_heads * d_head], corrupted minus clean ``heads``.
        scale_change: [tokens, 1], corrupted minus clean ``head_scale``; ``None`` without an output norm.
        out: float [n_heads, tokens, d_model], overwritten.
    """
    n_heads, tokens, d_model = out.shape
    weight, bias = layer.o.weight.to(out), layer.o.bias
    gain = None if layer.attention_output_norm is None else layer.attention_output_norm.gain
    if gain is not None:
        weight = gain.to(out)[:, None] * weight
    if layer.multiplier != 1:
        weight = layer.multiplier * weight
    heads = change.view(tokens, n_heads, -1).transpose(0, 1)
    torch.bmm(heads, weight.view(d_model, n_heads, -1).permute(1, 2, 0), out=out)
    if bias is not None and scale_change is not None:  # without a norm the bias is the same in both runs
        share = bias.to(out) if gain is None else bias.to(out) * gain.to(out)
        out += scale_change * share * (layer.multiplier / n_heads)

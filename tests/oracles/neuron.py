"""Neuron attribution as its definition reads, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def neuron_attribution(clean: Tensor, corrupted: Tensor, grad_clean: Tensor, grad_corrupted: Tensor,
                       mask: Tensor | None = None) -> list[Tensor]:
    """Ns, Dn and the sums of their terms' squares, each float64 [neurons], of inputs [tokens, neurons]."""
    chosen = slice(None) if mask is None else mask.bool()
    difference = corrupted[chosen].double() - clean[chosen].double()
    noising = difference * grad_clean[chosen].double()
    denoising = difference * grad_corrupted[chosen].double()
    return [term.sum(0) for term in (noising, denoising, noising.square(), denoising.square())]


def magnitude(clean: Tensor, corrupted: Tensor, grad_clean: Tensor, grad_corrupted: Tensor,
              mask: Tensor | None = None) -> list[Tensor]:
    """The same sums over absolute values: what rounding errors are measured against."""
    chosen = torch.ones(len(clean), dtype=torch.bool, device=clean.device) if mask is None else mask.bool()
    size = clean.double().abs() + corrupted.double().abs()
    noising, denoising = (size * g.double().abs() for g in (grad_clean, grad_corrupted))
    return [term[chosen].sum(0) for term in (noising, denoising, noising.square(), denoising.square())]

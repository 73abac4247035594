"""AdamW (arXiv 1711.05101, algorithm 2) on some rows or columns, as the algorithm reads, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, index: Tensor, axis: int, *,
                 lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float,
                 master: Tensor | None = None) -> dict[str, Tensor]:
    """New values, float64, of the slices (in the layout of ``param``) and of their moments (slices first)."""
    g = (grad if grad.shape[axis] == len(index) != param.shape[axis] else grad.index_select(axis, index)).double()
    g = g * grad_scale
    theta = param.index_select(axis, index).double()
    m, v = exp_avg.double(), exp_avg_sq.double()
    if axis == 1:
        m, v = m.T, v.T
    if master is not None:
        theta = (master.T if axis == 1 else master).double()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    theta = theta - lr * weight_decay * theta
    theta = theta - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return {"slices": theta, "exp_avg": m.T if axis == 1 else m, "exp_avg_sq": v.T if axis == 1 else v}


def torch_steps(param: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """The parameter after ``torch.optim.AdamW`` saw these gradients."""
    trained = torch.nn.Parameter(param.detach().clone())
    optimizer = torch.optim.AdamW([trained], foreach=False, **options)
    for grad in grads:
        trained.grad = grad.to(trained.dtype)
        optimizer.step()
    return trained.detach()

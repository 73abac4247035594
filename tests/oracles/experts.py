"""The hidden units of a mixture of experts as their definition reads, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from clue.model.anatomy import Layer


def hidden(layer: Layer, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Activations, [tokens, units], of tokens x [tokens, d_model] routed to experts ``index`` with ``weights``."""
    experts = layer.experts
    assert experts is not None
    module, shared = experts.module, experts.shared
    units = torch.zeros(len(x), columns(layer).shape[1], dtype=x.dtype)
    for token, vector in enumerate(x):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            both = module.gate_up_proj[expert] @ vector
            gate, up = both[:experts.width], both[experts.width:]
            units[token, expert * experts.width:(expert + 1) * experts.width] = weight * module.act_fn(gate) * up
        if shared is not None:
            scale = torch.sigmoid(shared.scale.weight[0] @ vector)
            gate, up = shared.gate.weight @ vector, shared.up.weight @ vector
            units[token, experts.count * experts.width:] = scale * module.act_fn(gate) * up
    return units


def columns(layer: Layer) -> Tensor:
    """W_down of all experts side by side, [d_model, units]."""
    experts = layer.experts
    assert experts is not None
    parts = list(experts.module.down_proj)
    return torch.cat(parts if experts.shared is None else [*parts, experts.shared.down.weight], 1)

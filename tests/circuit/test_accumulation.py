"""Capture: gradients pulled back through every kind of norm equal autograd's."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from clue.circuit.accumulation import norm_backward
from clue.model.anatomy import Norm
from tests.oracles.attribution import InDouble

NORMS = {
    "rms": lambda: Norm(LlamaRMSNorm(8), "rms"),
    "rms+1": lambda: Norm(Gemma2RMSNorm(8), "rms+1"),
    "layer": lambda: Norm(torch.nn.LayerNorm(8), "layer"),
    "layer without weights": lambda: Norm(torch.nn.LayerNorm(8, elementwise_affine=False), "layer"),
    }


@pytest.mark.parametrize("mode", ["exact", "frozen"])
@pytest.mark.parametrize("kind", NORMS)
def test_norm_backward_equals_autograd(kind, mode):
    torch.manual_seed(0)
    norm = NORMS[kind]()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)
    norm.module.double()
    for parameter in norm.module.parameters():
        torch.nn.init.normal_(parameter, 0.8, 0.3)
    with InDouble():
        y = norm.module(x)
        if mode == "frozen":  # y = normal * gain + bias, and normal = centred x times a scale that is held
            centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
            offset = getattr(norm.module, "bias", None)
            offset = 0.0 if offset is None else offset
            y = centred * ((y - offset) / centred).detach() + offset
    want = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grad])
    norm_backward(norm, x.detach(), grad, exact=mode == "exact")
    torch.testing.assert_close(grad, want)

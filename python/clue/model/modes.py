"""Modes: a model that runs without dropout, or with its weights frozen, for a while, and is then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import nn

#: What a configuration may ask a forward pass for besides logits, which layers that are passed by cannot give.
_MORE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing); at the end, also after an error, each module's own mode: parts
    of a model in training may be in evaluation mode for good."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing), no weight gradients, no autocast, and logits alone; all restored
    on exit."""
    if torch.is_inference_mode_enabled():
        raise ModelError("gradients are needed, and torch.inference_mode() gives none: call this outside of it")
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if any(parameter.is_inference() for parameter in wanted):
        raise ModelError("gradients are needed, and weights that were made inside torch.inference_mode() take none: load the"
                         " model outside of it")
    config: Any = getattr(model, "config", None)
    parts = [] if config is None else {id(part): part for part in (config, config.get_text_config())}.values()
    asked = [(part, name) for part in parts for name in _MORE_OUTPUTS if getattr(part, name, False)]
    model.requires_grad_(False)
    device = next(model.parameters()).device.type

    def unmixed(module: nn.Module, args: Any) -> None:
        if torch.is_autocast_enabled(device):
            raise ModelError("the model's forward pass turns autocast on, and sums in mixed precision are not those of the"
                             " model: take it off (accelerator.unwrap_model(model, keep_fp32_wrapper=False)), or give the"
                             " model before it is prepared")

    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    watch = None if embedding is None else embedding.register_forward_pre_hook(unmixed)
    try:
        for part, name in asked:
            setattr(part, name, False)
        # In mixed precision the sums would not be those of the model's own dtype.
        with evaluating(model), torch.autocast(device, enabled=False):
            yield
    finally:
        if watch is not None:
            watch.remove()
        for part, name in asked:
            setattr(part, name, True)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)

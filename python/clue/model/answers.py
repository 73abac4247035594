"""Answers: a forward pass that computes logits only where an answer is predicted."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from ..data.encoding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.encoding import Batch


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model on a batch, and return the logits [batch, n, vocabulary] and labels [batch, n] of its last n positions.

    n reaches back to the position before the batch's first answer token: no measure and no loss needs the others, and
    with a large vocabulary their logits cost as much as several layers. A model that cannot leave logits out
    (``logits_to_keep``) computes all of them. Labels are not shifted.
    """
    import torch

    seq, n = batch.labels.shape[1], kept_positions(batch)
    partial = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # As positions, which are copied together; a number would make a view, and torch multiplies a view by a frozen
        # weight record by record, reading the whole unembedding for each.
        partial["logits_to_keep"] = to_keep(model, torch.arange(seq - n, seq, device=batch.labels.device))
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                           **partial).logits
    return logits[:, -n:], batch.labels[:, -n:]


def to_keep(model: nn.Module, positions: Tensor) -> Tensor | list[int]:
    """Positions as a model takes them for ``logits_to_keep``: in a list where it is spread over several devices
    (``device_map``), as it moves every tensor to the first of these, and the last one refuses positions from there."""
    spread = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(spread) < 2:
        return positions
    listed: list[int] = positions.tolist()
    return listed


def kept_positions(batch: Batch) -> int:
    """How many positions at the end of a batch reach back to the one before its first answer token."""
    scored = (batch.labels[:, 1:] != IGNORED).any(0).nonzero()
    return int(batch.labels.shape[1]) - (int(scored[0]) if len(scored) else 0)

"""Sharing out a step: every process of torch.distributed runs some samples of the batch, and all end with the same gradients.

All processes draw the same batch from the same seeds. Each runs its share of the samples through the model; the answers'
logits are gathered, so that each computes the loss of the whole batch, whatever the objective is, and differentiates it
at its own samples alone. What the processes have found on the planned slices is then added up in one all-reduce. Losses
and decisions come from the gathered logits and are the same everywhere.

A model whose parameters are sharded (FSDP2) is run by all processes at the same time, so each has at least one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.encoding import Batch
from ..model.answers import answer_logits, kept_positions
from ..processes import place
from .sparse import SliceGradient, SparseGradients

if TYPE_CHECKING:
    from collections.abc import Mapping


def shared_logits(model: nn.Module, sparse: SparseGradients, batch: Batch, *, forget: int) -> tuple[Tensor, Tensor]:
    """:func:`clue.model.answers.answer_logits` of a batch of ``forget`` samples and retain samples after them.

    Returns:
        logits and labels of all samples; only those of this process's share lead back to the model.
    """
    rank, world = place()
    count, seq = batch.input_ids.shape
    if world == 1:
        sparse.split(forget=forget, retain=count - forget, seq=seq)
        return answer_logits(model, batch)
    own = list(range(rank, count, world))
    run = own or [0]  # a process without a sample runs one that counts for nothing
    rows = torch.tensor(run, device=batch.input_ids.device)
    of_forget = sum(row < forget for row in run)
    sparse.split(forget=of_forget, retain=len(run) - of_forget, seq=seq)
    found, _ = answer_logits(model, Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows]))
    labels = batch.labels[:, -kept_positions(batch):]
    most = -(-count // world)
    mine = found.new_zeros(most, labels.shape[1], found.shape[2])
    mine[:len(own), labels.shape[1] - found.shape[1]:] = found.detach()[:len(own)]
    parts = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(parts, mine)
    logits = torch.stack(parts, 1).flatten(0, 1)[:count]  # sample r + i * world is the i-th of process r
    at_own = torch.nn.functional.pad(found[:len(own)], (0, 0, labels.shape[1] - found.shape[1], 0))
    return logits.index_copy(0, rows[:len(own)], at_own), labels


def added_up(gradients: Mapping[str, SliceGradient], sparse: SparseGradients) -> dict[str, SliceGradient]:
    """The sums of all processes' gradients; their own where there is but one process."""
    if place()[1] == 1:
        return dict(gradients)
    parts: list[Tensor] = []
    for name, slices in sparse.planned.items():
        rest = [n for axis, n in enumerate(slices.shape) if axis != slices.axis]
        found = gradients[name]
        for part, rows in ((found.forget, len(slices.index)), (found.retain, len(slices.conflict))):
            shape = (rows, *rest)
            parts.append(torch.zeros(shape, dtype=slices.dtype, device=slices.index.device) if part is None else part)
    flat = torch.cat([part.ravel() for part in parts])
    torch.distributed.all_reduce(flat)
    sums = iter(flat.split([part.numel() for part in parts]))
    whole = {}
    for name, slices in sparse.planned.items():
        forget, retain = (next(sums).view(rows, *(n for axis, n in enumerate(slices.shape) if axis != slices.axis))
                          for rows in (len(slices.index), len(slices.conflict)))
        whole[name] = SliceGradient(forget, retain if len(slices.conflict) else None)
    return whole


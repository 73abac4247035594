"""Target: the number that attribution differentiates, read off the logits where a batch of answers is predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ..data.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor


class Target:
    """A batch of pairs as tensors, and the target of their logits.

    The margin is the logit of each answer token minus that of the *contrast*, the corrupted run's top token there, so it
    is zero where corruption changes nothing; ``logprob`` is the answer token's log-probability, which saturates on
    memorised text. Both are means over each pair's answer span, summed over the batch.

    Attributes:
        clean, corrupted, mask: int64 [batch, seq], right-padded.
        positions: int64 [positions], the sequence positions that predict an answer token of some pair.
        answer, contrast: int64 [batch, positions]; :meth:`contrasted` fills ``contrast`` in.
        weight: float32 [batch, positions], rows add up to one.
        live: bool [batch, seq], the tokens that can differ between the runs and that the target can depend on.
    """

    def __init__(self, pairs: Pairs, chosen: npt.NDArray[np.int64], kind: str, device: torch.device) -> None:
        lengths = [len(pairs.clean[i]) for i in chosen]
        clean, corrupted = (torch.zeros(len(chosen), max(lengths), dtype=torch.int64) for _ in range(2))
        mask = torch.zeros_like(clean)
        for row, i in enumerate(chosen):
            clean[row, :lengths[row]] = torch.from_numpy(pairs.clean[i])
            corrupted[row, :lengths[row]] = torch.from_numpy(pairs.corrupted[i])
            mask[row, :lengths[row]] = 1
        starts, at = torch.from_numpy(pairs.answer_start[chosen]), torch.arange(max(lengths) - 1)
        spans = (at[None] >= starts[:, None] - 1) & (at[None] < torch.tensor(lengths)[:, None] - 1)
        positions = torch.nonzero(spans.any(0)).ravel()
        weight = spans[:, positions].float()
        self.kind = kind
        self.clean, self.corrupted, self.mask, self.positions = (t.to(device) for t in (clean, corrupted, mask, positions))
        self.answer = self.clean[:, self.positions + 1]
        self.weight = (weight / weight.sum(1, keepdim=True)).to(device)
        self.contrast = torch.full_like(self.answer, -1)
        # In a causal model nothing differs before the first token that does, and nothing depends on the last token.
        differs = ((self.clean != self.corrupted) & self.mask.bool()).cumsum(1) > 0
        self.live = differs & torch.cat([self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])], 1).bool()

    def __call__(self, logits: Tensor, at: slice = slice(None)) -> Tensor:
        """The target, summed over the batch and the positions ``at``, from logits [batch, positions, vocabulary]."""
        if self.kind == "logprob":
            logits = logits.log_softmax(-1)
        value = logits.gather(-1, self.answer[:, at, None])[..., 0]
        if self.kind == "margin":
            value = value - logits.gather(-1, self.contrast[:, at, None])[..., 0]
        return (value * self.weight[:, at]).sum()

    def contrasted(self, logits: Tensor, at: slice = slice(None)) -> Tensor:
        """The same for the corrupted run, which names the contrast for all runs after it."""
        self.contrast[:, at] = logits.detach().argmax(-1)
        return self(logits, at)

    @property
    def informative(self) -> int:
        """Number of pairs whose corruption changes the model's top token somewhere in the answer."""
        return int((((self.contrast != self.answer) & (self.weight > 0)).any(1)).sum())

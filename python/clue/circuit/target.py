"""Target: the number per pair that attribution differentiates and that a circuit is judged by.

Both prompts of a pair are teacher-forced on the clean answer. ``margin`` is the logit of the true answer token less that
of the corrupted run's top token; ``logprob`` is the log-probability of the true token. Either is averaged over the
answer span of the pair, so that a long answer counts no more than a short one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.pairs import Pairs


#: The least number of tokens, of all pairs of a batch together, and the least share of its longest one, that are worth a pass
#: of their own: few tokens cost a pass as much as more of them.
LEAST_TOKENS, LEAST_SHARE = 128, 1 / 8


@dataclass(frozen=True)
class Prompts:
    """A batch of pairs, padded on the right, and where their answers are.

    Attributes:
        prefix: int64 [batch, shared], tokens that both prompts of every pair begin with and that need only be run once
            (:mod:`clue.model.prefix`). What follows is about the tokens behind them.
        clean, corrupted, mask: int64 [batch, seq], token ids, and 1 where they are a pair's, 0 where padding.
        positions: int64 [positions], the sequence positions that predict an answer token of some pair.
        answer: int64 [batch, positions], the clean token that follows each position.
        weight: float32 [batch, positions], 1 / answer length on a pair's own answer span and 0 elsewhere.
    """

    prefix: Tensor
    clean: Tensor
    corrupted: Tensor
    mask: Tensor
    positions: Tensor
    answer: Tensor
    weight: Tensor

    @classmethod
    def of(cls, pairs: Pairs, chosen: npt.NDArray[np.int64], device: torch.device, *, share: bool = False) -> Prompts:
        """The pairs numbered ``chosen``; ``share`` parts their prefix from the rest, if that saves something."""
        lengths = [len(pairs.clean[i]) for i in chosen]
        clean, corrupted, mask = (torch.zeros(len(chosen), max(lengths), dtype=torch.int64) for _ in range(3))
        for row, i in enumerate(chosen):
            clean[row, :lengths[row]] = torch.from_numpy(pairs.clean[i])
            corrupted[row, :lengths[row]] = torch.from_numpy(pairs.corrupted[i])
            mask[row, :lengths[row]] = 1
        starts, ends = torch.from_numpy(pairs.answer_start[chosen]), torch.tensor(lengths)
        shared = 0
        if share:  # up to the first token that differs, or that predicts an answer, in any pair
            differs = (clean != corrupted) | (torch.arange(clean.shape[1]) >= starts[:, None] - 1)
            shared = int(differs.any(0).int().argmax())
            if shared * len(chosen) < LEAST_TOKENS or shared < LEAST_SHARE * clean.shape[1]:
                shared = 0
        at = torch.arange(max(lengths) - 1)[None]
        spans = (at >= starts[:, None] - 1) & (at < ends[:, None] - 1)  # a position predicts the token after it
        positions = torch.nonzero(spans.any(0)).ravel()
        weight = spans[:, positions].float()
        weight = weight / weight.sum(1, keepdim=True)
        found = (clean[:, :shared], clean[:, shared:], corrupted[:, shared:], mask[:, shared:], positions - shared,
                 clean[:, positions + 1], weight)
        return cls(*(tensor.to(device) for tensor in found))

    @property
    def attended(self) -> Tensor:
        """int64 [batch, shared + seq], the attention mask that the model gets: all ones, since in a causal model nobody sees
        the padding on the right. Rows with nothing to attend to, behind a short window, would turn into NaN and reach the
        others."""
        return torch.ones_like(torch.cat((self.prefix, self.mask), 1))

    @property
    def live(self) -> Tensor:
        """bool [batch, seq]: the tokens at which the runs can differ and on which the target can depend.

        In a causal model nothing differs before the first token that does, and nothing depends on the last token.
        """
        differs = ((self.clean != self.corrupted) & self.mask.bool()).cumsum(1) > 0
        followed = torch.nn.functional.pad(self.mask[:, 1:], (0, 1)).bool()
        return differs & followed

    def values(self, kind: str, logits: Tensor, contrast: Tensor, at: slice = slice(None)) -> Tensor:
        """The target of each pair, [batch], differentiable in the logits; over a part of the positions, its share of it.

        Args:
            kind: ``margin`` or ``logprob``.
            logits: [batch, positions, vocabulary].
            at: which of the positions these are.
            contrast: int64 [batch, positions], the corrupted run's top tokens (:meth:`contrast`). Where that is the
                answer itself the margin is zero: corruption changed nothing there.
        """
        if kind == "margin":
            # In one gather, as each one's gradient is a tensor of zeros as large as the logits.
            both = logits.gather(-1, torch.stack((self.answer[:, at], contrast), -1))
            terms = both[..., 0] - both[..., 1]
        else:
            terms = logits.log_softmax(-1).gather(-1, self.answer[:, at, None])[..., 0]
        return (terms * self.weight[:, at]).sum(1)

    def contrast(self, logits: Tensor) -> Tensor:
        """int64 [batch, positions], the top tokens of the corrupted run's logits."""
        return logits.detach().argmax(-1)

    def informative(self, contrast: Tensor) -> Tensor:
        """bool [batch]: somewhere in the pair's answer the corrupted run's top token is not the answer's."""
        return ((contrast != self.answer) & (self.weight > 0)).any(1)


def batches(pairs: Pairs, size: int, apart: int = 0) -> list[npt.NDArray[np.int64]]:
    """Numbers of the pairs in batches of at most ``size``, like lengths together: little padding.

    Pairs of at most ``apart`` tokens and longer ones share no batch.
    """
    lengths = np.array([len(ids) for ids in pairs.clean], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    border = int(np.searchsorted(lengths[order], apart, side="right"))
    return [part[start:start + size] for part in (order[:border], order[border:]) for start in range(0, len(part), size)]

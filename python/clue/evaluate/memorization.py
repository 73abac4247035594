"""Memorization: what a model still knows of each record, from one teacher-forced pass over its answer tokens.

The pass keeps two things per answer token, its log-probability and whether it is the model's first choice, and on request
the moments of the distribution it was drawn from. Every measure here, the truth ratio, multiple choice and most attacks
in :mod:`clue.evaluate.privacy` are reductions over these; none needs another pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..data.encoding import batches
from ..errors import ModelError, RecordError
from ..model.answers import answer_logits
from ..model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.encoding import Batch, Example

#: Logits turned to float32 at a time, so that a large vocabulary does not double the memory of a batch (128 MiB).
_CHUNK = 2**25


@dataclass(frozen=True)
class TokenScores:
    """What the model says of every answer token of a list of records, end-of-sequence token included.

    Attributes:
        log_prob: float64 [tokens], natural log of the probability of the true token given the true tokens before it;
            the softmax is computed in float32 whatever the model's dtype.
        correct: bool [tokens], the true token is the model's first choice (argmax; of equals, the lowest token id).
        start: int64 [n + 1]; record i owns tokens ``start[i]:start[i + 1]``, at least one.
        mean, variance: float64 [tokens] each, of the log-probability of a token drawn from the model's own distribution
            at that place; None where they were not asked for.
    """

    log_prob: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    start: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64] | None = None
    variance: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def length(self) -> npt.NDArray[np.int64]:
        """int64 [n]: answer tokens of each record."""
        return np.diff(self.start)

    def records(self, first: int, last: int) -> TokenScores:
        """The scores of records ``first:last`` alone."""
        return self._tokens(slice(int(self.start[first]), int(self.start[last])),
                            self.start[first:last + 1] - self.start[first])

    def select(self, chosen: npt.NDArray[np.int64]) -> TokenScores:
        """The scores of the records ``chosen``, in that order."""
        tokens = [np.arange(self.start[i], self.start[i + 1]) for i in chosen]
        return self._tokens(np.concatenate([np.empty(0, np.int64), *tokens]), np.cumsum([0, *map(len, tokens)]))

    def without_last(self) -> TokenScores:
        """The scores without each record's last token, its end-of-sequence token where records end in one; a record of
        one token keeps it."""
        last = self.start[1:] - 1
        kept = np.ones(len(self.correct), dtype=bool)
        kept[last[self.length > 1]] = False
        return self._tokens(kept, np.concatenate([[0], np.cumsum(self.length - (self.length > 1))]))

    def _tokens(self, chosen: Any, start: npt.NDArray[np.int64]) -> TokenScores:
        return TokenScores(self.log_prob[chosen], self.correct[chosen], start,
                           None if self.mean is None else self.mean[chosen],
                           None if self.variance is None else self.variance[chosen])


def score(model: PreTrainedModel, examples: Sequence[Example], *, pad: int, batch_size: int,
          moments: bool = False) -> TokenScores:
    """Score every answer token of ``examples`` in one teacher-forced pass, in the order they are given; ``moments`` asks
    for the mean and variance of each token's distribution too (a few more sums over the vocabulary).

    Batches are formed by length, so padding is rare; logits are asked for at answer positions only where the model
    can leave the others out (``logits_to_keep``). The model runs in evaluation mode and gets its own mode back.

    Raises:
        RecordError: a record has no answer token that follows another token.
        ModelError: the model gives a probability that is not a number.
    """
    import torch

    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    found: list[tuple[npt.NDArray[Any], ...]] = [(np.empty(0), np.empty(0, bool))] * len(order)
    done = 0
    with evaluating(model), torch.no_grad():
        for batch in batches([examples[i] for i in order], batch_size, pad=pad, device=model.device):
            tokens, counts = _score_batch(model, batch, moments)
            ends = np.cumsum(counts)
            for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
                own = slice(end - count, end)
                found[order[done + row]] = tuple(values[own] for values in tokens)
            done += len(counts)

    for example, (log_prob, *_) in zip(examples, found, strict=True):
        if not len(log_prob):
            raise RecordError(f"{_source(example)}: nothing of the answer follows another token, so no token of it can"
                              " be predicted: make the record longer")
        if not np.isfinite(log_prob).all():
            raise ModelError(f"{_source(example)}: the model gives its answer a probability that is not a number: its"
                             " weights are damaged, or training diverged (lower the learning rate)")
    log_prob, correct, *rest = (np.concatenate(values) for values in zip(*found, strict=True))
    return TokenScores(log_prob, correct, np.cumsum([0, *(len(values[0]) for values in found)]), *rest)


def _score_batch(model: PreTrainedModel, batch: Batch, moments: bool) -> tuple[list[npt.NDArray[Any]],
                                                                              npt.NDArray[np.int64]]:
    """Log-probability and correctness (and moments) of the answer tokens of a batch, row after row, and how many each row
    has."""
    import torch

    counts = (batch.labels[:, 1:] != -100).sum(1).cpu().numpy()
    if not counts.any():
        return [np.empty(0), np.empty(0, bool), *[np.empty(0)] * (2 * moments)], counts
    logits, labels = answer_logits(model, batch)
    target = labels[:, 1:].to(logits.device)
    answer = target != -100
    logits, target = logits[:, :-1][answer], target[answer]
    found = []
    rows = max(1, _CHUNK // logits.shape[1])
    for some, true in zip(logits.split(rows), target.split(rows), strict=True):
        exact = some.float()
        total = exact.logsumexp(1)
        part = [exact.gather(1, true[:, None])[:, 0] - total, exact.argmax(1) == true]
        if moments:
            each = exact - total[:, None]
            share = each.exp()
            each = each.clamp(min=-1e4)  # a token ruled out has share 0; 0 * -inf would be no number
            mean = (share * each).sum(1)
            part += [mean, (share * (each - mean[:, None]).square()).sum(1)]
        found.append(part)
    tokens = [torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)]
    return [values if values.dtype == bool else values.astype(np.float64) for values in tokens], counts


def _source(example: Example) -> str:
    return example.record.source or f"the record {example.record.prompt[:60]!r}"


def exact_match(scores: TokenScores) -> npt.NDArray[np.bool_]:
    """bool [n]: every answer token is the model's first choice, so that greedy decoding would give the answer
    verbatim. The mean over a set is its accuracy (exact-match accuracy)."""
    matched: npt.NDArray[np.bool_] = np.logical_and.reduceat(scores.correct, scores.start[:-1])
    return matched


def token_accuracy(scores: TokenScores) -> npt.NDArray[np.float64]:
    """float64 [n]: share of answer tokens that are the model's first choice. Its mean over records is the "exact
    memorization" of Tirumala et al. (NeurIPS 2022, arXiv 2205.10770), as open-unlearning reports it."""
    accuracy: npt.NDArray[np.float64] = np.add.reduceat(scores.correct, scores.start[:-1], dtype=float) / scores.length
    return accuracy


def nll(scores: TokenScores) -> npt.NDArray[np.float64]:
    """float64 [n], nats per token: mean cross-entropy of a record's answer tokens."""
    loss: npt.NDArray[np.float64] = -np.add.reduceat(scores.log_prob, scores.start[:-1]) / scores.length
    return loss


def probability(scores: TokenScores) -> npt.NDArray[np.float64]:
    """float64 [n], in [0, 1]: P(answer | prompt)^(1 / answer tokens) = exp(-nll), the length-normalised probability of
    TOFU (Maini et al., COLM 2024, arXiv 2401.06121, section 2.2)."""
    return np.exp(-nll(scores))


def perplexity(scores: TokenScores) -> float:
    """exp of the cross-entropy per answer token, over all tokens of all records together; of plain texts, the usual
    perplexity of a corpus (each text by itself, its first token not counted). At most exp(700), as a number can be."""
    return float(np.exp(min(-scores.log_prob.mean(), 700.0)))


def extraction_strength(scores: TokenScores, *, least: str = "zero") -> npt.NDArray[np.float64]:
    """float64 [n], in [0, 1]: 1 - k/L, where k is the shortest prefix of the answer (L tokens) after which greedy
    decoding gives the rest verbatim; 1: the prompt alone suffices, 0: nothing does.

    Carlini et al. (USENIX Security 2021, arXiv 2012.07805), in the form of Wang et al. (ICLR 2025, arXiv 2406.04255).
    Once greedy decoding follows the answer it sees the same tokens as teacher forcing does, so k is the number of
    tokens up to and including the last wrong one. Where no prefix works, ``least`` = ``zero`` gives 0, ``one-token`` 1/L
    as open-unlearning does.
    """
    position = np.arange(len(scores.correct)) - np.repeat(scores.start[:-1], scores.length) + 1
    needed = np.maximum.reduceat(np.where(scores.correct, 0, position), scores.start[:-1])
    if least == "one-token":
        needed = np.minimum(needed, scores.length - 1)
    strength: npt.NDArray[np.float64] = 1.0 - needed / scores.length
    return strength

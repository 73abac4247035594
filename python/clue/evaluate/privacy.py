"""Privacy: can an attacker tell the forget set (members of the training data) from a holdout set (never trained on)?

Direction, everywhere in CLUE: members are the forget set, a higher score means "member", AUC 1.0 = every member
recognised, 0.5 = the attacker guesses (the ideal), below 0.5 = forgotten records stand out as *less* likely than
unseen ones, which also gives them away.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..data.encoding import collate
from ..errors import ModelError
from ..model.answers import answer_logits
from ..model.modes import evaluating
from .memorization import TokenScores, nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.encoding import Example

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attack:
    """How well one membership-inference attack separates members from non-members.

    Attributes:
        auc: area under the ROC curve.
        low, high: 95% bootstrap interval of the AUC; None when no resamples were asked for.
        tpr_at_1, tpr_at_5: share of members caught at a false-positive rate of at most 1% and 5% (Carlini et al.,
            IEEE S&P 2022, arXiv 2112.03570). With fewer than 100 (20) non-members that allows no false alarm at all.
        fpr, tpr: the corners of the ROC curve, from (0, 0) to (1, 1).
        members, non_members: number of records on each side.
    """

    auc: float
    low: float | None
    high: float | None
    tpr_at_1: float
    tpr_at_5: float
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    members: int
    non_members: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, the fields in order."""
        return {**asdict(self), "fpr": list(self.fpr), "tpr": list(self.tpr)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Attack:
        """The inverse of :meth:`to_json`."""
        return cls(**{**values, "fpr": tuple(values["fpr"]), "tpr": tuple(values["tpr"])})


def loss_score(scores: TokenScores) -> Floats:
    """float64 [n]: minus the mean cross-entropy of the answer tokens (Yeom et al., CSF 2018, arXiv 1709.01604)."""
    return -nll(scores)


def zlib_score(scores: TokenScores, texts: Sequence[str]) -> Floats:
    """float64 [n]: minus the mean cross-entropy over the bytes that zlib needs for the text (the answer), so that what is
    likely only because it is repetitive counts less (Carlini et al., USENIX Security 2021, arXiv 2012.07805)."""
    sizes = [len(zlib.compress(text.encode("utf-8", "replace"))) for text in texts]
    score: Floats = -nll(scores) / np.array(sizes, dtype=float)
    return score


def reference_score(scores: TokenScores, reference: TokenScores) -> Floats:
    """float64 [n]: how much lower the cross-entropy is than under a reference model that was not trained on either side
    (Carlini et al., 2021; Mireshghallah et al., EMNLP 2022, arXiv 2203.03929)."""
    return nll(reference) - nll(scores)


def min_k_score(scores: TokenScores, k: float) -> Floats:
    """float64 [n]: mean log-probability of the share ``k`` of the answer tokens that are least likely, at least one
    and rounded down (Min-K% Prob, Shi et al., ICLR 2024, arXiv 2310.16789)."""
    return _least(scores.log_prob, scores, k)


def min_k_plus_score(scores: TokenScores, k: float) -> Floats:
    """float64 [n]: the same mean of (log p - mean) / sqrt(variance), where mean and variance are those of a token drawn
    from the model's own distribution at that place, the variance at least 1e-6 (Min-K%++, Zhang et al., ICLR 2025,
    arXiv 2404.02936). Needs scores with moments."""
    if scores.mean is None or scores.variance is None:
        raise ValueError("scores: min-k++ needs scores with moments")
    return _least((scores.log_prob - scores.mean) / np.sqrt(np.maximum(scores.variance, 1e-6)), scores, k)


def gradient_score(model: PreTrainedModel, examples: Sequence[Example], *, pad: int) -> Floats:
    """float64 [n]: minus the 2-norm, over all parameters, of the gradient of a record's mean cross-entropy; what was
    trained on lies near a minimum. One forward and backward pass per record; gradients and flags are left as they were.
    """
    import torch
    from torch.nn.functional import cross_entropy

    parameters = list(model.parameters())
    wanted = [p.requires_grad for p in parameters]
    score = np.empty(len(examples))
    model.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            for i, example in enumerate(examples):
                logits, labels = answer_logits(model, collate([example], pad, model.device))
                loss = cross_entropy(logits[0, :-1].float(), labels[0, 1:].to(logits.device))
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                norms = [torch.linalg.vector_norm(g.float()) for g in found if g is not None]
                score[i] = -float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
    return score


def _least(values: Floats, scores: TokenScores, k: float) -> Floats:
    """float64 [n]: mean of the smallest share ``k`` of each record's values."""
    record = np.repeat(np.arange(len(scores)), scores.length)
    ascending = values[np.lexsort((values, record))]
    # The product is nudged up so that 0.29 * 100 counts as 29 although it is 28.999... in binary.
    kept = np.maximum(1, np.floor(k * scores.length * (1 + 1e-12))).astype(np.int64)
    total = np.concatenate([[0.0], np.cumsum(ascending)])
    mean: Floats = (total[scores.start[:-1] + kept] - total[scores.start[:-1]]) / kept
    return mean


def auc(members: npt.ArrayLike, non_members: npt.ArrayLike) -> float:
    """Probability that a random member scores above a random non-member, ties counting one half.

    Exact, from average ranks: (sum of the members' ranks - m (m + 1) / 2) / (m n), the Mann-Whitney statistic.
    """
    m, n = np.asarray(members, dtype=float), np.asarray(non_members, dtype=float)
    _, level, count = np.unique(np.concatenate([m, n]), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    twice_rank = 2 * last - count + 1  # integers, so nothing is rounded before the division
    statistic = int(twice_rank[level[:len(m)]].sum()) - len(m) * (len(m) + 1)
    return statistic / (2 * len(m) * len(n))


def roc(members: npt.ArrayLike, non_members: npt.ArrayLike) -> tuple[Floats, Floats]:
    """False- and true-positive rates at every distinct threshold, each float64 [points], from (0, 0) to (1, 1)."""
    m, n = np.asarray(members, dtype=float), np.asarray(non_members, dtype=float)
    levels, level = np.unique(np.concatenate([m, n]), return_inverse=True)
    caught = np.concatenate([[0], np.cumsum(np.bincount(level[:len(m)], minlength=len(levels))[::-1])])
    alarms = np.concatenate([[0], np.cumsum(np.bincount(level[len(m):], minlength=len(levels))[::-1])])
    return alarms / len(n), caught / len(m)


def corners(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """The same curve without the points that lie on the straight line between their neighbours."""
    run, rise = np.diff(fpr), np.diff(tpr)
    turns = np.abs(rise[:-1] * run[1:] - rise[1:] * run[:-1]) > 1e-12
    kept = np.concatenate([[True], turns, [True]])
    return fpr[kept], tpr[kept]


def tpr_at(fpr: npt.ArrayLike, tpr: npt.ArrayLike, most: float) -> float:
    """Largest true-positive rate an attacker reaches with a threshold whose false-positive rate is at most ``most``."""
    allowed = np.asarray(fpr) <= most
    return float(np.asarray(tpr)[allowed].max())


def auc_interval(members: npt.ArrayLike, non_members: npt.ArrayLike, resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile bootstrap interval of the AUC, members and non-members resampled apart (Efron, 1979).

    It treats records as independent; where many records share one subject the true interval is wider.
    """
    m, n = np.asarray(members, dtype=float), np.asarray(non_members, dtype=float)
    levels, level = np.unique(np.concatenate([m, n]), return_inverse=True)
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        above = np.bincount(generator.choice(level[:len(m)], len(m)), minlength=len(levels))
        below = np.bincount(generator.choice(level[len(m):], len(n)), minlength=len(levels))
        wins = 2 * (np.cumsum(below) - below) + below  # twice the non-members a member of this level beats
        found[i] = (above @ wins) / (2 * len(m) * len(n))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def attack(members: npt.ArrayLike, non_members: npt.ArrayLike, *, resamples: int, seed: int) -> Attack:
    """Everything about one attack, from the scores of members and of non-members (higher = more like a member)."""
    m, n = np.asarray(members, dtype=float), np.asarray(non_members, dtype=float)
    if not (np.isfinite(m).all() and np.isfinite(n).all()):
        raise ModelError("a membership attack got scores that are not numbers: the model's weights are damaged, or training"
                         " diverged (lower the learning rate)")
    fpr, tpr = roc(m, n)
    low, high = auc_interval(m, n, resamples, seed) if resamples else (None, None)
    one, five = tpr_at(fpr, tpr, 0.01), tpr_at(fpr, tpr, 0.05)
    fpr, tpr = corners(fpr, tpr)
    return Attack(auc=auc(m, n), low=low, high=high, tpr_at_1=one, tpr_at_5=five, fpr=tuple(fpr.tolist()),
                  tpr=tuple(tpr.tolist()), members=len(m), non_members=len(n))

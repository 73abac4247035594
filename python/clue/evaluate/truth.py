"""Truth: does the model prefer the right answer to wrong ones of the same form? TOFU's truth ratio and the two scores
made of it (Maini et al., COLM 2024, arXiv 2401.06121, section 2.2), and multiple choice.

Directions: the truth ratio R is wrong over right, so a model that knows an answer has R near 0, one that knows nothing R
near 1. On a forget set ``min(R, 1/R)`` is higher the less the model can tell; on everything else ``max(0, 1 - R)`` is
higher the more it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ClueError
from .memorization import TokenScores, nll

if TYPE_CHECKING:
    from .evaluation import Evaluation

Floats = npt.NDArray[np.float64]


def log_truth_ratio(right: TokenScores, wrong: TokenScores, owner: npt.NDArray[np.int64], mean: str) -> Floats:
    """float64 [n]: log R, the log of the wrong answers' mean probability over the right answer's, all of them
    length-normalised (:func:`clue.evaluate.memorization.probability`).

    Args:
        right: scores of the n right answers, in other words where there are other words.
        wrong: scores of all wrong answers.
        owner: int64 [wrong], ascending: whose wrong answer it is; every record 0..n-1 has at least one.
        mean: ``geometric`` (open-unlearning, and TOFU's code) or ``arithmetic`` (TOFU's equation, WAGLE).
    """
    log_p = -nll(wrong)
    first = np.searchsorted(owner, np.arange(len(right)))
    count = np.bincount(owner, minlength=len(right))
    if mean == "geometric":
        average: Floats = np.add.reduceat(log_p, first) / count
    else:
        average = np.logaddexp.reduceat(log_p, first) - np.log(count)
    return average + nll(right)


def indistinct(log_ratio: Floats) -> Floats:
    """min(R, 1/R) in [0, 1]: how little right and wrong answers differ; 1 = not at all, what forgetting aims at."""
    return np.exp(-np.abs(log_ratio))


def truthful(log_ratio: Floats) -> Floats:
    """max(0, 1 - R) in [0, 1]: how much likelier the right answer is; 1 = the wrong ones are out of the question."""
    return np.maximum(0.0, -np.expm1(np.minimum(log_ratio, 0.0)))


def choice(right: TokenScores, wrong: TokenScores, owner: npt.NDArray[np.int64], score: str,
           n_bytes: tuple[Floats, Floats] | None = None) -> npt.NDArray[np.bool_]:
    """bool [n]: the right answer scores above every wrong one (a tie is no knowledge, and counts as wrong).

    Args:
        right, wrong, owner: as in :func:`log_truth_ratio`.
        score: of an answer: its log-probability (``raw``), that per token (``token``), or per byte of its text
            (``byte``, what lm-evaluation-harness calls acc_norm).
        n_bytes: float64 [n] and float64 [wrong], bytes of each text; for ``byte`` only.
    """
    values = []
    for i, scores in enumerate((right, wrong)):
        total = -nll(scores) * scores.length
        if score == "byte":
            if n_bytes is None:
                raise ValueError("n_bytes: needed for score = byte")
            total = total / n_bytes[i]
        values.append(total / scores.length if score == "token" else total)
    first = np.searchsorted(owner, np.arange(len(right)))
    preferred: npt.NDArray[np.bool_] = values[0] > np.maximum.reduceat(values[1], first)
    return preferred


def choice_probability(right: TokenScores, wrong: TokenScores, owner: npt.NDArray[np.int64]) -> Floats:
    """float64 [n], in [0, 1]: the right answer's share of the length-normalised probabilities of all options, TOFU's
    probability on real authors and world facts."""
    theirs = np.logaddexp.reduceat(-nll(wrong), np.searchsorted(owner, np.arange(len(right))))
    share: Floats = 1 / (1 + np.exp(np.minimum(theirs + nll(right), 700)))
    return share


def forget_quality(evaluation: Evaluation, gold: Evaluation) -> float | None:
    """p value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios on the forget set of this
    model and of one retrained without it (TOFU's forget quality); higher is better, 1 = not to be told apart.

    Both come from what the evaluations stored per record; nothing is run. None, not available, where either of the two
    has no truth ratios: the forget set has no wrong answers.

    Raises:
        ClueError: the two were measured on other records or with other definitions of the ratio.
    """
    mine, theirs = (e.records.get("forget", {}).get("log_truth_ratio") for e in (evaluation, gold))
    if mine is None or theirs is None:
        return None
    reason = incomparable(evaluation, gold)
    if reason:
        raise ClueError(f"forget quality: {reason}")
    from scipy.stats import ks_2samp

    return float(ks_2samp(mine, theirs).pvalue)


def incomparable(evaluation: Evaluation, gold: Evaluation) -> str:
    """Why the truth ratios of two evaluations cannot be compared, and what to do; empty where they can."""
    from .evaluation import difference

    return difference(evaluation, gold, ("forget",), ("truth_mean", "count_eos"))


def model_utility(evaluation: Evaluation) -> float | None:
    """Harmonic mean, over the sets named in :attr:`Evaluation.utility`, of probability, ROUGE-L recall and truth ratio
    (:func:`truthful`): TOFU's model utility, of nine numbers for its three sets; higher is better.

    Probability is that of the answer on sets of purpose ``retain``, and :func:`choice_probability` on the others. None
    where no sets are named or one of the numbers is missing; 0 where one of them is 0.
    """
    values = utility_parts(evaluation)
    if not values or any(value is None for value in values.values()):
        return None
    numbers = [float(value or 0.0) for value in values.values()]
    return len(numbers) / sum(1 / v for v in numbers) if all(numbers) else 0.0


def utility_parts(evaluation: Evaluation) -> Mapping[str, float | None]:
    """The numbers behind :func:`model_utility` by name, as ``retain, probability``."""
    parts: dict[str, float | None] = {}
    for name in evaluation.utility:
        result = evaluation.detail[name]
        parts[f"{name}, probability"] = result.probability if result.purpose == "retain" else result.choice_probability
        parts[f"{name}, ROUGE-L recall"] = result.rouge_l
        parts[f"{name}, truth ratio"] = result.truth_ratio
    return parts

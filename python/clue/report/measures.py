"""The measures as people read them: names, what they mean in a sentence, how their values are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .svg import number, percent

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Measure:
    """One measure of :class:`clue.evaluate.SetResult` or one attack."""

    name: str
    meaning: str
    show: Callable[[float], str] = percent


#: Field of :class:`clue.evaluate.SetResult` -> how to present it.
MEASURES = {
    "accuracy": Measure("Exact match (recall)", "Share of answers the model gives word for word when it always takes"
                        " its first choice."),
    "token_accuracy": Measure("Token accuracy", "Share of the answers' tokens that are the model's first choice, given"
                              " the true tokens before them (exact memorization)."),
    "probability": Measure("Probability", "exp(-loss): the probability of an answer, as a geometric mean over its"
                           " tokens."),
    "nll": Measure("Loss", "Mean cross-entropy of the answers' tokens, in nats. Higher means less is known.", number),
    "extraction_strength": Measure("Extraction strength", "Share of an answer that the model completes by itself, word"
                                   " for word, from the shortest beginning that suffices."),
    "rouge_l": Measure("ROUGE-L recall", "Share of the true answer's words that a freely generated answer contains in"
                       " the same order."),
}

ATTACKS = {
    "loss": Measure("Loss attack", "Guesses that a record was trained on when its answer has a low loss.", number),
    "min_k": Measure("Min-k attack", "The same, looking only at each answer's least likely tokens.", number),
}


def caption(name: str) -> str:
    """A key as people write it: ``forget_paraphrase`` -> ``Forget paraphrase``."""
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def pooled(evaluation: Evaluation, purpose: str, without: str | None = None) -> float:
    """Exact match over all records of every set of one purpose, but for the set ``without``."""
    found = [r for name, r in evaluation.detail.items() if r.purpose == purpose and name != without]
    return sum(r.accuracy * r.n for r in found) / max(1, sum(r.n for r in found))


def mean_of(evaluation: Evaluation, purpose: str) -> float:
    """Mean over the sets of one purpose of their exact match; every set counts the same."""
    found = [r.accuracy for r in evaluation.detail.values() if r.purpose == purpose]
    return sum(found) / max(1, len(found))

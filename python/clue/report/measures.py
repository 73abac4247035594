"""The measures as people read them: names, what they mean in a sentence, how their values are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .svg import number, percent

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Measure:
    """One measure of :class:`clue.evaluate.SetResult` or one attack.

    ``knows``: 1 where a higher value means that the model knows more, -1 where it knows less, 0 where higher is better on
    every set.
    """

    name: str
    meaning: str
    show: Callable[[float], str] = percent
    knows: int = 1

    def better(self, purpose: str) -> str:
        """``lower`` or ``higher``: what is better on a set of this purpose; empty where neither is."""
        if purpose == "holdout":
            return ""
        return "lower" if self.knows == (1 if purpose in ("forget", "member") else -1) else "higher"


#: Field of :class:`clue.evaluate.SetResult` -> how to present it.
MEASURES = {
    "accuracy": Measure("Exact match (recall)", "Share of answers the model gives word for word when it always takes"
                        " its first choice."),
    "token_accuracy": Measure("Token accuracy", "Share of the answers' tokens that are the model's first choice, given"
                              " the true tokens before them (exact memorization)."),
    "probability": Measure("Probability", "exp(-loss): the probability of an answer, as a geometric mean over its"
                           " tokens."),
    "nll": Measure("Loss", "Mean cross-entropy of the answers' tokens, in nats.", number, -1),
    "perplexity": Measure("Perplexity", "exp of the mean cross-entropy over all answer tokens of the set together.", number,
                          -1),
    "extraction_strength": Measure("Extraction strength", "Share of an answer that the model completes by itself, word"
                                   " for word, from the shortest beginning that suffices."),
    "rouge_l": Measure("ROUGE-L recall", "Share of the true answer's words that a freely generated answer contains in"
                       " the same order; it knows words of a-z and 0-9 only."),
    "contained": Measure("Contained", "Share of generated answers that contain the true one, whatever the case."),
    "matched": Measure("Generated match", "Share of generated answers that are the true one, whatever the case."),
    "nearest": Measure("Nearest in meaning", "Share of generated answers whose embedding is at least as near to the true answer"
                       " as to every wrong one."),
    "truth_ratio": Measure("Truth ratio", "R is the mean probability of wrong answers over that of the right one. On forget"
                           " sets min(R, 1/R): how little the model tells them apart. Elsewhere max(0, 1 - R): how much"
                           " better the right one does.", knows=0),
    "choice_accuracy": Measure("Multiple choice", "Share of records whose answer the model prefers to every wrong one."),
    "choice_probability": Measure("Probability among options", "The answer's share in the probabilities of all options."),
}

ATTACKS = {
    "loss": Measure("Loss attack", "Guesses that a record was trained on when its answer has a low loss.", number),
    "zlib": Measure("Zlib attack", "The loss over the size of the compressed answer: what is merely repetitive counts less.",
                    number),
    "min_k": Measure("Min-k attack", "The loss attack on each answer's least likely tokens alone.", number),
    "min_k++": Measure("Min-k++ attack", "Min-k on log-probabilities that are standardised by the model's own distribution at"
                       " each place.", number),
    "reference": Measure("Reference attack", "How much lower the loss is than under a model that was trained on neither side.",
                         number),
    "gradnorm": Measure("Gradient attack", "Guesses that a record was trained on when the loss has a small gradient there.",
                        number),
}


def caption(name: str) -> str:
    """A key as people write it: ``forget_paraphrase`` -> ``Forget paraphrase``."""
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def titled(name: str, evaluations: Iterable[Evaluation]) -> str:
    """A set under the name it was used by, with its own where that is another one: ``retain: unseen``."""
    own = next((r.name for e in evaluations if (r := e.detail.get(name)) is not None), name)
    return name if own == name else f"{name}: {own}"


def pooled(evaluation: Evaluation, purpose: str, without: str | None = None) -> float:
    """Exact match over all records of every set of one purpose, but for the set ``without``."""
    found = [r for name, r in evaluation.detail.items() if r.purpose == purpose and name != without]
    return sum(r.accuracy * r.n for r in found) / max(1, sum(r.n for r in found))

"""Evaluation: what a model still knows, what it gives away, and what it can still do.

- :mod:`.memorization`: exact match, token accuracy, probability, loss, extraction strength, perplexity; one
  teacher-forced pass.
- :mod:`.truth`: right against wrong answers: truth ratio, forget quality, model utility, multiple choice.
- :mod:`.generation`: greedy answers in batches, ROUGE-L recall, containment.
- :mod:`.privacy`: membership-inference attacks with ROC curve, AUC and its interval.
- :mod:`.evaluation`: the document of one model; :mod:`.measure` makes it.
- :mod:`.robustness`: what brings the forgotten back: relearning, drift, quantization, prompts.
- :mod:`.harness`: tasks of lm-evaluation-harness, an optional extra.
"""

from __future__ import annotations

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any

from .evaluation import Evaluation, EvaluationSets, Sample, SetResult, privleak
from .measure import evaluate
from .privacy import Attack
from .robustness import Robustness, stress
from .truth import forget_quality, model_utility

__all__ = ["Attack", "Evaluation", "EvaluationSets", "Robustness", "Sample", "SetResult", "evaluate", "forget_quality",
           "model_utility", "privleak", "stress"]


class _Package(ModuleType):
    """Lets ``clue.evaluate(...)`` be called although ``clue.evaluate`` is this package."""

    @property
    def __signature__(self) -> Signature:
        from .measure import evaluate

        return signature(evaluate)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from .measure import evaluate

        return evaluate(*arguments, **keywords)


sys.modules[__name__].__class__ = _Package

"""Evaluation: what a model still knows, what it gives away, and what it can still do.

- :mod:`.memorization`: exact match, token accuracy, probability, loss, extraction strength; one teacher-forced pass.
- :mod:`.generation`: greedy answers and ROUGE-L recall.
- :mod:`.privacy`: membership-inference attacks with ROC curve, AUC and its interval.
- :mod:`.evaluation`: all of it for one model, as one document.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .evaluation import Evaluation, EvaluationSets, Sample, SetResult, evaluate, privleak
from .privacy import Attack

__all__ = ["Attack", "Evaluation", "EvaluationSets", "Sample", "SetResult", "evaluate", "privleak"]


class _Package(ModuleType):
    """Lets ``clue.evaluate(...)`` be called although ``clue.evaluate`` is this package."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from .evaluation import evaluate

        return evaluate(*arguments, **keywords)


sys.modules[__name__].__class__ = _Package

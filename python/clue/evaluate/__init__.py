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

from ..callable_package import make_callable
from .evaluation import Evaluation, EvaluationSets, Sample, SetResult, privleak
from .measure import evaluate
from .privacy import Attack
from .robustness import Robustness, stress
from .truth import forget_quality, model_utility

__all__ = ["Attack", "Evaluation", "EvaluationSets", "Robustness", "Sample", "SetResult", "evaluate", "forget_quality",
           "model_utility", "privleak", "stress"]


make_callable(__name__)

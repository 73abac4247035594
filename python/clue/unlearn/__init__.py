"""Unlearning: fine-tune the planned weights of a model, and not a bit of any other.

Public names are imported on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..callable_package import make_callable

_HOME = {
    "unlearn": ".loop",
    "UnlearnLog": ".log",
    "MaskedAdamW": ".optimizer",
    "RetainMetric": ".metric",
    "PlanCallback": ".callback",
    "SparseGradients": ".sparse",
    "Answers": ".objectives",
    "OBJECTIVES": ".objectives",
    "Objective": ".objectives",
    "Tuning": ".tuning",
    "answer_log_probs": ".objectives",
    "tune": ".tuning",
}

__all__ = ["OBJECTIVES", "Answers", "MaskedAdamW", "Objective", "PlanCallback", "RetainMetric", "SparseGradients",
           "Tuning", "UnlearnLog", "answer_log_probs", "tune", "unlearn"]

if TYPE_CHECKING:
    from .callback import PlanCallback
    from .log import UnlearnLog
    from .loop import unlearn
    from .metric import RetainMetric
    from .objectives import OBJECTIVES, Answers, Objective, answer_log_probs
    from .optimizer import MaskedAdamW
    from .sparse import SparseGradients
    from .tuning import Tuning, tune


def __getattr__(name: str) -> Any:
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'clue.unlearn' has no attribute {name!r}") from None
    return getattr(import_module(module, __name__), name)


make_callable(__name__)

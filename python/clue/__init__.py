"""CLUE: make a language model forget something and keep everything else.

Records become pairs, pairs become scores, scores become circuits, circuits become a formula, the formula becomes a
plan, the plan steers fine-tuning, and evaluation says what it did.

Public names are imported on first use, so ``import clue`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "localize": ".pipeline",
    "Plan": ".plan",
    "Slice": ".plan",
    "verify": ".plan",
    "Delta": ".delta",
    "MaskedAdamW": ".unlearn.optimizer",
    "PlanCallback": ".unlearn.callback",
    "RecordSet": ".data.records",
    "Record": ".data.records",
    "read": ".data.records",
    "DataSettings": ".config",
    "LocalizeSettings": ".config",
    "UnlearnSettings": ".config",
    "EvaluateSettings": ".config",
    "ClueError": ".errors",
    "Role": ".types",
    "Gate": ".types",
    "Direction": ".types",
}

__all__ = ["__version__", "evaluate", "unlearn", *_HOME]

if TYPE_CHECKING:
    from .config import DataSettings, EvaluateSettings, LocalizeSettings, UnlearnSettings
    from .data.records import Record, RecordSet, read
    from .delta import Delta
    from .errors import ClueError
    from .evaluate.measure import evaluate
    from .pipeline import localize
    from .plan import Plan, Slice, verify
    from .types import Direction, Gate, Role
    from .unlearn.callback import PlanCallback
    from .unlearn.loop import unlearn
    from .unlearn.optimizer import MaskedAdamW


def __getattr__(name: str) -> Any:
    if name in ("unlearn", "evaluate"):  # packages that are also the function they are named after
        return import_module(f".{name}", __name__)
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'clue' has no attribute {name!r}") from None
    return getattr(import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

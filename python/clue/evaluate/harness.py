"""Tasks of EleutherAI's lm-evaluation-harness (WMDP, MMLU, Winogrande, ...) on a model in memory; an optional extra.

CLUE's own multiple choice (:mod:`.truth`) needs nothing but the records; the harness is for numbers that must be comparable
with those of papers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ClueError
from ..model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_harness() -> None:
    """Raise :class:`ClueError` unless the harness is installed."""
    try:
        import_module("lm_eval")
    except ImportError as error:
        raise ClueError(f"tasks of lm-evaluation-harness need the package lm-eval ({error}): install clue-unlearn[lm-eval], or"
                        " leave them out (--harness '')") from None


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, batch_size: int = 16,
            limit: int = 0, seed: int = 0) -> dict[str, float]:
    """Accuracy per task and group of tasks, in [0, 1]; higher is better, but for what had to be forgotten (WMDP).

    Args:
        tasks: names as the harness knows them, such as ``wmdp_bio``, ``mmlu``, ``winogrande``; the harness fetches their
            data from the hub.
        limit: use at most this many questions of each task; 0 means all.

    Raises:
        ClueError: the harness is not installed, does not know a task, or cannot load it.
    """
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with evaluating(model):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks),
                limit=limit or None, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed)
    except (KeyError, ValueError, OSError) as error:
        raise ClueError(f"lm-evaluation-harness cannot run {', '.join(tasks)} ({error}): check the names of the tasks, and"
                        " that the hub can be reached") from None
    accuracy = {name: values.get("acc,none") for name, values in found["results"].items()}
    return {name: float(value) for name, value in accuracy.items()
            if isinstance(value, (int, float)) and math.isfinite(value)}

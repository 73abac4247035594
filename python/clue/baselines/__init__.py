"""Baselines: other ways of choosing the weights that may move, to compare with. Each yields a :class:`clue.Plan`.

    plan = clue.baselines.localize("wagle", model, tokenizer, forget, retain, ratio=0.2)
    plan = clue.baselines.wagle(model, tokenizer, forget, retain, ratio=0.2)     # the same

A ratio of 0.2 means for every one of them: the fifth of the weights of all layers' linear maps that it ranks highest is
edited. Embeddings, norms, biases and the head are nobody's candidates. A baseline tells no roles apart, so everything it
chooses is ``conflict``: trained to forget and to retain.

- :mod:`.scores`: what each baseline ranks by.
- :mod:`.selection`: the highest of them, exactly as many as asked for, without sorting a model's weights.
- :mod:`.gradients`: mean gradients, input norms and unit attributions, from hooks on the unmodified model.
- :mod:`.candidates`: the weights in question.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config import BASELINES

__all__ = ["BASELINES", "localize", *BASELINES]

if TYPE_CHECKING:
    from .localization import localize


def __getattr__(name: str) -> Any:
    if name != "localize" and name not in BASELINES:
        raise AttributeError(f"module 'clue.baselines' has no attribute {name!r}")
    localize = import_module(".localization", __name__).localize
    return localize if name == "localize" else partial(localize, name)

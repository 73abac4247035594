"""Prefix: the tokens that the prompts of both runs begin with, run once for all of them.

In a causal model two runs cannot differ before the first token that does, and the gradient at a later token never comes
through the gradient at an earlier one. So nothing is scored at the tokens that both prompts of a pair begin with (a chat
template, a system prompt, the words before the subject), and all that the other tokens need of them are their keys and
values.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .answers import to_keep

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Rotary frequencies that depend on how long the whole sequence is: keys without the rest may be others than with it.
_BY_LENGTH = {"dynamic", "longrope"}


def separable(model: nn.Module) -> bool:
    """Whether the keys and values of a prompt's first tokens are the same whatever follows them."""
    return _BY_LENGTH.isdisjoint(kind.get("rope_type") for kind in _rotations(model))


def unstretched(model: nn.Module) -> int:
    """The longest sequence before rotary frequencies become those for long ones; 0 if they do not.

    In a batch they are those of its longest sequence, so that shorter ones run otherwise beside it than alone.
    """
    return min((int(kind.get("original_max_position_embeddings") or 0) for kind in _rotations(model)
                if kind.get("rope_type") == "longrope"), default=0)


def _rotations(model: nn.Module) -> list[dict[str, Any]]:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}  # type: ignore[operator, union-attr]
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]  # by layer type, in some families


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first tokens of a batch, a transformers ``Cache``; ``None`` if there are no such tokens."""

    cache: Any = None

    @classmethod
    def of(cls, model: nn.Module, input_ids: Tensor) -> Prefix:
        """Run the model on int64 [batch, tokens], which may be no tokens."""
        import torch

        if input_ids.shape[1] == 0:
            return cls()
        with torch.no_grad():
            last = torch.arange(1, device=input_ids.device)  # logits are not wanted, and one is the least
            return cls(model(input_ids=input_ids, use_cache=True, logits_to_keep=to_keep(model, last)).past_key_values)

    def repeated(self, times: int) -> Prefix:
        """The same before so many batches, one after the other, in one."""
        import torch

        if self.cache is None or times == 1:
            return self
        past = self.arguments()["past_key_values"]
        past.batch_select_indices(torch.arange(past.layers[0].keys.shape[0]).repeat(times))
        return Prefix(past)

    def arguments(self) -> dict[str, Any]:
        """What the model is called with beside the other tokens. New ones for each run, which adds its own keys and values."""
        if self.cache is None:
            return {"use_cache": False}
        past = copy(self.cache)
        past.layers = [copy(layer) for layer in past.layers]  # whose tensors are replaced, never written to
        return {"use_cache": True, "past_key_values": past}

    def rewind(self, arguments: dict[str, Any], number: int) -> None:
        """Take back what a run with these arguments added in layer ``number``."""
        if self.cache is not None:
            arguments["past_key_values"].layers[number] = copy(self.cache.layers[number])


#: Runs of whole prompts.
NO_PREFIX = Prefix()

"""HiddenStates: the residual stream behind one layer, for objectives that work on it rather than on answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UnlearnSettings
from ..errors import ClueError
from ..model.anatomy import anatomy


class HiddenStates:
    """Reads what one layer hands to the next.

    Args:
        model: of a family that :func:`clue.model.anatomy.anatomy` knows.
        settings: ``rmu_layer`` says which layer.
        seed: of the direction.

    Attributes:
        direction: float32 [d_model], uniform in [0, 1), then normalised to length 1.
        states: float32 (float64 for float64) [batch, seq, d_model] of the latest forward pass that was watched.

    Raises:
        ClueError: the model has no such layer.
    """

    def __init__(self, model: nn.Module, settings: UnlearnSettings, seed: int) -> None:
        body = anatomy(model)
        number = settings.rmu_layer or -(-body.n_layers // 4)
        if number > body.n_layers:
            raise ClueError(f"rmu_layer = {number}, but this model has {body.n_layers} layers")
        self._block = body.layers[number - 1].block
        drawn = torch.rand(body.d_model, generator=torch.Generator().manual_seed(seed * 1009 + 3))
        self.direction = (drawn / drawn.norm()).to(next(model.parameters()).device)
        self.states = torch.empty(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the states of the forward pass that runs meanwhile."""

        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            found: Tensor = output[0] if isinstance(output, tuple) else output
            self.states = found.float() if found.dtype in (torch.bfloat16, torch.float16) else found

        handle = self._block.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

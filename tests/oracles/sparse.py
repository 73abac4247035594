"""The slow, obviously right gradients of planned slices: dense backward passes, one per role, and a selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from clue.plan import Plan
from clue.types import Role
from clue.weights import parameter_of, view_of


def slice_gradients(model: nn.Module, plan: Plan, forget: Callable[[], Tensor],
                    retain: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By parameter: the gradient of ``forget()`` on its planned slices, slices first in the order of their index, and
    that of ``retain()`` on its conflict slices (None without any)."""
    index = {name: np.unique(np.concatenate([s.index for s in plan.slices if s.parameter == name]))
             for name in plan.parameters()}
    axis = {s.parameter: s.axis for s in plan.slices}
    dense: list[dict[str, Tensor]] = []
    for loss in (forget, retain):
        model.zero_grad()
        loss().backward()
        dense.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    found = {}
    for name in plan.parameters():
        conflict = [s.index for s in plan.slices if s.parameter == name and s.role == Role.CONFLICT]
        chosen = [torch.from_numpy(i) for i in (index[name], *conflict)]
        parts = [view_of(gradient[parameter_of(name)], name).index_select(axis[name], i).movedim(axis[name], 0)
                 for gradient, i in zip(dense, chosen, strict=False)]
        found[name] = parts[0], parts[1] if conflict else None
    return found

"""Provenance: what a plan was made from, so that equal plans say the same and different models are told apart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .weights import parameter_of, view_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .plan import Plan, Slice


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def unplanned(model: nn.Module, plan: Plan) -> dict[str, str]:
    """SHA-256 of the bytes of every parameter and buffer, planned weights taken as zeros: what a training must leave alone."""
    import torch

    planned: dict[str, list[Slice]] = {}
    for s in plan.slices:
        planned.setdefault(parameter_of(s.parameter), []).append(s)
    found = {}
    for name, tensor in model.state_dict().items():
        rest = tensor.detach().clone() if name in planned else tensor
        for s in planned.get(name, ()):
            view_of(rest, s.parameter).index_fill_(s.axis, torch.from_numpy(s.index).to(rest.device), 0)
        found[name] = hashlib.sha256(_bytes(rest)).hexdigest()
    return found


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def versions() -> dict[str, str]:
    """Versions of everything that decides a plan."""
    from importlib.metadata import version

    from . import __version__, _core

    found = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"clue": __version__, "cadical": _core.cadical_version(), **found}

"""Provenance: what a plan was made from, so that equal plans say the same and different models are told apart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers: names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of everything that decides a plan."""
    from importlib.metadata import version

    from . import __version__, _core

    found = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"clue": __version__, "cadical": _core.cadical_version(), **found}

"""Weights by name, the matrices inside stacked parameters included.

A mixture of experts keeps the matrices of all its experts in one parameter with three axes. The name of one of them ends
in its expert's number: ``model.layers.0.mlp.experts.down_proj[3]`` is row 3 of that parameter, [d_model, width]. Such a
part is planned, trained and compared like any other matrix. What a name means is decided here alone: in a model, in a
gradient, and in a model's files, where the same experts may lie in one tensor or in many.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

_PART = re.compile(r"(.+)\[(\d+)\]")
#: One expert's matrix in the layout of the Hugging Face hub, which ``save_pretrained`` writes too.
_IN_FILE = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
#: The stacked parameter that each of them belongs to, and where it lies along the rows of its part there.
_STACKED = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
            "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}


def part_name(parameter: str, member: int) -> str:
    """The name of one matrix of a stacked parameter."""
    return f"{parameter}[{member}]"


def parameter_of(name: str) -> str:
    """The parameter that a name means, or means a part of."""
    match = _PART.fullmatch(name)
    return match[1] if match else name


def member_of(name: str) -> int | None:
    """Which matrix of a stacked parameter a name means; ``None`` where it means a whole parameter."""
    match = _PART.fullmatch(name)
    return int(match[2]) if match else None


def view_of(tensor: Tensor, name: str) -> Tensor:
    """What a name means of its parameter, or of that parameter's gradient: the tensor itself, or a view of one part."""
    member = member_of(name)
    return tensor if member is None else tensor[member]


def shape_of(parameters: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """Shape of what a name means among a model's parameters; ``None`` when it means nothing there."""
    parameter, member = parameters.get(parameter_of(name)), member_of(name)
    if parameter is None or (member is not None and (parameter.ndim != 3 or member >= len(parameter))):
        return None
    return tuple(parameter.shape if member is None else parameter.shape[1:])


def from_file(stored: str, size: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """What a tensor in a model's files is in the model.

    Experts lie there stacked, as in the model, or one by one, gate and up apart. Either way each is named alone.

    Args:
        stored: name in the file.
        size: shape in the file.

    Returns:
        (name in the model, position along its rows, member of the stored tensor or ``None`` for all of it).
    """
    name = stored.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's name for its MLP in files
    if match := _IN_FILE.fullmatch(name):
        parameter, position = _STACKED[match[3]]
        return [(part_name(f"{match[1]}.mlp.experts.{parameter}", int(match[2])), position, None)]
    if len(size) == 3 and name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
        return [(part_name(name, member), 0, member) for member in range(size[0])]
    return [(name, 0, None)]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers: names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

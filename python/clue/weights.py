"""Weights by name, the matrices inside stacked parameters and single weights included.

A mixture of experts keeps the matrices of all its experts in one parameter with three axes. The name of one of them ends
in its expert's number: ``model.layers.0.mlp.experts.down_proj[3]`` is row 3 of that parameter, [d_model, width]. Such a
part is planned, trained and compared like any other matrix; a convolution's weight has three axes too, and is no stack.
A name that ends in ``[:]`` means all the numbers of a weight in one row, [weights], in the order they lie in memory: its
slices are single weights. What a name means is decided here alone: in a model, in a gradient, and in a model's files,
where the same experts may lie in one tensor or in many.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"(.+)\[(\d+)\]")
_FLAT = "[:]"
_CONVOLUTION = re.compile(r"(.+\.)?[^.]*conv[^.]*\.weight")
#: One expert's matrix in the layout of the Hugging Face hub, which ``save_pretrained`` writes too.
_IN_FILE = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
#: The stacked parameter that each of them belongs to, and where it lies along the rows of its part there.
_STACKED = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
            "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
#: A model that also reads images keeps its parts side by side in files, and inside ``model`` in the model.
_SIDE_BY_SIDE = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
                 ("vision_tower.vision_model.", "model.vision_tower."), ("vision_tower.", "model.vision_tower."),
                 ("multi_modal_projector.", "model.multi_modal_projector."))
_SPARSE = re.compile(r"(.+)\.block_sparse_moe\.(.+)")
#: Granite's names in files for what it has under ``block_sparse_moe``; all others (Mixtral) call that ``mlp`` in the model.
_GRANITE = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj",
            "router.layer.weight": "router.weight"}


def part_name(parameter: str, member: int) -> str:
    """The name of one matrix of a stacked parameter."""
    return f"{parameter}[{member}]"


def flat_name(weight: str) -> str:
    """The name of all the numbers of a weight in one row."""
    return weight + _FLAT


def is_flat(name: str) -> bool:
    """Whether a name means the numbers of a weight in one row."""
    return name.endswith(_FLAT)


def weight_of(name: str) -> str:
    """The weight, in its own shape, that a name means: the name itself unless it is flat."""
    return name.removesuffix(_FLAT)


def unit_of(name: str, axis: int) -> str:
    """What the slices of a name are along an axis, in words."""
    return "weights" if is_flat(name) else ("rows", "columns")[axis]


def parameter_of(name: str) -> str:
    """The parameter that a name means, or means a part of."""
    name = weight_of(name)
    match = _PART.fullmatch(name)
    return match[1] if match else name


def member_of(name: str) -> int | None:
    """Which matrix of a stacked parameter a name means; ``None`` where it means a whole parameter."""
    match = _PART.fullmatch(weight_of(name))
    return int(match[2]) if match else None


def is_stack(parameter: str, size: Sequence[int]) -> bool:
    """Whether a parameter of that shape is a stack, every matrix of which counts as a weight of its own."""
    return len(size) == 3 and _CONVOLUTION.fullmatch(parameter) is None


def view_of(tensor: Tensor, name: str) -> Tensor:
    """What a name means of its parameter, or of that parameter's gradient: the tensor itself, or a view of it."""
    member = member_of(name)
    found = tensor if member is None else tensor[member]
    return found.view(-1) if is_flat(name) else found


def shape_of(parameters: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """Shape of what a name means among a model's parameters; ``None`` when it means nothing there."""
    whole, member = parameter_of(name), member_of(name)
    parameter = parameters.get(whole)
    if parameter is None or (member is not None and not (is_stack(whole, parameter.shape) and member < len(parameter))):
        return None
    shape = tuple(parameter.shape if member is None else parameter.shape[1:])
    return (math.prod(shape),) if is_flat(name) else shape


def from_file(stored: str, size: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """What a tensor in a model's files is in the model.

    Experts lie there stacked, as in the model, or one by one, gate and up apart. Either way each is named alone.

    Args:
        stored: name in the file.
        size: shape in the file.

    Returns:
        (name in the model, position along its rows, member of the stored tensor or ``None`` for all of it).
    """
    for outside, inside in _SIDE_BY_SIDE:
        if stored.startswith(outside):
            stored = inside + stored.removeprefix(outside)
            break
    name = stored
    if match := _SPARSE.fullmatch(stored):
        inner = _GRANITE.get(match[2], match[2])
        name = f"{match[1]}.{'block_sparse_moe' if inner in _GRANITE.values() else 'mlp'}.{inner}"
    if match := _IN_FILE.fullmatch(name):
        parameter, position = _STACKED[match[3]]
        return [(part_name(f"{match[1]}.{parameter}", int(match[2])), position, None)]
    if is_stack(name, size):
        return [(part_name(name, member), 0, member) for member in range(size[0])]
    return [(name, 0, None)]

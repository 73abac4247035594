"""Shards: what one process holds of the planned slices, where parameters are spread over several.

FSDP2 (``torch.distributed.fsdp.fully_shard``) makes a parameter a DTensor of which every process keeps some rows: those
of a matrix, or whole matrices of a stack of experts. A planned row lies in one process, a planned column in all of them, a
piece in each. An ordinary parameter is held whole, so everything here is the identity then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ClueError
from ..weights import is_flat, member_of, view_of


@dataclass(frozen=True)
class Shard:
    """The planned slices of one weight, as far as this process holds them.

    Attributes:
        name: of the weight, which may be one matrix of a stack.
        axis: the one that slices are taken along.
        index: int64 [k'], sorted, of the slices here, counted within what is here; empty where there are none.
        slices: first of them among all planned slices of the weight, and one past the last.
        rest: first index of what is here along the other axis, and one past the last; ``None`` for a bias.
    """

    name: str
    axis: int
    index: Tensor
    slices: tuple[int, int]
    rest: tuple[int, int] | None
    _member: int | None

    @property
    def key(self) -> str:
        """What its random numbers are drawn by: the name, and where in the weight this part begins unless at the start."""
        first = self.slices[0], 0 if self.rest is None else self.rest[0]
        return f"{self.name} {first[0]} {first[1]}" if any(first) else self.name

    def here(self, tensor: Tensor) -> Tensor:
        """The local part of the weight: of the parameter, or of its gradient."""
        local = local_part(tensor)
        if is_flat(self.name):
            return view_of(local, self.name)
        return local if self._member is None else local[self._member]

    def of_compact(self, gradient: Tensor) -> Tensor:
        """The part that belongs here of the gradient of all planned slices, slices first: [k, length] -> [k', length']."""
        mine = gradient[slice(*self.slices)]
        return mine if self.rest is None else mine[:, slice(*self.rest)]


def shard_of(parameter: nn.Parameter, name: str, axis: int, index: Tensor) -> Shard:
    """What this process holds of the slices ``index`` (int64 [k], sorted) of a weight.

    Raises:
        ClueError: the parameter is sharded in a way that is not known here.
    """
    if is_flat(name):
        if is_sharded(parameter):
            raise ClueError(f"{name}: single weights of a sharded parameter cannot be planned: plan its rows or columns, or"
                            " train it whole")
        return Shard(name, axis, index, (0, len(index)), None, None)
    bounds = _bounds(parameter)
    member = member_of(name)
    if member is not None:
        first, last = bounds.pop(0)
        if not first <= member < last:
            return Shard(name, axis, index[:0], (0, 0), (0, 0), None)
        member -= first
    first, last = bounds[axis]
    ends = torch.tensor([first, last], device=index.device)
    start, stop = torch.searchsorted(index, ends).tolist()
    rest = bounds[1 - axis] if len(bounds) == 2 else None
    return Shard(name, axis, index[start:stop] - first, (start, stop), rest, member)


def reshard(model: nn.Module) -> None:
    """Give back what forward passes gathered and kept, as the outermost module's is where no backward pass follows: then every
    parameter is its shard again, and the next pass gathers what the shards hold by then."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):  # what fully_shard makes of a module
            module.reshard()  # type: ignore[operator]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, operator]


def memory_of(tensor: Tensor) -> tuple[torch.device, int, int] | None:
    """Where what this process holds of a tensor lies: its device, first byte, and one past the last; ``None`` for one without
    memory of its own to speak of (meta, fake, empty, sparse)."""
    local = local_part(tensor.detach())
    # A fake tensor says that it is on a device; asked for an address, it warns.
    if local.layout != torch.strided or local.untyped_storage().device.type == "meta" or not local.numel():
        return None
    first = local.data_ptr()
    span = 1 + sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return (local.device, first, first + span * local.element_size()) if first else None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (whose module, a second's import, is loaded then)."""
    return hasattr(tensor, "device_mesh")


def add_up(values: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The sum of (number, tensor it was computed from the local part of) over all processes that hold a part.

    Every process must ask, with the same tensors in the same order.
    """
    totals: dict[Any, Tensor] = {}
    for number, tensor in values:
        key = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # type: ignore[attr-defined]
        totals[key] = totals.get(key, torch.zeros((), dtype=torch.float64, device=device)) + number.double().to(device)
    for key, total in totals.items():
        if key is not None and (dimension := _dimension(*key)) is not None:
            torch.distributed.all_reduce(total, group=key[0].get_group(dimension))
    return float(sum(float(total) for total in totals.values()))


def _bounds(parameter: nn.Parameter) -> list[tuple[int, int]]:
    """Along each axis the first index that this process holds, and one past the last."""
    bounds = [(0, int(size)) for size in parameter.shape]
    if is_sharded(parameter):
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        dimension = _dimension(mesh, placements)
        if dimension is not None:
            axis = placements[dimension].dim
            size = bounds[axis][1]
            chunk = -(-size // mesh.size(dimension))
            first = min(mesh.get_local_rank(dimension) * chunk, size)
            bounds[axis] = first, min(first + chunk, size)
    return bounds


def _dimension(mesh: Any, placements: Any) -> int | None:
    """The dimension of the mesh along which a parameter is sharded; ``None`` where each process has all of it."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement

    sharded = [number for number, placement in enumerate(placements) if type(placement) is not Replicate]
    if len(sharded) > 1 or any(type(placements[number]) is not ShardPlacement for number in sharded):
        raise ClueError(f"a parameter is spread over processes as {placements}: shard models with fully_shard along one"
                        " dimension (which others may replicate), without tensor parallelism")
    return sharded[0] if sharded else None

"""Processes: which one this is, among those of torch.distributed that share the work.

``torchrun`` starts them and tells each its number in the environment. A library call joins whatever group its caller
made; a command makes the group itself (:func:`joined`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def place() -> tuple[int, int]:
    """This process's number, and how many share the work: (0, 1) where torch.distributed is not initialized."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def agreed(value: float) -> float:
    """The first process's value, in all of them, so that they decide alike; all must ask."""
    import torch

    if place()[1] == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=_device())
    torch.distributed.broadcast(shared, 0)
    return float(shared)


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process; all must ask."""
    import torch

    if place()[1] == 1:
        return holds
    least = torch.tensor(int(holds), device=_device())
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return bool(least)


def _device() -> str:
    """Where the backend wants what it exchanges."""
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, for as long as the block runs; without it, nothing happens.

    Each process takes the GPU of its local number unless ``device`` is ``cpu``.

    Yields:
        whether this process is the one that writes files and reports.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or place()[1] > 1:
        yield place()[0] == 0
        return
    # Its functions keep the group that there is when it is imported, as a default argument: imported later (models do), the
    # group would outlive its end, and its threads the interpreter, which torch now and then aborts over.
    import torch.distributed.nn.functional

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield place()[0] == 0
        # Nobody leaves while another still works: torch ends a process that loses its peers while the group is taken down.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()

"""The same tests run on every device: on the CPU, on CUDA where there is a GPU, and the CUDA kernels without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from clue import _core

from .emulated import Emulated, load


@dataclass(frozen=True)
class Native:
    """The native module of a device, and the device its tensors go to."""

    device: str
    kernels: ModuleType | Emulated


@pytest.fixture(scope="session", params=["cpu", "cuda", pytest.param("emulated", marks=pytest.mark.slow)])
def native(request: pytest.FixtureRequest) -> Native:
    if request.param == "cpu":
        return Native("cpu", _core)
    if request.param == "emulated":
        return Native("cpu", load())
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Native("cuda", pytest.importorskip("clue._cuda"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads, which the kernels share."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isa() -> Iterator[None]:
    """Restores the instruction set in use."""
    before = _core.kernels()["masked_adamw"]
    yield
    _core.set_isa(before)

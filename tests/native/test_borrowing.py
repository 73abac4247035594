"""How tensors are borrowed: which are taken, which are refused and in what words; and how threads are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clue import _core

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is borrowed on Linux")


def attribute(clean: Any, out: Any = None) -> Any:
    """One call whose first input and first output are given."""
    out = torch.zeros(2) if out is None else out
    _core.neuron_attribution(clean, *torch.ones(3, 3, 2), out, *torch.zeros(3, 2))
    return out


class Producer:
    """A tensor of a library that has nothing but the two methods of DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None) -> Any:
        return self.array.__dlpack__(max_version=max_version)


class OldProducer(Producer):
    """The same from before DLPack 1.0."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class ElsewhereProducer(Producer):
    """The same on a device that no kernel knows."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


@pytest.mark.parametrize("wrap", [Producer, OldProducer, torch.from_numpy, torch.nn.Parameter])
def test_every_kind_of_tensor_is_taken(wrap: Any) -> None:
    zeros = np.zeros((3, 2), dtype=np.float32)
    clean = torch.nn.Parameter(torch.from_numpy(zeros), requires_grad=False) if wrap is torch.nn.Parameter \
        else wrap(zeros)
    assert attribute(clean).tolist() == [3, 3]


def test_a_producer_is_written_in_place() -> None:
    out = np.zeros(2, dtype=np.float32)
    attribute(torch.zeros(3, 2), Producer(out))
    assert out.tolist() == [3, 3]


@pytest.mark.parametrize("version", [(1, 0), None])
def test_borrowed_capsules_are_given_back(version: tuple[int, int] | None) -> None:
    array = np.zeros((3, 2), dtype=np.float32)
    before = sys.getrefcount(array)
    attribute(Producer(array) if version else OldProducer(array))
    assert sys.getrefcount(array) == before


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3, 2)


def unaligned() -> np.ndarray:
    return np.zeros(25, dtype=np.uint8)[1:].view(np.float32).reshape(3, 2)


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: torch.zeros(3, 2, requires_grad=True), ValueError,
     r"^clean: a tensor without gradient, got one that requires grad \(pass \.detach\(\)\)$"),
    (lambda: torch.zeros(3, 2, dtype=torch.complex64).conj().imag, ValueError, "^clean: plain memory, got a lazily"),
    (lambda: torch.zeros(3, 2, device="meta"), (TypeError, BufferError), "^clean: .* got .*[Mm]eta"),
    (fake, (TypeError, BufferError), "^clean: a tensor .* got .*FakeTensor"),
    (lambda: torch.zeros(3, 2).to_sparse(), BufferError, "^clean: a tensor that shares its memory through DLPack, got"),
    (lambda: torch.zeros(3, 2, 2), ValueError, "^clean: 1 or 2 dimensions, got 3$"),
    (lambda: [[0.0, 0.0]] * 3, TypeError, r"^clean: a tensor \(torch, NumPy .*\), got builtins.list$"),
    (unaligned, ValueError, "^clean: memory aligned to its elements, got unaligned memory"),
    (lambda: ElsewhereProducer(np.zeros((3, 2))), TypeError, "^clean: a tensor on the cpu, got one on DLPack device"),
])
def test_other_tensors_are_refused(make: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        attribute(make())


def test_read_only_memory_is_not_written() -> None:
    frozen = np.zeros(2, dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises(BufferError, match="^out_ns: "):
        attribute(torch.zeros(3, 2), frozen)
    assert frozen.tolist() == [0, 0]


def test_instruction_sets_are_named(isa: None) -> None:
    names = _core.isas()
    assert names[0] == "portable"
    assert set(_core.kernels().values()) == {names[-1]}
    for name in names:
        _core.set_isa(name)
        assert _core.kernels() == dict.fromkeys(("neuron_attribution", "norm_backward", "masked_adamw"), name)
    with pytest.raises(ValueError, match=f"^name: one of {', '.join(names)}, got abacus$"):
        _core.set_isa("abacus")


@LINUX_ONLY
def test_threads_are_torchs(threads: None) -> None:
    for count in (1, 2):
        torch.set_num_threads(count)
        assert _core.openmp_threads() == count


@LINUX_ONLY
def test_a_forked_child_runs_serially() -> None:
    """The parent's threads are not there in a child: using them would hang it."""
    script = """
import os, torch
from clue import _core
torch.set_num_threads(2)
inputs, out = torch.ones(4, 64, 512), torch.zeros(4, 512)
_core.neuron_attribution(*inputs, *out)
assert _core.openmp_threads() == 2
child = os.fork()
if child == 0:
    _core.neuron_attribution(inputs[0], 2 * inputs[1], *inputs[2:], *out)
    os._exit(0 if _core.openmp_threads() == 1 and out[0].eq(64).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)

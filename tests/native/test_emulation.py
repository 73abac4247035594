"""The emulated GPU: what a GPU leaves undefined is told, and a kernel without its barriers computes something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import emulated

pytestmark = pytest.mark.slow


def update(kernels: emulated.Emulated, index: list[int], axis: int = 1) -> torch.Tensor:
    param = torch.arange(50 * 70, dtype=torch.float32).view(50, 70)
    state = torch.zeros(len(index), 50 if axis else 70)
    kernels.masked_adamw(param, torch.ones(50, 70), state, state.clone(), torch.tensor(index), axis, lr=0.1, beta1=0.9,
                         beta2=0.99, eps=1e-8, weight_decay=0.0, step=1, grad_scale=1.0)
    return param


@pytest.mark.parametrize("index", [[-1, 0], [0, 70]])
def test_a_wrong_index_is_a_trap(index: list[int]) -> None:
    with pytest.raises(RuntimeError, match="^masked_adamw: a trap$"):
        update(emulated.load(), index)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_shows(tmp_path: Path, barrier: int) -> None:
    """One of the barriers of the kernel for columns is left out."""
    source = (emulated.ROOT / "csrc" / "update" / "masked_adamw.cu").read_text()
    parts = source.split("    __syncthreads();\n")
    assert len(parts) == 4
    parts[barrier:barrier + 2] = ["".join(parts[barrier:barrier + 2])]
    changed = tmp_path / "masked_adamw.cu"
    changed.write_text("    __syncthreads();\n".join(parts))
    index = list(range(0, 70, 2))
    expected = update(emulated.load(), index)
    kernels = emulated.load({"masked_adamw.cu": changed})
    assert any(not torch.equal(update(kernels, index), expected) for _ in range(5))


@pytest.mark.parametrize(("old", "new", "message"), [
    ("  const std::int64_t token = row % a.tokens;", "  if (threadIdx.x == 3) return;\n  const std::int64_t token = 0;",
     "a shuffle with a lane that"),
    ("  const T scale = reinterpret_cast<const T*>(a.scale)[token];",
     "  const T scale = 1;\n  if (threadIdx.x < 2) __syncthreads();\n  if (threadIdx.x == 2) over_warp(scale);",
     "threads wait at barriers that the others never reach|a shuffle with a lane that"),
])
def test_threads_that_part_are_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    source = (emulated.ROOT / "csrc" / "attribution" / "norm.cu").read_text()
    assert source.count(old) == 1
    changed = tmp_path / "norm.cu"
    changed.write_text(source.replace(old, new))
    kernels = emulated.load({"norm.cu": changed})
    with pytest.raises(RuntimeError, match=f"^norm_backward: ({message})"):
        kernels.norm_backward(torch.ones(8, 40), torch.ones(4, 40), torch.ones(4), None, True)

"""The fused update: one AdamW step on 5% of the rows or columns of a [14336, 4096] weight, against what torch offers.

- torch's fused AdamW on the whole weight after its gradient was multiplied by the mask, which is what training with
  masks does (and which still decays and moves what the mask should hold still),
- the same arithmetic on compact slices: gather, fused AdamW, scatter,
- for rows the time it takes to read what the step reads (weights, gradient, both moments) once: two streams at a time,
  BLAS dot, one thread.

The update takes the gradient of the slices alone, slices first, as clue.unlearn.SparseGradients computes it. One
thread, CPU time, one process, interleaved, medians after a warm-up.

    python benchmarks/update.py [--json -]
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from claims import Claims, add_json, medians

from clue import _core

ROWS, COLUMNS, SHARE = 14336, 4096, 0.05
ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def measure(axis: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median CPU seconds of the native update, of both torch ways, and of reading its operands (rows only)."""
    size, length = ((ROWS, COLUMNS), (COLUMNS, ROWS))[axis]
    count = round(SHARE * size)
    index = torch.from_numpy(np.sort(np.random.default_rng(axis).choice(size, count, replace=False)))
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    slices = torch.randn(count, length).to(dtype)  # the gradient, slices first
    half = dtype != torch.float32
    state = [torch.zeros(count, length) for _ in range(3 if half else 2)]

    def native() -> None:
        _core.masked_adamw(weight, slices if axis == 0 else slices.T, state[0], state[1], index, axis, lr=ADAMW["lr"],
                           beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1, grad_scale=1.0,
                           master=state[2] if half else None)

    whole = torch.nn.Parameter(torch.randn(ROWS, COLUMNS).to(dtype))
    whole.grad = torch.randn(ROWS, COLUMNS).to(dtype)
    mask = torch.zeros(ROWS, COLUMNS, dtype=dtype).index_fill_(axis, index, 1.0)
    everything = torch.optim.AdamW([whole], fused=True, **ADAMW)

    def masked() -> None:
        whole.grad.mul_(mask)
        everything.step()

    # Columns are gathered as columns: torch's AdamW runs through memory in any case.
    part = torch.nn.Parameter(weight.index_select(axis, index))
    part.grad = (slices if axis == 0 else slices.T).contiguous()
    compact = torch.optim.AdamW([part], fused=True, **ADAMW)

    def gathered() -> None:
        with torch.no_grad():
            torch.index_select(weight, axis, index, out=part.data)
            compact.step()
            weight.index_copy_(axis, index, part.data)

    streams = [t.view(torch.float32).view(-1) if half else t.view(-1) for t in (part.data, slices, *state)]
    streams = [torch.nan_to_num(t, 0.0, 0.0, 0.0).clamp(-1, 1) for t in streams]  # finite, so that dot stays fast
    pairs = list(zip(streams[::2], streams[1::2], strict=False))

    def read() -> None:
        for a, b in pairs:
            n = min(len(a), len(b))
            np.dot(a[:n].numpy(), b[:n].numpy())

    return medians(repeats, native=native, masked=masked, gathered=gathered, read=read)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = Claims()

    def claim(what: str, ratio: float, peer: str, seconds: float, goal: float) -> None:
        found.add(what, ratio, "times faster", f"{peer}: {seconds * 1e3:.1f} ms", f"at least {goal:g}", ratio >= goal)

    for axis, dtype, goals in ((0, torch.float32, (10.0, 1.8)), (1, torch.float32, (3.0, 1.0))):
        what = f"{SHARE:.0%} planned {('rows', 'columns')[axis]}, {str(dtype).removeprefix('torch.')}"
        t = measure(axis, dtype, arguments.repeats)
        what += f" ({t['native'] * 1e3:.1f} ms)"
        claim(what, t["masked"] / t["native"], "torch fused AdamW and mask", t["masked"], goals[0])
        claim(what, t["gathered"] / t["native"], "gather, fused AdamW, scatter", t["gathered"], goals[1])
        if axis == 0:
            limit = t["read"] / t["native"]
            found.add(what, limit, "of the speed of reading its operands", f"two-stream read: {t['read'] * 1e3:.1f} ms",
                      "at least 0.85", limit >= 0.85)
    found.report(arguments.json, isa=_core.kernels()["masked_adamw"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

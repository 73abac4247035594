"""The neuron kernel: Ns, Dn and both sums of squares in one call, against reading its inputs, against torch, and against
Ns alone.

- Limit: the time it takes to read the four inputs once, two streams at a time (BLAS dot).
- Torch, preallocated: the best of several ways to write it (sums, products with a vector of ones, tiles of rows that stay
  in the cache).
- Torch, compiled: the plain expression through ``torch.compile``; told as missing where no compiler works.
- Ns alone: the same kernel without the second gradient and the squares. It reads three of the four inputs, so the whole
  cannot cost less than 1.33 times as much where reading is all it costs.

One thread, CPU time, one process, interleaved, medians after a warm-up.

    python benchmarks/neuron_kernel.py [--repeats 9] [--json -]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from claims import Claims, add_json, medians
from torch import Tensor

from clue import _core

TOKENS, NEURONS = 2048, 8192
#: Rows of a tile: with its temporaries in the second-level cache.
TILE = 32


def eager(clean: Tensor, corrupted: Tensor, grad_clean: Tensor, grad_corrupted: Tensor) -> list[Tensor]:
    """The definition, in float32."""
    difference = corrupted.float() - clean.float()
    terms = [difference * gradient.float() for gradient in (grad_clean, grad_corrupted)]
    return [term.sum(0) for term in (*terms, terms[0] * terms[0], terms[1] * terms[1])]


def preallocated(inputs: list[Tensor], out: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Ways to write it in torch without a fresh temporary; each leaves Ns, Dn and the squares in ``out``."""
    clean, corrupted, *gradients = inputs
    moved, term = torch.empty_like(clean), torch.empty(clean.shape)
    ones = torch.ones(len(clean))

    def with_sums() -> None:
        torch.sub(corrupted, clean, out=moved)
        for k, gradient in enumerate(gradients):
            torch.sum(torch.mul(moved, gradient, out=term), 0, out=out[k])
            torch.sum(torch.mul(term, term, out=term), 0, out=out[2 + k])

    def with_ones() -> None:
        torch.sub(corrupted, clean, out=moved)
        for k, gradient in enumerate(gradients):
            torch.mv(torch.mul(moved, gradient, out=term).T, ones, out=out[k])
            torch.mv(torch.mul(term, term, out=term).T, ones, out=out[2 + k])

    tiles = list(zip(*(matrix.split(TILE) for matrix in inputs), strict=True))

    def in_tiles() -> None:
        for total in out:
            total.zero_()
        for first, second, *pair in tiles:
            rows = len(first)
            torch.sub(second, first, out=moved[:rows])
            for k, gradient in enumerate(pair):
                torch.mul(moved[:rows], gradient, out=term[:rows])
                out[k].addmv_(term[:rows].T, ones[:rows])
                torch.mul(term[:rows], term[:rows], out=term[:rows])
                out[2 + k].addmv_(term[:rows].T, ones[:rows])

    found: dict[str, Callable[[], None]] = {"sums": with_sums, "ones": with_ones, "tiles": in_tiles}
    if clean.dtype != torch.float32:  # all in 16 bits: less to move, and less exact than the kernel
        low, low_ones, low_out = torch.empty_like(clean), ones.to(clean.dtype), [o.to(clean.dtype) for o in out]

        def in_16_bits() -> None:
            torch.sub(corrupted, clean, out=moved)
            for k, gradient in enumerate(gradients):
                torch.mv(torch.mul(moved, gradient, out=low).T, low_ones, out=low_out[k])
                torch.mv(torch.mul(low, low, out=low).T, low_ones, out=low_out[2 + k])

        found["16 bits"] = in_16_bits
    return found


def compiled(inputs: list[Tensor]) -> Callable[[], Any] | None:
    """The plain expression, compiled and warm; None where torch cannot compile."""
    function = torch.compile(eager, dynamic=False)
    try:
        function(*inputs)
    except Exception as error:  # no compiler, or one that torch cannot use
        print(f"no claim against torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return lambda: function(*inputs)


def one(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of everything that is compared, by name."""
    inputs = [torch.randn(TOKENS, NEURONS).to(dtype) for _ in range(4)]
    out = [torch.zeros(NEURONS) for _ in range(4)]
    words = [t.view(torch.int16).view(torch.float32).view(-1) if t.element_size() == 2 else t.view(-1) for t in inputs]
    streams = [torch.nan_to_num(w, 0.0, 0.0, 0.0).clamp(-1, 1).numpy() for w in words]  # finite, so that dot stays fast
    count = torch.zeros(1, dtype=torch.int64)

    def read() -> None:
        np.dot(streams[0], streams[1])
        np.dot(streams[2], streams[3])

    ours: dict[str, Callable[[], Any]] = {
        "kernel": lambda: _core.neuron_attribution(*inputs, *out, out_count=count), "read": read,
        "alone": lambda: _core.neuron_attribution(*inputs[:3], None, out[0])}
    seconds = medians(4 * repeats, **ours)  # short, so repeated more often
    ways = preallocated(inputs, [torch.empty(NEURONS) for _ in out])
    others: dict[str, Callable[[], Any]] = {"kernel": ours["kernel"], **ways}
    whole = compiled(inputs)
    if whole is not None:
        others["compiled"] = whole
    # A ratio needs both of its times from the same minutes: these are in units of the kernel next to them.
    next_to = medians(repeats, **others)
    ratios = {name: found / next_to["kernel"] for name, found in next_to.items() if name != "kernel"}
    return {**seconds, **{name: ratio * seconds["kernel"] for name, ratio in ratios.items()}}


def measure(found: Claims, repeats: int) -> None:
    """Add the kernel's claims to ``found``; leaves torch with as many threads as it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype, share in ((torch.float32, 0.80), (torch.bfloat16, 0.50)):
            name = f"neuron kernel, {str(dtype).removeprefix('torch.')}"
            seconds = one(dtype, repeats)
            kernel = seconds.pop("kernel")
            limit = seconds.pop("read")
            found.add(name, limit / kernel, "of the speed of reading its inputs",
                      f"two-stream read, one thread: {limit * 1e3:.1f} ms", f"at least {share:.2f}", limit / kernel >= share)
            alone = kernel / seconds.pop("alone")
            found.add(f"{name}: Ns, Dn, squares and count", alone, "times Ns alone",
                      "the kernel itself, which then reads 3 inputs of 4", "at most 1.3", alone <= 1.3)
            by_compiler = seconds.pop("compiled", None)
            way, best = min(seconds.items(), key=lambda item: item[1])
            found.add(name, best / kernel, "times faster", f"best preallocated torch ({way}): {best * 1e3:.1f} ms",
                      "at least 2", best >= 2 * kernel)
            if by_compiler is not None:
                found.add(name, by_compiler / kernel, "times faster", f"torch.compile: {by_compiler * 1e3:.1f} ms",
                          "at least 3", by_compiler >= 3 * kernel)
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    arguments = parser.parse_args()
    found = Claims()
    measure(found, arguments.repeats)
    found.report(arguments.json, isa=_core.kernels()["neuron_attribution"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Choosing a fifth of many weights by score, as every weight-level baseline does: exact selection by histograms.

The scores lie in parts, like a model's matrices, and are not computed anew, so that selection alone is measured. Peers are
torch's argsort of all scores, which is what published masks are made with, and torch.topk. Memory is what the process held
at most above the scores, in bytes per weight.

    python benchmarks/selection.py [--weights 67108864] [--json -]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from claims import Claims, add_json, medians

from clue.baselines.selection import highest
from clue.meter import Meter


def held(function: Callable[[], Any]) -> float:
    """Most bytes held while a function runs, above what is held before."""
    with Meter() as before:
        pass
    with Meter() as meter:
        function()
    if meter.peak is None or before.peak is None:
        return float("nan")
    return meter.peak - before.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=int, default=1 << 26)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    add_json(parser)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(arguments.weights, generator=generator).abs_()
    parts = dict(enumerate(every.split(1 << 22)))
    count = round(arguments.share * arguments.weights)

    def histograms() -> dict[Any, Any]:
        return highest({str(name): lambda part=part: part for name, part in parts.items()}, count)

    def sorting() -> torch.Tensor:
        return every.argsort(descending=True)[:count]

    def topk() -> torch.Tensor:
        return every.topk(count, sorted=False).indices

    # First of all: memory that was freed is used again without being counted.
    memory = {f.__name__: held(f) / arguments.weights for f in (histograms, sorting, topk)}
    starts = np.cumsum([0, *(len(part) for part in parts.values())])
    ours = np.concatenate([index + start for index, start in zip(histograms().values(), starts, strict=False)])
    assert torch.equal(every[torch.from_numpy(ours)].sort().values, every[topk()].sort().values)
    seconds = medians(arguments.repeats, histograms=histograms, sorting=sorting, topk=topk)
    found = Claims()
    found.add("time of choosing a fifth of the weights", seconds["sorting"] / seconds["histograms"], "times faster",
              f"argsort of all scores: {seconds['sorting']:.2f} s, histograms {seconds['histograms']:.2f} s, topk"
              f" {seconds['topk']:.2f} s of CPU time", "at least 5", seconds["sorting"] / seconds["histograms"] >= 5)
    found.add("memory above the scores", memory["histograms"], "bytes per weight",
              f"argsort: {memory['sorting']:.1f}, topk: {memory['topk']:.1f}; the chosen indices alone are"
              f" {8 * arguments.share:.1f}", "at most 2 above the indices",
              not memory["histograms"] > 8 * arguments.share + 2)
    found.report(arguments.json, weights=arguments.weights, share=arguments.share)
    return 0


if __name__ == "__main__":
    sys.exit(main())

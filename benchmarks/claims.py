"""What the benchmarks share: claims and how they are printed, interleaved timing, the plan that moves every weight."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue.plan import Plan, Slice
from clue.types import Role


class Claims:
    """Claims in the order they are made: claim, value, unit, peer, goal, met."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def add(self, claim: str, value: float, unit: str, peer: str, goal: str = "", met: bool = True) -> None:
        """``goal`` is empty where the value is only told."""
        self.found.append({"claim": claim, "value": float(f"{value:.5g}"), "unit": unit, "peer": peer, "goal": goal,
                           "met": bool(met)})

    def report(self, target: str | None, **more: Any) -> None:
        """Print a table; with ``target`` ``-`` the list as JSON instead, with a file also write list, machine and ``more``."""
        if target == "-":
            print(json.dumps(self.found, indent=1))
            return
        if target is not None:
            document = {"claims": self.found, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                        "torch": torch.__version__, "threads": torch.get_num_threads(), **more}
            Path(target).write_text(json.dumps(document, indent=1) + "\n")
        for c in self.found:
            print(f"{'met ' if c['met'] else 'MISS'}  {c['claim']}: {c['value']} {c['unit']}  [{c['peer']}]"
                  + (f"  goal: {c['goal']}" if c["goal"] else ""))


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option every benchmark has."""
    parser.add_argument("--json", metavar="FILE", help="write the claims and what they were made from; - prints the claims")


def medians(repeats: int, **functions: Callable[[], Any]) -> dict[str, float]:
    """Median CPU seconds of each function; rounds are interleaved, and the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(found[1:])) for name, found in seconds.items()}


def everything(model: torch.nn.Module) -> Plan:
    """Every weight of every linear layer in a transformer block as conflict: what plain fine-tuning moves."""
    shapes = {f"{n}.weight": tuple(m.weight.shape) for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    slices = tuple(Slice(n, 0, Role.CONFLICT, np.arange(s[0], dtype=np.int64)) for n, s in sorted(shapes.items()))
    return Plan(("all",), np.array([Role.CONFLICT], dtype=np.uint8), slices, shapes)

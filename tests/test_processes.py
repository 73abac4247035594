"""Processes of one command: what they share, and that nothing of it outlives them."""

from __future__ import annotations

import sys

import pytest

from tests.processes import run

ENDED = """
import os, sys
import torch
import torch.distributed as dist
from clue.processes import agreed, everywhere, joined, place

with joined("cpu") as first:
    rank, count = place()
    print(rank, count, first, agreed(10.0 + rank), everywhere(True), everywhere(rank == 0))
    from transformers import LlamaForCausalLM  # imports modules of torch.distributed, as a command does when it loads a model
print(dist.is_initialized(), place())
threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print([name for name in threads if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_processes_that_a_command_joins_part_without_threads_left() -> None:
    printed = run(ENDED, preamble="#\n", epilogue="")
    assert printed == [f"{rank} 2 {rank == 0} 10.0 True False\nFalse (0, 1)\n[]\n" for rank in (0, 1)]

"""Runs a program in several processes of torch.distributed (gloo) at once; each must end well."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
import os, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
"""

# Nobody leaves while another still works: whoever made the group keeps its store. A sharded model's group outlives its end in
# torch, and its threads the interpreter, which torch now and then aborts over: all is done, so leave before that.
EPILOGUE = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run(program: str, *arguments: str, count: int = 2, preamble: str = PREAMBLE, epilogue: str = EPILOGUE) -> list[str]:
    """``program`` finds its number in ``rank`` and its group made; returns what each process printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = preamble + textwrap.dedent(program) + epilogue
    here = str(Path(__file__).parent.parent)
    workers = [subprocess.Popen(
        [sys.executable, "-c", text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here,
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
        for rank in range(count)]
    printed = []
    try:
        for worker in workers:
            out, error = worker.communicate(timeout=300)
            assert worker.returncode == 0, f"{error[-4000:]}\nafter it printed {out[-1000:]!r}"
            printed.append(out)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return printed

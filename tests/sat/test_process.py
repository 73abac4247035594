"""What needs a process of its own: Ctrl-C, and life without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

INTERRUPTED = """
import signal
from clue.sat import Solver
from tests.sat.test_solver import pigeons, random_clauses
large = {large}
solver = Solver(random_clauses(3, 100_000, 420_000) if large else pigeons(13))
for call in (solver.solve, lambda: solver.solve([1]), lambda: solver.simplify(10**6)):
    print("running", flush=True)
    try:
        print("answer", call(), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the last call may have been done sooner than the signal comes
print(solver.solve(conflicts=0 if large else 1))
solver.add([[1], [-1]])
print(solver.solve())
"""

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from clue.sat import *
from clue.cli import main
solver = Solver([[1, 2], [-1]])
assert solver.solve() is True and solver.model().tolist() == [0, 0, 1]
assert minimize(WCNF.from_lists([[1, 2]], [[-1], [-2]])).cost == 1
sys.exit(main(["solve", sys.argv[1]]))
"""


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])})


@pytest.mark.parametrize("large", [False, True])
def test_interrupt_ends_every_call_and_the_solver_goes_on(large: bool) -> None:
    with python(INTERRUPTED.replace("{large}", str(large))) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line == "running\n":
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, process.stderr and process.stderr.read()
    assert lines[:4] == ["running", "interrupted"] * 2
    assert lines[5] in ("interrupted", "answer None")  # preprocessing may be done sooner
    assert lines[-2:] == ["None", "False"]


def test_torch_is_not_needed(tmp_path) -> None:
    path = tmp_path / "a.cnf"
    path.write_text("p cnf 2 2\n1 2 0\n-1 0\n")
    process = python(WITHOUT_TORCH, str(path))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 10, error
    assert out.splitlines()[-2:] == ["s SATISFIABLE", "v -1 2 0"]

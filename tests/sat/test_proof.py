"""Proofs are checked by the plainest of checkers, and a file that cannot be written whole is not there at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.sat import CNF, Solver

from ..oracles.sat import check_drat, check_lrat
from .test_solver import CLAUSES, LITERAL, pigeons, random_clauses

FORMATS = [("drat", False), ("drat", True), ("lrat", False), ("lrat", True)]
CHECK = {"drat": check_drat, "lrat": check_lrat}


@pytest.mark.parametrize(("format", "binary"), FORMATS)
@pytest.mark.parametrize("name", ["pigeons", "random", "trivial"])
def test_proofs_check(tmp_path: Path, format: str, binary: bool, name: str) -> None:
    clauses = {"pigeons": pigeons(4), "random": CNF(30, random_clauses(5, 30, 180)).lists(),
               "trivial": [[1, 1, 2], [-1, -1], [-2, 1], [3, -3, 4], [3, 4, 3]]}[name]
    path = tmp_path / "p.proof"
    with Solver() as solver:
        solver.proof(path, format=format, binary=binary)
        solver.add(clauses)
        assert solver.solve() is False
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    proof = path.read_bytes()
    assert CHECK[format](clauses, proof, binary)
    if name == "pigeons":
        assert not CHECK[format](clauses[1:], proof, binary)  # the checker would notice


@pytest.mark.parametrize(("format", "binary"), FORMATS)
@given(clauses=CLAUSES, assumed=st.lists(LITERAL, max_size=5))
@settings(max_examples=60)
def test_proofs_of_small_formulas_check(tmp_path_factory, format: str, binary: bool, clauses, assumed) -> None:
    path = tmp_path_factory.getbasetemp() / f"small.{format}"
    with Solver() as solver:
        solver.proof(path, format=format, binary=binary)
        solver.add(clauses)
        answer = solver.solve(assumed)
        core = solver.core().tolist() if answer is False else []
    if answer is False:
        assert CHECK[format](clauses, path.read_bytes(), binary, core)


@given(st.lists(st.tuples(CLAUSES, st.lists(LITERAL, max_size=2)), min_size=2, max_size=4), st.booleans())
@settings(max_examples=150)
def test_incremental_drat_is_a_proof_of_all_clauses(tmp_path_factory, rounds, binary) -> None:
    path = tmp_path_factory.getbasetemp() / "incremental.drat"
    clauses: list[list[int]] = []
    with Solver() as solver:
        solver.proof(path, binary=binary)
        for new, assumed in rounds:
            solver.add(new)
            clauses += new
            solver.simplify(1)  # eliminates variables, whose clauses come back later
            answer = solver.solve(assumed)
        core = solver.core().tolist() if answer is False else []
    if answer is False:
        assert check_drat(clauses, path.read_bytes(), binary, core)


def test_lrat_is_of_one_formula(tmp_path: Path) -> None:
    solver = Solver()
    solver.proof(tmp_path / "p.lrat", format="lrat")
    solver.add([[1, 2], [-1, 2]])
    assert solver.solve([-2]) is False and solver.core().tolist() == [-2]
    with pytest.raises(RuntimeError, match="an LRAT proof is of one formula"):
        solver.add([[-2]])
    assert solver.solve() is True  # more questions are welcome
    assert solver.solve([1, -2]) is False
    solver.close_proof()
    solver.add([[-2]])
    assert solver.solve() is False
    assert check_lrat([[1, 2], [-1, 2]], (tmp_path / "p.lrat").read_bytes(), True, [-2])


def test_arguments_and_files(tmp_path: Path) -> None:
    for error, text, path, keywords in [
        (ValueError, "format: expected 'drat' or 'lrat', got 'x'", "p", {"format": "x"}),
        (FileNotFoundError, "no/p", "no/p", {}), (IsADirectoryError, "", "folder", {}),
    ]:
        solver = Solver()
        (tmp_path / "folder").mkdir(exist_ok=True)
        if error is IsADirectoryError:
            solver.proof(tmp_path / path)
            with pytest.raises(OSError, match="folder"):
                solver.close_proof()
        else:
            with pytest.raises(error, match=text):
                solver.proof(tmp_path / path, **keywords)
    solver = Solver(factor=1)
    with pytest.raises(ValueError, match="format 'lrat' goes with option factor=0 only"):
        solver.proof(tmp_path / "p", format="lrat")
    solver.proof(tmp_path / "p")
    with pytest.raises(RuntimeError, match="a proof is being written already"):
        solver.proof(tmp_path / "q")
    with pytest.raises(RuntimeError, match="a constraint cannot go with a proof"):
        solver.constrain([1])
    solver.discard_proof()
    with pytest.raises(RuntimeError, match="no proof is being written"):
        solver.discard_proof()
    solver.proof(tmp_path / "q")
    del solver
    with pytest.raises(ZeroDivisionError), Solver() as solver:
        solver.proof(tmp_path / "r")
        raise ZeroDivisionError
    del solver
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


FULL = """
import resource, sys
from clue.sat import CNF, Solver
sys.path.insert(0, {tests!r})
from tests.sat.test_solver import pigeons
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
solver = Solver()
solver.proof(sys.argv[1], binary=False)
solver.add(pigeons(8))
for call in (solver.solve, solver.solve, solver.close_proof):
    try:
        print(call())
    except OSError as error:
        print(type(error).__name__, error.filename == sys.argv[1])
print(solver.solve(conflicts=5))
"""


def test_a_disk_that_fills_is_told_and_no_half_file_stays(tmp_path: Path) -> None:
    # The limit on file sizes stands in for a full disk: write() fails the same way.
    root = str(Path(__file__).parents[2])
    path = tmp_path / "p.drat"
    run = subprocess.run([sys.executable, "-c", FULL.format(tests=root), str(path)], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["OSError True"] * 3 + ["None"]
    assert list(tmp_path.iterdir()) == []

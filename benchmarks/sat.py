"""clue.sat against its peers: CaDiCaL's own API and program, and PySAT; ratios of CPU time in one run.

Loading is compared with a C++ loop over CaDiCaL's own ``add``, compiled here, and whole files with CaDiCaL's own
program. Both need a compiler and a CaDiCaL 3.0.0 that its own configure and make have built: --cadical DIR, or its
archive in CLUE's cache, which is then built in a temporary folder (minutes). Without them these claims are left out,
and the output says so. PySAT is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from claims import Claims, add_json

from clue.sat import CNF, Solver, write_dimacs

ARCHIVE = "cadical-3.0.0.tar.gz"
LOOP = r"""
#include <cadical.hpp>
#include <cstdio>
#include <ctime>
#include <vector>
static double now() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
int main(int, char** argv) {
  FILE* file = std::fopen(argv[1], "rb");
  std::fseek(file, 0, SEEK_END);
  std::vector<int> literals(std::ftell(file) / sizeof(int));
  std::rewind(file);
  if (std::fread(literals.data(), sizeof(int), literals.size(), file) != literals.size()) return 1;
  const double start = now();
  CaDiCaL::Solver solver;
  for (const char* name : {"factor", "lucky"}) solver.set(name, 0);
  for (const int literal : literals) solver.add(literal);
  std::printf("%.6f\n", now() - start);
}
"""


def random_clauses(n: int, m: int, seed: int) -> npt.NDArray[np.int32]:
    """m random clauses of three literals over n variables, flat."""
    rng = np.random.default_rng(seed)
    literals = rng.integers(1, n + 1, (m, 3)) * rng.choice([-1, 1], (m, 3))
    return np.column_stack([literals, np.zeros(m, dtype=int)]).astype(np.int32).ravel()


def medians(repeats: int, **functions: Callable[[], float]) -> dict[str, float]:
    """Median of the seconds that each function returns; rounds are interleaved, and the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            seconds[name].append(function())
    return {name: float(np.median(found[1:])) for name, found in seconds.items()}


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of one call; what it returns is dropped after the clock has stopped."""
    start = time.process_time()
    result = function()
    seconds = time.process_time() - start
    del result
    return seconds


def command(*argv: str | Path) -> tuple[float, str]:
    """CPU seconds of a program, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, output


def cadical(given: str | None, scratch: Path) -> Path | None:
    """A built CaDiCaL, or None."""
    if given is not None:
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    archive = Path(os.environ.get("CLUE_CACHE") or home / "clue") / ARCHIVE
    if not archive.exists() or not all(map(shutil.which, ("c++", "make"))):
        return None
    with tarfile.open(archive) as file:
        file.extractall(scratch, filter="data")
    folder = next(scratch.glob("cadical-*"))
    print("building CaDiCaL ...", file=sys.stderr)
    for argv in (["./configure"], ["make", "-s", f"-j{os.cpu_count()}"]):
        subprocess.run(argv, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def loading(found: Claims, built: Path | None, scratch: Path, n: int, repeats: int) -> None:
    """Clauses from an array, next to the loop in C++ and to PySAT."""
    flat = random_clauses(n, 4 * n, 0)
    clauses = [row[:3] for row in flat.reshape(-1, 4).tolist()]
    functions = {"array": lambda: timed(lambda: Solver(flat)), "lists": lambda: timed(lambda: Solver(clauses))}
    if built is not None:
        (scratch / "loop.cpp").write_text(LOOP)
        flat.tofile(scratch / "clauses.bin")
        subprocess.run(["c++", "-O3", "-DNDEBUG", f"-I{built / 'src'}", "-o", str(scratch / "loop"),
                        str(scratch / "loop.cpp"), str(built / "build" / "libcadical.a"), "-lpthread"], check=True)
        functions["loop"] = lambda: float(command(scratch / "loop", scratch / "clauses.bin")[1])
    try:
        from pysat.solvers import Solver as Peer

        functions["peer"] = lambda: timed(lambda: Peer("cadical195", bootstrap_with=clauses))
    except ImportError:
        pass
    seconds = medians(repeats, **functions)
    what = f"{len(clauses)} clauses"
    if "loop" in seconds:
        ratio = seconds["array"] / seconds["loop"]
        found.add(f"loading {what} from an array", ratio, "times the loop",
                  f"C++ loop over CaDiCaL's add: {seconds['loop']:.3f} s", "at most 1.15", ratio <= 1.15)
    if "peer" in seconds:
        for name, text in (("array", "an array"), ("lists", "lists")):
            faster = seconds["peer"] / seconds[name]
            found.add(f"loading {what} from {text}", faster, "times faster",
                      f"PySAT, CaDiCaL 1.9.5, from lists: {seconds['peer']:.3f} s", "more than 1", faster > 1)


def whole(found: Claims, built: Path, scratch: Path, name: str, formula: CNF, repeats: int) -> None:
    """A file solved by ``clue solve``, Python's start included, and by CaDiCaL's own program."""
    path = scratch / f"{name}.cnf"
    write_dimacs(path, formula)
    conflicts: dict[str, set[int]] = {"clue": set(), "cadical": set()}

    def run(who: str, *argv: str | Path) -> float:
        seconds, output = command(*argv, path)
        match = re.search(r"^c conflicts: +(\d+)|^c (\d+) conflicts", output, re.MULTILINE)
        assert match is not None, output
        conflicts[who].add(int(match[1] or match[2]))
        return seconds

    seconds = medians(repeats, clue=lambda: run("clue", sys.executable, "-m", "clue.cli", "solve"),
                      cadical=lambda: run("cadical", built / "build" / "cadical"))
    assert conflicts["clue"] == conflicts["cadical"], f"not the same search: {conflicts}"
    ratio = seconds["clue"] / seconds["cadical"]
    found.add(f"clue solve on {name} ({conflicts['clue'].pop()} conflicts in both)", ratio, "times the program",
              f"CaDiCaL's own program: {seconds['cadical']:.2f} s", "at most 1.05", ratio <= 1.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cadical", metavar="DIR", help="sources of CaDiCaL 3.0.0 after its own configure and make")
    parser.add_argument("--variables", type=int, default=500_000, help="of the formula that is loaded")
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    arguments = parser.parse_args()
    found = Claims()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        built = cadical(arguments.cadical, scratch)
        loading(found, built, scratch, arguments.variables, arguments.repeats)
        if built is None:
            print("left out, for want of a compiler or the sources: CaDiCaL's own add and program", file=sys.stderr)
        else:
            rng = np.random.default_rng(1)
            n = 300  # just above the threshold of random 3-SAT
            variables = np.argsort(rng.random((int(4.4 * n), n)), axis=1)[:, :3] + 1
            hard = np.column_stack([variables * rng.choice([-1, 1], variables.shape), np.zeros(len(variables), int)])
            whole(found, built, scratch, "a hard formula", CNF(n, hard.ravel()), 2)
            easy = random_clauses(arguments.variables, 3 * arguments.variables, 1)
            whole(found, built, scratch, "a large formula", CNF(arguments.variables, easy), 2)
    found.report(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

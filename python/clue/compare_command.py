"""``clue compare``: localizations, objectives and seeds on a benchmark, as a table, a page and JSON.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .config import BASELINES, Settings, UnlearnSettings, check, listed
from .errors import ClueError

if TYPE_CHECKING:
    from .compare import Row, Task, Tuning
    from .run_directory import Run

BENCHMARKS = {"world": ("easy", "hard"), "world-easy": ("easy",), "world-hard": ("hard",)}
#: Settings that a comparison decides by itself: every cell has its own, or measures alike.
DECIDED = ("localize.method", "localize.ratio", "unlearn.objective", "unlearn.lr", "unlearn.metric", ".seed",
           "evaluate.rouge", "evaluate.bootstrap")
#: Learning rates of every cell, as multiples of the benchmark's own, or of this one where the settings name none.
FACTORS, LR = (0.0625, 0.125, 0.25, 0.5, 1.0), 4e-4


@dataclass(frozen=True)
class Job:
    """What the command line asks for, checked."""

    settings: Settings
    rows: tuple[Row, ...]
    objectives: tuple[str, ...]
    seeds: int
    tuning: Tuning
    target: float
    ratio: float | None
    inputs: Mapping[str, Any]


def add_to(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's commands; returns its parser, to which settings and tests are yet to be added."""
    compare: argparse.ArgumentParser = commands.add_parser(
        "compare", help="localizations, objectives and seeds side by side, at the same forgetting",
        usage="clue compare (--benchmark B | --model M --forget F --retain [NAME=]R ...) [options] [settings]",
        description="Train every localization with every objective at every seed, each tuned over the same learning rates"
        " on held-back retain records, and compare what is kept where equally much is forgotten. A comparison that was"
        " stopped goes on; cells that are there are not made again.")
    compare.add_argument("--benchmark", choices=tuple(BENCHMARKS), help="embedded models and records: world is both settings")
    compare.add_argument("--model", metavar="M", help="folder or hub id of a causal language model")
    compare.add_argument("--forget", metavar="F", help="records to forget")
    compare.add_argument("--retain", action="append", default=[], metavar="[NAME=]R", help="records to keep; may be repeated")
    compare.add_argument("--localization", default="clue,wagle,sure,random,all", metavar="LIST",
                         help=f"clue, {', '.join(BASELINES)}; +metric or -metric after a name takes the other kind of step,"
                         " in the retain metric or plain (default: %(default)s)")
    compare.add_argument("--with-metric", action="store_true",
                         help="every baseline also with the step in the retain metric, as a row of its own")
    compare.add_argument("--objective", default="npo", metavar="LIST", help="objectives of unlearn (default: %(default)s)")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    compare.add_argument("--lrs", metavar="LIST", help="learning rates tried in every cell (default: the benchmark's lr, or"
                         f" {LR:g}, and four halvings of it)")
    compare.add_argument("--levels", default="0.5,0.8,1", metavar="LIST",
                         help="shares of forgotten records at which models are measured (default: %(default)s)")
    compare.add_argument("--at", type=float, metavar="X", help="the level compared in the table (default: the highest)")
    compare.add_argument("--ratio", type=float, metavar="X", help="share of the linear maps' weights that baselines edit, and"
                         " that clue's circuits grow to (default: 0.2, and baselines edit as many weights as clue's plan has)")
    compare.add_argument("--robustness", action="store_true",
                         help="also try, where a training ends, to bring back what was forgotten: by relearning, and by"
                         " rounding the weights to 8 and 4 bits")
    compare.add_argument("-o", "--output", default="runs/compare", metavar="DIR",
                         help="folder of the comparison, made or gone on with (default: runs/compare)")
    compare.add_argument("--json", metavar="FILE", help="write the results as JSON; - for stdout")
    return compare


def job_of(arguments: argparse.Namespace, settings_of: Callable[[Settings], Settings], files: Mapping[str, Any],
           tests: Mapping[str, Any]) -> Job:
    """What the command line asks for.

    Args:
        settings_of: puts the command line's settings over a benchmark's.
        files: ``model``, ``forget`` and ``retain``, where no benchmark is named.
        tests: the fields of :class:`clue.evaluation_sets.Tests` that are given.

    Raises:
        ClueError: names the option at fault.
    """
    from .compare import Row, Tuning
    from .jobs import DEMO

    given = [name for name in ("model", "forget", "retain") if getattr(arguments, name)]
    if arguments.benchmark is not None and (given or tests):
        raise ClueError(f"--benchmark {arguments.benchmark} brings its own model and records: leave out"
                        f" {'--' + given[0] if given else 'tests'}")
    if arguments.benchmark is None and len(given) < 3:
        raise ClueError("name a --benchmark, or give --model, --forget and --retain")
    settings = settings_of(Settings() if arguments.benchmark is None else DEMO)
    settings = replace(settings, seed=0, evaluate=replace(settings.evaluate, rouge=False, bootstrap=0))
    if settings.unlearn.floor == 0:
        raise ClueError("floor = 0 counts nothing as forgotten, so nothing could be compared at the same forgetting: give"
                        " a floor")
    if arguments.seeds < 1:
        raise ClueError(f"--seeds {arguments.seeds} must be at least 1")
    rows = [Row.of(name) for name in _list("--localization", arguments.localization)]
    if arguments.with_metric:
        rows = [each for row in rows for each in ((row,) if row.localization == "clue" else (row, replace(row, metric=True)))]
    objectives = _list("--objective", arguments.objective)
    for objective in objectives:
        check(UnlearnSettings(objective=objective))
    lrs = _numbers("--lrs", arguments.lrs) if arguments.lrs else [(settings.unlearn.lr or LR) * f for f in FACTORS]
    tuning = Tuning(tuple(sorted({*lrs})), tuple(sorted({*_numbers("--levels", arguments.levels)})), arguments.robustness)
    target = max(tuning.levels) if arguments.at is None else arguments.at
    if target not in tuning.levels:
        raise ClueError(f"--at {target:g} is not one of the --levels {arguments.levels}: models are measured there alone")
    if arguments.ratio is not None and not 0 < arguments.ratio <= 1:
        raise ClueError(f"--ratio {arguments.ratio:g} must lie in (0, 1]")
    ratio = arguments.ratio
    if ratio is not None:
        settings = replace(settings, localize=replace(settings.localize, ratio=ratio))
    inputs = {"benchmark": arguments.benchmark and arguments.benchmark.partition("-")[0], **files, "tests": dict(tests),
              "lrs": list(tuning.lrs), "levels": list(tuning.levels), "ratio": ratio,
              "robustness": tuning.robustness}
    return Job(settings, tuple(dict.fromkeys(rows)), tuple(objectives), arguments.seeds, tuning, target, ratio, inputs)


def execute(arguments: argparse.Namespace, job: Job, run: Run, progress: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Make the cells, write ``compare.html`` and ``results.json`` into the run; returns the table and the results."""
    from .compare import compare, files_task, world_task
    from .evaluate.comparison import grouped
    from .evaluation_sets import Tests
    from .report.comparison import comparison_json, comparison_table, write_comparison
    from .run_directory import write_json

    tasks: list[Callable[[], Task]]
    if arguments.benchmark is None:
        tests = Tests(**job.inputs["tests"])
        tasks = [partial(files_task, job.inputs, tests, job.settings, seed) for seed in range(job.seeds)]
    else:
        tasks = [partial(world_task, setting, seed, progress) for setting in BENCHMARKS[arguments.benchmark]
                 for seed in range(job.seeds)]
    cells, references = compare(run, tasks, job.rows, job.objectives, job.settings, job.tuning, ratio=job.ratio,
                                progress=progress)
    groups = grouped(cells, references, job.target, job.tuning.levels)
    results = comparison_json(groups, target=job.target, levels=list(job.tuning.levels), lrs=list(job.tuning.lrs),
                              seeds=list(range(job.seeds)), report=str(run.folder / "compare.html"))
    write_json(run.folder / "results.json", results)
    write_comparison(run.folder / "compare.html", title=f"Comparison: {run.folder.resolve().name}", groups=groups,
                     level=job.target, provenance=run.manifest)
    return comparison_table(groups, job.target), results


def _list(flag: str, text: str) -> list[str]:
    found = listed(text)
    if not found:
        raise ClueError(f"{flag} {text!r}: expected names, separated by commas")
    return list(dict.fromkeys(found))


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in _list(flag, text)]
    except ValueError:
        raise ClueError(f"{flag} {text!r}: expected numbers, separated by commas") from None

"""The ``clue`` command.

Every option of a stage is generated from its dataclass in :mod:`clue.config`; a TOML file (``--config``) may set the
same, and the command line wins. Progress goes to stderr, results to stdout. Exit status: 0 done, 1 ``plan verify``
found a change outside the plan or ``certificate check`` no proof, 2 anything the user can put right (one sentence on
stderr), 130 interrupted; ``solve`` has those of the competitions.
A command that fails leaves nothing behind that was not there before, apart from finished stages of a run.
Heavy imports (torch, transformers, the jobs themselves) happen inside the commands and after the cheap checks, so
``clue --help`` and a mistyped command answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, certificate_command, compare_command, delta_command, plan_command, solve
from .config import Settings
from .data.atomic import FULL
from .errors import ClueError, RunError
from .options import RESULT, Parser, add_settings, add_tests, add_threads

if TYPE_CHECKING:
    from .run_directory import Run

_DEFAULTS = Settings()
# The stage's folder in a run, and the settings that earlier stages have used already and that can no longer change.
_FOLDERS = {"unlearn": "model", "evaluate": "evaluation"}
_SETTLED = {"unlearn": ("seed", "data", "localize"), "evaluate": ("seed", "data", "localize", "unlearn")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status and never raises on what a user can put right."""
    # Threads that spin while they wait make a job many times slower on a machine shared with others; idle ones cost
    # nothing. Read when torch loads OpenMP; whoever sets it knows better.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Progress is told in lines of our own; read when transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # What the hub fails at is told once, at the end: it warns of every attempt.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    arguments = argparse.Namespace(command=None)
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        if command not in (_localize, _unlearn) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ClueError("only localize and unlearn share their work between processes: start this command without torchrun")
        status = command(arguments)
        sys.stdout.flush()
        return status
    except ClueError as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("clue: interrupted" + "; the same command goes on from here" * _goes_on(arguments), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has seen enough (`clue plan show run | head`); the exit handler must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in FULL:
            message = (f"{error.filename or 'a file'} cannot be written ({error.strerror}): free some space and give the"
                       " same command again, which goes on from what is there")
    print(f"clue: error: {message}", file=sys.stderr)
    return 2


# --- commands -------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from .run_directory import demo_folder, write_json

    folder, target = Path(arguments.output), _json_target(arguments.json)
    _threads(arguments)
    with demo_folder(folder, overwrite=arguments.overwrite):
        from . import jobs

        # With --json - stdout is one JSON document: the table for people goes the way of the progress lines.
        with redirect_stdout(sys.stderr) if arguments.json == "-" else nullcontext():
            result = jobs.demo(folder, setting=arguments.setting, seed=arguments.seed, progress=_progress)
        if target is not None:
            write_json(target, result)
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
    return 0


def _localize(arguments: argparse.Namespace) -> int:
    settings, inputs = _settings(arguments), _inputs(arguments)
    _prepare(arguments, settings)
    from . import jobs
    from .processes import everywhere, joined
    from .run_directory import Run

    with joined(settings.device) as first:
        if first:
            with ExitStack() as stack:
                try:
                    run = stack.enter_context(_new_run(arguments, settings, inputs,
                                                       later=("unlearn", "evaluate", "robustness")))
                except BaseException:
                    everywhere(False)
                    raise
                everywhere(True)
                plan = jobs.localize(run, **inputs, settings=settings, progress=_progress)
            print(plan_command.summary(plan))
            _next("unlearn", arguments.output)
        elif everywhere(True):  # the run is there then
            jobs.localize(Run.open(arguments.output), **inputs, settings=settings, progress=lambda message: None)
        else:
            raise RunError(f"the first process made no run in {arguments.output}; its own message says why")
    return 0


def _unlearn(arguments: argparse.Namespace) -> int:
    run, settings = _open_run(arguments, "unlearn")
    from . import jobs

    if jobs.unlearn(run, settings, _progress):
        print(run.path("model"))
        _next("evaluate", arguments.run)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    run, settings = _open_run(arguments, "evaluate")
    tests = _tests(arguments, run)
    from . import jobs
    from .evaluation_sets import Tests
    from .report import robustness_table, table

    text = table(jobs.evaluate(run, settings, Tests(**tests), _progress))
    if arguments.robustness:
        text += "\n\n" + robustness_table(jobs.robustness(run, settings, Tests(**tests), _progress))
    print(text)
    _next("report", arguments.run)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .run_directory import Run, write_json

    target = _json_target(arguments.json)
    files = {"model": _absolute(arguments.model, "--model"), "forget": _absolute(arguments.forget, "--forget"),
             "retain": _named("--retain", arguments.retain)} if arguments.model and arguments.forget else {}
    job = compare_command.job_of(arguments, lambda base: _settings(arguments, base), files, _given_tests(arguments))
    _prepare(arguments, job.settings)
    run = Run.start(arguments.output, job.settings.to_dict(), job.inputs)
    try:
        table, results = compare_command.execute(arguments, job, run, _progress)
    except BaseException:
        run.discard()
        raise
    if target is not None:
        write_json(target, results)
    print(json.dumps(results, indent=1, allow_nan=False) if arguments.json == "-" else
          f"{table}\n\n{run.folder / 'compare.html'}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .run_directory import Run

    run = Run.open(arguments.run)
    from . import jobs

    print(jobs.report(run))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    settings, inputs = _settings(arguments), _inputs(arguments)
    _prepare(arguments, settings)
    from . import jobs
    from .evaluation_sets import Tests
    from .report import table

    with _new_run(arguments, settings, inputs) as run:
        tests = Tests(**_tests(arguments, run))
        found = jobs.run_all(run, **inputs, settings=settings, tests=tests, progress=_progress)
    print(table(found))
    print(run.folder / "report.html")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import describe, diagnose

    report = diagnose()
    print(json.dumps(report, indent=1) if arguments.json else describe(report))
    return 0


# --- what the commands share ----------------------------------------------------------------------------------------


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _next(command: str, run: str) -> None:
    sys.stdout.flush()  # this comes last, wherever the two go
    _progress(f"next: clue {command} {shlex.quote(run)}")


def _goes_on(arguments: argparse.Namespace) -> bool:
    """Whether an interrupted command left something that the same command would not make again: stages or a checkpoint."""
    if arguments.command in (_localize, _run, _compare):
        return any(Path(arguments.output).glob("*/"))
    if arguments.command is _unlearn:
        return any(Path(arguments.run, ".training").glob("*.safetensors"))
    return arguments.command is _evaluate and arguments.robustness and Path(arguments.run, "evaluation").is_dir()


def _settings(arguments: argparse.Namespace, base: Settings = _DEFAULTS) -> Settings:
    """``base``, then the TOML file, then the command line."""
    if arguments.config is not None:
        base = Settings.from_toml(arguments.config, base=base)
    given: dict[str, Any] = {}
    for destination, value in vars(arguments).items():
        group, dot, name = destination.partition(".")
        if dot and group:
            given.setdefault(group, {})[name] = value
        elif dot:
            given[name] = value
    return Settings.from_dict(given, source="command line", base=base)


def _inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"model": _absolute(arguments.model, "--model"), "forget": _absolute(arguments.forget, "--forget"),
            "retain": _named("--retain", arguments.retain)}


def _tests(arguments: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The fields of :class:`clue.evaluation_sets.Tests`: those recorded in the run, then those on the command line.

    Raises:
        RunError: the run has been evaluated on others already.
    """
    given = _given_tests(arguments)
    recorded: dict[str, Any] = run.manifest.get("tests", {})
    changed = [name for name in given if given[name] != recorded.get(name)]
    if changed and run.has("evaluation"):
        raise RunError(f"{run.folder} has been evaluated with other tests ({changed[0]}): remove"
                       f" {run.path('evaluation')} to evaluate it again")
    return {**recorded, **given}


def _given_tests(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`clue.evaluation_sets.Tests` that are on the command line."""
    of_benchmark = ("benchmark", "data") if "data" in arguments else ()  # `compare` means something else by the first
    given: dict[str, Any] = {name: _absolute(source, f"--{name}")
                             for name in ("paraphrase", "holdout", "gold", "reference", *of_benchmark)
                             if (source := getattr(arguments, name)) is not None}
    return given | {name: _named(flag, texts) for name, flag, texts in (("retain", "--test", arguments.test),
                                                                       ("skills", "--skill", arguments.skill)) if texts}


def _named(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Sources by name, from ``NAME=SOURCE``, or ``SOURCE`` whose file name without ending is then the name."""
    named: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"([\w.-]+)=(.*)", text, re.DOTALL)
        if match and not Path(text).exists():
            name, source = match.groups()
        else:
            name, source = Path(text if Path(text).exists() else re.split("[:@]", text)[0]).stem, text
        if not source or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ClueError(f"{flag} {text!r}: expected a file or NAME=FILE, the name of letters, digits, - and _")
        if name in named:
            raise ClueError(f"{flag} {text}: there is a set named {name} already; give it another name with {flag}"
                            f" NAME={source}")
        named[name] = _absolute(source, flag)
    return named


def _absolute(source: str, flag: str) -> str:
    """A local path made absolute, so that the run can be continued from another working directory."""
    if not source:  # which would be the working directory
        raise ClueError(f"{flag} is an empty text (a variable of the shell that is not set?): give a file, folder or id")
    return str(Path(source).resolve()) if Path(source).exists() else source


def _prepare(arguments: argparse.Namespace, settings: Settings) -> None:
    _threads(arguments)
    if settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ClueError("device = cuda, but torch sees no CUDA device: use --device cpu, or see `clue doctor`")


def _threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is None:
        return
    if arguments.threads < 1:
        raise ClueError(f"--threads {arguments.threads} must be at least 1")
    # Read by OpenMP when torch loads it: the native kernels run in the same threads.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)


@contextmanager
def _new_run(arguments: argparse.Namespace, settings: Settings, inputs: dict[str, Any],
             later: Sequence[str] = ()) -> Iterator[Run]:
    """The run to write into, taken back when the block fails before its first stage is finished. Settings of the stages
    ``later`` are for their own commands to change."""
    from .run_directory import Run

    run = Run.start(arguments.output, settings.to_dict(), inputs, {name: _DEFAULTS.to_dict()[name] for name in later})
    try:
        yield run
    except BaseException:
        run.discard()
        raise


def _open_run(arguments: argparse.Namespace, stage: str) -> tuple[Run, Settings]:
    """An existing run, with its own settings changed by the command line where they are not settled yet."""
    from .run_directory import Run, differing

    run = Run.open(arguments.run)
    recorded = Settings.from_dict(run.manifest["settings"], source=str(run.folder))
    settings = _settings(arguments, recorded)
    done = run.path(_FOLDERS[stage])
    later = [folder for name in ("evaluation", "robustness") if (folder := run.path(name)).is_dir() and folder != done]
    if stage == "unlearn" and later and not done.is_dir():
        raise RunError(f"{later[0]} belongs to a model that is no longer there: remove it too")
    other = differing(asdict(getattr(recorded, stage)), asdict(getattr(settings, stage)))
    if other and done.is_dir():
        raise RunError(f"{done} was made with {other}: remove {' and '.join(map(str, (done, *later)))} to make it again")
    for part in _SETTLED[stage]:
        old, new = getattr(recorded, part), getattr(settings, part)
        if old == new:
            continue
        changed = next((f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name)), "") \
            if is_dataclass(old) else part
        value = getattr(old, changed) if is_dataclass(old) else old
        raise RunError(f"{run.folder} was made with {changed} = {value}, which can no longer change: start a new run"
                       " in another folder with -o")
    _prepare(arguments, settings)
    return run, settings


def _json_target(path: str | None) -> Path | None:
    if path is None or path == "-":
        return None
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ClueError(f"--json {path}: " + ("that is a folder" if target.is_dir() else
                        f"there is no folder {target.parent}") + "; give a file, or - for stdout")
    return target


# --- the parser -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="clue", description="Make a language model forget something and keep everything else.")
    parser.add_argument("--version", action="version", version=f"clue {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on a small embedded world, in minutes")
    demo.set_defaults(command=_demo)
    demo.add_argument("--setting", choices=("easy", "hard"), default="easy",
                      help="hard: forget and retain share names, cities and phrasing (default: easy)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: 0)")
    demo.add_argument("-o", "--output", default="runs/demo", metavar="DIR",
                      help="new run directory (default: runs/demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder (nothing else)")
    demo.add_argument("--json", metavar="FILE", help="write the results as JSON; - for stdout")
    add_threads(demo)

    for name, command, summary in (("localize", _localize, "find the circuits and make a plan"),
                                   ("run", _run, "localize, unlearn, evaluate and report")):
        stage = commands.add_parser(name, help=summary, usage=f"clue {name} --model M --forget F --retain [NAME=]R ..."
                                    " -o RUN [settings]", epilog=RESULT if name == "run" else None)
        stage.set_defaults(command=command)
        stage.add_argument("--model", required=True, metavar="M", help="folder or hub id of a causal language model")
        stage.add_argument("--forget", required=True, metavar="F", help="records to forget: .jsonl, .json, .csv,"
                           " .parquet, or a dataset id")
        stage.add_argument("--retain", required=True, action="append", metavar="[NAME=]R",
                           help="records to keep; may be repeated")
        stage.add_argument("-o", "--output", required=True, metavar="RUN", help="run directory to make")
        if name == "run":
            add_tests(stage)
        add_settings(stage, own="" if name == "run" else name)

    for name, command, summary in (("unlearn", _unlearn, "train the planned weights of a run"),
                                   ("evaluate", _evaluate, "measure what a run has forgotten and kept")):
        stage = commands.add_parser(name, help=summary, usage=f"clue {name} RUN [settings]",
                                    epilog=f"Settings used before ({', '.join(_SETTLED[name])}) are those of the run."
                                    + f" {RESULT}" * (name == "evaluate"))
        stage.set_defaults(command=command)
        stage.add_argument("run", metavar="RUN", help="run directory")
        if name == "evaluate":
            add_tests(stage)
            stage.add_argument("--robustness", action="store_true", help="also try to bring back what was forgotten:"
                               " relearning, fine-tuning, quantization, prompts (it trains copies of the models)")
        add_settings(stage, own=name, settled=_SETTLED[name])

    compare = compare_command.add_to(commands)
    compare.set_defaults(command=_compare)
    add_tests(compare, benchmarks=False)
    add_settings(compare, own="", without=compare_command.DECIDED)

    report = commands.add_parser("report", help="write the report of a run as one HTML file")
    report.set_defaults(command=_report)
    report.add_argument("run", metavar="RUN", help="run directory")

    plan_command.add_to(commands)
    delta_command.add_to(commands)
    solve.add_to(commands)
    certificate_command.add_to(commands)

    doctor = commands.add_parser("doctor", help="versions, devices, kernels and extras of this installation")
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--json", action="store_true", help="as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

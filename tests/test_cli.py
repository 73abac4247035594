"""The command line: options come from the settings, errors are one sentence, and a failure changes nothing on disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.cli import _parser, _settings, main
from clue.config import Settings

LOCALIZE = ["localize", "--model", "m", "--forget", "f", "--retain", "r", "-o", "run"]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def failure(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one sentence with which a command refuses."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[-1].startswith("clue: error: ")
    assert "Traceback" not in captured.err
    return lines[-1].removeprefix("clue: error: ")


def clue(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    return subprocess.run([sys.executable, "-m", "clue.cli", *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment)


# --- starting -------------------------------------------------------------------------------------------------------


def test_help_needs_no_heavy_import() -> None:
    probe = ("import sys; from clue.cli import main\n"
             "try: main(['localize', '--help'])\n"
             "except SystemExit: pass\n"
             "print([m for m in ('torch', 'transformers', 'numpy', 'sklearn') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["", "demo", "localize", "run", "unlearn", "evaluate", "report", "doctor", "plan",
                                     "plan show", "plan explain", "plan verify", "solve", "delta", "delta make",
                                     "delta apply", "delta revert", "delta show", "compare"])
def test_help_is_there_for_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: clue {command}".strip() in capsys.readouterr().out


def test_help_gives_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = Settings()
    for group in (g for g in (getattr(defaults, f.name) for f in fields(defaults)) if is_dataclass(g)):
        for f in fields(group):
            value = getattr(group, f.name)
            assert f"(default: {value if not isinstance(value, bool) else 'on' if value else 'off'})" in text
            assert f.name.replace("_", "-") in text


@pytest.mark.parametrize(("command", "hidden"), [("unlearn", ("localize",)), ("evaluate", ("localize", "unlearn"))])
def test_help_leaves_out_settings_that_can_no_longer_change(command: str, hidden: tuple[str, ...],
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"^(\w+):$", text, re.M)
    assert not {*hidden, "data"} & {*shown} and {"general", "evaluate", "robustness"} <= {*shown}
    assert "--edges" not in text and "--seed" not in text and "--device" in text
    assert f"Settings used before (seed, data, {', '.join(hidden)}) are those of the run." in " ".join(text.split())
    assert parsed("--edges", "0.25", base=[command, "run"]).localize.edges == 0.25  # refused later, if it is another


@pytest.mark.parametrize("command", ["run", "evaluate", "compare"])
def test_help_says_what_is_measured_with_and_without_tests(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what to measure on, besides the forget set" in text and "measured in place of the --retain sets" in text
    assert "else the first --retain set, which was trained on)" in text or command == "compare"
    assert ("For programs, RUN/evaluation/before.json and after.json hold" in text) == (command != "compare")


def test_the_module_is_the_command() -> None:
    result = clue("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "clue")
    result = clue("plan", "show", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("clue: error: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_hub_warns_of_no_attempt_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, told in ((None, "error"), ("debug", "debug")):
        monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
        if asked is not None:
            monkeypatch.setenv("HF_HUB_VERBOSITY", asked)
        assert main(["plan", "show", "nowhere"]) == 2
        assert os.environ["HF_HUB_VERBOSITY"] == told


# --- settings -------------------------------------------------------------------------------------------------------


def parsed(*argv: str, base: list[str] = LOCALIZE) -> Settings:
    return _settings(_parser().parse_args([*base, *argv]))


def test_without_options_the_settings_are_the_defaults() -> None:
    assert parsed() == Settings()


def values(default: object, choices: tuple[str, ...] | None,
           names: tuple[str, ...] | None = None) -> st.SearchStrategy[object]:
    if choices:
        return st.sampled_from(choices)
    if names:
        return st.lists(st.sampled_from(names), unique=True).map(",".join)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 10**6).map(lambda n: 2 * n)  # path_steps must be even
    if isinstance(default, str):  # a leading dash would be an option
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda text: "no" + text)
    return st.floats(0.001, 0.999)


@settings(max_examples=25)
@given(st.data())
def test_every_setting_survives_the_command_line_and_toml(
        tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever the values, an option per field and a TOML file both give back the same settings."""
    wanted: dict[str, object] = {}
    options: list[str] = []
    shared = {"batch_size"}
    defaults = Settings()
    for outer in fields(defaults):
        group = getattr(defaults, outer.name)
        for f in fields(group) if is_dataclass(group) else (outer,):
            default = getattr(group, f.name) if is_dataclass(group) else group
            value = data.draw(values(default, f.metadata.get("choices"), f.metadata.get("names")))
            name = f"{outer.name}_{f.name}" if f.name in shared else f.name
            flag = "--" + name.replace("_", "-")
            options += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
            if is_dataclass(group):
                wanted.setdefault(outer.name, {})[f.name] = value  # type: ignore[attr-defined]
            else:
                wanted[f.name] = value
    given_settings = Settings.from_dict(wanted)
    assert given_settings.to_dict() == wanted
    assert parsed(*options) == given_settings
    file = tmp_path_factory.mktemp("toml") / "settings.toml"
    file.write_text(given_settings.to_toml(), encoding="utf-8", newline="")
    assert parsed("--config", str(file)) == given_settings


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("seed = 5\n[localize]\nedges = 1\nneurons = 0.5\n")
    both = parsed("--config", str(file), "--edges", "0.25")
    assert (both.seed, both.localize.edges, both.localize.neurons) == (5, 0.25, 0.5)


def test_a_stage_takes_its_own_batch_size_without_prefix() -> None:
    assert parsed("--batch-size", "3").localize.batch_size == 3
    own = parsed("--batch-size", "3", "--evaluate-batch-size", "4", base=["unlearn", "run"])
    assert (own.localize.batch_size, own.unlearn.batch_size, own.evaluate.batch_size) == (8, 3, 4)


@pytest.mark.parametrize(("text", "message"), [
    ("[localize]\nedge = 0.1\n", "no setting localize.edge; did you mean edges?"),
    ("[localise]\nedges = 0.1\n", "no setting localise; did you mean localize?"),
    ("[localize]\nedges = 'many'\n", "localize.edges must be of type float, got 'many'"),
    ("[localize]\nedges = true\n", "localize.edges must be of type float, got True"),
    ("[localize]\nedges = 1.5\n", "edges = 1.5 must lie in (0, 1], or be 0"),
    ("[localize]\nedges = nan\n", "edges = nan must be finite and not negative"),
    ("[localize]\nratio = 0.0\n", "ratio = 0.0 must lie in (0, 1]"),
    ("[localize]\nfaithfulness = 1.5\n", "faithfulness = 1.5 must lie in (0, 1], or be 0"),
    ("[unlearn]\nlr = -1.0\n", "lr = -1.0 must be finite and not negative"),
    ("[unlearn]\nobjective = 'forget'\n", "objective = 'forget' is not one of auto, npo"),
    ("seed = 1.5\n", "seed must be of type int, got 1.5"),
    ("data = 3\n", "data must be a table"),
    ("[localize\n", "not a TOML file"),
])
def test_a_wrong_settings_file_is_named(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    error = failure(capsys, *LOCALIZE[:-1], tmp_path / "run", "--config", file)
    assert error.startswith(f"{file}: ")
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("argv", "message"), [
    ([], "COMMAND"),
    (["forget"], "invalid choice: 'forget'"),
    (["localize", "--model", "m"], "--forget, --retain"),
    ([*LOCALIZE, "--edges", "many"], "argument --edges: invalid float value: 'many'"),
    ([*LOCALIZE, "--edges", "2"], "edges = 2.0 must lie in (0, 1]"),
    ([*LOCALIZE, "--steps", "0"], "steps = 0 must be at least 1"),
    ([*LOCALIZE, "--path-steps", "3"], "path_steps = 3 must be an even number"),
    ([*LOCALIZE, "--lr", "inf"], "lr = inf must be finite"),
    ([*LOCALIZE, "--seed", "-1"], "seed = -1 must be a whole number in 0..2^48 - 1"),
    ([*LOCALIZE, "--objective", "x"], "argument --objective: invalid choice: 'x'"),
    ([*LOCALIZE, "--edg", "0.1"], "unrecognized argument --edg; did you mean --edges? See `clue localize --help`"),
    (["unlearn", "run", "--lrr", "3"], "unrecognized argument --lrr; did you mean --lr? See `clue unlearn --help`"),
    (["evaluate", "--tset=x"], "unrecognized argument --tset; did you mean --test? See `clue evaluate --help`"),
    (["localize", "--modle", "m"], "unrecognized argument --modle; did you mean --mode or --model? See"),
    (["run", *LOCALIZE[1:], "--batch-size", "4"], "unrecognized argument --batch-size: here it is --localize-batch-size,"
     " --unlearn-batch-size, --evaluate-batch-size or --robustness-batch-size; see `clue run --help`"),
    (["plan", "show", "run", "--node", "3"], "did you mean --nodes? See `clue plan show --help`"),
    (["unlearn", "run", "--edge", "1"], "did you mean --edges? See `clue unlearn --help`"),
    (["unlearn", "run", "other"], "unrecognized argument other; see `clue unlearn --help`"),
    (["unlearn", "run", "-x"], "unrecognized argument -x; see `clue unlearn --help`"),
    (["--sed", "3", "demo"], "unrecognized argument --sed; see `clue --help`"),
    ([*LOCALIZE, "--threads", "0"], "--threads 0 must be at least 1"),
    ([*LOCALIZE, "--config", "nowhere.toml"], "nowhere.toml: the settings file cannot be read"),
    (["localize", "--model", "m", "--forget", "", "--retain", "r", "-o", "run"], "--forget is an empty text"),
    (["run", *LOCALIZE[1:], "--gold", ""], "--gold is an empty text"),
    ([*LOCALIZE, "--retain", "r"], "there is a set named r already"),
    ([*LOCALIZE, "--retain", "name="], "expected a file or NAME=FILE"),
    (["demo", "--seed", "x"], "argument --seed"),
    (["demo", "--json", "nowhere/out.json"], "there is no folder nowhere"),
    (["demo", "--json", "."], "that is a folder"),
    (["plan", "show", "run", "--nodes", "-1"], "argument --nodes: invalid count value: '-1'"),
    (["unlearn", "nowhere"], "nowhere is not a run directory"),
    (["evaluate", "nowhere"], "nowhere is not a run directory"),
    (["report", "nowhere"], "nowhere is not a run directory"),
    (["plan", "show", "nowhere"], "nowhere holds no plan"),
])
def test_a_wrong_command_line_is_one_sentence_and_leaves_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str],
        message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *argv)
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cpu" in failure(capsys, *LOCALIZE[:-1], tmp_path / "run", "--device", "cuda")
    assert snapshot(tmp_path) == {}

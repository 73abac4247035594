"""The command line: options come from the settings, errors are one sentence, and a failure changes nothing on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clue.circuit.graph import Circuit
from clue.cli import _parser, _settings, main
from clue.config import Settings
from clue.evaluate import Evaluation
from clue.jobs import load_model
from clue.plan import Plan
from clue.run_directory import Run

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


def test_the_module_is_the_command() -> None:
    result = clue("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "clue")
    result = clue("plan", "show", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("clue: error: ")
    assert len(result.stderr.splitlines()) == 1


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
    ("[localize]\nedges = 0.0\n", "edges = 0.0 must lie in (0, 1]"),
    ("[localize]\nedges = nan\n", "edges = nan must lie in (0, 1]"),
    ("[localize]\nfaithfulness = 1.5\n", "faithfulness = 1.5 must lie in (0, 1], or be 0"),
    ("[unlearn]\nlr = -1.0\n", "lr = -1.0 must be finite and not negative"),
    ("[unlearn]\nobjective = 'forget'\n", "objective = 'forget' is not one of npo"),
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
    ([*LOCALIZE, "--seed", "-1"], "seed = -1 must be finite and not negative"),
    ([*LOCALIZE, "--objective", "x"], "argument --objective: invalid choice: 'x'"),
    ([*LOCALIZE, "--edg", "0.1"], "unrecognized arguments: --edg"),
    ([*LOCALIZE, "--threads", "0"], "--threads 0 must be at least 1"),
    ([*LOCALIZE, "--config", "nowhere.toml"], "nowhere.toml: the settings file cannot be read"),
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


# --- jobs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small world (``forget.jsonl``, ``retain.jsonl``, ...) and an untrained ``model`` of it."""
    from transformers import LlamaForCausalLM

    from clue.data.world import build_world, model_config, save_world

    folder = tmp_path_factory.mktemp("world")
    small = build_world(n_people=12, n_forget=2)
    save_world(small, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(model_config(small, "small")).save_pretrained(folder / "model")
    small.tokenizer.save_pretrained(folder / "model")
    return folder


QUICK = ("--limit", "4", "--steps", "3", "--unlearn-batch-size", "4", "--no-rouge", "--bootstrap", "0")


@pytest.fixture(scope="module")
def localized(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that world with a plan."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(["localize", "--model", str(world / "model"), "--forget", str(world / "forget.jsonl"),
                 "--retain", f"people={world / 'retain.jsonl'}", "-o", str(run), *QUICK]) == 0
    return run


def inputs(world: Path, **changed: str | Path) -> list[str]:
    given = {"model": world / "model", "forget": world / "forget.jsonl", "retain": world / "retain.jsonl"} | changed
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def test_localize_says_how_faithful_the_circuits_it_was_asked_for_are(world: Path, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["localize", *inputs(world), "-o", str(tmp_path / "run"), *QUICK, "--faithfulness", "0.5", "--neurons", "1",
                 "--confirm", "2"]) == 0
    said = re.findall(r"(\w+) (\d+) edges \(faithfulness (\d\.\d\d)", capsys.readouterr().err)
    assert [name for name, _, _ in said] == ["forget", "retain"]
    for name, edges, faithfulness in said:
        circuit = Circuit.load(tmp_path / "run" / "circuits" / f"{name}.safetensors")
        assert (len(circuit), f"{circuit.faithfulness:.2f}") == (int(edges), faithfulness)
        assert circuit.faithfulness is not None and circuit.faithfulness >= 0.5


@pytest.mark.slow
def test_torchrun_starts_processes_that_share_unlearning(world: Path, localized: Path, tmp_path: Path) -> None:
    """The model of two processes is that of one, to float tolerance; the first alone writes, reports and prints."""
    from torch.distributed.run import __file__ as torchrun
    from transformers import AutoModelForCausalLM

    one, two = (shutil.copytree(localized, tmp_path / name) for name in ("one", "two"))
    assert main(["unlearn", str(one), "--lr", "0.01"]) == 0
    done = subprocess.run([sys.executable, torchrun, "--nproc-per-node", "2", "--standalone", "-m", "clue", "unlearn",
                           str(two), "--lr", "0.01"], capture_output=True, text=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(two / "model")
    assert done.stderr.count("verify     exact:") == 1
    assert Run.open(two).manifest["verification"].startswith("exact:")
    first, second = (AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in (one, two))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-4)


def test_the_job_in_steps(world: Path, localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """unlearn, evaluate, report and verify on a localized run; only planned weights changed, and stages are kept."""
    run = shutil.copytree(localized, tmp_path / "run")
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "model")
    assert Run.open(run).manifest["settings"]["unlearn"]["lr"] == 0.01
    assert re.fullmatch(r"exact: \d+ of \d+ planned weights changed, and not a bit of any other",
                        Run.open(run).manifest["verification"])
    assert main(["plan", "verify", str(world / "model"), str(run / "model"), str(run)]) == 0
    assert "exact: " in capsys.readouterr().out

    assert main(["evaluate", str(run), "--test", str(world / "retain_unseen.jsonl")]) == 0
    table = capsys.readouterr().out
    assert "before" in table
    assert "after" in table
    evaluation = json.loads((run / "evaluation" / "after.json").read_text())
    assert "retain_unseen" in str(evaluation)
    assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out == table
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "<html" in page and Run.open(run).manifest["verification"] in page

    before = snapshot(run)
    assert "made with other unlearn settings: remove" in failure(capsys, "unlearn", run, "--lr", "0.02")
    assert "made with other evaluate settings" in failure(capsys, "evaluate", run, "--min-k", "0.5")
    assert "other tests (gold)" in failure(capsys, "evaluate", run, "--gold", world / "model")
    assert "made with edges = 0.05" in failure(capsys, "evaluate", run, "--edges", "0.5")
    assert snapshot(run) == before


def test_a_model_that_changed_meanwhile_is_refused(world: Path, localized: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    moved, run = shutil.copytree(world / "model", tmp_path / "model"), shutil.copytree(localized, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["inputs"]["model"] = str(moved)
    (run / "run.json").write_text(json.dumps(manifest))

    def spoil() -> None:
        weights = load_file(moved / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})

    def load_then_spoil(source: str, settings: Settings) -> Any:
        loaded = load_model(source, settings)
        spoil()
        return loaded

    # While it is being trained: what is saved differs from what is on disk outside the plan, and is not kept.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clue.jobs.load_model", load_then_spoil)
        assert "thrown away: NOT exact: 1 weights outside the plan changed, in model.norm.weight (1)" in failure(
            capsys, "unlearn", run)
    # Before: the plan is of other weights.
    assert "not the model this run was localized on" in failure(capsys, "unlearn", run)
    assert not (run / "model").exists()


def test_evaluating_on_what_was_used_is_refused_or_told(world: Path, localized: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(localized, tmp_path / "run")
    assert main(["unlearn", str(run)]) == 0
    capsys.readouterr()
    before = snapshot(run)
    for flag in ("--test", "--skill", "--holdout", "--paraphrase"):
        for used in ("forget", "retain"):
            message = failure(capsys, "evaluate", run, flag, world / f"{used}.jsonl")
            assert re.search(r"the test set \w+ shares \d+ of its \d+ records with the set \w+ used to localize", message)
    assert snapshot(run) == before
    # Without an independent test set the retain set itself is read, which is said and written down.
    assert main(["evaluate", str(run)]) == 0
    assert "people: 90 evaluated records were also used to localize and retain" in capsys.readouterr().err
    assert json.loads((run / "evaluation" / "overlaps.json").read_text()) == {"people": 90}


def test_a_benchmark_of_ones_own_files_and_the_stored_evaluation_of_a_gold_model(
        world: Path, localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, own = shutil.copytree(localized, tmp_path / "run"), tmp_path / "own"
    assert main(["unlearn", str(run)]) == 0
    own.mkdir()
    rows = [json.loads(line) for line in (world / "forget.jsonl").read_text().splitlines()]
    (own / "forget.json").write_text(json.dumps([{**row, "perturbed_answer": ["nobody", "else"]} for row in rows[:10]]
                                                + [{"prompt": "what else ?", "answer": "tea"}]))
    for there, here in (("holdout", "holdout"), ("addition_eval", "skill_addition"), ("retain_unseen", "retain")):
        shutil.copy(world / f"{there}.jsonl", own / f"{here}.jsonl")
    shutil.copytree(run, tmp_path / "again")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--benchmark", "custom", "--data", str(own), "--gold", str(world / "model")]) == 0
    captured = capsys.readouterr()
    assert "forget: 1 of 11 evaluated records are not in the forget set of this run" in captured.err
    assert "skill_addition" in captured.out and "min_k++" in captured.out
    gold = Evaluation.load(run / "evaluation" / "gold.json")
    assert gold.detail["forget"].truth_n == 10 and set(gold.mia) == {"loss", "zlib", "min_k", "min_k++"}
    # The gold model's numbers are enough to compare with, and give the same comparison.
    stored = ["--gold", str(run / "evaluation" / "gold.json")]
    assert main(["evaluate", str(tmp_path / "again"), "--benchmark", "custom", "--data", str(own), *stored]) == 0
    assert capsys.readouterr().out == captured.out
    before = snapshot(run / "evaluation")
    quick = ["--relearn-steps", "2", "--drift-steps", "2", "--curve-points", "1"]
    assert main(["evaluate", str(run), "--robustness", *quick]) == 0
    tried = capsys.readouterr().out
    assert tried.startswith(captured.out) and "after quantization" in tried and snapshot(run / "evaluation") == before
    assert sorted(f.name for f in (run / "robustness").iterdir()) == ["after.json", "before.json", "gold.json"]
    assert main(["evaluate", str(run), "--robustness"]) == 0  # read back, with the run's own settings
    assert capsys.readouterr().out == tried
    assert "other robustness settings" in failure(capsys, "evaluate", run, "--robustness", "--hints", "1")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "does it come back?" in page and "Forget quality" in page
    capsys.readouterr()
    assert "other tests (benchmark)" in failure(capsys, "evaluate", run, "--benchmark", "world")
    (own / "retain.jsonl").write_text((world / "forget.jsonl").read_text())
    shutil.rmtree(run / "evaluation")
    assert "custom: its set retain shares" in failure(capsys, "evaluate", run, "--benchmark", "custom", "--data", own)


def test_run_is_the_same_job_in_one_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", *inputs(world), "-o", str(tmp_path / "run"), *QUICK]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "localize" not in captured.out
    assert captured.out.rstrip().endswith("report.html")
    first = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    # Killed after the plan: the same command goes on from there, to the same bits.
    for stage in ("model", "evaluation"):
        shutil.rmtree(tmp_path / "run" / stage)
    plan = (tmp_path / "run" / "plan").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "run" / "plan").stat().st_mtime_ns == plan


@pytest.mark.parametrize("method", ["snip", "eap"])
def test_a_baseline_goes_the_same_way(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      method: str) -> None:
    run = tmp_path / "run"
    arguments = ["--method", method, "--ratio", "0.1", "-o", str(run), "--test", str(world / "retain_unseen.jsonl")]
    assert main(["run", *inputs(world), *arguments, *QUICK]) == 0
    captured = capsys.readouterr()
    assert "weights may change" in captured.err and "not a bit of any other" in captured.err
    page = (run / "report.html").read_text()
    assert ("chosen by snip" if method == "snip" else "eap chose") in page
    assert 'id="conflicts"' not in page
    assert main(["plan", "show", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plan = Plan.load(run)
    assert facts["weights_changed"] == plan.weights_changed <= round(0.1 * plan.provenance["baseline"]["of"])
    assert {s["axis"] for s in facts["slices"].values()} == ({"weights"} if method == "snip" else {"rows", "columns"})
    delta = tmp_path / "delta"
    assert main(["delta", "make", str(world / "model"), str(run / "model"), str(run), "-o", str(delta)]) == 0
    assert main(["delta", "revert", str(run / "model"), str(delta), "-o", str(tmp_path / "back")]) == 0
    before, back = (load_file(folder / "model.safetensors") for folder in (world / "model", tmp_path / "back"))
    assert all(torch.equal(before[name], back[name]) for name in before)


def test_a_stage_out_of_order_names_the_one_before(localized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(localized)
    assert "has no model yet: make it with `clue unlearn`" in failure(capsys, "evaluate", localized)
    assert "has no evaluation yet: make it with `clue evaluate`" in failure(capsys, "report", localized)
    assert "seed = 0, which can no longer change" in failure(capsys, "unlearn", localized, "--seed", "1")
    assert snapshot(localized) == before


@pytest.mark.parametrize(("name", "text", "message"), [
    ("forget", None, "forget.jsonl"),
    ("forget", "", "forget.jsonl"),
    ("forget", '{"question": "a", "answer": "b"}\n{"question": "a"\n', "forget.jsonl:2"),
    ("forget", '{"question": "a", "answer": "b"}\n{"question": "a"}\n', "forget.jsonl:2"),
    ("forget", '{"question": "a", "answer": ""}\n', "forget.jsonl:1"),
    ("forget", '{"question": "a", "answer": 3}\n', "forget.jsonl:1"),
    ("retain", '{"question": "a"}\n', "retain.jsonl:1"),
    ("retain", "same", "forget"),
    ("forget", '{"question": "' + "Where " * 500 + '", "answer": "b"}\n', "forget.jsonl:1"),
])
def test_bad_records_are_named_and_leave_nothing(
        world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None,
        message: str) -> None:
    file = tmp_path / f"{name}.jsonl"
    if text is not None:
        file.write_text((world / "forget.jsonl").read_text() if text == "same" else text)
    before = snapshot(tmp_path)
    assert message in failure(capsys, "localize", *inputs(world, **{name: file}), "-o", tmp_path / "a" / "run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "no tokenizer", "nan", "truncated", "family", "no pad token"])
def test_bad_models_are_named_and_leave_nothing(
        world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    model = tmp_path / "model"
    if damage == "empty":
        model.mkdir()
    elif damage != "missing":
        shutil.copytree(world / "model", model)
    if damage == "no tokenizer":
        for file in model.glob("token*"):
            file.unlink()
    elif damage == "nan":
        weights = load_file(model / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif damage == "truncated":
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[:len(content) // 2])
    elif damage == "family":
        from transformers import CTRLConfig, CTRLLMHeadModel

        CTRLLMHeadModel(CTRLConfig(vocab_size=300, n_positions=64, n_embd=16, dff=16, n_layer=1, n_head=2)
                        ).save_pretrained(model)
    elif damage == "no pad token":
        # A tokenizer that at least knows an end of sequence is used with that as padding, which is masked anyway.
        config = json.loads((model / "tokenizer_config.json").read_text())
        for name in ("pad_token", "eos_token"):
            config.pop(name)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    message = failure(capsys, "localize", *inputs(world, model=model), "-o", tmp_path / "run")
    expected = {"nan": "up_proj", "family": "no anatomy entry for model family 'ctrl'",
                "no pad token": "neither a pad nor an end-of-sequence token"}.get(damage, str(model))
    assert expected in message
    assert snapshot(tmp_path) == before


def test_a_folder_with_other_files_is_not_written_to(
        world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert "other files (for example notes.txt)" in failure(capsys, "localize", *inputs(world), "-o", tmp_path)
    assert "other files (for example notes.txt)" in failure(capsys, "demo", "--overwrite", "-o", tmp_path)
    assert snapshot(tmp_path) == before


def test_another_job_does_not_get_into_a_run(
        world: Path, localized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(localized)
    again = ["localize", *inputs(world, retain=f"people={world / 'retain.jsonl'}"), "-o", str(localized), *QUICK]
    assert "localize.edges = 0.05 instead of 0.5" in failure(capsys, *again, "--edges", "0.5")
    other = [a.replace("people=", "others=") for a in again]
    assert "inputs.retain" in failure(capsys, *other)
    assert "holds a run that is not a demo" in failure(capsys, "demo", "-o", localized)
    assert "holds a run that is not a demo" in failure(capsys, "demo", "--overwrite", "-o", localized)
    assert main(again) == 0
    assert snapshot(localized) == before


def test_an_interrupt_ends_with_130_and_leaves_whole_stages(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "clue.cli", "localize", *inputs(world), "-o", str(run)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    while not (run / "run.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "clue: interrupted"
    assert not run.exists() or not [p for p in run.iterdir() if p.name.startswith(".")]

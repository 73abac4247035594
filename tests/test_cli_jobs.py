"""The jobs of the command line, on a small world: stages that are whole or absent, and refusals that leave no trace."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clue.circuit.graph import Circuit
from clue.cli import main
from clue.config import Settings
from clue.errors import RunError
from clue.evaluate import Evaluation
from clue.jobs import _tuned
from clue.loading import load_model
from clue.plan import Plan
from clue.run_directory import Run
from clue.unlearn.log import SERIES, UnlearnLog

from .test_cli import failure, snapshot


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
    told = capsys.readouterr().err
    assert told.endswith(f"\nnext: clue unlearn {tmp_path / 'run'}\n")
    said = re.findall(r"(\w+) (\d+) edges \(faithfulness (\d\.\d\d)", told)
    assert [name for name, _, _ in said] == ["forget", "retain"]
    for name, edges, faithfulness in said:
        circuit = Circuit.load(tmp_path / "run" / "circuits" / f"{name}.safetensors")
        assert (len(circuit), f"{circuit.faithfulness:.2f}") == (int(edges), faithfulness)
        assert circuit.faithfulness is not None and circuit.faithfulness >= 0.5


def test_commands_that_do_not_share_say_so(localized: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start this command without torchrun" in failure(capsys, "plan", "show", localized)


@pytest.mark.slow
def test_torchrun_starts_processes_that_share_a_job(world: Path, localized: Path, tmp_path: Path) -> None:
    """Plan and model of two processes are those of one, to float tolerance; the first alone writes, reports and prints."""
    from torch.distributed.run import __file__ as torchrun
    from transformers import AutoModelForCausalLM

    def started(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, torchrun, "--nproc-per-node", "2", "--standalone", "-m", "clue", *arguments],
                              capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == status, done.stderr
        return done

    shared = tmp_path / "shared"
    done = started("localize", *inputs(world, retain=f"people={world / 'retain.jsonl'}"), "-o", str(shared), *QUICK)
    assert done.stderr.count("plan  ") == 1
    alone, both = (Plan.load(run) for run in (localized, shared))
    assert both.nodes == alone.nodes and np.array_equal(both.role, alone.role)
    refused = started("localize", *inputs(world), "-o", str(world), *QUICK, status=1)  # each in its sentence
    assert "choose an empty or new folder" in refused.stderr and "the first process made no run in" in refused.stderr
    assert refused.stderr.count("clue: error: ") == 2

    one, two = (shutil.copytree(localized, tmp_path / name) for name in ("one", "two"))
    assert main(["unlearn", str(one), "--lr", "0.01", "--objective", "npo"]) == 0
    done = started("unlearn", str(two), "--lr", "0.01", "--objective", "npo")
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
    captured = capsys.readouterr()
    assert captured.out.strip() == str(run / "model") and captured.err.endswith(f"\nnext: clue evaluate {run}\n")
    assert Run.open(run).manifest["settings"]["unlearn"]["lr"] == 0.01
    assert re.fullmatch(r"exact: \d+ of \d+ planned weights changed, and not a bit of any other",
                        Run.open(run).manifest["verification"])
    assert main(["plan", "verify", str(world / "model"), str(run / "model"), str(run)]) == 0
    assert "exact: " in capsys.readouterr().out

    assert main(["evaluate", str(run), "--test", str(world / "retain_unseen.jsonl")]) == 0
    table, told = capsys.readouterr()
    assert told.endswith(f"\nnext: clue report {run}\n")
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
    folders = " and ".join(str(run / name) for name in ("model", "evaluation"))
    told = failure(capsys, "unlearn", run, "--lr", "0.02", "--trials", "2")
    assert f"{run / 'model'} was made with lr = 0.01 instead of 0.02 and trials = 4 instead of 2: remove {folders} to" in told
    assert "evaluation was made with min_k = 0.4 instead of 0.5: remove" in failure(capsys, "evaluate", run, "--min-k", "0.5")
    assert "other tests (gold)" in failure(capsys, "evaluate", run, "--gold", world / "model")
    assert "made with edges = 0.0" in failure(capsys, "evaluate", run, "--edges", "0.5")
    assert snapshot(run) == before


def test_one_model_is_held_at_a_time(world: Path, localized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and robustness let go of a model before they load the next: a device may hold one, and not two."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    held: list[int] = []

    def watched(source: str, settings: Settings) -> Any:
        held.append(len(alive))
        network, tokenizer = load_model(source, settings)
        alive.add(network)
        return network, tokenizer

    run = shutil.copytree(localized, tmp_path / "run")
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    monkeypatch.setattr("clue.jobs.load_model", watched)
    assert main(["evaluate", str(run), "--gold", str(world / "model"), "--robustness", "--relearn-steps", "1", "--drift-steps",
                 "1", "--curve-points", "1"]) == 0
    assert held == [0] * 6


def test_one_trial_is_counted_as_one() -> None:
    tuning = {"trials": [{}], "lr": 1e-3, "retain_weight": 1.0, "before": None, "kept": None}
    log = UnlearnLog(np.zeros(0, np.uint8), **{name: np.zeros(0) for name in SERIES}, stopped_early=True, final_probability=0.0,
                     final_forgotten=1.0, tuning=tuning)
    assert _tuned(log) == "tuned      1 trial on retain records held back: lr 0.001, retain weight 1"


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_is_there(
        world: Path, localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on file sizes stands in for a full disk: writing fails the same way, here of what is larger than this."""
    run = shutil.copytree(localized, tmp_path / "run")
    before = snapshot(tmp_path)
    told = "cannot be written (File too large): free some space and give the same command again"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        assert f"{tmp_path / 'new' / 'scores'} {told}" in failure(
            capsys, "localize", *inputs(world), "-o", tmp_path / "new", *QUICK)
        assert f"{run / 'model'} {told}" in failure(capsys, "unlearn", run, "--lr", "0.01")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (run / ".training").rmdir()  # where the last checkpoint had no room either
    assert {name: content for name, content in snapshot(tmp_path).items() if not name.startswith("new")} == before
    assert Run.open(tmp_path / "new").stages() == ["pairs"]
    # Between a stage and what the run's own file says of it.
    with pytest.MonkeyPatch.context() as patch:
        def full(self: Run, stage: str) -> None:
            if stage == "model":
                raise RunError("run.json cannot be written")

        patch.setattr(Run, "_take", full)
        assert "run.json cannot be written" in failure(capsys, "unlearn", run, "--lr", "0.01")
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    assert "is there already" in capsys.readouterr().err
    assert Run.open(run).manifest["settings"]["unlearn"]["lr"] == 0.01 and Run.open(run).manifest["verification"]
    assert main(["localize", *inputs(world), "-o", str(tmp_path / "new"), *QUICK]) == 0


def test_a_model_that_found_no_room_is_saved_later_without_training(
        world: Path, localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = shutil.copytree(localized, tmp_path / "run"), shutil.copytree(localized, tmp_path / "other")
    size = (world / "model" / "model.safetensors").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limit[1]))
    try:
        assert f"{run / 'model'} cannot be written (File too large): free some space" in failure(
            capsys, "unlearn", run, "--lr", "0.01")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clue.unlearn.loop._Training._step", lambda *given: pytest.fail("a step was made again"))
        assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    assert main(["unlearn", str(other), "--lr", "0.01"]) == 0
    weights, log = "model.safetensors", "training.json"
    assert (run / "model" / weights).read_bytes() == (other / "model" / weights).read_bytes()
    assert (run / "model" / log).read_bytes() == (other / "model" / log).read_bytes()
    assert not (run / ".training").exists()


def test_one_process_unlearns_in_a_run(localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two would replace each other's checkpoints; the second stops before it has trained anything."""
    run = shutil.copytree(localized, tmp_path / "run")
    before = snapshot(run)
    with Run.open(run).claimed("model"):
        assert f"another process is working on {run / 'model'}: wait for it" in failure(capsys, "unlearn", run, "--lr", "0.01")
        assert snapshot(run) == before | {".model.partial": None}
    assert snapshot(run) == before
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0


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
    assert "the plan was made for another model: its weights, or their dtype" in failure(capsys, "unlearn", run)
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


def test_a_base_model_that_changed_between_stages_is_refused(world: Path, localized: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    model, run = shutil.copytree(world / "model", tmp_path / "model"), tmp_path / "run"
    assert main(["localize", *inputs(world, model=model), "-o", str(run), *QUICK]) == 0
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    told = f"{run} was made from another model: the weights in {model} have changed since"
    before = snapshot(run)
    assert told in failure(capsys, "evaluate", run)
    assert told in failure(capsys, "localize", *inputs(world, model=model), "-o", run, *QUICK)
    assert snapshot(run) == before
    weights["model.norm.weight"][0] -= 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", str(run), "--test", str(world / "retain_unseen.jsonl")]) == 0


@pytest.mark.filterwarnings("ignore:ks_2samp")  # the truth ratios of the same model twice
def test_a_gold_evaluation_on_other_records_is_said(world: Path, localized: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(localized, tmp_path / "run")
    assert main(["unlearn", str(run), "--lr", "0.01"]) == 0
    again = shutil.copytree(run, tmp_path / "again")
    assert main(["evaluate", str(run), "--test", f"unseen={world / 'retain_unseen.jsonl'}"]) == 0
    capsys.readouterr()
    gold = run / "evaluation" / "before.json"
    assert main(["evaluate", str(again), "--test", f"unseen={world / 'holdout.jsonl'}", f"--gold={gold}"]) == 0
    assert f"{gold} was measured on other records of retain: its numbers there cannot be" in capsys.readouterr().err


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
    assert sorted(f.stem for f in (run / "robustness").iterdir()) == ["after", "before", "evaluated", "gold"]
    assert main(["evaluate", str(run), "--robustness"]) == 0  # read back, with the run's own settings
    assert capsys.readouterr().out == tried
    assert "made with hints = 2 instead of 1: remove it" in failure(capsys, "evaluate", run, "--robustness", "--hints", "1")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "does it come back?" in page and "Forget quality" in page
    capsys.readouterr()
    assert "other tests (benchmark)" in failure(capsys, "evaluate", run, "--benchmark", "world")
    # What was tried was tried with the model of that evaluation. Another one's is not shown beside it.
    shutil.rmtree(run / "model")
    assert "evaluation belongs to a model that is no longer there" in failure(capsys, "unlearn", run)
    kept = (run / "evaluation").rename(tmp_path / "kept")
    assert "robustness belongs to a model that is no longer there" in failure(capsys, "unlearn", run)
    shutil.copytree(tmp_path / "again" / "model", run / "model")
    assert main(["evaluate", str(run), "--benchmark", "custom", "--data", str(own), "--min-k", "0.3"]) == 0
    capsys.readouterr()
    for stale in (["report"], ["evaluate", "--robustness"]):
        assert "robustness belongs to another evaluation than" in failure(capsys, stale[0], run, *stale[1:])
    shutil.rmtree(run / "evaluation")
    kept.rename(run / "evaluation")
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
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


@pytest.mark.parametrize("text", ["", "{}", '["people"]', "3"])
def test_a_stage_whose_list_of_sets_is_damaged_is_named(world: Path, localized: Path, tmp_path: Path, text: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(localized, tmp_path / "run")
    (run / "scores" / "sets.json").write_text(text)
    shutil.rmtree(run / "plan")
    said = failure(capsys, "localize", *inputs(world, retain=f"people={world / 'retain.jsonl'}"), "-o", run, *QUICK)
    assert "sets.json is damaged" in said and "remove that folder" in said


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
    assert "localize.edges = 0.0 instead of 0.5" in failure(capsys, *again, "--edges", "0.5")
    other = [a.replace("people=", "others=") for a in again]
    assert "inputs.retain" in failure(capsys, *other)
    assert "holds a run that is not a demo" in failure(capsys, "demo", "-o", localized)
    assert "holds a run that is not a demo" in failure(capsys, "demo", "--overwrite", "-o", localized)
    assert main(again) == 0
    assert snapshot(localized) == before


def test_records_that_changed_since_are_not_trained_or_measured_on(
        world: Path, localized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget, run = tmp_path / "forget.jsonl", tmp_path / "run"
    shutil.copy(world / "forget.jsonl", forget)
    assert main(["localize", *inputs(world, forget=forget), "-o", str(run), *QUICK]) == 0
    capsys.readouterr()
    lines = forget.read_text().splitlines(keepends=True)
    forget.write_text("".join(lines[1:]))
    message = f"{run} was made from other records: the set forget has changed since"
    assert message in failure(capsys, "unlearn", run, "--steps", "1", "--lr", "1e-4")
    assert not (run / "model").exists()
    forget.write_text("".join(lines))
    assert main(["unlearn", str(run), "--steps", "1", "--lr", "1e-4", "--objective", "npo"]) == 0
    capsys.readouterr()
    forget.write_text("".join(lines[1:]))
    assert message in failure(capsys, "evaluate", run)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--holdout", "nofile.jsonl"], "nofile.jsonl: no such file"), (["--gold", "{world}"], "holds no config.json"),
    (["--reference", "{world}"], "holds no config.json"), (["--gold", "{world}/run.json"], "run.json"),
    (["--benchmark", "nonsense"], "nonsense"), (["--paraphrase", "{world}/forget.jsonl"], "shares"),
    (["--seed", "99999999999999999999"], "seed = 99999999999999999999 must be a whole number in"),
    (["--harness", "arc_easy"], "or leave them out (--harness '')"),
])
def test_what_is_measured_at_the_end_is_looked_at_first(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                                       message: str) -> None:
    given = [text.format(world=world) for text in arguments]
    (world / "run.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert message in failure(capsys, "run", *inputs(world), "-o", tmp_path / "run", *QUICK, *given)
    assert not (tmp_path / "run").exists()


def test_localizing_again_does_not_mind_what_later_stages_were_told(world: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    again = ["localize", *inputs(world), "-o", str(run), *QUICK]
    assert main(again) == 0
    assert main(["unlearn", str(run), "--lr", "1e-4"]) == 0
    assert main(again) == 0
    capsys.readouterr()
    assert "unlearn.lr = 0.0001 instead of 0.001" in failure(capsys, *again, "--lr", "0.001")
    assert "localize.batch_size" in failure(capsys, *again, "--localize-batch-size", "3")


def test_an_interrupt_says_whether_the_same_command_goes_on(world: Path, localized: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(localized, tmp_path / "run")

    def stopped(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    def told(*argv: str) -> str:
        assert main(list(argv)) == 130
        return capsys.readouterr().err.splitlines()[-1]

    again = ["localize", *inputs(world, retain=f"people={world / 'retain.jsonl'}"), *QUICK, "-o"]
    for name in ("localize", "unlearn", "evaluate", "robustness", "demo"):
        monkeypatch.setattr(f"clue.jobs.{name}", stopped)
    assert told(*again, str(run)) == "clue: interrupted; the same command goes on from here"
    assert told(*again, str(tmp_path / "new")) == told("demo", "-o", str(tmp_path / "demo")) == "clue: interrupted"
    assert told("unlearn", str(run)) == told("evaluate", str(run)) == "clue: interrupted"
    (run / ".training").mkdir()
    (run / ".training" / "training.safetensors").touch()
    assert told("unlearn", str(run)) == "clue: interrupted; the same command goes on from here"
    (run / "evaluation").mkdir()
    assert told("evaluate", str(run), "--robustness") == "clue: interrupted; the same command goes on from here"


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
    told = "clue: interrupted" + "; the same command goes on from here" * any(run.glob("*/"))  # once a stage is there
    assert errors.splitlines()[-1] == told
    assert not run.exists() or not [p for p in run.iterdir() if p.name.startswith(".")]

"""Comparisons made for real on a small world: matched, tuned on held-back records, resumed cell by cell."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import clue
from clue import compare as compare_module
from clue import evaluation_sets
from clue.cli import main
from clue.compare import Row, Task, Tuning, compare, files_task, world_task
from clue.config import Settings
from clue.data.encoding import encode
from clue.data.records import Record, RecordSet
from clue.errors import ClueError, RunError
from clue.evaluate.comparison import VALIDATION
from clue.loading import load_model
from clue.plan import Plan
from clue.run_directory import Run

from .test_cli import failure


def records(name: str, subjects: list[str | None]) -> RecordSet:
    return RecordSet(name, tuple(Record(f"q{i}", "a", subject=subject) for i, subject in enumerate(subjects)))


def test_rows_are_named_as_they_are_read() -> None:
    for name in ("clue", "clue-metric", "wagle", "wagle+metric", "all"):
        assert Row.of(name).name == name
    assert (Row.of("clue").metric, Row.of("sure").metric, Row.of("clue+metric").name) == (True, False, "clue")
    with pytest.raises(ClueError, match="localization 'wagel' is not one of clue, random"):
        Row.of("wagel")
    for lrs, levels in (((), (1.0,)), ((0.0,), (1.0,)), ((float("nan"),), (1.0,)), ((float("inf"),), (1.0,)),
                        ((1.0,), (1.5,)), ((1.0,), ())):
        with pytest.raises(ClueError):
            Tuning(lrs, levels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small world."""
    from clue.data.world import build_world, save_world

    folder = tmp_path_factory.mktemp("world")
    save_world(build_world(n_people=12, n_forget=2), folder)
    return folder


@pytest.fixture(scope="module")
def world(files: Path) -> Path:
    """The same, and a ``model`` that knows most of it."""
    from clue.data.world import build_world, train_model

    folder, small = files, build_world(n_people=12, n_forget=2)
    train_model(small, size="small", steps=120).save_pretrained(folder / "model")
    small.tokenizer.save_pretrained(folder / "model")
    return folder


def command(world: Path, out: Path, *more: str) -> list[str]:
    files = [f"--{name}={world / file}" for name, file in (
        ("model", "model"), ("forget", "forget.jsonl"), ("retain", "retain.jsonl"), ("test", "retain_unseen.jsonl"),
        ("skill", "induction_eval.jsonl"), ("holdout", "holdout.jsonl"), ("paraphrase", "forget_paraphrase.jsonl"))]
    return ["compare", *files, "--retain", str(world / "induction_train.jsonl"), "-o", str(out), "--seeds", "1",
            "--edges", "0.2", "--neurons", "0.2", "--steps", "15", "--lrs", "1e-3,2e-3", "--levels", "0.3,1",
            "--localize-batch-size", "32", *more]


def cells(out: Path) -> dict[str, Any]:
    return {folder.name.removeprefix("cell-files-0-"): json.loads((folder / "cell.json").read_text())
            for folder in out.glob("cell-*")}


def untimed(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell without what differs between two equal runs."""
    points = [{k: v for k, v in p.items() if k != "cpu_seconds"} for p in cell["points"]]
    return {k: v for k, v in cell.items() if k not in ("peak_bytes", "localize_seconds")} | {"points": points}


def sources(records: RecordSet) -> set[str]:
    return {f"{record.prompt} {record.answer}" for record in records}


@pytest.mark.parametrize("tested", [True, False])
def test_what_a_task_of_files_trains_on_chooses_by_and_is_read_on(files: Path, tested: bool) -> None:
    names = ("retain", "induction_train")
    inputs = {"model": str(files / "model"), "forget": str(files / "forget.jsonl"),
              "retain": {name: str(files / f"{name}.jsonl") for name in names}}
    unseen, said = str(files / "retain_unseen.jsonl"), str(files / "retain_paraphrase.jsonl")
    tests = evaluation_sets.Tests(retain={"unseen": unseen, "said": said} if tested else {},
                                  skills={"induction": str(files / "induction_eval.jsonl")})
    task = files_task(inputs, tests, Settings(), 0)
    held = {name: task.sets.retain_extra[f"{VALIDATION}{name}"] for name in names}
    for name in names:  # a fifth is held back, and neither localization nor unlearning sees it
        whole = sources(clue.read(files / f"{name}.jsonl"))
        seen, kept = sources(task.retain[name]), sources(held[name])
        assert seen | kept == whole and not seen & kept and 0.1 < len(kept) / len(whole) < 0.3
    extra = {name: sources(records) for name, records in task.sets.retain_extra.items() if not name.startswith(VALIDATION)}
    if tested:
        assert sources(task.sets.retain) == sources(clue.read(unseen))
        assert extra == {"retain_seen": sources(task.retain["retain"]), "said": sources(clue.read(said))}
    else:  # without tests of its own: what was seen, and nothing that chooses
        assert sources(task.sets.retain) == sources(task.retain["retain"]) and not extra
    assert task.sha256.keys() >= {"forget", *names, "test induction"} and "test forget" not in task.sha256
    if tested:  # a test of that name stays the user's
        sets = files_task(inputs, replace(tests, retain={"unseen": unseen, "retain_seen": said}), Settings(), 0).sets
        assert sources(sets.retain_extra["retain_seen"]) == extra["said"]


def test_what_a_task_of_the_world_trains_on_chooses_by_and_is_read_on() -> None:
    from clue.data.world import build_world

    task, made = world_task("hard", 0, lambda line: None), build_world("hard", 0)
    given = {"retain": made.retain, **made.skills_train}
    assert task.retain.keys() == given.keys()
    for name, records in given.items():
        seen, kept = sources(task.retain[name]), sources(task.sets.retain_extra[f"{VALIDATION}{name}"])
        assert seen | kept == sources(records) and not seen & kept
    assert sources(task.sets.retain) == sources(made.retain_unseen)
    assert not sources(task.sets.retain) & sources(made.retain)
    assert sources(task.sets.retain_extra["retain_seen"]) == sources(task.retain["retain"])
    assert sources(task.sets.retain_extra["retain_paraphrase"]) == sources(made.retain_paraphrase)
    assert sources(task.forget) == sources(task.sets.forget) == sources(made.forget)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_stopped(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    from clue import compare as module

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    names = "clue,random,sure"
    assert main(command(world, whole, "--localization", names, "--json", "-")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in results["groups"][0]["rows"]] == names.split(",")
    assert results["groups"][0]["rows"][1]["against"].keys() == results["groups"][0]["rows"][1]["measures"].keys()
    assert {"forget.accuracy", "forget_paraphrase.accuracy", "retain.accuracy", "retain_seen.accuracy", "skills",
            "mia.loss.auc", "forget.probability"} <= results["groups"][0]["rows"][0]["measures"].keys()
    found = cells(whole)
    assert set(found) == {"clue-npo", "random-npo", "sure-npo"}

    # Matched: as many weights as CLUE's plan, exactly or as many whole rows as fit.
    planned = {name: Plan.load(whole / f"plan-files-0-{name}") for name in names.split(",")}
    clue = planned["clue"].weights_changed
    assert planned["random"].weights_changed == clue
    assert 0 <= clue - planned["sure"].weights_changed < 64
    assert not any(key.startswith(VALIDATION) for cell in found.values() for p in cell["points"] for key in p["measures"])

    # Killed in the middle of the second cell: the first stays, nothing half made, and the rest comes out the same.
    made = module._cell

    def killed(run: Any, task: Any, row: Row, *more: Any) -> Any:
        if row.localization == "random":
            raise KeyboardInterrupt
        return made(run, task, row, *more)

    monkeypatch.setattr(module, "_cell", killed)
    assert main(command(world, stopped, "--localization", names)) == 130
    assert set(cells(stopped)) == {"clue-npo"}
    monkeypatch.setattr(module, "_cell", made)
    first = (stopped / "cell-files-0-clue-npo" / "cell.json").stat().st_mtime_ns
    assert main(command(world, stopped, "--localization", names)) == 0
    assert (stopped / "cell-files-0-clue-npo" / "cell.json").stat().st_mtime_ns == first
    assert {name: untimed(cell) for name, cell in cells(stopped).items()} == {
        name: untimed(cell) for name, cell in found.items()}

    # More rows are added to what is there; other settings, or other records, do not get in.
    capsys.readouterr()
    assert main(command(world, stopped, "--localization", "clue,sure", "--with-metric")) == 0
    captured = capsys.readouterr()
    assert captured.err.count("train  ") == 2 and "sure+metric" in captured.out
    page = (stopped / "compare.html").read_text()
    assert "sure+metric" in page and "<script" not in page
    assert main(command(world, stopped, "--localization", "clue", "--floor", "0.3")) == 2
    assert "floor = " in capsys.readouterr().err
    changed = tmp_path / "changed"
    shutil.copytree(world, changed)
    lines = (world / "retain_unseen.jsonl").read_text().splitlines(keepends=True)
    (changed / "retain_unseen.jsonl").write_text("".join(lines[1:]))
    manifest = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(manifest).replace(str(world), str(changed)))
    assert main(command(changed, stopped, "--localization", "clue")) == 2
    assert "other records of files-0" in capsys.readouterr().err


def test_robustness_is_that_of_the_model_where_training_ended(world: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Relearning moves all weights, those outside the plan too; the model of the cell is the one it starts from."""
    more = ["--localization", "random", "--lrs", "0.003", "--levels", "0.01,1", "--relearn-steps", "3",
            "--relearn-share", "0.5"]
    assert main(command(world, tmp_path / "run", *more, "--robustness")) == 0
    assert "relearned" in capsys.readouterr().out
    (cell,) = cells(tmp_path / "run").values()
    tried = [point for point in cell["points"] if "relearned.probability" in point["measures"]]
    assert tried == cell["points"][-1:]
    measures = tried[0]["measures"]
    assert {f"int{bits}.{key}" for bits in (4, 8) for key in ("accuracy", "probability", "retain")} <= measures.keys()
    assert measures["relearned.probability"] > measures["forget.probability"] - 1e-3
    assert measures["int8.probability"] == pytest.approx(measures["forget.probability"], abs=0.05)
    reference = json.loads((tmp_path / "run" / "reference-files-0" / "reference.json").read_text())["before"]
    assert reference["int8.probability"] == pytest.approx(reference["forget.probability"], abs=0.05)


def test_an_objective_that_goes_on_when_all_is_forgotten_is_read_at_its_end(world: Path, tmp_path: Path) -> None:
    more = ["--localization", "random", "--lrs", "0.003", "--levels", "0.3", "--objective", "npo,auto"]
    assert main(command(world, tmp_path / "run", *more, "--steps", "30", "--check-every", "1")) == 0
    read = {cell["objective"]: cell["points"] for cell in cells(tmp_path / "run").values()}
    (first,), (last,) = read["npo"], read["auto"]  # npo-stranger: the world's records name their subjects
    assert first["steps"] < 30 and first["at_goal"]  # as soon as the level is reached
    assert last["steps"] == 30 and not last["at_goal"]  # the way to strangers is longer


def test_a_look_ends_once_its_level_is_out_of_reach(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clue.evaluate import EvaluationSets, memorization

    model, tokenizer = load_model(str(world / "model"), Settings())
    forget = clue.read(world / "retain.jsonl")  # of all lengths
    task = Task("files", 0, lambda: (model, tokenizer), None, forget, {}, EvaluationSets(forget=forget, retain=forget))
    asked: list[int] = []
    score = memorization.score
    monkeypatch.setattr(memorization, "score", lambda model, examples, **given: (
        asked.append(len(examples)), score(model, examples, **given))[1])

    def look(floor: float, least: float) -> tuple[float, int]:
        settings = replace(Settings(), unlearn=replace(Settings().unlearn, floor=floor),
                           evaluate=replace(Settings().evaluate, batch_size=4))
        training = compare_module._Training(model, tokenizer, task, settings, Tuning((1.0,), (1.0,)), None)
        asked.clear()
        return training._forgotten(least), sum(asked)

    examples = encode(forget, tokenizer, append_eos=False)
    found = score(model, examples, pad=0, batch_size=len(examples))
    right, probability = memorization.exact_match(found) == 1, memorization.probability(found)
    for floor in (0.2, 0.6, 0.95):
        share = float((~right & (probability <= floor)).mean())
        assert look(floor, 0.0) == (share, len(forget)) == look(floor, share)
        more, read = look(floor, min(share + 0.5, 1.0))
        assert share <= more < min(share + 0.5, 1.0) and read < len(forget)


def test_forget_quality_is_against_gold_also_in_cells_made_later(world: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for names in ("all", "all,random"):  # the second time gold is not measured again
        assert main([*command(world, out, "--localization", names, "--gold", str(world / "model"), "--ratio", "0.3"),
                     "--steps", "3", "--lrs", "1e-3"]) == 0
    reference = json.loads((out / "reference-files-0" / "reference.json").read_text())
    assert reference["before"]["forget_quality"] == reference["gold"]["forget_quality"] == 1.0  # gold is the model itself
    found = cells(out)
    assert found.keys() == {"all-npo-at-0.3", "random-npo-at-0.3"}
    assert all(0 <= point["measures"]["forget_quality"] <= 1 for cell in found.values() for point in cell["points"])
    # Gold as the file of its evaluation, a reference model, and a row of which no plan can be made.
    again = tmp_path / "again"
    assert main([*command(world, again, "--localization", "memflex,all", "--gold", str(out / "reference-files-0" / "gold.json"),
                          "--reference", str(world / "model"), "--ratio", "0.001"), "--steps", "3", "--lrs", "1e-3"]) == 0
    other = cells(again)
    assert other["memflex-npo-at-0.001"]["points"] == []
    assert "no plan" in capsys.readouterr().out and "no plan" in (again / "compare.html").read_text()
    assert "memflex finds nothing that fits" in other["memflex-npo-at-0.001"]["failed"]["0.001"]
    measures, mine = (kept["points"][0]["measures"] for kept in (found["all-npo-at-0.3"], other["all-npo-at-0.001"]))
    assert mine["forget_quality"] == measures["forget_quality"] and "mia.reference.auc" in mine


def test_a_cell_that_diverges_stays_in_the_table(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--localization", "random", "--lrs", "1e30", "--clip", "0"]
    assert main(command(world, tmp_path / "run", *more)) == 0
    captured = capsys.readouterr()
    assert "diverged" in captured.out
    cell, = cells(tmp_path / "run").values()
    assert cell["points"] == [] and "1e+30" in cell["failed"]
    assert "diverged" in (tmp_path / "run" / "compare.html").read_text()
    # With a plan to match, random weights are others: both cells are kept.
    assert main(command(world, tmp_path / "run", "--localization", "clue,random", *more[2:])) == 0
    assert cells(tmp_path / "run").keys() == {"random-npo-at-0.2", "clue-npo", "random-npo"}


@pytest.mark.parametrize(("options", "message"), [
    (["--benchmark", "world", "--model", "m"], "--benchmark world brings its own model and records: leave out --model"),
    (["--benchmark", "world", "--gold", "m"], "leave out tests"),
    (["--model", "m", "--forget", "f"], "name a --benchmark, or give --model, --forget and --retain"),
    (["--benchmark", "moon"], "invalid choice: 'moon'"),
    (["--benchmark", "world", "--seeds", "0"], "--seeds 0 must be at least 1"),
    (["--benchmark", "world", "--localization", "clue,wagel"], "localization 'wagel' is not one of"),
    (["--benchmark", "world", "--objective", "npo,gaa"], "objective = 'gaa' is not one of"),
    (["--benchmark", "world", "--lrs", "1e-4,fast"], "--lrs '1e-4,fast': expected numbers"),
    (["--benchmark", "world", "--levels", "0.5,2"], "levels of forgetting must lie in"),
    (["--benchmark", "world", "--at", "0.7"], "--at 0.7 is not one of the --levels"),
    (["--benchmark", "world", "--ratio", "0"], "--ratio 0 must lie in"),
    (["--benchmark", "world", "--floor", "0"], "floor = 0 counts nothing as forgotten"),
    (["--benchmark", "world", "--localization", ","], "expected names, separated by commas"),
])
def test_mistakes_are_one_sentence_and_leave_nothing(options: list[str], message: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *options, "-o", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_records_that_changed_are_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.update(data={"x-0": {"forget": "old"}})
    empty = records("forget", [None])
    task = Task("x", 0, lambda: (None, None), None, empty, {}, None, {"forget": "new"})  # type: ignore[arg-type]
    from clue.config import Settings

    with pytest.raises(RunError, match="other records of x-0"):
        compare(run, [lambda: task], [], [], Settings(), Tuning((1.0,), (1.0,)))


def test_a_model_that_changed_between_cells_is_refused(world: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    files = shutil.copytree(world, tmp_path / "world")
    assert main(command(files, tmp_path / "run", "--localization", "random", "--lrs", "2e-3")) == 0
    weights = load_file(files / "model" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, files / "model" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    again = command(files, tmp_path / "run", "--localization", "random,all", "--lrs", "2e-3")
    assert "holds cells made from another model of files-0" in failure(capsys, *again)
    assert len(cells(tmp_path / "run")) == 1

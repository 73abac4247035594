"""Run directories: never half written, never written over what was there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from clue.config import Settings
from clue.errors import RunError
from clue.run_directory import MANIFEST, Run, demo_folder, write_json

SETTINGS = Settings(seed=3).to_dict()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_new_run_records_what_made_it(tmp_path: Path) -> None:
    Run.create(tmp_path / "a" / "run", SETTINGS, inputs={"model": "m"})
    manifest = json.loads((tmp_path / "a" / "run" / MANIFEST).read_text())
    assert manifest["settings"] == SETTINGS
    assert manifest["seed"] == 3
    assert manifest["inputs"] == {"model": "m"}
    assert set(manifest["versions"]) >= {"clue", "python", "torch", "transformers", "numpy"}
    assert manifest["hardware"]["cores"] >= 1
    assert Run.open(tmp_path / "a" / "run").manifest == manifest


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    Run.create(tmp_path, SETTINGS)
    assert Run.open(tmp_path).stages() == []


@pytest.mark.parametrize("content", ["notes.txt", MANIFEST, ".hidden"])
def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="choose"):
        Run.create(tmp_path, SETTINGS)
    assert snapshot(tmp_path) == before


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="file is a file"):
            Run.create(path, SETTINGS)
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_what_a_stage_records_is_there_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, SETTINGS)
    update = Run.update

    def full(self: Run, **fields: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Run, "update", full)
    found = ""
    with pytest.raises(OSError, match="No space"), run.stage("model", lambda: {"verification": found}) as folder:
        (folder / "weights").write_text("moved")
        found = "exact"
    assert run.has("model")
    with pytest.raises(OSError, match="No space"):  # as long as there is none
        Run.open(tmp_path)
    monkeypatch.setattr(Run, "update", update)
    assert Run.open(tmp_path).manifest["verification"] == "exact"
    assert json.loads((tmp_path / MANIFEST).read_text())["verification"] == "exact"
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["weights"]


def test_what_is_no_run_of_ours_is_told(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    (tmp_path / "model").write_text("mine")
    with pytest.raises(RunError, match="model is a file where the folder of a stage belongs: move it away"):
        run.has("model")
    with pytest.raises(RunError, match="does not say which model and records it was made from"):
        _ = run.inputs
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({name: value for name, value in manifest.items() if name != "settings"}))
    with pytest.raises(RunError, match=r"is damaged \(it has no settings\)"):
        Run.open(tmp_path)


def test_a_stage_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    with pytest.raises(ZeroDivisionError), run.stage("scores") as folder:
        (folder / "part").write_text("half")
        raise ZeroDivisionError
    assert not run.has("scores")
    assert set(snapshot(tmp_path)) == {MANIFEST}
    with run.stage("scores") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "part").write_text("whole")
        assert not run.has("scores")
    assert run.has("scores")
    assert (run.path("scores") / "deep" / "part").read_text() == "whole"
    assert run.stages() == ["scores"]


def test_a_finished_stage_is_not_written_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    with run.stage("plan") as folder:
        (folder / "part").write_text("first")
    with pytest.raises(RunError, match="there already"), run.stage("plan") as folder:
        (folder / "part").write_text("second")
    assert (run.path("plan") / "part").read_text() == "first"


@pytest.mark.parametrize("name", ["", "..", ".git", "a/b"])
def test_a_stage_has_a_plain_name(tmp_path: Path, name: str) -> None:
    run = Run.create(tmp_path / "run", SETTINGS)
    with pytest.raises(ValueError, match="plain folder name"), run.stage(name):
        pass


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    with pytest.raises(RunError, match="has no plan yet: make it with `clue localize`"):
        run.require("plan", "localize")


def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from clue.run_directory import Run
        run = Run.start({str(tmp_path / "run")!r}, {SETTINGS!r}, {{"model": "m"}})
        with run.stage("pairs") as folder:
            (folder / "part").write_text("whole")
        with run.stage("scores") as folder:
            (folder / "part").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    run = Run.start(tmp_path / "run", SETTINGS, {"model": "m"})
    assert run.stages() == ["pairs"]
    with run.stage("scores") as folder:
        assert list(folder.iterdir()) == []
        (folder / "part").write_text("whole")
    assert run.stages() == ["pairs", "scores"]
    assert set(snapshot(tmp_path / "run")) == {MANIFEST, "pairs", "pairs/part", "scores", "scores/part"}


def test_a_stage_that_another_process_works_on_is_refused(tmp_path: Path) -> None:
    """Until that has ended, were it by a kill; other stages are free meanwhile."""
    script = textwrap.dedent(f"""
        import sys
        from clue.run_directory import Run
        run = Run.open({str(tmp_path)!r})
        with run.claimed("model"), run.stage("model") as folder:
            (folder / "part").write_text("half")
            print("there", flush=True)
            sys.stdin.read()
    """)
    run = Run.create(tmp_path, SETTINGS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == "there\n"
        before = snapshot(tmp_path)
        for _ in range(2):
            with pytest.raises(RunError, match="another process is working on .*model: wait"), run.stage("model"):
                pass
        assert snapshot(tmp_path) == before
        with run.stage("evaluation"):
            pass
        other.kill()
    with run.claimed("model"):
        with run.stage("model") as folder:
            assert list(folder.iterdir()) == []
            (folder / "part").write_text("whole")
        assert run.has("model")
    assert set(snapshot(tmp_path)) == {MANIFEST, "evaluation", "model", "model/part"}
    with pytest.raises(RunError, match="there already"), run.claimed("model"):
        pass


def test_a_claim_leaves_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    with pytest.raises(ZeroDivisionError), run.claimed("model"):
        raise ZeroDivisionError
    with run.claimed("model"):
        with pytest.raises(ZeroDivisionError), run.stage("model") as folder:
            (folder / "part").write_text("half")
            raise ZeroDivisionError
        with run.stage("model") as folder:  # once more, without having let go of it
            assert list(folder.iterdir()) == []
    assert set(snapshot(tmp_path)) == {MANIFEST, "model"}


def test_going_on_needs_the_same_settings_and_inputs(tmp_path: Path) -> None:
    Run.start(tmp_path / "run", SETTINGS, {"model": "m"})
    before = snapshot(tmp_path)
    other = Settings.from_dict({"localize": {"edges": 0.5}, "seed": 3}).to_dict()
    with pytest.raises(RunError, match=r"localize.edges = 0.0 instead of 0.5"):
        Run.start(tmp_path / "run", other, {"model": "m"})
    with pytest.raises(RunError, match=r"inputs.model = m instead of n"):
        Run.start(tmp_path / "run", SETTINGS, {"model": "n"})
    with pytest.raises(RunError, match=r"inputs.retain.b = None instead of x"):
        Run.start(tmp_path / "run", SETTINGS, {"model": "m", "retain": {"b": "x"}})
    assert snapshot(tmp_path) == before


def test_discard_takes_back_exactly_what_create_made(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    before = snapshot(tmp_path)
    Run.create(tmp_path / "a" / "b" / "run", SETTINGS).discard()
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", SETTINGS).discard()
    assert snapshot(tmp_path / "empty") == {}


def test_discard_keeps_finished_stages_and_other_runs(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", SETTINGS)
    Run.open(tmp_path / "run").discard()
    assert (tmp_path / "run" / MANIFEST).exists()
    with run.stage("pairs"):
        pass
    run.discard()
    assert Run.open(tmp_path / "run").stages() == ["pairs"]


@pytest.mark.parametrize(("text", "message"),
                         [("{", "damaged"), ("[]", "not of format"), ('{"format": 99}', "not of format")])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RunError, match=message):
        Run.open(tmp_path)


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RunError, match="is not a run directory"):
            Run.open(path)


def test_update_keeps_the_old_manifest_when_it_fails(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SETTINGS)
    run.update(data={"forget": "abc"})
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        run.update(data=float("nan"))
    assert snapshot(tmp_path) == before
    assert run.manifest["data"] == Run.open(tmp_path).manifest["data"] == {"forget": "abc"}


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert snapshot(tmp_path) == {"a.json": b'{\n "a": 1\n}\n'}


def test_a_demo_is_replaced_only_by_a_finished_one(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    Run.create(demo, SETTINGS, kind="demo")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="add --overwrite"), demo_folder(demo, overwrite=False):
        pass
    with pytest.raises(KeyboardInterrupt), demo_folder(demo, overwrite=True):
        Run.create(demo, SETTINGS, kind="demo", note="half")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == before
    with demo_folder(demo, overwrite=True):
        Run.create(demo, SETTINGS, kind="demo", note="new")
    assert Run.open(demo).manifest["note"] == "new"
    assert set(snapshot(tmp_path)) == {"demo", f"demo/{MANIFEST}"}


@pytest.mark.parametrize("name", ["new", "deep/new", "empty"])
def test_a_failed_demo_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError), demo_folder(tmp_path / name, overwrite=False):
        with Run.create(tmp_path / name, SETTINGS, kind="demo").stage("world"):
            pass
        raise ZeroDivisionError
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_but_a_demo_is_replaced(tmp_path: Path, overwrite: bool) -> None:
    Run.create(tmp_path / "run", SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    before = snapshot(tmp_path)
    for name, message in (("run", "not a demo"), ("mine", "other files")):
        with pytest.raises(RunError, match=message), demo_folder(tmp_path / name, overwrite=overwrite):
            pass
    assert snapshot(tmp_path) == before

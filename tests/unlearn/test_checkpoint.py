"""Checkpoints: a killed training goes on to the same bits, and a checkpoint of another training is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clue.config import UnlearnSettings
from clue.data.encoding import encode
from clue.data.records import Record, RecordSet
from clue.errors import ClueError, RunError
from clue.types import Role
from clue.unlearn import unlearn
from clue.unlearn.checkpoint import FORMAT, PATIENCE, SECONDS, Checkpoint, identity
from clue.unlearn.objectives import OBJECTIVES, Answers

ROOT = Path(__file__).parents[2]
SETTINGS = UnlearnSettings(objective="npo", lr=1e-2, steps=6, batch_size=2, warmup=0, floor=0.0)


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    """What ends a training on its way, as a killed one ends."""
    def on_step(entry: dict[str, Any]) -> None:
        if entry["step"] == step:
            raise KeyboardInterrupt

    return on_step


def test_killed_trainings_end_with_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.unlearn.killed", str(tmp_path)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"two", "joint", "rounding", "budget"}
    for name, case in found.items():
        assert set(case["signals"]) == {9}, name  # every one of them was killed on its way
        assert case["plain"]["began"] == 1 < case["resumed"]["began"], name
        assert case["resumed"]["weights"] == case["plain"]["weights"], name
        assert case["resumed"]["log"] == case["plain"]["log"], name
        assert case["files"] == ["training.safetensors"], name


def test_a_checkpoint_of_the_last_step_ends_there(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                  sets: Any, bits: Any) -> None:
    # Both stages stop before their steps run out: a training that goes on from the last checkpoint has to see that again.
    settings = replace(SETTINGS, stages="two", steps=40, floor=0.9, check_every=1, lr=3e-2)
    found = []
    for _ in range(2):
        model = make_model()
        log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), settings,
                      checkpoint=tmp_path, every=1)
        found.append((bits(model), log))
    (first, log), (again, resumed) = found
    assert log.stopped_early and log.steps < 40
    log.save(tmp_path / "log")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_text() == (tmp_path / "log").read_text()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_what_a_checkpoint_holds(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    retain = {"retain": sets["retain"]}
    unlearn(model, tokenizer, sets["forget"], retain, plan, SETTINGS, checkpoint=tmp_path / "kept", every=4)
    with safe_open(tmp_path / "kept" / "training.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    planned = sum(t.size for name, t in tensors.items() if name.startswith("weights/"))
    assert planned == plan.weights_changed
    moments = sum(t.size for name, t in tensors.items() if name.rpartition("/")[2].startswith("exp_avg"))
    assert moments == 2 * plan.weights_changed
    assert len(tensors["log/forget_loss"]) == 6  # the last step's, whatever `every` says
    # Nothing of the size of the model.
    assert sum(t.nbytes for t in tensors.values()) < 4 * plan.weights_changed * 4 + 40_000


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                          sets: Any) -> None:
    """The limit on file sizes stands in for a full disk: writing fails the same way."""
    def train(every: int, stop: int = 0) -> None:
        model = make_model()
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), SETTINGS,
                checkpoint=tmp_path, every=every, on_step=stop_after(stop))

    with pytest.raises(KeyboardInterrupt):
        train(every=4, stop=5)
    before = (tmp_path / "training.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            train(every=1)  # goes on behind step 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert refusal.value.filename == str(tmp_path / "training.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["training.safetensors"]
    assert (tmp_path / "training.safetensors").read_bytes() == before


def test_no_room_for_the_last_checkpoint_costs_no_training(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                           sets: Any) -> None:
    model = make_model()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), SETTINGS,
                      checkpoint=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert log.steps == 6 and not list(tmp_path.iterdir())


def test_a_file_where_the_folder_belongs_is_refused_before_the_training(
        tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    (tmp_path / "file").write_text("mine")
    model = make_model()
    with pytest.raises(RunError, match="file is a file, and a folder is needed: give another path"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), SETTINGS,
                checkpoint=tmp_path / "file", on_step=lambda step: pytest.fail("a step was made"))


def test_the_clock_decides_where_nobody_does(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    retain = {"retain": sets["retain"]}
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, tokenizer, sets["forget"], retain, mixed_plan(model), SETTINGS, checkpoint=tmp_path / "never",
                on_step=stop_after(6))
    assert not (tmp_path / "never").exists()  # over in less than a minute
    now = iter(range(0, 10_000, 45))
    monkeypatch.setattr("clue.unlearn.checkpoint.time.monotonic", lambda: next(now))
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, tokenizer, sets["forget"], retain, mixed_plan(model), SETTINGS, checkpoint=tmp_path / "now",
                on_step=stop_after(6))
    assert (tmp_path / "now" / "training.safetensors").exists()


def test_a_training_killed_before_its_first_step_that_moved_keeps_its_retain_weight(
        tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    calls: list[int] = []

    def forget(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        loss = OBJECTIVES["npo"].forget(answers, refusals, settings)
        return loss * float("nan") if len(calls) < 3 else loss

    def train() -> Any:
        model = make_model()
        return unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model),
                       replace(SETTINGS, retain_weight=0.7, bad_steps=5), objective=replace(OBJECTIVES["npo"], forget=forget),
                       checkpoint=tmp_path, every=1)

    with pytest.raises(KeyboardInterrupt):
        train()
    log = train()
    assert log.skipped == 2 and log.retain_weight.tolist() == [0.7] * 4


def test_same_lengths_are_not_the_same_training(make_model: Any, make_plan: Any, tokenizer: Any) -> None:
    model = make_model()

    def told(prompt: str, index: list[int]) -> dict[str, Any]:
        plan = make_plan(model, {"model.layers.0.mlp.up_proj.weight": (0, {Role.CONFLICT: index})})
        return identity(model, plan, SETTINGS, OBJECTIVES["npo"], 0, [encode([Record(prompt, "paris")], tokenizer)])

    first = told("where does ada live", [1, 2])
    assert told("where does ada live", [1, 2]) == first
    assert told("where does bob live", [1, 2]) == first | {"records": told("where does bob live", [1, 2])["records"]}
    assert told("where does bob live", [1, 2])["records"] != first["records"]
    assert told("where does ada live", [1, 3])["plan"] != first["plan"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    keeper = Checkpoint(tmp_path, every=1, identity={"seed": 0})
    keeper.save({"done": 3}, {"weights": torch.zeros(2)})
    saved = keeper.load()
    assert saved is not None and saved.numbers == {"done": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clue.unlearn.checkpoint.FORMAT", FORMAT + 1)
        with pytest.raises(RunError, match=f"has format {FORMAT}, this version reads {FORMAT + 1}: remove it"):
            keeper.load()


def test_slow_writing_makes_checkpoints_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(*given: Any, **named: Any) -> None:
        clock[0] += 30
        save_file(*given, **named)

    monkeypatch.setattr("clue.unlearn.checkpoint.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("safetensors.torch.save_file", slow)
    keeper = Checkpoint(tmp_path, every=0, identity={})
    for waited, due in ((SECONDS - 1, False), (1, True)):
        clock[0] += waited
        assert keeper.due() is due
    keeper.save({}, {"weights": torch.zeros(2)})
    assert PATIENCE * 30 > SECONDS
    for waited, due in ((PATIENCE * 30 - 1, False), (1, True)):
        clock[0] += waited
        assert keeper.due() is due


def test_another_training_is_refused(tmp_path: Path, make_model: Any, mixed_plan: Any, make_plan: Any, tokenizer: Any,
                                     sets: Any, bits: Any) -> None:
    retain = {"retain": sets["retain"]}
    model = make_model()
    plan = mixed_plan(model)

    def again(model: Any, plan: Any, settings: UnlearnSettings = SETTINGS, forget: RecordSet = sets["forget"],
              **keywords: Any) -> None:
        unlearn(model, tokenizer, forget, retain, plan, settings, checkpoint=tmp_path, **keywords)

    again(model, plan, every=3)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    other = make_plan(model, {"model.layers.0.mlp.up_proj.weight": (0, {Role.CONFLICT: [1]})})
    before = bits(make_model())
    for text, arguments in {
        "another model": (make_model(1), plan), "another plan": (make_model(), other),
        "lr = 0.01 instead of 0.1": (make_model(), plan, replace(SETTINGS, lr=0.1)),
        "another records": (make_model(), plan, SETTINGS, RecordSet("f", sets["forget"].records[:2])),
        # Whose tokens are the same: its subject decides what stands in for it.
        "another records ": (make_model(), plan, SETTINGS, RecordSet("f", tuple(
            replace(r, subject=r.prompt.split()[0]) for r in sets["forget"]))),
    }.items():
        with pytest.raises(RunError, match=f"training.safetensors is of a training with {text.strip()}: go on with"):
            again(*arguments)
    for name in ("retain", "retain_logits"):
        changed = replace(OBJECTIVES["npo"], **{name: OBJECTIVES["npo-kl"].retain if name == "retain" else True})
        with pytest.raises(RunError, match=rf"of a training with {name} = .* instead of"):
            again(make_model(), plan, objective=changed)
    with pytest.raises(RunError, match="seed = 0 instead of 5"):
        again(make_model(), plan, seed=5)
    with pytest.raises(RunError, match="another model"):
        again(model, plan)  # which has been trained already
    untouched = make_model()
    with pytest.raises(RunError):
        again(untouched, plan, seed=5)
    assert all(np.array_equal(before[name], now) for name, now in bits(untouched).items())
    assert file.read_bytes() == content
    for damaged in (content[: len(content) // 2], b"", b"\x00" * 64):
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="is damaged .* remove it to begin the training anew"):
            again(make_model(), plan)
        assert file.read_bytes() == damaged
    with pytest.raises(ClueError, match="every = -1"):
        again(make_model(), plan, every=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_costs_the_training_no_bit(dtype: torch.dtype, tmp_path: Path, make_model: Any, mixed_plan: Any,
                                                tokenizer: Any, sets: Any, bits: Any) -> None:
    found = []
    for checkpoint in (None, tmp_path):
        model = make_model(dtype=dtype)
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), SETTINGS,
                checkpoint=checkpoint, every=1)
        found.append(bits(model))
    assert all(np.array_equal(found[1][name], now) for name, now in found[0].items())

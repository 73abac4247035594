"""Trainings that are killed and resumed, each in a process of its own: run by test_checkpoint.py as one subprocess.

It imports torch once and forks, in one thread, a child per training, which kills itself with SIGKILL at a given step or
inside a checkpoint's writing. Prints one JSON document: by case, the outcome of the run that nobody killed and that of
the others, which were resumed until they ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clue.config import UnlearnSettings
from clue.plan import Plan, Slice
from clue.unlearn import unlearn

from .conftest import FORGET, MIXED, RETAIN, SKILL, build_model, build_tokenizer, records

COMMON: dict[str, Any] = {"lr": 1e-2, "batch_size": 2, "warmup": 1, "floor": 0.0, "weight_decay": 0.1, "forget_share": 0.5}
#: name -> (settings, whether weights are bf16, steps between checkpoints, where it is killed: a step of this process, or
#: the number of the checkpoint in whose writing)
CASES: dict[str, tuple[dict[str, Any], bool, int, list[int | str]]] = {
    "two": ({"stages": "two", "objective": "npo-cf", "steps": 10, "metric_every": 3}, False, 2, [4, "half 2", 3, "whole 1"]),
    "joint": ({"objective": "npo-kl", "steps": 7, "metric": True}, True, 1, ["whole 3", 2, "half 1", 3]),
    "rounding": ({"stages": "joint", "objective": "npo-stranger", "steps": 6, "rounding": "stochastic", "metric": False},
                 True, 1, [2, "half 1", 2]),
    "budget": ({"stages": "alternating", "objective": "graddiff", "steps": 9, "metric": False, "retain_budget": 0.1,
                "validation": 0.4, "forget_target": 0.0}, False, 3, [1, 5, 3]),
}


def train(settings: dict[str, Any], half: bool, every: int, folder: Path | None, kill: int | str | None) -> None:
    """One training of this process; what came out of it goes to ``outcome.json``."""
    model = build_model(dtype=torch.bfloat16 if half else torch.float32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in MIXED}
    slices = tuple(Slice(name, axis, role, np.array(index, dtype=np.int64)) for name, (axis, roles) in MIXED.items()
                   for role, index in roles.items())
    plan = Plan((), np.zeros(0, dtype=np.uint8), slices, shapes)
    seen: list[int] = []

    def on_step(entry: dict[str, Any]) -> None:
        seen.append(entry["step"])
        if len(seen) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    if isinstance(kill, str):
        die_while_writing(*kill.split())
    sets = {"retain": records("retain", RETAIN), "skill": records("skill", SKILL)}
    log = unlearn(model, build_tokenizer(), records("forget", FORGET), sets, plan, UnlearnSettings(**COMMON | settings),
                  seed=3, on_step=on_step, checkpoint=folder, every=every)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().view(torch.int16 if half else torch.int32).numpy().tobytes())
    series = {name: np.asarray(value).tolist() for name, value in asdict(log).items()}
    outcome = {"weights": digest.hexdigest(), "log": repr(series), "began": seen[0] if seen else None}
    (Path(sys.argv[1]) / "outcome.json").write_text(json.dumps(outcome))


def die_while_writing(how: str, number: str) -> None:
    """In checkpoint ``number``: when ``half`` of its bytes are in the file, or when they all are and it has no name yet."""
    import safetensors.torch

    original, count = safetensors.torch.save_file, 0

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        nonlocal count
        count += 1
        original(tensors, path, metadata)
        if count == int(number):
            if how == "half":
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file


def forked(*arguments: Any) -> tuple[int, dict[str, Any] | None]:
    """Train in a child: the signal that ended it, and its outcome if it came to its end."""
    outcome = Path(sys.argv[1]) / "outcome.json"
    outcome.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(*arguments)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a training failed")
    return os.WTERMSIG(status), json.loads(outcome.read_text()) if outcome.exists() else None


def main() -> None:
    torch.set_num_threads(1)
    build_model(), build_tokenizer()  # imports what the children would import each for themselves
    import transformers.modeling_layers  # noqa: F401

    import clue.unlearn.loop

    assert clue.unlearn.loop
    found = {}
    for name, (settings, half, every, kills) in CASES.items():
        folder = Path(sys.argv[1]) / name
        _, plain = forked(settings, half, every, None, None)
        # Killed again and again on the way of one training, which then comes to its end.
        signals = [forked(settings, half, every, folder, kill)[0] for kill in kills]
        _, resumed = forked(settings, half, every, folder, None)
        found[name] = {"plain": plain, "signals": signals, "resumed": resumed,
                       "files": sorted(path.name for path in folder.iterdir()),
                       "bytes": (folder / "training.safetensors").stat().st_size}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Checkpoints: the state of a training at an optimizer step, in one file that is there whole or not at all.

Only planned slices are stored, with their moments: the model itself is where it was loaded from. What belongs together
is written together, ``training.safetensors`` with a JSON document in its header; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.atomic import replacing
from ..errors import RunError
from ..processes import agreed, place
from ..provenance import fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import UnlearnSettings
    from ..data.encoding import Example
    from ..plan import Plan
    from .objectives import Objective

FORMAT = 1
FILE = "training.safetensors"

#: Where nobody says how often: a checkpoint so many seconds after the last one, or so many times as long as writing
#: that one took, if this is longer.
SECONDS, PATIENCE = 60.0, 50.0


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: plain numbers by name, and tensors by path."""

    numbers: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def tensors_of(self, group: str) -> dict[str, Tensor]:
        """The tensors directly in a group, by name."""
        start = group + "/"
        return {name[len(start):]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def nested(self, group: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of the groups in a group, by the names of both."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors_of(group).items():
            inner, _, key = name.rpartition("/")
            found.setdefault(inner, {})[key] = tensor
        return found


class Checkpoint:
    """The checkpoint in a folder, which processes that share a training share too: the first writes it, all read it.

    Args:
        folder: made when the first checkpoint is written.
        every: steps between two of them; 0 goes by the clock (:data:`SECONDS`).
        identity: what the training is, from :func:`identity`.

    Raises:
        RunError: a file is where the folder belongs.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int, identity: Mapping[str, Any]) -> None:
        if Path(folder).exists() and not Path(folder).is_dir():
            raise RunError(f"checkpoint: {folder} is a file, and a folder is needed: give another path")
        self._file, self._every, self._identity = Path(folder) / FILE, every, dict(identity)
        self._steps, self._took, self._last = 0, 0.0, time.monotonic()

    def due(self, last: bool = False) -> bool:
        """Whether this process is to write one now, as after the ``last`` step; called once after every step."""
        self._steps += 1
        if place()[0] != 0:
            return False
        if last:
            return True
        if self._every:
            return self._steps % self._every == 0
        return time.monotonic() - self._last >= max(SECONDS, PATIENCE * self._took)

    def save(self, numbers: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Replace the checkpoint. ``numbers`` are plain values, ``tensors`` are nested by name."""
        from safetensors.torch import save_file

        began = time.monotonic()
        document = {"format": FORMAT, "identity": self._identity,
                    "numbers": {name: None if isinstance(value, float) and math.isnan(value) else value
                                for name, value in numbers.items()}}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in _flat(tensors)}
        with replacing(self._file) as temporary:
            save_file(flat, temporary, metadata={"clue": json.dumps(document, allow_nan=False)})
        self._last = time.monotonic()
        self._took = self._last - began

    def load(self) -> Saved | None:
        """The checkpoint that is there, if there is one. What killed writers left beside it is removed.

        Raises:
            RunError: it is damaged, of a training with another model, plan, setting or record, or not there for all
                processes.
        """
        from safetensors import SafetensorError, safe_open

        if place()[0] == 0:
            for partial in self._file.parent.glob(f".{FILE}.*.partial"):
                partial.unlink(missing_ok=True)
        there = self._file.exists()
        if bool(agreed(there)) != there:
            raise RunError(f"{self._file} is not the same for all processes: put the run into a folder that all of them see")
        if not there:
            return None
        try:
            with safe_open(self._file, framework="pt") as file:
                document = json.loads(file.metadata()["clue"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            numbers = {name: math.nan if value is None else value for name, value in document["numbers"].items()}
            recorded, version = document["identity"], document["format"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunError(f"{self._file} is damaged ({error}): remove it to begin the training anew") from None
        if version != FORMAT:
            raise RunError(f"{self._file} has format {version}, this version reads {FORMAT}: remove it to begin the"
                           " training anew")
        for name, value in self._identity.items():
            if recorded.get(name) == value:
                continue
            if isinstance(value, dict):
                old = recorded.get(name, {})
                inner = next(key for key in {**value, **old} if value.get(key) != old.get(key))
                what = f"{inner} = {old.get(inner)!r} instead of {value.get(inner)!r}"
            elif name == "seed":
                what = f"{name} = {recorded.get(name)!r} instead of {value!r}"
            else:
                what = f"another {name}"
            raise RunError(f"{self._file} is of a training with {what}: go on with the same, or remove that file to begin"
                           " anew")
        return Saved(numbers, tensors)


def identity(model: nn.Module, plan: Plan, settings: UnlearnSettings, objective: Objective, seed: int,
             examples: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """What decides a training, as plain values: its settings, and digests of model, plan and tokenised records."""
    slices = hashlib.sha256()
    for s in plan.slices:
        slices.update(f"{s.parameter} {plan.shapes[s.parameter]} {s.axis} {s.role}\n".encode())
        slices.update(s.index.tobytes())
    records = hashlib.sha256()
    for group in examples:
        records.update(f"{len(group)} records\n".encode())
        for example in group:
            records.update(f"{len(example.input_ids)} {example.answer_start}\n".encode())
            records.update(example.input_ids.tobytes())
            # Who it is about, and what it is told from, decide the twins.
            records.update(json.dumps((example.record.subject, example.record.corrupted)).encode())
    return {"model": fingerprint(model), "plan": slices.hexdigest(), "settings": asdict(settings),
            "objective": {f.name: _named(getattr(objective, f.name)) for f in fields(objective)}, "seed": seed,
            "records": records.hexdigest()}


def _named(value: Any) -> Any:
    """A plain value as it is, a function by where it was defined: which of two functions of one name it is, nothing tells."""
    if value is None or isinstance(value, bool):
        return value
    known = value if hasattr(value, "__qualname__") else type(value)
    return f"{known.__module__}.{known.__qualname__}"


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tensors.items():
        found += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found

"""A run directory: one folder per finished stage, and ``run.json`` saying what made them.

A stage is written under a hidden name, flushed to disk and renamed, so a folder with a stage's name is always whole:
``run.has(name)`` is how a killed run knows where to go on. What a stage adds to ``run.json`` travels in its folder, so that one
is never there without the other. A folder that holds anything else is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .data.atomic import flush, flush_tree, naming, write_atomically
from .doctor import hardware, versions
from .errors import RunError

if sys.platform != "win32":
    import fcntl

MANIFEST = "run.json"
FORMAT = 1
#: In a stage's folder: what the stage adds to the manifest, until it is there.
PENDING = "pending.json"


class Run:
    """An open run directory.

    Attributes:
        folder: the run directory.
        manifest: contents of ``run.json``: format, kind, settings, seed, versions, hardware, and what :meth:`update`
            added.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], made: tuple[Path, ...] | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._made = made  # folders this process made, outermost first; None for a run that was there already
        self._claimed: set[str] = set()  # stages that this process is working on

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: Mapping[str, Any], *, kind: str = "run",
               **fields: Any) -> Run:
        """Start a new run in a folder that does not exist yet, or is empty.

        Args:
            settings: plain values, recorded as they are (``Settings.to_dict()``).
            kind: ``"run"``, or ``"demo"`` for one that ``clue demo --overwrite`` may replace.
            fields: more of the manifest, such as ``inputs``.

        Raises:
            RunError: the path is a file, holds another run or any other files (it is left as it was), or cannot be
                written.
        """
        folder = Path(path)
        require_free(folder)
        manifest = {"format": FORMAT, "kind": kind, "seed": settings.get("seed"), "settings": dict(settings), **fields,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": versions(), "hardware": hardware()}
        missing = [f for f in (folder, *folder.parents) if not f.exists()][::-1]
        run = cls(folder, manifest, tuple(missing))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.update()
        except OSError as error:
            run.discard()
            raise RunError(f"{folder} cannot be written ({error.strerror}): choose another folder with -o") from None
        return run

    @classmethod
    def start(cls, path: str | os.PathLike[str], settings: Mapping[str, Any], inputs: Mapping[str, Any],
              later: Mapping[str, Any] | None = None) -> Run:
        """Go on with a run of the very same settings and inputs, or :meth:`create` a new one.

        Args:
            later: the default settings of stages that come later. Their commands may have changed the run's since, so a setting
                that has its default here is not held against it.

        Raises:
            RunError: as :meth:`create`, or the folder holds a run of other settings or inputs; names the first that
                differs.
        """
        if not (Path(path) / MANIFEST).exists():
            return cls.create(path, settings, inputs=dict(inputs))
        run = cls.open(path)
        wanted = _flat({**settings, "inputs": inputs})
        found = _flat({**run.manifest.get("settings", {}), "inputs": run.manifest.get("inputs", {})})
        defaults = _flat(later or {})
        for name in (*wanted, *found):
            if wanted.get(name) not in (found.get(name), defaults.get(name, found.get(name))):
                other = differing({name: found.get(name)}, {name: wanted.get(name)})
                raise RunError(f"{run.folder} holds another run already, with {other}: choose another folder with -o")
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open an existing run.

        Raises:
            RunError: there is no run at the path, or its ``run.json`` is damaged or of another version.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{folder} is not a run directory (it has no {MANIFEST}): make one with `clue localize`") \
                from None
        except OSError as error:
            raise RunError(f"{folder / MANIFEST} cannot be read ({error.strerror})") from None
        except ValueError:
            raise RunError(f"{folder / MANIFEST} is damaged: start a new run in another folder") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise RunError(f"{folder / MANIFEST} is not of format {FORMAT}, which this version of CLUE reads: "
                           "start a new run in another folder")
        if not isinstance(manifest.get("settings"), dict):
            raise RunError(f"{folder / MANIFEST} is damaged (it has no settings): start a new run in another folder")
        run = cls(folder, manifest)
        for stage in run.stages():
            run._take(stage)
        return run

    @property
    def inputs(self) -> dict[str, Any]:
        """Model and records that the run is made from.

        Raises:
            RunError: the manifest does not name them.
        """
        inputs = self.manifest.get("inputs")
        if not isinstance(inputs, dict) or not {"model", "forget", "retain"} <= set(inputs):
            raise RunError(f"{self.folder / MANIFEST} does not say which model and records it was made from: it is damaged, or"
                           " no run of `clue localize`; start a new run in another folder")
        return inputs

    def has(self, stage: str) -> bool:
        """Whether the stage has finished.

        Raises:
            RunError: a file is where its folder belongs.
        """
        path = self.path(stage)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file where the folder of a stage belongs: move it away")
        return path.is_dir()

    def path(self, stage: str) -> Path:
        """Folder of a stage (whether or not it exists)."""
        return self.folder / stage

    def require(self, stage: str, command: str) -> Path:
        """Folder of a finished stage.

        Raises:
            RunError: the stage has not finished; names ``command`` as the one that makes it.
        """
        if not self.has(stage):
            raise RunError(f"{self.folder} has no {stage} yet: make it with `clue {command}`")
        return self.path(stage)

    def stages(self) -> list[str]:
        """Names of the finished stages, sorted."""
        return sorted(f.name for f in self.folder.iterdir() if f.is_dir() and not f.name.startswith("."))

    @contextmanager
    def stage(self, name: str, record: Callable[[], Mapping[str, Any]] = dict) -> Iterator[Path]:
        """Write a stage: yields an empty folder that takes the stage's name when the block ends without an exception.

        ``record`` is asked at its end for fields of the manifest (:meth:`update`), which are there as soon as the stage is.
        On an exception the folder is removed. Whatever an earlier, killed attempt left is removed first.

        Raises:
            RunError: the stage has finished already, or another process is working on it.
            OSError: the disk is full; the run is as it was before the stage.
        """
        with self.claimed(name):
            temporary = self._partial(name)
            temporary.mkdir(exist_ok=True)
            for entry in temporary.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            with naming(self.path(name)):
                yield temporary
                if fields := record():
                    write_json(temporary / PENDING, fields)
                flush_tree(temporary)
                temporary.rename(self.path(name))
                flush(self.folder)
        self._take(name)

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Keep a stage to this process from before it is written, where the system has locks. These end with the
        process, however it ends.

        Raises:
            RunError: as :meth:`stage`.
        """
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"stage: expected a plain folder name, got {name!r}")
        if name in self._claimed:
            yield
            return
        self._require_unfinished(name)
        temporary = self._partial(name)
        temporary.mkdir(exist_ok=True)
        with _locked(temporary) as alone:
            self._require_unfinished(name)  # another process may have, meanwhile
            if not alone:
                raise RunError(f"another process is working on {self.path(name)}: wait for it, or stop it")
            self._claimed.add(name)
            try:
                yield
            finally:
                self._claimed.discard(name)
                if not self.path(name).exists():
                    shutil.rmtree(temporary, ignore_errors=True)

    def _partial(self, name: str) -> Path:
        """The folder that a stage is written in; its lock is the stage's."""
        return self.folder / f".{name}.partial"

    def _require_unfinished(self, name: str) -> None:
        if self.has(name):
            raise RunError(f"{self.path(name)} is there already: start a new run, or remove that folder to redo it")

    def _take(self, stage: str) -> None:
        """Put what a finished stage adds to the manifest there."""
        pending = self.path(stage) / PENDING
        if pending.exists():
            self.update(**json.loads(pending.read_text(encoding="utf-8")))
            pending.unlink(missing_ok=True)

    def update(self, **fields: Any) -> None:
        """Put fields into the manifest and write it, whole or not at all. Values must be plain JSON."""
        manifest = {**self.manifest, **fields}
        write_json(self.folder / MANIFEST, manifest)
        self.manifest = manifest

    def discard(self) -> None:
        """Take back a run that this process created and in which no stage has finished; any other is left alone."""
        if self._made is None:
            return
        if self.folder.is_dir() and not self.stages():
            for entry in list(self.folder.iterdir()):
                if entry.name == MANIFEST:
                    entry.unlink()
                elif entry.name.endswith(".partial"):
                    shutil.rmtree(entry, ignore_errors=True)
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # never made, or holds something by now
                break


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder to itself, until the block ends; where there are no locks it is taken to."""
    if sys.platform == "win32":
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # whoever had it has just removed it
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock may be of what whoever had it has just removed, or made the stage.
            alone = folder.exists() and os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except BlockingIOError:
            alone = False
        except OSError:  # a file system without locks
            alone = True
        yield alone
    finally:
        os.close(descriptor)


def require_free(folder: str | os.PathLike[str]) -> None:
    """Raise :class:`RunError` unless a new run may be made at this path: nothing there, or an empty folder."""
    folder = Path(folder)
    blocking = next((f for f in (folder, *folder.parents) if f.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise RunError(f"{blocking} is a file: choose another folder with -o")
    if blocking != folder:
        return
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise RunError(f"{folder} cannot be read ({error.strerror}): choose another folder with -o") from None
    if MANIFEST in entries:
        raise RunError(f"{folder} holds another run already: choose another folder with -o")
    if entries:
        raise RunError(f"{folder} holds other files (for example {entries[0]}): choose an empty or new folder with -o")


@contextmanager
def demo_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> Iterator[None]:
    """The place of a new demo, which is made whole by the block or not at all.

    With ``overwrite`` an earlier demo there is put aside meanwhile; on an exception it is put back.

    Raises:
        RunError: the folder holds an earlier run and ``overwrite`` is off, or something that ``clue demo`` did not make
            (it is left as it was).
    """
    folder = Path(folder).resolve()
    aside = None
    if (folder / MANIFEST).exists():
        if Run.open(folder).manifest.get("kind") != "demo":
            raise RunError(f"{folder} holds a run that is not a demo: choose another folder with -o")
        if not overwrite:
            raise RunError(f"{folder} holds an earlier demo: add --overwrite to replace it, or choose another folder"
                           " with -o")
        aside = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    else:
        require_free(folder)
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if aside is not None:
            aside.rename(folder)
        elif not missing:
            folder.mkdir()
        for parent in missing[1:]:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    if aside is not None:
        shutil.rmtree(aside)


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which settings have other values now, with both, in words; empty where none has."""
    return " and ".join(f"{name} = {_said(old.get(name))} instead of {_said(value)}" for name, value in new.items()
                        if value != old.get(name))


def _said(value: Any) -> Any:
    return "nothing" if value == "" else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON document, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat

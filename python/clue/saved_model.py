"""The weights of a saved model as raw bits, under the names a plan knows them by, read and patched where they lie.

A folder of safetensors files is mapped, not loaded: only what is asked for is read. A patched copy differs from the
original in the patched bytes alone; headers, other files and their layout are copied as they are. The format is four
lines long (https://huggingface.co/docs/safetensors): eight bytes with the header's length, the header, the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .data.atomic import new_folder
from .errors import DeltaError
from .weights import from_file, is_stack, part_name

if TYPE_CHECKING:
    import torch

Bits = npt.NDArray[np.unsignedinteger[Any]]

#: Bytes per element of the formats' dtypes.
WIDTH = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
         "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
#: torch's name of each that a parameter can have.
_TORCH = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
          "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
#: Key of the metadata of a delta's file, which is no part of a model even where it lies in its folder.
MARK = "clue.delta"


@dataclass(frozen=True)
class _Piece:
    """A tensor of a file, or one member of a stack there: part of the rows of a weight."""

    file: Path
    offset: int  # in bytes, from the start of the file
    bits: Bits  # mapped, read only


class SavedModel:
    """A folder of safetensors files; every expert's matrices count as weights of their own."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Map the files.

        Raises:
            DeltaError: there is no such folder, it holds no safetensors weights, or one of the files is damaged.
        """
        self.folder = Path(folder)
        if not self.folder.exists():
            raise DeltaError(f"{folder} does not exist: give the folder of a saved model; hub ids are not read here")
        self._home: dict[str, dict[int, _Piece]] = {}
        self._dtype: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name != "plan.safetensors":
                self._map(file)
        if not self._home:
            raise DeltaError(f"{folder} holds no model weights: give a folder with .safetensors files")

    def _map(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy"):  # checks the header and the offsets, reads no tensor
                pass
            content: npt.NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
        except (SafetensorError, ValueError, OSError) as error:
            raise DeltaError(f"{file} is not a readable safetensors file ({error})") from None
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(content[8:start].tobytes())
        if MARK in (header.pop("__metadata__", None) or {}):
            return
        for stored, entry in header.items():
            if entry["dtype"] not in WIDTH:
                raise DeltaError(f"{file}: {stored} has the dtype {entry['dtype']}, which this version does not know")
            width, (first, last) = WIDTH[entry["dtype"]], entry["data_offsets"]
            bits: Bits = content[start + first:start + last].view(f"<u{width}").reshape(entry["shape"])
            for name, position, member in from_file(stored, entry["shape"]):
                part = bits if member is None else bits[member]
                offset = start + first + (0 if member is None else member * part.nbytes)
                twin = self._home.setdefault(name, {}).get(position)
                if twin is not None:
                    raise DeltaError(f"{name} is in {twin.file} and in {file}, and which of the two a model is loaded from no"
                                     " file says: take away the one that is left over")
                self._home[name][position] = _Piece(file, offset, part)
                if self._dtype.setdefault(name, entry["dtype"]) != entry["dtype"]:
                    raise DeltaError(f"{file}: the parts of {name} have two dtypes, {self._dtype[name]} and"
                                     f" {entry['dtype']}")

    def keys(self) -> set[str]:
        """Names of all weights."""
        return set(self._home)

    def dtype(self, name: str) -> str:
        """Dtype of a weight, as safetensors spells it (``BF16``)."""
        return self._dtype[name]

    def bits(self, name: str) -> Bits:
        """The weight as unsigned integers of its own width and shape, read only."""
        pieces = self._pieces(name)
        return pieces[0].bits if len(pieces) == 1 else np.concatenate([piece.bits for piece in pieces])

    def copy_with(self, out: str | os.PathLike[str], changed: Iterator[tuple[str, Bits]]) -> None:
        """Write a new folder, whole or not at all: a copy of everything here in which some weights have other bits.

        Args:
            out: the new folder; nothing may be there yet, or an empty folder.
            changed: names and new bits of whole weights, asked for one at a time.

        Raises:
            DeltaError: ``out`` lies within the folder, or cannot be written (a full disk); nothing is left of it then.
            RunError: something is at ``out`` already.
        """
        from .run_directory import require_free

        out = Path(out)
        require_free(out)
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise DeltaError(f"{out} lies within {self.folder}: choose another folder with -o")
        try:
            with new_folder(out) as temporary:
                shutil.copytree(self.folder, temporary, copy_function=shutil.copyfile, dirs_exist_ok=True)
                for name, bits in changed:
                    first = 0
                    for piece in self._pieces(name):
                        rows = len(piece.bits)
                        with open(temporary / piece.file.name, "r+b") as file:
                            file.seek(piece.offset)
                            file.write(np.ascontiguousarray(bits[first:first + rows]).data)
                        first += rows
        except OSError as error:
            # shutil.Error lists (from, to, reason) of everything that could not be copied.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
            raise DeltaError(f"{out} cannot be written ({reason}): free some space, or choose another folder with"
                             " -o") from None

    def fingerprint(self) -> str:
        """What :func:`clue.provenance.fingerprint` says of this model loaded in the dtype of its files, without loading it.

        Returns:
            The hexadecimal digest; empty where the folder does not say what model it is (it has no ``config.json``), or
            the model has weights that are not in its files.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if not (self.folder / "config.json").is_file():
            return ""
        try:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)  # else it asks, and waits
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception:  # of any kind: of packages that are missing, damaged configurations
            return ""
        names: dict[int, list[str]] = {}  # of one parameter; tied ones have several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        same = {name: tied for tied in names.values() for name in tied}
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            home = next((n for n in same.get(name, [name]) if n in self._home or part_name(n, 0) in self._home), name)
            members = [home] if home in self._home else [part_name(home, i) for i in range(len(tensor))]
            if not all(member in self._home for member in members):
                return ""
            dtype = next((torch_name for torch_name, d in _TORCH.items() if d == self._dtype[members[0]]), None)
            digest.update(f"{name} {tuple(tensor.shape)} torch.{dtype}\n".encode())
            for member in members:
                digest.update(np.ascontiguousarray(self.bits(member)).data)
        return digest.hexdigest()

    def _pieces(self, name: str) -> list[_Piece]:
        return [piece for _, piece in sorted(self._home[name].items())]


class ModelInMemory:
    """The parameters of a model in memory, as :class:`SavedModel` shows those of a folder.

    Raises:
        DeltaError: they are sharded over processes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from .unlearn.slices import SliceParameters

        self._model = model
        self._home: dict[str, Callable[[], torch.Tensor]] = {}
        # A trainer's PlanCallback keeps copies of planned slices in the model for a while, which are no weights of it.
        copies = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SliceParameters))
        for name, parameter in model.named_parameters():
            if name.startswith(copies):
                continue
            require_whole(name, parameter)
            if is_stack(name, parameter.shape):
                for member in range(len(parameter)):
                    self._home[part_name(name, member)] = lambda p=parameter, i=member: p.detach()[i]  # type: ignore[misc]
            else:
                self._home[name] = parameter.detach

    def keys(self) -> set[str]:
        """Names of all weights; those that share storage count once."""
        return set(self._home)

    def dtype(self, name: str) -> str:
        """Dtype of a weight, as safetensors spells it (``BF16``)."""
        return dtype_of(self._home[name]())

    def bits(self, name: str) -> Bits:
        """The weight as unsigned integers of its own width and shape."""
        return as_numpy(as_integers(self._home[name]()))

    def fingerprint(self) -> str:
        """See :func:`clue.provenance.fingerprint`."""
        from .provenance import fingerprint

        return fingerprint(self._model)


def compared(before: SavedModel | ModelInMemory, after: SavedModel | ModelInMemory) -> tuple[set[str], list[str]]:
    """Names of the weights that two versions of a model are compared by, and which of them one of the two lacks.

    Files may hold buffers and tied copies, which are no parameters of a model in memory: next to one, its names count.
    """
    names = {name for model in (before, after) if isinstance(model, ModelInMemory) for name in model.keys()}  # noqa: SIM118
    names = names or before.keys() | after.keys()
    return names, sorted(names - (before.keys() & after.keys()))


def require_whole(name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`DeltaError` where this process holds a part of a weight alone."""
    from .unlearn.shards import is_sharded

    if is_sharded(tensor):
        raise DeltaError(f"{name} is sharded over processes, each of which holds a part of it: save the whole model, and give"
                         " its folder")


def dtype_of(tensor: torch.Tensor) -> str:
    """A tensor's dtype as safetensors spells it."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _TORCH.get(name, name)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the tensor's bits as integers of their own width, in which torch can select and write."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(width)


def as_numpy(integers: torch.Tensor) -> Bits:
    """Integers of :func:`as_integers` as unsigned ones in main memory."""
    bits: Bits = integers.cpu().numpy().view(f"<u{integers.element_size()}")
    return bits

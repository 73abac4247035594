"""Delta: what unlearning did to a model, as a patch file of the planned slices only.

For every planned slice a delta holds the exclusive or of its bits before and after. Adding a difference of floating-point
numbers rounds; this is exact in every dtype and is its own inverse, so the one file leads both ways. It also holds the
SHA-256 of the slice at both ends: a model that has neither is another one, a model that has the second is changed
already, and either is refused before a bit of it is touched. Weights that no plan names are neither read nor compared
when a delta is applied.

The file is one safetensors file: per weight ``index.i``, the rows or columns, and ``bits.i``, the exclusive or in byte
planes (all lowest bytes first), deflated: training moves the low bits of a number much more often than its high ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .data.atomic import write_atomically
from .errors import DeltaError
from .saved_model import (
    MARK,
    WIDTH,
    Bits,
    ModelInMemory,
    SavedModel,
    as_integers,
    as_numpy,
    compared,
    dtype_of,
    require_whole,
)
from .values import ByValue
from .weights import is_flat, parameter_of, shape_of, view_of, weight_of

if TYPE_CHECKING:
    import torch

    from .plan import Plan

FORMAT = 1
End = Literal["before", "after"]


@dataclass(frozen=True, eq=False)
class Change(ByValue):
    """What happened to the planned rows or columns of one weight.

    Attributes:
        parameter: name as in a plan (see :class:`clue.Slice`).
        axis: 0 when ``index`` names rows (entries, for a bias), 1 when it names columns.
        shape: shape of the whole weight, as the name means it.
        dtype: its dtype as safetensors spells it (``BF16``).
        index: int64 [k], sorted and unique.
        xor: unsigned integers as wide as the dtype, shaped as the slice: bits before xor bits after.
        before, after: SHA-256 (hexadecimal) of the slice's bytes, row by row.
    """

    parameter: str
    axis: int
    shape: tuple[int, ...]
    dtype: str
    index: npt.NDArray[np.int64]
    xor: Bits
    before: str
    after: str

    def __post_init__(self) -> None:
        where = f"the change of {self.parameter}"
        if self.dtype not in WIDTH or not 0 <= self.axis < len(self.shape):
            raise DeltaError(f"{where} has dtype {self.dtype} or axis {self.axis}, which cannot be")
        if self.index.dtype != np.int64 or self.index.ndim != 1 or len(self.index) == 0 \
                or np.any(np.diff(self.index) <= 0) or self.index[0] < 0 or self.index[-1] >= self.shape[self.axis]:
            raise DeltaError(f"{where} needs a sorted, unique index within 0..{self.shape[self.axis] - 1}")
        if self.xor.shape != _slice_shape(self.shape, self.axis, len(self.index)) \
                or self.xor.dtype != f"<u{WIDTH[self.dtype]}":
            raise DeltaError(f"{where} has {self.xor.dtype} bits of shape {self.xor.shape}, which does not fit {self.dtype}"
                             f" and its index")

    @property
    def changed(self) -> int:
        """How many of the planned weights differ between the two ends."""
        return int(np.count_nonzero(self.xor))


@dataclass(frozen=True, eq=False)
class Delta(ByValue):
    """The way from one model to another and back.

    Attributes:
        changes: one per planned weight, by name.
        before, after: :func:`clue.provenance.fingerprint` of the two models; empty where a folder does not say what model
            it holds. Recorded for people: what a delta fits is decided by the slices alone.
    """

    changes: tuple[Change, ...]
    before: str = ""
    after: str = ""

    def __repr__(self) -> str:
        return f"<Delta: {self.changed} of {self.planned} planned weights of {len(self.changes)} slices changed>"

    @property
    def planned(self) -> int:
        """Number of scalar weights that the delta covers."""
        return sum(change.xor.size for change in self.changes)

    @property
    def changed(self) -> int:
        """Number of scalar weights that differ between the two ends."""
        return sum(change.changed for change in self.changes)

    @classmethod
    def between(cls, before: torch.nn.Module | str | os.PathLike[str], after: torch.nn.Module | str | os.PathLike[str],
                plan: Plan) -> Delta:
        """Compare two models bit by bit, one weight at a time.

        Args:
            before, after: folder of a saved model, or a model in memory.

        Raises:
            DeltaError: the two are not versions of one model, the plan is for another, or weights outside the plan
                changed, which a delta does not hold; or a model in memory is sharded over processes.
        """
        old, new = _open(before), _open(after)
        names, lacking = compared(old, new)
        if lacking:
            raise DeltaError(f"the models before and after do not hold the same weights (for example {lacking[0]}):"
                             " they are not two versions of one model")
        planned = {weight_of(name): name for name in plan.parameters()}
        if unknown := [name for name in planned if name not in names]:
            raise DeltaError(f"the plan edits {unknown[0]}, which these models do not have: it was made for another"
                             " model")
        found = []
        for name in sorted(names):
            a, b, dtype = old.bits(name), new.bits(name), old.dtype(name)
            if a.shape != b.shape or dtype != new.dtype(name):
                raise DeltaError(f"{name} is {dtype} of shape {a.shape} before, and {new.dtype(name)} of shape {b.shape}"
                                 " after: save both models alike")
            differs = a != b
            if name in planned:
                edited = planned[name]
                a, b, differs = (bits.reshape(-1) if is_flat(edited) else bits for bits in (a, b, differs))
                if a.shape != tuple(plan.shapes[edited]):
                    raise DeltaError(f"the plan edits {edited} of shape {tuple(plan.shapes[edited])}, these models' is"
                                     f" {a.shape}: it was made for another model")
                slices = [s for s in plan.slices if s.parameter == edited]
                axis, index = slices[0].axis, np.unique(np.concatenate([s.index for s in slices])).astype(np.int64)
                first, last = (np.ascontiguousarray(np.take(bits, index, axis)) for bits in (a, b))
                found.append(Change(edited, axis, a.shape, dtype, index, first ^ last, _digest(first), _digest(last)))
                differs[(slice(None),) * axis + (index,)] = False
            if count := int(np.count_nonzero(differs)):
                raise DeltaError(f"{name} changed outside the plan too, in {count} of {a.size} weights, and a delta holds"
                                 " planned weights only: see `clue plan verify`")
        return cls(tuple(found), old.fingerprint(), new.fingerprint())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; equal deltas give equal bytes.

        Raises:
            DeltaError: the file cannot be written.
        """
        from safetensors.numpy import save

        arrays: dict[str, npt.NDArray[Any]] = {}
        for i, change in enumerate(self.changes):
            arrays[f"index.{i}"] = np.ascontiguousarray(change.index, dtype=np.int64)
            arrays[f"bits.{i}"] = _deflated(change.xor)
        document = json.dumps({
            "format": FORMAT, "before": self.before, "after": self.after, "planned": self.planned,
            "changed": self.changed,
            "changes": [{"parameter": c.parameter, "axis": c.axis, "shape": list(c.shape), "dtype": c.dtype,
                         "before": c.before, "after": c.after} for c in self.changes]}, sort_keys=True)
        # One entry: the format's writer keeps several in no order.
        content = save(arrays, {MARK: json.dumps([document, _checksum(document, arrays)])})
        try:
            write_atomically(path, content)
        except OSError as error:
            raise DeltaError(f"{path} cannot be written ({error.strerror}): free some space, or choose another file"
                             " with -o") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a file of :meth:`save`.

        Raises:
            DeltaError: it is no delta, is damaged or cut short, or has a format that this version does not read.
        """
        from safetensors import SafetensorError, safe_open

        if os.path.isdir(path):
            raise DeltaError(f"{path} is a folder: give the file of a delta, behind the model")
        damaged = f"{path} is damaged, or no delta"
        try:
            with safe_open(path, framework="numpy") as file:
                marked = (file.metadata() or {}).get(MARK)
                arrays = {name: file.get_tensor(name) for name in file.keys()} if marked else {}  # noqa: SIM118
        except FileNotFoundError:
            raise DeltaError(f"{path} does not exist: make a delta with `clue delta make`") from None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DeltaError(f"{damaged} ({error}): make it again with `clue delta make`") from None
        if not marked:
            raise DeltaError(f"{path} is no delta: give a file of `clue delta make`")
        try:
            text, checksum = json.loads(marked)
            if checksum != _checksum(text, arrays):
                raise ValueError("its checksum is wrong")
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise DeltaError(f"{path} has format {document['format']}, this version reads {FORMAT}")
            changes = []
            for i, c in enumerate(document["changes"]):
                index, shape = arrays[f"index.{i}"], tuple(c["shape"])
                xor = _inflated(arrays[f"bits.{i}"], _slice_shape(shape, c["axis"], len(index)), WIDTH[c["dtype"]])
                changes.append(Change(c["parameter"], c["axis"], shape, c["dtype"], index, xor, c["before"], c["after"]))
            return cls(tuple(changes), document["before"], document["after"])
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, MemoryError, zlib.error) as error:
            raise DeltaError(f"{damaged} ({error}): make it again with `clue delta make`") from None

    def apply(self, model: torch.nn.Module) -> None:
        """Turn the model before into the model after, in place.

        Raises:
            DeltaError: the model has other weights in a planned slice, another dtype or shape, is the model after
                already, or is sharded over processes; not a bit of it is changed then.
        """
        self._patch(model, "before")

    def revert(self, model: torch.nn.Module) -> None:
        """Turn the model after into the model before, in place; refuses like :meth:`apply`."""
        self._patch(model, "after")

    def apply_folder(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
        """Write the model after into a new folder, whole or not at all. All else in the folder is copied as it is.

        Args:
            folder: safetensors files of the model before, in any layout and number.

        Raises:
            DeltaError: as :meth:`apply`, or ``out`` cannot be written.
            RunError: something is at ``out`` already.
        """
        self._patch_folder(folder, out, "before")

    def revert_folder(self, folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
        """Write the model before into a new folder, from the model after; see :meth:`apply_folder`."""
        self._patch_folder(folder, out, "after")

    def _patch(self, model: torch.nn.Module, start: End) -> None:
        import torch

        parameters = dict(model.named_parameters(remove_duplicate=False))
        views: dict[str, torch.Tensor] = {}
        for change in self.changes:
            shape = shape_of(parameters, change.parameter)
            if shape is not None:
                require_whole(change.parameter, parameters[parameter_of(change.parameter)])
                tensor = view_of(parameters[parameter_of(change.parameter)].detach(), change.parameter)
                _fits(change, shape, dtype_of(tensor))
                if tensor.is_meta:
                    raise DeltaError(f"{change.parameter} has no values in memory: load the model whole first")
                views[change.parameter] = as_integers(tensor)

        def read(change: Change) -> Bits | None:
            view = views.get(change.parameter)
            return None if view is None else as_numpy(
                view.index_select(change.axis, torch.from_numpy(change.index).to(view.device)).contiguous())

        self._check(read, start)
        begun: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
        try:
            for change in self.changes:
                view = views[change.parameter]
                index = torch.from_numpy(change.index).to(view.device)
                xor = torch.from_numpy(change.xor.view(f"<i{change.xor.itemsize}" if change.xor.itemsize > 1 else "u1"))
                before = view.index_select(change.axis, index)
                begun.append((view, change.axis, index, before.cpu()))
                view.index_copy_(change.axis, index, before ^ xor.to(view.device))
        except BaseException:  # a device out of memory, Ctrl-C at any place: back to where it was
            for view, axis, index, kept in begun:
                view.index_copy_(axis, index, kept.to(view.device))
            raise

    def _patch_folder(self, folder: str | os.PathLike[str], out: str | os.PathLike[str], start: End) -> None:
        saved = SavedModel(folder)

        def changed() -> Iterator[tuple[str, Bits]]:
            for change in self.changes:
                bits = saved.bits(weight_of(change.parameter)).copy()
                seen = bits.reshape(-1) if is_flat(change.parameter) else bits
                seen[(slice(None),) * change.axis + (change.index,)] ^= change.xor
                yield weight_of(change.parameter), bits

        self.check_folder(saved, start)
        saved.copy_with(out, changed())

    def check_folder(self, saved: SavedModel, start: End = "before") -> None:
        """Raise :class:`DeltaError` unless a saved model is the one at this end."""

        def read(change: Change) -> Bits | None:
            name = weight_of(change.parameter)
            if name not in saved.keys():  # noqa: SIM118 -- not a mapping
                return None
            bits = saved.bits(name)
            bits = bits.reshape(-1) if is_flat(change.parameter) else bits
            _fits(change, bits.shape, saved.dtype(name))
            return np.ascontiguousarray(np.take(bits, change.index, change.axis))

        self._check(read, start)

    def _check(self, read: Callable[[Change], Bits | None], start: End) -> None:
        """Raise unless every slice is the one at the start, and will be the one at the other end."""
        other = []
        for change in self.changes:
            bits = read(change)
            if bits is None:
                raise DeltaError(f"the delta changes {change.parameter}, which this model does not have: it was made for"
                                 " another model")
            digest, first, last = _digest(bits), change.before, change.after
            if start == "after":
                first, last = last, first
            if digest == first:
                if _digest(bits ^ change.xor) != last:
                    raise DeltaError(f"the delta's bits of {change.parameter} are damaged: make it again with `clue delta"
                                     " make`")
            elif digest == last:
                other.append(change.parameter)
            else:
                raise DeltaError(f"{change.parameter} has other weights than the model that the delta was made for: it"
                                 " was made for another model")
        moved = [change.parameter for change in self.changes if change.before != change.after]
        if other and other == moved:
            raise DeltaError("the delta is applied to this model already: to undo it, revert" if start == "before" else
                             "the delta is not applied to this model: there is nothing to revert")
        if other:
            raise DeltaError(f"{other[0]} of this model is as it was {'after' if start == 'before' else 'before'} the change,"
                             " other weights are not: the model is neither of the two that the delta was made for")


def _open(model: torch.nn.Module | str | os.PathLike[str]) -> SavedModel | ModelInMemory:
    return SavedModel(model) if isinstance(model, (str, os.PathLike)) else ModelInMemory(model)


def _fits(change: Change, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(shape) != change.shape:
        raise DeltaError(f"the delta changes {change.parameter} of shape {change.shape}, this model's is {tuple(shape)}:"
                         " it was made for another model")
    if dtype != change.dtype:
        raise DeltaError(f"the delta changes {change.parameter} in {change.dtype}, this model has it in {dtype}: load or"
                         f" save the model in {change.dtype}")


def _slice_shape(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], count, *shape[axis + 1:])


def _digest(bits: Bits) -> str:
    return hashlib.sha256(np.ascontiguousarray(bits).data).hexdigest()


def _deflated(xor: Bits) -> npt.NDArray[np.uint8]:
    planes = np.ascontiguousarray(np.ascontiguousarray(xor).reshape(-1).view(np.uint8).reshape(-1, xor.itemsize).T)
    return np.frombuffer(zlib.compress(planes.data, 6), dtype=np.uint8)


def _inflated(packed: npt.NDArray[np.uint8], shape: tuple[int, ...], width: int) -> Bits:
    size = math.prod(shape) * width
    stream = zlib.decompressobj()
    content = stream.decompress(packed.tobytes(), size + 1)  # never more than the slice, whatever the file says
    if len(content) != size or not stream.eof:
        raise ValueError(f"{len(content)} bytes where a slice has {size}")
    planes = np.frombuffer(content, dtype=np.uint8).reshape(width, -1)
    bits: Bits = np.array(planes.T, order="C").reshape(-1).view(f"<u{width}").reshape(shape)
    return bits


def _checksum(document: str, arrays: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(document.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

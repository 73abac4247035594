"""Formulas as arrays, and their files: DIMACS (SAT Competition) and both WCNF formats (MaxSAT Evaluation).

Clauses stand one after the other in one int32 array, each ended by 0, as in the files. Files are parsed natively;
memory grows with the file, never with what its header claims.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .. import _core
from ..data.atomic import write_atomically
from ..errors import FormulaError

Literals = npt.NDArray[np.int32]
Source = str | os.PathLike[str] | BinaryIO
_LARGEST = 2**31 - 1
_MAGIC: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}
_PIECE = 1 << 24  # bytes read at once: signals are answered in between


@dataclass(frozen=True, eq=False)
class CNF:
    """A formula in conjunctive normal form.

    Attributes:
        n_variables: variables are 1 .. n_variables, whether or not a clause uses them.
        clauses: int32, each clause ended by 0.
    """

    n_variables: int
    clauses: Literals

    def __post_init__(self) -> None:
        object.__setattr__(self, "clauses", as_literals(self.clauses, "clauses"))
        _check_variables(self.n_variables, _core.largest_variable(self.clauses, "clauses"))

    @classmethod
    def from_lists(cls, clauses: Iterable[Iterable[int]], n_variables: int | None = None) -> CNF:
        """A formula from clauses of literals; as many variables as they use, if not said otherwise."""
        flat = flatten(clauses)
        return cls(_core.largest_variable(flat, "clauses") if n_variables is None else n_variables, flat)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.clauses == 0))

    def lists(self) -> list[list[int]]:
        """The clauses as lists of literals."""
        return _lists(self.clauses)


@dataclass(frozen=True, eq=False)
class WCNF:
    """Hard clauses that must hold, and soft ones of which each costs its weight where it does not.

    Attributes:
        n_variables: variables are 1 .. n_variables.
        hard, soft: int32, each clause ended by 0.
        weights: int64 [soft clauses] >= 0, at most 2^60 in all.
        header: the file it was read from had a ``p wcnf`` line, the format before 2022.
    """

    n_variables: int
    hard: Literals
    soft: Literals
    weights: npt.NDArray[np.int64]
    header: bool = False

    def __post_init__(self) -> None:
        for name in ("hard", "soft"):
            object.__setattr__(self, name, as_literals(getattr(self, name), name))
        object.__setattr__(self, "weights", _as_integers(self.weights, "weights", np.int64))
        largest = max(_core.largest_variable(self.hard, "hard"), _core.check_soft(self.soft, self.weights))
        _check_variables(self.n_variables, largest)

    @classmethod
    def from_lists(cls, hard: Iterable[Iterable[int]], soft: Iterable[Iterable[int]],
                   weights: Sequence[int] | None = None, n_variables: int | None = None) -> WCNF:
        """A formula from clauses of literals; weights are 1 and there are as many variables as used, if not given."""
        flat, soft_flat = flatten(hard), flatten(soft)
        largest = max(_core.largest_variable(flat, "hard"), _core.largest_variable(soft_flat, "soft"))
        costs = np.ones(np.count_nonzero(soft_flat == 0), dtype=np.int64) if weights is None else np.asarray(weights)
        return cls(largest if n_variables is None else n_variables, flat, soft_flat,
                   costs.astype(np.int64) if costs.size == 0 else costs)

    def hard_lists(self) -> list[list[int]]:
        """The hard clauses as lists of literals."""
        return _lists(self.hard)

    def soft_lists(self) -> list[list[int]]:
        """The soft clauses as lists of literals."""
        return _lists(self.soft)


def read_dimacs(source: Source) -> CNF:
    """Read a ``p cnf`` file.

    Comments may stand anywhere, clauses may go over lines, and a ``%`` ends the file (as in SATLIB).

    Args:
        source: path or open binary file; gzip and xz are recognised by their first bytes.

    Raises:
        FormulaError: names file and line where a literal is malformed, too large or above the header's variables, the
            header is missing or counts other clauses than there are, or the last clause has no 0.
        OSError: the file cannot be read.
    """
    name, text = _text(source)
    try:
        return CNF(*_core.read_cnf(text))
    except ValueError as error:
        raise FormulaError(f"{name}: {error}") from None


def write_dimacs(path: str | os.PathLike[str], formula: CNF) -> None:
    """Write a ``p cnf`` file, whole or not at all. (A solver cannot be written: it keeps a simplified formula only.)"""
    write_atomically(path, _core.write_cnf(formula.n_variables, formula.clauses))


def read_wcnf(source: Source) -> WCNF:
    """Read a weighted formula: ``p wcnf VARIABLES CLAUSES [TOP]``, or without header and with ``h`` for hard clauses.

    With a header, clauses of weight TOP or more are hard; without TOP all are soft.

    Raises:
        FormulaError: as :func:`read_dimacs`, and where a weight is no integer >= 0 or they add up to more than 2^60.
        OSError: the file cannot be read.
    """
    name, text = _text(source)
    try:
        return WCNF(*_core.read_wcnf(text))
    except ValueError as error:
        raise FormulaError(f"{name}: {error}") from None


def write_wcnf(path: str | os.PathLike[str], formula: WCNF, *, header: bool = False) -> None:
    """Write a weighted formula in the format of 2022, or with ``header`` in the one before, whole or not at all."""
    write_atomically(path, _core.write_wcnf(formula.n_variables, formula.hard, formula.soft, formula.weights, header))


def flatten(clauses: Iterable[Iterable[int]]) -> Literals:
    """Clauses of literals as one int32 array, each ended by 0."""
    return _core.flatten(clauses)


def as_literals(array: Any, name: str) -> Literals:
    """An array of integers as int32, without loss.

    Raises:
        TypeError: it is no array of integers.
        ValueError: a value does not fit.
    """
    return _as_integers(array, name, np.int32)


def _as_integers(values: Any, name: str, dtype: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an array of integers, got {array.dtype}")
    if array.size and not (-np.iinfo(dtype).max <= int(array.min()) and int(array.max()) <= np.iinfo(dtype).max):
        raise ValueError(f"{name}: expected integers of at most {np.iinfo(dtype).max}, got"
                         f" {max(array.min(), array.max(), key=lambda value: abs(int(value)))}")
    return np.ascontiguousarray(array, dtype=dtype)


def _check_variables(n_variables: int, largest: int) -> None:
    if not largest <= n_variables <= _LARGEST:
        raise ValueError(f"n_variables: expected {largest}..{_LARGEST}, got {n_variables}")


def _lists(clauses: Literals) -> list[list[int]]:
    found = np.split(clauses, np.flatnonzero(clauses == 0) + 1)[:-1]
    return [clause[:-1].tolist() for clause in found]


def _text(source: Source) -> tuple[str, bytes]:
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        with open(source, "rb") as file:
            text = _whole(file)
    else:
        name, text = str(getattr(source, "name", "formula")), _whole(source)
    for magic, opener in _MAGIC.items():
        if text.startswith(magic):
            try:
                with opener(io.BytesIO(text)) as file:
                    return name, _whole(file)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise FormulaError(f"{name}: the compressed file is damaged or cut short ({error})") from None
    return name, text


def _whole(file: Any) -> bytes:
    return b"".join(iter(lambda: file.read(_PIECE), b""))

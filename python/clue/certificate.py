"""Certificates: the least cost proven, in a file that is checked without the solver.

A certificate holds a model and the cores that show that none costs less; csrc/logic/certificate.hpp is its format. The
functions that make and check them are :func:`clue.logic.assign`, :func:`clue.logic.check_certificate`,
:func:`clue.sat.minimize` and :func:`clue.sat.check_certificate`; here is what they share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .errors import CertificateError, RefutedError


@dataclass(frozen=True)
class Verified:
    """What a check has established.

    Attributes:
        satisfiable: False: there is no model (weighted formulas only).
        cost: of the certificate's model, and no model costs less; None without a model.
        root: the part of it that every model pays by propagation alone.
        sections, axioms, clauses, cores: the proof's parts, the clauses of the question it rests on, the clauses it
            derives, and the unsatisfiable cores that add up to ``cost - root``.
        size: bytes of the certificate.
    """

    satisfiable: bool
    cost: int | None
    root: int
    sections: int
    axioms: int
    clauses: int
    cores: int
    size: int


def digest(kind: str, arrays: Iterable[npt.NDArray[Any]]) -> bytes:
    """32 bytes that name a question: SHA-256 of its kind, and of each array's length (8 bytes) and checksum (32 bytes).

    The checksum (csrc/logic/checksum.hpp) is of the array's content, little endian. It is no cryptographic one, at ten times
    the speed: a certificate is checked against the question that it is given with, whatever question it names.
    """
    found = hashlib.sha256(kind.encode())
    for array in arrays:
        found.update(len(array).to_bytes(8, "little"))
        found.update(_core.checksum(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))))
    return found.digest()


def read(source: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of a certificate; CertificateError if there is no such file."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{source} does not exist: write it with `clue solve --certify`") from None


def verified(name: str, found: dict[str, Any], size: int) -> Verified:
    """The outcome of a native check, or the error it stands for."""
    if "refuted" in found:
        raise RefutedError(f"{name} does not prove its claim: {found['refuted']}")
    if "unreadable" in found:
        raise CertificateError(f"{name} cannot be checked: {found['unreadable']}; give the certificate and the question"
                               " it was made from, with the same semantics and weights")
    return Verified(**found | {"cost": found["cost"] if found["satisfiable"] else None}, size=size)


def name_of(source: str | os.PathLike[str] | bytes) -> str:
    """What messages call a certificate."""
    return "the certificate" if isinstance(source, bytes) else os.fspath(source)

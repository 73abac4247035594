"""MaxSAT: the least weight of soft clauses that must be violated, by core-guided search (OLL) on CaDiCaL."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _core
from ..certificate import Verified, digest, name_of, read, verified
from ..data.atomic import write_atomically
from ..errors import FormulaError
from .formula import WCNF
from .solver import seconds


@dataclass(frozen=True, eq=False)
class Minimum:
    """The best that was found.

    Attributes:
        satisfiable: False: the hard clauses have no model. None: a limit struck before the first model was found.
        model: int8 [n_variables + 1], 1 where the variable is true, entry 0 unused; None unless satisfiable.
        cost: weight of the soft clauses that the model violates; None without a model.
        lower_bound: proven: no model costs less.
        optimal: ``cost`` is proven to be the least.
        statistics: ``cores`` found and ``solves`` of the SAT solver.
    """

    satisfiable: bool | None
    model: npt.NDArray[np.int8] | None
    cost: int | None
    lower_bound: int
    optimal: bool
    statistics: dict[str, int]


def minimize(formula: WCNF, *, time_limit: float | None = None, keep_on_interrupt: bool = False,
             on_bounds: Callable[[int, int], object] | None = None,
             certify: str | os.PathLike[str] | None = None) -> Minimum:
    """Find a model of the hard clauses that violates the least weight of soft clauses.

    Args:
        time_limit: seconds, > 0, after which the best model so far is returned with its bounds.
        keep_on_interrupt: on Ctrl-C, too, return the best so far instead of raising.
        on_bounds: called with lower bound and cost when the first model is known and whenever one of the two improves.
            The cost is that of a model, or slightly above it. What it raises ends the search and is passed on, except
            that a KeyboardInterrupt counts as Ctrl-C.
        certify: a file to write the proof of the least cost to, or of there being no model, for
            :func:`check_certificate`. It is not written if a limit struck first.

    Raises:
        OSError: the certificate cannot be written.
        KeyboardInterrupt: on Ctrl-C, within about 0.1 s; what millions of clauses took in memory is given back first,
            which takes a third of the time that loading them took.
        MemoryError: a variable is so large that its tables cannot fit into memory.
    """
    found = _core.minimize(formula.n_variables, formula.hard, formula.soft, formula.weights, seconds(time_limit),
                           on_bounds, None if certify is None else _digest(formula))
    interrupted = found["interrupted"]
    if interrupted is not None and not (keep_on_interrupt and isinstance(interrupted, KeyboardInterrupt)):
        raise interrupted
    if certify is not None and found["certificate"]:
        write_atomically(certify, found["certificate"])
    known = len(found["model"]) > 0
    return Minimum(
        satisfiable=True if known else None if found["satisfiable"] else False,
        model=found["model"] if known else None,
        cost=found["cost"] if known else None,
        lower_bound=found["lower_bound"],
        optimal=found["optimal"],
        statistics={name: found[name] for name in ("cores", "solves")},
    )


def check_certificate(formula: WCNF, certificate: str | os.PathLike[str] | bytes) -> Verified:
    """Check that a cost is the least, or that there is no model, without the solver that found it.

    Args:
        certificate: the file that :func:`minimize` wrote, or its bytes.

    Raises:
        RefutedError: the certificate does not prove its claim.
        CertificateError: it is no certificate, of another version, or of another formula.
        KeyboardInterrupt: on Ctrl-C.
    """
    content = read(certificate)
    try:
        found = _core.check_formula(formula.n_variables, formula.hard, formula.soft, formula.weights, _digest(formula),
                                    content)
    except ValueError as error:
        raise FormulaError(str(error)) from None
    return verified(name_of(certificate), found, len(content))


def _digest(formula: WCNF) -> bytes:
    return digest(f"formula {formula.n_variables}", [formula.hard, formula.soft, formula.weights])

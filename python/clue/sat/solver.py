"""An incremental SAT solver: CaDiCaL 3.0 (Biere et al., CAV 2024) with Python's manners.

The GIL is released while it solves; Ctrl-C is answered within about 0.1 s, and the solver can be used afterwards.
Nothing a caller does wrong ends the process: arguments raise ``ValueError`` or ``TypeError`` and name themselves, calls
at the wrong time raise ``RuntimeError`` and say what to do first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from .. import _core
from .formula import CNF, Literals, as_literals

#: What :meth:`Solver.add` takes.
Clauses = CNF | npt.NDArray[Any] | Iterable[Iterable[int]]


class Option(NamedTuple):
    """One option of CaDiCaL: its default here, its range, and what it does."""

    name: str
    default: int
    low: int
    high: int
    use: str


def options() -> dict[str, Option]:
    """All options of CaDiCaL by name.

    The defaults are CaDiCaL's, but for ``quiet=1``, ``factor=0`` (it makes variables of its own, which would clash with
    ones added later) and ``lucky=0`` (a pass over the whole formula on every incremental call).
    """
    return {row[0]: Option(*row) for row in _core.sat_options()}


class Options(MutableMapping[str, int]):
    """The options of one solver; they can be set until the first clause, variable or solve."""

    def __init__(self, native: _core.SatSolver) -> None:
        self._native = native

    def __getitem__(self, name: str) -> int:
        try:
            return self._native.option(name)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def __setitem__(self, name: str, value: int) -> None:
        self._native.set_option(name, value)

    def __delitem__(self, name: str) -> None:
        self[name] = options()[name].default

    def __iter__(self) -> Iterator[str]:
        return iter(options())

    def __len__(self) -> int:
        return len(options())


class Solver:
    """A SAT solver to which clauses can be added between calls.

    Variables exist from their first use. Only one thread may use a solver at a time, except for :meth:`terminate`. As a
    context manager it closes its proof at the end, unless an exception ends the block.

    Args:
        clauses: as for :meth:`add`.
        options: options of CaDiCaL, see :func:`options`.

    Raises:
        ValueError: an option does not exist, or its value is out of range.
    """

    def __init__(self, clauses: Clauses | None = None, **options: int) -> None:
        self._native = _core.SatSolver()
        self.options = Options(self._native)
        for name, value in options.items():
            self.options[name] = value
        if clauses is not None:
            self.add(clauses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and self._writes_proof:
            self.close_proof()

    # --- formula ----------------------------------------------------------------------------------------------------

    @property
    def n_variables(self) -> int:
        """Largest variable so far."""
        return self._native.variables()

    def reserve(self, n_variables: int) -> None:
        """Have variables 1 .. ``n_variables`` exist, which is faster than one by one; values are then in the model."""
        self._native.reserve(n_variables)

    def add(self, clauses: Clauses, offsets: npt.ArrayLike | None = None) -> None:
        """Add clauses: all of them, or none if there is an error.

        Args:
            clauses: a :class:`CNF`; an array of literals, each clause ended by 0; an array of literals without zeros,
                if ``offsets`` are given; or an iterable of iterables of literals.
            offsets: integers [clauses + 1]: clause i is ``clauses[offsets[i]:offsets[i + 1]]``.

        Raises:
            ValueError: a literal is 0 or too large, a last 0 is missing, or offsets do not fit.
            TypeError: something is no integer.
            MemoryError: a variable is so large that its tables cannot fit into memory.
        """
        if isinstance(clauses, CNF):
            self._native.reserve(clauses.n_variables)
            self._native.add_array(clauses.clauses)
        elif offsets is not None:
            self._native.add_array(_with_zeros(as_literals(clauses, "clauses"), offsets))
        elif isinstance(clauses, np.ndarray):
            self._native.add_array(as_literals(clauses, "clauses"))
        else:
            self._native.add_clauses(clauses)

    def add_clause(self, clause: Iterable[int]) -> None:
        """Add one clause; the empty one makes the formula unsatisfiable."""
        self._native.add_clause(clause)

    def constrain(self, clause: Iterable[int]) -> None:
        """Add a clause for the next :meth:`solve` only; a second one replaces it (Froleyks and Biere, FMCAD 2021).

        Raises:
            RuntimeError: a proof is being written: it would not be one of the formula.
        """
        self._native.constrain(clause)

    # --- search -----------------------------------------------------------------------------------------------------

    def solve(self, assumptions: Iterable[int] = (), *, time_limit: float | None = None, conflicts: int | None = None,
              decisions: int | None = None) -> bool | None:
        """Whether the formula has a model in which the assumptions hold; None if a limit or :meth:`terminate` struck.

        Args:
            assumptions: literals, for this call only.
            time_limit: seconds, > 0. Kept to within about 0.1 s.
            conflicts, decisions: limits on the search, >= 0.

        Raises:
            KeyboardInterrupt: on Ctrl-C; the solver stays usable.
            OSError: the proof cannot be written any more.
        """
        return self._native.solve(assumptions, seconds(time_limit), _limit("conflicts", conflicts),
                                  _limit("decisions", decisions))

    def simplify(self, rounds: int = 3, *, time_limit: float | None = None) -> bool | None:
        """Preprocess without search; True or False if that decides the formula."""
        return self._native.simplify(rounds, seconds(time_limit))

    def terminate(self) -> bool:
        """Have the call that runs in another thread return None soon; False if none is running."""
        return self._native.terminate()

    def propagate(self, assumptions: Iterable[int] = ()) -> Literals | None:
        """What unit propagation finds under the assumptions, they included; None if it finds a conflict.

        Every literal returned follows from formula and assumptions. All that propagation can reach is returned before
        the first :meth:`solve` or :meth:`simplify`; these may remove clauses whose consequences are then not seen.

        Returns:
            int32 literals, sorted by variable.
        """
        return self._native.propagate(assumptions)

    # --- answers ----------------------------------------------------------------------------------------------------

    def model(self) -> npt.NDArray[np.int8]:
        """The model found, after True: int8 [n_variables + 1], 1 where the variable is true; entry 0 is unused."""
        return self._native.model()

    def value(self, literal: int) -> bool:
        """Whether a literal is true in the model, after True."""
        return self._native.value(literal)

    def core(self) -> Literals:
        """Assumptions that cannot hold together, after False: a subset, often not the smallest one."""
        return self._native.core()

    def constraint_failed(self) -> bool:
        """Whether the clause of :meth:`constrain` was needed, after False."""
        return self._native.constraint_failed()

    def fixed(self, literal: int) -> bool | None:
        """Whether the formula alone is known to imply the literal (True) or its negation (False)."""
        return self._native.fixed(literal)

    def statistics(self) -> dict[str, int]:
        """Counts since the start: ``conflicts``, ``decisions``, ``propagations``, ``ticks`` (cache lines touched),
        ``clauses`` kept now (``irredundant``, ``redundant``), and variables ``fixed``, ``eliminated``,
        ``substituted``."""
        return self._native.statistics()

    # --- guidance ---------------------------------------------------------------------------------------------------

    def phase(self, literal: int) -> None:
        """Try this value of the variable first, whenever the search decides on it."""
        self._native.phase(literal, True)

    def unphase(self, literal: int) -> None:
        """Undo :meth:`phase`."""
        self._native.phase(literal, False)

    def freeze(self, literal: int) -> None:
        """Keep the variable from being eliminated. Never needed, since clauses are restored; it can save time."""
        self._native.freeze(literal, True)

    def melt(self, literal: int) -> None:
        """Undo one :meth:`freeze`."""
        self._native.freeze(literal, False)

    # --- proof ------------------------------------------------------------------------------------------------------

    _writes_proof = False

    def proof(self, path: str | os.PathLike[str], *, format: str = "drat", binary: bool = True) -> None:
        """Write a proof from now on; before the first clause. It takes its name in :meth:`close_proof`, and a solver
        that goes without leaves nothing behind.

        After False under assumptions, the last clause of the proof is the negated core. If clauses are added after a
        solve, a DRAT proof is one of all clauses together; LRAT, which numbers the clauses of one formula in the order
        they were added, refuses them.

        Args:
            format: ``drat``, or ``lrat`` (larger, and checked much faster).
            binary: the binary form of the format; text makes solving several times slower.

        Raises:
            OSError: the file cannot be written.
        """
        self._native.write_proof(os.fsencode(path), format, binary)
        self._writes_proof = True

    def close_proof(self) -> None:
        """Finish the proof: flush it to disk and give it its name.

        Raises:
            OSError: it cannot be written, as on a full disk; nothing is left of it.
        """
        self._writes_proof = False
        self._native.close_proof()

    def discard_proof(self) -> None:
        """Stop writing the proof; nothing is left of it."""
        self._writes_proof = False
        self._native.discard_proof()


def _with_zeros(literals: Literals, offsets: npt.ArrayLike) -> Literals:
    """Clauses given by offsets in the form that has zeros."""
    starts = np.asarray(offsets)
    if starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) == 0:
        raise TypeError("offsets: expected a one-dimensional array of integers, one more than clauses")
    starts = starts.astype(np.int64)
    if literals.ndim != 1 or starts[0] != 0 or starts[-1] != len(literals) or np.any(starts[1:] < starts[:-1]):
        raise ValueError(f"offsets: expected to rise from 0 to the number of literals, {literals.size}")
    if not np.all(literals):
        at = int(np.argmin(literals != 0))
        raise ValueError(f"clauses: expected literals without 0 beside offsets, got 0 at {at}")
    n_clauses = len(starts) - 1
    flat = np.zeros(len(literals) + n_clauses, dtype=np.int32)
    inside = np.ones(len(flat), dtype=bool)
    inside[starts[1:] + np.arange(n_clauses)] = False
    flat[inside] = literals
    return flat


def seconds(time_limit: float | None) -> float:
    """A time limit as the native core takes it, where 0 is none."""
    if time_limit is None:
        return 0.0
    if not (0 < time_limit < math.inf):
        raise ValueError(f"time_limit: expected seconds > 0 or None, got {time_limit}")
    return min(float(time_limit), 1e9)


def _limit(name: str, value: int | None) -> int:
    if value is None:
        return -1
    if value < 0:
        raise ValueError(f"{name}: expected at least 0 or None, got {value}")
    return min(value, 2**31 - 1)

"""MaxSAT: the least weight of soft clauses that must be violated, by core-guided search (OLL) on CaDiCaL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _core
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
             on_bounds: Callable[[int, int], object] | None = None) -> Minimum:
    """Find a model of the hard clauses that violates the least weight of soft clauses.

    Args:
        time_limit: seconds, > 0, after which the best model so far is returned with its bounds.
        keep_on_interrupt: on Ctrl-C, too, return the best so far instead of raising.
        on_bounds: called with lower bound and cost when the first model is known and whenever one of the two improves.
            The cost is that of a model, or slightly above it. What it raises ends the search and is passed on, except
            that a KeyboardInterrupt counts as Ctrl-C.

    Raises:
        KeyboardInterrupt: on Ctrl-C, within about 0.1 s; on a million clauses preprocessing may go on for seconds
            first, as after the time limit.
        MemoryError: a variable is so large that its tables cannot fit into memory.
    """
    found = _core.minimize(formula.n_variables, formula.hard, formula.soft, formula.weights, seconds(time_limit),
                           on_bounds)
    interrupted = found["interrupted"]
    if interrupted is not None and not (keep_on_interrupt and isinstance(interrupted, KeyboardInterrupt)):
        raise interrupted
    known = len(found["model"]) > 0
    return Minimum(
        satisfiable=True if known else None if found["satisfiable"] else False,
        model=found["model"] if known else None,
        cost=found["cost"] if known else None,
        lower_bound=found["lower_bound"],
        optimal=found["optimal"],
        statistics={name: found[name] for name in ("cores", "solves")},
    )

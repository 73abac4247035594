"""A question about circuits as a weighted formula, for other solvers and for proofs that other checkers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..types import Gate

if TYPE_CHECKING:
    from ..circuit.graph import Circuit
    from ..sat import WCNF


def as_wcnf(forget: Sequence[Circuit], retain: Sequence[Circuit], *, semantics: str = "support",
            weights: npt.NDArray[np.int64] | None = None) -> WCNF:
    """The formula whose least cost :func:`clue.logic.assign` finds, as it stands before any simplification.

    Variable 2n + 1 is r_n, node n works for the retain circuits, and 2n + 2 is f_n, it works for the forget circuits.
    The soft clauses are (not r_n or f_n), in the order of nodes, of the weights that a conflict at n has.

    Raises:
        CircuitError: as :func:`clue.logic.assign`.
    """
    from ..sat import WCNF
    from . import pose

    question = pose(forget, retain, semantics=semantics, weights=weights)
    n, editable, costs = question["n_nodes"], question["editable"], question["weights"]
    hard: list[list[int]] = [[1], [2], [2 * n - 1], [-2 * n]]
    members = []
    for circuits, is_retain in ((retain, True), (forget, False)):
        # x is r_n on the retain side and not f_n on the forget side (csrc/logic/circuit.hpp).
        x = [2 * m + 1 if is_retain else -(2 * m + 2) for m in range(n)]
        present = np.zeros(n, dtype=bool)
        for circuit in circuits:
            present[circuit.src] = present[circuit.dst] = True
            groups: dict[tuple[int, int], set[int]] = {}
            for u, v, gate in zip(circuit.src.tolist(), circuit.dst.tolist(), circuit.gate.tolist(), strict=True):
                groups.setdefault((v, gate), set()).add(u)
            for (node, gate), sources in groups.items():
                asks_all = gate == Gate.ADDER or (gate == Gate.AND) == is_retain
                inputs = [x[m] for m in sorted(sources - {0})]
                if not inputs or (0 in sources and is_retain and not asks_all):  # the embedding satisfies it
                    hard += [[x[node]]] if is_retain and semantics == "authors" else []
                    continue
                needs = [[-x[node], one] for one in inputs] if asks_all else [[-x[node], *inputs]]
                follows = [[x[node], *(-one for one in inputs)]] if asks_all else [[x[node], -one] for one in inputs]
                hard += needs + (follows if semantics == "authors" else [])
        members.append(present)
    paying = np.flatnonzero(members[0] & members[1] & editable.astype(bool)).tolist()
    return WCNF.from_lists(hard, [[-(2 * m + 1), 2 * m + 2] for m in paying], costs[paying].tolist(), 2 * n)

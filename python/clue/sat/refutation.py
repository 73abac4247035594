"""A proof for any checker that nothing costs less: the formula with "costs less than this", and its refutation (LRAT).

The sum of what soft clauses cost is bounded by a generalized totalizer (Joshi, Martins, Manquinho, CP 2015): a balanced
tree over the soft clauses whose nodes have a variable for each sum that their clauses can reach, all sums of the bound
and more being one. It suits small formulas; certificates (:func:`clue.sat.check_certificate`) have no such limit.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormulaError
from .formula import CNF, WCNF, write_dimacs
from .solver import Solver

#: Most clauses that the bound may take.
MOST_CLAUSES = 500_000


def cheaper(formula: WCNF, cost: int) -> CNF:
    """The hard clauses, and that the violated soft clauses weigh less than ``cost`` > 0.

    Raises:
        FormulaError: the bound takes more than :data:`MOST_CLAUSES` clauses.
    """
    clauses = formula.hard_lists()
    n = formula.n_variables
    payers: list[tuple[int, int]] = []  # (literal that is true where the soft clause is violated, weight)
    for soft, weight in zip(formula.soft_lists(), formula.weights.tolist(), strict=True):
        if weight == 0:
            continue
        if len(soft) == 1:
            payers.append((-soft[0], weight))
            continue
        n += 1
        clauses.append([*soft, n])
        payers.append((n, weight))
    budget = len(clauses) + MOST_CLAUSES

    def sums(first: int, last: int) -> dict[int, int]:
        """The literal of each sum, which holds where the payers reach it or more."""
        nonlocal n
        if last - first == 1:
            literal, weight = payers[first]
            return {min(weight, cost): literal}
        middle = (first + last) // 2
        left, right = sums(first, middle), sums(middle, last)
        found: dict[int, int] = {}
        for a in (0, *left):
            for b in (0, *right):
                if a == b == 0:
                    continue
                total = min(a + b, cost)
                if total not in found:
                    n += 1
                    found[total] = n
                clauses.append([*([-left[a]] if a else []), *([-right[b]] if b else []), found[total]])
                if len(clauses) > budget:
                    raise FormulaError(f"a refutation of cost {cost - 1} over {len(payers)} soft clauses takes more"
                                       f" than {MOST_CLAUSES} clauses: it is for small formulas; write a certificate"
                                       " instead (clue solve --certify)")
        return found

    reached = sums(0, len(payers)) if payers else {}
    clauses += [[-literal] for total, literal in reached.items() if total >= cost]
    return CNF.from_lists(clauses, n)


def write_refutation(formula: WCNF, cost: int, prefix: str | os.PathLike[str], *,
                     time_limit: float | None = None) -> bool | None:
    """Write ``PREFIX.cnf``, :func:`cheaper` of the formula, and ``PREFIX.lrat``, a binary proof that it has no model.

    Returns:
        True if both are written. None if the time limit struck and False if there is a cheaper model: nothing is left.

    Raises:
        FormulaError: as :func:`cheaper`, or ``cost`` is not positive: nothing costs less than 0.
        OSError: a file cannot be written.
    """
    if cost <= 0:
        raise FormulaError(f"nothing costs less than {cost}: there is nothing to refute")
    bounded = cheaper(formula, cost)
    cnf, proof = Path(f"{os.fspath(prefix)}.cnf"), Path(f"{os.fspath(prefix)}.lrat")
    with Solver() as solver:
        solver.proof(proof, format="lrat")
        solver.add(bounded.clauses)
        answer = solver.solve(time_limit=time_limit)
        if answer is not False:
            solver.discard_proof()
            return False if answer else None
        write_dimacs(cnf, bounded)
        try:
            solver.close_proof()
        except OSError:
            cnf.unlink()
            raise
    return True

"""SAT and MaxSAT for everyone: CaDiCaL 3.0 with clauses from NumPy arrays, and weighted formulas to the proven minimum.

    >>> from clue.sat import Solver
    >>> solver = Solver([[1, 2], [-1, 2], [-2, 3]])
    >>> solver.solve(assumptions=[-3])
    False
    >>> solver.core().tolist()
    [-3]
    >>> solver.solve(), solver.model()[1:].tolist()
    (True, [0, 1, 1])

Literals are v and -v for variables v = 1, 2, ... The package needs NumPy and nothing of torch.
"""

from __future__ import annotations

from .formula import CNF, WCNF, read_dimacs, read_wcnf, write_dimacs, write_wcnf
from .maxsat import Minimum, check_certificate, minimize
from .solver import Option, Solver, options

__all__ = ["CNF", "WCNF", "Minimum", "Option", "Solver", "check_certificate", "minimize", "options", "read_dimacs", "read_wcnf",
           "write_dimacs", "write_wcnf"]

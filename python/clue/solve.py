"""``clue solve``: a formula or a pair of circuits in, the answer out, in the lines and exit codes of the competitions.

===============  =========================================================  ======================================
file             lines                                                      exit status
===============  =========================================================  ======================================
``.cnf``         ``s SATISFIABLE`` and ``v`` lines, ``s UNSATISFIABLE``,    10, 20, 0
                 ``s UNKNOWN`` (SAT Competition)
``.wcnf``        ``o`` cost, ``s OPTIMUM FOUND`` or, when a limit struck,   30, 10, 20, 0
                 ``s SATISFIABLE``, and ``v`` lines (MaxSAT Evaluation)
circuits         ``o`` cost of conflicts, ``s OPTIMUM FOUND`` or            30, 10
                 ``s SATISFIABLE``, and a line ``v ROLE NODE`` per node
===============  =========================================================  ======================================

Everything else is in ``c`` lines. Variables above the largest one that a clause uses are left out of ``v`` lines: they
may have any value. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ClueError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .circuit.graph import Circuit

_SATISFIABLE, _UNSATISFIABLE, _OPTIMUM, _UNKNOWN = 10, 20, 30, 0
_PER_LINE = 16


def add_to(commands: Any) -> None:
    """Add the command to the parser's commands."""
    solve = commands.add_parser("solve", help="solve a formula (.cnf, .wcnf) or a question about circuits (.json)",
                                description="Answers in the lines and exit codes of the SAT and MaxSAT competitions:"
                                " 10 satisfiable, 20 unsatisfiable, 30 proven optimum, 0 unknown.")
    solve.set_defaults(command=_solve)
    solve.add_argument("file", metavar="FILE", help="formula.cnf or formula.wcnf (.gz and .xz too), question.json (see"
                       " clue.logic.question), or the forget circuit as .json (EAP-IG) or .safetensors")
    solve.add_argument("--time-limit", type=_seconds, metavar="S", help="stop after S seconds with the best so far")
    cnf = solve.add_argument_group("formula.cnf")
    cnf.add_argument("--assume", type=_literal, nargs="+", action="extend", default=[], metavar="LIT",
                     help="literals that must hold; if they cannot, a core of them is told")
    cnf.add_argument("--proof", metavar="P", help="write a proof of unsatisfiability to this file")
    cnf.add_argument("--proof-format", choices=("drat", "lrat"), default="drat", help="(default: drat)")
    cnf.add_argument("--proof-text", action="store_true", help="as text instead of binary, which is slower")
    circuits = solve.add_argument_group("circuits")
    circuits.add_argument("--retain", action="append", default=[], metavar="FILE",
                          help="retain circuit to go with a forget circuit; may be repeated")
    circuits.add_argument("--semantics", choices=("support", "authors"), default="support",
                          help="reading of the gates (default: support)")
    circuits.add_argument("--explain", action="append", default=[], metavar="NODE",
                          help="say why this node has its role, and what would change if it had another; may be repeated")
    circuits.add_argument("--surgical", action="store_true",
                          help="find the least edit that kills the forget outputs and leaves the retain outputs alive")
    circuits.add_argument("--budget", type=_whole, metavar="W", help="with --surgical: most weight of all edited nodes")
    circuits.add_argument("--most", type=_whole, metavar="N", help="with --surgical: most edited nodes")
    for option, use in (("--never", "never edit"), ("--must", "edit")):
        circuits.add_argument(option, action="append", default=[], metavar="NODE",
                              help=f"{use} this node; may be repeated")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _literal(text: str) -> int:
    value = int(text)
    if value == 0 or abs(value) >= 2**31:
        raise ValueError
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


_seconds.__name__, _literal.__name__ = "number of seconds", "literal"  # argparse puts them into its messages
_whole.__name__ = "whole number"


def _solve(arguments: argparse.Namespace) -> int:
    name = arguments.file.lower()
    for ending in (".gz", ".xz"):
        name = name.removesuffix(ending)
    kind = Path(name).suffix
    if kind not in (".cnf", ".dimacs", ".wcnf", ".json", ".safetensors"):
        raise ClueError(f"{arguments.file}: expected a name that ends in .cnf, .wcnf, .json or .safetensors")
    for option, given, kinds in (("--assume", arguments.assume, (".cnf", ".dimacs")),
                                 ("--proof", arguments.proof, (".cnf", ".dimacs")),
                                 ("--retain", arguments.retain, (".json", ".safetensors")),
                                 ("--explain", arguments.explain, (".json", ".safetensors")),
                                 ("--surgical", arguments.surgical, (".json", ".safetensors")),
                                 ("--never", arguments.never, (".json", ".safetensors")),
                                 ("--must", arguments.must, (".json", ".safetensors"))):
        if given and kind not in kinds:
            raise ClueError(f"{option} goes with {' or '.join(kinds)} files only")
    if not arguments.surgical and (arguments.budget is not None or arguments.most is not None):
        raise ClueError("--budget and --most go with --surgical only")
    if arguments.surgical and arguments.semantics != "support":
        raise ClueError("--surgical reads the gates in a way of its own: leave --semantics out")
    if arguments.explain and (arguments.surgical or arguments.never or arguments.must or arguments.time_limit):
        raise ClueError("--explain goes without --surgical, --never, --must and --time-limit")
    try:
        if kind == ".wcnf":
            return _wcnf(arguments)
        return _cnf(arguments) if kind in (".cnf", ".dimacs") else _circuits(arguments)
    except MemoryError as error:
        raise ClueError(f"{arguments.file}: {error or 'there is not enough memory'}") from None


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _literal_lines(literals: Sequence[int]) -> Iterable[str]:
    """``v`` lines that end with 0."""
    words = [*map(str, literals), "0"]
    return (" ".join(["v", *words[i:i + _PER_LINE]]) for i in range(0, len(words), _PER_LINE))


def _literals(model: npt.NDArray[np.int8]) -> list[int]:
    import numpy as np

    variables = np.arange(1, len(model))
    return np.where(model[1:] == 1, variables, -variables).tolist()


# --- formulas -------------------------------------------------------------------------------------------------------


def _cnf(arguments: argparse.Namespace) -> int:
    from .sat import Solver, read_dimacs

    formula = read_dimacs(arguments.file)
    _say(f"c {formula.n_variables} variables, {len(formula)} clauses")
    # One call, so CaDiCaL's own defaults; with a proof no variables of its own, which checkers need not know.
    with Solver(lucky=1, factor=int(arguments.proof is None)) as solver:
        if arguments.proof is not None:
            solver.proof(arguments.proof, format=arguments.proof_format, binary=not arguments.proof_text)
        solver.add(formula.clauses)
        answer = solver.solve(arguments.assume, time_limit=arguments.time_limit)
        statistics = solver.statistics()
        if arguments.proof is not None:
            if answer is False:
                solver.close_proof()
            else:
                solver.discard_proof()
                _say("c no proof is written: the formula was not found unsatisfiable")
        _say("c " + ", ".join(f"{statistics[name]} {name}" for name in ("conflicts", "decisions", "propagations")))
        if answer is None:
            _say("s UNKNOWN")
            return _UNKNOWN
        if answer:
            _say("s SATISFIABLE", *_literal_lines(_literals(solver.model())))
            return _SATISFIABLE
        if arguments.assume:
            _say("c core of the assumptions: " + (" ".join(map(str, solver.core().tolist())) or "none of them"))
        _say("s UNSATISFIABLE")
        return _UNSATISFIABLE


def _wcnf(arguments: argparse.Namespace) -> int:
    from .sat import minimize, read_wcnf

    formula = read_wcnf(arguments.file)
    n_hard = int((formula.hard == 0).sum())
    _say(f"c {formula.n_variables} variables, {n_hard} hard and {len(formula.weights)} soft clauses")
    found = minimize(formula, time_limit=arguments.time_limit, keep_on_interrupt=True)
    _say(f"c {found.statistics['cores']} cores, {found.statistics['solves']} calls of the SAT solver")
    if found.satisfiable is False:
        _say("s UNSATISFIABLE")
        return _UNSATISFIABLE
    if found.model is None:
        _say(f"c lower bound {found.lower_bound}", "s UNKNOWN")
        return _UNKNOWN
    if not found.optimal:
        _say(f"c lower bound {found.lower_bound}")
    # The evaluation's value lines: literals up to 2021, one bit per variable since the format without header.
    values = _literal_lines(_literals(found.model)) if formula.header else \
        ["v " + "".join(map(str, found.model[1:].tolist()))]
    _say(f"o {found.cost}", "s OPTIMUM FOUND" if found.optimal else "s SATISFIABLE", *values)
    return _OPTIMUM if found.optimal else _SATISFIABLE


# --- circuits -------------------------------------------------------------------------------------------------------


def _circuits(arguments: argparse.Namespace) -> int:
    from .logic import Explainer, assign, operate
    from .logic.question import read_question
    from .types import Role

    data = _json(arguments.file) if arguments.file.lower().endswith(".json") else {}
    forget: Any
    retain: Any
    if "forget" in data or "retain" in data:
        if arguments.retain:
            raise ClueError(f"--retain: {arguments.file} has its own retain circuits")
        question = read_question(arguments.file, data)
        forget, retain, weights = question.forget, question.retain, question.weights
    else:
        if not arguments.retain:
            raise ClueError(f"{arguments.file} is one circuit: give at least one other with --retain FILE")
        forget, retain, weights = [_circuit(arguments.file)], [_circuit(path) for path in arguments.retain], None
    start = time.perf_counter()
    common: dict[str, Any] = {"weights": weights, "never": arguments.never, "must": arguments.must,
                              "time_limit": arguments.time_limit or 0}
    if arguments.surgical:
        found = operate(forget, retain, budget=arguments.budget, most=arguments.most, **common)
    else:
        found = assign(forget, retain, semantics=arguments.semantics, **common)
    graph = forget[0].graph
    _say(f"c {graph.n_nodes} nodes, {sum(len(c.src) for c in (*forget, *retain))} edges,"
         f" solved in {time.perf_counter() - start:.3f} s",
         f"c {found.n_forced} conflicts are forced, {found.n_chosen} chosen; lower bound {found.lower_bound}")
    if arguments.surgical:
        _say(f"c {found.statistics['edits']} nodes are edited, of weight {found.statistics['edit_weight']}")
    if arguments.explain:
        explainer = Explainer(forget, retain, semantics=arguments.semantics, weights=weights, assignment=found)
        for node in arguments.explain:
            _say(*(f"c {line}" for line in explainer.explain(node).lines(graph.name, found.cost)))
    _say(f"o {found.cost}", "s OPTIMUM FOUND" if found.optimal else "s SATISFIABLE")
    _say(*(f"v {Role(role).name.lower()} {graph.name(node)}" for node, role in enumerate(found.role.tolist())))
    return _OPTIMUM if found.optimal else _SATISFIABLE


def _json(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ClueError(f"{path} is no JSON ({error})") from None
    if not isinstance(data, dict):
        raise ClueError(f"{path}: expected an object: a question (clue.logic.question) or a circuit of EAP-IG")
    return data


def _circuit(path: str) -> Circuit:
    """A circuit file, in the graph that it names itself."""
    from .circuit.graph import Circuit, Graph
    from .circuit.interchange import read_eap_ig

    if not path.lower().endswith(".json"):
        return Circuit.load(path)
    data = _json(path)
    own: Any = data.get("clue")
    cfg: Any = data.get("cfg")
    dimensions = own.get("graph") if isinstance(own, dict) else None
    try:
        if dimensions is not None:
            graph = Graph(**dimensions)
        else:
            heads = int(cfg["n_heads"])
            graph = Graph(int(cfg["n_layers"]), heads, heads, 0, False, bool(cfg.get("parallel_attn_mlp", False)))
        return read_eap_ig(path, graph)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise ClueError(f"{path} is neither a question (clue.logic.question) nor a circuit of EAP-IG") from None

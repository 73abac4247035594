"""``clue solve``: a formula or a pair of circuits in, the answer out, in the lines and exit codes of the competitions.

===============  =========================================================  ======================================
file             lines                                                      exit status
===============  =========================================================  ======================================
``.cnf``         ``s SATISFIABLE`` and ``v`` lines, ``s UNSATISFIABLE``,    10, 20, 0
                 ``s UNKNOWN`` (SAT Competition)
``.wcnf``        ``o`` cost of every better model at once, then             30, 10, 20, 0
                 ``s OPTIMUM FOUND`` or, if it was stopped,
                 ``s SATISFIABLE``, and ``v`` lines (MaxSAT Evaluation)
circuits         ``o`` cost of conflicts as above, ``s OPTIMUM FOUND`` or   30, 10, 0
                 ``s SATISFIABLE``, and a line ``v ROLE NODE`` per node
===============  =========================================================  ======================================

Everything else is in ``c`` lines; what takes long and is no part of the answer, explanations and refutations, comes after
it. Variables above the largest one that a clause uses are left out of ``v`` lines: they may have any value. The time limit,
Ctrl-C and SIGTERM end a command in the same way, with the best known, or ``s UNKNOWN``. Heavy imports happen inside the
commands.
"""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ClueError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .circuit.graph import Circuit
    from .sat import WCNF

_SATISFIABLE, _UNSATISFIABLE, _OPTIMUM, _UNKNOWN = 10, 20, 30, 0
_PER_LINE = 16
_PIECE = 1 << 20  # literals added at once

#: The seconds that are left, or None without a limit.
TimeLeft = Callable[[], float | None]


def add_to(commands: Any) -> None:
    """Add the command to the parser's commands."""
    solve = commands.add_parser("solve", help="solve a formula (.cnf, .wcnf) or a question about circuits (.json)",
                                description="Answers in the lines and exit codes of the SAT and MaxSAT competitions:"
                                " 10 satisfiable, 20 unsatisfiable, 30 proven optimum, 0 unknown.")
    solve.set_defaults(command=_solve)
    solve.add_argument("file", metavar="FILE", help="formula.cnf or formula.wcnf (.gz and .xz too), question.json (see"
                       " clue.logic.question), or the forget circuit as .json (EAP-IG) or .safetensors")
    solve.add_argument("--time-limit", type=_seconds, metavar="S", help="stop after S seconds, reading included, with the"
                       " best so far")
    optimum = solve.add_argument_group("formula.wcnf and circuits")
    optimum.add_argument("--certify", metavar="C", help="write the proof of the optimum to this file, for"
                         " `clue certificate check`")
    optimum.add_argument("--lrat", metavar="PREFIX", help="for small ones: write PREFIX.cnf, the formula with a cost"
                         " below the optimum, and PREFIX.lrat, a proof for any checker that it has no model")
    cnf = solve.add_argument_group("formula.cnf")
    cnf.add_argument("--assume", type=_literal, nargs="+", action="extend", default=[], metavar="LIT",
                     help="literals that must hold; if they cannot, a core of them is told")
    cnf.add_argument("--proof", metavar="P", help="write a proof of unsatisfiability to this file")
    cnf.add_argument("--proof-format", choices=("drat", "lrat"), default="drat", help="(default: drat)")
    cnf.add_argument("--proof-text", action="store_true", help="as text instead of binary, which is slower")
    circuits = solve.add_argument_group("circuits")
    add_question(circuits)
    circuits.add_argument("--explain", action="append", default=[], metavar="NODE",
                          help="say why this node has its role, and what would change if it had another; may be repeated")
    circuits.add_argument("--surgical", action="store_true",
                          help="find the least edit that kills the forget outputs and leaves the retain outputs alive")
    circuits.add_argument("--budget", type=_whole, metavar="W", help="with --surgical: most weight of all edited nodes")
    circuits.add_argument("--most", type=_whole, metavar="N", help="with --surgical: most edited nodes")
    for option, use in (("--never", "never edit"), ("--must", "edit")):
        circuits.add_argument(option, action="append", default=[], metavar="NODE",
                              help=f"{use} this node; may be repeated")


def add_question(circuits: Any) -> None:
    """The options that complete a question about circuits."""
    circuits.add_argument("--retain", action="append", default=[], metavar="FILE",
                          help="retain circuit to go with a forget circuit; may be repeated")
    circuits.add_argument("--semantics", choices=("support", "authors"), default="support",
                          help="reading of the gates (default: support)")


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


def kind_of(path: str) -> str:
    """Ending of a file's name in small letters; of formulas, which may be compressed, without that of the compression."""
    name = path.lower()
    inside = Path(name.removesuffix(".gz").removesuffix(".xz")).suffix
    return inside if inside in (".cnf", ".dimacs", ".wcnf") else Path(name).suffix


def _solve(arguments: argparse.Namespace) -> int:
    kind = kind_of(arguments.file)
    if kind not in (".cnf", ".dimacs", ".wcnf", ".json", ".safetensors"):
        raise ClueError(f"{arguments.file}: expected a name that ends in .cnf, .wcnf, .json or .safetensors")
    for option, given, kinds in (("--assume", arguments.assume, (".cnf", ".dimacs")),
                                 ("--proof", arguments.proof, (".cnf", ".dimacs")),
                                 ("--certify", arguments.certify, (".wcnf", ".json", ".safetensors")),
                                 ("--lrat", arguments.lrat, (".wcnf", ".json", ".safetensors")),
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
    if (arguments.certify or arguments.lrat) and (arguments.surgical or arguments.never or arguments.must):
        raise ClueError("--certify and --lrat go without --surgical, --never and --must")
    for option, path in (("--certify", arguments.certify), ("--lrat", arguments.lrat), ("--proof", arguments.proof)):
        if path is not None and not Path(path).parent.is_dir():
            raise ClueError(f"{option} {path}: there is no folder {Path(path).parent}; make it first")
    solve = _wcnf if kind == ".wcnf" else _cnf if kind in (".cnf", ".dimacs") else _circuits
    try:
        with _stoppable(arguments.time_limit) as time_left:
            return solve(arguments, time_left)
    except KeyboardInterrupt:  # nothing was known yet
        _say("s UNKNOWN")
        return _UNKNOWN
    except MemoryError as error:
        raise ClueError(f"{arguments.file}: {error or 'there is not enough memory'}") from None


@contextmanager
def _stoppable(time_limit: float | None) -> Iterator[TimeLeft]:
    """Have SIGTERM do what Ctrl-C does; the end of the time limit does so too, until somebody asks for the time left."""
    end = math.inf if time_limit is None else time.monotonic() + time_limit
    if threading.current_thread() is not threading.main_thread():  # where signals do not go
        yield lambda: None if time_limit is None else max(end - time.monotonic(), 1e-9)
        return

    def time_left() -> float | None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return None if time_limit is None else max(end - time.monotonic(), 1e-9)

    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        signal.setitimer(signal.ITIMER_REAL, min(time_limit or 0, 1e8))
        yield time_left
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _tell_costs() -> Callable[[int, int], None]:
    """An ``o`` line for every better cost; to be called with the bounds."""
    costs = [math.inf]

    def tell(lower_bound: int, cost: int) -> None:
        if cost < costs[-1]:
            costs.append(cost)
            _say(f"o {cost}")

    return tell


def _bounds(lower_bound: int, cost: int) -> str:
    return f"c bounds {lower_bound}..{cost}, gap {(cost - lower_bound) / max(cost, 1):.1%}"


def _literal_lines(literals: Sequence[int]) -> Iterable[str]:
    """``v`` lines that end with 0."""
    words = [*map(str, literals), "0"]
    return (" ".join(["v", *words[i:i + _PER_LINE]]) for i in range(0, len(words), _PER_LINE))


def _literals(model: npt.NDArray[np.int8]) -> list[int]:
    import numpy as np

    variables = np.arange(1, len(model))
    return np.where(model[1:] == 1, variables, -variables).tolist()


# --- formulas -------------------------------------------------------------------------------------------------------


def _cnf(arguments: argparse.Namespace, time_left: TimeLeft) -> int:
    from .sat import Solver, read_dimacs

    formula = read_dimacs(arguments.file)
    _say(f"c {formula.n_variables} variables, {len(formula)} clauses")
    # One call, so CaDiCaL's own defaults; with a proof no variables of its own, which checkers need not know.
    with Solver(lucky=1, factor=int(arguments.proof is None)) as solver:
        if arguments.proof is not None:
            solver.proof(arguments.proof, format=arguments.proof_format, binary=not arguments.proof_text)
        solver.reserve(max(formula.clauses.max(initial=0), -formula.clauses.min(initial=0)))
        for piece in _pieces(formula.clauses):
            solver.add(piece)
        answer = solver.solve(arguments.assume, time_limit=time_left())
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


def _pieces(clauses: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    """The clauses a part at a time: signals are answered between calls only."""
    start = 0
    while start < len(clauses):
        stop = min(start + _PIECE, len(clauses))
        while clauses[stop - 1] != 0:
            stop += 1
        yield clauses[start:stop]
        start = stop


def _wcnf(arguments: argparse.Namespace, time_left: TimeLeft) -> int:
    from .sat import minimize, read_wcnf

    formula = read_wcnf(arguments.file)
    n_hard = int((formula.hard == 0).sum())
    _say(f"c {formula.n_variables} variables, {n_hard} hard and {len(formula.weights)} soft clauses")
    tell = _tell_costs()
    found = minimize(formula, time_limit=time_left(), keep_on_interrupt=True, on_bounds=tell, certify=arguments.certify)
    _say(f"c {found.statistics['cores']} cores, {found.statistics['solves']} calls of the SAT solver")
    if found.satisfiable is False:
        _say("s UNSATISFIABLE")
        status = _UNSATISFIABLE
    elif found.model is None or found.cost is None:
        _say(f"c lower bound {found.lower_bound}", "s UNKNOWN")
        status = _UNKNOWN
    else:
        tell(found.lower_bound, found.cost)
        _say(_bounds(found.lower_bound, found.cost))
        # The evaluation's value lines: literals up to 2021, one bit per variable since the format without header.
        values = _literal_lines(_literals(found.model)) if formula.header else \
            ["v " + "".join(map(str, found.model[1:].tolist()))]
        _say("s OPTIMUM FOUND" if found.optimal else "s SATISFIABLE", *values)
        status = _OPTIMUM if found.optimal else _SATISFIABLE
    with _afterwards():
        _proven(arguments, found.optimal or found.satisfiable is False, found.cost, lambda: formula, time_left)
    return status


@contextmanager
def _afterwards() -> Iterator[None]:
    """For what follows the answer, which stands whatever becomes of it."""
    try:
        yield
    except KeyboardInterrupt:
        _say("c stopped")
    except (ClueError, OSError, MemoryError) as error:
        _say(f"c {error or 'there is not enough memory'}")


def _proven(arguments: argparse.Namespace, optimal: bool, cost: int | None, formula: Callable[[], WCNF],
            time_left: TimeLeft) -> None:
    """Tell of the certificate, and write the refutation of a lower cost, where they are asked for."""
    if arguments.certify is not None:
        _say(f"c {Path(arguments.certify).stat().st_size} bytes of certificate" if optimal else
             "c no certificate is written: the optimum is not proven")
    if arguments.lrat is None:
        return
    if not optimal or not cost:
        _say("c no refutation is written: " + ("nothing costs less than 0" if cost == 0 else "no optimum is proven"))
        return
    from .sat.refutation import write_refutation

    if write_refutation(formula(), cost, arguments.lrat, time_limit=time_left()):
        _say(f"c cost {cost - 1} is refuted in {Path(arguments.lrat + '.lrat').stat().st_size} bytes of LRAT")
    else:
        _say("c no refutation is written: the time limit struck")


# --- circuits -------------------------------------------------------------------------------------------------------


def read_circuits(file: str, retain_files: Sequence[str]) -> tuple[Any, Any, npt.NDArray[np.int64] | None]:
    """Forget circuits, retain circuits and weights of a question, or of a forget circuit and retain circuits."""
    from .logic.question import read_question

    data = _json(file) if file.lower().endswith(".json") else {}
    if "forget" in data or "retain" in data:
        if retain_files:
            raise ClueError(f"--retain: {file} has its own retain circuits")
        question = read_question(file, data)
        return question.forget, question.retain, question.weights
    if not retain_files:
        raise ClueError(f"{file} is one circuit: give at least one other with --retain FILE")
    return [_circuit(file)], [_circuit(path) for path in retain_files], None


def _circuits(arguments: argparse.Namespace, time_left: TimeLeft) -> int:
    from .logic import Explainer, assign, node_ids, operate
    from .logic.formula import as_wcnf
    from .types import Role

    forget, retain, weights = read_circuits(arguments.file, arguments.retain)
    for circuit in forget[:1]:
        node_ids(circuit.graph, arguments.explain, "--explain")
    start = time.perf_counter()
    common: dict[str, Any] = {"weights": weights, "never": arguments.never, "must": arguments.must,
                              "time_limit": time_left() or 0, "keep_on_interrupt": True}
    tell = _tell_costs()
    if arguments.surgical:
        found = operate(forget, retain, budget=arguments.budget, most=arguments.most, **common)
    else:
        found = assign(forget, retain, semantics=arguments.semantics, on_bounds=tell, certify=arguments.certify, **common)
    tell(found.lower_bound, found.cost)
    graph = forget[0].graph
    _say(f"c {graph.n_nodes} nodes, {sum(len(c.src) for c in (*forget, *retain))} edges,"
         f" solved in {time.perf_counter() - start:.3f} s",
         f"c {found.n_forced} conflicts are forced, {found.n_chosen} chosen",
         _bounds(found.lower_bound, found.cost))
    if arguments.surgical:
        _say(f"c {found.statistics['edits']} nodes are edited, of weight {found.statistics['edit_weight']}")
    _say("s OPTIMUM FOUND" if found.optimal else "s SATISFIABLE")
    _say(*(f"v {Role(role).name.lower()} {graph.name(node)}" for node, role in enumerate(found.role.tolist())))
    with _afterwards():
        if arguments.explain and found.optimal:
            explainer = Explainer(forget, retain, semantics=arguments.semantics, weights=weights, assignment=found)
            for node in arguments.explain:
                _say(*(f"c {line}" for line in explainer.explain(node).lines(graph.name, found.cost)))
        elif arguments.explain:
            _say("c only roles at a proven least cost are explained")
        _proven(arguments, found.optimal, found.cost,
                lambda: as_wcnf(forget, retain, semantics=arguments.semantics, weights=weights), time_left)
    return _OPTIMUM if found.optimal else _SATISFIABLE


def _json(path: str) -> dict[str, Any]:
    from .circuit.named_edges import load

    data = load(path)
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

"""Logic: from the circuits of forget and retain sets to a role for every node.

Every node n has two variables: r_n, it works for the retain circuits, and f_n, it works for the forget circuits. The
retain outputs must work, the forget outputs must not, and each gate passes this on to its inputs (CLUE, ICLR 2026, and
the gate theory of arXiv 2505.10039). A node that must work for one side and stop for the other is a conflict; the
native core finds the assignment with the fewest, by propagation and core-guided MaxSAT on CaDiCaL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..certificate import Verified, digest, name_of, read, verified
from ..data.atomic import write_atomically
from ..errors import CircuitError
from ..types import Gate, Role
from ..values import ByValue

if TYPE_CHECKING:
    from ..circuit.graph import Circuit, Graph

#: Scores become integers between 0 and this, so that sums are exact and equal on every machine.
SCORE_STEPS = 1 << 20

_ARRAYS = {"role": np.uint8, "retain_works": np.int8, "forget_works": np.int8, "forced": np.bool_}
_NUMBERS = ("cost", "lower_bound", "optimal", "n_forced", "n_chosen", "statistics")


@dataclass(frozen=True, eq=False)
class Assignment(ByValue):
    """What the solved formula says of every node.

    Attributes:
        role: uint8 [nodes], values of :class:`clue.types.Role`; FREE where a node has no weights of its own.
        retain_works: int8 [nodes], r_n: 1 or 0, and -1 where the node is in no retain circuit.
        forget_works: int8 [nodes], f_n: 1 or 0, and -1 where the node is in no forget circuit.
        forced: bool [nodes], the conflict follows by propagation from the outputs alone.
        cost: weighted number of conflicts.
        lower_bound: proven bound below which no assignment can go.
        optimal: ``cost`` is proven to be the least; false only if the time limit struck or it was interrupted.
        n_forced, n_chosen: conflicts that propagation forces, and those the solver chose among alternatives.
        statistics: ``unique`` (1 if every level of the order was decided), open ``variables`` and ``clauses`` after
            propagation, their connected ``components``, unsatisfiable ``cores`` and ``solves`` of the SAT solver.
    """

    role: npt.NDArray[np.uint8]
    retain_works: npt.NDArray[np.int8]
    forget_works: npt.NDArray[np.int8]
    forced: npt.NDArray[np.bool_]
    cost: int
    lower_bound: int
    optimal: bool
    n_forced: int
    n_chosen: int
    statistics: dict[str, float | int]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the assignment as one JSON file."""
        data: dict[str, Any] = {name: getattr(self, name).astype(int).tolist() for name in _ARRAYS}
        data |= {name: getattr(self, name) for name in _NUMBERS}
        write_atomically(path, json.dumps(data).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Assignment:
        """Read an assignment that :meth:`save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            arrays: dict[str, Any] = {name: np.array(data[name], dtype=dtype) for name, dtype in _ARRAYS.items()}
            if len({array.shape for array in arrays.values()}) > 1:
                raise ValueError("its columns differ in length")
            return cls(**arrays, **{name: data[name] for name in _NUMBERS})
        except FileNotFoundError:
            raise CircuitError(f"{path} does not exist: make it with `clue localize`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CircuitError(f"{path} is not an assignment file ({error}): run `clue localize` again") from None


def assign(
    forget: Sequence[Circuit],
    retain: Sequence[Circuit],
    *,
    semantics: str = "support",
    weights: npt.NDArray[np.int64] | None = None,
    retain_score: npt.ArrayLike | None = None,
    forget_score: npt.ArrayLike | None = None,
    never: Sequence[int | str] = (),
    must: Sequence[int | str] = (),
    time_limit: float = 0,
    keep_on_interrupt: bool = False,
    on_bounds: Callable[[int, int], object] | None = None,
    certify: str | os.PathLike[str] | None = None,
) -> Assignment:
    """Give every node its role, at the least cost of conflicts.

    A node's incoming edges in one circuit form a group per gate. If a node must work for the retain circuits, its AND
    and ADDER groups need all inputs to work and its OR groups one; if it must die for the forget circuits, its OR and
    ADDER groups need all inputs dead and its AND groups one. ``semantics="support"`` reads this one way only, since an
    edit may stop a node whose inputs work; ``"authors"`` makes each group alone equivalent to its node, as the released
    code does. The embedding always works: it satisfies retain OR groups and is left out of forget groups. A conflict is
    a node of both sides with weights of its own, r_n true and f_n false; embedding and output never count.

    Among all assignments the one returned is best in this order, so it is the same on every machine:

    1. least sum of ``weights`` over conflicts;
    2. least retain attribution at risk: the sum of ``retain_score`` over retain nodes with r_n = 0, plus its sum over
       editable retain nodes with f_n = 0;
    3. most forget attribution reached: the sum of ``forget_score`` over editable forget nodes with f_n = 0;
    4. from node 0 upwards: f_n = 1 is preferred, then r_n = 1.

    Args:
        forget, retain: circuits of one graph, at least one on each side; all constraints of a side hold together.
        semantics: ``support`` or ``authors``.
        weights: int64 [nodes] >= 0, cost of a conflict at each node; 1 everywhere if not given.
        retain_score, forget_score: float [nodes] >= 0 for levels 2 and 3, which are skipped if not given. Each is
            scaled by its maximum and rounded (ties to even) to integers 0 .. :data:`SCORE_STEPS`.
        never, must: nodes, by id or name, with f_n = 1 and f_n = 0 in every assignment considered: those that are not to
            be edited, and those that are.
        time_limit: seconds after which the best assignment so far is returned; 0 never stops early.
        keep_on_interrupt: on Ctrl-C, too, return the best so far instead of raising, if there is one yet, as there always
            is without pins.
        on_bounds: called with lower bound and cost when they are first known and whenever one of the two improves. What
            it raises ends the search and is passed on, except that a KeyboardInterrupt counts as Ctrl-C.
        certify: a file to write the proof of the least cost to, for :func:`check_certificate`. It is written if
            ``optimal``, and not at all if the time limit struck. What the search derives is kept until then, about 2 MB
            for each second of a hard one.

    Raises:
        CircuitError: no circuit on a side, circuits of different graphs, an edge that names an unknown node or closes a
            cycle, an output that nothing reaches, weights or scores that are negative or of the wrong length, or pins
            that contradict each other or the circuits (a subset-minimal set of them is named), that go with ``certify``,
            or that nothing was found to obey before the time limit struck.
        KeyboardInterrupt: on Ctrl-C, within about 50 ms.
        OSError: the certificate cannot be written.
    """
    question = pose(forget, retain, semantics=semantics, weights=weights, retain_score=retain_score,
                    forget_score=forget_score)
    pins = pinned(forget, never, must)
    if certify is not None and pins is not None:
        raise CircuitError("certify goes without never and must: what is proven is the least cost of all assignments")
    found = ask(question, forget_pin=pins, time_limit=time_limit, keep_on_interrupt=keep_on_interrupt, on_bounds=on_bounds,
                certify=certify)
    if found is None:
        from .surgery import blame

        raise CircuitError(blame(forget, semantics, pins))
    return found


def pose(forget: Sequence[Circuit], retain: Sequence[Circuit], *, semantics: str = "support",
         weights: npt.ArrayLike | None = None, retain_score: npt.ArrayLike | None = None,
         forget_score: npt.ArrayLike | None = None) -> dict[str, Any]:
    """The arguments of :func:`assign`, checked, as the native core takes them."""
    for side, circuits in (("forget", forget), ("retain", retain)):
        if not circuits:
            raise CircuitError(f"there is no {side} circuit: give at least one")
    if semantics not in ("support", "authors"):
        raise CircuitError(f"semantics: expected 'support' or 'authors', got {semantics!r}")
    graph = forget[0].graph
    for circuit in (*forget, *retain):
        _check(circuit, graph)
    n = graph.n_nodes
    return {
        "n_nodes": n, "editable": np.ascontiguousarray(graph.editable, dtype=np.uint8),
        "forget": [_edges(circuit) for circuit in forget], "retain": [_edges(circuit) for circuit in retain],
        "weights": _costs(weights, n), "risk": _steps("retain_score", retain_score, n),
        "reach": _steps("forget_score", forget_score, n), "semantics": semantics,
    }


def ask(question: dict[str, Any], *, retain_pin: npt.NDArray[np.int8] | None = None,
        forget_pin: npt.NDArray[np.int8] | None = None, time_limit: float = 0, keep_on_interrupt: bool = False,
        on_bounds: Callable[[int, int], object] | None = None,
        certify: str | os.PathLike[str] | None = None) -> Assignment | None:
    """The best assignment among those that obey the pins, or None if none does.

    Args:
        question: from :func:`pose`.
        retain_pin, forget_pin: int8 [nodes], r_n and f_n as they must be, -1 where they are free.
        time_limit, keep_on_interrupt, on_bounds, certify: as in :func:`assign`; no certificates with pins.

    Raises:
        CircuitError: the native core refuses the question, or the time was up before anything obeyed the pins.
    """
    try:
        found = _core.assign(**question, time_limit=time_limit, on_bounds=on_bounds, retain_pin=retain_pin,
                             forget_pin=forget_pin, digest=None if certify is None else _digest(question))
    except ValueError as error:
        raise CircuitError(str(error)) from None
    interrupted = found["interrupted"]
    if interrupted is not None and not (keep_on_interrupt and isinstance(interrupted, KeyboardInterrupt)):
        raise interrupted
    if not found["feasible"]:
        return None
    if certify is not None and found["optimal"]:
        write_atomically(certify, found["certificate"])
    n, editable = question["n_nodes"], question["editable"].astype(bool)
    conflict = found["conflict"].astype(bool)
    forced = found["forced"].astype(bool)
    role = np.full(n, Role.FREE, dtype=np.uint8)
    role[editable & (found["retain_works"] == 1)] = Role.RETAIN
    role[editable & (found["forget_works"] == 0)] = Role.FORGET
    role[conflict] = Role.CONFLICT
    return Assignment(
        role=role,
        retain_works=found["retain_works"],
        forget_works=found["forget_works"],
        forced=forced,
        cost=found["cost"],
        lower_bound=found["lower_bound"],
        optimal=found["optimal"],
        n_forced=int(forced.sum()),
        n_chosen=int((conflict & ~forced).sum()),
        statistics={name: int(found[name])
                    for name in ("unique", "variables", "clauses", "components", "cores", "solves")},
    )


def check_certificate(
    forget: Sequence[Circuit],
    retain: Sequence[Circuit],
    certificate: str | os.PathLike[str] | bytes,
    *,
    semantics: str = "support",
    weights: npt.NDArray[np.int64] | None = None,
) -> Verified:
    """Check that an assignment's cost is the least, without the solver that found it.

    The formula is regenerated from the circuits. The certificate's assignment must satisfy it and cost what is claimed,
    and every derived clause and core must follow from the clauses it names.

    Args:
        forget, retain, semantics, weights: the question, as :func:`assign` was asked it.
        certificate: the file that :func:`assign` wrote, or its bytes.

    Raises:
        RefutedError: the certificate does not prove its claim.
        CertificateError: it is no certificate, of another version, or of another question.
        CircuitError: as :func:`assign`.
        KeyboardInterrupt: on Ctrl-C.
    """
    question = pose(forget, retain, semantics=semantics, weights=weights)
    content = read(certificate)
    try:
        found = _core.check_circuits(**{name: question[name] for name in _PROVEN}, digest=_digest(question),
                                     certificate=content)
    except ValueError as error:
        raise CircuitError(str(error)) from None
    return verified(name_of(certificate), found, len(content))


#: What of a question its least cost depends on; the order among the least costly is not what is proven.
_PROVEN = ("n_nodes", "editable", "forget", "retain", "weights", "semantics")


def _digest(question: dict[str, Any]) -> bytes:
    forget, retain = question["forget"], question["retain"]
    arrays = [array for side in (forget, retain) for circuit in side for array in circuit]
    return digest(f"circuits {question['semantics']} {len(forget)} {len(retain)}",
                  [question["editable"], question["weights"], *arrays])


def node_ids(graph: Graph, nodes: Sequence[int | str], argument: str) -> list[int]:
    """Ids of nodes that are given by id or name.

    Raises:
        CircuitError: there is no such node; names ``argument``.
    """
    if isinstance(nodes, (str, int)):
        raise CircuitError(f"{argument}: expected a list of nodes, got {nodes!r}")
    names = {name: node for node, name in enumerate(graph.names)} if any(isinstance(x, str) for x in nodes) else {}
    found = []
    for node in nodes:
        known = names.get(node) if isinstance(node, str) else None if isinstance(node, bool) else node
        if not isinstance(known, (int, np.integer)) or not 0 <= known < graph.n_nodes:
            raise CircuitError(f"{argument}: there is no node {node!r}; its name or an id in 0..{graph.n_nodes - 1} is"
                               " needed")
        found.append(int(known))
    return found


def pinned(forget: Sequence[Circuit], never: Sequence[int | str], must: Sequence[int | str]) -> Any:
    """f_n as the pins have it: int8 [nodes], 1 never edited, 0 edited, -1 free; None without pins.

    Raises:
        CircuitError: a node is unknown, pinned both ways, or must be edited although it has no weights of its own or is
            in no forget circuit.
    """
    if not forget or (not isinstance(never, (str, int)) and not isinstance(must, (str, int)) and not len(never)
                      and not len(must)):
        return None
    graph = forget[0].graph
    keep, edit = node_ids(graph, never, "never"), node_ids(graph, must, "must")
    if both := sorted({*keep} & {*edit}):
        raise CircuitError(f"{', '.join(graph.name(node) for node in both)}: pinned both ways, never and must")
    for node in edit:
        if not graph.editable[node]:
            raise CircuitError(f"must: {graph.name(node)} has no weights of its own to edit")
        if not any(np.any((c.src == node) | (c.dst == node)) for c in forget):
            raise CircuitError(f"must: {graph.name(node)} is in no forget circuit, so nothing is forgotten by editing it")
    pins = np.full(graph.n_nodes, -1, dtype=np.int8)
    pins[[node for node in keep if graph.editable[node]]] = 1
    pins[edit] = 0
    return pins


def _costs(weights: npt.ArrayLike | None, n: int) -> npt.NDArray[np.int64]:
    if weights is None:
        return np.ones(n, dtype=np.int64)
    costs = _numbers("weights", weights, n)
    if np.any(costs != np.trunc(costs)):
        raise CircuitError("weights must be integers: scale them")
    if np.any(costs > np.iinfo(np.int64).max // (4 * n)):
        raise CircuitError(f"weights: expected at most {np.iinfo(np.int64).max // (4 * n)}, got {costs.max()}: sums over"
                           " all nodes must fit into 63 bits")
    return np.ascontiguousarray(costs, dtype=np.int64)


def _check(circuit: Circuit, graph: Graph) -> None:
    """Refuse a circuit that has no meaning as a formula; node names are in the message."""
    where = f"circuit {circuit.name}"
    if circuit.graph is not graph and circuit.graph != graph:
        raise CircuitError(f"{where} belongs to another graph than the first: cut all circuits from the same model at"
                           " the same granularity")
    src, dst = circuit.src, circuit.dst
    if len(src) == 0:
        raise CircuitError(f"{where} has no edges: keep more of them (--edges)")
    for ids in (src, dst):
        if ids.min() < 0 or ids.max() >= graph.n_nodes:
            raise CircuitError(f"{where}: an edge names a node outside 0..{graph.n_nodes - 1}")
    backwards = np.flatnonzero(src >= dst)
    if len(backwards):
        edge = backwards[0]
        raise CircuitError(f"{where}: edge {graph.name(int(src[edge]))} -> {graph.name(int(dst[edge]))} closes a cycle:"
                           " ids are topologically sorted, so edges run from lower to higher ids")
    if circuit.gate.max() > max(Gate):
        raise CircuitError(f"{where}: gate {int(circuit.gate.max())} is none of 0 (AND), 1 (OR), 2 (ADDER)")
    if not np.any(dst == graph.n_nodes - 1):
        raise CircuitError(f"{where}: nothing reaches the output: keep more edges (--edges)")


def _edges(circuit: Circuit) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    return (np.ascontiguousarray(circuit.src, dtype=np.int32), np.ascontiguousarray(circuit.dst, dtype=np.int32),
            np.ascontiguousarray(circuit.gate, dtype=np.uint8))


def _numbers(name: str, values: npt.ArrayLike, n: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise CircuitError(f"{name} must hold one number per node: expected shape ({n},), got {array.shape}")
    if array.dtype.kind not in "biuf":
        raise CircuitError(f"{name} must hold numbers, got an array of {array.dtype}")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        raise CircuitError(f"{name} must be finite and not negative (node {int(np.argmax(wrong))})")
    return array


def _steps(name: str, scores: npt.ArrayLike | None, n: int) -> npt.NDArray[np.int64]:
    """Scores as integers; IEEE division and rounding make them the same everywhere."""
    if scores is None:
        return np.zeros(n, dtype=np.int64)
    array = _numbers(name, scores, n).astype(np.float64)
    largest = array.max(initial=0.0)
    if largest == 0.0:
        return np.zeros(n, dtype=np.int64)
    return np.rint(array / largest * SCORE_STEPS).astype(np.int64)


# These build on what is above.
from .explanation import Explainer, Explanation, WhatIf, explain  # noqa: E402
from .gates import GateGroup  # noqa: E402
from .surgery import operate  # noqa: E402

__all__ = ["SCORE_STEPS", "Assignment", "Explainer", "Explanation", "GateGroup", "WhatIf", "assign", "explain",
           "check_certificate", "operate"]

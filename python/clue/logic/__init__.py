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

if TYPE_CHECKING:
    from ..circuit.graph import Circuit, Graph

#: Scores become integers between 0 and this, so that sums are exact and equal on every machine.
SCORE_STEPS = 1 << 20

_ARRAYS = {"role": np.uint8, "retain_works": np.int8, "forget_works": np.int8, "forced": np.bool_}
_NUMBERS = ("cost", "lower_bound", "optimal", "n_forced", "n_chosen", "statistics")


@dataclass(frozen=True)
class Assignment:
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
        time_limit: seconds after which the best assignment so far is returned; 0 never stops early.
        keep_on_interrupt: on Ctrl-C, too, return the best so far instead of raising.
        on_bounds: called with lower bound and cost when they are first known and whenever one of the two improves. What
            it raises ends the search and is passed on, except that a KeyboardInterrupt counts as Ctrl-C.
        certify: a file to write the proof of the least cost to, for :func:`check_certificate`. It is written if
            ``optimal``, and not at all if the time limit struck. What the search derives is kept until then, about 2 MB
            for each second of a hard one.

    Raises:
        CircuitError: no circuit on a side, circuits of different graphs, an edge that names an unknown node or closes a
            cycle, an output that nothing reaches, or weights or scores that are negative or of the wrong length.
        KeyboardInterrupt: on Ctrl-C, within about 50 ms.
        OSError: the certificate cannot be written.
    """
    graph, question = _question(forget, retain, weights)
    n = graph.n_nodes
    try:
        found = _core.assign(
            *question, _steps("retain_score", retain_score, n), _steps("forget_score", forget_score, n), semantics,
            time_limit, on_bounds, None if certify is None else _digest(question, semantics),
        )
    except ValueError as error:
        raise CircuitError(str(error)) from None
    interrupted = found["interrupted"]
    if interrupted is not None and not (keep_on_interrupt and isinstance(interrupted, KeyboardInterrupt)):
        raise interrupted
    if certify is not None and found["optimal"]:
        write_atomically(certify, found["certificate"])
    conflict = found["conflict"].astype(bool)
    forced = found["forced"].astype(bool)
    role = np.full(n, Role.FREE, dtype=np.uint8)
    editable = np.asarray(graph.editable, dtype=bool)
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
    _, question = _question(forget, retain, weights)
    content = read(certificate)
    try:
        found = _core.check_circuits(*question, semantics, _digest(question, semantics), content)
    except ValueError as error:
        raise CircuitError(str(error)) from None
    return verified(name_of(certificate), found, len(content))


_Edges = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]
_Question = tuple[int, npt.NDArray[np.uint8], list[_Edges], list[_Edges], npt.NDArray[np.int64]]


def _question(forget: Sequence[Circuit], retain: Sequence[Circuit],
              weights: npt.NDArray[np.int64] | None) -> tuple[Graph, _Question]:
    """The arrays of a question, once each circuit has been looked at, and the graph they are about."""
    for side, circuits in (("forget", forget), ("retain", retain)):
        if not circuits:
            raise CircuitError(f"there is no {side} circuit: give at least one")
    graph = forget[0].graph
    for circuit in (*forget, *retain):
        _check(circuit, graph)
    n = graph.n_nodes
    costs = np.ones(n, dtype=np.int64) if weights is None else _numbers("weights", weights, n)
    if np.any(costs != np.trunc(costs)):
        raise CircuitError("weights must be integers: scale them")
    return graph, (n, np.ascontiguousarray(graph.editable, dtype=np.uint8), [_edges(c) for c in forget],
                   [_edges(c) for c in retain], np.ascontiguousarray(costs, dtype=np.int64))


def _digest(question: _Question, semantics: str) -> bytes:
    _, editable, forget, retain, costs = question
    arrays = [array for side in (forget, retain) for circuit in side for array in circuit]
    return digest(f"circuits {semantics} {len(forget)} {len(retain)}", [editable, costs, *arrays])


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


def _edges(circuit: Circuit) -> _Edges:
    return (np.ascontiguousarray(circuit.src, dtype=np.int32), np.ascontiguousarray(circuit.dst, dtype=np.int32),
            np.ascontiguousarray(circuit.gate, dtype=np.uint8))


def _numbers(name: str, values: npt.ArrayLike, n: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise CircuitError(f"{name} must hold one number per node: expected shape ({n},), got {array.shape}")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise CircuitError(f"{name} must be finite and not negative (node {int(np.argmax(~(array >= 0)))})")
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

"""Confirmation: whether a receiver's gates are what exact patching says they are.

Ns and Dn are first-order estimates: an edge that one of them missed by a hair gets an exclusive label, and from the middle
of a path both see a gate whose inputs are gates. So the inputs
of one group (a receiver's edges of one gate) are patched for good, in the otherwise clean run:

    first = what the target loses when one input alone is patched
    last  = what it loses when that input is patched after all others of the group

An AND dies with its first input (last = 0), an OR with its last only (first = 0), an ADDER fades: both take the same.
With two inputs these are runs with one and with two inputs patched: (first + first') / (loss with both) is 2 for AND, 1
for ADDER and 0 for OR, and the bounds between them are halfway, at first / (first + last) = 3/4 and 1/4.

None of this moves the target where an OR further on works by another input, as for OR(a, b) in
OR(AND(OR(a, b), c), d). A gate shows at the output if the ANDs on its way have their other inputs and the ORs have not.
So groups that move nothing are tested once more while the other inputs of the ORs behind them are patched throughout,
and again whenever a gate behind them turns out to be another one.

Nothing is silently relabelled: found-by bits stay, and ``CONFIRMED`` or ``CONTRADICTED`` is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..config import LocalizeSettings, check
from ..types import Gate, NodeKind, Provenance
from .faithfulness import SAMPLE, Part, check_graph, measure, places, sample
from .graph import Circuit, Floats, reached

if TYPE_CHECKING:
    from ..data.pairs import Pairs
    from ..model.anatomy import Anatomy

#: Inputs of a group that are tested, strongest first; all of the group are patched around them.
MOST_INPUTS = 8

#: What a test must move, as a share of m(full) - m(empty), to say anything.
NOTICEABLE = 0.01

_LABEL = {Provenance.NOISING: Gate.AND, Provenance.DENOISING: Gate.OR, Provenance.BOTH: Gate.ADDER}


@dataclass(frozen=True)
class _Group:
    """The edges of one gate into one receiver, by number, and those of them that are tested, strongest first."""

    edges: npt.NDArray[np.intp]
    tested: npt.NDArray[np.intp]
    strength: float


def confirm(body: Anatomy, pairs: Pairs, circuit: Circuit,
            settings: LocalizeSettings = LocalizeSettings()) -> Circuit:
    """Test the gates of a circuit's strongest receivers.

    A group is tested if it has at least two inputs: with one, AND, OR and ADDER are the same. Receivers are ranked by
    the largest score of their edges in the direction that found them.

    Costs, on at most :data:`clue.circuit.faithfulness.SAMPLE` pairs, two forward passes and at most
    2 * :data:`MOST_INPUTS` + 1 patched ones per group; a receiver has at most three groups. Groups behind which an OR
    works without them cost this and one more pass again, for each gate on their way that has to be seen first at most.

    Args:
        body, pairs: what the circuit was found on.
        circuit: at block or neuron level.
        settings: ``confirm`` (the number of receivers), ``target`` and ``batch_size`` are used.

    Returns:
        The circuit with ``CONFIRMED`` added to the edges whose gate patching sees too, and ``CONTRADICTED`` to those
        where it sees another gate, which they now have. Edges whose patching moves the target by less than
        :data:`NOTICEABLE` stay as they are.
    """
    check(settings, LocalizeSettings)
    check_graph(body, circuit.graph, circuit.name)
    groups = _groups(circuit, settings.confirm)
    if not groups:
        return circuit
    gate, provenance = circuit.gate.copy(), circuit.provenance.copy()
    few, nothing = sample(pairs, SAMPLE), np.zeros(0, dtype=np.intp)
    tested = [(group, nothing) for group in groups]  # with what is patched around them
    while tested:
        unmoved = []
        for (group, around), moved in zip(tested, _moved(body, few, circuit, tested, settings), strict=True):
            first, last = moved
            seen = first + last >= NOTICEABLE
            if not seen.any():
                unmoved.append((group, around))
                continue
            edges, share = group.tested[seen], first[seen] / (first + last)[seen]
            found = np.where(share > 0.75, Gate.AND, np.where(share < 0.25, Gate.OR, Gate.ADDER))
            provenance[edges] |= np.where(found == gate[edges], Provenance.CONFIRMED, Provenance.CONTRADICTED).astype(np.uint8)
            gate[edges] = found
        # Only what is patched around a group can make it move now, and that follows from the gates found meanwhile.
        now = [(group, before, satisfying(circuit, gate, int(circuit.dst[group.edges[0]]))) for group, before in unmoved]
        tested = [(group, around) for group, before, around in now if not np.array_equal(before, around)]
    return replace(circuit, gate=gate, provenance=provenance)


def _moved(body: Anatomy, pairs: Pairs, circuit: Circuit, tested: list[tuple[_Group, npt.NDArray[np.intp]]],
           settings: LocalizeSettings) -> list[tuple[Floats, Floats]]:
    """For each group, first and last of its tested edges, float64 >= 0, as shares of m(full) - m(empty)."""
    cuts: dict[bytes, tuple[int, npt.NDArray[np.intp]]] = {}

    def number(*edges: npt.NDArray[np.intp]) -> int:
        """The number of the run with these edges patched; equal sets share a run."""
        patched = np.unique(np.concatenate(edges))
        return cuts.setdefault(patched.tobytes(), (len(cuts), patched))[0]

    runs = [([number(around)] if len(around) else [],
             [number(around, np.array([edge])) for edge in group.tested],
             [number(around, np.setdiff1d(group.edges, [edge])) for edge in group.tested],
             number(around, group.edges)) for group, around in tested]
    sets = [patched for _, patched in cuts.values()]
    target = measure(body, pairs, len(sets), lambda i: _without(circuit, sets[i]), settings).faithfulness()
    return [(np.abs((target[base[0]] if base else 1.0) - target[alone]), np.abs(target[others] - target[everything]))
            for base, alone, others, everything in runs]


def satisfying(circuit: Circuit, gate: npt.NDArray[np.uint8], receiver: int) -> npt.NDArray[np.intp]:
    """The inputs by which the ORs behind a receiver work without it: edge numbers, ascending."""
    behind = reached(circuit.graph.n_nodes, circuit.src, circuit.dst, receiver)
    ors = (gate == Gate.OR) & behind[circuit.dst]
    within = np.zeros(circuit.graph.n_nodes, dtype=bool)
    within[circuit.dst[ors & behind[circuit.src]]] = True
    return np.flatnonzero(ors & ~behind[circuit.src] & within[circuit.dst])


def _groups(circuit: Circuit, receivers: int) -> list[_Group]:
    """The groups of the strongest ``receivers`` receivers."""
    by_receiver: dict[int, list[_Group]] = {}
    noising, denoising = (np.abs(np.nan_to_num(scores)) for scores in (circuit.ns, circuit.dn))
    for found_by, label in _LABEL.items():
        strength = {Gate.AND: noising, Gate.OR: denoising, Gate.ADDER: np.maximum(noising, denoising)}[label]
        gated = np.flatnonzero((circuit.provenance == found_by) & (circuit.gate == label))
        for receiver in np.unique(circuit.dst[gated]).tolist():
            edges = gated[circuit.dst[gated] == receiver]
            if len(edges) > 1:
                order = edges[np.argsort(-strength[edges], kind="stable")]
                by_receiver.setdefault(receiver, []).append(
                    _Group(edges, order[:MOST_INPUTS], float(strength[order[0]])))
    ranked = sorted(by_receiver, key=lambda receiver: (-max(g.strength for g in by_receiver[receiver]), receiver))
    return [group for receiver in ranked[:receivers] for group in by_receiver[receiver]]


def _without(circuit: Circuit, edges: npt.NDArray[np.intp]) -> Part:
    """The whole model but for some edges of a circuit."""
    graph = circuit.graph
    kept = np.ones(graph.residual_edges.shape, dtype=bool)
    neurons = np.ones((graph.n_layers, graph.d_mlp), dtype=bool)
    src, dst = circuit.src[edges], circuit.dst[edges]
    unit = graph.kind[src] == NodeKind.NEURON
    neurons[graph.layer[src[unit]], graph.index[src[unit]]] = False
    kept[places(graph, graph.writers)[src[~unit]], places(graph, graph.readers)[dst[~unit]]] = False
    return Part(kept, neurons)

"""Selection: from scores to a circuit with gates.

1. Ns and Dn are each cut to the same number of edges and of neurons (the papers' misalignment score justifies 1:1).
2. An edge found by Ns alone enters its receiver through an AND gate, by Dn alone through an OR gate, by both through an
   ADDER (arXiv 2505.10039).
3. Inside a head q, k and v feed o; inside an MLP its reader feeds the kept neurons. These edges are structural.
4. Only edges on a path from embed to logits remain. Nothing is relabelled and no edge is invented: a gate left with a
   single input is a one-input gate, and a dead end is dropped.
5. Where the strongest edges do not make a single path, as many more are taken as the first path needs.
6. With a faithfulness target, the number of edges is the least whose circuit, run alone, reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..config import LocalizeSettings, check
from ..errors import CircuitError
from ..types import Gate, NodeKind, Provenance
from .attribution import Scores
from .graph import Bools, Circuit, Floats, Graph, Ints, on_path, sort_edges

_Bytes = npt.NDArray[np.uint8]
_Columns = tuple[Ints, Ints, _Bytes, _Bytes, Floats, Floats]

#: No more than this is asked of the whole model: its faithfulness is 1, but for rounding.
WHOLE = 1 - 1e-4
#: Numbers of edges tried, evenly spread in their logarithm, where all edges miss the faithfulness target.
TRIED = 20


def build_circuit(scores: Scores, settings: LocalizeSettings, *,
                  faithful: Callable[[Circuit], float] | None = None) -> Circuit:
    """Cut a circuit out of the scores.

    Args:
        scores: Ns and Dn of one record set.
        settings: ``edges``, ``neurons``, ``granularity`` and ``faithfulness`` are used; shares of 0 are for
            :func:`clue.size.sized` to choose first.
        faithful: the faithfulness of a circuit (:func:`clue.circuit.faithfulness.judge` makes one); needed if
            ``settings.faithfulness`` is not 0, which replaces ``edges``. Called once per step of a bisection over the
            number of edges, about log2 of all edges: where faithfulness falls as edges are added, the number found is
            one that reaches the target and whose predecessor does not, and a smaller one may do so too. Where all edges
            miss the target, the bisection begins below the first of :data:`TRIED` numbers that reaches it.

    Raises:
        ClueError: a setting is unknown or out of range.
        CircuitError: a share is 0, no edge with a score lies on a path from embed to logits, or none of these numbers of
            edges reaches the faithfulness target.
    """
    check(settings, LocalizeSettings)
    graph = replace(scores.graph, neurons=settings.granularity == "neuron")
    for name, share in (("edges", settings.edges or settings.faithfulness), ("neurons", settings.neurons or not graph.neurons)):
        if not share:
            raise CircuitError(f"circuit {scores.name}: {name} = 0 leaves the size open: give a share, or choose one with"
                               " clue.size.sized, as clue.localize does")
    available = int(graph.residual_edges.sum())

    def cut(count: int) -> Circuit:
        return Circuit(scores.name, graph, *_cut(scores, graph, count, settings.neurons))

    if settings.faithfulness:
        if faithful is None:
            raise CircuitError(f"circuit {scores.name}: a faithfulness target needs the model and its pairs: give"
                               " faithful, or leave faithfulness = 0")
        found: dict[int, float] = {}

        def reaches(count: int) -> bool:
            circuit = cut(count)
            found[count] = faithful(circuit) if len(circuit) else 0.0
            return found[count] >= min(settings.faithfulness, WHOLE)

        low, high = 0, available
        if not reaches(high):
            # Fewer edges may reach more: some work against the answer, and all share the neurons that are kept.
            for high in np.unique(np.geomspace(1, available, TRIED + 1)[:-1].round().astype(int)).tolist():
                if reaches(high):
                    break
                low = high
            else:
                best = max(found, key=found.__getitem__)
                raise CircuitError(f"circuit {scores.name}: of {len(found)} numbers of edges the best, {best} of {available},"
                                   f" reaches a faithfulness of {found[best]:.4f}, not {settings.faithfulness}: keep more"
                                   " neurons (--neurons), or ask for less (--faithfulness)")
        count = _least(low, high, reaches)
        return replace(cut(count), faithfulness=found[count])

    wanted = round(settings.edges * available)
    circuit = cut(wanted)
    if not len(circuit):
        circuit = cut(_least(wanted, available, lambda count: len(cut(count)) > 0))
    if not len(circuit):
        raise CircuitError(f"circuit {scores.name}: no edges with a score lie on a path from embed to logits, so the"
                           " pairs say nothing of how the model answers: give more pairs, other corrupted prompts, or more"
                           " path_steps or path = chained, which find gates behind gates")
    return circuit


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """By bisection the least count above ``low`` that is enough; ``low`` is not, and ``high`` is unless nothing is."""
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _cut(scores: Scores, graph: Graph, count: int, neurons: float) -> _Columns:
    """The ``count`` strongest edges and the strongest share of neurons of each direction, as far as they lie on paths;
    sorted, and empty when there is no path."""
    allowed = graph.residual_edges
    parts = [
        _gated(scores.ns, scores.dn, allowed, count, graph.writers[:, None], graph.readers[None, :]),
        _structural(*graph.inside_heads),
    ]
    if graph.neurons:
        layers = range(graph.n_layers)
        units = np.flatnonzero(graph.kind == NodeKind.NEURON).reshape(graph.n_layers, graph.d_mlp)
        readers = np.array([[graph.mlp_reader(layer)] for layer in layers])
        writers = np.array([[graph.node(NodeKind.MLP, layer)] for layer in layers])
        # Neurons compete within the MLPs whose reader and writer are both wired: elsewhere they would be dead ends.
        wired = np.isin(readers, parts[0][1]) & np.isin(writers, parts[0][0]) & np.ones_like(units, dtype=bool)
        kept = _gated(scores.neuron_ns, scores.neuron_dn, wired, max(1, round(neurons * units.size)), units, writers)
        reader_of = np.broadcast_to(readers, units.shape)[np.isin(units, kept[0])]  # in the order of kept[0]
        parts += [kept, _structural(reader_of, kept[0])]
    src, dst, gate, provenance, ns, dn = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = on_path(graph.n_nodes, src, dst, graph.embed, graph.logits)
    src, dst, gate, provenance, ns, dn = sort_edges(src[keep], dst[keep], gate[keep], provenance[keep], ns[keep],
                                                    dn[keep])
    return src, dst, gate, provenance, ns, dn


def top(scores: Floats, allowed: Bools, count: int) -> Bools:
    """Mask of the ``count`` largest |scores| among the allowed; zeros never count, ties go to the lower index.

    Scores are compared after rounding to seven decimals of the largest, so that the last bits of a sum, which depend on
    the number of threads, rarely decide.
    """
    strength = np.where(allowed, np.abs(scores), 0.0).ravel()
    largest = strength.max(initial=0.0)
    if largest > 0:
        strength = np.round(strength / largest, 7)
    chosen = np.argsort(-strength, kind="stable")[:count]
    mask = np.zeros(strength.shape, dtype=bool)
    mask[chosen[strength[chosen] > 0]] = True
    return mask.reshape(scores.shape)


def _gated(ns: Floats, dn: Floats, allowed: Bools, count: int, src: npt.NDArray[np.integer],
           dst: npt.NDArray[np.integer]) -> _Columns:
    by_ns, by_dn = top(ns, allowed, count), top(dn, allowed, count)
    kept = by_ns | by_dn
    gate = np.where(by_ns & by_dn, Gate.ADDER, np.where(by_ns, Gate.AND, Gate.OR))
    provenance = by_ns * Provenance.NOISING.value + by_dn * Provenance.DENOISING.value
    return (np.broadcast_to(src, kept.shape)[kept].astype(np.int32),
            np.broadcast_to(dst, kept.shape)[kept].astype(np.int32),
            gate[kept].astype(np.uint8), provenance[kept].astype(np.uint8), ns[kept], dn[kept])


def _structural(src: npt.NDArray[np.integer], dst: npt.NDArray[np.integer]) -> _Columns:
    size = len(src)
    return (src.astype(np.int32), dst.astype(np.int32), np.full(size, Gate.AND, dtype=np.uint8),
            np.full(size, Provenance.STRUCTURAL, dtype=np.uint8), np.full(size, np.nan), np.full(size, np.nan))

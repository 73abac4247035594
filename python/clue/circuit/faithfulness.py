"""Faithfulness: how much of what a model does its circuits do, by running them on the unmodified model.

A circuit runs by patching (:mod:`clue.model.patching`): the clean prompt, with every edge outside the circuit carrying
the corrupted run. Its target m(C) lies between that of the empty circuit, which is the corrupted run, and of the full one,
which is the model on the clean prompt:

    faithfulness f(C) = (m(C) - m(empty)) / (m(full) - m(empty))        (arXiv 2403.17806; MIB, arXiv 2504.13151)

so that 1 is all of the model's answer and 0 none of it; above 1 the circuit lacks parts that work against the answer.
Completeness is D(G \\ C || G) (arXiv 2505.10039): the Kullback-Leibler divergence of the model's answer tokens from those
of the complement alone. It is large if nothing outside the circuit does the circuit's work, so **more is better**.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..config import LocalizeSettings, check
from ..errors import CircuitError
from ..model.anatomy import bound
from ..model.modes import frozen
from ..model.patching import patched, record
from ..model.prefix import Prefix, separable, unstretched
from ..types import NodeKind
from .attribution import graph_of
from .graph import Bools, Circuit, Floats, Graph
from .target import Prompts, batches

if TYPE_CHECKING:
    from ..data.pairs import Pairs
    from ..model.anatomy import Anatomy
    from .attribution import Scores

T = TypeVar("T")

#: Shares of all edges at which MIB draws its curve.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

#: Pairs behind each number that selection by a faithfulness target, minimality and confirmation look at.
SAMPLE = 32


@dataclass(frozen=True)
class Part:
    """A part of the model that runs while the rest carries the corrupted run.

    Attributes:
        edges: bool [writers, readers] in the order of ``graph.writers`` and ``graph.readers``.
        neurons: bool [n_layers, d_mlp]; ``None`` means all.
    """

    edges: Bools
    neurons: Bools | None = None

    @classmethod
    def of(cls, circuit: Circuit) -> Part:
        """What a circuit keeps. Edges inside heads need no patching: a head whose output no edge carries is out."""
        graph = circuit.graph
        writer, reader = places(graph, graph.writers), places(graph, graph.readers)
        u, v = writer[circuit.src], reader[circuit.dst]
        between = (u >= 0) & (v >= 0)
        edges = np.zeros(graph.residual_edges.shape, dtype=bool)
        edges[u[between], v[between]] = True
        if not graph.neurons:
            return cls(edges)
        neurons = np.zeros((graph.n_layers, graph.d_mlp), dtype=bool)
        kept = circuit.src[graph.kind[circuit.src] == NodeKind.NEURON]
        neurons[graph.layer[kept], graph.index[kept]] = True
        return cls(edges, neurons)

    def complement(self) -> Part:
        """Everything else. Neurons stay all in where they are no nodes of their own."""
        return Part(~self.edges, None if self.neurons is None else ~self.neurons)


def places(graph: Graph, nodes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """int64 [graph.n_nodes]: the place of each node among ``nodes``, -1 for the others."""
    places = np.full(graph.n_nodes, -1)
    places[nodes] = np.arange(len(nodes))
    return places


@dataclass(frozen=True)
class Measured:
    """Targets per pair, in the order of the pairs.

    Attributes:
        full, empty: float64 [pairs], the clean and the corrupted run.
        parts: float64 [parts, pairs].
        divergence: float64 [parts, pairs], D(part || full) in nats, the mean over the answer span.
    """

    full: Floats
    empty: Floats
    parts: Floats
    divergence: Floats

    def faithfulness(self) -> Floats:
        """float64 [parts], of the means over pairs.

        Raises:
            CircuitError: the corrupted prompts leave the target as it is.
        """
        full, empty = float(self.full.mean()), float(self.empty.mean())
        if abs(full - empty) <= 1e-6 * max(abs(full), abs(empty), 1e-30):
            raise CircuitError(f"the target is {full:.3g} on clean and on corrupted prompts, so no circuit can be judged by"
                               " it: give other corrupted prompts")
        share: Floats = (self.parts.mean(1) - empty) / (full - empty)
        return share


def measure(body: Anatomy, pairs: Pairs, count: int, part: Callable[[int], Part],
            settings: LocalizeSettings = LocalizeSettings()) -> Measured:
    """Run ``count`` parts of the model, ``part(0)`` and so on, on every pair.

    Costs two forward passes of the model and one patched pass per part; each part is made once per batch, so that many
    of them never exist at once. ``batch_size`` and ``target`` of the settings are used.

    Raises:
        ClueError: a setting is unknown or out of range.
        RecordError: a pair is misaligned or does not fit the model (:meth:`clue.data.pairs.Pairs.check`).
        CircuitError: there are no pairs, or a target is not finite.
    """
    check(settings, LocalizeSettings)
    if len(pairs) == 0:
        raise CircuitError("there are no pairs to run a circuit on")
    pairs.check(body)
    device = next(body.model.parameters()).device
    full, empty = np.zeros(len(pairs)), np.zeros(len(pairs))
    values, divergence = np.zeros((count, len(pairs))), np.zeros((count, len(pairs)))
    nothing = np.zeros(graph_of(body).residual_edges.shape, dtype=bool)
    with frozen(body.model):
        for chosen in batches(pairs, settings.batch_size, unstretched(body.model)):
            prompts = Prompts.of(pairs, chosen, device, share=separable(body.model))
            given = (prompts.attended, prompts.positions)
            prefix = Prefix.of(body.model, prompts.prefix)
            corrupted = record(body, prompts.corrupted, *given, prefix)
            contrast = prompts.contrast(corrupted.logits)
            clean = patched(body, prompts.clean, *given, corrupted, nothing, prefix=prefix)
            for row, logits in ((full, clean), (empty, corrupted.logits)):
                row[chosen] = _numbers(prompts.values(settings.target, logits, contrast))
            reference = clean.log_softmax(-1)
            for i in range(count):
                one = part(i)
                logits = patched(body, prompts.clean, *given, corrupted, ~one.edges,
                                 None if one.neurons is None else ~one.neurons, prefix)
                values[i, chosen] = _numbers(prompts.values(settings.target, logits, contrast))
                own = logits.log_softmax(-1)
                divergence[i, chosen] = _numbers((((own - reference) * own.exp()).sum(-1) * prompts.weight).sum(1))
    if not all(np.isfinite(numbers).all() for numbers in (full, empty, values, divergence)):
        raise CircuitError("a run of the model ends in logits that are not finite, so no circuit can be judged by it: its"
                           " activations overflow in its dtype, or a weight is not a number")
    return Measured(full, empty, values, divergence)


def check_graph(body: Anatomy, graph: Graph, name: str) -> None:
    """Raise :class:`CircuitError` unless the graph of a circuit or of scores is this model's, with or without its neurons."""
    expected = graph_of(bound(body), neurons=graph.neurons).to_json()
    other = [key for key, value in graph.to_json().items() if value != expected[key] and (graph.neurons or key != "d_mlp")]
    if other:
        has, theirs = (", ".join(f"{key} {values[key]}" for key in other) for values in (expected, graph.to_json()))
        raise CircuitError(f"{name} is of another model: this one has {has}, the graph there {theirs}")


def _numbers(tensor: torch.Tensor) -> Floats:
    numbers: Floats = tensor.double().cpu().numpy()
    return numbers


def sample(pairs: Pairs, count: int = SAMPLE) -> Pairs:
    """At most ``count`` of the pairs, evenly spread."""
    if len(pairs) <= count:
        return pairs
    chosen = np.linspace(0, len(pairs) - 1, count).round().astype(int)

    def some(values: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(values[i] for i in chosen)

    return replace(pairs, clean=some(pairs.clean), corrupted=some(pairs.corrupted), kind=some(pairs.kind),
                   answer_start=pairs.answer_start[chosen], sources=some(pairs.sources), sha256="")


@dataclass(frozen=True)
class Faithfulness:
    """What a circuit does alone, and what is left without it.

    Attributes:
        name: name of the record set.
        faithfulness: (m(C) - m(empty)) / (m(full) - m(empty)); 1 is ideal.
        completeness: D(G \\ C || G) in nats per answer token; more is better.
        divergence: D(C || G), likewise; 0 is ideal.
        full, empty, circuit, complement: mean targets of the model, of the corrupted run, of the circuit and of
            everything but the circuit.
        edges: number of edges between writers and readers in the circuit, of ``all_edges``.
        pairs: number of pairs.
    """

    name: str
    faithfulness: float
    completeness: float
    divergence: float
    full: float
    empty: float
    circuit: float
    complement: float
    edges: int
    all_edges: int
    pairs: int


def evaluate_circuit(body: Anatomy, pairs: Pairs, circuit: Circuit,
                     settings: LocalizeSettings = LocalizeSettings()) -> Faithfulness:
    """Run a circuit and its complement on the unmodified model.

    Costs two forward passes and two patched ones.

    Args:
        body: the model, bound by :func:`clue.model.anatomy.anatomy`.
        pairs: clean and corrupted prompts; better not those the circuit was found on.
        circuit: at block or neuron level, with at least an edge.
        settings: ``target`` and ``batch_size`` are used.

    Raises:
        CircuitError: no pairs, a circuit of another model, or corrupted prompts that leave the target as it is.
        ClueError: settings or pairs that :func:`measure` refuses.
    """
    check_graph(body, circuit.graph, circuit.name)
    own = Part.of(circuit)
    parts = (own, own.complement())
    found = measure(body, pairs, 2, parts.__getitem__, settings)
    graph = circuit.graph
    return Faithfulness(
        name=circuit.name, faithfulness=float(found.faithfulness()[0]), completeness=float(found.divergence[1].mean()),
        divergence=float(found.divergence[0].mean()), full=float(found.full.mean()), empty=float(found.empty.mean()),
        circuit=float(found.parts[0].mean()), complement=float(found.parts[1].mean()), edges=int(own.edges.sum()),
        all_edges=int(graph.residual_edges.sum()), pairs=len(pairs))


def judge(body: Anatomy, pairs: Pairs, settings: LocalizeSettings = LocalizeSettings()) -> Callable[[Circuit], float]:
    """A function from circuits to faithfulness on at most :data:`SAMPLE` of the pairs, for
    :func:`clue.circuit.selection.build_circuit`. Each call costs three passes of those pairs."""
    few = sample(pairs)

    def faithful(circuit: Circuit) -> float:
        check_graph(body, circuit.graph, circuit.name)
        own = Part.of(circuit)
        return float(measure(body, few, 1, lambda i: own, settings).faithfulness()[0])

    return faithful


@dataclass(frozen=True)
class Curve:
    """Faithfulness over the number of edges, as MIB (arXiv 2504.13151) draws it.

    Attributes:
        fractions: shares of all edges; counts: int64, the number of edges each stands for.
        faithfulness: float64 [fractions].
        cpr: circuit performance ratio, the area under f by the trapezoid rule over the fractions as they are (not their
            logarithms): **more is better**, and more than 1 is possible.
        cmd: circuit-model distance, the area under |1 - f|: **less is better**, 0 is ideal.
    """

    fractions: tuple[float, ...]
    counts: npt.NDArray[np.int64]
    faithfulness: Floats
    cpr: float
    cmd: float


def curve(body: Anatomy, pairs: Pairs, scores: Scores, fractions: Sequence[float] = FRACTIONS,
          settings: LocalizeSettings = LocalizeSettings()) -> Curve:
    """Run the circuits of the highest-scored edges, one per fraction, with all neurons.

    Edges are ranked as selection ranks them (:func:`ranking`), by absolute score; edges without a score come last, so
    that the fraction 1 is the whole model. Costs two forward passes and one patched pass per fraction.

    Raises:
        CircuitError: fractions that do not rise or lie outside (0, 1], scores of another model, or see
            :func:`evaluate_circuit`.
    """
    at = np.array(fractions, dtype=np.float64)
    if at.ndim != 1 or len(at) < 2 or not (np.all(np.diff(at) > 0) and at[0] > 0 and at[-1] <= 1):
        raise CircuitError(f"fractions must be at least two rising numbers in (0, 1], got {tuple(fractions)}")
    check_graph(body, scores.graph, scores.name)
    order = ranking(scores)
    counts = np.maximum(1, np.round(at * len(order))).astype(np.int64)

    def part(i: int) -> Part:
        edges = np.zeros(scores.graph.residual_edges.shape, dtype=bool)
        edges.ravel()[order[:counts[i]]] = True
        return Part(edges)

    found = measure(body, pairs, len(at), part, settings).faithfulness()
    return Curve(tuple(at.tolist()), counts, found, cpr=_area(at, found), cmd=_area(at, np.abs(1 - found)))


def _area(x: Floats, y: Floats) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def ranking(scores: Scores) -> npt.NDArray[np.intp]:
    """Flat indices of all edges, best first: by the better of their ranks in Ns and in Dn, then by the other.

    The first edges are those that either direction, cut to some size, would keep.
    """
    allowed = np.flatnonzero(scores.graph.residual_edges)
    ranks = []
    for array in (scores.ns, scores.dn):
        strength = np.abs(array.ravel()[allowed])
        # Rounded as selection does it, so that the last bits of a sum rarely decide.
        strength = np.round(strength / max(float(strength.max(initial=0.0)), 1e-300), 7)
        rank = np.empty(len(allowed))
        rank[np.argsort(-strength, kind="stable")] = np.arange(len(allowed))
        ranks.append(np.where(strength > 0, rank, len(allowed)))
    order: npt.NDArray[np.intp] = allowed[np.lexsort((np.maximum(*ranks), np.minimum(*ranks)))]
    return order


def minimality(body: Anatomy, pairs: Pairs, circuit: Circuit, settings: LocalizeSettings = LocalizeSettings(), *,
               by: str = "edge") -> Floats:
    """How much of the target a circuit loses without each of its edges or nodes, as a share of m(full) - m(empty).

    In a minimal circuit no drop is 0; a negative one belongs to an edge or node that works against the answer. At most
    :data:`SAMPLE` pairs are used. Costs three passes of them and one more per edge or node.

    Args:
        by: ``edge`` for float64 [edges of the circuit], or ``node`` for float64 [graph.n_nodes], where a node goes with
            all edges that leave or enter it. NaN where there is nothing to remove: edges inside heads and MLPs, nodes
            outside the circuit, ``embed`` and ``logits``.

    Raises:
        CircuitError: see :func:`evaluate_circuit`; or ``by`` is neither.
    """
    check_graph(body, circuit.graph, circuit.name)
    graph, own = circuit.graph, Part.of(circuit)
    writer, reader = places(graph, graph.writers), places(graph, graph.readers)
    neuron = graph.kind == NodeKind.NEURON
    if by == "edge":
        removable = ((writer[circuit.src] >= 0) & (reader[circuit.dst] >= 0)) | neuron[circuit.src]
    elif by == "node":
        removable = circuit.nodes & ((writer >= 0) | (reader >= 0) | neuron)
        removable[[graph.embed, graph.logits]] = False
    else:
        raise CircuitError(f"by = {by!r} is not one of edge, node")
    which = np.flatnonzero(removable)

    def without(i: int) -> Part:
        if i == len(which):
            return own
        edges, neurons = own.edges.copy(), None if own.neurons is None else own.neurons.copy()
        node = circuit.src[which[i]] if by == "edge" else which[i]
        if neuron[node]:
            assert neurons is not None
            neurons[graph.layer[node], graph.index[node]] = False
        elif by == "edge":
            edges[writer[node], reader[circuit.dst[which[i]]]] = False
        else:
            if writer[node] >= 0:
                edges[writer[node]] = False
            if reader[node] >= 0:
                edges[:, reader[node]] = False
        return Part(edges, neurons)

    found = measure(body, sample(pairs), len(which) + 1, without, settings).faithfulness()
    drops = np.full(len(removable), np.nan)
    drops[which] = found[-1] - found[:-1]
    return drops

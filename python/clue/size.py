"""Size: how much of a model its circuits take in, where the settings leave that to the budget of weights.

A circuit's nodes own weights, and a plan moves no others. So the size of circuits follows from how many weights may move:
edges and neurons grow together, the neurons' share at twice the edges', until the nodes of the forget circuit hold
``ratio`` of the weights of all layers' linear maps. The nodes of its plan are among them, so no plan moves more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .circuit.selection import build_circuit
from .config import LocalizeSettings
from .errors import CircuitError
from .types import NodeKind
from .weights import shape_of

if TYPE_CHECKING:
    from .circuit.attribution import Scores
    from .circuit.graph import Floats, Graph
    from .model.anatomy import Anatomy

#: The neurons' share, in units of the edges'.
NEURONS = 2.0
#: Halvings of the interval of shares, which is 2**-20 to 1 and logarithmic: good to half a percent of the share.
_HALVINGS = 11


def sized(body: Anatomy, scores: Scores, settings: LocalizeSettings) -> LocalizeSettings:
    """The settings, with shares of edges and neurons where they are 0: the largest, up to half a percent, at which the
    circuit of ``scores``, those of the forget set, stays within ``settings.ratio``; the least there is where none does.

    A share that is given stays; with a faithfulness target the edges are that one's to choose, and the neurons are as many as
    without it.
    """
    neurons = settings.granularity == "neuron"
    if settings.edges and (settings.neurons or not neurons):
        return settings
    graph = replace(scores.graph, neurons=neurons)
    weights = node_weights(body, graph)
    budget = settings.ratio * float(weights.sum())

    def at(share: float) -> LocalizeSettings:
        return replace(settings, edges=settings.edges or share, neurons=settings.neurons or min(1.0, NEURONS * share))

    def fits(share: float) -> bool:
        try:
            circuit = build_circuit(scores, replace(at(share), faithfulness=0.0))
        except CircuitError:  # no path: which settings find out about is for the circuits themselves to say
            return True
        return float(weights[circuit.nodes].sum()) <= budget

    low, high = -20.0, 0.0
    if fits(1.0):
        return at(1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp2(middle)) else (low, middle)
    return at(math.exp2(low))


def node_weights(body: Anatomy, graph: Graph) -> Floats:
    """float64 [nodes]: number of scalar weights that each node owns, 0 where it owns none."""
    parameters = dict(body.model.named_parameters())
    found = np.zeros(graph.n_nodes)
    kinds, layers = np.asarray(graph.kind), np.asarray(graph.layer)
    for kind, layer in {(int(kind), int(layer)) for kind, layer in zip(kinds, layers, strict=True)}:
        alike = (kinds == kind) & (layers == layer) & graph.editable
        if not alike.any():
            continue
        first = int(np.flatnonzero(alike)[0])
        for name, axis, index in body.slices(NodeKind(kind), layer, int(graph.index[first])):
            shape = shape_of(parameters, name)
            if shape is not None:  # a tied weight, which no plan may move
                found[alike] += len(index) * math.prod(shape) / shape[axis]
    return found

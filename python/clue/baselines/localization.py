"""Localization by a baseline: records in, a plan of a wanted size out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..config import BASELINES, DataSettings, LocalizeSettings, check, check_seed
from ..data.encoding import pad_id
from ..data.pairs import corrupt, encode_set
from ..data.records import RecordSet, read_sets
from ..errors import ClueError, PlanError
from ..plan import Plan
from ..provenance import fingerprint, versions
from ..types import NodeKind, Role
from ..weights import shape_of
from .candidates import candidates
from .gradients import Inputs, unit_attribution
from .scores import OF_MATRICES
from .selection import fill

if TYPE_CHECKING:
    from torch import nn

    from ..circuit.graph import Graph
    from ..model.anatomy import Anatomy

#: Kinds of node that own weights and no others' weights.
_EDITED = (NodeKind.Q, NodeKind.K, NodeKind.V, NodeKind.HEAD, NodeKind.NEURON)


def localize(name: str, model: nn.Module, tokenizer: Any, forget: Any, retain: Any, *, ratio: float = 0.2,
             weights: int | None = None, batch_size: int = LocalizeSettings.batch_size,
             data: DataSettings = DataSettings(), seed: int = 0) -> Plan:
    """Choose the weights that a baseline ranks highest.

    Args:
        name: one of :data:`BASELINES`.
        model: a causal language model of a family in :data:`clue.model.families.FAMILIES`; left as it was.
        tokenizer: its tokenizer.
        forget, retain: as for :func:`clue.localize`.
        ratio: share of the candidates' weights that is chosen, in (0, 1]; ``all`` takes every one.
        weights: how many, in place of ``ratio``. Baselines that choose single weights choose exactly as many, the others
            as many whole rows, units or matrices as fit.
        batch_size: records per forward and backward pass.
        data: how records become tokens.
        seed: of random's numbers, and of eap's corrupted prompts.

    Returns:
        The plan: everything chosen is ``conflict``. Its nodes are those of the model's graph for depn and eap; the others
        know no nodes.

    Raises:
        ClueError: a subclass that names the record, file, argument or parameter at fault.
    """
    from ..model.anatomy import anatomy, check_weights

    if name not in BASELINES:
        raise ClueError(f"{name!r} is no baseline: known are {', '.join(BASELINES)}")
    settings = LocalizeSettings(method=name, ratio=ratio, batch_size=batch_size)
    check(settings)
    check(data, DataSettings)
    seed = check_seed(seed)
    body = anatomy(model)
    check_weights(model)
    sets = read_sets(forget, retain)
    encoded = {key: encode_set(records, tokenizer, body, data, append_eos=data.append_eos and key != "forget")
               for key, records in sets.items()}
    matrices = candidates(body)
    total = sum(matrix.size for matrix in matrices)
    count = round(ratio * total) if weights is None else weights
    if name == "all":
        count = total
    if not 1 <= count <= total:
        raise PlanError(f"{name} cannot choose {count} of the {total} weights of this model's linear maps: give another"
                        " ratio")
    inputs = Inputs(body, matrices, encoded["forget"], [e for key in encoded if key != "forget" for e in encoded[key]],
                    pad_id(tokenizer), batch_size, seed)
    about: dict[str, Any] = {
        "model": {"family": body.family, "fingerprint": fingerprint(model),
                  "parameters": sum(p.numel() for p in model.parameters())},
        "data": {key: {"records": len(records), "sha256": records.sha256} for key, records in sets.items()},
        "settings": {"data": {"chat": data.chat, "append_eos": data.append_eos, "max_length": data.max_length},
                     "localize": {"method": name, "ratio": count / total, "batch_size": batch_size}},
        "seed": seed,
        "versions": versions(),
        "baseline": {"name": name, "wanted": count, "of": total},
    }
    if name in OF_MATRICES:
        slices, more = OF_MATRICES[name](inputs, count)
        about["baseline"] |= more
        parameters = dict(model.named_parameters())
        shapes = {s.parameter: shape for s in slices if (shape := shape_of(parameters, s.parameter)) is not None}
        plan = Plan((), np.zeros(0, dtype=np.uint8), tuple(slices), shapes, about)
    else:
        plan = _of_nodes(name, inputs, sets, tokenizer, data, count, about)
    if not plan.slices:
        raise PlanError(f"{name} finds nothing that fits into {count} weights: give a larger ratio")
    return plan


def _of_nodes(name: str, inputs: Inputs, sets: Mapping[str, RecordSet], tokenizer: Any, data: DataSettings, count: int,
              about: Mapping[str, Any]) -> Plan:
    """The highest nodes of the neuron-level graph: hidden units alone (depn), or heads too (eap)."""
    from ..circuit.attribution import attribute, graph_of

    body = inputs.body
    graph = graph_of(body)
    kinds: tuple[NodeKind, ...]
    if name == "depn":
        kinds, scores = (NodeKind.NEURON,), np.zeros(graph.n_nodes)
        scores[np.flatnonzero(graph.kind == NodeKind.NEURON)] = unit_attribution(inputs, inputs.forget).ravel()
    else:
        kinds = _EDITED
        settings = LocalizeSettings(batch_size=inputs.batch_size)
        pairs = corrupt(sets, tokenizer, body, settings, data, inputs.seed, only="forget")["forget"]
        scores = attribute(body, pairs, settings, name="forget").node_scores(graph)
    nodes = np.flatnonzero(np.isin(graph.kind, [int(kind) for kind in kinds]))
    chosen = nodes[fill(scores[nodes], _sizes(body, graph, nodes), count)]
    role = np.full(graph.n_nodes, Role.FREE, dtype=np.uint8)
    role[chosen] = Role.CONFLICT
    return Plan.of_roles(body, graph, role, about)


def _sizes(body: Anatomy, graph: Graph, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many weights each node owns."""
    parameters = dict(body.model.named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = []
    for node in nodes:
        size = 0
        for name, axis, index in body.slices(NodeKind(graph.kind[node]), int(graph.layer[node]), int(graph.index[node])):
            if name not in shapes:
                shapes[name] = shape_of(parameters, name) or ()
            size += len(index) * int(np.prod(shapes[name]) // shapes[name][axis])
        sizes.append(size)
    return np.array(sizes, dtype=np.int64)

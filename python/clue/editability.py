"""Editability: where forgetting can be bought at the least cost to retention.

    E(node) = sum over the node's weights of g P(g)

with g the forget set's gradient and P the retain metric (:mod:`clue.unlearn.metric`): the Newton decrement of forgetting in
the retain set's curvature, so a unit of forgetting bought at this node alone costs retention in proportion to 1 / E. Circuits
say which sets of nodes suffice; this says which of them are cheap.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .config import DataSettings
from .errors import CircuitError
from .plan import Plan
from .types import NodeKind, Role

if TYPE_CHECKING:
    from .circuit.graph import Graph
    from .data.encoding import Example
    from .data.records import RecordSet
    from .model.anatomy import Anatomy

Floats = npt.NDArray[np.float64]

#: Costs are whole numbers from 1 to this: a node that is a thousand times as dear as the cheapest is out of the question.
DEAREST = 1000
_FILE = "editability.safetensors"


@dataclass(frozen=True, eq=False)
class Editability:
    """E of every node.

    Attributes:
        score: float64 [nodes]; 0 for nodes that were not asked for, or that the forget set does not reach.
    """

    score: Floats

    def costs(self) -> npt.NDArray[np.int64]:
        """int64 [nodes], from 1 (the cheapest) to :data:`DEAREST`: each node's 1 / E, relative to the cheapest one's."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(self.score > 0, self.score.max(initial=0.0) / self.score, np.inf)
        return np.round(np.clip(found, 1, DEAREST)).astype(np.int64)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``editability.safetensors`` into a folder."""
        from safetensors.numpy import save

        from .data.atomic import write_atomically

        write_atomically(Path(folder) / _FILE, save({"score": self.score}))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Editability:
        """Read what :meth:`save` wrote.

        Raises:
            CircuitError: the file is damaged or none of this kind.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(folder) / _FILE
        try:
            return cls(load(path.read_bytes())["score"])
        except (SafetensorError, KeyError):
            raise CircuitError(f"{path} is damaged: remove the folder, and localize again") from None


def editability(body: Anatomy, tokenizer: object, forget: RecordSet, retain: Mapping[str, RecordSet], graph: Graph,
                nodes: npt.NDArray[np.bool_], *, data: DataSettings = DataSettings(), damping: float = 0.01,
                batch_size: int = 8, seed: int = 0) -> Editability:
    """Measure E(node): one pass over the retain sets for the metric, one over the forget set for its gradient.

    Args:
        body: of the model, which is left as it was.
        forget, retain: records; the metric is measured on as many retain records as unlearning takes.
        graph: of this model.
        nodes: bool [nodes], the ones that are asked for; curvature is held for the weights of the editable ones among them.
        data: how records become tokens.
        damping: of the metric, as ``UnlearnSettings.damping``.
        batch_size: records per pass.
        seed: of the choice of retain records.
    """
    import torch

    from .data.encoding import batches, encode, length_limit, pad_id
    from .model.answers import answer_logits
    from .model.modes import evaluating
    from .unlearn.loop import METRIC_RECORDS
    from .unlearn.metric import RetainMetric
    from .unlearn.objectives import answer_log_probs
    from .unlearn.schedule import Pool
    from .unlearn.sparse import SparseGradients

    role = np.where(nodes & graph.editable, Role.CONFLICT, Role.FREE).astype(np.uint8)
    score = np.zeros(graph.n_nodes)
    if not role.any():
        return Editability(score)
    model, pad = body.model, pad_id(tokenizer)
    plan = Plan.of_roles(body, graph, role, {})
    device = next(model.parameters()).device

    def encoded(records: RecordSet, append_eos: bool) -> list[Example]:
        return encode(records, tokenizer, chat=data.chat, append_eos=append_eos,
                      max_length=length_limit(model, data.max_length))

    pool = Pool([encoded(records, data.append_eos) for records in retain.values()], seed)
    sample = pool.take(min(METRIC_RECORDS, len(pool)))
    metric = RetainMetric.measure(model, plan, batches(sample, batch_size, pad=pad, device=device), damping=damping)
    with evaluating(model), SparseGradients(model, plan) as sparse, torch.enable_grad():
        for batch in batches(encoded(forget, False), batch_size, pad=pad, device=device):
            sparse.split(forget=len(batch.input_ids), retain=0, seq=batch.input_ids.shape[1])
            log_p, _ = answer_log_probs(*answer_logits(model, batch))
            (-log_p.sum()).backward()
        taken = sparse.take()
        decrement: dict[str, Floats] = {}  # of each planned slice, in the order of their index
        for name, slices in sparse.planned.items():
            gradient = taken[name].forget
            if gradient is None:
                decrement[name] = np.zeros(len(slices.index))
                continue
            across = slices.axis == 1
            step = metric.precondition(name, gradient.T if across else gradient)
            terms = gradient.double() * (step.T if across else step).double()
            decrement[name] = terms.reshape(len(terms), -1).sum(1).cpu().numpy()
        places = {name: slices.index.cpu().numpy() for name, slices in sparse.planned.items()}
    for node in np.flatnonzero(role):
        kind = NodeKind(graph.kind[node])
        for parameter, _, index in body.slices(kind, int(graph.layer[node]), int(graph.index[node])):
            score[node] += decrement[parameter][np.searchsorted(places[parameter], index)].sum()
    return Editability(score)

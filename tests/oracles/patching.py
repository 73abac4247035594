"""The slow, obviously right patched run: add constants to the inputs of readers until nothing changes any more.

Whatever a patched edge does upstream changes what later writers add, and with it the constants; as the graph has no
cycle, as many rounds as it has levels settle everything.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue.circuit.graph import Graph
from clue.model.anatomy import Anatomy, Layer
from tests.oracles import experts
from tests.oracles.attribution import hooks, injecting, writer_outputs


def hidden_units(body: Anatomy, ids: Tensor) -> list[Tensor]:
    """Activations of each layer's hidden units: what the down projection reads, or those of all experts."""
    found: list[Tensor] = []
    with hooks(*(layer.down.module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
                 if layer.experts is None else layer.experts.module.register_forward_pre_hook(
                     lambda m, args, layer=layer: found.append(experts.hidden(layer, *args)))
                 for layer in body.layers)):
        body.model(ids, use_cache=False)
    return found


def setting(layer: Layer, chosen: Tensor, units: Tensor) -> list[Any]:
    """Hooks that set the chosen hidden units of a layer to ``units``; experts are computed anew from all units."""
    if layer.experts is None:
        return [layer.down.module.register_forward_pre_hook(lambda m, args: (torch.where(chosen, units, args[0]),))]
    own: list[Tensor] = []

    def write(module: Any, args: Any, output: Tensor) -> Tensor:
        return (torch.where(chosen, units, own.pop()) @ experts.columns(layer).T).reshape(output.shape)

    return [layer.experts.module.register_forward_pre_hook(lambda m, args: own.append(experts.hidden(layer, *args))),
            layer.mlp.register_forward_hook(write)]


def patched_logits(body: Anatomy, graph: Graph, ids: Tensor, other_ids: Tensor, edges: np.ndarray,
                   neurons: np.ndarray) -> Tensor:
    """Logits of ``ids`` where patched edges and hidden units carry what they do in ``other_ids``."""
    away, units = writer_outputs(body, other_ids), hidden_units(body, other_ids)
    here = writer_outputs(body, ids)
    patched = edges & graph.residual_edges
    for _ in range(2 * body.n_layers + 1):
        with ExitStack() as stack:
            for v in np.flatnonzero(patched.any(0)):
                names = [graph.name(writer) for writer in graph.writers[patched[:, v]]]
                extra = sum(away[name] - here[name] for name in names)
                stack.enter_context(injecting(body, graph, int(graph.readers[v]), extra))
            for n, layer in enumerate(body.layers):
                stack.enter_context(hooks(*setting(layer, torch.from_numpy(neurons[n]), units[n])))
            here = writer_outputs(body, ids)
            logits = body.model(ids, use_cache=False).logits
    return logits

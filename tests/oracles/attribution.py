"""The slow, obviously right score of an edge: inject eps times one writer's difference into one reader's input and see
what the target does (central finite difference), on the unmodified model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clue.circuit.graph import Graph
from clue.model.anatomy import Anatomy
from clue.types import NodeKind


def writer_outputs(body: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """What each writer adds to the residual stream, [batch, seq, d_model], by name."""
    found: dict[str, Tensor] = {}
    handles = [body.embed.register_forward_hook(lambda m, a, out: found.__setitem__("embed", out))]
    for number, layer in enumerate(body.layers):
        def heads(m: Any, args: Any, number: int = number, layer: Any = layer) -> None:
            for h in range(body.n_heads):
                part = torch.zeros_like(args[0])
                part[..., h * body.d_head:(h + 1) * body.d_head] = args[0][..., h * body.d_head:(h + 1) * body.d_head]
                found[f"a{number}.h{h}"] = part @ layer.o.weight.T
        handles.append(layer.o.module.register_forward_pre_hook(heads))
        handles.append(layer.down.module.register_forward_hook(
            lambda m, a, out, number=number: found.__setitem__(f"m{number}", out)))
    with torch.no_grad():
        body.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def with_injection(body: Anatomy, graph: Graph, ids: Tensor, reader: int, extra: Tensor) -> Tensor:
    """Logits when ``extra`` [batch, seq, d_model] is added to the residual stream as this reader alone sees it."""
    kind, number = NodeKind(graph.kind[reader]), int(graph.layer[reader])
    handles = []
    if kind is NodeKind.LOGITS:
        handles.append(body.final_norm.register_forward_pre_hook(lambda m, args: (args[0] + extra,)))
    elif kind in (NodeKind.MLP, NodeKind.MLP_IN):
        handles.append(body.layers[number].mlp_norm.register_forward_pre_hook(lambda m, args: (args[0] + extra,)))
    else:
        layer = body.layers[number]
        projection = {NodeKind.Q: layer.q, NodeKind.K: layer.k, NodeKind.V: layer.v}[kind]
        rows = slice(int(graph.index[reader]) * body.d_head, (int(graph.index[reader]) + 1) * body.d_head)
        seen: dict[str, Tensor] = {}
        handles.append(layer.attention_norm.register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0])))

        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            normal = layer.attention_norm.forward(seen["x"] + extra)
            output = output.clone()
            output[..., rows] = torch.nn.functional.linear(normal, module.weight, module.bias)[..., rows]
            return output

        handles.append(projection.module.register_forward_hook(replace))
    try:
        with torch.no_grad():
            return body.model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def finite_difference(body: Anatomy, graph: Graph, ids: Tensor, reader: int, difference: Tensor,
                      target: Callable[[Tensor], Tensor], eps: float = 1e-5) -> float:
    """d target / d eps for eps * difference injected into one reader."""
    up = target(with_injection(body, graph, ids, reader, eps * difference))
    down = target(with_injection(body, graph, ids, reader, -eps * difference))
    return float((up - down) / (2 * eps))

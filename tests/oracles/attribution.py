"""The slow, obviously right score of an edge: inject eps times a writer's difference into one reader's input and see
what the target does (central finite difference), on the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clue.circuit.graph import Graph
from clue.model.anatomy import Anatomy
from clue.types import NodeKind
from tests.oracles import experts


class InDouble(TorchFunctionMode):
    """Whatever a float64 model does in float32 (norms, rotations, softmax) happens in float64 instead.

    A finite difference needs all of float64, and the model stays unmodified.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.float:
            return args[0].double()
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def first(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def writer_outputs(body: Anatomy, ids: Tensor) -> dict[str, Tensor]:
    """What each writer adds to the residual stream, [batch, seq, d_model], by name, hidden units included.

    Behind an output norm each part is scaled, channel by channel, as the norm scaled the whole; a head there also carries
    an equal share of the bias, which is constant, and left out, elsewhere.
    """
    found: dict[str, Tensor] = {}
    handles = [body.layers[0].block.register_forward_pre_hook(
        lambda m, a, k: found.__setitem__("embed", first(a, k)), with_kwargs=True)]

    def parts(projection: Any, norm: Any, multiplier: float, names: list[str], with_bias: bool) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            x = args[0].reshape(*ids.shape, len(names), -1)
            size = x.shape[-1]
            whole = output.reshape(*ids.shape, body.d_model)
            ratio = 1.0 if norm is None else norm.module.forward(whole) / whole
            for number, name in enumerate(names):
                part = x[..., number, :] @ projection.weight[:, number * size:(number + 1) * size].T
                if with_bias and norm is not None and projection.bias is not None:
                    part = part + projection.bias / len(names)
                found[name] = multiplier * ratio * part
        return hook

    def expert_units(number: int, layer: Any) -> Any:
        def hook(module: Any, args: Any) -> None:
            z, down = experts.hidden(layer, *args).reshape(*ids.shape, -1), experts.columns(layer)
            for unit in range(body.d_mlp):
                found[f"m{number}.n{unit}"] = layer.multiplier * z[..., unit, None] * down[:, unit]
        return hook

    for number, layer in enumerate(body.layers):
        units = [f"m{number}.n{i}" for i in range(body.d_mlp)]
        heads = [f"a{number}.h{h}" for h in range(body.n_heads)]
        handles.append(layer.o.module.register_forward_hook(
            parts(layer.o, layer.attention_output_norm, layer.multiplier, heads, True)))
        if layer.experts is not None:
            handles.append(layer.experts.module.register_forward_pre_hook(expert_units(number, layer)))
        else:
            handles.append(layer.down.module.register_forward_hook(
                parts(layer.down, layer.mlp_output_norm, layer.multiplier, units, False)))
        handles.append(layer.mlp_writer.register_forward_hook(lambda m, a, out, number=number, layer=layer: found.__setitem__(
            f"m{number}", layer.multiplier * out.reshape(*ids.shape, -1).clone())))
    with hooks(*handles):
        body.model(ids, use_cache=False)
    return found


def final_residual(body: Anatomy, ids: Tensor) -> Tensor:
    """The residual stream that the final norm reads, [batch, seq, d_model]."""
    seen: list[Tensor] = []
    with hooks(body.final_norm.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))):
        body.model(ids, use_cache=False)
    return seen[0]


@contextmanager
def injecting(body: Anatomy, graph: Graph, reader: int, extra: Tensor) -> Iterator[None]:
    """Add ``extra`` [batch, seq, d_model] to the residual stream as this reader alone sees it, in whatever runs inside."""
    kind, number = NodeKind(graph.kind[reader]), int(graph.layer[reader])
    if kind is NodeKind.LOGITS:
        with hooks(body.final_norm.module.register_forward_pre_hook(lambda m, args: (args[0] + extra,))):
            yield
        return
    layer = body.layers[number]
    seen: dict[str, Tensor] = {}
    handles = [layer.block.register_forward_pre_hook(
        lambda m, a, k: seen.__setitem__("residual", first(a, k)), with_kwargs=True)]
    if kind in (NodeKind.MLP, NodeKind.MLP_IN):
        if layer.mlp_norm is None:
            handles.append(layer.mlp.register_forward_pre_hook(lambda m, args: (args[0] + extra, *args[1:])))
        else:
            if not body.parallel:
                handles.append(layer.mlp_norm.module.register_forward_pre_hook(
                    lambda m, args: seen.__setitem__("residual", args[0])))

            def reread(module: Any, args: Any) -> Any:
                normal = layer.mlp_norm.module.forward(seen["residual"] + extra.reshape(seen["residual"].shape))
                return (normal, *args[1:])

            handles.append(layer.mlp.register_forward_pre_hook(reread))
    else:
        projection = {NodeKind.Q: layer.q, NodeKind.K: layer.k, NodeKind.V: layer.v}[kind]
        index = int(graph.index[reader])
        rows = torch.from_numpy(projection.outputs)[index * body.d_head:(index + 1) * body.d_head]

        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            normal = seen["residual"] + extra
            if layer.attention_norm is not None:
                normal = layer.attention_norm.module.forward(normal)
            output = output.clone()
            output[..., rows] = module.forward(normal)[..., rows]
            return output

        handles.append(projection.module.register_forward_hook(replace))
    with hooks(*handles):
        yield


def with_injection(body: Anatomy, graph: Graph, reader: int, ids: Tensor, extra: Tensor) -> Tensor:
    """Logits of a run inside :func:`injecting`."""
    with injecting(body, graph, reader, extra):
        return body.model(ids, use_cache=False).logits


def with_output(body: Anatomy, number: int, ids: Tensor, extra: Tensor) -> Tensor:
    """Logits when the MLP of a layer adds ``extra`` [batch, seq, d_model] more to the residual stream."""
    layer = body.layers[number]
    with hooks(layer.mlp_writer.register_forward_hook(lambda m, a, out: out + extra.reshape(out.shape) / layer.multiplier)):
        return body.model(ids, use_cache=False).logits


def finite_differences(run: Callable[[Tensor, Tensor], Tensor], ids: Tensor, differences: Tensor,
                       target: Callable[[Tensor], Tensor], eps: float = 1e-5) -> Tensor:
    """d target / d eps for eps times each of many differences, all in one batch.

    Args:
        run: logits of a batch of token ids with a batch of injections.
        ids: [1, seq]. differences: [many, seq, d_model].
        target: one value per sequence from logits [batch, seq, vocabulary].
    """
    both = torch.cat([eps * differences, -eps * differences])
    logits = run(ids.expand(len(both), -1), both)
    values = target(logits).view(2, -1)
    return (values[0] - values[1]) / (2 * eps)


@contextmanager
def chained(body: Anatomy, prompts: Tensor) -> Iterator[None]:
    """Whatever moves the residual stream moves that of both runs by the mean, from block to block, in what runs inside.

    Args:
        prompts: int64 [2, seq], the clean and the corrupted one. A batch inside is as many of the one as of the other.
    """
    still: dict[tuple[str, int], Tensor] = {}  # the residual stream of both where nothing moves it

    def moved(place: tuple[str, int], stream: Tensor) -> Tensor:
        here = stream.reshape(2, -1, prompts.shape[1], body.d_model)
        base = still.setdefault(place, here.clone())
        return (base + (here - base).mean(0)).reshape(stream.shape)

    def middle(number: int, past: dict[int, Tensor]) -> Any:
        def hook(module: Any, args: Any) -> Any:
            stream = moved(("middle", number), args[0])
            past[number] = stream - args[0]  # what goes past the MLP
            return (stream, *args[1:])
        return hook

    def after(number: int, past: dict[int, Tensor]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = first + past[number].reshape(first.shape)
            return (first, *rest) if isinstance(output, tuple) else first
        return hook

    def enter(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            stream = moved(("layer", number), first(args, kwargs))
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})
        return hook

    past: dict[int, Tensor] = {}
    handles = [body.final_norm.module.register_forward_pre_hook(lambda m, args: (moved(("final", 0), args[0]),))]
    for number, layer in enumerate(body.layers):
        handles.append(layer.block.register_forward_pre_hook(enter(number), with_kwargs=True))
        if not body.parallel:
            read = layer.mlp if layer.mlp_norm is None else layer.mlp_norm.module
            handles += [read.register_forward_pre_hook(middle(number, past)),
                        layer.block.register_forward_hook(after(number, past))]
    with hooks(*handles):
        body.model(prompts, use_cache=False)
        yield

"""Capture: one run of the unmodified model, keeping what each writer adds and the gradient each reader sees.

Only factors are kept: head outputs before W_o and gradients at the outputs of q, k and v have rank d_head, so nothing of
size [batch, seq, writers, d_model] ever exists. Weight gradients stay off; logits are computed at answer positions only.

A run is either held whole (one forward and one backward through all layers) or streamed: a forward pass that keeps only
what enters each layer and what the writers add, logits a few positions at a time, and then one layer after the other, from
the top down, run again and differentiated. Streaming costs a second forward pass; its memory holds the activations of one
layer instead of all.

Several runs can be chained: side by side in one batch, they meet at the residual stream before every block, and each goes
on downwards with the mean of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import tee
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import ModelError
from .anatomy import Anatomy, Layer, Norm
from .answers import to_keep
from .experts import Routed
from .prefix import NO_PREFIX, Prefix
from .writers import Written, mlp_with_rounding, more

if TYPE_CHECKING:
    from torch import Tensor, nn

    #: Maps logits [batch, positions, vocabulary] and the slice of the kept positions they belong to, to a scalar.
    Target = Callable[[Tensor, slice], Tensor]

#: Bytes of logits that a streamed run holds at once, per copy.
LOGIT_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerRun:
    """What the readers and hidden units of one layer saw in one run.

    Attributes:
        residual, mlp_residual: [batch, seq, d_model], the residual stream that attention and MLP read, before their norms.
        grad_q, grad_k, grad_v: gradients at the projections' outputs, [batch, seq, heads or groups * d_head].
        grad_mlp: [batch, seq, d_model], gradient at what the MLP reads, after its norm.
        hidden, grad_hidden: [batch, seq, d_mlp], activations of the hidden units (input of the down projection), and
            the gradient there; behind an output norm as in :class:`~clue.model.writers.Written`.
        routed: where there are experts, what they were called with; ``hidden`` is ``None`` then, and ``grad_hidden`` is
            [batch, seq, d_model], the gradient at the MLP's output.

    A model that flattens its tokens inside a layer (OPT) gives [batch * seq, ...] there.
    """

    residual: Tensor
    mlp_residual: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_mlp: Tensor
    hidden: Tensor | None
    grad_hidden: Tensor
    routed: Routed | None


@dataclass(frozen=True)
class Run:
    """One run of the model.

    Attributes:
        embed: [batch, seq, d_model], the residual stream before the first layer.
        written: what each layer's writers add, the bottom layer first.
        final_residual: [batch, seq, d_model], what the final norm reads.
        grad_final: [batch, seq, d_model], gradient at the *output* of the final norm.
        layers: yields each layer's :class:`LayerRun` once, the top layer first.
    """

    embed: Tensor
    written: list[Written]
    final_residual: Tensor
    grad_final: Tensor
    layers: Iterator[LayerRun]


def run(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, target: Target, *,
        prefix: Prefix = NO_PREFIX, embed: Tensor | None = None, stream: bool = False, together: int = 1,
        against: list[Written] | None = None) -> Run:
    """Run the model and differentiate the target; call inside :func:`~clue.model.modes.frozen`, and consume ``layers``
    inside it too.

    Args:
        input_ids: int64 [batch, seq], right-padded.
        attention_mask: int64 [batch, shared + seq], of the prefix too.
        positions: int64 [positions], the sequence positions whose logits the target needs.
        target: maps those logits to the scalar whose gradient is taken; a streamed run adds it up over slices of the
            positions.
        prefix: the tokens before these, which the run does not contain.
        embed: [batch, seq, d_model], what the first layer gets instead of the prompt's own embedding.
        stream: hold one layer's activations at a time.
        together: the batch is so many runs of as many prompts each, from the clean to the corrupted one, that are chained:
            what the first layer gets of those in between is interpolated, and the gradient at the residual stream is the
            mean of theirs before every block. ``written`` is what the last one's writers add more than the first one's.
            :func:`parted` tells the runs apart again.
        against: what the writers of another run add. This run's ``written`` is what they add more there than here, and
            the list is emptied, so that never both are held whole. Of an empty list nothing comes: the writers are left
            out.
    """
    return (_streamed if stream else _whole)(body, input_ids, attention_mask, positions, target, prefix, embed, together,
                                             against)


def parted(run: Run, together: int) -> list[Run]:
    """The runs that were chained in one, the clean one first; their layers share what each has of a batch."""
    def part(number: int, layers: Iterator[LayerRun]) -> Run:
        embed, residual, grad = (_part(value, number, together) for value in (run.embed, run.final_residual, run.grad_final))
        return Run(embed, [] if number else run.written, residual, grad,
                   (_part(layer, number, together) for layer in layers))

    return [part(number, layers) for number, layers in enumerate(tee(run.layers, together))]


def _part(value: Any, number: int, together: int) -> Any:
    """One run's part of a tensor, or of each tensor of a dataclass."""
    if isinstance(value, torch.Tensor):
        return value.chunk(together)[number]
    if value is None:
        return None
    return type(value)(*(_part(getattr(value, field.name), number, together) for field in fields(value)))


def _whole(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, target: Target,
           prefix: Prefix, embed: Tensor | None, together: int, against: list[Written] | None) -> Run:
    with torch.enable_grad(), _watch(body, range(body.n_layers), cut=True, start=embed, together=together) as seen:
        logits = body.model(input_ids=input_ids, attention_mask=attention_mask, **prefix.arguments(),
                            logits_to_keep=to_keep(body.model, positions)).logits
        layers, final = seen[:-1], seen[-1]
        _check(body, layers)
        at = [_differentiated(found) for found in layers]
        ends = [*(t for part in at for t in part), final["normal"]]
        grads = torch.autograd.grad(target(_widened(logits), slice(None)), ends, allow_unused=True)
    grad_final = _reached(body, "the final norm", ends[-1:], grads[-1:])[0]
    written: list[Written] = []
    runs, first = [], 0
    for layer, found, part in zip(body.layers, layers, at, strict=True):
        found = {name: _detached(value) for name, value in found.items()}
        _note_written(written, layer, found, together, against)
        runs.append(_layer_run(body, layer, found, grads[first:first + len(part)]))
        first += len(part)
    return Run(runs[0].residual, written, final["residual"].detach(), grad_final, (runs.pop() for _ in range(body.n_layers)))


def _streamed(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, target: Target,
              prefix: Prefix, embed: Tensor | None, together: int, against: list[Written] | None) -> Run:
    written: list[Written] = []
    past = prefix.arguments()

    def passed(number: int, found: dict[str, Any]) -> None:
        prefix.rewind(past, number)
        if "heads" in found and "mlp" in found:
            _note_written(written, body.layers[number], found, together, against)
            found["heads"] = found["mlp"] = found["head_scale"] = None

    with torch.no_grad(), _watch(body, range(body.n_layers), cut=True, start=embed, together=together,
                                 passed=passed) as seen:
        body.model(input_ids=input_ids, attention_mask=attention_mask, **past,
                   logits_to_keep=to_keep(body.model, positions[:1]))
    layers, final = seen[:-1], seen[-1]
    _check(body, layers)
    calls = [(found["residual"], found["args"], found["kwargs"]) for found in layers]
    residual = final["residual"]
    grad_final, above = _head(body, residual, positions, target, isinstance(layers[-1]["output"], tuple), together)

    def downwards() -> Iterator[LayerRun]:
        nonlocal above
        while calls:
            # Nothing of the layer stays in this frame while it waits.
            number = len(calls) - 1
            made, above = _replayed(body, number, *calls.pop(), above, together)
            prefix.rewind(past, number)
            yield made.pop()

    return Run(calls[0][0], written, residual, grad_final, downwards())


def _replayed(body: Anatomy, number: int, start: Tensor, args: Any, kwargs: Any, above: Tensor,
              together: int) -> tuple[list[LayerRun], Tensor]:
    """Run one layer again: what it carried, in a list, and the gradient at its input from that at its output."""
    layer = body.layers[number]
    with torch.enable_grad(), _watch(body, [number], together=together) as (found, _):
        start = start.detach().requires_grad_()
        args, kwargs = _with_first(args, kwargs, start)
        output = layer.block(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        _check(body, [found], number)
        at = _differentiated(found)
        grads = torch.autograd.grad(output, [*at, start], above, allow_unused=True)
    below = _reached(body, f"layer {number}", [start], grads[-1:])[0]
    found = {name: _detached(value) for name, value in found.items()}
    return [_layer_run(body, layer, found, grads[:-1])], below


def _head(body: Anatomy, residual: Tensor, positions: Tensor, target: Target, in_tuple: bool,
          together: int) -> tuple[Tensor, Tensor]:
    """Gradients at the final norm's output and at its input, [batch, seq, d_model], a few positions at a time.

    The model's own forward is used, with its layers passing on the residual stream that is already known, so that
    whatever a family does to its logits is done.
    """
    at_output, at_input = torch.zeros_like(residual), torch.zeros_like(residual)
    positions, first_device = positions.to(residual.device), positions.device
    vocabulary = body.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    size = max(1, LOGIT_BYTES // (4 * vocabulary * len(residual)))
    for first in range(0, len(positions), size):
        part = slice(first, min(first + size, len(positions)))
        with torch.enable_grad():
            start = residual[:, positions[part]].detach().requires_grad_()
            with _bypassed(body, start, in_tuple), _watch(body, [], together=together) as (final,):
                ids = torch.zeros(start.shape[:2], dtype=torch.int64, device=first_device)
                logits = body.model(input_ids=ids, use_cache=False).logits
            value = target(_widened(logits), part)
            output, gradient = torch.autograd.grad(value, [final["normal"], start], materialize_grads=True, allow_unused=True)
        at_output[:, positions[part]], at_input[:, positions[part]] = output, gradient
    return at_output, at_input


@contextmanager
def _bypassed(body: Anatomy, output: Tensor, in_tuple: bool) -> Iterator[None]:
    """Every layer returns ``output``, whatever it gets."""
    own = [layer.block.__dict__.get("forward") for layer in body.layers]
    for layer in body.layers:
        layer.block.forward = lambda *args, **kwargs: (output,) if in_tuple else output  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(body.layers, own, strict=True):
            if forward is None:
                del layer.block.forward
            else:
                layer.block.forward = forward  # type: ignore[method-assign]


@contextmanager
def _watch(body: Anatomy, numbers: Sequence[int], *, cut: bool = False, start: Tensor | None = None, together: int = 1,
           passed: Callable[[int, dict[str, Any]], None] | None = None) -> Iterator[list[dict[str, Any]]]:
    """Note what passes through the layers ``numbers`` and the final norm: one dictionary per layer, then the final norm's.

    Args:
        cut: let the residual stream start at the first layer: nothing before it needs a gradient.
        start: what the first layer gets then, instead of what the model computed.
        together: the number of runs that are chained.
        passed: note only what enters a layer and what its writers add, and call this with a layer's number and its
            dictionary once the layer is done.
    """
    handles = []
    half = next(body.model.parameters()).dtype in (torch.bfloat16, torch.float16)

    def on_input(module: nn.Module, hook: Callable[..., Any]) -> None:
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(module: nn.Module, hook: Callable[..., Any]) -> None:
        handles.append(module.register_forward_hook(hook))

    def mean(grad: Tensor) -> Tensor:
        runs = grad.unflatten(0, (together, -1))
        return runs.mean(0, keepdim=True).expand_as(runs).flatten(0, 1)

    def meets(stream: Tensor) -> None:
        """Where the residual stream is read: as one tensor by the block and by what goes past it."""
        if together > 1 and stream.requires_grad:
            stream.register_hook(mean)

    def watch(number: int, found: dict[str, Any]) -> None:
        layer = body.layers[number]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["residual"], found["args"], found["kwargs"] = _first(args, kwargs), args, kwargs
            meets(found["residual"])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if "attention" in found and "mlp" in found:
                after = output[0] if isinstance(output, tuple) else output
                found["mlp"] = mlp_with_rounding(found["residual"], found.pop("attention"), found["mlp"], after)
            if passed is not None:
                found["output"] = output
                passed(number, found)

        def heads(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["heads"] = _first(args, kwargs)

        def scale(name: str, norm: Norm) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                found[name] = _scale(norm, _first(args, kwargs).detach())
            return hook

        def adds(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                # The product or clone is a copy: Falcon adds the attention output to the MLP's in place.
                output = output.detach()
                found[name] = output.clone() if layer.multiplier == 1 else output * layer.multiplier
            return hook

        on_input(layer.block, enter)
        on_input(layer.o.module, heads)
        if layer.attention_output_norm is not None:
            on_input(layer.attention_output_norm.module, scale("head_scale", layer.attention_output_norm))
        on_output(layer.mlp_writer, adds("mlp"))
        if half:
            on_output(layer.o.module if layer.attention_output_norm is None else layer.attention_output_norm.module,
                      adds("attention"))
        if half or passed is not None:
            on_output(layer.block, leave)
        if passed is not None:
            return
        found["projected"] = {}  # q, k and v; one entry where they are fused

        def projected(module: nn.Module, args: Any, output: Tensor) -> None:
            found["projected"][module] = output

        def branch(module: nn.Module, args: Any, kwargs: Any) -> Any:
            """Give the MLP its own view of its input, so that the gradient there is the MLP's alone (shared norms)."""
            x = _first(args, kwargs)
            if layer.mlp_norm is None and not body.parallel:
                meets(x)
            found["mlp_input"] = x.view_as(x)
            return _with_first(args, kwargs, found["mlp_input"])

        def middle(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["mlp_residual"] = _first(args, kwargs)
            meets(found["mlp_residual"])

        def hidden(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["hidden"] = _first(args, kwargs)

        def routed(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["routed"] = Routed.of(args, kwargs)

        def written(module: nn.Module, args: Any, output: Tensor) -> None:
            found["mlp_output"] = output

        for module in layer.projections:
            on_output(module, projected)
        on_input(layer.mlp, branch)
        if layer.down is not None:
            on_input(layer.down.module, hidden)
        if layer.experts is not None:
            on_input(layer.experts.module, routed)
            on_output(layer.mlp, written)
        if layer.mlp_norm is not None and not body.parallel:
            on_input(layer.mlp_norm.module, middle)
        if layer.mlp_output_norm is not None:
            on_input(layer.mlp_output_norm.module, scale("hidden_scale", layer.mlp_output_norm))
            on_output(layer.mlp_output_norm.module, written)

    def begins(module: nn.Module, args: Any, kwargs: Any) -> Any:
        begin = _first(args, kwargs) if start is None else start
        begin = begin.detach()
        if together > 2:
            clean, *between, corrupted = begin.chunk(together)
            steps = [torch.lerp(clean, corrupted, step / (together - 1)) for step, _ in enumerate(between, 1)]
            begin = torch.cat((clean, *steps, corrupted))
        return _with_first(args, kwargs, begin.requires_grad_() if torch.is_grad_enabled() else begin)

    def final_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[-1]["residual"] = _first(args, kwargs)
        meets(seen[-1]["residual"])

    def final_output(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[-1]["normal"] = output

    seen: list[dict[str, Any]] = [{} for _ in range(len(numbers) + 1)]
    try:
        if cut:
            on_input(body.layers[0].block, begins)
        for number, found in zip(numbers, seen, strict=False):
            watch(number, found)
        on_input(body.final_norm.module, final_input)
        on_output(body.final_norm.module, final_output)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check(body: Anatomy, layers: list[dict[str, Any]], first: int = 0) -> None:
    """Raise unless what was noted of the layers from number ``first`` on is all that they are scored by."""
    names = ["residual", "heads", "mlp"]
    if "projected" in layers[0]:
        names += ["mlp_input", "hidden" if body.layers[0].experts is None else "routed"]
    counts = {name: sum(name in found for found in layers) for name in names}
    # Kernels may use the weight of a projection without calling it, and nothing passes through it then.
    counts["q, k and v"] = sum(layer.projections <= found.get("projected", dict.fromkeys(layer.projections)).keys()
                               for layer, found in zip(body.layers[first:], layers, strict=False))
    for name, count in counts.items():
        if count != len(layers):
            raise ModelError(f"{count} of {len(layers)} layers passed through the modules that the {body.family} entry names"
                             f" ({name}): the entry does not fit this model, or something replaces its forward pass")


def _differentiated(found: dict[str, Any]) -> list[Tensor]:
    """Where a layer is differentiated: its projections' outputs, the MLP's input, and its units or what it writes."""
    return [*found["projected"].values(), found["mlp_input"], found.get("mlp_output", found.get("hidden"))]


def _detached(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


def _note_written(written: list[Written], layer: Layer, found: dict[str, Any], together: int,
                  against: list[Written] | None) -> None:
    """Append what a layer's writers add, as :func:`run` says of ``together`` and ``against``."""
    if against is not None and not against:
        return
    here = Written(found["heads"], found.get("head_scale"), found["mlp"])
    if together > 1:
        here, against = _part(here, 0, together), [_part(here, together - 1, together)]
    written.append(here if against is None else more(against.pop(0), here))


def _reached(body: Anatomy, what: str, ends: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients at ``ends``, zero where there is none: a reader may not reach the target (the last layer's q at positions
    after the answer, say). That none does says that what was watched is not what the model computes with."""
    if all(grad is None for grad in grads):
        raise ModelError(f"no gradient reaches the modules of {what} that the {body.family} entry names: something replaces the"
                         " model's forward pass (compiled code, fused kernels): load the model without it")
    return [torch.zeros_like(end) if grad is None else grad for end, grad in zip(ends, grads, strict=True)]


def _layer_run(body: Anatomy, layer: Layer, found: dict[str, Any], grads: Sequence[Tensor | None]) -> LayerRun:
    *projected, grad_mlp, grad_hidden = _reached(body, "a layer", _differentiated(found), grads)
    at = dict(zip(found["projected"], projected, strict=True))
    residual, hidden = found["residual"], found.get("hidden")
    # Without a norm of its own the MLP reads the residual stream itself.
    middle = residual if body.parallel else found.get("mlp_residual", found["mlp_input"])
    if layer.mlp_output_norm is not None and layer.down is not None and hidden is not None:
        hidden = (hidden * found["hidden_scale"]).to(hidden.dtype)
        gain = layer.mlp_output_norm.gain
        grad_hidden = (grad_hidden if gain is None else grad_hidden * gain.to(grad_hidden.dtype)) @ layer.down.weight
    return LayerRun(
        residual=residual, mlp_residual=middle, grad_q=layer.q.of(at[layer.q.module]),
        grad_k=layer.k.of(at[layer.k.module]), grad_v=layer.v.of(at[layer.v.module]), grad_mlp=grad_mlp,
        hidden=hidden, grad_hidden=grad_hidden, routed=found.get("routed"))


def norm_factors(norm: Norm, residual: Tensor) -> tuple[Tensor, Tensor]:
    """A norm at one run: its output before gain and bias, and 1 / rms (or 1 / deviation) by which it got there.

    Args:
        norm: RMS or layer norm.
        residual: float [tokens, d_model], the norm's input.

    Returns:
        float [tokens, d_model] and [tokens]: what :func:`norm_backward` needs.
    """
    if norm.kind == "layer":  # a layer norm is the RMS norm of the centred vector
        residual = residual - residual.mean(-1, keepdim=True)
    scale = _scale(norm, residual)
    return residual * scale, scale[:, 0]


def _scale(norm: Norm, x: Tensor) -> Tensor:
    """1 / rms of the last dimension, [..., 1], in float32 or finer."""
    x = _widened(x)
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _first(args: Any, kwargs: Any) -> Tensor:
    """The hidden states a module was called with."""
    return cast("Tensor", args[0] if args else kwargs["hidden_states"])


def _with_first(args: Any, kwargs: Any, value: Tensor) -> tuple[Any, Any]:
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

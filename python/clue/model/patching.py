"""Patching: run the unmodified model with chosen edges carrying what they carried in another run.

An edge u -> v is patched by giving reader v, and v alone, the residual stream with writer u's contribution replaced by
its value in the other run (path patching, arXiv 2304.05969; ACDC, arXiv 2304.14997, evaluates circuits so):

    input of v = residual stream of this run + sum over patched u of (u in the other run - u now)

1. :func:`record` runs the other prompts once and keeps what every writer adds, as factors: head outputs before W_o.
2. :func:`patched` runs the prompts with hooks. What a writer adds now is compared with the recording when it appears,
   so a writer behind a patched edge carries on whatever that edge did to it.
3. Before each layer the inputs of its readers are put together. Readers that share their patched writers share one
   input; a layer without a patched edge is left alone. Changes are expanded from their factors once, if all of them fit
   :data:`EXPANDED_BYTES`, and otherwise for each layer again, a tile of tokens at a time. The same sum read backwards is
   input of v = residual stream of the other run - sum over the *kept* u of the same differences; whichever needs fewer
   writers is taken, so small circuits and small patches are both cheap.
4. A patched hidden unit is set to its activation in the other run. Where there are experts, what the MLP writes gains
   the unit's difference times its column of W_down, which is the same (:mod:`clue.model.experts`).

Nothing of size [batch, seq, writers, readers] ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CircuitError, ModelError
from .answers import to_keep
from .experts import Routed, exchange
from .prefix import NO_PREFIX, Prefix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .anatomy import Anatomy, Layer, Norm

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]

#: Bytes of expanded writers and reader inputs in a tile of tokens.
TILE_BYTES = 64 << 20

#: Most bytes for the expanded changes of all writers at all tokens. A layer that expands its writers anew costs several
#: times as much as one that finds them expanded, so a larger batch is not always a faster one.
EXPANDED_BYTES = 256 << 20


@dataclass(frozen=True)
class Recording:
    """What one run carried: the value that a patched edge has.

    Lists have one entry per layer; ``tokens`` is batch * seq. Behind an output norm, y = gain * (W z + b) / rms, a head
    adds gain * W_h z_h / rms and an equal share of gain * b / rms, so that the heads add up to what the block adds.

    Attributes:
        heads: [tokens, n_heads * d_head], head outputs before W_o; times ``scale`` where there is an output norm.
        scale: [tokens, 1], 1 / rms at the attention output norm; empty without one.
        mlps: [tokens, d_model], what each MLP adds to the residual stream.
        hidden: [tokens, d_mlp], activations of the hidden units (input of the down projection); empty where there are
            experts.
        routed: what the experts were called with, from which their hidden units follow; empty without experts.
        attention_residual, mlp_residual: [tokens, d_model], the residual stream that attention and MLP read, before
            their norms; the first of ``attention_residual`` is what the embedding adds.
        final_residual: [tokens, d_model], the residual stream that the final norm reads.
        logits: float32 or finer [batch, positions, vocabulary].
    """

    heads: list[Tensor]
    scale: list[Tensor]
    mlps: list[Tensor]
    hidden: list[Tensor]
    routed: list[Routed]
    attention_residual: list[Tensor]
    mlp_residual: list[Tensor]
    final_residual: Tensor
    logits: Tensor


def record(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor,
           prefix: Prefix = NO_PREFIX) -> Recording:
    """Run the model once and keep what its writers add. Arguments as in :func:`patched`."""
    recorder = _Recorder(body, prefix)
    logits = recorder.run(input_ids, attention_mask, positions)
    read = sum(layer.projections <= recorder.read for layer in body.layers)
    passed = min(len(recorder.mlps), len(recorder.heads), len(recorder.hidden) + len(recorder.routed), read)
    if passed != body.n_layers:
        raise ModelError(f"{passed} of {body.n_layers} layers passed through the modules that the"
                         f" {body.family} entry names: the entry does not fit this model")
    return Recording(recorder.heads, recorder.scale, recorder.mlps, recorder.hidden, recorder.routed,
                     recorder.attention_residual, recorder.mlp_residual, recorder.final_residual[0], logits)


def patched(body: Anatomy, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, other: Recording,
            edges: Bools, neurons: Bools | None = None, prefix: Prefix = NO_PREFIX) -> Tensor:
    """Logits of the prompts with edges and hidden units patched; the model should be in evaluation mode.

    Costs one forward pass where nothing is patched, two or three where readers differ in their patched writers, and
    about twice that for batches beyond :data:`EXPANDED_BYTES`.

    Args:
        input_ids: int64 [batch, seq], right-padded.
        attention_mask: int64 [batch, shared + seq], of the prefix too.
        positions: int64 [positions], the sequence positions whose logits are wanted.
        other: the recording of as many prompts of the same length.
        edges: bool [writers, readers] in the order of :class:`clue.circuit.graph.Graph`: true where an edge carries the
            other run. Pairs that are no edge are ignored.
        neurons: bool [n_layers, d_mlp], true where a hidden unit has its activation of the other run.
        prefix: the tokens before these, the same ones in the other run, which do not count among its tokens.

    Returns:
        float32 or finer [batch, positions, vocabulary].

    Raises:
        CircuitError: ``edges`` or ``neurons`` has another shape.
    """
    shapes = {"edges": (edges, (1 + body.n_layers * (body.n_heads + 1), 1 + body.n_layers * _readers(body))),
              "neurons": (neurons, (body.n_layers, body.d_mlp))}
    for name, (given, expected) in shapes.items():
        if given is not None and given.shape != expected:
            raise CircuitError(f"{name} has shape {given.shape}, this model's graph has {expected}: build it with"
                               " clue.circuit.attribution.graph_of")
    return _Patcher(body, prefix, other, edges, neurons).run(input_ids, attention_mask, positions)


def _readers(body: Anatomy) -> int:
    """Readers per layer: q of every head, k and v of every group, the MLP."""
    return body.n_heads + 2 * body.n_kv_heads + 1


class _Pass:
    """One forward pass with hooks. Subclasses look at what passes by; what they return, if anything, replaces it.

    ``stream`` is the residual stream that the next reader takes, [tokens, d_model].
    """

    stream: Tensor

    def __init__(self, body: Anatomy, prefix: Prefix) -> None:
        self.body, self.prefix = body, prefix
        dtype = next(body.model.parameters()).dtype
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def attention(self, number: int) -> None:
        """Attention is about to read ``stream``."""

    def projected(self, module: nn.Module) -> Tensor | None:
        """The output of a q, k or v projection."""

    def factors(self, number: int, heads: Tensor, scale: Tensor | None) -> None:
        """Head outputs before W_o, and 1 / rms at the attention output norm."""

    def mlp(self, number: int) -> Tensor | None:
        """The MLP is about to read ``stream``; its normal input is in the hook's hands."""

    def units(self, number: int, hidden: Tensor) -> Tensor | None:
        """Activations of the hidden units."""

    def experts(self, number: int, routed: Routed) -> Tensor | None:
        """What the experts are called with; what is returned, [tokens, d_model], is added to the MLP's output."""

    def written(self, number: int, mlp: Tensor) -> None:
        """What the MLP adds to the residual stream; a tensor nobody else holds."""

    def final(self) -> Tensor | None:
        """The final norm is about to read ``stream``."""

    def run(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits at the positions."""
        final = self._replacing(lambda x: self.final(), keep=True)
        handles = [self.body.final_norm.module.register_forward_pre_hook(final, with_kwargs=True)]
        for number, layer in enumerate(self.body.layers):
            handles += self._hooks(number, layer)
        try:
            with torch.no_grad():
                logits = cast("Tensor", self.body.model(
                    input_ids=input_ids, attention_mask=attention_mask, **self.prefix.arguments(),
                    logits_to_keep=to_keep(self.body.model, positions)).logits)
        finally:
            for handle in handles:
                handle.remove()
        return logits if logits.dtype == torch.float64 else logits.float()

    def _replacing(self, what: Callable[[Tensor], Tensor | None], *, keep: bool) -> Callable[..., Any]:
        """A pre-hook that puts what ``what`` returns in place of a module's input, which is the stream if ``keep``."""
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = cast("Tensor", args[0] if args else kwargs["hidden_states"])
            if keep:
                self.stream = _flat(x)
            new = what(_flat(x))
            if new is None:
                return None
            new = new.to(x.dtype).view(x.shape)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
        return hook

    def _hooks(self, number: int, layer: Layer) -> list[Any]:
        before: list[tuple[nn.Module, Callable[[Tensor], Tensor | None], bool]] = [
            (layer.block, lambda x: self.attention(number), True)]
        after: list[tuple[nn.Module, Callable[[nn.Module, Any, Tensor], Tensor | None]]] = []
        plain = layer.mlp_norm is None and not self.body.parallel
        if layer.mlp_norm is not None and not self.body.parallel:
            before.append((layer.mlp_norm.module, lambda x: None, True))
        before.append((layer.mlp, lambda x: self.mlp(number), plain))
        handles: list[Any] = []
        if layer.down is not None:
            before.append((layer.down.module, lambda x: self.units(number, x), False))
        if layer.experts is not None:
            more: list[Tensor] = []  # what the MLP is to write beside what it does, until it has

            def called(module: nn.Module, args: Any, kwargs: Any) -> None:
                change = self.experts(number, Routed.of(args, kwargs))
                if change is not None:
                    more.append(change)

            def gained(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
                return (output + more.pop().view(output.shape)).to(output.dtype) if more else None

            handles.append(layer.experts.module.register_forward_pre_hook(called, with_kwargs=True))
            after.append((layer.mlp, gained))  # before its output is taken for what the MLP writes

        def project(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            new = self.projected(module)
            return None if new is None else new.to(output.dtype).view(output.shape)

        after += [(module, project) for module in layer.projections]
        norm = layer.attention_output_norm
        kept: dict[int, Tensor] = {}  # the heads, until their norm has seen them
        if norm is None:
            before.append((layer.o.module, lambda x: self.factors(number, x, None), False))
        else:
            before += [(layer.o.module, lambda x: kept.__setitem__(0, x), False),
                       (norm.module, lambda x: self.factors(number, kept.pop(0), _scale(norm, x)), False)]
        # The product is a copy: Falcon adds the attention output to the MLP's in place.
        after.append((layer.mlp_writer, lambda module, args, output: self.written(
            number, _flat(output) * layer.multiplier)))
        handles += [module.register_forward_pre_hook(self._replacing(what, keep=keep), with_kwargs=True)
                    for module, what, keep in before]
        return handles + [module.register_forward_hook(hook) for module, hook in after]


class _Recorder(_Pass):
    """Keeps what passes by."""

    def __init__(self, body: Anatomy, prefix: Prefix) -> None:
        super().__init__(body, prefix)
        self.heads: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.mlps: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.routed: list[Routed] = []
        self.attention_residual: list[Tensor] = []
        self.mlp_residual: list[Tensor] = []
        self.final_residual: list[Tensor] = []
        self.read: set[nn.Module] = set()

    def attention(self, number: int) -> None:
        self.attention_residual.append(self.stream)

    def projected(self, module: nn.Module) -> Tensor | None:
        self.read.add(module)
        return None

    def factors(self, number: int, heads: Tensor, scale: Tensor | None) -> None:
        self.heads.append(heads if scale is None else heads.to(self.dtype) * scale)
        if scale is not None:
            self.scale.append(scale)

    def mlp(self, number: int) -> Tensor | None:
        self.mlp_residual.append(self.stream)
        return None

    def units(self, number: int, hidden: Tensor) -> Tensor | None:
        self.hidden.append(hidden)
        return None

    def experts(self, number: int, routed: Routed) -> Tensor | None:
        self.routed.append(routed)
        return None

    def written(self, number: int, mlp: Tensor) -> None:
        self.mlps.append(mlp)

    def final(self) -> Tensor | None:
        self.final_residual.append(self.stream)
        return None


class _Patcher(_Pass):
    """Puts the inputs of readers together; holds, as factors, what every writer so far would change by if patched."""

    def __init__(self, body: Anatomy, prefix: Prefix, other: Recording, edges: Bools, neurons: Bools | None) -> None:
        super().__init__(body, prefix)
        self.other, self.edges, self.neurons = other, edges, neurons
        self.heads: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.mlps: list[Tensor] = []
        self.projections: dict[nn.Module, Tensor] = {}
        self.offset = np.arange(body.d_head)
        self.bytes = (8 if self.dtype == torch.float64 else 4) * body.d_model
        self.expanded: Tensor | None = None  # [writers, tokens, d_model], where it fits

    def _change(self, other: Tensor, now: Tensor) -> Tensor:
        return other.to(self.dtype) - now.to(self.dtype)

    def factors(self, number: int, heads: Tensor, scale: Tensor | None) -> None:
        if scale is not None:
            heads = heads.to(self.dtype) * scale
            self.scale.append(self._change(self.other.scale[number], scale))
        self.heads.append(self._change(self.other.heads[number], heads))
        if self.expanded is not None:
            first = 1 + number * (self.body.n_heads + 1)
            self.expanded[first:first + self.body.n_heads] = self._expand_heads(number, None, slice(None))

    def written(self, number: int, mlp: Tensor) -> None:
        self.mlps.append(self._change(self.other.mlps[number], mlp))
        if self.expanded is not None:
            self.expanded[(number + 1) * (self.body.n_heads + 1)] = self.mlps[-1]

    def units(self, number: int, hidden: Tensor) -> Tensor | None:
        if self.neurons is None or not self.neurons[number].any():
            return None
        chosen = torch.from_numpy(self.neurons[number]).to(hidden.device)
        return torch.where(chosen, self.other.hidden[number].to(hidden.dtype), hidden)

    def experts(self, number: int, routed: Routed) -> Tensor | None:
        experts = self.body.layers[number].experts
        if experts is None or self.neurons is None or not self.neurons[number].any():
            return None
        chosen = torch.from_numpy(self.neurons[number]).to(routed.x.device)
        return exchange(experts, routed, self.other.routed[number], chosen)

    def attention(self, number: int) -> None:
        if number == 0:
            self.embed = self._change(self.other.attention_residual[0], self.stream)
            if self.edges.any() and len(self.edges) * len(self.embed) * self.bytes <= EXPANDED_BYTES:
                self.expanded = self.embed.new_empty(len(self.edges), *self.embed.shape)
                self.expanded[0] = self.embed
        body, layer = self.body, self.body.layers[number]
        first, writers = number * _readers(body), 1 + number * (body.n_heads + 1)
        group, tiles = self._inputs(slice(first, first + _readers(body) - 1), writers,
                                    self.other.attention_residual[number])
        self.projections = {}
        parts = (layer.q, layer.k, layer.v)
        groups = np.split(group, np.cumsum([len(part.outputs) // body.d_head for part in parts])[:-1])
        for rows, inputs in tiles:
            normal = _normal(layer.attention_norm, inputs.to(self.stream.dtype))
            for part, wanted in zip(parts, groups, strict=True):
                width = sum(len(other.outputs) for other in parts if other.module is part.module)
                output = self.projections.setdefault(part.module, normal.new_empty(len(self.stream), width))
                for shared in np.unique(wanted):
                    units = (np.flatnonzero(wanted == shared)[:, None] * body.d_head + self.offset).ravel()
                    weight, bias = part.weight, part.bias
                    if len(units) < len(part.outputs):
                        index = torch.from_numpy(units).to(weight.device)
                        weight, bias = weight[index], None if bias is None else bias[index]
                    where = torch.from_numpy(part.outputs[units]).to(output.device)
                    output[rows, where] = torch.nn.functional.linear(normal[shared], weight, bias)

    def projected(self, module: nn.Module) -> Tensor | None:
        return self.projections.pop(module, None)

    def mlp(self, number: int) -> Tensor | None:
        body = self.body
        column, writers = (number + 1) * _readers(body) - 1, 1 + number * (body.n_heads + 1)
        if not body.parallel:
            writers += body.n_heads
        mixed = self._input(column, writers, self.other.mlp_residual[number])
        return None if mixed is None else _normal(body.layers[number].mlp_norm, mixed.to(self.stream.dtype))

    def final(self) -> Tensor | None:
        return self._input(-1, len(self.edges), self.other.final_residual)

    def _input(self, column: int, writers: int, other: Tensor) -> Tensor | None:
        """The input of one reader, [tokens, d_model]; ``None`` if it is ``stream`` itself."""
        last = column + 1 or None
        tiles = [inputs[0] for _, inputs in self._inputs(slice(column, last), writers, other)[1]]
        return torch.cat(tiles) if tiles else None

    def _inputs(self, columns: slice, writers: int,
                other: Tensor) -> tuple[Ints, Iterator[tuple[slice, Tensor]]]:
        """The inputs of some readers of the same residual stream.

        Args:
            columns: the readers.
            writers: how many writers, from the first, come before them.
            other: [tokens, d_model], what the readers read in the other run.

        Returns:
            For each reader the number of its input, and by tile of tokens the inputs, [inputs, tokens, d_model]; no
            tile at all if nothing is patched.
        """
        cut = self.edges[:writers, columns]
        if not cut.any():
            return np.zeros(cut.shape[1], dtype=np.intp), iter(())
        sets, group = np.unique(cut, axis=1, return_inverse=True)
        if sets.any(1).sum() <= (~sets).any(1).sum():
            return group.reshape(-1), self._tiles(sets, self.stream, 1)
        return group.reshape(-1), self._tiles(~sets, other, -1)

    def _tiles(self, sets: Bools, base: Tensor, sign: int) -> Iterator[tuple[slice, Tensor]]:
        """``base`` plus (or minus) the changes of each set of writers; ``sets`` is bool [writers, sets]."""
        chosen = np.flatnonzero(sets.any(1))
        if self.expanded is not None and 3 * len(chosen) > len(sets):
            chosen = np.arange(len(sets))  # to copy the chosen is to read, write and read them
        share = torch.from_numpy(sets[chosen].T).to(base.device, self.dtype) * sign
        step = max(1, TILE_BYTES // ((len(chosen) + 2 * sets.shape[1]) * self.bytes))
        for start in range(0, len(base), step):
            rows = slice(start, start + step)
            changes = self._expand(chosen, rows).to(base.device)  # layers may lie on several devices
            moved = (share @ changes.flatten(1)).view(-1, *changes.shape[1:])
            yield rows, base[rows].to(self.dtype) + moved

    def _expand(self, chosen: Ints, rows: slice) -> Tensor:
        """What each of the chosen writers would change by if patched, [chosen, tokens, d_model]."""
        if self.expanded is not None:
            if len(chosen) and chosen[-1] == len(chosen) - 1:
                return self.expanded[:len(chosen), rows]  # a view
            return self.expanded[torch.from_numpy(chosen).to(self.expanded.device), rows]
        heads = self.body.n_heads
        layers, places = np.divmod(chosen - 1, heads + 1)  # writer 0, the embedding, is in layer -1
        parts: list[Tensor] = []
        for number in np.unique(layers).tolist():
            if number < 0:
                parts.append(self.embed[None, rows])
                continue
            here = places[layers == number]
            if here[0] < heads:
                parts.append(self._expand_heads(number, here[here < heads], rows))
            if here[-1] == heads:
                parts.append(self.mlps[number][None, rows])
        if not parts:
            return self.embed.new_zeros(0, len(self.embed[rows]), self.body.d_model)
        return torch.cat([part.to(self.stream.device) for part in parts])

    def _expand_heads(self, number: int, chosen: Ints | None, rows: slice) -> Tensor:
        """What the chosen heads of a layer (all if ``None``) would change by if patched, [chosen, tokens, d_model]."""
        body, layer = self.body, self.body.layers[number]
        factors = self.heads[number][rows]
        factors = factors.view(len(factors), body.n_heads, body.d_head).transpose(0, 1)
        weight = layer.o.weight.detach().reshape(body.d_model, body.n_heads, body.d_head).permute(1, 2, 0)
        if chosen is not None:
            index = torch.from_numpy(chosen).to(weight.device)
            factors, weight = factors[index], weight[index]
        norm = layer.attention_output_norm
        gain = None if norm is None or norm.gain is None else norm.gain.detach().to(self.dtype)
        changes = torch.matmul(factors, weight.to(self.dtype))
        if norm is not None and layer.o.bias is not None:  # without a norm the bias is the same in both runs
            changes += self.scale[number][rows] * layer.o.bias.detach().to(self.dtype) / body.n_heads
        if gain is not None:
            changes *= gain
        return changes * layer.multiplier if layer.multiplier != 1 else changes


def _normal(norm: Norm | None, x: Tensor) -> Tensor:
    """The norm's output; its hooks, which belong to the stream itself, do not run."""
    return x if norm is None else cast("Tensor", norm.module.forward(x))


def _scale(norm: Norm, x: Tensor) -> Tensor:
    """1 / rms of the last dimension, [tokens, 1], in float32 or finer."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)


def _flat(x: Tensor) -> Tensor:
    """[tokens, width], whether or not a model keeps batch and sequence apart."""
    return x.reshape(-1, x.shape[-1])

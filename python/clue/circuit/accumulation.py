"""Accumulation: the running sums of an attribution, one batch of runs at a time.

Layers come from the top down, as :mod:`clue.model.capture` yields them, at every point of the path at once. Hidden units go
straight into the native kernel. For edges, only factors of rank d_head are kept, until a group of layers is complete; then,
a tile of tokens at a time, writers and readers are expanded to d_model and contracted with one matrix product for the
readers of a few layers:

    S(u, v) = sum over tokens of <difference of writer u, gradient at the input of reader v>

More rows in the same product check the books: the differences of the residual stream itself, whose scores a complete set of
writers must add up to. Everything here is float32 or finer within a tile and float64 across tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import _core
from ..model import capture
from ..model.anatomy import Anatomy, Norm, Projection
from ..model.experts import neuron_attribution
from ..model.writers import Written, head_outputs
from .graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of expanded writers held at once.
TILE_BYTES = 32 << 20
#: Columns that make a matrix product efficient: a product takes the readers of so many layers as it needs.
COLUMNS = 64
#: Layers whose readers are contracted together when runs are streamed, the top ones; later groups are larger, by what the
#: layers above have given back. Writers are expanded anew for each group.
GROUP = 2


@dataclass(frozen=True)
class _Readers:
    """The readers behind one norm, at every point of the path.

    Attributes:
        column: the first reader's place among ``graph.readers``.
        norm: what stands between the residual stream and them.
        projections: q, k and v; none for an MLP or the output, which read the norm's output as it is.
        residual: per point [tokens, d_model], the norm's input.
        grads: per point, the gradients at the projections' outputs, or the one at the norm's output.
    """

    column: int
    count: int
    norm: Norm | None
    projections: tuple[Projection, ...]
    residual: list[Tensor]
    grads: list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Layer:
    """One layer's readers, kept until their group is contracted."""

    attention: _Readers
    mlp: _Readers


class Sums:
    """Running sums of one attribution: of products over tokens, for every edge and every hidden unit.

    Attributes:
        edges: for Ns and Dn, float64 [writers, readers].
        books: for Ns and Dn, float64 [readers], what each column of ``edges`` must add up to.
        units: per layer four float32 or finer [d_mlp]: Ns, Dn and the sums of their squares.
        tokens, pairs, informative: numbers of tokens, of pairs and of those whose answer corruption changes.
    """

    def __init__(self, body: Anatomy, graph: Graph, norm: str, tile_bytes: int = TILE_BYTES) -> None:
        self.body, self.graph, self.exact, self.tile_bytes = body, graph, norm == "exact", tile_bytes
        first = next(body.model.parameters())
        self.device = first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        shape = graph.residual_edges.shape
        self.edges = [torch.zeros(shape, dtype=torch.float64, device=self.device) for _ in range(2)]
        self.books = [torch.zeros(shape[1], dtype=torch.float64, device=self.device) for _ in range(2)]
        self.units = [[torch.zeros(body.d_mlp, dtype=self.dtype, device=layer.o.weight.device) for _ in range(4)]
                      for layer in body.layers]
        self.tokens = self.pairs = self.informative = 0

    def merge(self, other: Sums) -> None:
        """Add the sums of another batch."""
        for mine, its in zip([*self.edges, *self.books, *(t for layer in self.units for t in layer)],
                             [*other.edges, *other.books, *(t for layer in other.units for t in layer)], strict=True):
            mine += its
        self.tokens += other.tokens
        self.pairs += other.pairs
        self.informative += other.informative

    def all_reduce(self) -> None:
        """Add up the sums of all processes of torch.distributed's default group, in one all-reduce."""
        parts = [*self.edges, *self.books, *(t for layer in self.units for t in layer)]
        counts = torch.tensor([self.tokens, self.pairs, self.informative], dtype=torch.float64, device=self.device)
        flat = torch.cat([*(t.to(self.device, torch.float64).ravel() for t in parts), counts])
        torch.distributed.all_reduce(flat)
        for part, summed in zip(parts, flat[:-3].split([t.numel() for t in parts]), strict=True):
            part.copy_(summed.view(part.shape))
        self.tokens, self.pairs, self.informative = (int(x) for x in flat[-3:].tolist())

    def add(self, points: Sequence[capture.Run], ends: tuple[Sequence[int], Sequence[int]], mask: Tensor,
            group: int) -> None:
        """Add one batch.

        Args:
            points: runs along the path from the clean to the corrupted prompt; their layers are consumed. The first one's
                writers are the differences to the last one.
            ends: the points whose mean gradient makes Ns, and those that make Dn.
            mask: bool [batch, seq], the tokens to count; the others must not matter.
            group: number of layers, at the top, whose readers are kept until they are contracted together; 0 leaves the
                edges out.
        """
        body, rows = self.body, mask.ravel()
        chosen = torch.nonzero(rows).ravel()
        count = len(chosen)
        self.tokens += count
        # Runs that are streamed keep the tokens that count alone, for the memory; of whole ones a tile picks its own.
        early = count < len(rows) and group < body.n_layers

        def take(tensor: Tensor) -> Tensor:
            tensor = tensor.reshape(-1, tensor.shape[-1])
            return (tensor[chosen.to(tensor.device)] if early else tensor).to(self.device)

        if not group:
            for number in reversed(range(body.n_layers)):
                self._add_units(number, [next(point.layers) for point in points], ends, rows)
            return
        embed = take(points[-1].embed - points[0].embed)
        written = []
        for _ in body.layers:
            change = points[0].written.pop(0)
            written.append(Written(take(change.heads), None if change.head_scale is None else take(change.head_scale),
                                           take(change.mlp)))
        del change
        size = body.n_heads + 2 * body.n_kv_heads + 1
        top = [_Readers(body.n_layers * size, 1, body.final_norm, (), [take(run.final_residual) for run in points],
                        [(take(run.grad_final),) for run in points])]
        # Elements per token that a layer holds while it is kept, beside the residual it was run from, and that it had held
        # before and has given back once it is contracted.
        heads, groups = body.n_heads * body.d_head, body.n_kv_heads * body.d_head
        holds = len(points) * (2 * body.d_model + heads + 2 * groups)
        gives_back = len(points) * body.d_model + heads + body.d_model
        room = _Room(self.device, self.dtype)
        kept: list[_Layer] = []
        wanted = group
        for number in reversed(range(body.n_layers)):
            layer = body.layers[number]
            runs = [next(point.layers) for point in points]
            self._add_units(number, runs, ends, rows)
            attention = _Readers(number * size, size - 1, layer.attention_norm, (layer.q, layer.k, layer.v),
                                 [take(run.residual) for run in runs],
                                 [(take(run.grad_q), take(run.grad_k), take(run.grad_v)) for run in runs])
            mlp = _Readers(number * size + size - 1, 1, layer.mlp_norm, (), [take(run.mlp_residual) for run in runs],
                           [(take(run.grad_mlp),) for run in runs])
            kept.insert(0, _Layer(attention, mlp))
            del runs
            if len(kept) == wanted or number == 0:
                tile = max(1, self.tile_bytes // ((1 + len(written) * (body.n_heads + 1)) * body.d_model * self.dtype.itemsize))
                for start in range(0, count, tile):
                    part = slice(start, min(start + tile, count))
                    at = part if len(embed) == count else chosen[part]
                    self._add_tile(at, part.stop - start, number, kept, top, embed, written, ends, room)
                kept, top = [], []
                del written[number:]  # nothing below reads them
                wanted = group + (body.n_layers - number) * gives_back // holds

    def _add_units(self, number: int, runs: list[capture.LayerRun], ends: tuple[Sequence[int], Sequence[int]],
                   rows: Tensor) -> None:
        grads = [_mean([runs[i].grad_hidden for i in end]) for end in ends]
        near_clean, near_corrupted = (grad.reshape(-1, grad.shape[-1]) for grad in grads)
        rows, native, experts = rows.to(near_clean.device), kernels(near_clean), self.body.layers[number].experts
        here, away = runs[0], runs[-1]
        if experts is not None:
            assert here.routed is not None and away.routed is not None
            neuron_attribution(experts, here.routed, away.routed, (near_clean, near_corrupted), self.units[number], rows,
                               native)
        else:
            assert here.hidden is not None and away.hidden is not None
            hidden = [t.reshape(-1, self.body.d_mlp) for t in (here.hidden, away.hidden)]
            native.neuron_attribution(*hidden, near_clean, near_corrupted, *self.units[number], mask=rows)

    def _add_tile(self, at: slice | Tensor, tokens: int, first: int, layers: list[_Layer], top: list[_Readers], embed: Tensor,
                  written: list[Written], ends: tuple[Sequence[int], Sequence[int]], room: _Room) -> None:
        """Contract the readers of ``layers``, the lowest of which is number ``first``, on some of the tokens."""
        body, heads = self.body, self.body.n_heads
        last = first + len(layers)
        together = -(-COLUMNS // (2 * (layers[0].attention.count + 1)))  # layers in one product
        # Below the writers, one row for the books of each norm.
        z = room.take("z", 1 + last * (heads + 1) + 2 * together + 1, tokens, body.d_model)
        z[0] = embed[at]
        filled = 1
        waiting: list[tuple[int, _Readers]] = []
        for number in range(last):
            readers = layers[number - first] if number >= first else None
            if readers is not None:
                waiting.append((filled, readers.attention))
                # Unless it is parallel to them, the MLP reads what this layer's heads write.
                waiting.append((filled if body.parallel else filled + heads, readers.mlp))
            change, scale = written[number].heads[at].to(self.dtype), written[number].head_scale
            head_outputs(body.layers[number], change, None if scale is None else scale[at].to(self.dtype),
                                 out=z[filled:filled + heads])
            z[filled + heads] = written[number].mlp[at]
            filled += heads + 1
            if number == last - 1:
                waiting += [(filled, readers) for readers in top]
            if len(waiting) >= 2 * together or number == last - 1:
                self._contract(z, filled, waiting, at, ends, room)
                waiting.clear()

    def _contract(self, z: Tensor, filled: int, waiting: list[tuple[int, _Readers]], at: slice | Tensor,
                  ends: tuple[Sequence[int], Sequence[int]], room: _Room) -> None:
        """Add the scores of some readers of the ``filled`` writers in ``z``; each reads the first ones, as the number before
        it says. The product takes all together and what a reader does not read is dropped."""
        tokens, d = z.shape[1:]
        count = sum(readers.count for _, readers in waiting)
        pulled = room.take("pulled", count, 2, tokens, d)
        first = 0
        for book, (_, readers) in enumerate(waiting, filled):
            z[book] = readers.residual[-1][at].to(z.dtype) - readers.residual[0][at].to(z.dtype)
            self._pull(readers, at, ends, pulled[first:first + readers.count])
            first += readers.count
        rows = filled + len(waiting)
        found = (z[:rows].view(rows, -1) @ pulled.view(2 * count, -1).T).view(rows, count, 2).double()
        first = 0
        for book, (reads, readers) in enumerate(waiting, filled):
            here = slice(readers.column, readers.column + readers.count)
            for end in range(2):
                self.edges[end][:reads, here] += found[:reads, first:first + readers.count, end]
                self.books[end][here] += found[book, first:first + readers.count, end]
            first += readers.count

    def _pull(self, readers: _Readers, at: slice | Tensor, ends: tuple[Sequence[int], Sequence[int]], out: Tensor) -> None:
        """Gradients at the residual stream: the mean over each end's points, in float [readers, 2, tokens, d_model]."""
        dtype, (_, _, tokens, d) = out.dtype, out.shape
        for number, pair in enumerate(zip(*ends, strict=True)):
            to = out if number == 0 else torch.empty_like(out)
            if not readers.projections:
                for end, point in enumerate(pair):
                    to[0, end] = readers.grads[point][0][at]
            first = 0
            for part, projection in enumerate(readers.projections):
                weight = projection.weight.to(self.device, dtype).reshape(-1, self.body.d_head, d)
                size = len(weight)
                grads = torch.empty(size, 2, tokens, self.body.d_head, dtype=dtype, device=self.device)
                for end, point in enumerate(pair):
                    grads[:, end] = readers.grads[point][part][at].view(tokens, size, -1).transpose(0, 1)
                torch.bmm(grads.view(size, 2 * tokens, -1), weight, out=to[first:first + size].view(size, 2 * tokens, d))
                first += size
            if readers.norm is not None:
                residual = torch.cat([readers.residual[point][at].to(dtype) for point in pair])
                norm_backward(readers.norm, residual, to.view(-1, 2 * tokens, d), exact=self.exact)
            if number:
                out += to
        if len(ends[0]) > 1:
            out /= len(ends[0])


class _Room:
    """Memory that tiles share: pages that are new to the process cost as much as what is computed in them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._parts: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of what is left there under this name, whatever that is."""
        size = math.prod(shape)
        if name not in self._parts or self._parts[name].numel() < size:
            self._parts.pop(name, None)
            self._parts[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._parts[name][:size].view(shape)


def norm_backward(norm: Norm, residual: Tensor, grad: Tensor, *, exact: bool) -> None:
    """Pull gradients back through a norm, in place.

    Args:
        norm: RMS or layer norm.
        residual: float [tokens, d_model], the norm's input.
        grad: float [readers, tokens, d_model], gradients at its output; become those at its input.
        exact: the full Jacobian; otherwise the scale (1/rms or 1/deviation) is held constant. The centring of a layer
            norm is linear and always counts.
    """
    normal, scale = capture.norm_factors(norm, residual)
    gain = None if norm.gain is None else norm.gain.detach().to(grad.device, grad.dtype)
    kernels(grad).norm_backward(grad.view(-1, grad.shape[-1]), normal if exact else None, scale, gain, norm.kind == "layer")


def kernels(tensor: Tensor) -> Any:
    """The native module for a tensor's device."""
    if tensor.is_cuda:
        from .. import _cuda

        return _cuda
    return _core


def _mean(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0].float() if tensors[0].dtype != torch.float64 else tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)

"""Attribution: what every edge and every neuron carries, by edge attribution patching along a path of prompts.

1. Run the corrupted prompt, then the clean one, each forward and backward once (:mod:`clue.model.capture`); with more
   ``path_steps`` also embeddings between the two. Gradients next to the clean prompt make Ns, next to the corrupted
   prompt Dn. Two steps are paired EAP; a gate behind a saturated gate has gradient zero at both of its ends and is only
   seen in between.
2. The difference of the two runs is what each writer would contribute if it were patched; the gradient, pulled back
   through projection and norm, is what each reader would make of it.
3. For a tile of tokens expand both from their factors and contract them with one matrix product per reader layer:
   S(u, v) = sum over tokens of <difference of u, gradient of v>.
4. Check the books: summed over a complete set of writers, the scores of a reader must equal the inner product of its
   input's difference with its gradient. A gap above the tolerance is an error, never a warning.

Source: EAP (arXiv 2310.10348), EAP-IG (arXiv 2403.17806), noising and denoising as in arXiv 2505.10039. Accumulation is
float32 or finer within a tile and float64 across tiles, whatever the model's dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..config import LocalizeSettings
from ..data.atomic import write_atomically
from ..errors import AttributionError
from ..model import capture
from ..model.anatomy import Anatomy, Norm
from ..model.experts import neuron_attribution
from .graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.pairs import Pairs

Floats = npt.NDArray[np.float64]

#: Bytes of expanded writer differences held at once.
TILE_BYTES = 128 << 20


@dataclass(frozen=True)
class Scores:
    """Mean score per pair of every residual edge and every hidden neuron.

    Attributes:
        name: name of the record set.
        graph: the neuron-level graph of the model.
        ns, dn: float64 [writers, readers] in the order of ``graph.writers`` and ``graph.readers``; zero where there is
            no edge. Ns estimates the effect of patching corrupted into clean, Dn of clean into corrupted.
        neuron_ns, neuron_dn: float64 [n_layers, d_mlp], the same for hidden units.
        neuron_sq_ns, neuron_sq_dn: float64 [n_layers, d_mlp], sums over tokens of squared terms, per pair.
        tokens: number of tokens summed over.
        pairs: number of pairs; ``informative`` of them changed the model's top token somewhere in the answer.
        gap_ns, gap_dn: relative conservation gaps.
    """

    name: str
    graph: Graph
    ns: Floats
    dn: Floats
    neuron_ns: Floats
    neuron_dn: Floats
    neuron_sq_ns: Floats
    neuron_sq_dn: Floats
    tokens: int
    pairs: int
    informative: int
    gap_ns: float
    gap_dn: float

    _ARRAYS = ("ns", "dn", "neuron_ns", "neuron_dn", "neuron_sq_ns", "neuron_sq_dn")
    _NUMBERS = ("tokens", "pairs", "informative", "gap_ns", "gap_dn")

    def node_scores(self, graph: Graph) -> Floats:
        """float64 [graph.n_nodes] >= 0: how much the target depends on each node, max of Ns and Dn.

        A writer or a neuron counts what leaves it, a reader what enters it; ``embed`` and ``logits`` included.
        """
        found = np.zeros(graph.n_nodes)
        for edges, units in ((self.ns, self.neuron_ns), (self.dn, self.neuron_dn)):
            strength = np.zeros(graph.n_nodes)
            strength[graph.readers] = np.abs(edges.sum(0))
            strength[graph.writers] = np.maximum(strength[graph.writers], np.abs(edges.sum(1)))
            if graph.neurons:
                strength[_neuron_ids(graph)] = np.abs(units).ravel()
            found = np.maximum(found, strength)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores as one safetensors file."""
        from safetensors.numpy import save

        metadata = {"name": self.name, "graph": json.dumps(self.graph.to_json(), sort_keys=True),
                    "numbers": json.dumps({name: getattr(self, name) for name in self._NUMBERS}, sort_keys=True)}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in self._ARRAYS}
        write_atomically(path, save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read scores that :meth:`save` wrote."""
        from safetensors import safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata()
                arrays: dict[str, Any] = {name: file.get_tensor(name) for name in cls._ARRAYS}
            return cls(metadata["name"], Graph(**json.loads(metadata["graph"])), **arrays,
                       **json.loads(metadata["numbers"]))
        except FileNotFoundError:
            raise AttributionError(f"{path} does not exist: make it with `clue localize`") from None
        except Exception as error:
            raise AttributionError(f"{path} is not a scores file ({error})") from None


def _neuron_ids(graph: Graph) -> npt.NDArray[np.int64]:
    from ..types import NodeKind

    return np.flatnonzero(graph.kind == NodeKind.NEURON)


def graph_of(body: Anatomy, *, neurons: bool = True) -> Graph:
    """The graph of a model, with or without hidden neurons as nodes."""
    return Graph(body.n_layers, body.n_heads, body.n_kv_heads, body.d_mlp, neurons, body.parallel)


def attribute(
    body: Anatomy,
    pairs: Pairs,
    settings: LocalizeSettings = LocalizeSettings(),
    *,
    name: str = "pairs",
    on_batch: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every edge and neuron of the model on a set of pairs.

    Args:
        body: the model, bound by :func:`clue.model.anatomy.anatomy`; it runs unmodified.
        pairs: clean and corrupted token sequences of equal length with the same teacher-forced answer.
        settings: ``batch_size``, ``target``, ``path``, ``path_steps``, ``norm`` and ``tolerance`` are used.
        name: name of the set, kept in the result and in errors.
        on_batch: called with (pairs done, pairs in all).

    Raises:
        AttributionError: no pair changes the model's answer, a score is not finite, or the conservation gap exceeds
            the tolerance.
    """
    if len(pairs.clean) == 0:
        raise AttributionError(f"{name}: there are no pairs to attribute")
    sums = _Sums(body, settings.norm)
    order = np.argsort([len(ids) for ids in pairs.clean], kind="stable")  # like lengths together: little padding
    informative = 0
    with capture.frozen(body.model):
        for start in range(0, len(order), settings.batch_size):
            informative += _batch(body, pairs, order[start:start + settings.batch_size], settings, sums)
            if on_batch is not None:
                on_batch(min(start + settings.batch_size, len(order)), len(order))
    if informative == 0:
        raise AttributionError(f"{name}: none of the {len(order)} corrupted prompts changes the model's answer, so"
                               " nothing can be attributed: the model does not know these records, or the corrupted"
                               " prompts ask for the same answer")
    scores = sums.scores(name, pairs=len(order), informative=informative)
    half = next(body.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    tolerance = settings.tolerance or (5e-2 if half else 1e-3)
    for direction, gap in (("Ns", scores.gap_ns), ("Dn", scores.gap_dn)):
        if not gap <= tolerance:  # also catches NaN
            raise AttributionError(f"{name}: the {direction} scores break the conservation law by {gap:.1e} (tolerance"
                                   f" {tolerance:.0e}): the anatomy entry of {body.family} does not fit this model, or"
                                   " its dtype is too coarse")
    return scores


def _batch(body: Anatomy, pairs: Pairs, chosen: npt.NDArray[np.int64], settings: LocalizeSettings,
           sums: _Sums) -> int:
    """Run one batch along its path, add its scores, and return how many of its pairs were informative."""
    device = next(body.model.parameters()).device
    lengths = [len(pairs.clean[i]) for i in chosen]
    clean, corrupted = (torch.zeros(len(chosen), max(lengths), dtype=torch.int64) for _ in range(2))
    mask = torch.zeros_like(clean)
    for row, i in enumerate(chosen):
        clean[row, :lengths[row]] = torch.from_numpy(pairs.clean[i])
        corrupted[row, :lengths[row]] = torch.from_numpy(pairs.corrupted[i])
        mask[row, :lengths[row]] = 1
    starts = torch.from_numpy(pairs.answer_start[chosen])
    at = torch.arange(max(lengths) - 1)
    spans = (at[None] >= starts[:, None] - 1) & (at[None] < torch.tensor(lengths)[:, None] - 1)  # predicting positions
    positions = torch.nonzero(spans.any(0)).ravel()
    clean, corrupted, mask, positions, spans = (t.to(device) for t in (clean, corrupted, mask, positions, spans))
    answer = clean[:, positions + 1]
    weight = spans[:, positions].float()
    weight = weight / weight.sum(1, keepdim=True)  # mean over each pair's answer span
    contrast: Tensor | None = None

    def margin(logits: Tensor) -> Tensor:
        nonlocal contrast
        if contrast is None:  # the corrupted run comes first and names the contrast for both
            contrast = logits.detach().argmax(-1)
        true = logits.gather(-1, answer[..., None])[..., 0]
        other = logits.gather(-1, contrast[..., None])[..., 0]
        return ((true - other) * weight).sum()  # zero where corruption does not change the top token

    def logprob(logits: Tensor) -> Tensor:
        nonlocal contrast
        if contrast is None:
            contrast = logits.detach().argmax(-1)
        return (logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0] * weight).sum()

    function = margin if settings.target == "margin" else logprob
    away = capture.run(body, corrupted, mask, positions, function)
    here = capture.run(body, clean, mask, positions, function)
    path = [here]
    for step in range(1, settings.path_steps - 1):
        between = torch.lerp(here.embed, away.embed, step / (settings.path_steps - 1))
        point = capture.run(body, clean, mask, positions, function, embed=between)
        path.append(replace(point, heads=[], mlps=[], hidden=[], routed=[]))  # only its gradients are used
    path.append(away)
    middle = len(path) // 2
    sums.add(here, away, (path, path) if settings.path == "full" else (path[:middle], path[middle:]), mask.bool())
    assert contrast is not None
    return int((((contrast != answer) & (weight > 0)).any(1)).sum())


def _mean(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0].float() if tensors[0].dtype != torch.float64 else tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)


class _Sums:
    """Running sums of one attribution."""

    def __init__(self, body: Anatomy, norm: str) -> None:
        self.body, self.norm = body, norm
        self.graph = graph_of(body)
        shape = self.graph.residual_edges.shape
        device = next(body.model.parameters()).device
        self.edges = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)]
        self.books = [torch.zeros(shape[1], dtype=torch.float64, device=device) for _ in range(2)]
        exact = next(body.model.parameters()).dtype == torch.float64
        self.dtype = torch.float64 if exact else torch.float32
        self.units = [[torch.zeros(body.d_mlp, dtype=self.dtype, device=device) for _ in range(4)]
                      for _ in range(body.n_layers)]
        self.tokens = 0

    def add(self, clean: capture.Run, corrupted: capture.Run, halves: tuple[list[capture.Run], list[capture.Run]],
            mask: Tensor) -> None:
        """Add one batch: neurons through the native kernel, edges tile by tile.

        ``halves`` are the points of the path whose mean gradient makes Ns, and those that make Dn.
        """
        body = self.body
        rows = mask.ravel()
        self.tokens += int(rows.sum())
        for layer in range(body.n_layers):
            grads = [_mean([point.grad_hidden[layer] for point in half]) for half in halves]
            experts = body.layers[layer].experts
            if experts is not None:
                near_clean, near_corrupted = (t.reshape(-1, body.d_model) for t in grads)
                neuron_attribution(experts, clean.routed[layer], corrupted.routed[layer], (near_clean, near_corrupted),
                                   self.units[layer], rows, kernels(near_clean))
                continue
            flat = [t.reshape(-1, body.d_mlp) for t in (clean.hidden[layer], corrupted.hidden[layer], *grads)]
            kernels(flat[0]).neuron_attribution(*flat, *self.units[layer], mask=rows.to(torch.uint8))
        writers = len(self.graph.writers)
        size = 8 if self.dtype == torch.float64 else 4
        tile = max(1, TILE_BYTES // (writers * body.d_model * size))
        chosen = torch.nonzero(rows).ravel()
        for start in range(0, len(chosen), tile):
            self._tile(clean, corrupted, halves, chosen[start:start + tile])

    def _tile(self, clean: capture.Run, corrupted: capture.Run, halves: tuple[list[capture.Run], list[capture.Run]],
              rows: Tensor) -> None:
        body, dtype = self.body, self.dtype
        n, d, h, dh = len(rows), body.d_model, body.n_heads, body.d_head

        def take(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, tensor.shape[-1])[rows].to(dtype)

        def moved(a: Tensor, b: Tensor) -> Tensor:
            return take(b) - take(a)

        writers = torch.empty(len(self.graph.writers), n, d, dtype=dtype, device=rows.device)
        writers[0] = moved(clean.embed, corrupted.embed)
        filled, reader = 1, 0

        def contract(residual: Callable[[capture.Run], Tensor], norm: Norm | None,
                     gradient: Callable[[capture.Run], Tensor]) -> None:
            nonlocal reader
            difference = moved(residual(clean), residual(corrupted))
            for end, half in enumerate(halves):
                pulled = _mean([capture.norm_backward(norm, take(residual(point)), gradient(point), self.norm)
                                for point in half])
                count = pulled.shape[0]
                scores = writers[:filled].reshape(filled, -1) @ pulled.reshape(count, -1).T
                self.edges[end][:filled, reader:reader + count] += scores.double()
                self.books[end][reader:reader + count] += (pulled * difference).sum((1, 2), dtype=torch.float64)
            reader += count

        def head_gradients(point: capture.Run, number: int) -> Tensor:
            layer, parts = body.layers[number], []
            for grad, projection in ((point.grad_q, layer.q), (point.grad_k, layer.k), (point.grad_v, layer.v)):
                gradient = take(grad[number]).view(n, -1, dh).transpose(0, 1)  # [heads or groups, tokens, d_head]
                parts.append(gradient @ projection.weight.to(dtype).reshape(-1, dh, d))
            return torch.cat(parts)

        for number, layer in enumerate(body.layers):
            contract(lambda run, i=number: run.attention_residual[i], layer.attention_norm,  # type: ignore[misc]
                     lambda run, i=number: head_gradients(run, i))  # type: ignore[misc]
            written = filled + h
            scale_change = None
            if layer.attention_output_norm:
                scale_change = moved(clean.head_scale[number], corrupted.head_scale[number])
            capture.head_outputs(layer, take(clean.heads[number]), take(corrupted.heads[number]), scale_change,
                                 out=writers[filled:written])
            if not body.parallel:
                filled = written  # the MLP sees what this layer's heads wrote
            contract(lambda run, i=number: run.mlp_residual[i], layer.mlp_norm,  # type: ignore[misc]
                     lambda run, i=number: take(run.grad_mlp[i])[None])  # type: ignore[misc]
            writers[written] = moved(clean.mlps[number], corrupted.mlps[number])
            filled = written + 1
        contract(lambda run: run.final_residual, body.final_norm, lambda run: take(run.grad_final)[None])

    def scores(self, name: str, *, pairs: int, informative: int) -> Scores:
        """Means per pair, with the sign of Dn turned (it patches clean into corrupted) and the books compared."""
        edges = [e.cpu().numpy() / pairs for e in self.edges]
        books = [b.cpu().numpy() / pairs for b in self.books]
        units = [np.stack([layer[i].cpu().numpy() for layer in self.units]).astype(np.float64) / pairs
                 for i in range(4)]
        for array in (*edges, *units):
            if not np.all(np.isfinite(array)):
                raise AttributionError(f"{name}: a score is not finite: the model's activations overflow in its dtype")
        gaps = [float(np.linalg.norm(e.sum(0) - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))
                for e, b in zip(edges, books, strict=True)]
        return Scores(name=name, graph=self.graph, ns=edges[0], dn=-edges[1], neuron_ns=units[0], neuron_dn=-units[1],
                      neuron_sq_ns=units[2], neuron_sq_dn=units[3], tokens=self.tokens, pairs=pairs,
                      informative=informative, gap_ns=gaps[0], gap_dn=gaps[1])


def kernels(tensor: Tensor) -> Any:
    """The native module for a tensor's device."""
    if tensor.is_cuda:
        from .. import _cuda

        return _cuda
    return _core

"""Attribution: what every edge and every neuron carries, by edge attribution patching along a path of prompts.

1. Run the corrupted prompt, then the clean one, each forward and backward once (:mod:`clue.model.capture`); with more
   ``path_steps`` also embeddings between the two. Gradients next to the clean prompt make Ns, next to the corrupted
   prompt Dn. Two steps are paired EAP; a gate behind a saturated gate has gradient zero at both of its ends and is only
   seen in between, or nowhere: an OR of three is saturated before an AND of three that reads it comes alive. In ``chained``
   runs the gradient goes on from every block as the mean over the runs, so that a gate behind stops nothing, and Ns and Dn
   tell a reader's own gate. What the prompts of a batch begin with in both runs is run once (:mod:`clue.model.prefix`).
2. The difference of the two runs is what each writer would contribute if it were patched; the gradient, pulled back
   through projection and norm, is what each reader would make of it (:mod:`clue.circuit.accumulation`).
3. Check the books: summed over a complete set of writers, the scores of a reader must equal the inner product of its
   input's difference with its gradient. A gap above the tolerance is an error, never a warning.

Under torch.distributed each process scores its share of the batches, and one all-reduce adds them up.

Source: EAP (arXiv 2310.10348), EAP-IG (arXiv 2403.17806), noising and denoising as in arXiv 2505.10039; chained runs are the
chain rule of DeepLIFT's multipliers (arXiv 1704.02685), a block's multiplier being the mean of its Jacobians.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..config import LocalizeSettings, check
from ..data.atomic import write_arrays
from ..errors import AttributionError, ClueError
from ..model import capture
from ..model.anatomy import Anatomy
from ..model.modes import frozen
from ..model.prefix import Prefix, separable, unstretched
from ..processes import everywhere, place
from ..types import Direction
from ..values import ByValue
from .accumulation import GROUP, TILE_BYTES, Sums
from .graph import Graph
from .target import Prompts, batches

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.pairs import Pairs

Floats = npt.NDArray[np.float64]

#: The smallest tile worth falling back to, in bytes.
LEAST_TILE_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class Scores(ByValue):
    """Mean score per pair of every residual edge and every hidden neuron.

    Attributes:
        name: name of the record set.
        graph: the neuron-level graph of the model.
        ns, dn: float64 [writers, readers] in the order of ``graph.writers`` and ``graph.readers``; zero where there is
            no edge. Ns estimates the effect of patching corrupted into clean, Dn of clean into corrupted.
        neuron_ns, neuron_dn: float64 [n_layers, d_mlp], the same for hidden units.
        neuron_sq_ns, neuron_sq_dn: float64 [n_layers, d_mlp], sums over tokens of squared terms, per pair.
        tokens: number of tokens summed over.
        pairs: number of pairs; in ``informative`` of them the corrupted run's top token is somewhere not the answer's.
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
        metadata = {"name": self.name, "graph": json.dumps(self.graph.to_json(), sort_keys=True),
                    "numbers": json.dumps({name: getattr(self, name) for name in self._NUMBERS}, sort_keys=True)}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in self._ARRAYS}
        write_arrays(path, arrays, metadata)

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
    steps: int | None = None,
    target: str | None = None,
    norm: str | None = None,
    direction: Direction | str | None = None,
    name: str = "pairs",
    neurons_only: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every edge and neuron of the model on a set of pairs.

    Args:
        body: the model, bound by :func:`clue.model.anatomy.anatomy`; it runs unmodified.
        pairs: clean and corrupted token sequences of equal length with the same teacher-forced answer.
        settings: ``batch_size``, ``target``, ``path``, ``path_steps``, ``norm``, ``stream`` and ``tolerance`` are used.
        steps, target, norm: these instead of the settings' ``path_steps``, ``target`` and ``norm``; ``log-prob`` is
            ``logprob``.
        direction: the one that is wanted, or ``None`` for both, which come from the same two runs. The other is not
            checked, its scores are zero and its gap is NaN.
        name: name of the set, kept in the result and in errors.
        neurons_only: leave the edges out, which is cheaper still; their scores are zero and the gaps NaN.
        on_batch: called with (pairs done, pairs in all).

    Raises:
        ClueError: a setting is unknown or out of range.
        RecordError: a pair is misaligned or does not fit the model (:meth:`clue.data.pairs.Pairs.check`).
        AttributionError: no pair changes the model's answer, the gradient vanishes at one end of the path, a score is not
            finite, memory does not even suffice for one pair, or the conservation gap exceeds the tolerance.
    """
    given: dict[str, Any] = {"path_steps": steps, "target": "logprob" if target == "log-prob" else target, "norm": norm}
    settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
    check(settings, LocalizeSettings)
    try:
        wanted = _SIDES if direction is None else (_SIDES[list(Direction).index(Direction(direction))],)
    except ValueError:
        raise ClueError(f"direction = {direction!r} is not one of {', '.join(map(str, (*Direction, None)))}") from None
    if len(pairs.clean) == 0:
        raise AttributionError(f"{name}: there are no pairs to attribute")
    pairs.check(body)
    rank, processes = place()
    graph = graph_of(body)
    sums = Sums(body, graph, settings.norm)
    work = _Work(body, graph, pairs, settings, name, neurons_only)
    done = 0
    failed: Exception | None = None
    with frozen(body.model):
        try:
            for batch in batches(pairs, settings.batch_size, unstretched(body.model))[rank::processes]:
                work.add(batch, sums)
                done += len(batch)
                if on_batch is not None:
                    on_batch(min(done * processes, len(pairs.clean)), len(pairs.clean))
        except Exception as error:
            if processes == 1:
                raise
            failed = error  # the others wait for this process' sums
    if processes > 1:
        if not everywhere(failed is None):
            raise failed or AttributionError(f"{name}: another of the processes failed; its own message says why")
        sums.all_reduce()
    if sums.informative == 0 and settings.target == "margin":  # which is zero then, whatever is patched
        raise AttributionError(f"{name}: none of the {len(pairs.clean)} corrupted prompts changes the model's answer, so"
                               " nothing can be attributed: the model does not know these records, or the corrupted"
                               " prompts ask for the same answer")
    scores = _scores(name, graph, sums)
    for one in set(_SIDES) - set(wanted):
        none: dict[str, Any] = {array: np.zeros_like(getattr(scores, array)) for array in one.arrays}
        scores = replace(scores, **{**none, one.gap: math.nan})
    if neurons_only:
        scores = replace(scores, gap_ns=math.nan, gap_dn=math.nan)
    half = next(body.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    tolerance = settings.tolerance or (5e-2 if half else 1e-3)
    for one in wanted:
        gap = getattr(scores, one.gap)
        if not neurons_only and not gap <= tolerance:  # also catches NaN
            raise AttributionError(f"{name}: the {one.name} scores break the conservation law by {gap:.1e} (tolerance"
                                   f" {tolerance:.0e}): the anatomy entry of {body.family} does not fit this model, or"
                                   " its dtype is too coarse")
        if not any(np.any(getattr(scores, array)) for array in one.arrays):
            raise AttributionError(f"{name}: the gradient at the {one.end} prompts is zero everywhere, so {one.name} says"
                                   " nothing: give other corrupted prompts, or more path_steps")
    return scores


class _Side(NamedTuple):
    """What :class:`Scores` holds of one direction, and at which prompts its gradient is taken."""

    name: str
    end: str
    arrays: tuple[str, str, str]
    gap: str


#: In the order of :class:`clue.types.Direction`.
_SIDES = (_Side("Ns", "clean", ("ns", "neuron_ns", "neuron_sq_ns"), "gap_ns"),
          _Side("Dn", "corrupted", ("dn", "neuron_dn", "neuron_sq_dn"), "gap_dn"))

#: How memory's end is told outside torch's own allocators: by the CPU's, by CUDA (our kernels), and by cuBLAS.
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class _Work:
    """Batches, one after the other, with what memory allows: too little of it makes the later ones smaller steps too."""

    def __init__(self, body: Anatomy, graph: Graph, pairs: Pairs, settings: LocalizeSettings, name: str,
                 neurons_only: bool) -> None:
        self.body, self.graph, self.pairs, self.settings, self.name = body, graph, pairs, settings, name
        self.neurons_only, self.most, self.tile_bytes = neurons_only, settings.batch_size, TILE_BYTES
        self.stream = settings.stream == "always"

    def add(self, batch: npt.NDArray[np.int64], sums: Sums) -> None:
        """Add the scores of a batch: all of it, or nothing and an error."""
        while True:
            try:
                parts = [self._run(batch[start:start + self.most]) for start in range(0, len(batch), self.most)]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in NO_MEMORY):
                    raise
                reason = str(error).splitlines()[0]
            else:
                for part in parts:
                    sums.merge(part)
                return
            self._give_way(reason)  # outside the handler, which holds on to the failed run's tensors

    def _give_way(self, reason: str) -> None:
        if self.tile_bytes > LEAST_TILE_BYTES:
            self.tile_bytes = max(LEAST_TILE_BYTES, self.tile_bytes // 4)
            what = f"tiles of {self.tile_bytes >> 20} MB"
        elif not self.stream and self.settings.stream != "never":
            self.stream = True
            what = "one layer at a time"
        elif self.most > 1:
            self.most = (self.most + 1) // 2
            what = f"{self.most} pairs at a time"
        else:
            raise AttributionError(f"{self.name}: memory does not suffice for a single pair ({reason}): shorten the prompts"
                                   " (max_length), or use a device with more memory")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"{self.name}: out of memory ({reason}); going on with {what}", stacklevel=4)

    def _run(self, chosen: npt.NDArray[np.int64]) -> Sums:
        body, settings = self.body, self.settings
        prompts = Prompts.of(self.pairs, chosen, next(body.model.parameters()).device, share=separable(body.model))
        mask, positions, contrast = prompts.attended, prompts.positions, torch.empty_like(prompts.answer)
        prefix = Prefix.of(body.model, prompts.prefix)

        def target(logits: Tensor, at: slice) -> Tensor:
            return prompts.values(settings.target, logits, contrast[:, at], at).sum()

        def named(logits: Tensor, at: slice) -> Tensor:
            contrast[:, at] = prompts.contrast(logits)  # the corrupted run names the contrast for all
            return target(logits, at)

        steps, chained = settings.path_steps, settings.path == "chained"
        tokens = prompts.clean.numel() * (steps // 2 if chained else 1)
        stream = self.stream or (settings.stream == "auto" and _too_large(body, tokens))
        run = partial(capture.run, body, positions=positions, stream=stream)
        if chained:
            def targets(logits: Tensor, at: slice) -> Tensor:
                *others, away = logits.chunk(steps)
                total = named(away, at)
                return total + sum(target(other, at) for other in others)

            ids = torch.cat([prompts.clean] * (steps - 1) + [prompts.corrupted])
            points = capture.parted(run(ids, mask.repeat(steps, 1), target=targets, prefix=prefix.repeated(steps),
                                        together=steps), steps)
        else:
            run = partial(run, attention_mask=mask, prefix=prefix)
            away = run(prompts.corrupted, target=named)
            points = [run(prompts.clean, target=target, against=away.written)]
            for step in range(1, steps - 1):
                between = torch.lerp(points[0].embed, away.embed, step / (steps - 1))
                points.append(run(prompts.clean, target=target, embed=between, against=[]))
            points.append(away)
        every, middle = range(len(points)), len(points) // 2
        ends = (every, every) if settings.path == "full" else (every[:middle], every[middle:])
        sums = Sums(body, self.graph, settings.norm, self.tile_bytes)
        sums.add(points, ends, prompts.live, 0 if self.neurons_only else GROUP if stream else body.n_layers)
        sums.pairs, sums.informative = len(chosen), int(prompts.informative(contrast).sum())
        return sums


def _too_large(body: Anatomy, tokens: int) -> bool:
    """Whether the activations of two whole runs would take more than half of the memory that is free."""
    first = next(body.model.parameters())
    layer = 16 * body.d_model + 4 * body.n_heads * body.d_head + 8 * body.d_mlp  # elements per token, roughly
    wanted = 2 * tokens * body.n_layers * layer * first.element_size()
    if first.is_cuda:
        device = first.device  # what torch holds and does not use is free too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return wanted > (torch.cuda.mem_get_info(device)[0] + idle) / 2
    free = _available()
    return free is not None and wanted > free / 2


def _available() -> int | None:
    """Bytes of main memory that a process can get, those that cached files take included; None where the platform does not
    say."""
    try:
        said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(said["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _scores(name: str, graph: Graph, sums: Sums) -> Scores:
    """Means per pair, with the sign of Dn turned (it patches clean into corrupted) and the books compared."""
    edges = [e.cpu().numpy() / sums.pairs for e in sums.edges]
    books = [b.cpu().numpy() / sums.pairs for b in sums.books]
    units = [np.stack([layer[i].cpu().numpy() for layer in sums.units]).astype(np.float64) / sums.pairs for i in range(4)]
    for array in (*edges, *units):
        if not np.all(np.isfinite(array)):
            raise AttributionError(f"{name}: a score is not finite: the model's activations overflow in its dtype")
    gaps = [float(np.linalg.norm(e.sum(0) - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))
            for e, b in zip(edges, books, strict=True)]
    return Scores(name=name, graph=graph, ns=edges[0], dn=-edges[1], neuron_ns=units[0], neuron_dn=-units[1],
                  neuron_sq_ns=units[2], neuron_sq_dn=units[3], tokens=sums.tokens, pairs=sums.pairs,
                  informative=sums.informative, gap_ns=gaps[0], gap_dn=gaps[1])

"""Scores: what each baseline ranks weights, rows, units, nodes or modules by.

g_f and g_r are the gradients of the mean forget and retain record's loss (:mod:`.gradients`), W or theta the weights.

| name | ranks | by |
|---|---|---|
| random | weights | a uniform number |
| magnitude | weights | \\|theta\\| |
| wanda | weights of each output (row) | \\|W\\| times the input's root mean square, forget records (arXiv 2306.11695) |
| saliency | weights | \\|g_f\\| (SalUn, arXiv 2310.12508) |
| snip | weights | \\|g_f theta\\| (arXiv 1810.02340) |
| wagle | weights | \\|(theta - g_r / mu) g_f\\| with mu = 1e-6 (arXiv 2410.17509; its code's score and mu) |
| sure | outputs of a matrix (rows) | 2-norm of their g_f (arXiv 2410.16454) |
| depn | hidden units | activation times gradient (arXiv 2310.20138) |
| eap | heads (q, k, v, o) and hidden units | forget attribution, as in CLUE's circuits, without gates and solver |
| memflex | matrices | mean \\|g_f\\|, those with cos(g_f, g_r) < 0.92 and mean \\|g_f\\| > 6e-4 first (arXiv 2407.01920) |
| all | | every matrix, whatever the ratio |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..plan import Slice
from ..types import Role
from ..weights import flat_name
from .gradients import Inputs, input_norms, mean_gradient
from .selection import fill, highest, highest_of_rows, spread

if TYPE_CHECKING:
    from .candidates import Matrix

#: Curvature of the retain loss in WAGLE's score.
WAGLE_MU = 1e-6
#: MemFlex's thresholds: a module is ready to be edited below this cosine, and worth it above this mean gradient.
MEMFLEX_COSINE, MEMFLEX_GRADIENT = 0.92, 6e-4

#: The slices chosen, and what provenance should say of the choice beside the settings.
Choice = tuple[list[Slice], dict[str, Any]]


def random(inputs: Inputs, count: int) -> Choice:
    """Uniform numbers."""
    def draw(number: int, matrix: Matrix) -> Tensor:
        generator = torch.Generator().manual_seed(inputs.seed * 1009 + number)
        return torch.rand(matrix.shape, generator=generator)

    numbers = {matrix.name: i for i, matrix in enumerate(inputs.matrices)}
    return _weights(inputs, count, lambda matrix: draw(numbers[matrix.name], matrix)), {}


def magnitude(inputs: Inputs, count: int) -> Choice:
    """Size of the weights."""
    return _weights(inputs, count, lambda matrix: matrix.weight.float().abs()), {}


def saliency(inputs: Inputs, count: int) -> Choice:
    """Size of the forget gradient."""
    forget = mean_gradient(inputs, inputs.forget)
    return _weights(inputs, count, lambda matrix: forget[matrix.name].abs()), {}


def snip(inputs: Inputs, count: int) -> Choice:
    """Forget gradient times weight."""
    forget = mean_gradient(inputs, inputs.forget)
    return _weights(inputs, count, lambda matrix: (forget[matrix.name] * matrix.weight.float()).abs()), {}


def wagle(inputs: Inputs, count: int) -> Choice:
    """The forget gradient, times the weight less its retain gradient over a curvature."""
    forget, retain = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))

    def score(matrix: Matrix) -> Tensor:
        return ((matrix.weight.float() - retain[matrix.name] / WAGLE_MU) * forget[matrix.name]).abs()

    return _weights(inputs, count, score), {"mu": WAGLE_MU}


def wanda(inputs: Inputs, count: int) -> Choice:
    """Weight times input, compared within each row, so every row of every matrix gives the same share."""
    norms = input_norms(inputs, inputs.forget)
    slices = []
    shares = spread(count, [matrix.size for matrix in inputs.matrices])
    for matrix, share in zip(inputs.matrices, shares, strict=True):
        weight = matrix.weight.float().abs()
        score = (weight.T if matrix.transposed else weight) * norms[matrix.name]
        chosen = highest_of_rows(score, share)
        if matrix.transposed:
            row, column = np.divmod(chosen, score.shape[1])
            chosen = np.sort(column * score.shape[0] + row)
        slices += _single(matrix, chosen)
    return slices, {}


def sure(inputs: Inputs, count: int) -> Choice:
    """Norm of the forget gradient of whole rows."""
    forget = mean_gradient(inputs, inputs.forget)
    norms = [torch.linalg.vector_norm(forget[m.name], dim=1 - m.axis, dtype=torch.float64) for m in inputs.matrices]
    sizes = [np.full(len(n), m.shape[1 - m.axis]) for n, m in zip(norms, inputs.matrices, strict=True)]
    starts = np.cumsum([0, *(len(n) for n in norms)])
    chosen = fill(torch.cat([n.cpu() for n in norms]).numpy(), np.concatenate(sizes), count)
    slices = []
    for matrix, start, end in zip(inputs.matrices, starts, starts[1:], strict=False):
        own = chosen[(chosen >= start) & (chosen < end)] - start
        if len(own):
            slices.append(Slice(matrix.name, matrix.axis, Role.CONFLICT, own))
    return slices, {}


def memflex(inputs: Inputs, count: int) -> Choice:
    """Whole matrices whose forget gradient is large and points elsewhere than their retain gradient."""
    forget, retain = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))
    cosine, size = [], []
    for matrix in inputs.matrices:
        f, r = forget[matrix.name].flatten().double(), retain[matrix.name].flatten().double()
        cosine.append(float(f @ r / (f.norm() * r.norm()).clamp_min(1e-300)))
        size.append(float(f.abs().mean()))
    ready = (np.array(cosine) < MEMFLEX_COSINE) & (np.array(size) > MEMFLEX_GRADIENT)
    order = np.array(size) + np.where(ready, max(size), 0.0)  # above every one that is not ready
    chosen = fill(order, np.array([matrix.size for matrix in inputs.matrices]), count)
    matrices = [inputs.matrices[i] for i in chosen]
    return [_whole(matrix) for matrix in matrices], {
        "cosine": MEMFLEX_COSINE, "gradient": MEMFLEX_GRADIENT, "ready": int(ready.sum()),
        "ready_chosen": int(ready[chosen].sum())}


def everything(inputs: Inputs, count: int) -> Choice:
    """Every matrix."""
    return [_whole(matrix) for matrix in inputs.matrices], {}


#: Baselines over matrices; those over the nodes of a graph are in :mod:`.localization`.
OF_MATRICES: Mapping[str, Callable[[Inputs, int], Choice]] = {
    "random": random, "magnitude": magnitude, "wanda": wanda, "saliency": saliency, "snip": snip, "wagle": wagle,
    "sure": sure, "memflex": memflex, "all": everything,
}


def _weights(inputs: Inputs, count: int, score: Callable[[Matrix], Tensor]) -> list[Slice]:
    parts = {matrix.name: lambda m=matrix: score(m) for matrix in inputs.matrices}  # type: ignore[misc]
    chosen = highest(parts, count)
    return [s for matrix in inputs.matrices for s in _single(matrix, chosen[matrix.name])]


def _single(matrix: Matrix, index: npt.NDArray[np.int64]) -> list[Slice]:
    """Single weights of a matrix, or nothing where none is chosen."""
    return [Slice(flat_name(matrix.name), 0, Role.CONFLICT, index)] if len(index) else []


def _whole(matrix: Matrix) -> Slice:
    return Slice(matrix.name, matrix.axis, Role.CONFLICT, np.arange(matrix.shape[matrix.axis], dtype=np.int64))

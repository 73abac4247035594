"""Curvature factors of one side of a linear layer, streamed over tokens, and their damped inverses.

F = sum of v v^T over tokens is held as it is up to :data:`EXACT_WIDTH` channels. Wider ones, such as the inputs of an 8B
model's layers, are sketched: one product with a random matrix per batch, from which the largest eigenvalues and their vectors
follow at the end (fixed-rank Nystrom approximation, arXiv 1706.05736, algorithm 3). A factor of 4096 channels takes 8.5 MB
rather than 67, its inverse as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ClueError, ModelError
from ..processes import place

#: Factors of more channels than this are sketched.
EXACT_WIDTH = 2048
#: So many eigenvectors of a sketched factor are kept.
RANK = 512
_MORE = 8  # columns of the sketch beyond the rank: the smallest eigenvalues kept are rough without them
_SEED = 0x5EED


class Inverse(Protocol):
    """(F / (damping mean diagonal of F) + I)^-1, symmetric."""

    def apply(self, step: Tensor, *, left: bool) -> Tensor:
        """It times a matrix, or with ``left`` false the matrix times it; in its own dtype, on the matrix' device."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""


@dataclass(frozen=True)
class DenseInverse:
    """The inverse itself, [width, width]."""

    matrix: Tensor

    def apply(self, step: Tensor, *, left: bool) -> Tensor:
        matrix = self.matrix.to(step.device)
        step = step.to(matrix.dtype)
        return matrix @ step if left else step @ matrix

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)


@dataclass(frozen=True)
class LowRankInverse:
    """I - U diag(shrink) U^T: U [width, rank] are eigenvectors of F, and shrink [rank] is l / (l + damping mean diagonal).

    What F has beyond its rank counts as nothing. Spread evenly over the other directions, as its trace would allow, it keeps
    less (docs/findings.md, 4): directions that retention hardly uses are those that forgetting is to take.
    """

    vectors: Tensor
    shrink: Tensor

    def apply(self, step: Tensor, *, left: bool) -> Tensor:
        vectors, shrink = self.vectors.to(step.device), self.shrink.to(step.device)
        step = step.to(vectors.dtype)
        if left:
            return step - vectors @ (shrink[:, None] * (vectors.T @ step))
        return step - (step @ vectors * shrink) @ vectors.T

    def tensors(self) -> tuple[Tensor, ...]:
        return self.vectors, self.shrink


class Factor:
    """A running sum of outer products over some channels (all of them when ``index`` is None)."""

    def __init__(self, index: Tensor | None, exact_width: int = EXACT_WIDTH, rank: int = RANK) -> None:
        if exact_width < 0 or rank < 1:
            raise ClueError(f"exact_width = {exact_width} must not be negative, and rank = {rank} must be at least 1")
        self.index = index
        self.width = 0  # known once something was added
        self._exact_width, self._rank = exact_width, rank
        self._total: Tensor | None = None  # F, or F times the random matrix
        self._random: Tensor | None = None
        self._trace: Tensor | None = None  # of F, beside a sketch
        self._inverse: tuple[Inverse | None] | None = None

    @property
    def met(self) -> bool:
        """Whether anything was added."""
        return self._total is not None or self._inverse is not None

    def add(self, vectors: Tensor) -> None:
        """Add every row of [tokens, channels]."""
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        if self.index is not None:
            vectors = vectors.index_select(1, self.index)
        self.width = vectors.shape[1]
        if self.width <= self._exact_width:
            product = vectors.T @ vectors
        else:
            if self._random is None:
                self._random = _orthonormal(self.width, self._rank + _MORE, vectors.dtype, vectors.device)
                self._trace = torch.zeros((), dtype=torch.float64, device=vectors.device)
            product = vectors.T @ (vectors @ self._random)
            assert self._trace is not None
            self._trace += vectors.square().sum(dtype=torch.float64)
        self._total = product if self._total is None else self._total.add_(product)

    def add_up(self) -> None:
        """Make it the sum over the processes of torch.distributed, all of which must ask, in the same order."""
        if place()[1] > 1 and self._total is not None:
            torch.distributed.all_reduce(self._total)
            if self._trace is not None:
                torch.distributed.all_reduce(self._trace)

    def inverse(self, damping: float) -> Inverse | None:
        """(F / damping + I)^-1 with F divided by its mean diagonal; None, which means I, when F is zero.

        Ends the sum, whose memory is given back; asked again it gives the same inverse. All processes get the first one's.

        Raises:
            ModelError: the sum is not finite.
        """
        if self._inverse is None:
            total, self._total = self._total, None
            random, self._random = self._random, None
            if total is not None and not bool(torch.isfinite(total).all()):
                raise ModelError("the retain metric is not finite: the model gives NaN or infinite activations or gradients on"
                                 " the retain records; look at its outputs, load it in float32 or bfloat16, or unlearn with"
                                 " metric = false")
            if total is None:
                found: Inverse | None = None
            elif random is None:
                found = _dense(total, damping)
            else:
                assert self._trace is not None
                found = _low_rank(total, random, float(self._trace) / self.width * damping, self._rank)
            if found is not None and place()[1] > 1:
                for tensor in found.tensors():
                    torch.distributed.broadcast(tensor, 0)
            self._inverse = (found,)
        return self._inverse[0]


@lru_cache(maxsize=4)  # factors of one width share it
def _orthonormal(width: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[width, columns or width, if that is less], the same ones always: orthonormal, since that loses the fewest digits."""
    generator = torch.Generator().manual_seed(_SEED)
    found = torch.linalg.qr(torch.randn(width, columns, generator=generator, dtype=torch.float64)).Q
    return found.to(device, dtype)


def _dense(total: Tensor, damping: float) -> Inverse | None:
    scale = total.diagonal().mean().double()
    if not scale > 0:
        return None
    matrix = total.double() / (scale * damping)  # in float64: eigenvalues reach from 1 to size / damping
    matrix.diagonal().add_(1.0)
    return DenseInverse(torch.cholesky_inverse(torch.linalg.cholesky(matrix)).to(total.dtype).contiguous())


def _low_rank(total: Tensor, random: Tensor, damping: float, rank: int) -> Inverse | None:
    """From the sketch F Omega; ``damping`` is absolute."""
    if not damping > 0:
        return None
    dtype, sketch, random = total.dtype, total.double(), random.double()
    # A shift as large as the sketch's own rounding keeps the small matrix positive; it is taken off the eigenvalues again.
    shift = torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(sketch)) * len(sketch) ** 0.5
    sketch = sketch + shift * random
    small = random.T @ sketch
    lower, failed = torch.linalg.cholesky_ex((small + small.T) / 2)
    if int(failed):
        values, basis = torch.linalg.eigh((small + small.T) / 2)
        half = sketch @ (basis * values.clamp(min=shift).rsqrt())
    else:
        half = torch.linalg.solve_triangular(lower, sketch.T, upper=False).T
    vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
    values = (roots.square() - shift).clamp(min=0)[:rank]
    return LowRankInverse(vectors[:, :rank].to(dtype).contiguous(), (values / (values + damping)).to(dtype))

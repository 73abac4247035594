"""Selection: the k highest of very many scores, exactly k, without sorting them or holding them all.

A float32 number's bits, read as an integer, are in the order of the numbers once those of negative numbers are turned
around. So two histograms of 2^16 bins find the k-th highest score: one of the upper halves of all scores, one of the
lower halves of those in the bin where the k-th lies. A third pass takes what is above it, and of those equal to it the
first. Scores are asked for one weight matrix at a time, three times; beyond these memory is the bins, whatever the size of
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ClueError

_BINS = 1 << 16
#: Scores whose bins are computed at once.
_CHUNK = 1 << 20


def highest(scores: Mapping[str, Callable[[], Tensor]], count: int) -> dict[str, npt.NDArray[np.int64]]:
    """The ``count`` highest scores over all parts; of equal scores those of the first part, and there the first, win.

    Args:
        scores: by name of the part, what computes its scores, a tensor that is read as float32 in the order of its
            elements. It is called three times and must give the same each time.
        count: how many, from 0 to the number of all scores.

    Returns:
        per part the flat indices of those chosen, int64, sorted.

    Raises:
        ClueError: a score is not a number, or there are fewer than ``count``.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for name, part in scores.items():
        for keys in _keys(part(), name):
            upper += torch.bincount((keys >> 16) + _BINS // 2, minlength=_BINS).cpu()
    total = int(upper.sum())
    if not 0 <= count <= total:
        raise ClueError(f"{count} of {total} weights cannot be chosen")
    if count == 0:
        return {name: np.zeros(0, dtype=np.int64) for name in scores}
    top, wanted = _crossing(upper, count)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for name, part in scores.items():
        for keys in _keys(part(), name):
            inside = keys[(keys >> 16) + _BINS // 2 == top]
            lower += torch.bincount(inside & (_BINS - 1), minlength=_BINS).cpu()
    bottom, ties = _crossing(lower, wanted)
    threshold = ((top - _BINS // 2) << 16) | bottom
    chosen = {}
    for name, part in scores.items():
        found, start = [], 0
        for keys in _keys(part(), name):
            take = keys > threshold
            equal = (keys == threshold).nonzero()[:ties, 0]
            take[equal] = True
            ties -= len(equal)
            found.append(take.nonzero()[:, 0].cpu() + start)
            start += len(keys)
        chosen[name] = torch.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)
    return chosen


def highest_of_rows(scores: Tensor, count: int) -> npt.NDArray[np.int64]:
    """The highest scores of every row, ``count`` of them over all rows and equally many from each, but for one.

    Args:
        scores: [rows, columns]; of equal scores the first wins.

    Returns:
        flat indices, int64 [count], sorted.
    """
    rows, columns = scores.shape
    shares = spread(count, [columns] * rows)
    order = scores.float().sort(dim=1, descending=True, stable=True).indices.cpu().numpy()
    taken = [order[row, :share] + row * columns for row, share in enumerate(shares)]
    chosen: npt.NDArray[np.int64] = np.sort(np.concatenate(taken))
    return chosen


def spread(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` shared out in proportion to ``sizes``, in whole numbers that add up to it exactly."""
    total = sum(sizes)
    bounds = [count * int(end) // total for end in np.cumsum([0, *sizes])]
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def fill(scores: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Units (rows, neurons, modules), highest score first, for as long as one still fits into ``count`` weights.

    A unit that does not fit is passed over, so the weights chosen fall short of ``count`` by less than the smallest unit
    left. Of equal scores the first wins.

    Returns:
        numbers of the units chosen, int64, sorted.
    """
    if not np.isfinite(scores).all():
        raise ClueError("a unit's score is not a number: the model's activations or gradients overflow in its dtype")
    chosen, left = [], count
    smallest = int(sizes.min()) if len(sizes) else 0
    for unit in np.argsort(-scores, kind="stable"):
        if left < smallest:
            break
        if sizes[unit] <= left:
            chosen.append(unit)
            left -= int(sizes[unit])
    return np.sort(np.array(chosen, dtype=np.int64))


def _keys(scores: Tensor, part: str) -> Iterator[Tensor]:
    """The scores as int32 in the order of the numbers, some at a time; zeros of either sign are equal."""
    for chunk in scores.detach().reshape(-1).split(_CHUNK):
        values = chunk.to(torch.float32, copy=True).add_(0.0)
        if bool(values.isnan().any()):
            raise ClueError(f"a score of {part} is not a number: the model's activations or gradients overflow in its"
                            " dtype")
        bits = values.view(torch.int32)
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _crossing(histogram: Tensor, count: int) -> tuple[int, int]:
    """The highest bin at or above which ``count`` lie, and how many of these lie in it."""
    above = histogram.flip(0).cumsum(0)
    place = int((above >= count).nonzero()[0])
    number = len(histogram) - 1 - place
    return number, count - int(above[place] - histogram[number])

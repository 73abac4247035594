"""Selection against a full sort: the same choice whatever the numbers, their signs, ties and the parts they come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clue.baselines import selection
from clue.baselines.selection import fill, highest, highest_of_rows, spread
from clue.errors import ClueError

#: Few values, so that ties are the rule; close ones, zeros of both signs, denormals and infinities among them.
VALUES = (0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 1e-40, -1e-40, 3.4e38, float("inf"),
          -float("inf"), 2.0, -2.0)


def by_sorting(scores: list[torch.Tensor], count: int) -> list[list[int]]:
    """The highest by one stable sort of everything."""
    every = torch.cat([part.reshape(-1) for part in scores])
    chosen = set(torch.sort(every, descending=True, stable=True).indices[:count].tolist())
    found, start = [], 0
    for part in scores:
        found.append([i for i in range(part.numel()) if start + i in chosen])
        start += part.numel()
    return found


def selected(scores: list[torch.Tensor], count: int) -> list[list[int]]:
    return [index.tolist() for index in highest({str(i): lambda p=p: p for i, p in enumerate(scores)}, count).values()]


@given(st.data(), st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_as_a_full_sort(data: st.DataObject, sizes: list[int], chunk: int) -> None:
    values = st.one_of(st.sampled_from(VALUES), st.floats(width=32, allow_nan=False))
    scores = [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float32) for n in sizes]
    count = data.draw(st.integers(0, sum(sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", chunk)  # parts read some at a time choose the same
        assert selected(scores, count) == by_sorting(scores, count)


@pytest.mark.parametrize("make", [torch.rand, torch.randn])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.9, 1.0])
def test_as_a_full_sort_of_many(make: object, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [make(rows, 700, generator=generator) for rows in (300, 1, 900)]  # type: ignore[operator]
    count = round(share * 1201 * 700)
    found = selected(scores, count)
    assert sum(map(len, found)) == count
    assert found == by_sorting(scores, count)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ClueError, match=r"a score of up\.weight is not a number"):
        highest({"up.weight": lambda: torch.tensor([1.0, float("nan")])}, 1)
    with pytest.raises(ClueError, match="3 of 2 weights"):
        highest({"up.weight": lambda: torch.zeros(2)}, 3)


@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_shares_are_in_proportion_and_add_up(count: int, sizes: list[int]) -> None:
    sizes[0] += 1
    count = min(count, sum(sizes))
    shares = spread(count, sizes)
    assert sum(shares) == count
    assert all(abs(share - count * size / sum(sizes)) < 1 + 1e-6 and 0 <= share <= size
               for share, size in zip(shares, sizes, strict=True))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_rows_give_equally_many(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=rows * columns,
                                             max_size=rows * columns))).view(rows, columns)
    chosen = highest_of_rows(scores, count)
    taken = np.bincount(chosen // columns, minlength=rows)
    assert len(set(chosen.tolist())) == count and np.ptp(taken) <= 1
    for row, own in enumerate(taken):
        assert sorted((chosen[chosen // columns == row] % columns).tolist()) == sorted(
            by_sorting([scores[row]], int(own))[0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12), st.integers(0, 40))
def test_units_are_taken_while_they_fit(units: list[tuple[int, int]], count: int) -> None:
    scores, sizes = (np.array(column) for column in zip(*units, strict=True))
    chosen = fill(scores.astype(np.float64), sizes, count).tolist()
    expected, left = [], count
    for unit in sorted(range(len(units)), key=lambda u: -scores[u]):
        if sizes[unit] <= left:
            expected.append(unit)
            left -= sizes[unit]
    assert chosen == sorted(expected)

"""The native core with whatever arrays Python can hand it: an answer that holds, or an error that names the argument.

Run under the sanitizers, where a read beside an array is an error even if nothing comes of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue import _core

INT32, INT64 = 2**31 - 1, 2**63 - 1
IDS = st.integers(-2, 6) | st.sampled_from([-INT32 - 1, -INT32, INT32, 1 << 29])
WEIGHTS = st.integers(0, 3) | st.sampled_from([-1, 1 << 40, 1 << 60, INT64 // 4, INT64, -INT64 - 1])


def arrays(dtype: Any, elements: st.SearchStrategy[int], most: int = 7) -> st.SearchStrategy[np.ndarray]:
    return st.lists(elements, max_size=most).map(lambda values: np.array(values, dtype))


ODD = st.sampled_from([
    None, 3, [1, 2], "x", b"xx", np.zeros(3), np.zeros((2, 2), np.int32), np.zeros((1, 4), np.uint8), np.int32(1),
    np.zeros(8, np.int32)[::2], np.zeros(5, np.int64)[::-1], np.zeros(4, ">i4"), np.zeros(4, bool), np.zeros(4, object),
    np.zeros(4, np.uint32), np.zeros(4, np.float16), np.zeros(4, "M8[s]"), np.zeros(0, np.int32), np.array(1, np.uint8),
])
EDGES = st.lists(st.tuples(IDS, IDS, st.integers(0, 3) | st.just(255)), max_size=8).map(
    lambda edges: tuple(np.array([edge[i] for edge in edges], dtype)
                        for i, dtype in enumerate((np.int32, np.int32, np.uint8))))
UNEVEN = st.tuples(arrays(np.int32, IDS), arrays(np.int32, IDS), arrays(np.uint8, st.integers(0, 255)))
CIRCUITS = st.lists(EDGES | UNEVEN | st.tuples(ODD, ODD, ODD) | ODD, max_size=3)


@given(n=st.integers(-1, 7) | st.sampled_from([-INT32 - 1, INT32, 1 << 29]),
       editable=arrays(np.uint8, st.integers(0, 255)), forget=CIRCUITS, retain=CIRCUITS,
       weights=arrays(np.int64, WEIGHTS) | ODD, risk=arrays(np.int64, WEIGHTS) | ODD,
       reach=arrays(np.int64, WEIGHTS) | ODD, semantics=st.sampled_from(["support", "authors", "", "x" * 1000]),
       limit=st.sampled_from([0.0, 1e-9, 1.0, -1.0, float("nan"), float("inf"), 1e300]))
@settings(max_examples=400)
def test_anything_is_refused_or_answered(n: int, semantics: str, limit: float, **arguments: Any) -> None:
    with suppress(TypeError, ValueError):
        _core.assign(n_nodes=n, semantics=semantics, time_limit=limit, **arguments)


@given(data=st.data(), n=st.integers(2, 7))
@settings(max_examples=300)
def test_good_questions_with_one_hostile_part(data: st.DataObject, n: int) -> None:
    """Whatever gets past the checks is used whole: sizes fit, and only values may be extreme."""
    most = INT64 // (4 * n)

    def circuit(side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inner = st.tuples(st.integers(0, n - 2), st.integers(1, n - 1), st.integers(0, 2)).filter(lambda e: e[0] < e[1])
        edges = [*data.draw(st.lists(inner, max_size=8), label=side), (n - 2, n - 1, data.draw(st.integers(0, 2)))]
        src, dst, gate = zip(*edges, strict=True)
        return np.array(src, np.int32), np.array(dst, np.int32), np.array(gate, np.uint8)

    def numbers(name: str) -> np.ndarray:
        values = st.integers(0, 5) | st.sampled_from([most, most - 1, most // 2])
        return np.array(data.draw(st.lists(values, min_size=n, max_size=n), label=name), np.int64)

    arguments: dict[str, Any] = {
        "n_nodes": n, "editable": np.array(data.draw(st.lists(st.integers(0, 255), min_size=n, max_size=n)), np.uint8),
        "forget": [circuit("forget") for _ in range(data.draw(st.integers(1, 2)))], "retain": [circuit("retain")],
        "weights": numbers("weights"), "risk": numbers("risk"), "reach": numbers("reach"),
        "semantics": data.draw(st.sampled_from(["support", "authors"])),
        "time_limit": data.draw(st.sampled_from([0, 1e-6]))}
    found = _core.assign(**arguments)
    assert all(len(found[name]) == n for name in ("retain_works", "forget_works", "conflict", "forced"))
    assert found["lower_bound"] <= found["cost"] == int(arguments["weights"][found["conflict"] == 1].sum())
    name = data.draw(st.sampled_from(["editable", "weights", "risk", "reach"]))
    with pytest.raises((TypeError, ValueError), match=name):
        _core.assign(**arguments | {name: data.draw(st.sampled_from([
            arguments[name][:-1], np.append(arguments[name], 0).astype(arguments[name].dtype),
            arguments[name].astype(np.float32), arguments[name][None], arguments[name].tolist()]))})

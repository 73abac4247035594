"""Values with arrays compare by what they hold, and show what they are in a line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clue.plan import Plan, Slice
from clue.types import Role
from clue.values import ByValue


@dataclass(frozen=True, eq=False)
class Held(ByValue):
    array: Any
    more: Any = None


@dataclass(frozen=True, eq=False)
class Other(ByValue):
    array: Any
    more: Any = None


@pytest.mark.parametrize(("a", "b", "equal"), [
    (np.arange(3), np.arange(3), True), (np.arange(3), np.arange(4), False), (np.arange(3), np.array([0, 1, 3]), False),
    (np.arange(3), np.arange(3.0), False), (np.zeros((2, 3)), np.zeros((3, 2)), False), (np.zeros(1), 0.0, False),
    (np.array([1.0, math.nan]), np.array([1.0, math.nan]), True), (math.nan, math.nan, True), (math.nan, 1.0, False),
    (np.array(["a"]), np.array(["a"]), True), ([np.zeros(2)], [np.zeros(2)], True), ([np.zeros(2)], (np.zeros(2),), False),
    ({"x": np.ones(1)}, {"x": np.ones(1)}, True), ({"x": 1}, {"y": 1}, False), ({"x": (1, 2)}, {"x": (1, 3)}, False),
    ("a", None, False),
])
def test_equal_is_what_holds_the_same(a: Any, b: Any, equal: bool) -> None:
    assert (Held(a) == Held(b)) is equal and (Held(0, a) == Held(0, b)) is equal
    assert (Held(a) != Held(b)) is not equal
    assert Held(a) != Other(a) and Held(a) != 3
    assert Held(a) in [Held("other"), Held(a)]
    with pytest.raises(TypeError, match="unhashable"):
        hash(Held(a))


def test_a_plan_saves_reloads_and_compares(tmp_path: Path) -> None:
    plan = Plan(tuple(f"n{i}" for i in range(5000)), np.zeros(5000, dtype=np.uint8),
                (Slice("w", 0, Role.FORGET, np.arange(4)),), {"w": (8, 3)}, {"seed": 1})
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again == plan and again != replace(plan, slices=(replace(plan.slices[0], index=np.arange(3)),))
    assert again != replace(plan, provenance={"seed": 2})
    assert repr(plan).startswith("<Plan: 12 weights of 1 parameters; 5000 nodes, ") and len(repr(plan)) < 200

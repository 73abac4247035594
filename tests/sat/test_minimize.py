"""Weighted minima against trying every assignment, and their bounds under limits."""

from __future__ import annotations

import _thread
import itertools
import threading

import numpy as np
import pytest

from clue.sat import WCNF, Minimum, minimize

from ..oracles.sat import cost, holds, least_cost


def random_wcnf(rng: np.random.Generator) -> tuple[int, list[list[int]], list[list[int]], list[int]]:
    n = int(rng.integers(1, 8))

    def clauses(most: int, shortest: int) -> list[list[int]]:
        return [(rng.integers(1, n + 1, rng.integers(shortest, 4)) * rng.choice([-1, 1])).tolist() if rng.random() < 0.2
                else [int(v * rng.choice([-1, 1])) for v in rng.integers(1, n + 1, rng.integers(shortest, 4))]
                for _ in range(rng.integers(0, most))]

    soft = clauses(14, 0 if rng.random() < 0.2 else 1)
    largest = int(rng.choice([1, 3, 1000, 2**50]))
    weights = rng.integers(0 if rng.random() < 0.3 else 1, largest + 1, len(soft)).tolist()
    return n, clauses(12, 1), soft, weights


def check(found: Minimum, n: int, hard: list[list[int]], soft: list[list[int]], weights: list[int]) -> None:
    """The model is one, and costs what is said."""
    assert found.model is not None and found.model.shape == (n + 1,) and found.model.dtype == np.int8
    model = [bool(value) for value in found.model]
    assert all(holds(clause, model) for clause in hard)
    assert found.cost == cost(model, soft, weights)
    assert 0 <= found.lower_bound <= found.cost


@pytest.mark.parametrize("block", range(10))
def test_equals_exhaustive_search(block: int) -> None:
    rng = np.random.default_rng(block)
    unsatisfiable = 0
    for _ in range(60):
        n, hard, soft, weights = random_wcnf(rng)
        found = minimize(WCNF.from_lists(hard, soft, weights, n_variables=n))
        least = least_cost(n, hard, soft, weights)
        if least is None:
            unsatisfiable += 1
            assert found.satisfiable is False and found.model is None and found.cost is None and not found.optimal
            continue
        assert found.satisfiable and found.optimal and found.cost == found.lower_bound == least
        check(found, n, hard, soft, weights)
    assert 0 < unsatisfiable < 40  # both kinds were there


def hitting_sets(sets: int = 300, leaves: int = 120) -> tuple[int, list[list[int]], list[list[int]], list[int]]:
    """Choose few variables so that each of many sets has one: far from solved in a second."""
    rng = np.random.default_rng(0)
    hard = [(1 + rng.choice(leaves, 8, replace=False)).tolist() for _ in range(sets)]
    return leaves, hard, [[-v] for v in range(1, leaves + 1)], [1] * leaves


def test_time_limit_returns_the_best_so_far_and_a_bound() -> None:
    n, hard, soft, weights = hitting_sets()
    found = minimize(WCNF.from_lists(hard, soft, weights), time_limit=0.3)
    check(found, n, hard, soft, weights)
    assert not found.optimal and 0 < found.lower_bound < found.cost <= n


def test_interrupt_raises_or_returns_the_best_so_far() -> None:
    n, hard, soft, weights = hitting_sets()
    formula = WCNF.from_lists(hard, soft, weights)
    for keep in (False, True):
        timer = threading.Timer(0.5, _thread.interrupt_main)
        timer.start()
        if keep:
            check(minimize(formula, time_limit=300, keep_on_interrupt=True), n, hard, soft, weights)
        else:
            with pytest.raises(KeyboardInterrupt):
                minimize(formula, time_limit=300)
        timer.join()
    assert minimize(WCNF.from_lists(hard[:3], soft[:5])).optimal


def test_bounds_are_told_as_they_improve() -> None:
    n, hard, soft, weights = hitting_sets(sets=30, leaves=30)
    formula = WCNF.from_lists([*hard, [n + 1]], [*soft, [-n - 1]], [*weights, 5])
    told: list[tuple[int, int]] = []
    found = minimize(formula, on_bounds=lambda lower, cost: told.append((lower, cost)))
    assert found.optimal and told[-1] == (found.cost, found.cost) and len(told) > 2
    for before, after in itertools.pairwise(told):
        assert before[0] <= after[0] and before[1] >= after[1] and before != after
    assert all(lower <= found.lower_bound <= cost for lower, cost in told)

    def fail(lower: int, cost: int) -> None:
        raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough") as raised:
        minimize(formula, on_bounds=fail)
    assert raised.traceback[-1].name == "fail"

    def stop(lower: int, cost: int) -> None:
        if lower > 6:
            raise KeyboardInterrupt

    kept = minimize(formula, on_bounds=stop, keep_on_interrupt=True)
    check(kept, n + 1, [*hard, [n + 1]], [*soft, [-n - 1]], [*weights, 5])
    assert not kept.optimal and kept.lower_bound == 7
    with pytest.raises(KeyboardInterrupt):
        minimize(formula, on_bounds=stop)


def test_limit_before_the_first_model() -> None:
    rng = np.random.default_rng(3)
    n = 300  # random 3-SAT at the threshold: hard in itself
    hard = [(rng.choice(n, 3, replace=False) + 1) * rng.choice([-1, 1], 3) for _ in range(int(4.26 * n))]
    found = minimize(WCNF.from_lists(hard, [[1]]), time_limit=1e-6)
    assert found.satisfiable is None and found.model is None and found.cost is None and found.lower_bound == 0


def test_unused_and_huge_variables() -> None:
    assert minimize(WCNF(5, *[np.zeros(0, np.int32)] * 2, np.zeros(0, np.int64))).cost == 0
    found = minimize(WCNF.from_lists([[1]], [[-3]], n_variables=9))
    assert found.model is not None and len(found.model) == 10
    with pytest.raises(MemoryError, match="2147483647|2\\^30"):
        minimize(WCNF.from_lists([[2**31 - 1]], []))


def test_equals_another_solver_on_larger_formulas() -> None:
    pytest.importorskip("pysat")
    from pysat.examples.rc2 import RC2
    from pysat.formula import WCNF as Peer

    for seed in range(5):
        rng = np.random.default_rng(seed)
        n = 80
        hard = [[int(v) for v in rng.choice(n, 3, replace=False) + 1] for _ in range(100)]
        soft = [[-int(v) for v in rng.choice(n, rng.integers(1, 3), replace=False) + 1] for _ in range(150)]
        weights = rng.integers(1, 20, len(soft)).tolist()
        peer = Peer()
        peer.extend(hard)
        for clause, weight in zip(soft, weights, strict=True):
            peer.append(clause, weight=weight)
        with RC2(peer) as solver:
            solver.compute()
            expected = solver.cost
        found = minimize(WCNF.from_lists(hard, soft, weights))
        assert found.optimal and found.cost == expected

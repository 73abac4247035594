"""The solver against trying every assignment, in every state of its API."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.sat import CNF, Solver, options

from ..oracles.sat import holds, propagated, satisfiable

N = 6
LITERAL = st.integers(1, N).flatmap(lambda v: st.sampled_from([v, -v]))
CLAUSE = st.lists(LITERAL, min_size=1, max_size=4)
CLAUSES = st.lists(CLAUSE, max_size=24)


def random_clauses(seed: int, n: int, m: int, width: int = 3) -> np.ndarray:
    """m random clauses over n variables as a flat array."""
    rng = np.random.default_rng(seed)
    variables = np.argsort(rng.random((m, n)), axis=1)[:, :width] + 1 if n <= 50 else rng.integers(1, n + 1, (m, width))
    literals = variables * rng.choice([-1, 1], (m, width))
    return np.column_stack([literals, np.zeros(m, int)]).astype(np.int32).ravel()


def pigeons(holes: int) -> list[list[int]]:
    """One pigeon more than holes: unsatisfiable, and hard for resolution."""
    at = {(p, h): p * holes + h + 1 for p in range(holes + 1) for h in range(holes)}
    clauses = [[at[p, h] for h in range(holes)] for p in range(holes + 1)]
    return clauses + [[-at[p, h], -at[q, h]] for h in range(holes) for p in range(holes + 1) for q in range(p)]


def check(solver: Solver, clauses: list[list[int]], assumed: list[int], constraint: list[int] | None = None) -> None:
    """Solve and compare with the oracle: answer, model and core."""
    found = solver.solve(assumed)
    extra = [] if constraint is None else [constraint]
    units = [[literal] for literal in assumed]
    assert found is satisfiable(N, clauses + units + extra)
    if found:
        model = solver.model()
        assert model.dtype == np.int8 and len(model) == solver.n_variables + 1
        padded = [bool(value) for value in model] + [False] * (N + 1 - len(model))
        assert all(holds(clause, padded) for clause in clauses + units + extra)
        assert all(solver.value(literal) for literal in assumed)
        return
    core = solver.core().tolist()
    assert set(core) <= set(assumed) and len(set(core)) == len(core)
    needed = extra if solver.constraint_failed() else []
    assert not satisfiable(N, clauses + [[literal] for literal in core] + needed)


@given(st.lists(st.tuples(CLAUSES, st.lists(LITERAL, max_size=4), st.none() | st.lists(LITERAL, max_size=3)),
                min_size=1, max_size=4))
@settings(max_examples=300)
def test_incremental_calls_equal_the_oracle(rounds) -> None:
    solver, clauses = Solver(), []
    for new, assumed, constraint in rounds:
        solver.add(new)
        clauses += new
        if constraint is not None:
            solver.constrain(constraint)
        check(solver, clauses, assumed, constraint)
        for literal in range(1, solver.n_variables + 1):
            value = solver.fixed(literal)
            assert value is None or not satisfiable(N, [*clauses, [-literal if value else literal]])
    check(solver, clauses, [])  # the last constraint and the last assumptions are gone


@given(CLAUSES, CLAUSES, st.lists(LITERAL, max_size=3), st.booleans())
@settings(max_examples=200)
def test_simplify_keeps_the_answers(first, second, assumed, frozen) -> None:
    solver = Solver(first)
    if frozen:
        for variable in range(1, N + 1):
            solver.freeze(variable)
    answer = solver.simplify(2)
    assert answer is None or answer is satisfiable(N, first)
    solver.add(second)
    check(solver, first + second, assumed)
    if frozen:
        for variable in range(1, N + 1):
            solver.melt(-variable)
        check(solver, first + second, assumed)


@given(CLAUSES, st.lists(LITERAL, max_size=3), st.booleans())
@settings(max_examples=300)
def test_propagate_is_sound_always_and_complete_at_first(clauses, assumed, later) -> None:
    solver = Solver(clauses)
    if later:
        solver.solve()
    found = solver.propagate(assumed)
    expected = propagated(clauses, assumed)
    units = [[literal] for literal in assumed]
    if found is None:
        assert not satisfiable(N, clauses + units)
    else:
        for literal in found.tolist():
            assert not satisfiable(N, [*clauses, *units, [-literal]])
        if not later:
            assert expected is not None and expected <= set(found.tolist())
    with pytest.raises(RuntimeError):
        solver.model()
    check(solver, clauses, assumed)


@given(st.lists(st.booleans(), min_size=N, max_size=N), st.booleans())
def test_free_variables_take_their_phase(wanted, undone) -> None:
    solver = Solver([[v, -v] for v in range(1, N + 1)] + [[1, 2, 3, 4, 5, 6, 7], [-1, 7], [8, 9], [-8, -9]])
    phases = [v if value else -v for v, value in enumerate(wanted, 1)]
    for literal in phases:
        solver.phase(-literal)
        if undone:
            solver.unphase(literal)
        solver.phase(literal)
    solver.phase(7)
    assert solver.solve() is True
    assert [bool(value) for value in solver.model()[1:N + 1]] == wanted


def test_empty_formula_and_empty_clause() -> None:
    solver = Solver()
    assert solver.n_variables == 0
    assert solver.solve() is True and solver.model().tolist() == [0]
    solver.constrain([])
    assert solver.solve() is False and solver.core().tolist() == [] and solver.constraint_failed()
    solver.reserve(3)
    assert solver.solve([3, -2]) is True and solver.model().tolist()[2:] == [0, 1]
    assert solver.solve([1, -1]) is False and set(solver.core().tolist()) == {1, -1}
    solver.add([[]])
    assert solver.solve([1]) is False and solver.core().tolist() == []
    assert solver.simplify() is False


def test_every_way_to_give_clauses_is_the_same() -> None:
    lists = [[1, -2], [3], [], [2, 3, -4]]
    flat = np.array([1, -2, 0, 3, 0, 0, 2, 3, -4, 0], np.int32)
    literals, offsets = np.array([1, -2, 3, 2, 3, -4]), np.array([0, 2, 3, 3, 6])
    cnf = CNF.from_lists(lists)
    assert cnf.clauses.tolist() == flat.tolist() and cnf.lists() == lists and len(cnf) == 4 and cnf.n_variables == 4

    def added(*arguments) -> tuple[int, int, bool | None]:
        solver = Solver()
        solver.add(*arguments)
        return solver.n_variables, solver.statistics()["irredundant"], solver.solve()

    ways = [(lists,), (tuple(map(tuple, lists)),), (iter(map(iter, lists)),), (cnf,), (flat,), (flat.astype(np.int64),),
            (np.repeat(flat, 2)[::2],), (flat.astype(">i4"),), ([np.array(c, np.int64) for c in lists],),
            (literals, offsets), (literals.astype(np.int32), offsets.tolist())]
    assert {added(*way) for way in ways} == {(4, added(lists)[1], False)}
    one_by_one = Solver()
    for clause in lists[:2]:
        one_by_one.add_clause(clause)
    assert one_by_one.solve() is True


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda s: s.add([[1, 0, 2]]), ValueError, r"clauses\[0\]: expected literals, got 0"),
    (lambda s: s.add([[1], [2**31]]), ValueError, r"clauses\[1\]: expected literals of at most 2147483647"),
    (lambda s: s.add([[1], [-2**31]]), ValueError, r"clauses\[1\]: .* got -2147483648"),
    (lambda s: s.add([[1], [10**40]]), ValueError, r"clauses\[1\]: .* got 1000"),
    (lambda s: s.add([[1], 2]), TypeError, r"clauses\[1\]: expected integers, got 2"),
    (lambda s: s.add([[1.0]]), TypeError, r"clauses\[0\]: expected integers"),
    (lambda s: s.add(5), TypeError, "not iterable"),
    (lambda s: s.add(np.array([1, 2], np.int32)), ValueError, "clauses: expected a 0 after every clause"),
    (lambda s: s.add(np.array([-2**31, 0], np.int32)), ValueError, "clauses: .* got -2147483648"),
    (lambda s: s.add(np.array([2**40, 0])), ValueError, "clauses: .* got 1099511627776"),
    (lambda s: s.add(np.array([1.5, 0])), TypeError, "clauses: expected an array of integers, got float64"),
    (lambda s: s.add(np.zeros((2, 2), np.int32)), ValueError, "clauses: expected one dimension"),
    (lambda s: s.add([1, 2], [0, 3]), ValueError, "offsets: expected to rise from 0 to the number of literals, 2"),
    (lambda s: s.add([1, 2], [0, 2, 1, 2]), ValueError, "offsets"),
    (lambda s: s.add([1, 2], []), TypeError, "offsets"),
    (lambda s: s.add([1, 0], [0, 2]), ValueError, "clauses: expected literals without 0 beside offsets, got 0 at 1"),
    (lambda s: s.add_clause([0]), ValueError, "clause: expected literals, got 0"),
    (lambda s: s.constrain([0]), ValueError, "clause: expected literals, got 0"),
    (lambda s: s.solve([0]), ValueError, "assumptions: expected literals, got 0"),
    (lambda s: s.solve(["x"]), TypeError, "assumptions: expected integers"),
    (lambda s: s.solve(3), TypeError, "assumptions: expected integers, got 3"),
    (lambda s: s.solve(time_limit=0), ValueError, "time_limit: expected seconds > 0 or None, got 0"),
    (lambda s: s.solve(time_limit=float("nan")), ValueError, "time_limit"),
    (lambda s: s.solve(conflicts=-1), ValueError, "conflicts: expected at least 0"),
    (lambda s: s.solve(decisions=-5), ValueError, "decisions: expected at least 0"),
    (lambda s: s.simplify(-1), ValueError, "rounds: expected at least 0"),
    (lambda s: s.reserve(-1), ValueError, "variables: expected at least 0"),
    (lambda s: s.phase(0), ValueError, "literal: expected a literal, got 0"),
    (lambda s: s.fixed(0), ValueError, "literal: expected a literal, got 0"),
    (lambda s: s.fixed(-2**31), ValueError, "literal"),
    (lambda s: s.melt(1), RuntimeError, "variable 1 is not frozen"),
    (lambda s: s.close_proof(), RuntimeError, "no proof is being written"),
    (lambda s: s.proof("p"), RuntimeError, "a proof must be set before the first clause"),
    (lambda s: s.options.update(elim=0), RuntimeError, "options must be set before the first clause"),
    (lambda s: s.add([[2**31 - 1]]), MemoryError, "variable 2147483647 needs tables of about"),
    (lambda s: s.reserve(2**31 - 1), MemoryError, "variable 2147483647"),
    (lambda s: s.solve([2**31 - 1]), MemoryError, "variable 2147483647"),
    (lambda s: s.model(), RuntimeError, r"there is no model: the last solve\(\) must have returned True"),
    (lambda s: s.value(1), RuntimeError, "there is no model"),
    (lambda s: s.core(), RuntimeError, r"there is no core: the last solve\(\) must have returned False"),
    (lambda s: s.constraint_failed(), RuntimeError, "there is no core"),
])
def test_mistakes_are_named_and_change_nothing(call, error, text) -> None:
    solver = Solver([[1, 2]])
    with pytest.raises(error, match=text):
        call(solver)
    assert solver.n_variables == 2
    assert solver.solve([-1]) is True and solver.model().tolist() == [0, 0, 1]


def test_answers_belong_to_the_last_call() -> None:
    solver = Solver([[1, 2]])
    assert solver.solve() is True
    with pytest.raises(RuntimeError, match="no core"):
        solver.core()
    with pytest.raises(ValueError, match="expected a variable of the formula, 1..2, got 3"):
        solver.value(3)
    assert solver.solve([-1, -2]) is False
    with pytest.raises(RuntimeError, match="no model"):
        solver.model()
    solver.add_clause([1])
    with pytest.raises(RuntimeError, match="no core"):
        solver.core()
    assert solver.solve(np.array([-2])) is True
    solver.phase(1)
    assert solver.model().tolist() == [0, 1, 0]  # guidance leaves the model alone
    solver.reserve(5)
    with pytest.raises(RuntimeError, match="no model"):
        solver.model()


def test_options() -> None:
    table = options()
    assert table["quiet"].default == 1 and table["factor"].default == 0 and table["lucky"].default == 0
    assert table["elim"].use and table["elim"][2:4] == (0, 1)
    assert list(table) == sorted(table)
    solver = Solver(elim=0, seed=7)
    assert solver.options["elim"] == 0 and solver.options["seed"] == 7 and len(solver.options) == len(table)
    assert {name: solver.options[name] for name in table if name not in ("elim", "seed")} == {
        name: option.default for name, option in table.items() if name not in ("elim", "seed")}
    del solver.options["elim"]
    assert solver.options["elim"] == 1
    with pytest.raises(ValueError, match="option 'elim': expected 0..1, got 2"):
        Solver(elim=2)
    with pytest.raises(ValueError, match="option 'color' does not exist"):
        Solver(color=1)
    with pytest.raises(KeyError):
        solver.options["color"]
    assert "color" not in solver.options


def test_variables_that_the_solver_made_are_not_the_users() -> None:
    # All pairs of two sets of variables: a fresh one makes them shorter (bounded variable addition). The rest keeps
    # them from being eliminated first.
    rng, n = np.random.default_rng(0), 30
    clauses = [[i, n + j] for i in range(1, n + 1) for j in range(1, n + 1)]
    clauses += [[-v, int(a), -int(b)] for v in range(1, 2 * n + 1)
                for a, b in rng.integers(2 * n + 1, 3 * n + 1, (6, 2))]
    clauses += rng.integers(2 * n + 1, 3 * n + 1, (60, 3)).tolist()
    solver = Solver(clauses, factor=1)
    assert solver.simplify(5) is None and solver.n_variables == 3 * n
    with pytest.raises(ValueError, match="variable 91 belongs to the solver"):
        solver.add([[1], [91]])
    new = solver.n_variables + 1
    assert new >= 92
    for call in (solver.phase, solver.freeze, solver.fixed, solver.value, lambda literal: solver.solve([literal]),
                 lambda literal: solver.constrain([1, literal])):
        with pytest.raises(ValueError, match="variable 91 belongs to the solver"):
            call(-91)
    clauses.append([new, 1])
    solver.add(clauses[-1:])
    assert solver.solve([-1]) is True
    model = solver.model()
    assert len(model) == new + 1 and model[new] == 1
    assert all(holds(clause, model.astype(bool)) for clause in clauses)


def test_limits_return_none_and_the_solver_goes_on() -> None:
    solver = Solver(pigeons(9))
    assert solver.solve(conflicts=10) is None
    assert solver.solve(decisions=3) is None
    assert solver.solve(time_limit=0.01) is None
    with pytest.raises(RuntimeError, match="no model"):
        solver.model()
    before = solver.statistics()
    assert before["conflicts"] >= 10 and all(count >= 0 for count in before.values())
    assert solver.solve([1, 2]) is False  # pigeon 0 is in two holes: those clauses alone do not forbid it
    assert set(solver.core().tolist()) <= {1, 2}


def test_terminate_from_another_thread() -> None:
    solver = Solver(pigeons(13))
    assert solver.terminate() is False  # nothing runs: nothing happens
    answers = []
    thread = threading.Thread(target=lambda: answers.append(solver.solve()))
    thread.start()
    while thread.is_alive() and not solver.terminate():
        pass
    thread.join(60)
    assert answers == [None]
    assert solver.solve(conflicts=1) is None


def test_a_running_solver_is_left_alone() -> None:
    solver = Solver(pigeons(13))
    thread = threading.Thread(target=solver.solve)
    thread.start()
    refused = 0
    while refused == 0:
        try:
            solver.add_clause([1])
        except RuntimeError as error:
            assert "running in another thread" in str(error)
            refused += 1
    with pytest.raises(RuntimeError, match="running"):
        solver.solve()
    with pytest.raises(RuntimeError, match="running"):
        solver.statistics()
    while thread.is_alive():
        solver.terminate()
    assert solver.statistics()["clauses"] > 0


def test_limits_on_a_large_formula() -> None:
    # Solved in a thread of its own, which may be left behind when the limit strikes.
    solver = Solver(random_clauses(3, 60_000, 250_000))
    for _ in range(3):
        assert solver.solve(time_limit=0.05) is None
    with pytest.raises(RuntimeError, match="no model"):
        solver.model()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(solver.solve()))
    thread.start()
    while thread.is_alive() and not solver.terminate():
        pass
    thread.join(120)
    assert answers == [None]
    assert solver.solve([1, -1]) is False
    with pytest.raises(ValueError, match="assumptions: expected literals, got 0"):
        solver.solve([0])
    solver.add([[1], [-1]])
    assert solver.solve() is False and solver.core().tolist() == []
    late = Solver(random_clauses(4, 60_000, 250_000))
    assert late.solve(time_limit=0.05) is None
    del late  # while it may still be winding down


def test_many_clauses() -> None:
    flat = random_clauses(1, 20_000, 60_000)
    solver = Solver(flat)
    assert solver.solve() is True
    model = solver.model()
    rows = flat.reshape(-1, 4)[:, :3]
    assert np.all(np.any(model[np.abs(rows)] == (rows > 0), axis=1))

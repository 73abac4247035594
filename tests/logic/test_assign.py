"""Assignments against exhaustive search, against another MaxSAT solver, and under limits."""

from __future__ import annotations

import _thread
import itertools
import json
import threading
from collections.abc import Callable

import numpy as np
import pytest

from clue import _core
from clue.errors import CircuitError
from clue.logic import SCORE_STEPS, Assignment, assign, operate, pinned
from clue.types import Gate, Role

from ..oracles.logic import Edges, Nodes, best, best_of_all, circuit, forget_ok, groups, members, retain_ok

SEMANTICS = ["support", "authors"]


def nodes(n: int) -> Nodes:
    """All but embedding and output have weights of their own."""
    editable = np.ones(n, bool)
    editable[[0, -1]] = False
    return Nodes(n, editable)


def layered(rng: np.random.Generator, graph: Nodes, fan_in: float, mix: tuple[float, float, float]) -> Edges:
    """A random circuit: each chosen node takes inputs from lower ones, and the output is reached."""
    n = graph.n_nodes
    edges = set()
    wanted = [n - 1]
    while wanted:
        node = wanted.pop()
        for source in set(rng.integers(0, node, size=1 + rng.poisson(fan_in - 1)).tolist()):
            if not any(e[:2] == (source, node) for e in edges):
                edges.add((source, node, Gate(int(rng.choice(3, p=mix)))))
            if source and not any(e[1] == source for e in edges) and source not in wanted and rng.random() < 0.8:
                wanted.append(source)
    return circuit(graph, sorted(edges))


def same(found: Assignment, r: dict[int, bool], f: dict[int, bool]) -> None:
    n = len(found.role)
    assert found.retain_works.tolist() == [int(r[i]) if i in r else -1 for i in range(n)]
    assert found.forget_works.tolist() == [int(f[i]) if i in f else -1 for i in range(n)]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("block", range(10))
def test_equals_exhaustive_search(semantics: str, block: int) -> None:
    rng = np.random.default_rng([block, len(semantics)])
    for _ in range(25):
        n = int(rng.integers(3, 10))
        editable = rng.random(n) < 0.85
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        mix = [(0.4, 0.4, 0.2), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.2, 0.15, 0.65)][int(rng.integers(4))]
        sides = [[layered(rng, graph, 2.5, mix) for _ in range(int(rng.integers(1, 3)))] for _ in range(2)]
        weights = rng.integers(0, 4, n) if rng.random() < 0.5 else np.ones(n, np.int64)
        # Few distinct scores, so that every level has ties for the next one to break.
        risk, reach = (rng.integers(0, 3, n) * (rng.random() < 0.7) for _ in range(2))
        found = assign(*sides, semantics=semantics, weights=weights, retain_score=risk, forget_score=reach)
        r, f, key = best(*sides, semantics, weights, risk, reach)
        same(found, r, f)
        assert found.cost == found.lower_bound == key[0]
        assert found.optimal and found.statistics["unique"] == 1


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_equals_exhaustive_search_up_to_sixteen_nodes(semantics: str, block: int) -> None:
    """2000 questions in all, half of them with weights of 1."""
    rng = np.random.default_rng([16, block, len(semantics)])
    for i in range(100):
        n = int(rng.integers(6, 17))
        editable = rng.random(n) < 0.9
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        mix = [(0.4, 0.4, 0.2), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.2, 0.15, 0.65)][int(rng.integers(4))]
        sides = [[layered(rng, graph, 2.4, mix) for _ in range(int(rng.integers(1, 4)))] for _ in range(2)]
        weights = rng.integers(0, 9, n) if i % 2 else np.ones(n, np.int64)
        risk, reach = (rng.integers(0, 3, n) * (rng.random() < 0.7) for _ in range(2))
        found = assign(*sides, semantics=semantics, weights=weights, retain_score=risk, forget_score=reach)
        r, f, cost = best_of_all(*sides, semantics, weights, risk, reach)
        assert found.retain_works.tolist() == r.tolist() and found.forget_works.tolist() == f.tolist()
        assert found.cost == found.lower_bound == cost
        assert found.optimal and found.statistics["unique"] == 1


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_forced_conflicts_cannot_be_avoided(semantics: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        n = int(rng.integers(4, 9))
        editable = np.ones(n, bool)
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        forget, retain = (layered(rng, graph, 2.0, (0.4, 0.4, 0.2)) for _ in range(2))
        found = assign([forget], [retain], semantics=semantics)
        # No weights avoid a forced conflict. (Others may be unavoidable too, by more than propagation.)
        for node in np.flatnonzero(found.forced):
            weights = np.ones(n, np.int64)
            weights[node] = 1000
            assert assign([forget], [retain], semantics=semantics, weights=weights).cost >= 1000
        assert found.n_forced + found.n_chosen == np.count_nonzero(found.role == Role.CONFLICT)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_order_of_edges_and_circuits_does_not_matter(semantics: str) -> None:
    rng = np.random.default_rng(11)
    n = 400
    editable = np.ones(n, bool)
    editable[[0, -1]] = False
    graph = Nodes(n, editable)
    forget, retain = ([layered(rng, graph, 1.8, (0.45, 0.45, 0.1)) for _ in range(2)] for _ in range(2))
    score = rng.random(n)
    first = assign(forget, retain, semantics=semantics, retain_score=score, forget_score=score)
    assert first.optimal and first.statistics["unique"] == 1
    if semantics == "support":  # the circuits left something to choose, or the test would show nothing
        assert first.statistics["cores"] > 0 and first.n_chosen > 0

    def shuffled(one: Edges) -> Edges:
        order = rng.permutation(np.repeat(np.arange(len(one.src)), 2))  # an edge told twice is the same edge
        return Edges(one.name, graph, one.src[order], one.dst[order], one.gate[order])

    again = assign([shuffled(c) for c in forget[::-1]], [shuffled(c) for c in retain[::-1]], semantics=semantics,
                   retain_score=score * 8, forget_score=score / 2)
    for name in ("role", "retain_works", "forget_works", "forced"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name


def test_equals_another_maxsat_solver() -> None:
    pytest.importorskip("pysat")
    from pysat.examples.rc2 import RC2
    from pysat.formula import WCNF

    for seed in range(6):
        rng = np.random.default_rng(seed)
        n = 600
        editable = np.ones(n, bool)
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        forget, retain = (layered(rng, graph, 1.6, (0.5, 0.45, 0.05)) for _ in range(2))
        weights = rng.integers(1, 30, n)
        formula = WCNF()  # r of node n is 2n + 1, f is 2n + 2
        for node, gate, inputs in groups([retain]):
            r = [2 * m + 1 for m in inputs]
            for clause in [r] if gate == Gate.OR else [[m] for m in r]:
                formula.append([-(2 * node + 1), *clause])
        for node, gate, inputs in groups([forget]):
            dead = [-(2 * m + 2) for m in inputs if m]
            for clause in [dead] if gate == Gate.AND else [[m] for m in dead]:
                if clause:
                    formula.append([2 * node + 2, *clause])
        formula.append([1])
        formula.append([2])
        formula.append([2 * n - 1])
        formula.append([-2 * n])
        for node in set(members([forget])) & set(members([retain])) - {0, n - 1}:
            formula.append([-(2 * node + 1), 2 * node + 2], weight=int(weights[node]))
        with RC2(formula) as solver:
            solver.compute()
            expected = solver.cost
        found = assign([forget], [retain], weights=weights)
        assert found.optimal and found.cost == expected


def hitting_set(sets: int = 300, leaves: int = 120, seed: int = 0) -> tuple[Edges, Edges]:
    """Forget must kill one of eight leaves in each of many sets, retain needs them all: NP-hard."""
    rng = np.random.default_rng(seed)
    n = 1 + leaves + sets + 1
    editable = np.zeros(n, bool)
    editable[1:1 + leaves] = True
    graph = Nodes(n, editable)
    kill = [(int(leaf), 1 + leaves + s, Gate.AND) for s in range(sets)
            for leaf in 1 + rng.choice(leaves, 8, replace=False)]
    kill += [(1 + leaves + s, n - 1, Gate.OR) for s in range(sets)]
    keep = [(1 + leaf, n - 1, Gate.AND) for leaf in range(leaves)]
    return circuit(graph, kill), circuit(graph, keep)


def test_time_limit_returns_a_valid_assignment_and_a_bound() -> None:
    forget, retain = hitting_set()
    found = assign([forget], [retain], time_limit=0.3)
    assert not found.optimal and found.statistics["unique"] == 0
    assert 0 < found.lower_bound < found.cost <= 120
    valid(found, forget, retain)


def test_interrupt_stops_the_solver_and_leaves_it_usable() -> None:
    forget, retain = hitting_set()
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        assign([forget], [retain], time_limit=300)
    timer.join()
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    kept = assign([forget], [retain], time_limit=300, keep_on_interrupt=True)
    timer.join()
    valid(kept, forget, retain)
    assert not kept.optimal and kept.cost < 120
    small = hitting_set(sets=3, leaves=10)
    assert assign([small[0]], [small[1]]).optimal


def valid(found: Assignment, forget: Edges, retain: Edges) -> None:
    """A plan with bounds, whether or not it is the best one."""
    r = {n: bool(found.retain_works[n]) for n in members([retain])}
    f = {n: bool(found.forget_works[n]) for n in members([forget])}
    assert retain_ok(r, [retain], "support") and forget_ok(f, [forget], "support")
    assert found.lower_bound <= found.cost == np.count_nonzero(found.role == Role.CONFLICT)


def test_bounds_are_told_as_they_improve() -> None:
    rng = np.random.default_rng(21)
    graph = nodes(300)
    forget, retain = (layered(rng, graph, 1.6, (0.5, 0.45, 0.05)) for _ in range(2))
    told: list[tuple[int, int]] = []
    found = assign([forget], [retain], on_bounds=lambda lower, cost: told.append((lower, cost)))
    assert found.n_chosen > 0 and told[0] == (found.n_forced, told[0][1]) and told[0][1] > found.cost
    assert told[-1] == (found.cost, found.cost)
    for before, after in itertools.pairwise(told):
        assert before[0] <= after[0] and before[1] >= after[1] and before != after

    class Enough(BaseException):
        pass

    for error in (ValueError("seen enough"), CircuitError("seen enough"), SystemExit(3), Enough(told)):
        for last in (0, len(told) - 1):  # at once, and with the proof

            def fail(lower: int, cost: int, error: BaseException = error, last: int = last) -> None:
                if (lower, cost) == told[last]:
                    raise error

            for keep in (False, True):
                with pytest.raises(type(error)) as caught:
                    assign([forget], [retain], on_bounds=fail, keep_on_interrupt=keep)
                assert caught.value is error
    for last in range(len(told)):  # stopped at any time, the plan is valid

        def stop(lower: int, cost: int, last: int = last) -> None:
            if (lower, cost) == told[last]:
                raise KeyboardInterrupt

        kept = assign([forget], [retain], on_bounds=stop, keep_on_interrupt=True)
        valid(kept, forget, retain)
        assert kept.lower_bound <= found.cost <= kept.cost <= told[last][1]
    with pytest.raises(KeyboardInterrupt):
        assign([forget], [retain], on_bounds=stop)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("seed", range(5))
def test_bounds_only_ever_close_in_on_the_cost(semantics: str, seed: int) -> None:
    rng = np.random.default_rng([24, seed])
    graph = nodes(200)
    sides = [[layered(rng, graph, 1.6, (0.5, 0.45, 0.05)) for _ in range(2)] for _ in range(2)]
    inside = members(sides[0])[1:-1]
    for options in ({}, {"weights": rng.integers(0, 9, 200)}, {"must": inside[:3]}, {"never": inside[:1]}):
        told: list[tuple[int, int]] = []
        try:
            found = assign(*sides, semantics=semantics, on_bounds=lambda *bounds, told=told: told.append(bounds), **options)
        except CircuitError as error:
            assert "never" in options and "the pins contradict the circuits" in str(error)
            continue
        assert found.optimal and told[-1] == (found.cost, found.cost)
        for (lower, cost), (next_lower, next_cost) in itertools.pairwise(told):
            assert lower <= next_lower <= found.cost <= next_cost <= cost and (lower, cost) != (next_lower, next_cost)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_any_time_limit_gives_a_valid_plan(semantics: str) -> None:
    rng = np.random.default_rng(22)
    graph = nodes(2000)
    sides = [[layered(rng, graph, 1.6, (0.5, 0.45, 0.05))] for _ in range(2)]
    best_cost = assign(*sides, semantics=semantics).cost
    for time_limit in (1e-9, *np.geomspace(1e-5, 0.1, 20).tolist()):
        found = assign(*sides, semantics=semantics, time_limit=time_limit)
        r, f = ({n: bool(x[n]) for n in members(side)}
                for x, side in ((found.retain_works, sides[1]), (found.forget_works, sides[0])))
        assert retain_ok(r, sides[1], semantics) and forget_ok(f, sides[0], semantics)
        assert found.lower_bound <= best_cost <= found.cost == np.count_nonzero(found.role == Role.CONFLICT)


def test_scores_are_scaled_and_rounded() -> None:
    # Node 1 or node 2 must die; their scores differ by less than half a step of the largest, so the index decides.
    graph = Nodes(5, np.array([0, 1, 1, 1, 0], bool))
    forget = circuit(graph, [(1, 4, Gate.AND), (2, 4, Gate.AND)])
    retain = circuit(graph, [(1, 4, Gate.ADDER), (2, 4, Gate.ADDER), (3, 4, Gate.ADDER)])
    score = np.array([0, 0.5 + 0.3 / SCORE_STEPS, 0.5, 1, 0])
    found = assign([forget], [retain], retain_score=score)
    assert found.role[1:4].tolist() == [Role.RETAIN, Role.CONFLICT, Role.RETAIN]
    score[1:3] = 0.5 - 0.3 / SCORE_STEPS, 0.5 + 0.3 / SCORE_STEPS  # nearest, not down to the step below
    assert assign([forget], [retain], retain_score=score).role[1:4].tolist() == found.role[1:4].tolist()
    score[1:3] = 0.5 + 0.3 / SCORE_STEPS, 0.5 + 2 / SCORE_STEPS
    found = assign([forget], [retain], retain_score=score)
    assert found.role[1:4].tolist() == [Role.CONFLICT, Role.RETAIN, Role.RETAIN]


@pytest.mark.parametrize("solve", [assign, operate])
def test_pins_of_nodes_at_the_edge_of_a_circuit(solve: Callable[..., Assignment]) -> None:
    forget = circuit(nodes(4), [(0, 1, Gate.AND), (2, 3, Gate.AND)])  # node 1 leads nowhere
    retain = circuit(nodes(4), [(1, 3, Gate.AND)])
    found = solve([forget], [retain])
    assert found.role.tolist() == [Role.FREE, Role.RETAIN, Role.FORGET, Role.FREE]
    assert solve([forget], [retain], must=["node 1"]).role[1] == Role.CONFLICT
    # What has no weights of its own is never edited anyway: embedding and output may well die.
    assert np.array_equal(solve([forget], [retain], never=["node 0", 3]).role, found.role)
    assert pinned([forget], [0, 2], [1]).tolist() == [-1, 0, 1, -1]
    for node, text in ((0, "node 0 has no weights of its own"), (2, "node 2 is in no forget circuit")):
        with pytest.raises(CircuitError, match=f"must: {text}"):
            solve([circuit(nodes(4), [(0, 1, Gate.AND), (1, 3, Gate.AND)])], [retain], must=[node])
    with pytest.raises(CircuitError, match="node 1, node 2: pinned both ways, never and must"):
        solve([forget], [retain], never=[2, "node 1"], must=["node 2", 1])


def test_save_and_load(tmp_path) -> None:
    forget, retain = hitting_set(sets=3, leaves=10)
    found = assign([forget], [retain])
    found.save(tmp_path / "assignment.json")
    again = Assignment.load(tmp_path / "assignment.json")
    for name, value in vars(found).items():
        assert np.array_equal(getattr(again, name), value), name
        if isinstance(value, np.ndarray):
            assert getattr(again, name).dtype == value.dtype
    cut = json.loads((tmp_path / "assignment.json").read_text())
    cut["forced"].pop()
    (tmp_path / "assignment.json").write_text(json.dumps(cut))
    with pytest.raises(CircuitError, match="its columns differ in length"):
        Assignment.load(tmp_path / "assignment.json")
    (tmp_path / "assignment.json").write_text("{}")
    with pytest.raises(CircuitError, match="not an assignment file"):
        Assignment.load(tmp_path / "assignment.json")
    with pytest.raises(CircuitError, match="does not exist"):
        Assignment.load(tmp_path / "none.json")


def test_errors_name_the_circuit_and_the_remedy() -> None:
    graph = Nodes(4, np.array([0, 1, 1, 0], bool))
    good = circuit(graph, [(0, 1, Gate.AND), (1, 3, Gate.AND)])

    def bad(edges: list[tuple[int, int, int]], text: str) -> None:
        with pytest.raises(CircuitError, match=text):
            assign([good], [circuit(graph, edges, name="facts")])  # type: ignore[arg-type]

    bad([(1, 2, 0), (2, 1, 0), (1, 3, 0)], "circuit facts: edge node 2 -> node 1 closes a cycle")
    bad([(1, 9, 0)], r"circuit facts: an edge names a node outside 0\.\.3")
    bad([(-1, 3, 0)], "outside")
    bad([(0, 1, 0), (1, 2, 0)], "circuit facts: nothing reaches the output")
    bad([(1, 3, 7)], "gate 7")
    empty = Edges("facts", graph, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint8))
    for text, arguments, options in [
        ("no edges", ([good], [empty]), {}),
        ("no retain circuit", ([good], []), {}),
        ("another graph", ([good], [circuit(Nodes(5, np.ones(5, bool)), [(1, 4, Gate.AND)])]), {}),
        ("weights must be finite and not negative", ([good], [good]), {"weights": np.array([0, -1, 0, 0])}),
        ("weights must hold numbers, got an array of <U1", ([good], [good]), {"weights": ["0", "1", "2", "3"]}),
        ("weights must be integers", ([good], [good]), {"weights": np.array([0, 0.5, 0, 0])}),
        (f"weights: expected at most {(2**63 - 1) // 16}, got {2**59}", ([good], [good]),
         {"weights": np.array([0, 2**59, 0, 0])}),
        (r"retain_score must hold one number per node: expected shape \(4,\)", ([good], [good]),
         {"retain_score": [1.0]}),
        ("forget_score must be finite", ([good], [good]), {"forget_score": [0, np.nan, 0, 0]}),
        ("forget_score must be finite", ([good], [good]), {"forget_score": [0, np.inf, 0, 0]}),
        ("semantics: expected 'support' or 'authors', got 'x'", ([good], [good]), {"semantics": "x"}),
        ("time_limit", ([good], [good]), {"time_limit": -1.0}),
    ]:
        with pytest.raises(CircuitError, match=text):
            assign(*arguments, **options)


def test_native_core_checks_its_arguments() -> None:
    edges = (np.array([1], np.int32), np.array([2], np.int32), np.array([0], np.uint8))
    arguments = {"n_nodes": 3, "editable": np.array([0, 1, 0], np.uint8), "forget": [edges], "retain": [edges],
                 "weights": np.ones(3, np.int64), "risk": np.zeros(3, np.int64), "reach": np.zeros(3, np.int64),
                 "semantics": "support", "time_limit": 0.0}
    assert _core.assign(**arguments)["cost"] == 1
    for error, text, change in [
        (ValueError, "editable: expected length 3, got 2", {"editable": np.ones(2, np.uint8)}),
        (TypeError, "weights: expected a contiguous 1-d array of int64", {"weights": np.ones(3)}),
        (TypeError, r"forget\[0\].src: expected", {"forget": [([1], edges[1], edges[2])]}),
        (ValueError, r"retain\[0\]: expected node ids in 0..2", {"retain": [(edges[0], edges[1] + 5, edges[2])]}),
        (ValueError, r"retain\[0\]: expected src < dst", {"retain": [(edges[1], edges[0], edges[2])]}),
        (ValueError, "risk: expected 0..", {"risk": np.full(3, -1)}),
        (ValueError, "weights: expected 0..", {"weights": np.full(3, 2**62)}),
        (ValueError, "n_nodes: expected at least 2", {"n_nodes": 0}),
    ]:
        with pytest.raises(error, match=text):
            _core.assign(**{**arguments, **change})  # type: ignore[arg-type]
    assert _core.cadical_version() == "3.0.0"

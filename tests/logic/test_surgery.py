"""Edit sets against exhaustive search, under limits and pins, and what is said where there is none."""

from __future__ import annotations

import _thread
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.errors import CircuitError
from clue.logic import assign, operate
from clue.logic.surgery import at_most
from clue.sat import Solver
from clue.types import Gate, Role

from ..oracles.logic import Edges, Nodes, after, best_edit, circuit, members
from .test_assign import hitting_set, layered

MIXES = [(0.4, 0.4, 0.2), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.2, 0.15, 0.65)]


def question(rng: np.random.Generator, low: int, high: int) -> tuple[list[Edges], list[Edges], np.ndarray]:
    """Random circuits of both sides and weights."""
    n = int(rng.integers(low, high))
    editable = rng.random(n) < 0.9
    editable[[0, -1]] = False
    mix = MIXES[int(rng.integers(4))]
    forget, retain = ([layered(rng, Nodes(n, editable), fan_in, mix) for _ in range(int(rng.integers(1, 4)))]
                      for fan_in in (2.4, rng.choice([1.0, 2.4])))
    return forget, retain, rng.integers(0, 9, n) if rng.random() < 0.5 else np.ones(n, np.int64)


def edited(role: np.ndarray) -> list[int]:
    return np.flatnonzero((role == Role.FORGET) | (role == Role.CONFLICT)).tolist()


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_equals_exhaustive_search_up_to_sixteen_nodes(block: int) -> None:
    """2000 questions in all, half of them with limits, half with pins."""
    rng = np.random.default_rng([7, block])
    answers = {"none": 0, "least": 0, "free": 0, "conflicts": 0}
    for i in range(200):
        forget, retain, weights = question(rng, 4, 17 if i % 4 == 0 else 12)
        n = len(weights)
        risk, reach = (rng.integers(0, 3, n) * (rng.random() < 0.7) for _ in range(2))
        pinned = rng.permutation([m for m in members(forget) if forget[0].graph.editable[m]])[:int(rng.integers(0, 4))]
        split = int(rng.integers(0, 3))
        pins = {"never": pinned[split:].tolist(), "must": pinned[:split].tolist()} if i % 2 else {}
        anyhow = best_edit(forget, retain, weights, risk, reach, **pins)
        limits: dict[str, int] = {}
        if anyhow is not None and rng.random() < 0.6:
            limits = {name: max(0, int(value - rng.integers(0, 3))) for name, value in (
                ("budget", weights[anyhow.edited].sum()), ("most", len(anyhow.edited))) if rng.random() < 0.7}
        expected = best_edit(forget, retain, weights, risk, reach, **limits, **pins)
        options = {"weights": weights, "retain_score": risk, "forget_score": reach, **limits, **pins}
        if expected is None:
            with pytest.raises(CircuitError, match="no edit set kills the forget outputs") as refusal:
                operate(forget, retain, **options)
            told = re.search(r"at most .* (edited nodes|weight of edits): the least that would do is (\d+)",
                             str(refusal.value))
            assert (told is not None) == (anyhow is not None)
            if told is not None:  # so much of the last limit named, within the one before it
                last, least = "most" if told[1] == "edited nodes" else "budget", int(told[2])
                before = {name: limits[name] for name in limits if name != last and " and " in str(refusal.value)}
                assert least > limits[last] and best_edit(forget, retain, weights, risk, reach, **before,
                                                          **{last: least}, **pins) is not None
                assert best_edit(forget, retain, weights, risk, reach, **before, **{last: least - 1}, **pins) is None
                answers["least"] += 1
            answers["none"] += 1
            continue
        found = operate(forget, retain, **options)
        assert edited(found.role) == expected.edited
        assert np.flatnonzero(found.role == Role.CONFLICT).tolist() == expected.conflict
        assert found.optimal and found.cost == found.lower_bound == expected.cost
        assert found.statistics["unique"] == 1
        assert found.statistics["edit_weight"] == weights[expected.edited].sum()
        stopped = np.zeros((2, n), bool)
        stopped[:, expected.edited] = True
        stopped[1, expected.conflict] = False
        for works, side, retained in ((found.forget_works, forget, False), (found.retain_works, retain, True)):
            inside = np.isin(np.arange(n), members(side))
            assert works.tolist() == np.where(inside, after(side, stopped[[int(retained)]], retained)[0], -1).tolist()
        assert found.retain_works[-1] == 1 and found.forget_works[-1] == 0
        answers["conflicts" if expected.conflict else "free"] += 1
    assert min(answers.values()) >= 10, answers


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_properties(seed: int) -> None:
    """Dearer weights cost no less; a larger budget costs no more; pins are obeyed and cost no less."""
    rng = np.random.default_rng(seed)
    forget, retain, weights = question(rng, 4, 40)
    weights = weights + 1
    try:
        found = operate(forget, retain, weights=weights)
    except CircuitError:
        return  # every way to the output is without weights of its own
    heavier = weights + rng.integers(0, 4, len(weights))
    assert operate(forget, retain, weights=heavier).cost >= found.cost
    mine, name = edited(found.role), forget[0].graph.name
    costs = []
    for budget in range(int(weights[mine].sum()), -1, -1):
        try:
            costs.append(operate(forget, retain, weights=weights, budget=budget).cost)
        except CircuitError as error:
            least = re.search(r"the least that would do is (\d+)", str(error))
            assert least is not None and int(least[1]) == budget + 1
            break
    assert costs == sorted(costs) and costs[0] == found.cost
    for pins in ({"never": [name(mine[0])]}, {"must": [mine[-1]]}, {"never": mine}):
        try:
            other = operate(forget, retain, weights=weights, **pins)
        except CircuitError as error:
            assert "the pins contradict the circuits" in str(error) and "must" not in pins
            continue
        assert (other.cost, other.statistics["edit_weight"]) >= (found.cost, found.statistics["edit_weight"])
        assert not {name(n) for n in edited(other.role)} & set(pins.get("never", [])) and not (
            {*edited(other.role)} & {*pins.get("never", [])})
        assert {*pins.get("must", [])} <= {*edited(other.role)}


def test_no_conflict_where_none_is_needed_and_edits_at_the_narrow_place() -> None:
    # 1 and 2 feed 3, which is all that forgetting needs; retention needs 1 and, one of them, 2 or 3.
    graph = Nodes(5, np.array([0, 1, 1, 1, 0], bool))
    forget = circuit(graph, [(0, 1, Gate.ADDER), (0, 2, Gate.ADDER), (1, 3, Gate.ADDER), (2, 3, Gate.ADDER),
                             (3, 4, Gate.ADDER)])
    retain = circuit(graph, [(1, 4, Gate.AND), (2, 4, Gate.OR), (3, 4, Gate.OR)])
    assert assign([forget], [retain]).cost == 2  # the gates ask for the death of 1 and 2 as well
    found = operate([forget], [retain])
    assert found.cost == 0 and found.role.tolist() == [Role.FREE, Role.RETAIN, Role.RETAIN, Role.FORGET, Role.FREE]
    assert found.forget_works.tolist() == [1, 1, 1, 0, 0] and found.retain_works.tolist() == [-1, 1, 1, 0, 1]
    # Kept from 3, it takes both inputs, which retention needs: 1 becomes a conflict, and 3 can serve for 2 no longer.
    found = operate([forget], [retain], never=["node 3"])
    assert found.cost == 1 and np.flatnonzero(found.role == Role.CONFLICT).tolist() == [1]
    assert found.role[2] == Role.FORGET
    assert found.n_forced == 1 and found.n_chosen == 0
    # Within a budget of one edit the only way is through 3; if 3 is dear, weight goes to the others.
    weights = np.array([1, 1, 1, 9, 1])
    assert edited(operate([forget], [retain], weights=weights).role) == [3]  # 9 without conflict, 2 with one
    found = operate([forget], [retain], weights=weights, budget=8)
    assert edited(found.role) == [1, 2] and found.cost == 1


def test_hard_questions_and_limits_of_time() -> None:
    forget, retain = hitting_set(sets=40, leaves=25)
    found = operate([forget], [retain])
    assert found.optimal and found.cost == assign([forget], [retain]).cost
    forget, retain = hitting_set()
    found = operate([forget], [retain], time_limit=0.5)
    assert not found.optimal and 0 < found.lower_bound < found.cost <= 120
    assert found.forget_works[-1] == 0 and found.retain_works[-1] == 1
    # Where edits weigh nothing an edit set is found at once, and how few would do is left open.
    with pytest.raises(CircuitError, match=r"at most 1 edited nodes: it takes at least \d+$"):
        operate([forget], [retain], weights=np.zeros(forget.graph.n_nodes, np.int64), most=1, time_limit=1)
    for keep in (True, False):
        timer = threading.Timer(0.5, _thread.interrupt_main)
        timer.start()
        if keep:
            found = operate([forget], [retain], keep_on_interrupt=True)
            assert not found.optimal and 0 < found.lower_bound < found.cost <= 120
            assert found.forget_works[-1] == 0 and found.retain_works[-1] == 1
        else:
            with pytest.raises(KeyboardInterrupt):
                operate([forget], [retain])
        timer.join()


def test_what_is_proven_when_the_time_is_up() -> None:
    """Proven are levels 1 and 2, the conflicts and the edits, or also the other levels, and then there is one answer."""
    forget, retain = hitting_set()
    n = forget.graph.n_nodes
    apart = circuit(forget.graph, [(0, n - 1, Gate.AND)])  # forgetting costs no conflict, but many edits
    found = operate([forget], [apart], time_limit=0.5)
    assert found.cost == found.lower_bound == 0 and not found.optimal and not found.statistics["unique"]
    # All edits weigh nothing: what is left to prove is the risk.
    found = operate([forget], [retain], weights=np.zeros(n, np.int64), retain_score=np.ones(n), time_limit=0.5)
    assert found.cost == 0 and found.optimal and not found.statistics["unique"]


def test_the_embedding_and_the_output_are_never_edited() -> None:
    for editable in ([0, 1, 1, 0], [1, 1, 1, 1]):
        graph = Nodes(4, np.array(editable, bool))
        chain, alone = (circuit(graph, edges) for edges in (
            [(0, 1, Gate.AND), (1, 2, Gate.AND), (2, 3, Gate.AND)], [(0, 3, Gate.AND)]))
        assert edited(operate([chain], [alone], most=1).role) == [2]
        with pytest.raises(CircuitError, match="the output is reached without passing a node"):
            operate([alone], [alone])
        with pytest.raises(CircuitError, match="with never node 1, node 2$"):
            operate([chain], [alone], never=[1, 2])


@pytest.mark.parametrize("within", ["nothing", "most", "budget", "pins"])
def test_any_time_limit_gives_an_edit_set_or_says_that_the_time_is_up(within: str) -> None:
    rng = np.random.default_rng(23)
    n = 2000
    editable = np.ones(n, bool)
    editable[[0, -1]] = False
    sides = [[layered(rng, Nodes(n, editable), 1.6, (0.5, 0.45, 0.05)) for _ in range(2)] for _ in range(2)]
    weights = rng.integers(0, 9, n)
    pins: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    if within == "pins":
        pins = {"must": [members(sides[0])[5]], "never": edited(operate(*sides, weights=weights).role)[:1]}
    elif within != "nothing":  # the tightest limit there is
        with pytest.raises(CircuitError, match="the least that would do is") as refusal:
            operate(*sides, weights=weights, **{within: 0})
        limits = {within: int(str(refusal.value).split()[-1])}
    best = operate(*sides, weights=weights, **limits, **pins)
    assert best.optimal
    outcomes = []
    for time_limit in (1e-9, *np.geomspace(1e-5, 0.1, 20).tolist(), 0):
        try:
            found = operate(*sides, weights=weights, time_limit=time_limit, **limits, **pins)
        except CircuitError as error:
            assert str(error).startswith("time_limit: ")
            outcomes.append("time is up")
            continue
        outcomes.append("proven" if found.optimal else "edit set")
        mine = edited(found.role)
        stopped = np.zeros((2, n), bool)
        stopped[:, mine] = True
        stopped[1, found.role == Role.CONFLICT] = False
        assert not after(sides[0], stopped[:1], False)[0, -1] and after(sides[1], stopped[1:], True)[0, -1]
        assert found.lower_bound <= best.cost <= found.cost == weights[found.role == Role.CONFLICT].sum()
        assert len(mine) <= limits.get("most", n) and weights[mine].sum() <= limits.get("budget", weights.sum())
        assert {*pins.get("must", [])} <= {*mine} and not {*pins.get("never", [])} & {*mine}
        if found.optimal:
            assert (found.cost, found.statistics["edit_weight"]) == (best.cost, best.statistics["edit_weight"])
    assert outcomes[0] == "time is up" and outcomes[-1] == "proven"


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(0, 20), max_size=8), most=st.integers(0, 40))
def test_at_most_allows_exactly_what_it_says(costs: list[int], most: int) -> None:
    n = len(costs)
    clauses, n_variables = at_most(np.arange(1, n + 1), np.array(costs, np.int64), most, n)
    solver = Solver(clauses)
    solver.reserve(n_variables)
    for i in range(1 << n):
        chosen = [j for j in range(n) if i >> j & 1]
        literals = [j + 1 if j in chosen else -j - 1 for j in range(n)]
        assert solver.solve(literals) == (sum(costs[j] for j in chosen) <= most)


def test_refusals_name_the_argument_and_the_remedy() -> None:
    forget, retain = hitting_set(sets=2, leaves=10, seed=1)
    graph = forget.graph
    needed = sorted({int(leaf) for leaf, node in zip(forget.src, forget.dst, strict=True) if node == 11})
    n = graph.n_nodes
    alone = circuit(graph, [(0, n - 1, Gate.AND)])
    names = ", ".join(graph.name(node) for node in needed)
    for text, one, options in [
        ("budget: expected an integer >= 0, got -1", forget, {"budget": -1}),
        ("budget: expected an integer >= 0, got nan", forget, {"budget": float("nan")}),
        ("most: expected an integer >= 0, got True", forget, {"most": True}),
        ("never: there is no node 'x'", forget, {"never": ["x"]}),
        ("must: there is no node 99", forget, {"must": [99]}),
        ("must: expected a list of nodes, got 'node 1'", forget, {"must": "node 1"}),
        ("node 1, node 2: pinned both ways, never and must", forget, {"must": [2, 1], "never": ["node 1", 2]}),
        ("must: node 11 has no weights of its own", forget, {"must": [11]}),
        (f"no edit set kills the forget outputs with never {names}$", forget, {"never": list(range(1, 11))}),
        ("at most 0 edited nodes: the least that would do is 1", forget, {"most": 0}),
        ("at most 1 edited nodes and at most 4 weight of edits: the least that would do is 5", forget,
         {"most": 1, "budget": 4, "weights": np.full(n, 5)}),
        ("the output is reached without passing a node", alone, {}),
        ("weights must be finite and not negative", forget, {"weights": np.full(n, np.nan)}),
        ("weights must be finite and not negative", forget, {"weights": np.full(n, -1)}),
        ("weights: expected at most .* 63 bits", forget, {"weights": np.full(n, 2**62)}),
        ("weights: expected at most .* 63 bits", forget, {"weights": np.full(n, 1e300)}),
        (r"time_limit: expected seconds in \[0, 1e9\), got nan", forget, {"time_limit": float("nan")}),
    ]:
        with pytest.raises(CircuitError, match=text):
            operate([one], [retain], **options)
    # What a node must do can contradict what it must not, through the gates.
    chain = circuit(Nodes(4, np.array([0, 1, 1, 0], bool)), [(1, 2, Gate.ADDER), (2, 3, Gate.ADDER)])
    with pytest.raises(CircuitError, match="no assignment kills the forget outputs with never node 1$"):
        assign([chain], [chain], never=[1], must=[2])
    assert assign([chain], [chain], must=["node 1"]).cost == 2
    assert operate([chain], [chain], must=["node 1"]).cost == operate([chain], [chain], never=[2]).cost == 1

"""The optimum of hundreds of nodes against another MaxSAT solver: PySAT's RC2, on the rules written out clause by clause."""

from __future__ import annotations

import numpy as np
import pytest

from clue.logic import assign
from clue.types import Gate

from ..oracles.logic import Edges, Nodes, circuit, groups, members

pytest.importorskip("pysat")
from pysat.examples.rc2 import RC2
from pysat.formula import WCNF


def layered(rng: np.random.Generator, graph: Nodes, layers: int, fan_in: float, mix: tuple[float, float, float]) -> Edges:
    """A random circuit in layers: nodes read from the embedding and the layers below, and the output depends on all.

    Most edges into a node share their gate, so that OR and AND groups have inputs to choose from.
    """
    inner, output = graph.n_nodes - 2, graph.n_nodes - 1
    edges: set[tuple[int, int, Gate]] = set()
    wanted, seen = [output], {output}
    while wanted:
        node = wanted.pop()
        below = inner if node == output else (node - 1) * layers // inner * inner // layers  # nodes in lower layers
        own = Gate(int(rng.choice(3, p=mix)))
        count = max(inner // 12, 2) if node == output else 1 + int(rng.poisson(fan_in - 1))
        for source in set((rng.integers(0, below + 1, count)).tolist()):
            edges.add((source, node, own if rng.random() < 0.97 else Gate(int(rng.choice(3, p=mix)))))
            if source not in seen and source > 0:
                seen.add(source)
                wanted.append(source)
    return circuit(graph, sorted(edges))


def written_out(forget: list[Edges], retain: list[Edges], semantics: str, weights: np.ndarray) -> WCNF:
    """The question as clauses; r of node n is variable 2n + 1, f is 2n + 2."""
    formula = WCNF()
    n = forget[0].graph.n_nodes
    for is_retain, side in ((True, retain), (False, forget)):
        for node, gate, inputs in groups(side):
            # x is r on the retain side and not f on the forget side; then AND and OR trade places, ADDER is AND.
            def x(member: int, is_retain: bool = is_retain) -> int:
                return 2 * member + 1 if is_retain else -(2 * member + 2)

            body = [x(member) for member in inputs if member or is_retain]
            if not body:
                continue
            if gate == (Gate.OR if is_retain else Gate.AND):
                formula.append([-x(node), *body])
                back = [[-literal] for literal in body]
            else:
                formula.extend([[-x(node), literal] for literal in body])
                back = [[-literal for literal in body]]
            if semantics == "authors":
                formula.extend([[x(node), *clause] for clause in back])
    formula.extend([[1], [2], [2 * n - 1], [-2 * n]])  # the embedding works for both; the output for retain only
    for node in sorted(set(members(forget)) & set(members(retain))):
        if forget[0].graph.editable[node] and weights[node]:
            formula.append([-(2 * node + 1), 2 * node + 2], weight=int(weights[node]))
    return formula


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_equals_rc2(block: int) -> None:
    """200 questions in all, in both semantics, half of them with weights of 1."""
    cores = 0
    for seed in range(20 * block, 20 * block + 20):
        rng = np.random.default_rng([3, seed])
        semantics = ("support", "authors")[seed % 2]
        n = int(rng.integers(200, 900))
        editable = rng.random(n) < 0.95
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        mix = [(0.2, 0.15, 0.65), (0.47, 0.47, 0.06), (0.5, 0.45, 0.05), (0.3, 0.68, 0.02)][int(rng.integers(4))]
        forget, retain = ([layered(rng, graph, int(rng.integers(4, 12)), 2.2, mix)
                           for _ in range(int(rng.integers(1, 3)))] for _ in range(2))
        weights = rng.integers(0, 30, n) if seed // 2 % 2 else np.ones(n, np.int64)
        formula = written_out(forget, retain, semantics, weights)
        expected = 0
        if formula.soft:
            with RC2(formula) as solver:
                solver.compute()
                expected = solver.cost
        found = assign(forget, retain, semantics=semantics, weights=weights)
        assert found.optimal and found.cost == found.lower_bound == expected, seed
        cores += found.statistics["cores"]
    assert cores > 5  # propagation alone did not answer them

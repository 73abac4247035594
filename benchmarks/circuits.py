"""Random circuits for the logic benchmark, from a seed; as a program, one question solved in a process of its own.

The process imports neither torch nor what else the benchmark needs, so its peak memory is that of the arrays and of the
answer: ``python benchmarks/circuits.py NODES EDGES RETAIN SEED AND,OR,ADDER`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from clue.logic import Assignment, assign, operate
from clue.logic.question import NamedCircuit, NamedNodes
from clue.types import Gate

Mix = tuple[float, float, float]  # shares of AND, OR and ADDER

TRANSFORMER: Mix = (0.20, 0.15, 0.65)
ADVERSARIAL: Mix = (0.45, 0.45, 0.10)


def nodes(n: int) -> NamedNodes:
    """n nodes; all but embedding and output have weights of their own."""
    editable = np.ones(n, dtype=bool)
    editable[[0, -1]] = False
    return NamedNodes(tuple(f"node {node}" for node in range(n)), editable)


def layered(graph: NamedNodes, edges: int, mix: Mix, rng: np.random.Generator, layers: int = 32) -> NamedCircuit:
    """A circuit of ``edges`` edges, or of one for each node if that is more.

    Every node reads uniformly from the embedding and the layers below its own; the output adds up one node in fifty.
    All edges into a node have one gate, drawn with the shares of ``mix``: with a gate per edge most OR groups would
    have a single input, and nothing would be left to choose.
    """
    inner = graph.n_nodes - 2
    output = 1 + rng.choice(inner, max(inner // 50, 1), replace=False)
    receiver = np.arange(inner)
    pairs = (graph.n_nodes - 1) * graph.n_nodes + output
    while len(receiver):  # until no edge is missing: some are drawn twice
        below = 1 + -(-(receiver * layers // inner) * inner // layers)  # nodes below the receiver's layer
        source = (rng.random(len(receiver)) * below).astype(np.int64)
        pairs = np.sort(np.concatenate([pairs, (receiver + 1) * graph.n_nodes + source]))
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique hashes, which takes many times as long here
        receiver = rng.integers(0, inner, max(edges - len(pairs), 0))
    gate_of = rng.choice(3, graph.n_nodes, p=mix).astype(np.uint8)
    gate_of[-1] = Gate.ADDER
    dst = (pairs // graph.n_nodes).astype(np.int32)
    return NamedCircuit("random", graph, (pairs % graph.n_nodes).astype(np.int32), dst, gate_of[dst])


def question(n: int, edges: int, n_retain: int, mix: Mix, seed: int) -> tuple[list[NamedCircuit], list[NamedCircuit]]:
    """One forget circuit and ``n_retain`` retain circuits over n nodes, ``edges`` edges together."""
    graph = nodes(n)
    rng = np.random.default_rng(seed)
    circuits = [layered(graph, edges // (1 + n_retain), mix, rng) for _ in range(1 + n_retain)]
    return circuits[:1], circuits[1:]


def hitting_set(leaves: int, sets: int, size: int, seed: int) -> tuple[list[NamedCircuit], list[NamedCircuit]]:
    """Forget must kill one of ``size`` random leaves in each of many sets, retain needs every leaf."""
    rng = np.random.default_rng(seed)
    graph = nodes(1 + leaves + sets + 1)
    out = graph.n_nodes - 1
    chosen = np.sort(np.argsort(rng.random((sets, leaves)), axis=1)[:, :size], axis=1) + 1
    parents = np.repeat(np.arange(sets) + 1 + leaves, size)
    src = np.concatenate([chosen.ravel(), np.arange(sets) + 1 + leaves])
    dst = np.concatenate([parents, np.full(sets, out)])
    gate = np.concatenate([np.full(sets * size, Gate.AND), np.full(sets, Gate.OR)])
    keep = np.arange(leaves) + 1
    return ([NamedCircuit("kill", graph, src.astype(np.int32), dst.astype(np.int32), gate.astype(np.uint8))],
            [NamedCircuit("keep", graph, keep.astype(np.int32), np.full(leaves, out, np.int32),
                   np.full(leaves, Gate.AND, np.uint8))])


def solve(forget: list[NamedCircuit], retain: list[NamedCircuit], **options: Any) -> Assignment:
    """``clue.logic.assign``; it asks of a circuit only what :class:`NamedCircuit` has."""
    return assign(forget, retain, **options)  # type: ignore[arg-type]


def edit(forget: list[NamedCircuit], retain: list[NamedCircuit], **options: Any) -> Assignment:
    """``clue.logic.operate``, likewise."""
    return operate(forget, retain, **options)  # type: ignore[arg-type]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes. Linux's ru_maxrss would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def main() -> int:
    n, edges, n_retain, seed = map(int, sys.argv[1:5])
    share = [float(s) for s in sys.argv[5].split(",")]
    forget, retain = question(n, edges, n_retain, (share[0], share[1], share[2]), seed)
    before = peak_memory()
    start, cpu = time.perf_counter(), time.process_time()
    found = solve(forget, retain)
    print(json.dumps({
        "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak": peak_memory(),
        "peak_before": before, "edges": sum(len(c.src) for c in (*forget, *retain)), "optimal": found.optimal,
        "forced": found.n_forced, "chosen": found.n_chosen, **found.statistics,
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())

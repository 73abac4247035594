"""Stability: which roles outlast the uncertainty of the scores.

Scores are means over pairs, and a circuit keeps what lies above a threshold. Each sample adds noise to the scores, cuts
the circuits again, and solves again: edges and neurons near the threshold go in and out, while those far from it stay.
What is solved in a sample is exact as always; the share of samples in which a node has a role is an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .config import LocalizeSettings
from .types import Provenance, Role

if TYPE_CHECKING:
    from .circuit.attribution import Scores
    from .circuit.graph import Circuit
    from .logic import Assignment

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stability:
    """How often each node has each role.

    Attributes:
        share: float64 [nodes, roles], share of the samples in which the node has the role (a value of
            :class:`clue.types.Role`); rows sum to 1.
        samples: number of samples.
    """

    share: Floats
    samples: int

    def of(self, role: npt.NDArray[np.uint8]) -> Floats:
        """float64 [nodes]: share of the samples in which each node has the role given for it."""
        found: Floats = self.share[np.arange(len(role)), role]
        return found


def sample_roles(scores: Mapping[str, Scores], circuits: Mapping[str, Circuit], settings: LocalizeSettings,
                 solve: Callable[[Mapping[str, Scores], Mapping[str, Circuit]], Assignment], *,
                 seed: int = 0) -> Stability:
    """Sample scores, cut and solve, ``settings.stability_samples`` times.

    Args:
        scores, circuits: by name of the record set; the circuits say how many edges a faithfulness target took, and what
            exact patching found of their gates, which samples take over.
        solve: from scores and circuits to an assignment.
        seed: equal seeds give equal samples.
    """
    from .circuit.selection import build_circuit

    counts = np.zeros((circuits["forget"].graph.n_nodes, len(Role)))
    for sample in range(settings.stability_samples):
        rng = np.random.default_rng([seed, sample])
        drawn, cut = {}, {}
        for name, found in scores.items():
            chosen = _as_cut(found, circuits[name], settings)
            drawn[name] = perturb(found, chosen, rng)
            cut[name] = _patched(build_circuit(drawn[name], chosen), circuits[name])
        role = solve(drawn, cut).role
        counts[np.arange(len(role)), role] += 1
    return Stability(counts / settings.stability_samples, settings.stability_samples)


def perturb(scores: Scores, settings: LocalizeSettings, rng: np.random.Generator) -> Scores:
    """Scores with normal noise.

    The standard deviation is ``settings.stability_noise`` times the weakest score that selection keeps; for neurons it is
    their standard error, tokens taken as independent, where the scores have the sums of squares that this needs.
    What is exactly zero stays so.
    """
    edges = max(1, round(settings.edges * int(scores.graph.residual_edges.sum())))
    neurons = max(1, round(settings.neurons * scores.neuron_ns.size))

    def noisy(values: Floats, sigma: Floats | float) -> Floats:
        drawn: Floats = values + np.where(values != 0, sigma * rng.standard_normal(values.shape), 0.0)
        return drawn

    def error(values: Floats, squares: Floats) -> Floats | float:
        if scores.pairs < 1 or scores.tokens < 1 or not np.any(squares > 0):
            return settings.stability_noise * threshold(values, neurons)
        found: Floats = np.sqrt(np.maximum(squares / scores.pairs - values**2 / scores.tokens, 0.0))
        return found

    return replace(
        scores,
        ns=noisy(scores.ns, settings.stability_noise * threshold(scores.ns, edges)),
        dn=noisy(scores.dn, settings.stability_noise * threshold(scores.dn, edges)),
        neuron_ns=noisy(scores.neuron_ns, error(scores.neuron_ns, scores.neuron_sq_ns)),
        neuron_dn=noisy(scores.neuron_dn, error(scores.neuron_dn, scores.neuron_sq_dn)),
    )


def threshold(values: Floats, count: int) -> float:
    """The ``count``-th largest |score|, the smallest if there are fewer; scores of zero are none."""
    strength = np.sort(np.abs(values[values != 0]))[::-1]
    return float(strength[min(count, len(strength)) - 1]) if len(strength) else 0.0


def keep_stable(assignment: Assignment, stability: Stability, least: float) -> Assignment:
    """The assignment with only those nodes edited whose role holds in at least the share ``least`` of the samples.

    Only roles change: what is proven of the formula (``cost``, bounds, ``retain_works``, ``forget_works``) stays as it
    is, and the statistics say how many nodes that it edits are left alone (``unstable_forget``, ``unstable_conflict``),
    for which the proof of forgetting no longer speaks.
    """
    role = assignment.role.copy()
    edited = (role == Role.FORGET) | (role == Role.CONFLICT)
    dropped = edited & (stability.of(role) < least)
    role[dropped] = np.where(assignment.retain_works[dropped] == 1, Role.RETAIN, Role.FREE)
    statistics = {**assignment.statistics, "stability_samples": stability.samples}
    for kind in (Role.FORGET, Role.CONFLICT):
        statistics[f"unstable_{kind.name.lower()}"] = int((dropped & (assignment.role == kind)).sum())
    return replace(assignment, role=role, statistics=statistics)


def _as_cut(scores: Scores, circuit: Circuit, settings: LocalizeSettings) -> LocalizeSettings:
    """Settings that cut as many edges without a faithfulness target as it took with one: as many as are no weaker than the
    weakest that the circuit keeps, as dead ends were cut and then dropped."""
    if not settings.faithfulness:
        return settings
    graph = circuit.graph
    row, column = np.full(graph.n_nodes, -1), np.full(graph.n_nodes, -1)
    row[graph.writers], column[graph.readers] = np.arange(len(graph.writers)), np.arange(len(graph.readers))
    count = 1
    for way, values in ((Provenance.NOISING, scores.ns), (Provenance.DENOISING, scores.dn)):
        at, to = row[circuit.src], column[circuit.dst]
        kept = ((circuit.provenance & way) != 0) & (at >= 0) & (to >= 0)
        strength = np.abs(np.where(graph.residual_edges, values, 0.0))
        if kept.any():
            count = max(count, int(np.count_nonzero(strength >= strength[at[kept], to[kept]].min())))
    return replace(settings, faithfulness=0.0, edges=count / int(graph.residual_edges.sum()))


def _patched(drawn: Circuit, original: Circuit) -> Circuit:
    """The drawn circuit with the gates that exact patching saw in the original one."""
    seen = (original.provenance & (Provenance.CONFIRMED | Provenance.CONTRADICTED)) != 0
    if not np.any(seen):
        return drawn
    n = drawn.graph.n_nodes
    key, known = (one.dst.astype(np.int64) * n + one.src for one in (drawn, original))
    order = np.argsort(known[seen])
    at = np.minimum(np.searchsorted(known[seen][order], key), len(order) - 1)
    same = known[seen][order][at] == key
    gate = np.where(same, original.gate[seen][order][at], drawn.gate).astype(np.uint8)
    return replace(drawn, gate=gate)

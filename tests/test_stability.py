"""Roles under sampled scores: deterministic, certain where scores are far from the threshold, and cut where they are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings, check
from clue.errors import ClueError
from clue.pipeline import solve
from clue.stability import Stability, _as_cut, keep_stable, perturb, sample_roles, threshold
from clue.types import Role

from .circuit.test_selection import make_scores

SETTINGS = LocalizeSettings(edges=0.3, neurons=0.3, granularity="block", stability_samples=12, stability_noise=0.3)
SCORES = {"forget": make_scores(1), "retain": make_scores(2), "skills": make_scores(3)}
CIRCUITS = {name: build_circuit(scores, SETTINGS) for name, scores in SCORES.items()}


@pytest.mark.parametrize("mode", ["conflict", "surgical"])
def test_only_stable_roles_are_edited_and_the_proof_stays(mode: str) -> None:
    settings = replace(SETTINGS, mode=mode)
    plain = solve(SCORES, CIRCUITS, settings)
    shares = sample_roles(SCORES, CIRCUITS, settings, lambda s, c: solve(s, c, settings), seed=5)
    assert np.allclose(shares.share.sum(axis=1), 1) and shares.samples == 12
    edited = (plain.role == Role.FORGET) | (plain.role == Role.CONFLICT)
    assert edited.any() and shares.of(plain.role)[edited].min() < 1  # or the cut would show nothing
    least = float(np.median(shares.of(plain.role)[edited])) + 0.01
    cut = solve(SCORES, CIRCUITS, replace(settings, stability=min(least, 1.0)), seed=5)
    unstable = edited & (shares.of(plain.role) < least)
    assert np.array_equal(cut.role[~unstable], plain.role[~unstable])
    assert set(cut.role[unstable].tolist()) <= {Role.RETAIN, Role.FREE}
    assert cut.statistics["unstable_forget"] + cut.statistics["unstable_conflict"] == unstable.sum() > 0
    for name in ("retain_works", "forget_works", "forced", "cost", "lower_bound", "optimal"):
        assert np.array_equal(getattr(cut, name), getattr(plain, name)), name
    again = solve(SCORES, CIRCUITS, replace(settings, stability=min(least, 1.0)), seed=5)
    assert np.array_equal(again.role, cut.role) and again.statistics == cut.statistics


def test_without_noise_every_role_is_certain() -> None:
    settings = replace(SETTINGS, stability_noise=0.0, stability_samples=3)
    scores = {name: replace(s, neuron_sq_ns=np.zeros_like(s.neuron_ns), neuron_sq_dn=np.zeros_like(s.neuron_dn))
              for name, s in SCORES.items()}
    plain = solve(scores, CIRCUITS, settings)
    shares = sample_roles(scores, CIRCUITS, settings, lambda s, c: solve(s, c, settings))
    assert np.all(shares.of(plain.role) == 1)
    assert np.array_equal(keep_stable(plain, shares, 1.0).role, plain.role)


@pytest.mark.parametrize("granularity", ["block", "neuron"])
def test_samples_are_cut_as_a_faithfulness_target_cut(granularity: str) -> None:
    settings = LocalizeSettings(faithfulness=0.9, neurons=0.3, granularity=granularity)
    for seed, least in ((seed, least) for seed in range(8) for least in (4, 12, 30)):
        scores = make_scores(seed)
        circuit = build_circuit(scores, settings, faithful=lambda c, least=least: float(len(c) >= least))  # type: ignore[misc]
        again = build_circuit(scores, _as_cut(scores, circuit, settings))
        for name in ("src", "dst", "gate", "provenance"):
            np.testing.assert_array_equal(getattr(again, name), getattr(circuit, name))


def test_noise_has_the_scale_it_says() -> None:
    scores = SCORES["forget"]
    draws = [perturb(scores, SETTINGS, np.random.default_rng(seed)) for seed in range(400)]
    count = round(0.3 * int(scores.graph.residual_edges.sum()))
    kept = np.sort(np.abs(scores.ns[scores.ns != 0]))[::-1][count - 1]
    assert threshold(scores.ns, count) == kept
    spread = np.std([draw.ns for draw in draws], axis=0)
    assert np.allclose(spread[scores.ns != 0], 0.3 * kept, rtol=0.25) and np.all(spread[scores.ns == 0] == 0)
    # Standard errors of neurons: 50 tokens of each of 10 pairs, drawn anew, spread as one sample of them says.
    rng = np.random.default_rng(0)
    terms = rng.normal(0.2, 1.0, (500, *scores.neuron_ns.shape))
    measured = replace(scores, neuron_ns=terms.sum(0) / 10, neuron_sq_ns=(terms**2).sum(0) / 10, tokens=500, pairs=10)
    spread = np.std([perturb(measured, SETTINGS, np.random.default_rng(seed)).neuron_ns for seed in range(400)], axis=0)
    assert np.allclose(spread, np.sqrt(500) / 10, rtol=0.25)


def test_shares_and_settings() -> None:
    share = np.array([[0.25, 0.75, 0, 0], [0, 0, 0.5, 0.5]])
    assert Stability(share, 4).of(np.array([1, 3], np.uint8)).tolist() == [0.75, 0.5]
    for text, changes in [("stability = 1.5 must lie in", {"stability": 1.5}),
                          ("stability_samples = 0 must be at least 1", {"stability_samples": 0}),
                          ("stability_noise = nan", {"stability_noise": float("nan")}),
                          ("mode = 'x' is not one of conflict, surgical", {"mode": "x"})]:
        with pytest.raises(ClueError, match=text):
            check(LocalizeSettings(**changes))

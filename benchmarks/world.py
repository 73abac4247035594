"""The embedded world over several seeds: what the demo shows once, as claims with their spread, next to gradient difference.

Per world (easy and hard, one per seed) a model is trained from scratch, and a gold model without the forgotten facts; both
are cached. CLUE runs with the demo's settings. The peer is GradDiff on every weight of every linear layer, without plan and
without retain metric, given the same floor, so that both stop at the same forgetting. Retention is read on people that
unlearning never saw.

    python benchmarks/world.py                        # seeds 0-3 easy, 0-2 hard: about 20 minutes on 2 cores
    python benchmarks/world.py --easy 0 --hard 0 --json -
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

# Threads that spin while they wait make a job many times slower on a shared machine; read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from claims import Claims, add_json, everything
from transformers.utils import logging as transformers_logging

from clue.data.world import World, build_world, cached_models
from clue.evaluate import Evaluation, EvaluationSets, evaluate
from clue.jobs import DEMO
from clue.pipeline import locate
from clue.unlearn import unlearn

#: Learning rate of the peer: of 2e-5, 5e-5, 1e-4, 2e-4, 4e-4 and 1e-3 the one that keeps most over the seven worlds among
#: those that forget everything within the demo's 500 steps (5e-5 a mean of 0.87; 4e-4, the best on the easy world of seed 0,
#: of 0.72; 2e-5 leaves a fifth of the records).
PEER_LR = 5e-5


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(model: Any, world: World) -> Evaluation:
    sets = EvaluationSets(forget=world.forget, retain=world.retain_unseen, forget_paraphrase=world.forget_paraphrase,
                          retain_extra={"retain_paraphrase": world.retain_paraphrase}, skills=world.skills,
                          holdout=world.holdout)
    return evaluate(model, world.tokenizer, sets, replace(DEMO.evaluate, rouge=False, bootstrap=0))


def experiment(setting: str, seed: int, peer_lr: float) -> dict[str, Any]:
    """One world: before, gold, CLUE and the peer."""
    world = build_world(setting, seed)
    base, gold = cached_models(world, seed=seed)
    retain = {"retain": world.retain, **world.skills_train}
    seconds: dict[str, float] = {}
    results = {"before": measure(base, world), "gold": measure(gold, world)}

    model = copy.deepcopy(base)
    start = time.process_time()
    plan = locate(model, world.tokenizer, world.forget, retain, DEMO.localize, seed=seed).plan
    seconds["localize"] = time.process_time() - start
    start = time.process_time()
    log = unlearn(model, world.tokenizer, world.forget, retain, plan, DEMO.unlearn, seed=seed)
    seconds["clue"] = time.process_time() - start
    results["clue"] = measure(model, world)

    model = copy.deepcopy(base)
    plain = replace(DEMO.unlearn, objective="graddiff", metric=False, lr=peer_lr)
    start = time.process_time()
    peer_log = unlearn(model, world.tokenizer, world.forget, retain, everything(model), plain, seed=seed)
    seconds["peer"] = time.process_time() - start
    results["peer"] = measure(model, world)

    run = {"setting": setting, "seed": seed, "steps": log.steps, "peer_steps": peer_log.steps,
           "forgotten": log.final_forgotten, "peer_forgotten": peer_log.final_forgotten,
           "weights": plan.weights_changed / sum(p.numel() for p in base.parameters()), "plan": plan.counts(),
           "cpu_seconds": seconds}
    for name, e in results.items():
        run[name] = {"forget": e.forget, "forget_paraphrase": e.forget_paraphrase, "retain": e.retain,
                     "retain_paraphrase": e.detail["retain_paraphrase"].accuracy, "skills": e.skills,
                     "mia_auc": e.mia_auc}
    say(f"{setting} {seed} (peer lr {peer_lr}, {peer_log.steps} steps, {peer_log.final_forgotten:.2f} forgotten): " + "; ".join(
        f"{name} forget {run[name]['forget']:.3f}, retain {run[name]['retain']:.3f}, MIA {run[name]['mia_auc']:.2f}"
        for name in results) + f"; {log.steps} steps, {run['weights']:.0%} of the weights")
    return run


def claims(runs: Sequence[dict[str, Any]]) -> Claims:
    """Means over worlds, and the worst world where a bound must hold in each."""
    def column(name: str, of: Any) -> np.ndarray:
        return np.array([of(run[name]) for run in runs])

    def drop(name: str) -> np.ndarray:
        return np.array([max(run["before"]["skills"][s] - run[name]["skills"][s] for s in run["before"]["skills"])
                         for run in runs])

    found = Claims()
    for key, what in (("forget", "forget accuracy"), ("forget_paraphrase", "the same, phrased as never trained")):
        over = column("clue", lambda r, key=key: r[key]) - column("gold", lambda r, key=key: r[key])
        found.add(f"{what} over gold's, worst world", over.max(), "share of records", "gold: retrained without the facts",
                  "at most 0.05", over.max() <= 0.05)
    ours, theirs = (column(name, lambda r: r["retain"]) for name in ("clue", "peer"))
    found.add("accuracy on people unlearning never saw, worst world", ours.min(), "share of records",
              f"GradDiff on all linear weights: {theirs.min():.4f}", "at least 0.90", ours.min() >= 0.90)
    found.add("accuracy on people unlearning never saw, mean", ours.mean(), "share of records",
              f"GradDiff on all linear weights: {theirs.mean():.4f} (wins {int((ours > theirs).sum())} of {len(runs)})",
              "higher than the peer's", ours.mean() > theirs.mean())
    found.add("largest loss of a skill, worst world", drop("clue").max(), "share of records",
              f"GradDiff on all linear weights: {drop('peer').max():.4f}", "at most 0.05", drop("clue").max() <= 0.05)
    gaps = [np.abs(column(name, lambda r: r["mia_auc"]) - column("gold", lambda r: r["mia_auc"])) for name in ("clue", "peer")]
    found.add("distance of the loss attack's AUC from gold's, mean", gaps[0].mean(), "AUC",
              f"GradDiff on all linear weights: {gaps[1].mean():.4f}", "at most 0.1", gaps[0].mean() <= 0.1)
    share = np.mean([run["weights"] for run in runs])
    found.add("weights that may move", share, "of all", "GradDiff: every linear weight", "at most 0.2", share <= 0.2)
    cost = np.mean([(run["cpu_seconds"]["localize"] + run["cpu_seconds"]["clue"]) / run["cpu_seconds"]["peer"]
                    for run in runs])
    found.add("CPU time of localizing and unlearning", cost, "times the peer's", "GradDiff on all linear weights")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--easy", default="0,1,2,3", help="seeds of easy worlds, comma-separated; empty for none")
    parser.add_argument("--hard", default="0,1,2", help="seeds of hard worlds")
    parser.add_argument("--peer-lr", type=float, default=PEER_LR)
    add_json(parser)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    worlds = [(setting, int(seed)) for setting in ("easy", "hard") for seed in getattr(arguments, setting).split(",") if seed]
    runs = [experiment(setting, seed, arguments.peer_lr) for setting, seed in worlds]
    claims(runs).report(arguments.json, runs=runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TOFU on SmolLM2-135M-Instruct: taught, then unlearned with CLUE, against plain gradient difference on all linear weights.

Per seed: the model is taught the forget authors, retain authors and unseen authors (whole authors, 20 questions each, so
that "unseen" questions really are independent of what unlearning is shown). CLUE then localizes on forget and retain
records and unlearns; the peer is GradDiff on every linear weight, without plan and without retain metric, stopped by the
same rule at the same forget probability. A gold model is taught without the forget authors. Taught models are cached.

    python benchmarks/tofu_smollm2.py --data FOLDER            # forget01 (40 questions), CPU, under 40 minutes per seed
    python benchmarks/tofu_smollm2.py --data FOLDER --device cuda --split forget10 --authors 40 --seeds 0,1,2

``--data`` (or ``$CLUE_TOFU``) is the folder with TOFU's JSON files (``full.json``, ``forget01.json``,
``forget01_perturbed.json``, ...).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claims, add_json, everything
from smollm2 import cache_folder, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import clue
from clue.data.encoding import batches, encode, pad_id
from clue.evaluate import Evaluation, EvaluationSets, evaluate
from clue.model.answers import answer_logits
from clue.unlearn import answer_log_probs
from clue.unlearn.loop import unlearn

PER_AUTHOR = 20
RECIPE = 1  # of teaching; part of the cache key


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_sets(data: Path, split: str, authors: int, seed: int) -> dict[str, clue.RecordSet]:
    """forget and its paraphrase; retain, unseen and holdout from disjoint authors drawn by seed."""
    full, forget = clue.read(data / "full.json", "full"), clue.read(data / f"{split}.json", "forget")
    gone = {(r.prompt, r.answer) for r in forget}
    rest = [r for r in full if (r.prompt, r.answer) not in gone]
    if len(rest) + len(forget) != len(full) or len(rest) % PER_AUTHOR:
        raise SystemExit(f"{data}: {split}.json is not a part of full.json in whole authors of {PER_AUTHOR} questions")
    blocks = [rest[i:i + PER_AUTHOR] for i in range(0, len(rest), PER_AUTHOR)]
    order = np.random.default_rng(seed).permutation(len(blocks))
    sets = {"forget": forget}
    for i, name in enumerate(("retain", "unseen", "holdout")):
        chosen = order[i * authors:(i + 1) * authors]
        sets[name] = clue.RecordSet(name, tuple(r for b in sorted(chosen) for r in blocks[b]))
    rows = [json.loads(line) for line in (data / f"{split}_perturbed.json").read_text().splitlines() if line.strip()]
    sets["paraphrase"] = clue.read([{"question": r["paraphrased_question"], "answer": r["answer"]} for r in rows
                                    if r["paraphrased_question"] != r["question"]], "forget_paraphrase")
    return sets


def fast_in_half(device: str) -> bool:
    """Whether bf16 is worth it: processors without units for it emulate it at a fifth of float32's speed."""
    if device == "cuda":
        return True
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        a @ a
        start = time.process_time()
        for _ in range(10):
            a @ a
        seconds.append(time.process_time() - start)
    return seconds[1] < seconds[0]


def teach(source: Path, records: Sequence[clue.RecordSet], device: str, seed: int, epochs: int, name: str) -> Path:
    """Fine-tune all weights on the records (answer loss, AdamW lr 5e-5, batch 8, float32 weights, bf16 where it is fast)."""
    merged = clue.RecordSet(name, tuple(r for s in records for r in s))
    key = f"tofu-{RECIPE}-{merged.sha256[:12]}-{epochs}-{seed}"
    target = cache_folder() / key
    if (target / "config.json").exists():
        say(f"{name}: taught earlier, {target}")
        return target
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).train()
    examples = encode(merged, tokenizer, max_length=512)
    generator = torch.Generator().manual_seed(seed)
    half = fast_in_half(device)
    steps, done, start = epochs * math.ceil(len(examples) / 8), 0, time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 10) * max(0.1, 1 - s / steps))
    for _ in range(epochs):
        for batch in batches(examples, 8, generator=generator, pad=pad_id(tokenizer), device=device):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
                logits, labels = answer_logits(model, batch)
            log_p, count = answer_log_probs(logits.float(), labels)
            loss = -log_p.sum() / count.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 25 == 0:
                say(f"{name}: step {done}/{steps}, loss {loss.item():.3f}, {time.process_time() - start:.0f} CPU-s")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model.save_pretrained(Path(scratch) / "model")
        tokenizer.save_pretrained(Path(scratch) / "model")
        os.replace(Path(scratch) / "model", target)
    return target


def experiment(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: before, gold, CLUE and the peer."""
    sets = load_sets(arguments.data, arguments.split, arguments.authors, seed)
    say(f"seed {seed}: " + ", ".join(f"{name} {len(s)}" for name, s in sets.items()))
    known = [sets[name] for name in ("forget", "retain", "unseen")]
    source = smollm2()
    taught = teach(source, known, arguments.device, seed, arguments.epochs, "taught")
    tokenizer = AutoTokenizer.from_pretrained(taught)

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device).eval()

    measured = EvaluationSets(forget=sets["forget"], retain=sets["unseen"], forget_paraphrase=sets["paraphrase"],
                              retain_extra={"retain_seen": sets["retain"]}, holdout=sets["holdout"])
    settings = clue.EvaluateSettings(batch_size=16, rouge_limit=arguments.rouge, max_new_tokens=96)
    seconds: dict[str, float] = {}
    results: dict[str, Evaluation] = {}

    def measure(name: str, model: Any) -> None:
        start = time.process_time()
        results[name] = evaluate(model, tokenizer, measured, settings, seed=seed)
        detail = results[name].to_json()["detail"]
        say(f"seed {seed}: {name} ({time.process_time() - start:.0f} CPU-s to evaluate): " + "; ".join(
            f"{s} probability {d['probability']:.3f}, token accuracy {d['token_accuracy']:.3f}, ROUGE-L "
            f"{d['rouge_l'] if d['rouge_l'] is None else round(d['rouge_l'], 3)}" for s, d in detail.items()))

    model = load(taught)
    measure("before", model)
    start = time.process_time()
    localize = clue.LocalizeSettings(edges=arguments.edges, neurons=arguments.neurons, batch_size=8)
    plan = clue.localize(model, tokenizer, sets["forget"], sets["retain"], localize, seed=seed, progress=say)
    seconds["localize"] = time.process_time() - start
    train = clue.UnlearnSettings(objective=arguments.objective, lr=arguments.lr, steps=arguments.steps, batch_size=8, warmup=5,
                                 floor=arguments.floor, check_every=2)

    def on_step(step: dict[str, Any]) -> None:
        if step["step"] % 5 == 0:
            say(f"step {step['step']}: forget probability {step['forget_probability']:.3f}, forgotten "
                f"{step['forgotten']:.2f}, retain loss {step['retain_loss']:.3f}")

    start = time.process_time()
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, train, seed=seed, on_step=on_step)
    seconds["unlearn"] = time.process_time() - start
    measure("clue", model)

    model = load(taught)
    whole = everything(model)
    start = time.process_time()
    peer_log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, whole,
                       replace(train, objective="graddiff", metric=False, lr=2e-5), seed=seed, on_step=on_step)
    seconds["peer"] = time.process_time() - start
    measure("graddiff", model)
    if arguments.gold:
        gold = teach(source, known[1:], arguments.device, seed, arguments.epochs, "gold")
        measure("gold", load(gold))
    return {"seed": seed, "weights": plan.weights_changed / whole.weights_changed, "plan": plan.counts(),
            "steps": log.steps, "peer_steps": peer_log.steps, "cpu_seconds": seconds,
            **{name: {"mia_auc": e.to_json()["mia_auc"], **e.to_json()["detail"]} for name, e in results.items()}}


def claims(runs: Sequence[dict[str, Any]]) -> Claims:
    """Means over seeds; retention is read on authors that unlearning never saw."""
    def mean(method: str, group: str, name: str) -> float:
        return float(np.mean([run[method][group][name] for run in runs]))

    found = Claims()
    forget = mean("clue", "forget", "probability")
    other = mean("graddiff", "forget", "probability")
    found.add("forget probability after CLUE", forget, "mean answer-token probability",
              f"GradDiff on all linear weights: {other:.4f}", "matched, within 0.05", abs(forget - other) <= 0.05)
    for name, unit in (("probability", "mean answer-token probability"), ("token_accuracy", "share of answer tokens")):
        ours, theirs = mean("clue", "retain", name), mean("graddiff", "retain", name)
        found.add(f"{name.replace('_', ' ')} on unseen retain authors after CLUE", ours, unit,
                  f"GradDiff on all linear weights: {theirs:.4f}; before: {mean('before', 'retain', name):.4f}",
                  "higher than the peer's", ours > theirs)
    share = float(np.mean([run["weights"] for run in runs]))
    found.add("share of linear weights that may move", share, "of 1", "GradDiff: 1", "below 0.5", share < 0.5)
    cost = float(np.mean([(run["cpu_seconds"]["localize"] + run["cpu_seconds"]["unlearn"]) / run["cpu_seconds"]["peer"]
                          for run in runs]))
    found.add("CPU time of localizing and unlearning", cost, "times the peer's", "GradDiff on all linear weights")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("CLUE_TOFU"),
                        help="folder with TOFU's JSON files (default: $CLUE_TOFU)")
    parser.add_argument("--split", default="forget01", choices=("forget01", "forget05", "forget10"))
    parser.add_argument("--authors", type=int, default=2, help="retain authors shown; as many unseen, as many held out")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--edges", type=float, default=0.02)
    parser.add_argument("--neurons", type=float, default=0.10)
    parser.add_argument("--objective", default="npo", help="of CLUE: npo or npo-cf")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--floor", type=float, default=0.2, help="answer probability at which a record is forgotten")
    parser.add_argument("--rouge", type=int, default=12, help="generated answers per set; 0 means all")
    parser.add_argument("--gold", action=argparse.BooleanOptionalAction, default=True, help="also teach a gold model")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.data is None:
        say("left out: TOFU is not here (give its folder with --data, or set CLUE_TOFU)")
        return 0
    if not (arguments.data / "full.json").is_file():
        parser.error(f"{arguments.data} holds no full.json: give the folder with TOFU's JSON files")
    transformers_logging.disable_progress_bar()
    wall = time.time()
    runs = [experiment(arguments, int(seed)) for seed in arguments.seeds.split(",")]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    claims(runs).report(arguments.json, runs=runs, device=device, wall_seconds=round(time.time() - wall),
                        arguments={name: str(value) for name, value in vars(arguments).items() if name not in ("data", "json")})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TOFU on SmolLM2-135M-Instruct: taught, then unlearned at CLUE's weights and at others', the same number of them.

Per seed: the model is taught the forget authors, retain authors and unseen authors (whole authors, 20 questions each, so
that "unseen" questions really are independent of what unlearning is shown). Every localization then unlearns with the same
objective and the same learning rates, as in ``clue compare``, and is read where it has forgotten as much. A gold model is
taught without the forget authors; forget quality compares the truth ratios of the two, and model utility is that of unseen
authors, real authors and world facts. Taught models are cached.

    python benchmarks/tofu_smollm2.py --data FOLDER            # forget01 (40 questions), one seed, two hours of one core
    python benchmarks/tofu_smollm2.py --data FOLDER --device cuda --split forget10 --authors 6 --seeds 0,1,2

``--data`` (or ``$CLUE_TOFU``) is the folder with TOFU's JSON files (``full.json``, ``forget01.json``,
``forget01_perturbed.json``, ...).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claims, add_json
from smollm2 import cache_folder, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import clue
from clue.compare import Row, Task, Tuning, compare, validated
from clue.config import Settings
from clue.data import benchmarks as clue_benchmarks
from clue.data.encoding import batches, encode, pad_id
from clue.evaluate import EvaluationSets
from clue.evaluate.comparison import Group, grouped
from clue.model.answers import answer_logits
from clue.report.comparison import comparison_json, comparison_table
from clue.run_directory import Run
from clue.unlearn import answer_log_probs

PER_AUTHOR = 20
RECIPE = 2  # of teaching; part of the cache key


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_sets(data: Path, split: str, authors: int, general: int, seed: int) -> dict[str, clue.RecordSet]:
    """Every set, in full: ``forget`` and its paraphrase; ``retain``, ``unseen`` and ``holdout`` from disjoint authors drawn
    by seed, of those that TOFU gives wrong answers for; ``general`` questions each of real authors and world facts."""
    benchmark = clue_benchmarks.load(f"tofu:{split}", data)
    assert benchmark.forget is not None and benchmark.forget_paraphrase is not None
    blocks: dict[int, list[clue.Record]] = {}
    for place, record in enumerate(benchmark.retain["retain"]):
        blocks.setdefault(place // PER_AUTHOR, []).append(record)
    order = np.random.default_rng(seed).permutation(len(blocks))
    if len(order) < 3 * authors:
        raise SystemExit(f"{data}: wrong answers are there for {len(order)} whole authors, --authors {authors} needs"
                         f" {3 * authors}")
    sets = {"forget": benchmark.forget, "paraphrase": benchmark.forget_paraphrase}
    for i, name in enumerate(("retain", "unseen", "holdout")):
        chosen = sorted(order[i * authors:(i + 1) * authors])
        sets[name] = clue.RecordSet(name, tuple(r for b in chosen for r in blocks[b]))
    for name, records in benchmark.skills.items():
        chosen = set(np.random.default_rng(seed).permutation(len(records))[:general].tolist())
        sets[name] = clue.RecordSet(name, tuple(r for place, r in enumerate(records) if place in chosen))
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


def task_of(arguments: argparse.Namespace, seed: int) -> Task:
    """Taught model, gold model and records of one seed."""
    sets = load_sets(arguments.data, arguments.split, arguments.authors, arguments.general, seed)
    say(f"seed {seed}: " + ", ".join(f"{name} {len(s)}" for name, s in sets.items()))
    known = [sets[name] for name in ("forget", "retain", "unseen")]
    device, dtype = arguments.device, torch.bfloat16 if fast_in_half(arguments.device) else torch.float32
    taught, gold = (teach(smollm2(), records, device, seed, arguments.epochs, f"seed {seed}, {name}")
                    for name, records in (("taught", known), ("gold", known[1:])))

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def plain(records: clue.RecordSet) -> clue.RecordSet:
        """Without wrong answers, which cost most of an evaluation's time: where only the true ones are looked at."""
        return clue.RecordSet(records.name, tuple(replace(r, wrong=(), paraphrased=None) for r in records))

    seen, validation = validated({"retain": plain(sets["retain"])}, seed)
    skills = {name: sets[name] for name in ("real_authors", "world_facts")}
    measured = EvaluationSets(forget=sets["forget"], retain=sets["unseen"], forget_paraphrase=plain(sets["paraphrase"]),
                              retain_extra={"retain_seen": seen["retain"], **validation}, skills=skills,
                              holdout=plain(sets["holdout"]), utility=("retain", *skills))
    tokenizer = AutoTokenizer.from_pretrained(taught)
    return Task(f"tofu-{arguments.split}", seed, lambda: (load(taught), tokenizer), lambda: load(gold), sets["forget"], seen,
                measured, {name: records.sha256 for name, records in sets.items()})


def claims(group: Group, level: float) -> Claims:
    """Means over seeds; retention is read on authors that unlearning never saw."""
    found = Claims()
    before, gold = group.reference["before"], group.reference["gold"]
    ours = next(row for row in group.rows if row.row == "clue")
    found.add("forget records that count as forgotten after CLUE", ours.forgotten, "of 1", "", f"at least {level:g}",
              ours.reached == len(ours.seeds))
    quality, utility = ours.measures["forget_quality"], ours.measures["model_utility"]
    least = quality.mean if quality.low is None else quality.low
    found.add("forget quality after CLUE", quality.mean, f"p of the KS test (at least {least:.3f})",
              f"before: {before['forget_quality']:.2g}", "above 0.05 at every seed", least > 0.05)
    found.add("model utility after CLUE", utility.mean / gold["model_utility"], "times gold's",
              f"{utility.mean:.3f}; gold: {gold['model_utility']:.3f}, before: {before['model_utility']:.3f}", "at least 0.95",
              utility.mean >= 0.95 * gold["model_utility"])
    for row in group.rows:
        for name, key in (("probability", "retain.probability"), ("model utility", "model_utility")):
            if row.against is None:
                continue
            theirs, ahead = row.measures[key], row.against[key]
            spread = "" if ahead.low is None else f" ({-ahead.high:.4f} to {-ahead.low:.4f})"
            found.add(f"{name}{' of unseen authors' if name == 'probability' else ''}, CLUE ahead of {row.row} by",
                      -ahead.mean, "of 1" + spread, f"{row.row}: {theirs.mean:.4f}, CLUE: {ours.measures[key].mean:.4f}",
                      "above 0", ahead.mean < 0)
    found.add("share of the weights that may move", ours.share, "of 1", "", "at most 0.2", ours.share <= 0.2)
    found.add("CPU time of localizing and unlearning", ours.localize_seconds + ours.train_seconds, "s",
              ", ".join(f"{r.row}: {r.localize_seconds + r.train_seconds:.0f} s" for r in group.rows if r is not ours))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("CLUE_TOFU"),
                        help="folder with TOFU's JSON files (default: $CLUE_TOFU)")
    parser.add_argument("--split", default="forget01", choices=("forget01", "forget05", "forget10"))
    parser.add_argument("--authors", type=int, default=2, help="retain authors shown; as many unseen, as many held out")
    parser.add_argument("--general", type=int, default=30, help="questions each of real authors and world facts")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="0 leaves this to torch")
    parser.add_argument("--epochs", type=int, default=10, help="of teaching")
    parser.add_argument("--localization", default="clue,random,wagle,sure,all", help="rows, as of clue compare")
    parser.add_argument("--objective", default="npo-cf", help="comma-separated")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the linear maps' weights that CLUE's circuits hold")
    parser.add_argument("--lrs", default="5e-5,2e-4", help="learning rates of every row, comma-separated")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--floor", type=float, default=0.2, help="answer probability at which a record is forgotten")
    parser.add_argument("--levels", default="0.8", help="shares of forgotten records at which models are measured")
    parser.add_argument("--rouge", type=int, default=12, help="generated answers per set; 0 means all")
    parser.add_argument("--run", type=Path, help="folder of the comparison, made or gone on with")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.data is None:
        say("left out: TOFU is not here (give its folder with --data, or set CLUE_TOFU)")
        return 0
    if not (arguments.data / "full.json").is_file():
        parser.error(f"{arguments.data} holds no full.json: give the folder with TOFU's JSON files")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    wall = time.time()
    settings = replace(
        Settings(), localize=clue.LocalizeSettings(ratio=arguments.ratio, batch_size=8),
        unlearn=clue.UnlearnSettings(steps=arguments.steps, batch_size=8, warmup=5, floor=arguments.floor, check_every=3,
                                     metric_every=30),
        evaluate=clue.EvaluateSettings(batch_size=16, rouge_limit=arguments.rouge, max_new_tokens=64, bootstrap=0))
    lrs, levels = (tuple(sorted(float(x) for x in text.split(","))) for text in (arguments.lrs, arguments.levels))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.run or Path(scratch) / "run"
        run = Run.open(folder) if (folder / "run.json").exists() else Run.create(folder, settings.to_dict(), kind="compare")
        cells, references = compare(run, [partial(task_of, arguments, seed) for seed in seeds],
                                    [Row.of(name) for name in arguments.localization.split(",")],
                                    arguments.objective.split(","), settings, Tuning(lrs, levels), progress=say)
    groups = grouped(cells, references, levels[-1], levels)
    say(comparison_table(groups, levels[-1]))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    rows = comparison_json(groups, target=levels[-1], levels=levels, lrs=lrs, seeds=seeds)
    claims(groups[0], levels[-1]).report(
        arguments.json, results=rows, device=device, wall_seconds=round(time.time() - wall),
        arguments={name: str(value) for name, value in vars(arguments).items() if name not in ("data", "json", "run")})
    return 0


if __name__ == "__main__":
    sys.exit(main())

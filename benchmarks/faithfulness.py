"""What the ways of attribution find: gates of random formulas, and circuits of SmolLM2-135M that answer as it does.

- Formulas of three to seven AND, OR and ADDER gates, built by hand into a Llama (tests/circuit/test_known_truth.py): the
  share of their edges that are found, and found with the right gate.
- Indirect object identification, capitals and number agreement: MIB's CMD, the area between 1 and the share of the answer
  that circuits of a thousandth to all of the edges keep when they run alone; 0 is best. Prompts are drawn by seed; those
  stay where the corrupted prompt changes the answer.

The peer is EAP-IG (``path = full``), at as many steps.

    python benchmarks/faithfulness.py [--seeds 3] [--pairs 16] [--formulas 40] [--json -]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claims, add_json
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from clue.circuit.attribution import attribute
from clue.circuit.confirmation import confirm
from clue.circuit.faithfulness import curve
from clue.circuit.selection import build_circuit
from clue.config import LocalizeSettings
from clue.errors import AttributionError, CircuitError
from clue.model.anatomy import Anatomy, anatomy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.circuit.test_attribution import make_pairs
from tests.circuit.test_known_truth import ONES, YES, ZEROS, cleaned, formula_of, planted, random_formula
from tests.oracles.attribution import InDouble

#: Shares of the edges on a curve.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: name -> how attribution is done
WAYS = {f"{path}, {steps} steps": LocalizeSettings(path=path, path_steps=steps)
        for steps in (2, 4) for path in ("half", "chained", "full")}

NAMES = ["Mary", "John", "James", "Robert", "Michael", "David", "Sarah", "Anna", "Emma", "Tom", "Paul",
          "Mark", "Peter", "George", "Alice", "Kate", "Jack", "Henry", "Laura", "Susan"]
PLACES = ["store", "park", "school", "garden", "library", "beach"]
GIFTS = ["drink", "book", "ball", "letter", "key", "ring"]
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
            "Egypt": "Cairo", "Greece": "Athens", "China": "Beijing", "Portugal": "Lisbon", "Ireland": "Dublin",
            "England": "London", "Cuba": "Havana", "Norway": "Oslo"}
NOUNS = ["key", "car", "dog", "book", "teacher", "author", "picture", "house"]


def objects(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Clean prompt, corrupted prompt, answer."""
    while True:
        giver, taker = rng.sample(NAMES, 2)
        first, second = rng.sample((giver, taker), 2)
        begin = f"Then, {first} and {second} went to the {rng.choice(PLACES)}."
        gift = rng.choice(GIFTS)
        yield f"{begin} {giver} gave a {gift} to", f"{begin} {taker} gave a {gift} to", taker


def capitals(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    while True:
        country, other = rng.sample(sorted(CAPITALS), 2)
        yield f"The capital of {country} is the city of", f"The capital of {other} is the city of", CAPITALS[country]


def agreement(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    while True:
        noun, place = rng.choice(NOUNS), rng.choice(PLACES)
        one, many = f"The {noun} near the {place}", f"The {noun}s near the {place}"
        yield rng.choice(((one, many, "is"), (many, one, "are")))


TASKS = {"indirect objects": objects, "capitals": capitals, "agreement": agreement}


def draw(task: str, seed: int, count: int, model: Any, tokenizer: Any) -> Any:
    """Pairs whose prompts are equally long, whose answer is one token, and of which the clean prompt makes the answer likelier
    than what the corrupted prompt answers."""
    rows: list[list[int]] = []
    others: list[list[int]] = []
    for clean, corrupted, answer in islice(TASKS[task](random.Random(seed)), 100 * count):
        here, away, told = (tokenizer(text, add_special_tokens=False).input_ids for text in (clean, corrupted, f" {answer}"))
        if len(here) != len(away) or len(told) != 1 or (here + told, away + told) in zip(rows, others, strict=True):
            continue
        with torch.no_grad():
            logits = model(torch.tensor([here, away])).logits[:, -1]
        contrast = int(logits[1].argmax())
        if contrast != told[0] and logits[0, told[0]] > logits[0, contrast]:
            rows.append(here + told)
            others.append(away + told)
        if len(rows) == count:
            return make_pairs(rows, others, [len(row) - 1 for row in rows])
    raise SystemExit(f"{task}: only {len(rows)} of {count} pairs change the model's answer: ask for fewer (--pairs)")


def faithfulness(claims: Claims, body: Anatomy, tokenizer: Any, seeds: int, count: int) -> dict[str, Any]:
    """The curves of every task, way and seed, and what they come to."""
    found: dict[str, Any] = {}
    for task in TASKS:
        areas: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            pairs = draw(task, seed, count, body.model, tokenizer)
            for way, settings in WAYS.items():
                run = curve(body, pairs, attribute(body, pairs, settings), FRACTIONS)
                areas[way].append(run.cmd)
                found.setdefault(task, {}).setdefault(way, []).append(
                    {"seed": seed, "cpr": run.cpr, "cmd": run.cmd, "faithfulness": run.faithfulness.tolist()})
                print(f"{task}, seed {seed}, {way}: CMD {run.cmd:.4f}, CPR {run.cpr:.4f}", file=sys.stderr, flush=True)
        for way, values in areas.items():
            path, steps = way.split(", ")
            if path != "full":
                peer = areas[f"full, {steps}"]
                claims.add(f"{task}: CMD of {way}, mean of {seeds} seeds ({min(values):.3f} to {max(values):.3f})",
                           float(np.mean(values)), "area", f"EAP-IG, {steps}: {np.mean(peer):.4f}", "at most EAP-IG's",
                           np.mean(values) <= np.mean(peer))
    return found


def gates(claims: Claims, formulas: int) -> None:
    """Edges of random formulas."""
    ways = {"half, 2 steps": (LocalizeSettings(), False), "half, 16 steps, confirmed": (LocalizeSettings(path_steps=16), True),
            "chained, 2 steps": (LocalizeSettings(path="chained"), False),
            "EAP-IG, 16 steps": (LocalizeSettings(path="full", path_steps=16), False)}
    seen = {way: np.zeros(2) for way in ways}
    total = 0
    pairs = make_pairs([[ONES, YES]], [[ZEROS, YES]], [1])
    with InDouble():
        for seed in range(formulas):
            formula, bits = random_formula(seed)
            body = anatomy(planted(formula, bits))
            total += sum(len(inputs) for _, inputs in formula)
            for way, (settings, confirmed) in ways.items():
                settings = replace(settings, edges=1.0, neurons=1.0, granularity="block", confirm=99 if confirmed else 0)
                try:
                    circuit = build_circuit(cleaned(attribute(body, pairs, settings)), settings)
                except (AttributionError, CircuitError):  # nothing shows, or nothing on a path
                    continue
                circuit = confirm(body, pairs, circuit, settings) if confirmed else circuit
                read = formula_of(circuit)
                for number, (gate, inputs) in enumerate(formula):
                    labels = [read.get(f"m{number}", {}).get(one) for one in inputs]
                    seen[way] += sum(label is not None for label in labels), labels.count(gate)
    for way, (edges, right) in seen.items():
        told = way.startswith("chained")
        claims.add(f"{formulas} formulas, {way}: edges found with the right gate", right / total, "of all",
                   f"{edges / total:.3f} found at all", "1" if told else "", not told or right == total)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--formulas", type=int, default=40)
    add_json(parser)
    args = parser.parse_args()
    claims = Claims()
    gates(claims, args.formulas)
    place = smollm2()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    curves = faithfulness(claims, anatomy(model), AutoTokenizer.from_pretrained(place), args.seeds, args.pairs)
    claims.report(args.json, curves=curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())

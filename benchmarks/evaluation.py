"""Greedy answers in batches against one question at a time, on TOFU's forget set.

The peer is ``model.generate`` of transformers, a question at a time, which is what evaluation scripts do where padding
would change the answers. Ours sorts by length, pads on the left, keeps the cache and lets answers that have ended leave the
batch. Both say the same, up to ties that rounding decides.

    python benchmarks/evaluation.py --data FOLDER                   # all 400 questions of forget10, SmolLM2-135M-Instruct
    python benchmarks/evaluation.py --data FOLDER --questions 32    # evenly spaced over the 400
    python benchmarks/evaluation.py                                 # without TOFU: 400 questions of the embedded world

``--data`` (or ``$CLUE_TOFU``) is the folder with TOFU's JSON files.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
from claims import Claims, add_json
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import clue
from clue.data.benchmarks import load
from clue.data.encoding import encode, pad_id
from clue.data.world import build_world, cached_models
from clue.evaluate.generation import generate


def one_by_one(model: Any, tokenizer: Any, examples: list[Any], max_new_tokens: int) -> list[str]:
    """The peer: ``generate`` for each question by itself, without padding."""
    plain = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad_id(tokenizer),
                             eos_token_id=tokenizer.eos_token_id)
    answers = []
    for example in examples:
        prompt = torch.from_numpy(example.input_ids[None, :example.answer_start])
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=plain)
        answers.append(tokenizer.decode(output[0, prompt.shape[1]:], skip_special_tokens=True).strip())
    return answers


def questions(arguments: argparse.Namespace) -> tuple[str, Any, Any, list[Any]]:
    """What is asked, and who answers."""
    if arguments.data is None:
        world = build_world()
        model, tokenizer = cached_models(world)[0], world.tokenizer
        records = [*world.forget, *world.retain, *world.retain_unseen]
        name = "the world's model"
    else:
        from smollm2 import smollm2

        source = smollm2()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer, name = AutoTokenizer.from_pretrained(source), "SmolLM2-135M-Instruct"
        records = [*load("tofu:forget10", arguments.data).shown["forget"]]
    chosen = [records[i * len(records) // arguments.questions] for i in range(arguments.questions)]
    return name, model, tokenizer, encode(clue.RecordSet("questions", tuple(chosen)), tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("CLUE_TOFU"),
                        help="folder with TOFU's JSON files (default: $CLUE_TOFU)")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=clue.EvaluateSettings().batch_size)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    add_json(parser)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    name, model, tokenizer, examples = questions(arguments)

    def batched(some: list[Any]) -> list[str]:
        return generate(model, tokenizer, some, pad=pad_id(tokenizer), batch_size=arguments.batch_size,
                        max_new_tokens=arguments.max_new_tokens)

    batched(examples[:2])
    one_by_one(model, tokenizer, examples[:1], 4)
    start = time.process_time()
    ours = batched(examples)
    middle = time.process_time()
    theirs = one_by_one(model, tokenizer, examples, arguments.max_new_tokens)
    seconds = middle - start, time.process_time() - middle
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)

    found = Claims()
    peer = f"generate, a question at a time: {seconds[1]:.1f} CPU-s for {len(ours)} questions, {name}"
    found.add("greedy answers in batches", seconds[1] / seconds[0], "times faster, CPU time", peer, "at least 5",
              seconds[1] >= 5 * seconds[0])
    found.add("answers that are the same", equal, "share", peer, "all, but for ties that rounding decides", equal >= 0.98)
    found.report(arguments.json,
                 arguments={key: value for key, value in vars(arguments).items() if key not in ("data", "json")},
                 cpu_seconds={"batched": seconds[0], "one by one": seconds[1]},
                 tokens=sum(len(tokenizer(answer)["input_ids"]) for answer in ours))
    return 0


if __name__ == "__main__":
    sys.exit(main())

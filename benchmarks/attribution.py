"""Attribution: what scoring every edge and neuron costs beyond the model's own passes, and the neuron kernel against torch.

- The whole: :func:`clue.circuit.attribution.attribute` over a set of pairs, against two forward and two backward passes of
  the same batches by the same model (activation gradients only, logits at answer positions only). The model has the shape
  of SmolLM2-135M and random weights, which take the same time.
- The neuron kernel against torch and against reading its inputs: see ``neuron_kernel.py``.

CPU time, one process, interleaved, medians after a warm-up.

    python benchmarks/attribution.py [--layers 30] [--json -]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import neuron_kernel
import numpy as np
import torch
from claims import Claims, add_json
from transformers import LlamaConfig, LlamaForCausalLM

from clue import _core
from clue.circuit.attribution import attribute
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.model.anatomy import anatomy
from clue.model.capture import frozen


def medians(repeats: int, **functions: Callable[[], Any]) -> dict[str, float]:
    """Median CPU seconds of each function; rounds are interleaved, and the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(found[1:])) for name, found in seconds.items()}


def make_pairs(count: int, prompt: int, answer: int, vocabulary: int) -> Pairs:
    random = np.random.default_rng(0)
    clean = [random.integers(0, vocabulary, prompt + answer) for _ in range(count)]
    corrupted = [np.concatenate([random.integers(0, vocabulary, prompt), ids[prompt:]]) for ids in clean]
    return Pairs(tuple(clean), tuple(corrupted), np.full(count, prompt), ("given",) * count, ("",) * count)


def whole(layers: int, repeats: int) -> dict[str, float]:
    """Seconds of attribution and of the model's own passes, on 8 pairs of 64 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    body = anatomy(model)
    pairs = make_pairs(8, 32, 32, config.vocab_size)
    ids = [torch.from_numpy(np.stack(rows)) for rows in (pairs.clean, pairs.corrupted)]
    answer = ids[0][:, 32:]

    def passes() -> None:
        with frozen(model):
            for tokens in ids:
                start = model.model.embed_tokens(tokens).requires_grad_()
                logits = model(inputs_embeds=start, use_cache=False, logits_to_keep=torch.arange(31, 63)).logits
                target = logits.gather(-1, answer[..., None]).sum() - logits.amax(-1).sum()
                torch.autograd.grad(target, start)

    settings = LocalizeSettings(batch_size=8)
    return medians(repeats, attribution=lambda: attribute(body, pairs, settings), passes=passes)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="layers of the model; SmolLM2-135M has 30")
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    arguments = parser.parse_args()
    found = Claims()
    seconds = whole(arguments.layers, arguments.repeats)
    ratio = seconds["attribution"] / seconds["passes"]
    found.add("scores of all edges and neurons, Ns and Dn", ratio, "times the passes",
              f"the model's own two forward and two backward passes: {seconds['passes']:.2f} s", "at most 1.3", ratio <= 1.3)
    neuron_kernel.measure(found, arguments.repeats)
    found.report(arguments.json, isa=_core.kernels()["neuron_attribution"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

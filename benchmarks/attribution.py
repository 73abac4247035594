"""Attribution: what scoring every edge and neuron costs beyond the model's own passes, in time and in memory.

- Time: :func:`clue.circuit.attribution.attribute` over a set of pairs, against two forward and two backward passes of the
  same batches by the same model (activation gradients only, logits at answer positions only). The model has the shape of
  SmolLM2-135M and random weights, which take the same time. Expected from operations alone: 1.26 times the passes, for
  prompts that differ from their first token on. What the prompts of a batch share at their beginning (a template) is run
  once, forward alone: of prompts that share a share s, 1.26 - s (1.26 - 0.25).
- Conservation: the larger relative gap of Ns and Dn, in float32 and in bfloat16.
- Scaling: seconds over four numbers of tokens, and seconds beyond neurons alone over four depths.
- Memory: see ``memory.py``; the neuron kernel against torch and against reading its inputs: see ``neuron_kernel.py``.

CPU time, one process, one thread, interleaved, medians after a warm-up.

    python benchmarks/attribution.py [--layers 30] [--memory-width 1] [--json -]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import memory
import neuron_kernel
import numpy as np
import torch
from claims import Claims, add_json, medians
from transformers import LlamaConfig, LlamaForCausalLM

from clue import _core
from clue.circuit.attribution import attribute, graph_of
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.model.anatomy import anatomy
from clue.model.modes import frozen

VOCABULARY = 49152


def smollm2_shape(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True)).eval()


def make_pairs(count: int, prompt: int, answer: int, shared: int = 0, vocabulary: int = VOCABULARY) -> Pairs:
    """Random prompts of which the first ``shared`` tokens are the same in both runs."""
    random = np.random.default_rng(0)
    clean = [random.integers(0, vocabulary, prompt + answer) for _ in range(count)]
    corrupted = [np.concatenate([ids[:shared], random.integers(0, vocabulary, prompt - shared), ids[prompt:]]) for ids in clean]
    return Pairs(tuple(clean), tuple(corrupted), np.full(count, prompt), ("given",) * count, ("",) * count)


def passes(model: LlamaForCausalLM, pairs: Pairs) -> None:
    """Two forward and two backward passes, and nothing else."""
    clean, corrupted = (torch.from_numpy(np.stack(rows)).to(model.device) for rows in (pairs.clean, pairs.corrupted))
    first = int(pairs.answer_start[0])
    answer, keep = clean[:, first:], torch.arange(first - 1, clean.shape[1] - 1)
    with frozen(model):
        for tokens in (clean, corrupted):
            start = model.model.embed_tokens(tokens).requires_grad_()
            logits = model(inputs_embeds=start, use_cache=False, logits_to_keep=keep).logits
            target = logits.gather(-1, answer[..., None]).sum() - logits.amax(-1).sum()
            torch.autograd.grad(target, start)


def time_of_scores(found: Claims, layers: int, repeats: int) -> None:
    """8 pairs of 64 tokens."""
    model = smollm2_shape(layers)
    body = anatomy(model)
    differing, templated, chat = (make_pairs(8, 32, 32, shared=shared) for shared in (0, 16, 31))
    settings = LocalizeSettings(batch_size=8, stream="never")
    seconds = medians(
        repeats, passes=partial(passes, model, differing), edges=partial(attribute, body, differing, settings),
        templated=partial(attribute, body, templated, settings), chat=partial(attribute, body, chat, settings),
        neurons=partial(attribute, body, differing, settings, neurons_only=True),
        chained=partial(attribute, body, differing, LocalizeSettings(batch_size=8, stream="never", path="chained")),
        streamed=partial(attribute, body, differing, LocalizeSettings(batch_size=8, stream="always")))
    peer = f"the model's own two forward and two backward passes: {seconds['passes']:.2f} s"
    for name, claim, goal in (
            ("edges", "all edges and neurons, Ns and Dn, prompts that differ from the first token on", 1.3),
            ("templated", "the same, prompts that share the first quarter of their tokens", 1.3),
            ("chat", "the same, prompts that share the first half (a chat template)", 1.3),
            ("neurons", "all neurons alone, Ns and Dn", 1.1),
            ("chained", "all edges and neurons in chained runs, prompts that differ from the first token on", 1.3),
            ("streamed", "all edges and neurons, streamed: one more forward pass, and the least memory", 0.0)):
        ratio = seconds[name] / seconds["passes"]
        found.add(claim, ratio, "times the passes", peer, f"at most {goal}" if goal else "", not goal or ratio <= goal)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        scores = attribute(anatomy(model.to(dtype)), differing, settings)
        gap = max(scores.gap_ns, scores.gap_dn)
        found.add(f"conservation gap, {str(dtype).removeprefix('torch.')}", gap, "of the sums", "the scores' own sums over"
                  " writers, against the residual stream's difference times the gradient", f"under {most:g}", gap < most)


def scaling(found: Claims, repeats: int) -> None:
    """Seconds of a whole attribution against tokens, at 6 layers; and of what edges add to an attribution of neurons alone
    against edges, at 256 tokens: passes and neurons grow with the layers, edges with their square."""
    def seconds(layers: int, pairs: Pairs) -> dict[str, float]:
        model = smollm2_shape(layers)
        settings = LocalizeSettings(batch_size=8, stream="never")
        whole = partial(attribute, anatomy(model), pairs, settings)
        return medians(repeats, whole=whole, neurons=partial(whole, neurons_only=True))

    def table(claim: str, sizes: list[int], seconds: list[float], unit: str) -> None:
        slope = float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-9)), 1)[0])
        rows = ", ".join(f"{size}: {second:.3f} s" for size, second in zip(sizes, seconds, strict=True))
        found.add(f"{claim} to the power of", slope, f"({unit})", rows, "at most 1.1", slope <= 1.1)

    tokens = [128, 256, 512, 1024]
    table("time grows with tokens", tokens, [seconds(6, make_pairs(count // 32, 16, 16))["whole"] for count in tokens],
          "6 layers")
    depths = [4, 8, 16, 30]
    edges = [int(graph_of(anatomy(smollm2_shape(depth))).residual_edges.sum()) for depth in depths]
    both = [seconds(depth, make_pairs(8, 16, 16)) for depth in depths]
    table("time of edges beyond neurons alone grows with edges", edges, [each["whole"] - each["neurons"] for each in both],
          "256 tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="layers of the model; SmolLM2-135M has 30")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-width", type=int, default=1, help="divide the 8B widths by this; 0 leaves memory out")
    add_json(parser)
    arguments = parser.parse_args()
    found = Claims()
    torch.set_num_threads(1)
    parts: list[Callable[[], Any]] = [
        partial(time_of_scores, found, arguments.layers, arguments.repeats), partial(scaling, found, arguments.repeats),
        partial(neuron_kernel.measure, found, arguments.repeats)]
    if arguments.memory_width:
        parts.append(partial(memory.measure, found, width=arguments.memory_width))
    for part in parts:
        part()
    found.report(arguments.json, isa=_core.kernels()["neuron_attribution"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

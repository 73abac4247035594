"""What only a GPU can show: kernels against its memory's bandwidth, and an 8B and a 1B configuration against themselves.

- Kernels: bytes read and written per second, of the bandwidth that clock and bus width of the memory give (where torch does
  not tell them, of a copy's); the update also against torch's fused AdamW on the whole weight with a mask.
- Attribution of Llama-3-8B's shape in bf16 against two forward and two backward passes of the same batches; and what it
  holds above the weights per token, streamed, from the peaks at two lengths.
- A training step of Llama-3.2-1B's shape at 5% planned weights against the step that trains all (``training_step.py``), and
  the peak of ``clue.unlearn`` on Llama-3-8B's shape: bf16, 5% planned, all conflict, the retain metric on, activation
  checkpointing, 4 records of 256 tokens in a batch.

Weights are random, which costs the same. Times are medians between events on the stream, after a warm-up.

    python benchmarks/gpu.py [--json FILE] [--only kernels,attribution,step,training]
    python benchmarks/gpu.py --rehearse      # the same code on the CPU, on tiny shapes: no number of it means anything
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import memory
import numpy as np
import torch
import training_step
from attribution import make_pairs, passes
from claims import Claims, add_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from clue import unlearn
from clue.circuit.attribution import attribute
from clue.config import LocalizeSettings, UnlearnSettings
from clue.data.encoding import IGNORED, Batch
from clue.data.records import Record, RecordSet
from clue.data.world import build_world
from clue.model.anatomy import anatomy


class Bench:
    """The device, the size of everything, and the claims."""

    def __init__(self, device: str) -> None:
        self.device, self.tiny, self.found = device, device == "cpu", Claims()

    def native(self) -> ModuleType:
        from clue import _core

        if self.tiny:
            return _core
        from clue import _cuda

        return _cuda

    def seconds(self, function: Callable[[], Any], repeats: int = 9) -> float:
        """Median of one call."""
        for _ in range(2):
            function()
        found = []
        for _ in range(repeats):
            if self.tiny:
                start = time.perf_counter()
                function()
                found.append(time.perf_counter() - start)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return float(np.median(found))

    def peak(self, function: Callable[[], Any]) -> int:
        """Bytes above what is there already."""
        gc.collect()
        if self.tiny:
            function()
            return 1
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def bandwidth(self) -> tuple[float, str]:
        """Bytes per second of the memory, and by what."""
        properties = None if self.tiny else torch.cuda.get_device_properties(0)
        clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
        if clock and width:
            return 2 * clock * 1e3 * width / 8, "clock and bus width"
        source = torch.empty(1 << (20 if self.tiny else 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * len(source) / self.seconds(lambda: target.copy_(source)), "a copy"


def kernels(bench: Bench) -> None:
    native, found, device = bench.native(), bench.found, bench.device
    limit, by = bench.bandwidth()
    peer = f"bandwidth by {by}: {limit / 1e9:.0f} GB/s"
    tokens, neurons = (64, 96) if bench.tiny else (16384, 14336)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(tokens, neurons, device=device).to(dtype) for _ in range(4)]
        out = [torch.zeros(neurons, device=device) for _ in range(4)]
        rate = sum(map(_bytes, inputs)) / bench.seconds(partial(native.neuron_attribution, *inputs, *out))
        found.add(f"neuron kernel, {_name(dtype)}: Ns, Dn and squares", rate / limit, "of the bandwidth", peer,
                  "at least 0.80", rate >= 0.80 * limit)
        del inputs
    rows, columns = (64, 96) if bench.tiny else (14336 * 8, 4096)
    count = round(training_step.SHARE * rows)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(rows, columns, device=device).to(dtype)
        half = dtype != torch.float32
        for axis in (0, 1):
            size, length = ((rows, columns), (columns, rows))[axis]
            chosen = round(training_step.SHARE * size)
            start = (size - chosen) // 2
            index = torch.arange(start, start + chosen, device=device)  # contiguous
            gradient = torch.randn(chosen, length, device=device).to(dtype)
            state = [torch.zeros(chosen, length, device=device) for _ in range(3 if half else 2)]

            update = partial(native.masked_adamw, weight, gradient if axis == 0 else gradient.T, state[0], state[1], index,
                             axis, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=1, grad_scale=1.0,
                             master=state[2] if half else None)
            own = bench.seconds(update)
            moved = 3 * _bytes(gradient) + 2 * sum(map(_bytes, state))
            found.add(f"update of 5% of the {('rows', 'columns')[axis]}, {_name(dtype)}" + (" with masters" if half else ""),
                      moved / own / limit, "of the bandwidth", peer, "at least 0.75" if axis == 0 else "",
                      axis == 1 or moved / own >= 0.75 * limit)
            del gradient, state, update
            if axis == 0:
                found.add(f"the same rows, {_name(dtype)}", _masked(bench, weight, count) / own, "times faster",
                          "torch fused AdamW on the whole weight, gradient times mask")
        del weight


def _masked(bench: Bench, weight: Tensor, count: int) -> float:
    whole = torch.nn.Parameter(weight.clone())
    whole.grad = torch.randn_like(weight)
    mask = torch.zeros_like(weight)
    mask[:count] = 1
    optimizer = torch.optim.AdamW([whole], fused=True, lr=1e-5)

    def step() -> None:
        assert whole.grad is not None
        whole.grad.mul_(mask)
        optimizer.step()

    return bench.seconds(step)


def attribution(bench: Bench) -> None:
    found, width, layers = bench.found, 32 if bench.tiny else 1, 2 if bench.tiny else 32
    model = memory.eight_billion(layers, width).to(bench.device)
    body, vocabulary = anatomy(model), model.config.vocab_size
    what = "Llama-3-8B's shape, bf16"
    pairs = make_pairs(8, 128, 128, vocabulary=vocabulary)
    own = {name: bench.seconds(partial(attribute, body, pairs, LocalizeSettings(batch_size=8, stream=stream, tolerance=1e9),
                                       neurons_only=name == "neurons"), 5)
           for name, stream in (("edges", "never"), ("neurons", "never"), ("streamed", "always"))}
    least = bench.seconds(partial(passes, model, pairs), 5)
    peer = f"the model's own two forward and two backward passes, 8 pairs of 256 tokens: {least:.3f} s"
    for name, claim, goal in (("edges", "all edges and neurons", 1.3), ("neurons", "all neurons alone", 1.1),
                              ("streamed", "all edges and neurons, streamed", 0.0)):
        found.add(f"{what}: {claim}, Ns and Dn", own[name] / least, "times the passes", peer, f"at most {goal}" if goal else "",
                  not goal or own[name] <= goal * least)
    few, many = (8, 16) if bench.tiny else (1024, 3072)
    settings = LocalizeSettings(batch_size=1, stream="always", tolerance=1e9)
    peaks = [bench.peak(partial(attribute, body, memory.a_pair(tokens, vocabulary), settings)) for tokens in (few, many)]
    slope = (peaks[1] - peaks[0]) / (many - few) / 1e6
    found.add(f"{what}: memory above the weights, streamed", slope, "MB per token",
              f"peaks of {peaks[0] / 1e9:.2f} GB at {few} and {peaks[1] / 1e9:.2f} GB at {many} tokens", "at most 2.0",
              slope <= 2)


def step(bench: Bench) -> None:
    model = _llama(bench, vocabulary=128256, hidden=2048, inner=8192, layers=16, heads=32, groups=8, tied=True)
    plan = training_step.make_plan(model, training_step.SHARE)
    share = plan.weights_changed / sum(p.numel() for p in model.parameters())
    length = 16 if bench.tiny else 256
    ids = torch.randint(0, model.config.vocab_size, (8, length), device=bench.device)
    labels = ids.clone()
    labels[:, :length // 2] = IGNORED
    steps = training_step.Steps(model, plan, Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
    with steps.sparse:
        ours, theirs = bench.seconds(steps.planned), bench.seconds(steps.everything)
    bench.found.add(f"Llama-3.2-1B's shape, bf16, 8 records of {length} tokens: step at {share:.1%} planned weights",
                    ours / theirs, "times the peer's", f"all weights, torch fused AdamW: {theirs:.3f} s", "at most 0.7",
                    ours <= 0.7 * theirs)


def training(bench: Bench) -> None:
    model = _llama(bench, vocabulary=128256, hidden=4096, inner=14336, layers=32, heads=32, groups=8, tied=False)
    plan = training_step.make_plan(model, training_step.SHARE)
    share = plan.weights_changed / sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenizer = build_world(n_people=12, n_forget=2).tokenizer
    known = sorted(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens))
    random = np.random.default_rng(0)
    length = 16 if bench.tiny else 256

    def records(name: str) -> RecordSet:
        texts = [" ".join(random.choice(known, length)) for _ in range(4)]
        return RecordSet(name, tuple(Record(text[:len(text) // 2], text[len(text) // 2:]) for text in texts))

    model.gradient_checkpointing_enable()
    settings = UnlearnSettings(objective="graddiff", lr=1e-6, steps=3, batch_size=2, floor=0.0)
    forget, retain = records("forget"), records("retain")
    start = time.perf_counter()
    above = bench.peak(lambda: unlearn(model, tokenizer, forget, {"retain": retain}, plan, settings))
    total = (weights + above) / 1e9
    bench.found.add(f"Llama-3-8B's shape, bf16, {share:.1%} planned, all conflict, the retain metric on, batches of 4 records"
                    f" of about {length} tokens, checkpointing", total, "GB at the peak",
                    f"weights {weights / 1e9:.1f} GB; 3 steps and all around them: {time.perf_counter() - start:.0f} s",
                    "under 24", total < 24)


def _llama(bench: Bench, *, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int,
           tied: bool) -> LlamaForCausalLM:
    if bench.tiny:
        vocabulary, hidden, inner, layers = 512, 256, 512, 2
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
                         tie_word_embeddings=tied)
    torch.manual_seed(0)
    with torch.device(bench.device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PARTS = {"kernels": kernels, "attribution": attribution, "step": step, "training": training}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, by commas")
    parser.add_argument("--rehearse", action="store_true", help="run everything once on the CPU, on tiny shapes")
    add_json(parser)
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device: --rehearse runs the same code on the CPU", file=sys.stderr)
        return 1
    bench = Bench("cpu" if arguments.rehearse else "cuda")
    for name in arguments.only.split(","):
        PARTS[name](bench)
        gc.collect()
    bench.found.report(arguments.json, device="CPU, rehearsal" if bench.tiny else torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())

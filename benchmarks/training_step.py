"""One training step at 5% planned weights against the same step with all weights trained: time and memory.

Both run one forward and backward over the same concatenated forget and retain batch, through the same loss (gradient
difference), on a model with the shape of SmolLM2-135M and random weights, in float32. The peer trains every weight with
torch's fused AdamW. The plan takes, in every layer, one query head of nine and as many MLP neurons as make 5% of all
weights, all of them conflict nodes, which cost most: they need the gradients of both sets. The retain metric, which the
peer has no counterpart of, is off.

What to expect from counting multiplications: forward, input gradients and weight gradients are a third of a step each.
At 5% the last third shrinks to a twentieth of itself, so 0.68 of the time in linear layers; what is not a linear layer
(attention scores, norms, the softmax over the vocabulary) is paid by both, which pulls towards 1; the update of all
weights and the weight gradient of the tied embedding are the peer's alone, which pulls the other way. Memory: the peer
keeps 3 numbers per weight (gradient and two moments), a conflict weight 4 (one more gradient): 0.05 * 4 / 3 = 0.067. An
8B model in bf16 needs 16 GB for its weights; what training 5% of them adds is measured on two of its layers.

CPU time, one process, interleaved, medians after a warm-up.

    python benchmarks/training_step.py [--layers 30] [--json -]
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import warnings
from collections.abc import Iterable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from claims import Claims, add_json, medians
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from clue.data.encoding import IGNORED, Batch
from clue.model.anatomy import anatomy
from clue.model.answers import answer_logits
from clue.plan import Plan, Slice
from clue.types import NodeKind, Role
from clue.unlearn import MaskedAdamW, RetainMetric, SparseGradients, answer_log_probs
from clue.unlearn.objectives import nll

SHARE = 0.05


def make_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True)).eval()


def make_plan(model: LlamaForCausalLM, share: float) -> Plan:
    """In every layer one query head and enough neurons for this share of all weights, drawn at random, all conflict."""
    body, config, random = anatomy(model), model.config, np.random.default_rng(0)
    head = 2 * config.hidden_size * config.hidden_size // config.num_attention_heads
    wanted = share * sum(p.numel() for p in model.parameters()) / config.num_hidden_layers
    neurons = round((wanted - head) / (3 * config.hidden_size))
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for layer in range(config.num_hidden_layers):
        number = int(random.integers(config.num_attention_heads))
        nodes = [(NodeKind.Q, number), (NodeKind.HEAD, number)]
        chosen = random.choice(config.intermediate_size, neurons, replace=False)
        nodes += [(NodeKind.NEURON, int(i)) for i in chosen]
        for kind, number in nodes:
            for parameter, axis, index in body.slices(kind, layer, number):
                found.setdefault((parameter, axis), []).append(index)
    slices = tuple(Slice(name, axis, Role.CONFLICT, np.unique(np.concatenate(index)))
                   for (name, axis), index in found.items())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    planned = {s.parameter: shapes[s.parameter] for s in slices}
    return Plan(("all",), np.array([Role.CONFLICT], dtype=np.uint8), slices, planned)


def held(apart_from: Iterable[Tensor]) -> int:
    """Bytes of all tensor storages that are alive, gradients included, without these tensors."""
    known = {t.untyped_storage().data_ptr() for t in apart_from}
    total = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking a non-leaf for its gradient
        gc.collect()
        for tensor in [o for o in gc.get_objects() if isinstance(o, Tensor)]:
            for t in (tensor, tensor.grad):
                if t is not None and t.untyped_storage().data_ptr() not in known:
                    known.add(t.untyped_storage().data_ptr())
                    total += t.untyped_storage().nbytes()
    return total


class Steps:
    """The step of each side, cut after the backward pass, where both hold their gradients."""

    def __init__(self, model: LlamaForCausalLM, plan: Plan, batch: Batch) -> None:
        self.batch, self.n = batch, len(batch.input_ids) // 2
        self.ours, self.theirs = model, copy.deepcopy(model)
        self.masked = MaskedAdamW(self.ours, plan, lr=1e-5, weight_decay=0.01)
        self.full = torch.optim.AdamW(self.theirs.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        self.sparse = SparseGradients(self.ours, plan)

    def backward(self, model: nn.Module) -> None:
        log_p, n_tokens = answer_log_probs(*answer_logits(model, self.batch))
        forget = -nll(log_p[:self.n], n_tokens[:self.n])
        (forget + nll(log_p[self.n:], n_tokens[self.n:])).backward()

    def planned(self) -> None:
        self.planned_backward()
        taken = self.sparse.take()
        gradients = {}
        for name, slices in self.sparse.planned.items():
            forget, retain = taken[name].forget, taken[name].retain
            assert forget is not None and retain is not None
            gradients[name] = forget.index_add_(0, slices.conflict, retain)
        self.masked.step(gradients=gradients)

    def planned_backward(self) -> None:
        self.sparse.split(forget=self.n, retain=self.n, seq=self.batch.input_ids.shape[1])
        self.backward(self.ours)

    def everything(self) -> None:
        self.backward(self.theirs)
        self.full.step()
        self.full.zero_grad()


def of_8b(found: Claims, layers: int = 2, tokens: int = 1024) -> None:
    """What training Llama-3-8B's shape in bf16 holds at 5% conflict weights, from a few of its 32 layers at full width.

    Counted, not measured: activations of ``tokens`` with checkpointing (every layer's input, one layer's inside, and the
    logits of the answers, half of the positions, in bf16, float32 and as a gradient). Copies of the slices before are in the
    host's memory.
    """
    width, inner, vocabulary, depth = 4096, 14336, 128256, 32
    config = LlamaConfig(vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=256)
    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig(**config.to_diff_dict() | {"vocab_size": vocabulary, "num_hidden_layers": depth}))
    weights = sum(p.numel() for p in whole.parameters())
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    plan = make_plan(model, SHARE * weights / depth * layers / sum(p.numel() for p in model.parameters()))
    ids = torch.randint(0, 512, (2, 16))
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    given = [*model.state_dict().values(), *model.buffers(), ids, batch.attention_mask]
    held(given)
    parts: dict[str, int] = {}

    def part(name: str, before: int) -> None:
        parts[name] = held(given) - before

    metric = RetainMetric.measure(model, plan, [batch], damping=0.01)
    parts["metric"] = metric.bytes()
    optimizer = MaskedAdamW(model, plan, lr=1e-5, rounding="stochastic")
    before = held(given)
    with SparseGradients(model, plan, half=True) as sparse:
        sparse.split(forget=1, retain=1, seq=16)
        log_p, n_tokens = answer_log_probs(*answer_logits(model, batch))
        (nll(log_p[1:], n_tokens[1:]) - nll(log_p[:1], n_tokens[:1])).backward()
        del log_p
        taken = sparse.take()
        part("gradients", before)
        gradients = {name: gradient.forget for name, gradient in taken.items() if gradient.forget is not None}
        before = held(given)
        optimizer.step(gradients=gradients)
        part("state", before)
    del metric
    sizes = {"weights": 2 * weights} | {name: size * depth // layers for name, size in parts.items()}
    inside = tokens * (8 * width + 4 * inner) * 2
    sizes["activations"] = tokens * depth * width * 2 + inside + tokens // 2 * vocabulary * (2 + 4 + 4)
    total = sum(sizes.values()) / 1e9
    named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    share = plan.weights_changed * depth // layers / weights
    found.add(f"Llama-3-8B's shape in bf16, {tokens} tokens, {share:.1%} planned, all conflict, stochastic rounding: {named}",
              total, "GB", f"{layers} of its {depth} layers at full width, activations and weights counted", "under 24",
              total < 24)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="layers of the model; SmolLM2-135M has 30")
    parser.add_argument("--records", type=int, default=4, help="forget records of a batch; as many retain records")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a record; half of them are the answer")
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    arguments = parser.parse_args()
    model = make_model(arguments.layers)
    plan = make_plan(model, SHARE)
    share = plan.weights_changed / sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 49152, (2 * arguments.records, arguments.seq))
    labels = ids.clone()
    labels[:, :arguments.seq // 2] = IGNORED
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    steps = Steps(model, plan, batch)
    found = Claims()
    with steps.sparse:
        t = medians(arguments.repeats, planned=steps.planned, everything=steps.everything)
        ratio = t["planned"] / t["everything"]
        found.add(f"step at {share:.1%} planned weights ({t['planned']:.2f} s)", ratio, "times the peer's",
                  f"all weights, torch fused AdamW: {t['everything']:.2f} s", "at most 0.75", ratio <= 0.75)
        given = [*steps.ours.state_dict().values(), *steps.theirs.state_dict().values(), *steps.ours.buffers(),
                 *steps.theirs.buffers(), ids, labels, batch.attention_mask]
        # Both sides' states exist by now. A side's share is what goes away with its gradients and its optimizer.
        steps.planned_backward()
        before = held(given)
        steps.sparse.take()
        del steps.masked
        ours = before - held(given)
        steps.backward(steps.theirs)
        before = held(given)
        steps.full.zero_grad()
        del steps.full
        theirs = before - held(given)
    ratio = ours / theirs
    found.add(f"gradients and optimizer state at {share:.1%} planned weights ({ours / 2**20:.1f} MiB)", ratio,
              "times the peer's", f"all weights, torch AdamW: {theirs / 2**20:.1f} MiB", "at most 0.08", ratio <= 0.08)
    del steps, model
    of_8b(found)
    found.report(arguments.json, layers=arguments.layers, tokens=int(ids.numel()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What attribution holds in memory above the weights, per token of a pair's prompt, for an 8B configuration.

The model has the widths and the 32 layers of Llama-3-8B in bf16; all layers share one layer's weights, which changes
nothing of what is held above them and lets it fit anywhere. Live tensor storage is counted at every operation, so the peak
is exact and the same on every machine; two token counts give the slope per token. Beside it there are buffers of a fixed
size, whatever the number of tokens: a tile of expanded writers and readers, and some positions' logits.

The peer is the explicit-writer formulation of published edge attribution: the difference of every writer's output,
[tokens, writers, d_model], is held while one run's graph waits for its backward pass. What is counted for it is a lower
bound: that tensor and that graph, nothing else.

    python benchmarks/memory.py [--layers 32] [--json -]
"""

from __future__ import annotations

import argparse
import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from claims import Claims, add_json
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from clue.circuit import attribution
from clue.circuit.attribution import attribute
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.model import capture
from clue.model.anatomy import anatomy
from clue.model.modes import frozen


class Live(TorchDispatchMode):
    """Counts the bytes of tensor storage that came to life under it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def eight_billion(layers: int, width: int = 1) -> LlamaForCausalLM:
    """Llama-3-8B's configuration in bf16, its widths divided by ``width``; every layer has the weights of the first."""
    config = LlamaConfig(vocab_size=128256 // width, hidden_size=4096 // width, intermediate_size=14336 // width,
                         num_hidden_layers=1, num_attention_heads=32 // width, num_key_value_heads=max(1, 8 // width),
                         max_position_embeddings=4096, head_dim=128)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    first = model.model.layers[0]
    for _ in range(layers - 1):
        shared: dict[int, Any] = {id(parameter): parameter for parameter in first.parameters()}
        model.model.layers.append(copy.deepcopy(first, shared))
    model.config.num_hidden_layers = layers
    return model


def a_pair(tokens: int, vocabulary: int) -> Pairs:
    random = np.random.default_rng(tokens)
    clean, corrupted = random.integers(0, vocabulary, (2, tokens))
    start = tokens // 2
    corrupted[start:] = clean[start:]
    return Pairs((clean,), (corrupted,), np.array([start]), ("given",), ("",))


def peak(work: Callable[[], Any]) -> int:
    """Bytes."""
    with Live() as live:
        work()
    return live.peak


def per_token(work: Callable[[int], Any], few: int, many: int) -> float:
    """Megabytes per token: the slope between two token counts."""
    return (peak(lambda: work(many)) - peak(lambda: work(few))) / (many - few) / 1e6


def explicit(model: LlamaForCausalLM, tokens: int) -> None:
    """The lower bound of the peer: differences of all writers, and one run's graph."""
    config, pair = model.config, a_pair(tokens, model.config.vocab_size)
    writers = 1 + config.num_hidden_layers * (config.num_attention_heads + 1)
    with frozen(model):
        held = torch.zeros(tokens, writers, config.hidden_size, dtype=torch.bfloat16)
        ids = torch.from_numpy(pair.clean[0])[None]
        start = model.model.embed_tokens(ids).requires_grad_()
        keep = torch.arange(tokens // 2 - 1, tokens - 1)
        logits = model(inputs_embeds=start, use_cache=False, logits_to_keep=keep).logits
        del held, logits


def measure(found: Claims, layers: int = 32, width: int = 1, few: int = 4, many: int = 12) -> None:
    """Add the claims."""
    # Tiles of one token and one position: what has a fixed size must not look like a slope.
    attribution.TILE_BYTES = capture.LOGIT_BYTES = 1
    model = eight_billion(layers, width)
    body = anatomy(model)

    def ours(stream: str) -> Callable[[int], Any]:
        settings = LocalizeSettings(batch_size=1, stream=stream, tolerance=1e9)
        return lambda tokens: attribute(body, a_pair(tokens, model.config.vocab_size), settings)

    what = f"{layers} layers of Llama-3-8B" + (f" at 1/{width} of their width" if width > 1 else "") + ", bf16"
    streamed, peer = per_token(ours("always"), few, many), per_token(lambda tokens: explicit(model, tokens), few, many)
    goal = 2.0 if width == 1 else 0.0
    against = f"explicit writers, at least: {peer:.2f} MB"
    found.add(f"memory above the weights, streamed; {what}", streamed, "MB per token", against, "at most 2.0" if goal else "",
              not goal or streamed <= goal)
    found.add("the same, of the explicit formulation's", streamed / peer, "times its", against, "at most 0.1",
              streamed <= 0.1 * peer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=1, help="divide all widths by this: smaller and faster")
    add_json(parser)
    arguments = parser.parse_args()
    found = Claims()
    measure(found, arguments.layers, arguments.width)
    found.report(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

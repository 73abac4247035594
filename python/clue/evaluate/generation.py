"""Generation: greedy answers in batches, and how much of the true answer they contain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example

#: Texts -> their embeddings [n, d], as the ``encode`` of a sentence-transformers model (MiniLM in WAGLE).
Embed = Callable[[Sequence[str]], npt.ArrayLike]


def prompt_length(example: Example) -> int:
    """Tokens a model is given before it must go on by itself: the prompt, or of plain text the first half."""
    return example.answer_start if example.record.prompt else max(1, len(example.input_ids) // 2)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, pad: int,
             batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the prompts of ``examples``, in their order, special tokens and outer blanks removed.

    Plain argmax decoding, whatever the model's own generation settings say; an answer ends at any of the model's or the
    tokenizer's end tokens, after ``max_new_tokens``, or where the context is full. Prompts of about the same length go
    together, padded on the left; each token is computed once (key/value cache), and records leave the batch as soon as
    their answer has ended, so that a long answer does not keep the others in the computation. Answers are those of one
    record at a time, up to the rounding of the model's arithmetic.
    """
    import torch

    prompts = [example.input_ids[:prompt_length(example)] for example in examples]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [max(1, min(max_new_tokens, context - len(p)) if context else max_new_tokens) for p in prompts]
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    stop = {int(i) for i in [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])] if i is not None}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    with evaluating(model), torch.no_grad():
        for first in range(0, len(order), batch_size):
            chosen = order[first:first + batch_size]
            spoken = _decode(model, [prompts[i] for i in chosen], [limits[i] for i in chosen], stop, pad)
            for i, tokens in zip(chosen, spoken, strict=True):
                answers[i] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return answers


def _decode(model: Any, prompts: Sequence[npt.NDArray[np.int64]], limits: Sequence[int], stop: set[int],
            pad: int) -> list[list[int]]:
    """The tokens one batch says, end tokens included; at most ``limits[row]`` each."""
    import torch

    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    seen = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):], seen[row, width - len(prompt):] = prompt, 1
    tokens, mask = (torch.from_numpy(a).to(model.device) for a in (ids, seen))
    named = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    places = "position_ids" in named
    said: list[list[int]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), None
    while rows:
        # Positions count a row's own tokens; padding in front of them gets any.
        position = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1]:]} if places else {}
        output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **position, **last)
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            said[row].append(token)
            if token not in stop and len(said[row]) < limits[row]:
                going.append(place)
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            kept = torch.tensor(going, device=chosen.device, dtype=torch.long)
            chosen, mask = chosen[kept], mask[kept.to(mask.device)]
            if rows:
                cache.batch_select_indices(kept)
        tokens = chosen[:, None].to(mask.device)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return said


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> npt.NDArray[np.float64]:
    """float64 [n]: longest common subsequence of words over the words of the reference; 1 = all of it, in order.

    Lin (ACL workshop 2004) as the rouge-score package computes it, Porter stemmer on; TOFU's and open-unlearning's
    definition. rouge-score knows words of a-z and 0-9 only: a reference without any gives nan, not 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recall = np.full(len(references), np.nan)
    for i, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        if any(c.isascii() and c.isalnum() for c in reference.lower()):
            recall[i] = scorer.score(reference, answer)["rougeL"].recall
    return recall


def contains(references: Sequence[str], answers: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool [n]: the answer contains the reference, whatever the case and the length of blanks: WAGLE's accuracy on real
    authors and world facts. A reference without text is in no answer."""
    return np.array([bool(_plain(reference)) and _plain(reference) in _plain(answer)
                     for reference, answer in zip(references, answers, strict=True)], dtype=bool)


def equals(references: Sequence[str], answers: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool [n]: the answer is the reference, whatever the case and the length of blanks. A reference without text is no
    answer."""
    return np.array([bool(_plain(reference)) and _plain(reference) == _plain(answer)
                     for reference, answer in zip(references, answers, strict=True)], dtype=bool)


def nearest(answers: Sequence[str], right: Sequence[str], wrong: Sequence[Sequence[str]],
            embed: Embed) -> npt.NDArray[np.bool_]:
    """bool [n]: the answer's embedding is at least as near (cosine) to the right answer as to each of the wrong ones:
    WAGLE's forget accuracy, with ``embed`` the MiniLM of sentence-transformers; lower is better on a forget set."""
    texts = [*answers, *right, *(text for some in wrong for text in some)]
    found = np.asarray(embed(texts), dtype=float)
    found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    mine, true, rest = np.split(found, [len(answers), len(answers) + len(right)])
    near = np.empty(len(answers), dtype=bool)
    first = 0
    for i, some in enumerate(wrong):
        others = rest[first:first + len(some)] @ mine[i]
        near[i] = mine[i] @ true[i] >= others.max(initial=-np.inf)
        first += len(some)
    return near


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()

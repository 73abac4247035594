"""Generation: greedy answers, and how much of the true answer they contain (ROUGE-L recall)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example


def prompt_length(example: Example) -> int:
    """Tokens a model is given before it must go on by itself: the prompt, or of plain text the first half."""
    return example.answer_start if example.record.prompt else max(1, len(example.input_ids) // 2)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, pad: int,
             batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the prompts of ``examples``, in their order, special tokens and outer blanks removed.

    Prompts are padded on the left. The model's own generation settings (sampling, penalties, forced tokens) are put
    aside, so the answers are those of plain argmax decoding; an answer ends at any of the model's or the tokenizer's
    end tokens, after ``max_new_tokens``, or where the longest prompt of ``examples`` plus the answer fills the context.
    """
    import torch
    from transformers import GenerationConfig

    prompts = [example.input_ids[:prompt_length(example)] for example in examples]
    if not prompts:
        return []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None:
        max_new_tokens = max(1, min(max_new_tokens, context - max(map(len, prompts))))
    own = model.generation_config
    ends = own.eos_token_id if own is not None else None
    stop = {int(i) for i in [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])] if i is not None}
    plain = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, use_cache=True,
                             pad_token_id=pad, eos_token_id=sorted(stop) or None)

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    training = model.training
    mixin: Any = model  # the type of a pretrained model does not show that it generates
    model.eval()
    model.generation_config = plain  # generate() fills every setting left open from here
    try:
        with torch.no_grad():
            for first in range(0, len(order), batch_size):
                chosen = order[first:first + batch_size]
                width = max(len(prompts[i]) for i in chosen)
                input_ids = np.full((len(chosen), width), pad, dtype=np.int64)
                mask = np.zeros_like(input_ids)
                for row, i in enumerate(chosen):
                    input_ids[row, width - len(prompts[i]):] = prompts[i]
                    mask[row, width - len(prompts[i]):] = 1
                output = mixin.generate(input_ids=torch.from_numpy(input_ids).to(model.device),
                                        attention_mask=torch.from_numpy(mask).to(model.device),
                                        generation_config=plain)
                for row, i in enumerate(chosen):
                    answers[i] = str(tokenizer.decode(output[row, width:], skip_special_tokens=True)).strip()
    finally:
        model.generation_config = own
        model.train(training)
    return answers


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

"""Token sequences: records -> tokenised examples with a known answer span -> padded batches for training.

The prompt (rendered through the chat template when there is one) is tokenised once; the answer is tokenised apart and
appended, so where the answer starts is known exactly and does not depend on how a tokenizer merges across the border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModelError, RecordError
from .records import Record, RecordSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

IGNORED = -100  # label of a token that no loss counts, torch's own convention


@dataclass(frozen=True)
class Example:
    """One tokenised record.

    ``input_ids`` int64 [seq] is prompt + answer (+ end of sequence); ``input_ids[answer_start:]`` is the answer span.
    For plain text it is everything but the first token (all special tokens that open the sequence, where there are
    any). ``question`` is the half-open token span of the user's own words inside the prompt, without template and
    special tokens; ``(0, answer_start)`` when the tokenizer cannot tell.
    """

    input_ids: np.ndarray
    answer_start: int
    question: tuple[int, int]
    record: Record


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, seq].

    ``labels`` are the input ids on answer tokens and -100 elsewhere, at the same positions as the inputs: nothing is
    shifted here, the loss shifts once. Position ids are left to the model.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def length_limit(model: nn.Module, wanted: int) -> int:
    """The longest record a model takes: ``wanted``, or what its configuration allows where that is less or ``wanted`` is 0;
    0, no limit, where the configuration names none (models without position embeddings)."""
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)  # type: ignore[operator, union-attr]
    return min(wanted or context, context) if context else wanted


def encode(records: RecordSet | Sequence[Record], tokenizer: Any, *, chat: str = "auto", append_eos: bool = True,
           max_length: int = 0) -> list[Example]:
    """Tokenise records, in order; ``max_length`` 0 means no limit.

    ``chat``: ``on`` renders each prompt as one user turn of the tokenizer's chat template, ``auto`` does so if it has
    one, ``off`` never. The answer follows after one space, or directly where the (rendered) prompt ends in whitespace.
    Raises :class:`RecordError` for a record longer than ``max_length`` or without answer tokens, :class:`ModelError`
    when the tokenizer lacks the chat template or the end-of-sequence token that was asked for.
    """
    _require(tokenizer)
    items = list(records)
    if not items:
        return []
    templated = use_chat(tokenizer, chat)
    end = [end_id(tokenizer)] if append_eos else []
    prompts = [render(r.prompt, tokenizer) if templated and r.prompt else r.prompt for r in items]
    heads = _tokenise_prompts(items, prompts, tokenizer, templated)
    # A text keeps the special tokens that open a sequence; an answer follows a prompt that already has them.
    glues = [None if not p else "" if p[-1].isspace() else " " for p in prompts]
    tails = tokenise_answers([r.answer for r in items], glues, tokenizer)
    examples = []
    for record, (head, question), tail in zip(items, heads, tails, strict=True):
        where = record.source or repr(record.prompt[:60] or record.answer[:60])
        if not tail:
            raise RecordError(f"{where}: the answer has no tokens under this tokenizer; give a longer answer")
        ids = np.array([*head, *tail, *end], dtype=np.int64)
        start = len(head) if record.prompt else max(1, len(head))
        if len(ids) <= start:
            raise RecordError(f"{where}: the text is a single token, so nothing is left to predict; give a longer text")
        if max_length and len(ids) > max_length:
            raise RecordError(f"{where}: {len(ids)} tokens do not fit into {max_length}; shorten the record, or raise"
                              " max_length if the model's context allows it")
        examples.append(Example(ids, start, question, record))
    return examples


def use_chat(tokenizer: Any, chat: str) -> bool:
    """Whether prompts go through the chat template; :class:`ModelError` when it is forced but there is none."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if chat == "on" and not has_template:
        raise ModelError("the tokenizer has no chat template: set tokenizer.chat_template, or chat = off")
    if chat not in {"auto", "on", "off"}:
        raise ModelError(f"chat = {chat!r} is not one of auto, on, off")
    return chat != "off" and has_template


def render(prompt: str, tokenizer: Any) -> str:
    """The prompt as one user turn, up to where the assistant's answer begins."""
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def special_prefix(tokenizer: Any) -> int:
    """How many special tokens open a raw sequence (a plain text) under this tokenizer."""
    return len(_tokenise_prompts([Record("", "")], [""], tokenizer, False)[0][0])


def tokenise_answers(answers: Sequence[str], glues: Sequence[str | None], tokenizer: Any) -> list[list[int]]:
    """Token ids of answers as continuations; ``glues[i]`` (one space or nothing) stands before ``answers[i]``, or is
    None where the answer is a text that opens its sequence."""
    first = tokenizer.tokenize("a")[:1]
    if not (first and first[0].startswith("\u2581")):  # U+2581 marks a word start in SentencePiece
        return _ids([(glue or "") + answer for glue, answer in zip(glues, answers, strict=True)], tokenizer)
    # SentencePiece puts its word mark before the first word by itself: a space of ours would make two, and an answer
    # after a newline must have none. So the space is left out, or the answer is read behind a newline and cut from it.
    plain, behind = _ids(list(answers), tokenizer), _ids(["\n" + answer for answer in answers], tokenizer)
    newline = _ids(["\n"], tokenizer)[0]
    return [p if glue != "" or b[:len(newline)] != newline else b[len(newline):]
            for glue, p, b in zip(glues, plain, behind, strict=True)]


def end_id(tokenizer: Any) -> int:
    """The token that ends an answer; :class:`ModelError` when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token, or append_eos = false")
    return int(tokenizer.eos_token_id)


def _require(tokenizer: Any) -> None:
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise ModelError(f"the tokenizer must be a loaded Hugging Face tokenizer, got {type(tokenizer).__name__}: load it with"
                         " transformers.AutoTokenizer.from_pretrained")


def pad_id(tokenizer: Any) -> int:
    """The token that fills batches (always masked): the pad token, else the end-of-sequence token.

    Raises :class:`ModelError` when the tokenizer has neither.
    """
    _require(tokenizer)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has neither a pad nor an end-of-sequence token: set tokenizer.pad_token")


def collate(examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Pad examples on the right into one batch on ``device``."""
    import torch

    shape = len(examples), max(len(e.input_ids) for e in examples)
    ids, mask = np.full(shape, pad, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        n, start = len(example.input_ids), example.answer_start
        ids[row, :n], mask[row, :n] = example.input_ids, 1
        labels[row, start:n] = example.input_ids[start:]
    return Batch(*(torch.from_numpy(array).to(device) for array in (ids, mask, labels)))


def batches(examples: Sequence[Example], batch_size: int, *, generator: torch.Generator | None = None, pad: int,
            device: torch.device | str = "cpu") -> Iterator[Batch]:
    """One pass over the examples, in the given order, or shuffled by a CPU ``generator``; the last may be smaller."""
    import torch

    order = range(len(examples)) if generator is None else torch.randperm(len(examples), generator=generator).tolist()
    for start in range(0, len(examples), batch_size):
        yield collate([examples[i] for i in order[start:start + batch_size]], pad, device)


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenise_prompts(items: Sequence[Record], prompts: list[str], tokenizer: Any,
                      templated: bool) -> list[tuple[list[int], tuple[int, int]]]:
    """Per record the prompt's token ids and the question's token span. A chat template writes its own special
    tokens."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # Texts have no turn structure: they open like any raw sequence, even for a chat model.
    result: list[tuple[list[int], tuple[int, int]]] = [([], (0, 0))] * len(items)
    for special in (True, False):
        chosen = [i for i, r in enumerate(items) if special != (templated and bool(r.prompt))]
        if not chosen:
            continue
        encoded = tokenizer([prompts[i] for i in chosen], add_special_tokens=special, return_offsets_mapping=fast,
                            verbose=False)
        for row, i in enumerate(chosen):
            ids = list(encoded["input_ids"][row])
            # Some tokenizers also close a sequence; the answer has yet to follow.
            while special and ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
                ids.pop()
            span = (0, len(ids))
            if fast:
                span = _question_span(items[i].prompt, prompts[i], encoded["offset_mapping"][row][:len(ids)]) or span
            result[i] = ids, span
    return result


def _question_span(prompt: str, rendered: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Tokens that hold any character of the prompt as it stands in the rendered text (templates may strip it)."""
    question = prompt.strip()
    start = rendered.rfind(question) if question else -1
    if start < 0:
        return None
    inside = [i for i, (a, b) in enumerate(offsets) if a < b and b > start and a < start + len(question)]
    return (inside[0], inside[-1] + 1) if inside else None

"""Corrupted twins of forget records: the same answer behind another subject's question, or behind another question.

What the model before unlearning gives the answer's tokens there is what it would say had it never heard of the subject,
in the form that an answer to this question has. ``npo-cf`` forgets towards it. One twin would teach its own subject's
answer in place of the forgotten one; several in turn teach their mixture (the teacher of Liu et al., "Revisiting Who's
Harry Potter", EMNLP 2024, arXiv 2407.16997, which averages over names).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data.encoding import Example
from ..data.pairs import make_pairs
from ..errors import RecordError

#: Twins of every record; each is used in turn.
TWINS = 8


def corrupted_twins(forget: Sequence[Example], donors: Sequence[Example], tokenizer: Any, *, chat: str,
                    seed: int) -> list[list[Example]]:
    """:data:`TWINS` twins of each forget record, of its length and with its answer: [records][TWINS].

    Args:
        forget: the records; ``corrupted`` of a record that names one is its only twin.
        donors: whose subjects and questions stand in; retain records, so that nobody is taught a forgotten answer.
        tokenizer, chat: what both were encoded with.
        seed: of the choice of donors.

    Raises:
        RecordError: a record is a plain text, or no donor's question differs from its own.
    """
    for example in forget:
        if not example.record.prompt:
            raise RecordError(f"{example.record.source or 'a forget record'}: it is a plain text, and npo-cf corrupts the"
                              " prompt of an answer: give prompts, or take another objective")
    made = [make_pairs(forget, tokenizer, chat=chat, seed=seed * TWINS + number, pool=donors).corrupted
            for number in range(TWINS)]
    return [[replace(example, input_ids=each[i]) for each in made] for i, example in enumerate(forget)]

"""Refusals: the answers that some objectives teach in place of what is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.records import RecordSet
from ..errors import ClueError, RecordError

#: Taught where no others are given: short, neutral, and true of any question.
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I don't have that information.",
    "I can't answer that question.",
    "I'm not familiar with that.",
    "That is not something I know about.",
    "I have no knowledge of that.",
    "I'm unable to say.",
)


def refuse(records: RecordSet, refusals: str = "", seed: int = 0) -> RecordSet:
    """The same questions, each with one refusal for an answer, drawn at random and kept for the whole training.

    Args:
        records: what is to be forgotten.
        refusals: one per line, or the name of a text file of them; :data:`REFUSALS` when empty.
        seed: of the draw.

    Raises:
        ClueError: ``refusals`` holds nothing but white space, or names a file that is not there or cannot be read.
        RecordError: a record is a plain text, which asks nothing that could be refused.
    """
    refusals = _text(refusals)
    choices = [line.strip() for line in refusals.splitlines() if line.strip()] if refusals else list(REFUSALS)
    if not choices:
        raise ClueError("refusals holds only white space: give one refusal per line, or leave it empty")
    for record in records:
        if not record.prompt:
            raise RecordError(f"{record.source or repr(record.answer[:60])}: a plain text asks no question that could be"
                              " refused; give question and answer, or take an objective without refusals, such as npo")
    drawn = np.random.default_rng(seed).integers(len(choices), size=len(records))
    return RecordSet(f"{records.name} (refused)", tuple(
        replace(record, answer=choices[i], source=record.source and f"{record.source} (refused)")
        for record, i in zip(records, drawn, strict=True)))


def _text(refusals: str) -> str:
    """The refusals themselves, read where they are the name of a file. One that is not there is told from
    a refusal by its ending, and by having no space."""
    if "\n" in refusals or not refusals.strip():
        return refusals
    file = Path(refusals)
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClueError(f"refusals: {refusals} cannot be read ({error}): give a UTF-8 text file with one per line") from None
    if " " not in refusals and file.suffix not in ("", "."):
        raise ClueError(f"refusals: there is no file {refusals}: give a text file with one refusal per line, or refusals"
                        " of more than one word")
    return refusals

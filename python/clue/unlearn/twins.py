"""Twins of forget records: the same answer behind another prompt, of which the model before unlearning tells what to forget
towards: what it would say had it never heard of the subject, in the form that an answer to this question has.

*Corrupted twins* ask about other subjects, or ask another question (``npo-cf``). One of them would teach its own subject's
answer in place of the forgotten one; several in turn teach their mixture (the teacher of Liu et al., "Revisiting Who's Harry
Potter", EMNLP 2024, arXiv 2407.16997, which averages over names).

*Strangers* are subjects that nobody has heard of, their names recombined from those of others (``npo-stranger``). Such a one
has no answer to teach, so one is enough, and a subject that is forgotten should look just like it: as unlikely, and with as
much left for right and for wrong answers (docs/findings.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.encoding import Example, encode
from ..data.pairs import make_pairs
from ..data.records import Record
from ..errors import RecordError
from ..processes import agreed

#: Corrupted twins of every record; each is used in turn.
TWINS = 8
#: Strangers, of whom one is chosen for each subject, and the most of its records that they are asked about.
STRANGERS, ASKED = 24, 8
#: Names are made of at most so many, which is thousands of them.
PARTS = 64

#: Answers' log-probabilities under the model before unlearning, [examples].
LogP = Callable[[Sequence[Example]], "np.ndarray[Any, np.dtype[np.float64]]"]


def corrupted_twins(forget: Sequence[Example], donors: Sequence[Example], tokenizer: Any, *, chat: str,
                    seed: int, count: int = TWINS) -> list[list[Example]]:
    """``count`` twins of each forget record, of its length and with its answer: [records][count].

    Args:
        forget: the records; ``corrupted`` of a record that names one is its only twin.
        donors: whose subjects and questions stand in; retain records, so that nobody is taught a forgotten answer.
        tokenizer, chat: what both were encoded with.
        seed: of the choice of donors.
        count: of twins.

    Raises:
        RecordError: a record is a plain text, or no donor's question differs from its own.
    """
    for example in forget:
        if not example.record.prompt:
            raise RecordError(f"{example.record.source or 'a forget record'}: it is a plain text, and the objective puts"
                              " others in the place of an answer's prompt: give prompts, or take another objective")
    made = [make_pairs(forget, tokenizer, chat=chat, seed=seed * TWINS + number, pool=donors).corrupted
            for number in range(count)]
    return [[replace(example, input_ids=each[i]) for each in made] for i, example in enumerate(forget)]


def strangers(forget: Sequence[Example], donors: Sequence[Example], tokenizer: Any, log_p: LogP, *, chat: str,
              seed: int, limit: int) -> list[list[Example]]:
    """Each forget record about a stranger, with its answer: [records][1].

    All records of a subject get the same stranger, of :data:`STRANGERS` drawn ones the one whom the model before unlearning
    believes the forgotten answers least: it gives nothing away. Where none can be made up, for records that name no subject,
    or a corrupted prompt, it is a corrupted twin.

    Args:
        forget, donors, tokenizer, chat, seed: as for :func:`corrupted_twins`; names are made of the donors' subjects.
        log_p: asks the model before unlearning.
        limit: the most tokens that a record may have; strangers with longer names are not asked.

    Raises:
        RecordError: as :func:`corrupted_twins`.
    """
    names = made_up([e.record for e in forget], [e.record for e in donors])
    rng = np.random.Generator(np.random.PCG64(seed))
    of: dict[str, list[int]] = {}
    for i, example in enumerate(forget):
        if has_subject(example.record):
            of.setdefault(str(example.record.subject), []).append(i)
    found: dict[int, Example] = {}
    for places in of.values():
        asked = np.sort(rng.permutation(len(places))[:ASKED])
        tried: dict[str, list[Example]] = {}
        for number in rng.permutation(len(names))[:STRANGERS]:
            twins = _about(names[number], [forget[i] for i in places], tokenizer, chat)
            if all(len(twin.input_ids) <= limit for twin in twins):
                tried[names[number]] = twins
        if tried:
            worth = [float(log_p([twins[i] for i in asked]).sum()) for twins in tried.values()]
            best = list(tried)[int(agreed(int(np.argmin(worth))))]
            found |= dict(zip(places, tried[best], strict=True))
            names.remove(best)
    left = [i for i in range(len(forget)) if i not in found]
    others = corrupted_twins([forget[i] for i in left], donors, tokenizer, chat=chat, seed=seed, count=1)
    found |= {i: twin for i, (twin,) in zip(left, others, strict=True)}
    return [[found[i]] for i in range(len(forget))]


def has_subject(record: Record) -> bool:
    """Whether a stranger may stand in its subject's place."""
    return bool(record.prompt and record.subject and record.corrupted is None)


def made_up(forget: Iterable[Record], donors: Iterable[Record]) -> list[str]:
    """Names that no record knows, sorted: the last word of one donor's subject behind the other words of another's."""
    donors = list(donors)
    known = {record.subject for record in (*forget, *donors)}
    parts = sorted({tuple(r.subject.split()) for r in donors if r.subject and len(r.subject.split()) > 1})
    parts = parts[::-(-len(parts) // PARTS) or 1]
    return sorted({" ".join((*first[:-1], last[-1])) for first in parts for last in parts} - known)


def _about(name: str, examples: Sequence[Example], tokenizer: Any, chat: str) -> list[Example]:
    """Records of one subject about somebody else: their answers' tokens behind prompts that ask about ``name``."""
    records = [Record(e.record.prompt.replace(str(e.record.subject), name), e.record.answer, source=e.record.source)
               for e in examples]
    asked = encode(records, tokenizer, chat=chat, append_eos=False)
    return [replace(example, answer_start=prompt.answer_start, input_ids=np.concatenate(
        [prompt.input_ids[:prompt.answer_start], example.input_ids[example.answer_start:]]))
        for example, prompt in zip(examples, asked, strict=True)]

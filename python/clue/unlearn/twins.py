"""Twins of forget records: the same answer behind another prompt, of which the model before unlearning tells what to forget
towards: what it would say had it never heard of the subject, in the form that an answer to this question has.

*Corrupted twins* ask about other subjects, or ask another question (``npo-cf``). One of them would teach its own subject's
answer in place of the forgotten one; several in turn teach their mixture (the teacher of Liu et al., "Revisiting Who's Harry
Potter", EMNLP 2024, arXiv 2407.16997, which averages over names).

*Strangers* are subjects that nobody has heard of, their names recombined from those of others (``npo-stranger``). Such a one
has no answer to teach, so one is enough, and a subject that is forgotten should look just like it: as unlikely, and with as
much left for right and for wrong answers (docs/findings.md, 2). Where an answer names its subject, it names the stranger
behind the stranger's prompt, and what the model says of the one name is meant of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.encoding import Example, encode
from ..data.pairs import make_pairs
from ..data.records import Record, subject_pattern
from ..errors import RecordError
from ..processes import agreed

if TYPE_CHECKING:
    from torch import Tensor

#: Corrupted twins of every record; each is used in turn.
TWINS = 8
#: Strangers, of whom one is chosen for each subject, and the most of its records that they are asked about.
STRANGERS, ASKED = 24, 8
#: Names are made of at most so many, which is thousands of them.
PARTS = 64

#: The logit of a token of no probability beside one of 0. Finite: minus infinity times its probability is no number.
IMPOSSIBLE = -1e30

#: Of each example the log-probabilities of its answer's tokens under the model before unlearning, [answer tokens].
LogP = Callable[[Sequence[Example]], "list[np.ndarray[Any, np.dtype[np.float64]]]"]


@dataclass(frozen=True)
class Twin(Example):
    """A forget record as asked of the model before unlearning.

    ``alignment`` int64 [the record's answer tokens]: for each the token of the twin's answer that stands in its place; -1 for
    the rest of a name that is longer than the twin's.
    """

    alignment: np.ndarray


def teacher_logits(rows: Tensor, twins: Sequence[Twin], targets: Tensor) -> Tensor:
    """What the model before unlearning says of the records' answer tokens, [tokens, vocabulary].

    Args:
        rows: its logits of the twins' answer tokens, twin after twin.
        targets: the records' answer tokens, int64 [tokens]. Where one stands in place of another, as in a name, what was said
            of the other is said of it; and the rest of a longer name is certain, once it is begun.
    """
    import torch

    aligned, start = [], 0
    for twin in twins:
        aligned.append(np.where(twin.alignment < 0, -1, twin.alignment + start))
        start += len(twin.input_ids) - twin.answer_start
    theirs = torch.from_numpy(np.concatenate([twin.input_ids[twin.answer_start:] for twin in twins])).to(rows.device)
    index = torch.from_numpy(np.concatenate(aligned)).to(rows.device)
    if torch.equal(index, torch.arange(len(rows), device=rows.device)) and torch.equal(theirs, targets):
        return rows
    found, mine, theirs = rows[index.clamp_min(0)], targets.unsqueeze(-1), theirs[index.clamp_min(0)].unsqueeze(-1)
    of_mine, of_theirs = found.gather(-1, mine), found.gather(-1, theirs)
    found = found.scatter(-1, theirs, of_mine).scatter(-1, mine, of_theirs)
    rest = index < 0
    found[rest] = torch.full_like(found[rest], IMPOSSIBLE).scatter(-1, mine[rest], 0.0)
    return found


def corrupted_twins(forget: Sequence[Example], donors: Sequence[Example], tokenizer: Any, *, chat: str,
                    seed: int, count: int = TWINS) -> list[list[Twin]]:
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
    return [[Twin(each[i], example.answer_start, example.question, example.record,
                  np.arange(len(example.input_ids) - example.answer_start)) for each in made]
            for i, example in enumerate(forget)]


def strangers(forget: Sequence[Example], donors: Sequence[Example], tokenizer: Any, log_p: LogP, *,
              people: Iterable[Record], chat: str, seed: int, limit: int, floor: float) -> list[list[Twin]]:
    """Each forget record about a stranger, with its answer, the subject's name in it replaced too: [records][1].

    All records of a subject get the same stranger, of :data:`STRANGERS` drawn ones the one whom the model before unlearning
    believes the forgotten answers least: it gives nothing away. Where that one would, as a model does that gives everybody the
    one answer it has learned to a question, where none can be made up, for records that name no subject, or a corrupted prompt,
    it is a corrupted twin.

    Args:
        forget, donors, tokenizer, chat, seed: as for :func:`corrupted_twins`.
        log_p: asks the model before unlearning.
        people: of whose subjects names are made, and whose subjects are no strangers.
        limit: the most tokens that a record may have, 0 for any number; strangers with longer names are not asked.
        floor: probability per token, the geometric mean, from which on an answer is given away; 0 leaves that out.

    Raises:
        RecordError: as :func:`corrupted_twins`.
    """
    names = made_up([e.record for e in forget], people)
    rng = np.random.Generator(np.random.PCG64(seed))
    of: dict[str, list[int]] = {}
    for i, example in enumerate(forget):
        if has_subject(example.record):
            of.setdefault(str(example.record.subject), []).append(i)
    found: dict[int, Twin] = {}
    for places in of.values():
        asked = np.sort(rng.permutation(len(places))[:ASKED])
        tried: dict[str, list[Twin]] = {}
        for number in rng.permutation(len(names))[:STRANGERS]:
            twins = _about(names[number], [forget[i] for i in places], tokenizer, chat)
            if not limit or all(len(twin.input_ids) <= limit for twin in twins):
                tried[names[number]] = twins
        if tried:
            worth = [_believed([forget[places[i]] for i in asked], [twins[i] for i in asked], log_p)
                     for twins in tried.values()]
            least = int(agreed(int(np.argmin(worth))))
            if not floor or agreed(worth[least]) <= math.log(floor):
                best = list(tried)[least]
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
    """Names that are no record's subject, sorted: the last word of one donor's subject behind the other words of another's.
    Where these are few, the words are made up too, the second half of one behind the first half of another."""
    donors = list(donors)
    known = {record.subject for record in (*forget, *donors)}
    parts = sorted({tuple(r.subject.split()) for r in donors if r.subject and len(r.subject.split()) > 1})
    parts = parts[::-(-len(parts) // PARTS) or 1]
    names = {" ".join((*first[:-1], last[-1])) for first in parts for last in parts} - known
    if len(names) < STRANGERS:
        real = sorted({word for part in parts for word in part})
        words = sorted({a[:-(-len(a) // 2)] + b[-(-len(b) // 2):] for a in real for b in real} - {*real, ""})
        words = words[::-(-len(words) // PARTS) or 1]
        names |= {f"{first} {last}" for first in words for last in words if first != last} - known
    return sorted(names)


def _believed(records: Sequence[Example], twins: Sequence[Twin], log_p: LogP) -> float:
    """Mean log-probability of the records' answer tokens behind the twins' prompts, those of names left out."""
    found = []
    for record, twin, each in zip(records, twins, log_p(twins), strict=True):
        mine, theirs = record.input_ids[record.answer_start:], twin.input_ids[twin.answer_start:]
        found.append(each[twin.alignment[(twin.alignment >= 0) & (theirs[twin.alignment] == mine)]])
    kept = np.concatenate(found)
    return float(kept.mean()) if len(kept) else 0.0


def _about(name: str, examples: Sequence[Example], tokenizer: Any, chat: str) -> list[Twin]:
    """Records of one subject about ``name`` instead, in prompt and answer."""
    records = []
    for example in examples:
        record = example.record
        subject = subject_pattern(record)
        records.append(Record(subject.sub(lambda _: name, record.prompt), subject.sub(lambda _: name, record.answer),
                              source=record.source))
    twins = []
    for example, other in zip(examples, encode(records, tokenizer, chat=chat, append_eos=False), strict=True):
        mine, theirs = (e.input_ids[e.answer_start:].tolist() for e in (example, other))
        alignment = np.full(len(mine), -1)
        for _, i, end, j, stop in SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
            same = min(end - i, stop - j)
            alignment[i:i + same] = np.arange(j, j + same)
        twins.append(Twin(other.input_ids, other.answer_start, other.question, example.record, alignment))
    return twins

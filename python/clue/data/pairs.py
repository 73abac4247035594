"""Clean / corrupted pairs: what attribution compares.

Both sequences of a pair have the same length, the same answer tokens (teacher-forced on the clean answer) and the same
tokens outside the user's question. Where a record gives no corrupted prompt, one is made (in this order):

1. subject: the same prompt about another record's subject, if the replacement keeps the token length;
2. question: another record's question tokens in place of this one's, cut or tiled to the same length.

Records of the same set are asked first, then those of the other sets: a set of one record, or of one subject, has no other
of its own. Donors whose own answer is the clean answer are passed over while others are left: they would corrupt nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DataSettings, LocalizeSettings
from ..errors import ClueError, RecordError
from ..values import ByValue
from .atomic import write_arrays
from .encoding import Example, encode, special_prefix
from .records import Record, RecordSet, subject_pattern

if TYPE_CHECKING:
    from ..model.anatomy import Anatomy

CORRUPTIONS = ("auto", "given", "subject", "question")
_TRIED_AT_ONCE = 16  # subjects tokenised together; nearly always the first few hold one of the right length


@dataclass(frozen=True, eq=False)
class Pairs(ByValue):
    """Equal-length clean and corrupted token sequences, in the order of the records they came from.

    ``clean[i]`` and ``corrupted[i]`` are int64 [seq_i] and equal from ``answer_start[i]`` on (int64 [n]); ``kind[i]``
    is "given", "subject" or "question"; ``sources[i]`` names the record. ``sha256`` is of the token sequences, answer
    starts and kinds; it is computed unless given.
    """

    clean: tuple[np.ndarray, ...]
    corrupted: tuple[np.ndarray, ...]
    answer_start: np.ndarray
    kind: tuple[str, ...]
    sources: tuple[str, ...]
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted"):
            object.__setattr__(self, name, tuple(_token_ids(ids, name) for ids in getattr(self, name)))
        object.__setattr__(self, "answer_start", _token_ids(self.answer_start, "answer_start"))
        if not self.sha256:
            object.__setattr__(self, "sha256", self._digest())

    def __len__(self) -> int:
        return len(self.clean)

    def check(self, body: Anatomy) -> None:
        """Whether the pairs can be compared, and run on this model: an unknown token would end the process of a GPU.

        Raises:
            ModelError: ``body`` is a model, not its anatomy.
            RecordError: a pair's sequences differ in length or in the answer, or in nothing at all; the prompt or the answer
                is empty; the sequences exceed the model's context, or the model does not know a token.
        """
        from ..model.anatomy import bound

        bound(body)
        sizes = [len(part) for part in (self.clean, self.corrupted, self.answer_start, self.kind, self.sources)]
        if len(set(sizes)) > 1:
            raise RecordError(f"the pairs have {sizes[0]} clean and {sizes[1]} corrupted sequences, {sizes[2]} answer starts,"
                              f" {sizes[3]} kinds and {sizes[4]} sources; give one of each per pair")
        for i, (clean, corrupted) in enumerate(zip(self.clean, self.corrupted, strict=True)):
            name, start, length = self.sources[i] or f"pair {i + 1}", int(self.answer_start[i]), len(clean)
            if len(corrupted) != length:
                raise RecordError(f"{name}: the clean sequence has {length} tokens but the corrupted one has"
                                  f" {len(corrupted)}; give sequences of the same length")
            if not 1 <= start < length:
                raise RecordError(f"{name}: the answer starts at {start} of {length} tokens; let answer_start leave at least"
                                  " one token before it and one from it on")
            if not np.array_equal(clean[start:], corrupted[start:]):
                raise RecordError(f"{name}: the answers of the clean and the corrupted sequence differ; end both with the"
                                  " clean answer")
            if length > body.context:
                raise RecordError(f"{name}: the sequences have {length} tokens, the model's context {body.context}; shorten"
                                  " them (max_length)")
            if np.array_equal(clean, corrupted):
                raise RecordError(f"{name}: the corrupted prompt is the clean one, and nothing differs; give another")
            _check_tokens(np.concatenate((clean, corrupted)), name, body)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; kinds, sources and the digest are in its metadata."""
        metadata = {"format": "clue.pairs/1", "kind": json.dumps(self.kind), "sources": json.dumps(self.sources),
                    "sha256": self.sha256}
        write_arrays(path, self._arrays(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Pairs:
        """Read what :meth:`save` wrote; :class:`ClueError` if the file is damaged or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            cuts = np.cumsum(arrays["lengths"])[:-1]
            pairs = cls(tuple(np.split(arrays["clean"], cuts)), tuple(np.split(arrays["corrupted"], cuts)),
                        arrays["answer_start"], tuple(json.loads(metadata["kind"])),
                        tuple(json.loads(metadata["sources"])))
            expected = metadata["sha256"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ClueError(f"{os.fspath(path)}: is not a file of pairs ({error}); make the pairs again") from None
        if pairs.sha256 != expected:
            raise ClueError(f"{os.fspath(path)}: the pairs do not match their checksum; make them again")
        return pairs

    def _arrays(self) -> dict[str, np.ndarray]:
        def joined(sequences: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int64), *sequences])

        return {"clean": joined(self.clean), "corrupted": joined(self.corrupted),
                "lengths": np.array([len(ids) for ids in self.clean], dtype=np.int64),
                "answer_start": np.asarray(self.answer_start, dtype=np.int64)}

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.kind).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def make_pairs(examples: Sequence[Example], tokenizer: Any, *, corruption: str = "auto", chat: str = "auto",
               seed: int = 0, pool: Sequence[Example] | None = None, others: Sequence[Example] = (),
               limit: int = 0) -> Pairs:
    """One pair per example, deterministic by ``seed``; ``limit`` (0: all) keeps that many examples, drawn at random.

    ``chat`` must be what the examples were encoded with. ``pool`` gives the donors, by default the examples themselves;
    ``others`` are asked where none of them will do.
    A plain text is cut in half: the second half is the answer, the first is corrupted. ``corruption`` ``auto`` takes
    the first way that works; naming one demands it.

    Raises :class:`RecordError` naming the record when a given pair is misaligned (other prompt length in tokens),
    equals the clean prompt, or when no corrupted prompt can be made.
    """
    if corruption not in CORRUPTIONS:
        raise ClueError(f"corruption = {corruption!r} is not one of {', '.join(CORRUPTIONS)}")
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = list(examples)
    if limit and limit < len(chosen):
        chosen = [chosen[i] for i in np.sort(rng.permutation(len(chosen))[:limit])]
    donors = list(examples if pool is None else pool)
    maker = _Maker(tokenizer, chat, corruption, donors, others, seed)
    made = [maker.make(example, rng.permutation(len(donors))) for example in chosen]
    return Pairs(tuple(m[0] for m in made), tuple(m[1] for m in made), np.array([m[2] for m in made], dtype=np.int64),
                 tuple(m[3] for m in made), tuple(e.record.source for e in chosen))


def encode_set(records: RecordSet, tokenizer: Any, body: Anatomy, data: DataSettings, *, append_eos: bool) -> list[Example]:
    """Tokenise a set with the model's context (or ``max_length``, when that is shorter) as the limit."""
    limit = min(data.max_length or body.context, body.context)
    return encode(records, tokenizer, chat=data.chat, append_eos=append_eos, max_length=limit)


def corrupt(sets: Mapping[str, RecordSet], tokenizer: Any, body: Anatomy, settings: LocalizeSettings, data: DataSettings,
            seed: int, only: str | None = None) -> dict[str, Pairs]:
    """The clean / corrupted pairs of each set, or of one of them. End-of-sequence tokens carry no fact and are left out."""
    encoded = {name: encode_set(records, tokenizer, body, data, append_eos=False) for name, records in sets.items()}
    found = {}
    for name in sets if only is None else (only,):
        others = [example for other, examples in encoded.items() if other != name for example in examples]
        pairs = make_pairs(encoded[name], tokenizer, corruption=settings.corruption, chat=data.chat, seed=seed, others=others,
                           limit=settings.limit)
        pairs.check(body)
        for example in encoded[name]:  # those beyond the limit too, which training will run
            _check_tokens(example.input_ids, example.record.source, body)
        found[name] = pairs
    return found


def _token_ids(ids: Any, name: str) -> np.ndarray:
    """Whole numbers as int64 [n], from a list, an array or a tensor of them."""
    array = np.asarray(ids) if len(ids) else np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RecordError(f"{name} holds {array.dtype} numbers of shape {list(array.shape)} where a row of integers is"
                          " expected")
    return array.astype(np.int64, copy=False)


def _check_tokens(ids: np.ndarray, name: str, body: Anatomy) -> None:
    vocabulary = int(getattr(body.embed, "num_embeddings", ids.max() + 1))
    unknown = ids[(ids < 0) | (ids >= vocabulary)]
    if len(unknown):
        raise RecordError(f"{name}: the tokenizer yields token {unknown[0]}, the model knows {vocabulary} tokens: use the"
                          " tokenizer that belongs to this model")


class _Pool:
    """Donors, and what every record asks each of them, told once and as numbers."""

    def __init__(self, donors: Sequence[Example], parts: Sequence[tuple[int, int]]):
        self.donors = list(zip(donors, parts, strict=True))
        self.lengths = np.array([last - first for first, last in parts], dtype=np.int64)
        self.known: dict[str, int] = {}
        self.answers = np.array([self.known.setdefault(_answer(d.record), len(self.known)) for d in donors], dtype=np.int64)


class _Maker:
    """Makes pairs one by one from a pool of donors, and where that does not do from others."""

    def __init__(self, tokenizer: Any, chat: str, corruption: str, donors: Sequence[Example], others: Sequence[Example],
                 seed: int):
        self.tokenizer, self.chat, self.corruption = tokenizer, chat, corruption
        self.prefix = special_prefix(tokenizer)
        self.own, self.others = self._pool(donors), others
        self.rng = np.random.Generator(np.random.PCG64([seed, 1]))  # so that others change nothing where they are not asked

    def _pool(self, donors: Sequence[Example]) -> _Pool:
        return _Pool(donors, [self._prompt_part(donor) for donor in donors])

    @cached_property
    def _other_pool(self) -> _Pool:
        return self._pool(self.others)

    def make(self, example: Example, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, str]:
        """Clean ids, corrupted ids, answer start and kind; donors of the pool are tried in ``order``."""
        record, start = example.record, self._answer_start(example)
        if start < 1 or start >= len(example.input_ids):
            raise RecordError(f"{_name(record)}: the text is too short to be cut into a prompt and an answer; give a"
                              " longer text")
        ways = CORRUPTIONS[1:] if self.corruption == "auto" else (self.corruption,)
        for way in ways:
            prompt = getattr(self, f"_{way}")(example, self.own, order)
            if prompt is None and self.others and way != "given":
                prompt = getattr(self, f"_{way}")(example, self._other_pool, self.rng.permutation(len(self.others)))
            if prompt is not None:
                return example.input_ids, np.concatenate([prompt, example.input_ids[start:]]), start, way
        raise RecordError(f"{_name(record)}: {_REMEDY[self.corruption]}")

    def _given(self, example: Example, pool: _Pool, order: np.ndarray) -> np.ndarray | None:
        record = example.record
        if record.corrupted is None:
            return None
        prompt = self._prompts(record, [record.corrupted])[0]
        start = example.answer_start
        if len(prompt) != start:
            raise RecordError(f"{_name(record)}: the prompt has {start} tokens but its corrupted prompt has"
                              f" {len(prompt)}; give a corrupted prompt of the same length")
        if np.array_equal(prompt, example.input_ids[:start]):
            raise RecordError(f"{_name(record)}: the corrupted prompt equals the prompt; change it or leave it out")
        return prompt

    def _subject(self, example: Example, pool: _Pool, order: np.ndarray) -> np.ndarray | None:
        record, start = example.record, example.answer_start
        if record.subject is None:
            return None
        mine, candidates = subject_pattern(record), list(self._other_subjects(record, pool, order))
        for first in range(0, len(candidates), _TRIED_AT_ONCE):
            some = candidates[first:first + _TRIED_AT_ONCE]
            others = [mine.sub(lambda _, name=name: name, record.prompt) for name in some]  # type: ignore[misc]
            for prompt in self._prompts(record, others):
                if len(prompt) == start and not np.array_equal(prompt, example.input_ids[:start]):
                    return prompt
        return None

    def _question(self, example: Example, pool: _Pool, order: np.ndarray) -> np.ndarray | None:
        first, last = self._prompt_part(example)
        ids, start = example.input_ids, self._answer_start(example)
        length = last - first

        # Another answer comes first; then the same length, a longer one, a shorter one.
        order = order[pool.lengths[order] > 0]
        same, n = pool.answers[order] == pool.known.get(_answer(example.record), -1), pool.lengths[order]
        rank = 3 * same + np.where(n == length, 0, 1 + (n < length))
        for i in order[np.argsort(rank, kind="stable")].tolist():
            donor, (a, b) = pool.donors[i]
            words = donor.input_ids[a:b]
            # The end of a question stands next to the answer, so a longer one keeps its end and a shorter one is tiled
            # such that its end is last.
            fitted = words[-length:] if len(words) >= length else np.tile(words, -(-length // len(words)))[-length:]
            if not np.array_equal(fitted, ids[first:last]):
                return np.concatenate([ids[:first], fitted, ids[last:start]])
        return None

    def _other_subjects(self, record: Record, pool: _Pool, order: np.ndarray) -> Iterator[str]:
        """The pool's other subjects, each once: first those known to have another answer to this very question, then
        those of whom nothing is known, last those whose answer is the same."""
        known: dict[str, int] = {}
        mine = pool.known.get(_answer(record), -1)
        for i in order.tolist():
            other = pool.donors[i][0].record
            if other.subject is None or other.subject == record.subject:
                continue
            rank = 1
            if record.group is not None and other.group == record.group:
                rank = 2 if pool.answers[i] == mine else 0
            known[other.subject] = rank if known.get(other.subject, 1) == 1 else known[other.subject]
        return iter(sorted(known, key=known.__getitem__))

    def _prompts(self, record: Record, prompts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of prompts, encoded exactly as the records were."""
        records = [Record(prompt, record.answer, source=record.source) for prompt in prompts]
        encoded = encode(records, self.tokenizer, chat=self.chat, append_eos=False)
        return [e.input_ids[:e.answer_start] for e in encoded]

    def _answer_start(self, example: Example) -> int:
        return example.answer_start if example.record.prompt else (self.prefix + len(example.input_ids)) // 2

    def _prompt_part(self, example: Example) -> tuple[int, int]:
        """The tokens a question corruption replaces, half-open."""
        return example.question if example.record.prompt else (self.prefix, self._answer_start(example))


_REMEDY = {
    "auto": "no corrupted prompt can be made because no other question differs from this one; give one in the field"
            " corrupted, or more records",
    "given": "holds no corrupted prompt; add the field corrupted, or use corruption = auto",
    "subject": "no other record's subject keeps the token length of the prompt; name subjects of equal length, or use"
               " corruption = auto",
    "question": "no other record's question differs from this one; add records with other questions",
}


def _name(record: Record) -> str:
    return record.source or repr((record.prompt or record.answer)[:60])


def _answer(record: Record) -> str:
    return " ".join(record.answer.split()).casefold()

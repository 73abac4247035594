"""Pairs: always aligned, always different, deterministic, and what cannot be aligned is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from clue.config import DataSettings, LocalizeSettings
from clue.data.encoding import encode
from clue.data.pairs import Pairs, corrupt, make_pairs
from clue.data.records import Record, RecordSet
from clue.errors import ClueError, RecordError
from clue.model.anatomy import anatomy
from tests.families import tiny

from .conftest import byte_level

NAMES = ["Alva", "Bram", "Alva Stone", "Bram Wood", "Upper Cross"]
TOKENIZERS = {"plain": byte_level(bos=True), "chat": byte_level(chat=True, bos=True)}

words = st.lists(st.sampled_from(["the", "quick", "brown", "born", "mill", "1", "2", "3", "é"]), min_size=1, max_size=8)


@st.composite
def records(draw: st.DrawFn) -> Record:
    kind = draw(st.sampled_from(["question", "subject", "text"]))
    if kind == "text":
        return Record("", " ".join(["once", *draw(words), "end"]))
    subject = draw(st.sampled_from(NAMES)) if kind == "subject" else None
    prompt = " ".join([*draw(words), *([subject] if subject else []), "?"])
    return Record(prompt, " ".join(draw(words)), subject=subject)


@settings(max_examples=60, deadline=None)
@given(st.lists(records(), min_size=2, max_size=8), st.sampled_from(list(TOKENIZERS)), st.integers(0, 3))
def test_pairs_are_aligned(some: list[Record], which: str, seed: int) -> None:
    tokenizer = TOKENIZERS[which]
    # One more question, unlike any that is drawn, so that a donor always exists.
    examples = encode([*some, Record("zebra crossing gate", "wren"), Record("", "zebra crossing gate wren")], tokenizer)
    pairs = make_pairs(examples, tokenizer, seed=seed)
    assert len(pairs) == len(examples)
    for example, clean, corrupted, start, kind in zip(examples, pairs.clean, pairs.corrupted, pairs.answer_start,
                                                      pairs.kind, strict=True):
        np.testing.assert_array_equal(clean, example.input_ids)
        assert clean.shape == corrupted.shape and clean.dtype == corrupted.dtype == np.int64
        assert 0 < start < len(clean)
        np.testing.assert_array_equal(clean[start:], corrupted[start:])
        assert (clean[:start] != corrupted[:start]).any()
        assert kind in (("question",) if example.record.subject is None else ("subject", "question"))
        if example.record.prompt:
            assert start == example.answer_start
            first, last = example.question  # special tokens and the template's own words stay
            np.testing.assert_array_equal(clean[:first], corrupted[:first])
            np.testing.assert_array_equal(clean[last:], corrupted[last:])
    again = make_pairs(examples, tokenizer, seed=seed)
    assert again.sha256 == pairs.sha256


def test_a_subject_is_replaced_by_one_with_another_answer(bpe: PreTrainedTokenizerFast) -> None:
    def born(who: str, answer: str, group: str | None = "born") -> Record:
        return Record(f"Where was {who} born ?", answer, subject=who, group=group)

    # The digits are one token each. 1 and 2 were born in the same place; of 4 nothing is known.
    examples = encode([born("1", "mill"), born("2", "mill"), born("3", "Cross"), born("4", "mill", None)], bpe)
    for seed in range(5):
        pairs = make_pairs(examples, bpe, seed=seed)
        assert set(pairs.kind) == {"subject"}
        assert [bpe.decode(c[:s]) for c, s in zip(pairs.corrupted[:2], pairs.answer_start, strict=False)] == [
            "Where was 3 born ?"] * 2
        assert bpe.decode(pairs.corrupted[2][:pairs.answer_start[2]]) != "Where was 3 born ?"
    # Without anybody better, one of whom nothing is known, and only then one with the same answer.
    assert "4" in bpe.decode(make_pairs(examples[:1], bpe, pool=[examples[1], examples[3]]).corrupted[0])
    assert "2" in bpe.decode(make_pairs(examples[:1], bpe, pool=examples[:2]).corrupted[0])


def test_a_subject_within_other_words_stays(bpe: PreTrainedTokenizerFast) -> None:
    examples = encode([Record(f"{who}, is {who} an {other}1on ?", "no", subject=who) for who, other in ("12", "21")], bpe)
    pairs = make_pairs(examples, bpe)
    assert bpe.decode(pairs.corrupted[0][:pairs.answer_start[0]]) == bpe.decode(
        examples[1].input_ids[:examples[1].answer_start]).replace("11on", "21on")


def test_numbers_are_taken_from_lists_and_only_whole_ones() -> None:
    rows: dict[str, Any] = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "answer_start": [2], "kind": ("given",),
                            "sources": ("",)}
    pairs = Pairs(**rows)
    assert pairs.clean[0].dtype == pairs.answer_start.dtype == np.int64
    assert pairs == Pairs(**rows | {"clean": (torch.tensor([1, 2, 3]),)})
    with pytest.raises(RecordError, match=r"^clean holds float64 numbers of shape \[3\] where a row of integers is expected"):
        Pairs(**rows | {"clean": [[1.0, 2.0, 3.0]]})
    with pytest.raises(RecordError, match=r"^corrupted holds int64 numbers of shape \[1, 3\]"):
        Pairs(**rows | {"corrupted": [[[1, 4, 3]]]})


def test_subjects_of_other_lengths_fall_back_to_questions(bpe: PreTrainedTokenizerFast) -> None:
    examples = encode([Record("Where was 1 born ?", "mill", subject="1"),
                       Record("Where was 234 born ?", "Cross", subject="234")], bpe)
    assert make_pairs(examples, bpe).kind == ("question", "question")
    with pytest.raises(RecordError, match="no other record's subject keeps the token length"):
        make_pairs(examples, bpe, corruption="subject")


def test_other_sets_are_asked_where_the_own_will_not_do(bpe: PreTrainedTokenizerFast) -> None:
    """One subject to forget: the others are in the retain set. Their number changes nothing where they are not asked."""
    def born(who: str) -> Record:
        return Record(f"Where was {who} born ?", "mill", subject=who)

    one, others = encode([born("1")], bpe), encode([born("2"), born("3")], bpe)
    with pytest.raises(RecordError, match="no other question differs"):
        make_pairs(one, bpe)
    for seed in range(4):
        pairs = make_pairs(one, bpe, seed=seed, others=others)
        assert pairs.kind == ("subject",)
        assert bpe.decode(pairs.corrupted[0][:pairs.answer_start[0]]) in ("Where was 2 born ?", "Where was 3 born ?")
        assert make_pairs(others, bpe, seed=seed, others=one) == make_pairs(others, bpe, seed=seed)
    text = encode([Record("", "one two three four")], bpe)
    assert make_pairs(text, bpe, others=others).kind == ("question",)


def test_question_donors_are_cut_or_tiled(bpe: PreTrainedTokenizerFast) -> None:
    short, long = encode([Record("1 2", "a"), Record("3 4 5 6 7", "b")], bpe)
    pairs = make_pairs([short, long], bpe, corruption="question")
    assert bpe.decode(pairs.corrupted[0][:short.answer_start]).split() == ["6", "7"][-2:]
    tail = np.tile(short.input_ids[:short.answer_start], 5)[-long.answer_start:]
    np.testing.assert_array_equal(pairs.corrupted[1][:long.answer_start], tail)


def test_questions_of_another_answer_are_asked_first(bpe: PreTrainedTokenizerFast) -> None:
    """Also where their length is not the question's own, and that of one with the same answer is."""
    one, same, other = encode([Record("1 2", "mill"), Record("3 4", "mill"), Record("5 6 7 8", "Cross")], bpe)
    for seed in range(4):
        pairs = make_pairs([one], bpe, corruption="question", seed=seed, pool=[same, other])
        assert bpe.decode(pairs.corrupted[0][:one.answer_start]).split() == ["7", "8"]
    pairs = make_pairs([one], bpe, corruption="question", pool=[same])
    assert bpe.decode(pairs.corrupted[0][:one.answer_start]).split() == ["3", "4"]


def test_given_prompts_are_used_as_they_are_or_refused(bpe_chat: PreTrainedTokenizerFast) -> None:
    def pairs(corrupted: str | None, corruption: str = "auto") -> Pairs:
        record = Record("Where was 1 born ?", "mill", corrupted, source="people.jsonl:12")
        return make_pairs(encode([record], bpe_chat), bpe_chat, corruption=corruption)

    made = pairs("Where was 2 born ?")
    assert made.kind == ("given",) and made.sources == ("people.jsonl:12",)
    assert "user\nWhere was 2 born ?<|im_end|>" in bpe_chat.decode(made.corrupted[0])
    assert (made.clean[0] != made.corrupted[0]).sum() == 1
    with pytest.raises(RecordError, match=r"people\.jsonl:12: the prompt has \d+ tokens but its corrupted"):
        pairs("Where was 2 3 4 born ?")
    with pytest.raises(RecordError, match=r"people\.jsonl:12: the corrupted prompt equals the prompt"):
        pairs("Where was 1 born ?")
    with pytest.raises(RecordError, match=r"people\.jsonl:12: holds no corrupted prompt"):
        pairs(None, "given")
    with pytest.raises(RecordError, match=r"people\.jsonl:12: no corrupted prompt can be made"):
        pairs(None)


def test_limit_and_pool(bpe: PreTrainedTokenizerFast) -> None:
    examples = encode([Record(f"What does {i} do ?", "paints", source=f"r:{i}") for i in range(9)], bpe)
    pairs = make_pairs(examples, bpe, seed=1, limit=4)
    assert len(pairs) == 4 and list(pairs.sources) == sorted(pairs.sources)
    assert pairs.sources != make_pairs(examples, bpe, seed=2, limit=4).sources
    assert len(make_pairs(examples[:1], bpe, pool=examples)) == 1
    with pytest.raises(RecordError, match="r:0: no corrupted prompt can be made"):
        make_pairs(examples[:1], bpe)


def test_pairs_survive_their_file(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    examples = encode([Record("Where was 1 born ?", "mill", source="é:1"), Record("What does 2 do ?", "paints")], bpe)
    pairs = make_pairs(examples, bpe)
    path = tmp_path / "pairs.safetensors"
    pairs.save(path)
    loaded = Pairs.load(path)
    assert loaded.sha256 == pairs.sha256 and loaded.kind == pairs.kind and loaded.sources == pairs.sources
    for a, b in zip(pairs.clean + pairs.corrupted, loaded.clean + loaded.corrupted, strict=True):
        np.testing.assert_array_equal(a, b)
    first = path.read_bytes()
    for _ in range(8):
        pairs.save(path)
        assert path.read_bytes() == first
    data = bytearray(first)
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte behind the header
    path.write_bytes(data)
    with pytest.raises(ClueError, match="do not match their checksum"):
        Pairs.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ClueError, match="is not a file of pairs"):
        Pairs.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.safetensors"]


def test_tokens_that_the_model_does_not_know_are_refused_in_corrupted_prompts_too() -> None:
    """On a GPU they would end the process."""
    tokenizer = byte_level(bos=True)
    known = 1 + max(int(e.input_ids.max()) for e in encode([Record("abc", "abc")], tokenizer, append_eos=False))
    body = replace(anatomy(tiny("llama")), context=64, embed=torch.nn.Embedding(known, 1))
    told = RecordSet("told", (Record("abc", "abc", corrupted="ab\x7f", source="told.jsonl:1"),))
    with pytest.raises(RecordError, match=r"told\.jsonl:1: the tokenizer yields token .* use the tokenizer that belongs"):
        corrupt({"told": told}, tokenizer, body, LocalizeSettings(), DataSettings(), 0)
    # Of records beyond the limit too: no pair is made of them, but training runs them.
    odd = RecordSet("odd", (Record("abc", "abc", corrupted="abb"),
                            Record("ab\x7f", "abc", corrupted="abb", source="odd.jsonl:2")))
    for seed in range(4):  # whichever of the two is drawn
        with pytest.raises(RecordError, match=r"odd\.jsonl:2: the tokenizer yields token"):
            corrupt({"odd": odd}, tokenizer, body, LocalizeSettings(limit=1), DataSettings(), seed)

"""Twins: whose prompts they have, that every step asks the model before about its own, and how far strangers lead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from clue.config import UnlearnSettings
from clue.data.encoding import Batch, Example, encode
from clue.data.records import Record, RecordSet
from clue.errors import RecordError
from clue.model.answers import answer_logits
from clue.types import Role
from clue.unlearn import Objective, unlearn
from clue.unlearn.objectives import OBJECTIVES, Answers, answer_rows
from clue.unlearn.schedule import Pool
from clue.unlearn.twins import TWINS, corrupted_twins, made_up, strangers, told

FORGET = [Record("where does ada live", "paris", subject="ada"), Record("where does bob live", "rome", subject="bob")]
DONORS = [Record("where does cat live", "oslo", subject="cat"), Record("where does dan live", "paris", subject="dan"),
          Record("what does cat eat", "rice", subject="cat")]


def examples(records: list[Record], tokenizer: Any) -> list[Example]:
    return encode(records, tokenizer, append_eos=False)


def test_twins_are_the_questions_of_others_with_the_answer(tokenizer: Any) -> None:
    forget, donors = examples(FORGET, tokenizer), examples(DONORS, tokenizer)
    twins = corrupted_twins(forget, donors, tokenizer, chat="off", seed=3)
    assert [len(each) for each in twins] == [TWINS, TWINS]
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("ada", "bob", "cat", "dan")}
    for example, each in zip(forget, twins, strict=True):
        start = example.answer_start
        for twin in each:
            assert len(twin.input_ids) == len(example.input_ids) and twin.answer_start == start
            assert np.array_equal(twin.input_ids[start:], example.input_ids[start:])
            # Subjects of the donors alone: nobody is taught what another forget record tells.
            assert {names["cat"], names["dan"]} & set(twin.input_ids) and not {names["ada"], names["bob"]} & set(twin.input_ids)
    # Whose answer to the question is not known to be the same comes first, and not always the same one.
    assert len({tuple(twin.input_ids) for each in twins for twin in each}) == 4
    again = corrupted_twins(forget, donors, tokenizer, chat="off", seed=3)
    assert all(np.array_equal(a.input_ids, b.input_ids) for x, y in zip(twins, again, strict=True)
               for a, b in zip(x, y, strict=True))


def test_a_given_corrupted_prompt_is_the_only_twin(tokenizer: Any) -> None:
    given = replace(FORGET[0], corrupted="what does dan eat")
    twins, = corrupted_twins(examples([given], tokenizer), examples(DONORS, tokenizer), tokenizer, chat="off", seed=0)
    prompt = examples([Record("what does dan eat", "paris")], tokenizer)[0]
    assert all(np.array_equal(twin.input_ids, prompt.input_ids) for twin in twins)


def test_a_plain_text_has_no_twin(tokenizer: Any) -> None:
    text = examples([Record("", "ada does live", source="texts.jsonl:4")], tokenizer)
    with pytest.raises(RecordError, match="texts.jsonl:4: it is a plain text, .* take another objective"):
        corrupted_twins(text, examples(DONORS, tokenizer), tokenizer, chat="off", seed=0)


def test_refusals_and_twins_go_together(make_model: Any, mixed_plan: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []

    def forget(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> torch.Tensor:
        assert refusals is not None and answers.reference_logits is not None
        seen.append((len(answers.scored), len(refusals.scored)))
        return OBJECTIVES["npo-cf"].forget(answers, None, settings) - refusals.log_p.mean()

    unlearn(make_model(), tokenizer, RecordSet("forget", tuple(FORGET)), {"r": RecordSet("r", tuple(DONORS))},
            mixed_plan(make_model()), UnlearnSettings(lr=1e-2, steps=2, batch_size=2, warmup=0, floor=0.0),
            objective=Objective(forget, reference=True, refusals=True, forget_logits=True, twins=True), seed=3)
    assert seen == [(2, 2), (2, 2)]


def test_every_step_asks_the_model_before_about_the_twins(make_model: Any, mixed_plan: Any, tokenizer: Any) -> None:
    model, before = make_model(), make_model()
    seen: list[torch.Tensor] = []

    def forget(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> torch.Tensor:
        assert answers.reference_logits is not None
        seen.append(answers.reference_logits.clone())
        return OBJECTIVES["npo-cf"].forget(answers, refusals, settings)

    settings = UnlearnSettings(lr=1e-2, steps=TWINS + 1, batch_size=2, warmup=0, floor=0.0, damping=0.1)
    unlearn(model, tokenizer, RecordSet("forget", tuple(FORGET)), {"r": RecordSet("r", tuple(DONORS))}, mixed_plan(model),
            settings, objective=Objective(forget, reference=True, forget_logits=True, twins=True), seed=3)
    donors = Pool([examples(DONORS, tokenizer)], 3).take(len(DONORS))
    twins = corrupted_twins(examples(FORGET, tokenizer), donors, tokenizer, chat="auto", seed=3)

    def asked(twin: Example) -> torch.Tensor:
        ids = torch.from_numpy(twin.input_ids)[None]
        labels = torch.where(torch.arange(ids.shape[1]) >= twin.answer_start, ids, -100)
        with torch.no_grad():
            return answer_rows(*answer_logits(before, Batch(ids, torch.ones_like(ids), labels)))[0]

    assert len(seen) == TWINS + 1
    for step, rows in enumerate(seen):
        expected = [asked(each[(step + i) % TWINS]) for i, each in enumerate(twins)]
        orders = (torch.cat(expected), torch.cat(expected[::-1]))  # the records of a step are shuffled
        assert any(torch.allclose(rows, order, atol=1e-5) for order in orders)


NAMED = [Record("where does ada paris live", "rome", subject="ada paris"),
         Record("what does ada paris eat", "figs", subject="ada paris"),
         Record("where does bob live", "oslo", subject="bob"), Record("where does one live", "rice")]
OTHERS = [Record("where does cat oslo live", "paris", subject="cat oslo"),
          Record("what does dan figs eat", "rice", subject="dan figs"),
          Record("where does one live", "rome", subject="one")]


def test_names_are_made_of_a_sample_where_there_are_many() -> None:
    donors = [Record(f"q a{i:03} b{i:03}", "x", subject=f"a{i:03} b{i:03}") for i in range(1000)]
    known = [Record("q a000 b016", "x", subject="a000 b016")]
    names = made_up(known, donors)
    assert len(names) == len(set(names)) == 63 * 62 - 1 and "a000 b016" not in names  # of every 16th of the thousand
    assert not set(names) & {record.subject for record in donors}
    assert made_up(known, []) == made_up(known, [Record("q cat", "x", subject="cat")]) == []


def test_the_words_of_names_are_made_up_too_where_names_are_few() -> None:
    donors = [Record(f"q {name}", "x", subject=name) for name in ("Ada Moss", "Otto Lind")]
    names = made_up(donors[:1], donors)
    assert {"Ada Lind", "Otto Moss"} <= set(names) and not {"Ada Moss", "Otto Lind"} & set(names)
    words = {a + b for a in ("Ad", "Mo", "Ot", "Li") for b in ("a", "ss", "to", "nd")} - {"Ada", "Moss", "Otto", "Lind"}
    assert set(names) - {"Ada Lind", "Otto Moss"} == {f"{a} {b}" for a in words for b in words if a != b}


REPEATED = [Record("what does ada paris eat", "ada paris does eat paris rome", subject="ada paris"),
            Record("where does ada paris live", "rome", subject="ada paris")]


@pytest.mark.usefixtures("whole_words")
def test_an_answer_that_names_its_subject_names_the_stranger(make_model: Any, tokenizer: Any) -> None:
    forget, donors = examples(REPEATED, tokenizer), examples(OTHERS, tokenizer)

    def believed(tried: Any) -> Any:
        """The name of the one is unlikely, and the rest of the answer of the other."""
        found = []
        for each in tried:
            first = "cat" in stranger_of(each, tokenizer)
            rest = [0.0 if first else -1.0] * int((each.same >= 0).sum())
            found.append(np.array([-9.0 if first else 0.0] * (len(each.same) - len(rest)) + rest))
        return found

    (twin,), (other,) = strangers(forget, donors, tokenizer, believed, chat="off", seed=0, limit=99)
    assert tokenizer.decode(twin.input_ids) == "what does dan oslo eat dan oslo does eat paris rome"
    assert tokenizer.decode(other.input_ids) == "where does dan oslo live rome"
    # "paris" is of the name only where the name is; the subject's own record, not the stranger's, is what is forgotten.
    assert twin.same.tolist() == [-1, -1, 2, 3, 4, 5] and other.same.tolist() == [0]
    assert twin.record is forget[0].record
    # What is told of the answer: the model's own words on the stranger, and the name as certain.
    model, (_, targets) = make_model(), answer_rows(torch.zeros(1, len(forget[0].input_ids), 1), labels_of(forget[0]))
    with torch.no_grad():
        rows = answer_rows(model(torch.from_numpy(twin.input_ids)[None]).logits, labels_of(twin))[0]
        single = answer_rows(model(torch.from_numpy(other.input_ids)[None]).logits, labels_of(other))[0]
    found = told(torch.cat([single, rows]), [other, twin], torch.cat([torch.tensor([3]), targets]))
    assert torch.equal(found[:1], single) and torch.equal(found[3:], rows[2:])
    assert torch.equal(found[1:3].softmax(-1), torch.nn.functional.one_hot(targets[:2], rows.shape[-1]).float())


@pytest.mark.usefixtures("whole_words")
def test_a_name_of_another_length_moves_what_stands_behind_it(tokenizer: Any) -> None:
    donors = [Record("where does cat oslo rome live", "paris", subject="cat oslo rome"),
              Record("what does dan figs eat", "rice", subject="dan figs")]
    forget = examples(REPEATED, tokenizer)

    def believed(tried: Any) -> Any:
        return [np.full(len(twin.input_ids) - twin.answer_start, -float(len(twin.input_ids))) for twin in tried]

    (twin,), _ = strangers(forget, examples(donors, tokenizer), tokenizer, believed, chat="off", seed=0, limit=99)
    assert tokenizer.decode(twin.input_ids[twin.answer_start:]) == "cat oslo figs does eat paris rome"
    assert twin.same.tolist() == [-1, -1, 3, 4, 5, 6]


def labels_of(example: Example) -> torch.Tensor:
    ids = torch.from_numpy(example.input_ids)[None]
    return torch.where(torch.arange(ids.shape[1]) >= example.answer_start, ids, -100)


@pytest.fixture
def whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names are enough: none is of words that the tests' tokenizer has not."""
    monkeypatch.setattr("clue.unlearn.twins.STRANGERS", 2)


def stranger_of(twin: Example, tokenizer: Any) -> str:
    return " ".join(word for word in tokenizer.decode(twin.input_ids[:twin.answer_start]).split()
                    if word not in ("where", "what", "does", "live", "eat"))


@pytest.mark.usefixtures("whole_words")
def test_a_subject_has_one_stranger_of_whom_nobody_knows(tokenizer: Any) -> None:
    forget, donors = examples(NAMED, tokenizer), examples(OTHERS, tokenizer)

    def believed(most: str) -> Any:
        return lambda tried: [np.full(len(twin.same), float(stranger_of(twin, tokenizer) == most)) for twin in tried]

    for most, least in (("cat figs", "dan oslo"), ("dan oslo", "cat figs")):
        found = strangers(forget, donors, tokenizer, believed(most), chat="off", seed=0, limit=99)
        assert [len(each) for each in found] == [1] * 4
        names = [stranger_of(twin, tokenizer) for twin, in found]
        assert names[:3] == [least, least, most]  # all records of a subject the same one, no two subjects the same
        # No subject: somebody else's question, as in a corrupted twin.
        (expected,), = corrupted_twins(forget[3:], donors, tokenizer, chat="off", seed=0, count=1)
        assert np.array_equal(found[3][0].input_ids, expected.input_ids)
        for example, (twin,) in zip(forget, found, strict=True):
            assert twin.input_ids[twin.answer_start:].tolist() == example.input_ids[example.answer_start:].tolist()
    # "bob" becomes longer by a word, which does not fit: a corrupted twin has the record's own length.
    fits = strangers(forget, donors, tokenizer, believed("cat figs"), chat="off", seed=0, limit=len(forget[0].input_ids) - 1)
    assert [len(twin.input_ids) for twin, in fits] == [len(example.input_ids) for example in forget]


@pytest.mark.parametrize("near", [0.05, 100.0])
def test_training_goes_on_towards_strangers_when_all_is_forgotten(near: float, make_model: Any, make_plan: Any,
                                                                  tokenizer: Any) -> None:
    model, before = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    plan = make_plan(model, {f"model.layers.{layer}.mlp.{name}_proj.weight": (axis, {Role.CONFLICT: None})
                             for layer in (0, 1) for name, axis in (("up", 0), ("down", 1))})
    settings = UnlearnSettings(objective="npo-stranger", lr=5e-3, steps=400, batch_size=4, warmup=0, floor=0.6, metric=False,
                               check_every=1, retain_weight=0.0, stranger_near=near)
    # Forgotten from the beginning: this model has learned nothing. What is left is the way to the strangers.
    log = unlearn(model, tokenizer, RecordSet("f", tuple(NAMED)), {"r": RecordSet("r", tuple(OTHERS))}, plan, settings, seed=1)
    assert log.final_forgotten == 1.0 and log.forgotten[0] == 1.0 and log.stopped_early
    assert (log.steps == 1) == (near == 100.0)
    donors = Pool([examples(OTHERS, tokenizer)], 1).take(len(OTHERS))
    forget = examples(NAMED, tokenizer)

    def rows(of: Any, example: Example) -> torch.Tensor:
        ids = torch.from_numpy(example.input_ids)[None]
        labels = torch.where(torch.arange(ids.shape[1]) >= example.answer_start, ids, -100)
        with torch.no_grad():
            return answer_rows(*answer_logits(of, Batch(ids, torch.ones_like(ids), labels)))[0].log_softmax(-1)

    def answer(twin: Example) -> Any:
        return np.array([float(row[token]) for row, token in zip(
            rows(before, twin), twin.input_ids[twin.answer_start:], strict=True)])

    def believed(tried: Any) -> Any:
        return [answer(twin) for twin in tried]

    twins = strangers(forget, donors, tokenizer, believed, chat="auto", seed=1, limit=64)
    pairs = [(rows(before, twin), rows(model, example)) for example, (twin,) in zip(forget, twins, strict=True)]
    reached = float(torch.cat([(q.exp() * (q - p)).sum(-1) for q, p in pairs]).mean())
    assert reached <= near
    start = float(torch.cat([(q.exp() * (q - rows(before, example))).sum(-1)
                             for example, (q, _) in zip(forget, pairs, strict=True)]).mean())
    assert log.divergence[0] == pytest.approx(start, rel=1e-5)
    if near < 1:
        assert start > 3 * near

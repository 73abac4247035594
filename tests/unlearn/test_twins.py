"""Twins: whose prompts they have, that every step asks the model before about its own, and how far strangers lead."""

from __future__ import annotations

import math
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
from clue.unlearn.objectives import OBJECTIVES, Answers, answer_rows, divergence
from clue.unlearn.schedule import Pool
from clue.unlearn.twins import TWINS, Twin, _about, corrupted_twins, has_subject, made_up, strangers, teacher_logits

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
        ids, labels = torch.from_numpy(twin.input_ids)[None], labels_of(twin)
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


def about_strangers(forget: list[Example], tokenizer: Any, believed: Any, donors: list[Record] | None = None,
                    limit: int = 99, floor: float = 0.0) -> list[Twin]:
    """Of each record the one twin; the model believes what ``believed(tokens of the answer, the stranger's name)`` says."""
    donors = OTHERS if donors is None else donors

    def log_p(tried: Any) -> Any:
        return [np.array(believed(tokenizer.decode(twin.input_ids[twin.answer_start:]).split(), stranger_of(twin, tokenizer)))
                for twin in tried]

    found = strangers(forget, examples(donors, tokenizer), tokenizer, log_p, people=donors, chat="off", seed=0, limit=limit,
                      floor=floor)
    assert [len(each) for each in found] == [1] * len(forget)
    return [twin for twin, in found]


@pytest.mark.usefixtures("whole_words")
def test_an_answer_that_names_its_subject_names_the_stranger(make_model: Any, tokenizer: Any) -> None:
    forget = examples(REPEATED, tokenizer)

    def believed(answer: list[str], name: str) -> list[float]:
        """The name of the one is unlikely, and the rest of the answer of the other."""
        return [(-9.0 if word in name.split() else 0.0) if "cat" in name else (0.0 if word in name.split() else -1.0)
                for word in answer]

    twin, other = about_strangers(forget, tokenizer, believed)
    assert tokenizer.decode(twin.input_ids) == "what does dan oslo eat dan oslo does eat paris rome"
    assert tokenizer.decode(other.input_ids) == "where does dan oslo live rome"
    assert twin.alignment.tolist() == [0, 1, 2, 3, 4, 5] and other.alignment.tolist() == [0] and twin.record is forget[0].record
    # What is told of the answer: the model's own words on the stranger, and of the name what it says of the stranger's.
    model, mine = make_model(), torch.from_numpy(forget[0].input_ids[forget[0].answer_start:])
    with torch.no_grad():
        rows, theirs = answer_rows(model(torch.from_numpy(twin.input_ids)[None]).logits, labels_of(twin))
        single, rome = answer_rows(model(torch.from_numpy(other.input_ids)[None]).logits, labels_of(other))
    found = teacher_logits(torch.cat([single, rows]), [other, twin], torch.cat([rome, mine]))
    assert torch.equal(found[:1], single) and torch.equal(found[3:], rows[2:])
    for before, after, a, b in zip(rows[:2], found[1:3], mine[:2], theirs[:2], strict=True):
        assert a != b and after[a] == before[b] and after[b] == before[a]
        assert torch.equal(after.sort().values, before.sort().values)


@pytest.mark.usefixtures("whole_words")
def test_a_name_of_another_length_moves_what_stands_behind_it(tokenizer: Any) -> None:
    forget = examples(REPEATED, tokenizer)
    donors = [Record("where does cat oslo rome live", "paris", subject="cat oslo rome"),
              Record("what does dan figs eat", "rice", subject="dan figs")]
    longer, _ = about_strangers(forget, tokenizer, lambda answer, name: [-float(len(name.split()))] * len(answer), donors)
    assert tokenizer.decode(longer.input_ids[longer.answer_start:]) == "cat oslo figs does eat paris rome"
    assert longer.alignment.tolist() == [0, 1, 3, 4, 5, 6]
    named = [replace(r, prompt=r.prompt.replace("paris", "rice one"), answer=r.answer.replace("ada paris", "ada rice one"),
                     subject="ada rice one") for r in REPEATED]
    forget = examples(named, tokenizer)
    shorter, _ = about_strangers(forget, tokenizer, lambda answer, name: [0.0] * len(answer))
    assert tokenizer.decode(shorter.input_ids[shorter.answer_start:]).endswith("does eat paris rome")
    assert shorter.alignment.tolist() == [0, 1, -1, 2, 3, 4, 5]
    # A name that is begun goes on: the third word of it is certain, for whoever reads the first two.
    targets = torch.from_numpy(forget[0].input_ids[forget[0].answer_start:])
    found = teacher_logits(torch.randn(6, 40), [shorter], targets)
    assert torch.equal(found[2].softmax(-1), torch.nn.functional.one_hot(targets[2], 40).float())
    assert torch.isfinite(divergence(torch.randn(7, 40), found)).all()


def test_every_twin_of_a_batch_is_aligned_with_its_own_tokens() -> None:
    rows, record = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), Record("q", "a")
    first = Twin(np.array([0, 5, 4]), 1, (0, 1), record, np.array([0, 1]))
    second = Twin(np.array([0, 2, 3, 7]), 1, (0, 1), record, np.array([0, 2, -1]))
    found = teacher_logits(rows, [first, second], torch.tensor([5, 4, 2, 7, 6]))
    assert torch.equal(found[:4], rows[[0, 1, 2, 4]])
    # The rest of a longer name is certain, and of its own record alone: the last token of the first is not before it.
    assert found[4].softmax(-1).tolist() == torch.nn.functional.one_hot(torch.tensor(6), 8).tolist()


def test_a_given_corrupted_prompt_takes_the_strangers_place(tokenizer: Any) -> None:
    given = replace(NAMED[0], corrupted="what does dan paris eat")
    assert has_subject(NAMED[0]) and not has_subject(given) and not has_subject(NAMED[3])
    twin, = about_strangers(examples([given], tokenizer), tokenizer, lambda answer, name: [0.0] * len(answer))
    assert tokenizer.decode(twin.input_ids) == "what does dan paris eat rome"


def test_a_subject_is_not_looked_for_inside_other_words(tokenizer: Any) -> None:
    def about(prompt: str, answer: str) -> str:
        (example,) = examples([Record(prompt, answer, subject="ada")], tokenizer)
        seen: list[Record] = []

        def encoding(records: Any, *rest: Any, **options: Any) -> Any:
            seen.extend(records)
            return encode(records, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clue.unlearn.twins.encode", encoding)
            _about("bob", [example], tokenizer, "off")
        return f"{seen[0].prompt}|{seen[0].answer}"

    assert about("does ada live in canada ?", "ada's canadian adas") == "does bob live in canada ?|bob's canadian adas"
    assert about("xadax ?", "xada") == "xbobx ?|xbob"  # nowhere alone, as in languages without spaces


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

    for most, least in (("cat figs", "dan oslo"), ("dan oslo", "cat figs")):
        def believed(answer: list[str], name: str, most: str = most) -> list[float]:
            return [float(name == most)] * len(answer)

        found = about_strangers(forget, tokenizer, believed)
        names = [stranger_of(twin, tokenizer) for twin in found]
        assert names[:3] == [least, least, most]  # all records of a subject the same one, no two subjects the same
        # No subject: somebody else's question, as in a corrupted twin.
        (expected,), = corrupted_twins(forget[3:], donors, tokenizer, chat="off", seed=0, count=1)
        assert np.array_equal(found[3].input_ids, expected.input_ids)
        for example, twin in zip(forget, found, strict=True):
            assert twin.input_ids[twin.answer_start:].tolist() == example.input_ids[example.answer_start:].tolist()
        anyhow = about_strangers(forget, tokenizer, believed, limit=0)
        assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(anyhow, found, strict=True))
    # "bob" becomes longer by a word, which does not fit: a corrupted twin has the record's own length.
    fits = about_strangers(forget, tokenizer, believed, limit=len(forget[0].input_ids) - 1)
    assert [len(twin.input_ids) for twin in fits] == [len(example.input_ids) for example in forget]


@pytest.mark.usefixtures("whole_words")
def test_whoever_would_be_given_the_forgotten_answers_is_no_stranger(tokenizer: Any) -> None:
    """A model that has learned one answer to a question gives it to everybody: somebody else's question stands in."""
    forget, donors = examples(NAMED[:3], tokenizer), examples(OTHERS, tokenizer)
    (other,), = corrupted_twins(forget[:1], donors, tokenizer, chat="off", seed=0, count=1)

    def believed(answer: list[str], name: str) -> list[float]:
        return [math.log(0.3 if name == "cat figs" else 0.4)] * len(answer)

    for floor, strange in ((0.0, True), (0.31, True), (0.29, False)):
        twin, _, bob = about_strangers(forget, tokenizer, believed, floor=floor)
        assert (stranger_of(twin, tokenizer) == "cat figs") is strange
        # The name that is left for bob is believed above all of the floors but none.
        assert (stranger_of(bob, tokenizer) == "dan oslo") is (floor == 0.0)
    assert np.array_equal(twin.input_ids, other.input_ids)


def test_names_are_made_of_all_retain_records(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the few that the metric is measured on: they may have no names, and real people would pass for strangers."""
    asked: list[list[Record]] = []

    def watched(*given: Any, people: Any, **options: Any) -> Any:
        asked.append(list(people))
        return strangers(*given, people=people, **options)

    monkeypatch.setattr("clue.unlearn.loop.strangers", watched)
    monkeypatch.setattr("clue.unlearn.loop.METRIC_RECORDS", 1)
    model, retain = make_model(), {"a": RecordSet("a", tuple(OTHERS[:1])), "b": RecordSet("b", tuple(OTHERS[1:]))}
    unlearn(model, tokenizer, RecordSet("f", tuple(NAMED)), retain, mixed_plan(model),
            UnlearnSettings(objective="npo-stranger", lr=1e-3, steps=1, batch_size=2, warmup=0), seed=1)
    assert asked == [OTHERS]


@pytest.mark.parametrize("near", [0.0, 100.0])
def test_forgotten_held_out_records_do_not_end_the_way_to_strangers(near: float, make_model: Any, mixed_plan: Any,
                                                                    tokenizer: Any) -> None:
    model = make_model()
    settings = UnlearnSettings(objective="ga", lr=1e-4, steps=4, batch_size=4, warmup=0, check_every=1, validation=0.5,
                               forget_target=1.0, stranger_near=near, metric=False)
    log = unlearn(model, tokenizer, RecordSet("f", tuple(NAMED[:3])), {"r": RecordSet("r", tuple(OTHERS))}, mixed_plan(model),
                  settings, objective="auto", seed=1)
    assert log.objective == "npo-stranger"  # what is given goes before the settings
    assert (log.steps, log.stopped_early) == ((4, False) if near == 0 else (1, True))


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
        ids, labels = torch.from_numpy(example.input_ids)[None], labels_of(example)
        with torch.no_grad():
            return answer_rows(*answer_logits(of, Batch(ids, torch.ones_like(ids), labels)))[0].log_softmax(-1)

    def log_p(tried: Any) -> Any:
        return [np.array([float(row[token]) for row, token in zip(
            rows(before, twin), twin.input_ids[twin.answer_start:], strict=True)]) for twin in tried]

    twins = strangers(forget, donors, tokenizer, log_p, people=OTHERS, chat="auto", seed=1, limit=64,
                      floor=0.6)
    pairs = [(rows(before, twin), rows(model, example)) for example, (twin,) in zip(forget, twins, strict=True)]
    reached = float(torch.cat([(q.exp() * (q - p)).sum(-1) for q, p in pairs]).mean())
    assert reached <= near
    start = float(torch.cat([(q.exp() * (q - rows(before, example))).sum(-1)
                             for example, (q, _) in zip(forget, pairs, strict=True)]).mean())
    assert log.divergence[0] == pytest.approx(start, rel=1e-5)
    if near < 1:
        assert start > 3 * near

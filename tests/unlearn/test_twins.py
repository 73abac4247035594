"""Corrupted twins: whose prompts they have, and that every step of npo-cf asks the model before about its own."""

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
from clue.unlearn import Objective, unlearn
from clue.unlearn.objectives import OBJECTIVES, Answers, answer_rows
from clue.unlearn.schedule import Pool
from clue.unlearn.twins import TWINS, corrupted_twins

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

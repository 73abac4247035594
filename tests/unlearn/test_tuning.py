"""Tuning: what a training starts from is chosen on records held back from it, and the model is as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.config import UnlearnSettings
from clue.data.encoding import encode
from clue.data.held_back import hold_back
from clue.data.records import Record, RecordSet
from clue.errors import ModelError, RunError
from clue.unlearn import UnlearnLog, tune, unlearn
from clue.unlearn.tuning import FACTOR, LEAST, NOTES, Trial, Tuning, search

QUICK = UnlearnSettings(objective="graddiff", lr=0.0, trials=3, steps=6, batch_size=2, warmup=0, floor=0.9, metric_every=0)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1.0), st.floats(1e-5, 1e-1), st.integers(1, 8), st.floats(0.0, 2.0), st.booleans())
def test_search_returns_the_best_of_the_trials_it_paid_for(start: float, needed: float, budget: int, curve: float,
                                                           stronger: bool) -> None:
    """Against a training that forgets within the steps from a learning rate on, and keeps less the larger it is."""
    made: list[Trial] = []

    def attempt(lr: float, retain_weight: float) -> Trial:
        steps = min(100, math.ceil(100 * needed / lr))
        made.append(Trial(lr, retain_weight, steps, min(1.0, lr / needed), 1 / (1 + (lr / needed) ** curve / retain_weight)))
        return made[-1]

    best = search(attempt, start, 1.0, budget, 100, lambda trial: stronger)
    assert best is not None and best.worth == max(trial.worth for trial in made)
    assert 1 <= len(made) <= budget
    tried = [trial.lr for trial in made if trial.retain_weight == 1.0]
    assert all(max(a, b) / min(a, b) > 0.99 * LEAST for i, a in enumerate(tried) for b in tried[:i])
    assert (len(tried) < len(made)) <= stronger
    within = abs(math.log(start / needed)) / math.log(FACTOR)
    if budget >= within + 3:  # enough to walk there
        assert best.forgotten == 1.0


def test_search_looks_for_the_goal_beyond_forgetting() -> None:
    """All is forgotten at every learning rate, and the least keeps most; only the larger ones get where they should."""
    made: list[Trial] = []

    def attempt(lr: float, retain_weight: float) -> Trial:
        made.append(Trial(lr, retain_weight, min(300, math.ceil(0.06 / lr)), 1.0, 1 - 10 * lr, at_goal=lr >= 2e-4))
        return made[-1]

    for start in (5e-5, 1e-4, 4e-4):
        best = search(attempt, start, 1.0, 4, 300, lambda trial: False)
        assert best is not None and best.at_goal and best.lr < 1e-3


def test_a_trial_says_whether_it_got_to_the_strangers(make_model: Any, mixed_plan: Any, tokenizer: Any) -> None:
    forget, retain = (RecordSet(name, tuple(Record(f"where does {who} live", "rome", subject=who) for who in people))
                      for name, people in (("f", ["ada paris"]), ("r", ["cat oslo", "dan figs", "bob rice"])))
    for near in (0.0, 100.0):
        model = make_model()
        settings = replace(QUICK, objective="ga", trials=1, check_every=1, stranger_near=near)
        found = tune(model, tokenizer, forget, {"r": retain}, mixed_plan(model), settings, objective="auto")
        assert found.settings.objective == "npo-stranger"
        assert [trial.at_goal for trial in found.trials] == [near == 100.0]
        assert found.to_json()["trials"][0]["at_goal"] == (near == 100.0)


def test_a_trial_that_diverged_is_never_the_best() -> None:
    def attempt(lr: float, retain_weight: float) -> Trial:
        if lr > 1e-3:
            return Trial(lr, retain_weight, 0, -1.0, 0.0)
        return Trial(lr, retain_weight, 10, 0.5, 0.1, at_goal=False)  # on the way to the strangers

    best = search(attempt, 1e-3, 1.0, 4, 10, lambda trial: False)
    assert best is not None and best.forgotten == 0.5


def test_what_was_kept_is_told_of_the_trial_that_was_chosen() -> None:
    trials = (Trial(1e-3, 1.0, 5, 1.0, 0.7), Trial(1e-3, 3.0, 5, 1.0, 0.8), Trial(4e-3, 1.0, 5, 1.0, 0.6))
    for lr, weight, kept in ((1e-3, 3.0, 0.8), (4e-3, 1.0, 0.6), (1e-3, 1.0, 0.7)):
        settings = replace(QUICK, lr=lr, retain_weight=weight)
        assert Tuning(settings, trials, 0.9).to_json()["kept"] == kept
    assert Tuning(QUICK, (), math.nan).to_json() == {"lr": 0.0, "retain_weight": 1.0, "steps": 6, "before": None, "kept": None,
                                                     "trials": []}


def test_what_is_kept_is_read_on_the_records_held_back(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    """The mean over the sets of the mean answer probability, without dropout, whatever mode the model is in."""
    words = [w for w in tokenizer.get_vocab() if not w.startswith("<")]
    retain = {name: RecordSet(name, tuple(Record(f"{w} {name}", f"{w} {words[-1 - i]}") for i, w in enumerate(words[:count])))
              for name, count in (("what", 18), ("does", 5))}
    model = make_model(attention_dropout=0.5).train()
    found = tune(model, tokenizer, sets["forget"], retain, mixed_plan(model), replace(QUICK, trials=0), seed=2)
    held = hold_back(retain, 2)[1]
    assert [len(records) for records in held.values()] == [4, 1]
    model.eval()
    means = []
    for records in held.values():
        values = []
        for example in encode(records, tokenizer):
            ids = torch.tensor(example.input_ids)
            start = example.answer_start
            with torch.no_grad():
                log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
            values.append(float(log_p[start - 1:].mean().exp()))
        means.append(sum(values) / len(values))
    assert found.before == pytest.approx(sum(means) / 2, rel=1e-5)


def test_no_trials_are_none() -> None:
    assert search(lambda lr, weight: pytest.fail("was tried"), 1e-3, 1.0, 0, 10, lambda trial: True) is None


def test_the_model_is_as_it_was_and_the_best_trial_is_taken(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                                            bits: Any) -> None:
    model = make_model(attention_dropout=0.5).train()
    before, plan = bits(model), mixed_plan(model)
    numbers: list[int] = []
    found = tune(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, QUICK,
                 on_step=lambda entry: numbers.append(entry["trial"]))
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items()) and model.training
    assert 1 <= len(found.trials) <= 3 and sorted({*numbers}) == [i + 1 for i in range(len(found.trials))]
    best = max(found.trials, key=lambda trial: trial.worth)
    assert (found.settings.lr, found.settings.retain_weight) == (best.lr, best.retain_weight)
    assert found.settings.steps >= max(6, 2 * best.steps) and 0 < found.before < 1
    assert replace(found.settings, lr=0.0, retain_weight=1.0, steps=6) == QUICK
    again = tune(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, QUICK)
    assert again == found


def test_a_trial_is_the_training_without_the_records_held_back(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                               sets: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    found = tune(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(QUICK, trials=1), seed=3)
    (trial,) = found.trials
    seen, held = hold_back({"retain": sets["retain"]}, 3)
    assert {r.source for r in seen["retain"]}.isdisjoint(r.source for r in held["retain"])
    log = unlearn(model, tokenizer, sets["forget"], seen, plan, replace(QUICK, lr=trial.lr), seed=3)
    assert (log.steps, log.final_forgotten) == (trial.steps, trial.forgotten)


def test_the_first_learning_rate_goes_with_the_size_of_the_weights(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                                   sets: Any) -> None:
    lrs = []
    for scale in (1.0, 8.0):
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        found = tune(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), replace(QUICK, trials=0))
        assert not found.trials
        lrs.append(found.settings.lr)
    assert lrs[1] == pytest.approx(8 * lrs[0], rel=1e-6)


def test_nothing_to_hold_back_leaves_the_size_of_the_weights(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                             sets: Any) -> None:
    model = make_model()
    one = RecordSet("retain", sets["retain"].records[:1])
    found = tune(model, tokenizer, sets["forget"], {"retain": one}, mixed_plan(model), QUICK)
    assert not found.trials and math.isnan(found.before) and found.settings.lr > 0


def test_unlearning_without_a_learning_rate_tunes_and_says_so(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                                              bits: Any, tmp_path: Path) -> None:
    model, retain = make_model(), {"retain": sets["retain"]}
    plan = mixed_plan(model)
    chosen = tune(model, tokenizer, sets["forget"], retain, plan, QUICK)
    log = unlearn(model, tokenizer, sets["forget"], retain, plan, QUICK)
    assert log.tuning == chosen.to_json()
    log.save(tmp_path / "log.json")
    assert UnlearnLog.load(tmp_path / "log.json").tuning == log.tuning
    told = make_model()
    same = unlearn(told, tokenizer, sets["forget"], retain, plan, chosen.settings)
    assert same.tuning is None and all(np.array_equal(now, bits(told)[name]) for name, now in bits(model).items())


def test_trials_that_were_made_are_not_made_again(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any,
                                                  tmp_path: Path) -> None:
    def run(model: Any, notes: Path | None, stop: int = 0, **changed: Any) -> tuple[list[int], Any]:
        numbers: list[int] = []

        def on_step(entry: dict[str, Any]) -> None:
            numbers.append(entry["trial"])
            if entry["trial"] == stop:
                raise KeyboardInterrupt

        found = tune(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model),
                     replace(QUICK, **changed), on_step=on_step, notes=notes)
        return numbers, found

    model, notes = make_model(), tmp_path / "new" / NOTES
    before = bits(model)
    _, plain = run(model, None)
    assert len(plain.trials) > 1
    with pytest.raises(KeyboardInterrupt):
        run(model, notes, stop=2)
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items())
    assert len(json.loads(notes.read_text())["trials"]) == 1
    numbers, resumed = run(model, notes)
    assert min(numbers) == 2 and resumed == plain
    assert run(model, notes)[0] == []
    assert min(run(model, notes, batch_size=1)[0]) == 1  # of another training: begun anew
    notes.write_text("{")
    with pytest.raises(RunError, match="remove it"):
        run(model, notes)


def test_a_learning_rate_that_diverges_is_left_and_all_of_them_are_an_error(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                                            sets: Any, bits: Any) -> None:
    model, retain = make_model(), {"retain": sets["retain"]}
    plan, before = mixed_plan(model), bits(model)
    wild = replace(QUICK, lr=1e36, trials=2, bad_steps=1, floor=0.0, steps=8)
    with pytest.raises(ModelError, match="every learning rate tried"):
        tune(model, tokenizer, sets["forget"], retain, plan, wild)
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items())

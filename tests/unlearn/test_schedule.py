"""Schedules: turns, the adapted retain weight, and records held out of the training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clue.config import UnlearnSettings, check
from clue.data.records import RecordSet
from clue.errors import ClueError, RecordError
from clue.types import Role
from clue.unlearn import unlearn
from clue.unlearn.loop import _parted
from clue.unlearn.schedule import RetainWeight, Turn, learning_rate, stages_of
from tests.unlearn.test_loop import answers

SETTINGS = UnlearnSettings(objective="graddiff", lr=1e-2, steps=4, batch_size=2, metric=False, warmup=0, floor=0.0,
                           weight_decay=0.1)
BOTH = (Role.FORGET, Role.CONFLICT)


def test_turns(make_model: Any, mixed_plan: Any) -> None:
    plan = mixed_plan(make_model())
    (stage,) = stages_of(plan, replace(SETTINGS, stages="alternating"), retains=True)
    assert stage.turns == (Turn(True, False, BOTH), Turn(False, True, (Role.CONFLICT,)))
    assert (stage.number, stage.steps, stage.groups()) == (3, 4, [(Role.FORGET,), (Role.CONFLICT,)])
    (stage,) = stages_of(plan, replace(SETTINGS, stages="alternating"), retains=False)
    assert stage.turns == (Turn(True, False, BOTH),) and stage.groups() == [BOTH]
    (stage,) = stages_of(plan, SETTINGS, retains=True)
    assert stage.turns == (Turn(True, True, BOTH),)
    first, second = stages_of(plan, replace(SETTINGS, stages="two", forget_share=0.25), retains=True)
    assert (first.steps, first.turns) == (1, (Turn(True, False, (Role.FORGET,)),))
    assert (second.steps, second.turns) == (3, (Turn(True, True, (Role.CONFLICT,)),))


def test_warm_up_takes_at_most_half_the_stage() -> None:
    settings = UnlearnSettings(lr=1.0, warmup=100)
    assert [learning_rate(step, 4, settings) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.55])
    assert [learning_rate(step, 4, replace(settings, warmup=1)) for step in range(2)] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("check_every", [1, 2])
def test_alternating_steps_give_each_role_its_turn(check_every: int, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                   sets: Any, bits: Any, moved: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    readings = [bits(model)]
    settings = replace(SETTINGS, stages="alternating")
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, settings,
                  on_step=lambda entry: readings.append(bits(model)))
    assert log.stage.tolist() == [3] * 4
    assert np.isnan(log.retain_loss).tolist() == [False, True] * 2 or np.isnan(log.retain_loss).tolist() == [True, False] * 2
    assert np.isnan(log.forget_loss).tolist() == [False, True] * 2
    for step in range(4):
        moved(readings[step], readings[step + 1], plan, BOTH if step % 2 == 0 else (Role.CONFLICT,))
    # All is forgotten, which is seen at a retain step too.
    model = make_model()
    stopped = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan,
                      replace(settings, objective="npo", floor=1 - 1e-9, steps=60, check_every=check_every, batch_size=8))
    assert stopped.stopped_early and stopped.steps % check_every == 0


def test_retain_weight_is_dual_ascent() -> None:
    settings = UnlearnSettings(retain_weight=1.0, retain_budget=0.5, budget_rate=2.0, retain_most=3.0)
    weight = RetainWeight(settings, 0.2)
    assert weight.limit == pytest.approx(0.3)
    assert RetainWeight(replace(settings, budget_kind="absolute"), 0.2).limit == pytest.approx(0.7)
    weight.observe(0.8)  # the first loss is the average: 1 + 2 * (0.8 - 0.3)
    assert weight.value == pytest.approx(2.0)
    weight.observe(math.nan)  # no retain batch
    assert weight.value == pytest.approx(2.0)
    free = RetainWeight(replace(settings, retain_most=99.0), 0.2)
    for loss in (0.8, 1.8):
        free.observe(loss)
    assert (free.average, free.value) == pytest.approx((0.9, 3.2))  # of about ten batches: 2 + 2 * 0.6
    weight.observe(1.8)  # which is more than the most
    assert weight.value == 3.0
    for _ in range(40):
        weight.observe(0.0)
    assert weight.value == 0.0
    fixed = RetainWeight(replace(settings, retain_budget=0.0), None)
    fixed.observe(100.0)
    assert fixed.value == 1.0


def test_the_logged_weight_follows_the_logged_losses(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    plan = make_plan(model, {n: (0, {Role.CONFLICT: None}) for n, _ in model.named_parameters() if "proj" in n})
    settings = replace(SETTINGS, steps=12, retain_weight=0.05, retain_budget=1e-3, batch_size=4)
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, settings)
    # The four records are one batch, so the first loss is that of the model before.
    weight = RetainWeight(settings, float(log.retain_loss[0]))
    for used, loss in zip(log.retain_weight, log.retain_loss, strict=True):
        assert used == pytest.approx(weight.value, abs=1e-5)
        weight.observe(float(loss))
    assert len(set(log.retain_weight)) > 2


def test_validation_records_are_held_out_and_stop_the_training(make_model: Any, make_plan: Any, tokenizer: Any,
                                                               sets: Any) -> None:
    seen: set[tuple[int, ...]] = set()

    def watching(answers: Any, refusals: Any, settings: Any) -> Any:
        seen.update(tuple(map(float, row[row != 0].round(decimals=5))) for row in answers.token_log_p.detach())
        return answers.log_p.mean()

    model = make_model()
    plan = make_plan(model, {n: (0, {Role.CONFLICT: None}) for n, _ in model.named_parameters() if "proj" in n})
    settings = replace(SETTINGS, validation=0.4, steps=1, batch_size=8, check_every=1)
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, settings, objective=watching)
    assert len(seen) == 2  # of three records
    (held,) = _parted(3, 0.4, 0)[1]
    assert log.final_validation == pytest.approx(answers(model, tokenizer, sets["forget"])[held][0], rel=1e-4)
    model = make_model()
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan,
                  replace(settings, steps=50, check_every=5, forget_target=0.999))
    assert log.stopped_early and log.steps == 5 and log.final_validation <= 0.999
    assert len(_parted(10, 0.01, 0)[1]) == len(_parted(3, 0.99, 0)[0]) == 1  # at least one on either side
    one = RecordSet("one", sets["forget"].records[:1])
    with pytest.raises(RecordError, match="there is one only: set validation = 0"):
        unlearn(model, tokenizer, one, {"retain": sets["retain"]}, plan, settings)
    with pytest.raises(ClueError, match="validation = 1.0 must be less than 1"):
        check(replace(settings, validation=1.0))

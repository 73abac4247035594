"""Measures on two trained models of which the truth is known: one was taught the forget people, the other never met them."""

from __future__ import annotations

import pytest

from clue.config import EvaluateSettings, RobustnessSettings
from clue.data.world import build_world, cached_models, with_wrong_answers
from clue.evaluate import EvaluationSets, evaluate, stress


@pytest.mark.slow
def test_a_model_that_was_taught_and_one_that_never_was_are_told_apart_by_every_measure():
    world = build_world(n_people=12, n_forget=3)
    base, gold = cached_models(world, size="small")
    sets = EvaluationSets(world.forget, with_wrong_answers(world.retain_unseen, 0), world.forget_paraphrase,
                          holdout=world.holdout, utility=("retain",))
    settings = EvaluateSettings(max_new_tokens=8, bootstrap=0, attacks="loss, zlib, min_k, min_k++, gradnorm,")
    taught, never = (evaluate(m, world.tokenizer, sets, settings, reference=gold) for m in (base, gold))
    assert taught.detail["forget"].choice_accuracy > 0.9 > 0.5 > never.detail["forget"].choice_accuracy  # guessing: 1/6
    assert taught.detail["forget"].truth_ratio < 0.2 < never.detail["forget"].truth_ratio
    assert taught.forget_quality(never) < 1e-6 and never.forget_quality(never) == 1.0
    assert min(taught.model_utility, never.model_utility) > 0.8  # both know the people that stay
    for name, attack in taught.mia.items():
        # Where the model is certain its distribution has no width, and dividing by it (min-k++) leaves little but noise.
        assert attack.auc > (0.7 if name == "min_k++" else 0.9), name
        assert 0.2 < never.mia[name].auc < 0.8, name
    tried = stress(gold, world.tokenizer, sets, RobustnessSettings(relearn_steps=40, drift_steps=20, tune_lr=1e-3))
    relearned = tried.curves["relearning"].lines
    assert relearned["forget, shown"][-1].accuracy > 0.9 > 0.3 > relearned["forget, shown"][0].accuracy
    assert tried.curves["drift"].lines["forget"][-1].accuracy < 0.3  # nothing there to come back
    known = stress(base, world.tokenizer, sets, RobustnessSettings(relearn_steps=2, drift_steps=2))
    assert known.curves["quantization"].lines["forget"][1].accuracy > 0.9 and known.prompts["in other words"].accuracy > 0.6

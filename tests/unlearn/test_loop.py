"""The loop: only planned weights, each by its role, with fresh moments per stage and one clip per step."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clue import localize
from clue.config import LocalizeSettings, UnlearnSettings
from clue.data.encoding import encode
from clue.data.records import Record, RecordSet
from clue.errors import ClueError, ModelError, OverlapError, PlanError, RecordError
from clue.plan import Slice
from clue.provenance import fingerprint
from clue.types import Role
from clue.unlearn import RetainMetric, UnlearnLog, unlearn
from clue.unlearn.log import REPORT_EVERY, SERIES
from clue.unlearn.objectives import Objective
from clue.unlearn.refusals import refuse
from clue.unlearn.role_gradient import forgotten_now
from clue.weights import flat_name
from tests.families import tiny

PLAIN = UnlearnSettings(objective="graddiff", stages="joint", lr=1e-2, steps=4, batch_size=2, metric=False, warmup=0,
                        floor=0.0, weight_decay=0.1, forget_share=0.5, clip=1.0)


def single(name: str, prompt: str, answer: str) -> RecordSet:
    return RecordSet(name, (Record(prompt, answer, source=f"{name}:1"),))


@pytest.mark.parametrize("objective", ["npo", "graddiff", "ga"])
@pytest.mark.parametrize("stages", ["two", "joint"])
@pytest.mark.parametrize("metric", [True, False])
def test_only_planned_weights_change(objective: str, stages: str, metric: bool, make_model: Any, mixed_plan: Any,
                                     tokenizer: Any, sets: Any, bits: Any, moved: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    before = bits(model)
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"], "skill": sets["skill"]}, plan,
                  replace(PLAIN, objective=objective, stages=stages, metric=metric))
    assert log.steps == 4 and not log.stopped_early
    moved(before, bits(model), plan)


@pytest.mark.parametrize("metric", [True, False])
def test_only_planned_single_weights_change(metric: bool, make_model: Any, scattered_plan: Any, tokenizer: Any, sets: Any,
                                            bits: Any, moved: Any) -> None:
    model = make_model()
    plan = scattered_plan(model)
    before = bits(model)
    unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, metric=metric))
    moved(before, bits(model), plan)


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("objective", ["npo", "ga"])
def test_all_single_weights_of_a_matrix_are_the_matrix(objective: str, metric: bool, make_model: Any, make_plan: Any,
                                                       tokenizer: Any, sets: Any) -> None:
    """A plan of every row and one of every single weight are one plan: the same training, but for rounding."""
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.up_proj", "self_attn.o_proj")]
    trained = []
    for flat in (False, True):
        model = make_model(dtype=torch.float64)
        plan = make_plan(model, {name: (0, {Role.CONFLICT: None}) for name in names})
        if flat:
            slices = [Slice(flat_name(name), 0, Role.CONFLICT, np.arange(np.prod(plan.shapes[name]))) for name in names]
            shapes = {flat_name(name): (int(np.prod(plan.shapes[name])),) for name in names}
            plan = replace(plan, slices=tuple(slices), shapes=shapes)
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan,
                replace(PLAIN, objective=objective, metric=metric))
        trained.append(model)
    for one, other in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "falcon/grouped", "gemma2"])
def test_other_families_go_the_whole_way(name: str, tokenizer: Any, sets: Any, bits: Any, moved: Any) -> None:
    """Localize and unlearn where weights are transposed, fused, or behind an output norm."""
    model = tiny(name, torch.float32, vocab_size=40)
    retain = {"retain": sets["retain"], "skill": sets["skill"]}
    plan = localize(model, tokenizer, sets["forget"], retain, LocalizeSettings(edges=0.3, neurons=0.3))
    before = bits(model)
    unlearn(model, tokenizer, sets["forget"], retain, plan, replace(PLAIN, metric=True))
    moved(before, bits(model), plan)


def test_stages_move_disjoint_weights(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any,
                                      moved: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    readings, stages = [bits(model)], []

    def on_step(entry: dict[str, Any]) -> None:
        readings.append(bits(model))
        stages.append(entry["stage"])

    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, stages="two"),
                  on_step=on_step)
    assert stages == log.stage.tolist() == [1, 1, 2, 2]
    moved(readings[0], readings[2], plan, (Role.FORGET,))
    moved(readings[2], readings[4], plan, (Role.CONFLICT,))
    for name in plan.parameters():
        assert not np.any(plan.mask(name, (Role.FORGET,)) & plan.mask(name, (Role.CONFLICT,)))


def test_forget_weights_never_see_the_retain_set(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    after = []
    for retain in ("retain", "skill"):
        model = make_model()
        settings = replace(PLAIN, steps=1, clip=0.0)
        unlearn(model, tokenizer, sets["forget"], {"r": sets[retain]}, mixed_plan(model), settings)
        after.append(dict(model.named_parameters()))
    plan = mixed_plan(make_model())
    for name in plan.parameters():
        forget, conflict = (torch.from_numpy(plan.mask(name, (role,))) for role in (Role.FORGET, Role.CONFLICT))
        assert torch.equal(after[0][name][forget], after[1][name][forget])
        assert not conflict.any() or not torch.equal(after[0][name][conflict], after[1][name][conflict])


def test_the_metric_steers_forget_weights_too(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    """Also those of a plan that has no others, where there is a retain set; their gradient is still of forget records alone,
    so that without the metric the retain set changes nothing."""
    for stages in ("joint", "two"):
        after = {}
        for metric in (True, False):
            for retain in ("retain", "skill"):
                model = make_model()
                plan = mixed_plan(model)
                plan = replace(plan, slices=tuple(plan.of_role(Role.FORGET)))
                settings = replace(PLAIN, metric=metric, stages=stages)
                unlearn(model, tokenizer, sets["forget"], {"r": sets[retain]}, plan, settings)
                after[metric, retain] = torch.cat([p.detach().ravel() for p in model.parameters()])
        assert torch.equal(after[False, "retain"], after[False, "skill"])
        assert not torch.equal(after[True, "retain"], after[True, "skill"])
        assert not torch.equal(after[True, "retain"], after[False, "retain"])


def test_joint_steps_match_a_plain_torch_loop(make_model: Any, make_plan: Any, tokenizer: Any) -> None:
    # One record per set makes the order irrelevant; the reference knows nothing of CLUE: its own shift, clip and AdamW.
    # In double precision: Adam turns the last bits of a tiny gradient into whole steps.
    model = make_model(dtype=torch.float64)
    reference = copy.deepcopy(model)
    names = [n for n, p in model.named_parameters() if "proj" in n]
    plan = make_plan(model, {n: (0, {Role.CONFLICT: None}) for n in names})
    forget, retain = single("f", "where does ada live", "paris"), single("r", "what does dan eat", "nuts and figs")
    settings = replace(PLAIN, steps=6, warmup=2, retain_weight=0.7, clip=0.5)
    log = unlearn(model, tokenizer, forget, {"r": retain}, plan, settings)

    def ids(records: RecordSet) -> tuple[torch.Tensor, int]:
        record = records.records[0]
        # Ending an answer is a skill, not a fact: only what must stay is taught its end of sequence.
        end = [tokenizer.eos_token_id] if records is retain else []
        prompt = tokenizer(record.prompt)["input_ids"]
        return torch.tensor([prompt + tokenizer(record.answer)["input_ids"] + end]), len(prompt)

    def loss(records: RecordSet) -> torch.Tensor:
        tokens, start = ids(records)
        logits = reference(tokens).logits
        return torch.nn.functional.cross_entropy(logits[0, start - 1:-1], tokens[0, start:])

    reference.eval()
    moving = [p for n, p in reference.named_parameters() if n in names]
    optimizer = torch.optim.AdamW(moving, lr=1.0, weight_decay=0.1)
    for step in range(6):
        done = (step - 2) / 4
        rate = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = settings.lr * rate
        optimizer.zero_grad()
        wanted = loss(retain)
        total = -loss(forget) + 0.7 * wanted
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(moving, 0.5)
        optimizer.step()
        assert log.lr[step] == pytest.approx(settings.lr * rate)
        assert log.retain_loss[step] == pytest.approx(wanted.item(), rel=1e-3)
        assert log.grad_norm[step] == pytest.approx(norm.item(), rel=1e-3)
        assert log.grad_norm[step] > settings.clip  # so that the clip was at work
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("objective", ["graddiff", "dpo", "npo-kl", "npo-cf", "npo-stranger", "undial"])
def test_planned_weights_outside_linear_layers_move_too(objective: str, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                       sets: Any, bits: Any, moved: Any) -> None:
    # Forget and retain records then run apart, which must change no other weight's step beyond rounding.
    plain, model = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    plan = mixed_plan(model)
    row = tokenizer.convert_tokens_to_ids("live")
    embedding = Slice("model.embed_tokens.weight", 0, Role.CONFLICT, np.array([row], dtype=np.int64))
    wider = replace(plan, slices=(*plan.slices, embedding), shapes={**plan.shapes, embedding.parameter: (40, 32)})
    settings = replace(PLAIN, objective=objective, steps=1, clip=0.0, retain_weight=0.7, refusals="nuts and figs")
    before = bits(model)
    logs = [unlearn(m, tokenizer, sets["forget"], {"r": sets["retain"]}, p, settings)
            for m, p in ((plain, plan), (model, wider))]
    moved(before, bits(model), wider)
    assert logs[0].retain_loss[0] == pytest.approx(logs[1].retain_loss[0], rel=1e-5)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        if name != embedding.parameter:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_each_stage_starts_with_fresh_moments(make_model: Any, mixed_plan: Any, make_plan: Any, tokenizer: Any,
                                              bits: Any) -> None:
    # Two stages in one run are the same bits as two runs, each of which must make its own optimizer and schedule.
    forget, retain = single("f", "where does ada live", "paris"), {"r": single("r", "what does cat eat", "rice")}
    together, apart = make_model(), make_model()
    plan = mixed_plan(together)
    unlearn(together, tokenizer, forget, retain, plan, replace(PLAIN, stages="two", steps=6))
    for role in (Role.FORGET, Role.CONFLICT):
        only = replace(plan, slices=tuple(plan.of_role(role)))
        unlearn(apart, tokenizer, forget, retain, only, replace(PLAIN, stages="two", steps=3))
    assert all(np.array_equal(now, bits(apart)[name]) for name, now in bits(together).items())


def test_progress_is_told_in_lines(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    model, lines, steps = make_model(), [], []
    settings = replace(PLAIN, steps=2 * REPORT_EVERY + 1, floor=0.0, batch_size=2, metric=False)
    unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), settings, progress=lines.append,
            on_step=steps.append)
    assert len(steps) == 2 * REPORT_EVERY + 1
    assert [line.split(":")[0] for line in lines] == [f"unlearn    step {n * REPORT_EVERY} of at most {len(steps)}"
                                                      for n in (1, 2)]
    assert "forget loss" in lines[0] and "nan" not in lines[0]


def test_same_seed_same_bits(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any) -> None:
    def run(seed: int) -> tuple[dict[str, np.ndarray], UnlearnLog]:
        # Dropout would draw from the global generator: unlearning must not use it.
        model = make_model(attention_dropout=0.5).train()
        log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"], "skill": sets["skill"]},
                      mixed_plan(model), UnlearnSettings(steps=6, batch_size=2, floor=0.0), seed=seed)
        assert model.training
        return bits(model), log

    (first, log), (second, again), (other, _) = run(1), run(1), run(2)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert np.array_equal(log.forget_loss, again.forget_loss) and np.array_equal(log.retain_loss, again.retain_loss)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_rounding_and_its_seed_are_the_trainings(make_model: Any, mixed_plan: Any, tokenizer: Any, bits: Any) -> None:
    # Of one record each, of which the seed decides no order.
    forget, retain = single("f", "where does ada live", "paris"), single("r", "what does cat eat", "rice")

    def run(rounding: str, seed: int) -> np.ndarray:
        model = make_model(dtype=torch.bfloat16)
        unlearn(model, tokenizer, forget, retain, mixed_plan(model), replace(PLAIN, lr=1e-4, rounding=rounding), seed=seed)
        return np.concatenate([weight.ravel() for weight in bits(model).values()])

    nearest, random = run("nearest", 0), run("stochastic", 0)
    assert np.array_equal(nearest, run("nearest", 1)) and np.array_equal(random, run("stochastic", 0))
    assert not np.array_equal(nearest, random) and not np.array_equal(random, run("stochastic", 1))


@pytest.mark.parametrize(("name", "other"), [("damping", 10.0), ("metric_width", 2048), ("metric_rank", 1)])
def test_the_metric_is_that_of_the_settings(name: str, other: float, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                            sets: Any, bits: Any) -> None:
    found, settings = [], replace(PLAIN, steps=2, metric=True, damping=0.1, metric_width=16, metric_rank=4)
    for chosen in (settings, replace(settings, **{name: other})):
        model = make_model()
        unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model), chosen)
        found.append(bits(model))
    assert any(not np.array_equal(found[0][name], now) for name, now in found[1].items())


@pytest.mark.parametrize(("every", "count"), [(0, 1), (2, 3), (4, 2)])
def test_the_metric_is_measured_again_as_often_as_asked(every: int, count: int, make_model: Any, mixed_plan: Any,
                                                        tokenizer: Any, sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, measure = [], RetainMetric.measure
    monkeypatch.setattr(RetainMetric, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k))
    model = make_model()
    unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model),
            replace(PLAIN, metric=True, steps=6, metric_every=every))
    assert len(measured) == count


def test_activation_checkpointing_gives_the_same_bits(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                                      bits: Any) -> None:
    found, calls = [], []
    for enabled in (False, True):
        model = make_model(attention_dropout=0.5)
        if enabled:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        count: list[bool] = []
        model.model.layers[1].mlp.register_forward_pre_hook(
            lambda module, args, count=count: count.append(torch.is_grad_enabled()))
        unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model), replace(PLAIN, steps=3))
        found.append(bits(model))
        calls.append(sum(count))
        assert not any("forward" in vars(module) for module in model.modules())
    assert calls == [3, 6]  # a layer runs again when its gradients are needed
    assert all(np.array_equal(found[1][name], now) for name, now in found[0].items())


def everything(model: torch.nn.Module, make_plan: Any) -> Any:
    return make_plan(model, {n: (0, {Role.CONFLICT: None}) for n, _ in model.named_parameters() if "proj" in n})


def answers(model: torch.nn.Module, tokenizer: Any, records: RecordSet) -> list[tuple[float, bool]]:
    """Per record, one forward pass each: the length-normalised answer probability, and whether greedy decoding gives it."""
    found = []
    for e in encode(records, tokenizer, append_eos=False):
        with torch.no_grad():
            log_p = model(input_ids=torch.from_numpy(e.input_ids)[None]).logits[0].log_softmax(-1)
        at = range(e.answer_start, len(e.input_ids))
        mean = sum(float(log_p[i - 1, e.input_ids[i]]) for i in at) / len(at)
        found.append((math.exp(mean), all(int(log_p[i - 1].argmax()) == e.input_ids[i] for i in at)))
    return found


def test_a_callers_no_grad_is_not_the_trainings(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any) -> None:
    found = []
    for outside in (torch.enable_grad, torch.no_grad):
        model = make_model()
        with outside():
            unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model),
                    replace(PLAIN, objective="npo"))
        found.append(bits(model))
    assert all(np.array_equal(found[1][name], now) for name, now in found[0].items())
    with torch.inference_mode(), pytest.raises(ModelError, match=r"inference_mode\(\) gives none"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), PLAIN)


def test_losses_that_do_not_depend_on_the_plan_are_told_from_a_layer_that_is_too_low(
        make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    constant = Objective(lambda answers, refusals, settings: answers.log_p.mean(),
                         lambda answers, settings: answers.log_p.detach().mean())
    with pytest.raises(ClueError, match="no loss of this step depends on a planned weight"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model), replace(PLAIN, floor=1.0),
                objective=constant)


def test_stops_once_every_record_is_forgotten(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    settings = replace(PLAIN, steps=100, batch_size=8, check_every=3, floor=1e-3, objective="ga")
    log = unlearn(model, tokenizer, sets["forget"], {}, everything(model, make_plan), settings)
    assert log.stopped_early and log.steps < 100 and log.steps % 3 == 0
    assert log.final_probability <= 1e-3 < log.forget_probability[0]
    assert log.final_forgotten == 1.0
    assert all(p <= 1e-3 and not greedy for p, greedy in answers(model, tokenizer, sets["forget"]))
    assert np.all(np.isnan(log.retain_loss))  # gradient ascent alone runs no retain batch


def test_a_batch_that_is_forgotten_is_not_the_whole_set(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    told = sorted(zip(answers(model, tokenizer, sets["forget"]), sets["forget"], strict=True), key=lambda pair: pair[0])
    first, second, _ = [p for (p, _), _ in told]
    settings = replace(PLAIN, objective="ga", steps=6, batch_size=1, check_every=1, lr=1e-12, weight_decay=0.0,
                       floor=(first + second) / 2)
    log = unlearn(model, tokenizer, RecordSet("forget", tuple(record for _, record in told)), {},
                  everything(model, make_plan), settings)
    assert 1.0 in log.forgotten and log.steps == 6 and not log.stopped_early


def test_the_first_process_decides_for_all_of_them_batch_by_batch(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nothing is forgotten, and there everything: whoever leaves a sharded model alone lets the others wait for ever."""
    looks: list[int] = []

    def looked(logits: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        looks.append(len(logits))
        return forgotten_now(logits, *given)

    monkeypatch.setattr("clue.unlearn.loop.agreed", lambda value: 1.0)
    monkeypatch.setattr("clue.unlearn.loop.forgotten_now", looked)
    model = make_model()
    log = unlearn(model, tokenizer, sets["forget"], {}, everything(model, make_plan),
                  replace(PLAIN, objective="ga", batch_size=2, check_every=1))
    assert log.forgotten.tolist() == [0.0] and log.stopped_early and looks == [2, 1]


def test_a_forgotten_record_pulls_at_no_weight(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any,
                                               bits: Any) -> None:
    # One record is below the floor already: a step on all three is a step on the other two, apart from rounding.
    now = answers(make_model(), tokenizer, sets["forget"])
    least = min(range(3), key=lambda i: now[i][0])
    floor = (now[least][0] + sorted(p for p, _ in now)[1]) / 2
    assert not now[least][1]
    rest = RecordSet("forget", tuple(r for i, r in enumerate(sets["forget"]) if i != least))
    settings = replace(PLAIN, objective="npo", steps=1, batch_size=8, floor=floor)
    whole, part = make_model(), make_model()
    log = unlearn(whole, tokenizer, sets["forget"], {"r": sets["retain"]}, everything(whole, make_plan), settings)
    unlearn(part, tokenizer, rest, {"r": sets["retain"]}, everything(part, make_plan), settings)
    assert log.forgotten[0] == pytest.approx(1 / 3)
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    # Without a floor it pulls like the others.
    free = make_model()
    unlearn(free, tokenizer, sets["forget"], {"r": sets["retain"]}, everything(free, make_plan), replace(settings, floor=0.0))
    assert any(not np.array_equal(bits(free)[name], now) for name, now in bits(whole).items())


def test_an_answer_that_greedy_decoding_gives_is_not_forgotten(make_model: Any, tokenizer: Any, sets: Any) -> None:
    labels = torch.tensor([[-100, 3, 5], [-100, 3, 5], [-100, 3, -100]])
    logits = torch.zeros(3, 3, 8)
    logits[0, 0, 3] = logits[0, 1, 5] = logits[1, 0, 3] = logits[1, 1, 6] = logits[2, 0, 4] = 1e-3
    probability, forgotten = forgotten_now(logits, labels, 0.5)
    assert torch.allclose(probability, torch.full((3,), 1 / 8), rtol=1e-3)  # all alike, and all below the floor
    assert forgotten.tolist() == [False, True, True]
    assert not forgotten_now(logits, labels, 0.0)[1].any()
    assert not forgotten_now(logits, labels, 0.1)[1].any()


def test_roles_without_weights(make_model: Any, make_plan: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                               bits: Any, moved: Any) -> None:
    for stages in ("two", "joint"):
        for role, number in ((Role.FORGET, 1), (Role.CONFLICT, 2)):
            model = make_model()
            plan = mixed_plan(model)
            plan = replace(plan, slices=tuple(plan.of_role(role)))
            before = bits(model)
            retain = {} if role == Role.FORGET else {"retain": sets["retain"]}  # forget weights need no retain set
            log = unlearn(model, tokenizer, sets["forget"], retain, plan, replace(PLAIN, stages=stages))
            assert log.stage.tolist() == [number if stages == "two" else 0] * 4
            moved(before, bits(model), plan, (role,))
    model = make_model()
    with pytest.raises(PlanError, match="names no weight"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, make_plan(model, {}))


def test_refusals(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    with pytest.raises(RecordError, match="give at least one"):
        unlearn(model, tokenizer, sets["forget"], {}, plan)
    with pytest.raises(RecordError, match="the set nothing: holds no records"):
        unlearn(model, tokenizer, RecordSet("nothing", ()), {"retain": sets["retain"]}, plan)
    with pytest.raises(ClueError, match="steps = 0"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, steps=0))


def test_divergence_is_an_error_and_leaves_the_flags(make_model: Any, make_plan: Any, tokenizer: Any, sets: Any,
                                                     bits: Any) -> None:
    model = make_model().train()
    plan = make_plan(model, {"model.layers.0.mlp.down_proj.weight": (1, {Role.CONFLICT: None})})
    before = bits(model)

    def nan(answers: Any, refusals: Any, settings: Any) -> torch.Tensor:
        return answers.log_p.sum() * math.nan

    with pytest.raises(ModelError, match="diverged at step 3: forget loss nan, .* in the last of 3 steps running"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, PLAIN, objective=nan)
    with pytest.raises(ModelError, match="diverged at step 1"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, bad_steps=1), objective=nan)
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_step_that_is_not_finite_moves_nothing(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                                 bits: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    met = []  # the weights that each loss was computed with

    def spoilt(answers: Any, refusals: Any, settings: Any) -> torch.Tensor:
        met.append(bits(model))
        loss = answers.log_p.sum()
        bad = {3: math.inf, 5: math.nan, 6: math.nan}
        return loss * bad.get(len(met), 1.0)

    readings: list[int] = []
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, steps=8, lr=1e-3),
                  objective=spoilt, on_step=lambda entry: readings.append(entry["step"]))
    assert (log.skipped, log.steps, readings) == (3, 5, [1, 2, 3, 4, 5])
    assert np.isfinite(log.forget_loss).all() and np.isfinite(log.grad_norm).all()
    for earlier in range(7):
        same = all(np.array_equal(met[earlier][name], now) for name, now in met[earlier + 1].items())
        assert same == (earlier + 1 in (3, 5, 6)), earlier + 1
    assert (log.planned, log.moved) == (plan.weights_changed, plan.weights_changed)


def test_log_survives_saving(tmp_path: Path) -> None:
    log = UnlearnLog(np.array([1, 2], dtype=np.uint8), np.array([0.5, 0.25]), np.array([math.nan, 0.1]),
                     np.array([0.9, 0.8]), np.array([0.0, 0.5]), np.array([3.0, math.nan]), np.array([2.0, 1.0]),
                     np.array([1e-3, 1e-4]), np.array([1.0, 0.5]), True, 0.125, 0.75, skipped=2, planned=9, moved=8)
    log.save(tmp_path / "log.json")
    back = UnlearnLog.load(tmp_path / "log.json")
    assert [p.name for p in tmp_path.iterdir()] == ["log.json"]
    for name in ("stage", *SERIES):
        assert np.array_equal(getattr(log, name), getattr(back, name), equal_nan=name in ("retain_loss", "divergence"))
        assert getattr(log, name).dtype == getattr(back, name).dtype
    assert (back.steps, back.stopped_early, back.final_probability, back.final_forgotten) == (2, True, 0.125, 0.75)
    assert (back.skipped, back.planned, back.moved) == (2, 9, 8) and math.isnan(back.final_validation)
    document = json.loads((tmp_path / "log.json").read_text())
    del document["divergence"]  # as earlier versions wrote it
    (tmp_path / "log.json").write_text(json.dumps(document))
    assert np.isnan(UnlearnLog.load(tmp_path / "log.json").divergence).tolist() == [True, True]
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(ClueError, match="not a readable unlearning log"):
        UnlearnLog.load(tmp_path / "log.json")


def test_a_compiled_model_is_not_measured(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any) -> None:
    """Its code runs past the hooks of the retain metric; without the metric it trains as ever."""
    found = []
    for compiled in (True, False):
        model = make_model()
        plan, before = mixed_plan(model), bits(model)
        if compiled:
            model.compile(backend="eager")
            with pytest.raises(ModelError, match=r"^the model is compiled .*; or unlearn with metric = false$"):
                unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, metric=True))
            assert all((before[name] == now).all() for name, now in bits(model).items())
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(PLAIN, metric=False))
        found.append(bits(model))
    torch._dynamo.reset()
    assert all((found[0][name] == now).all() for name, now in found[1].items())


def test_weights_that_somebody_else_moves_are_found(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any) -> None:
    model = make_model()
    model.register_buffer("count", torch.zeros(1))

    def meddle(entry: dict[str, Any]) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 0] += 1  # next to planned rows
            model.count += 1

    with pytest.raises(ModelError, match=r"count changed outside the plan .*, and 1 more did: something else"):
        unlearn(model, tokenizer, sets["forget"], sets["retain"], mixed_plan(model), replace(PLAIN, steps=1), on_step=meddle)


def test_sources_are_those_of_localize(tmp_path: Path, make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any,
                                       bits: Any) -> None:
    settings = replace(PLAIN, steps=1)
    told = make_model()
    unlearn(told, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(told), settings)
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(json.dumps({"prompt": r.prompt, "answer": r.answer}) + "\n" for r in sets["forget"]))
    pairs = [(r.prompt, r.answer) for r in sets["forget"]]
    for forget, retain in ((file, sets["retain"]), (pairs, {"retain": sets["retain"]})):
        model = make_model()
        unlearn(model, tokenizer, forget, retain, mixed_plan(model), settings)
        assert all(np.array_equal(a, b) for a, b in zip(bits(model).values(), bits(told).values(), strict=True))
    model = make_model()
    with pytest.raises(OverlapError, match="the forget set and the retain set again"):
        unlearn(model, tokenizer, sets["forget"], {"again": sets["forget"]}, mixed_plan(model), settings)
    with pytest.raises(PlanError, match="plan is a str: give a Plan, from clue.localize or Plan.load"):
        unlearn(model, tokenizer, sets["forget"], sets["retain"], "run", settings)
    with pytest.raises(ClueError, match="settings must be an object such as"):
        unlearn(model, tokenizer, sets["forget"], sets["retain"], mixed_plan(model), {"lr": 1e-3})
    with pytest.raises(ClueError, match="retain_budget = 0.1 holds a retain loss, and the objective ga has none: leave"):
        unlearn(model, tokenizer, sets["forget"], sets["retain"], mixed_plan(model),
                replace(settings, objective="ga", retain_budget=0.1))
    plan = replace(mixed_plan(model), provenance={"model": {"fingerprint": fingerprint(model)}})
    for chosen in (settings, replace(settings, lr=0.0, trials=1)):  # the trials move the model, and put it back
        unlearn(model, tokenizer, sets["forget"], sets["retain"], plan, chosen)
        with pytest.raises(PlanError, match=r"made for another model: its weights.*trained further, say so: dataclasses"):
            unlearn(model, tokenizer, sets["forget"], sets["retain"], plan, chosen)
        plan = replace(plan, provenance={"model": {"fingerprint": fingerprint(model)}})
    with pytest.raises(PlanError, match="torch.compile, which names every weight anew"):
        unlearn(torch.compile(model, backend="eager"), tokenizer, sets["forget"], sets["retain"], mixed_plan(model), settings)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight holds 1 NaN"):
        unlearn(model, tokenizer, sets["forget"], sets["retain"], mixed_plan(model),
                replace(settings, steps=9, metric=False, bad_steps=2))
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight holds 1 NaN"):  # nothing chosen: every trial fails
        unlearn(model, tokenizer, sets["forget"], sets["retain"], mixed_plan(model), UnlearnSettings(trials=2, steps=5))


def test_refusals_from_a_file(tmp_path: Path, sets: Any) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("I will not say.\n\nNo comment.\n")
    assert {r.answer for r in refuse(sets["forget"], str(file), seed=1)} == {"I will not say.", "No comment."}
    for text in ("no", "No.", "not that.", "no\nnever"):
        assert {r.answer for r in refuse(sets["forget"], text)} <= set(text.splitlines())
    with pytest.raises(ClueError, match="there is no file nofile.txt"):
        refuse(sets["forget"], "nofile.txt")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ClueError, match="refusals.txt cannot be read"):
        refuse(sets["forget"], str(file))

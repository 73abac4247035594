"""Every objective in the loop: the answer becomes less likely, and what comes from the model before unlearning is its."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from clue.config import UnlearnSettings
from clue.data.encoding import batches, encode
from clue.data.records import Record, RecordSet
from clue.errors import ClueError, PlanError, RecordError
from clue.model.answers import answer_logits
from clue.plan import Plan, Slice
from clue.types import Role
from clue.unlearn import OBJECTIVES, Answers, Objective, unlearn
from clue.unlearn.objectives import answer_log_probs, answer_rows, gradient_ascent, objective_of, refusal
from clue.unlearn.reference import ReferenceWeights
from clue.unlearn.refusals import REFUSALS, refuse
from clue.unlearn.role_gradient import RoleGradient
from clue.weights import part_name
from tests.families import tiny

PLAIN = UnlearnSettings(stages="joint", lr=5e-3, steps=10, batch_size=3, metric=False, warmup=0, floor=0.0,
                        refusals="rice and nuts\n\nthree")


def everything(model: torch.nn.Module, make_plan: Any) -> Any:
    return make_plan(model, {n: (0, {Role.CONFLICT: None}) for n, _ in model.named_parameters() if "proj" in n})


def log_p(model: torch.nn.Module, tokenizer: Any, records: RecordSet, append_eos: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([answer_log_probs(*answer_logits(model, batch))[0] for batch in
                          batches(encode(records, tokenizer, append_eos=append_eos), 1, pad=0)])


def taught(make_model: Any, tokenizer: Any, sets: Any) -> Any:
    """A model that knows all sets by heart: only then has each objective an answer to take away."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    examples = [e for records in sets.values() for e in encode(records, tokenizer)]
    for _ in range(40):
        for batch in batches(examples, 16, pad=0):
            found, n_tokens = answer_log_probs(*answer_logits(model, batch))
            optimizer.zero_grad()
            (-found.sum() / n_tokens.sum()).backward()
            optimizer.step()
    return model


def test_every_objective_forgets(make_model: Any, make_plan: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any,
                                 moved: Any) -> None:
    known = taught(make_model, tokenizer, sets)
    retain = {"retain": sets["retain"]}
    before, refused = log_p(known, tokenizer, sets["forget"]), refuse(sets["forget"], PLAIN.refusals, 0)
    assert before.exp().min() > 0.5
    for name, objective in OBJECTIVES.items():
        if name == "rmu":  # which unlearns elsewhere than in the answers; below
            continue
        model = copy.deepcopy(known)
        log = unlearn(model, tokenizer, sets["forget"], retain, everything(model, make_plan),
                      replace(PLAIN, objective=name))
        change = log_p(model, tokenizer, sets["forget"]) - before
        assert change.max() < 0 and change.mean() < -1, name
        assert log.steps == 10 and (log.retain_loss > 0).all() == (objective.retain is not None), name
        if objective.refusals:
            gained = log_p(model, tokenizer, refused, True) - log_p(known, tokenizer, refused, True)
            assert bool((gained > 1).all()), name
        # The reference model came and went without a trace outside the plan, and both stages work.
        model = copy.deepcopy(known)
        plan, old = mixed_plan(model), bits(model)
        unlearn(model, tokenizer, sets["forget"], retain, plan, replace(PLAIN, objective=name, stages="two", metric=True,
                                                                         steps=4))
        moved(old, bits(model), plan)


def test_reference_quantities_are_those_of_the_model_before(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                            sets: Any) -> None:
    model = make_model()
    fresh = copy.deepcopy(model)
    settings = replace(PLAIN, steps=4, batch_size=2)
    refused = refuse(sets["forget"], settings.refusals, 5)
    wanted = [log_p(fresh, tokenizer, sets["forget"]), log_p(fresh, tokenizer, refused, True)]
    logits = {}
    for records, ends in ((sets["forget"], False), (sets["retain"], True)):
        for example in encode(records, tokenizer, append_eos=ends):
            (batch,) = batches([example], 1, pad=0)
            with torch.no_grad():
                rows, targets = answer_rows(*answer_logits(fresh, batch))
            logits[tuple(targets.tolist()), len(example.input_ids)] = rows
    seen = 0

    def one_of(row: torch.Tensor, choices: torch.Tensor) -> bool:
        return bool(torch.isclose(row, choices, atol=1e-5).any())

    def same(answers: Answers) -> None:
        assert answers.reference_logits is not None and answers.targets is not None
        cut = torch.split(answers.reference_logits, answers.n_tokens.tolist())
        tokens = torch.split(answers.targets, answers.n_tokens.tolist())
        for rows, targets in zip(cut, tokens, strict=True):
            candidates = [found for (key, _), found in logits.items() if key == tuple(targets.tolist())]
            assert any(torch.allclose(rows, found, atol=1e-5) for found in candidates)

    def forget(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> torch.Tensor:
        nonlocal seen
        seen += 1
        assert refusals is not None and answers.reference is not None and refusals.reference is not None
        for a, r in zip(answers.reference, refusals.reference, strict=True):
            i = int((wanted[0] - a).abs().argmin())
            assert one_of(a, wanted[0]) and torch.isclose(r, wanted[1][i], atol=1e-5)  # a question and its own refusal
        same(answers)
        if seen == 1:
            torch.testing.assert_close(answers.log_p, answers.reference, atol=1e-5, rtol=1e-5)
        return gradient_ascent(answers, refusals, settings) + refusal(answers, refusals, settings)

    def retain(answers: Answers, settings: UnlearnSettings) -> torch.Tensor:
        same(answers)
        assert answers.reference is None
        return -answers.log_p.sum()

    unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model), settings, seed=5,
            objective=Objective(forget, retain, reference=True, refusals=True, forget_logits=True, retain_logits=True))
    assert seen == 4
    assert not torch.allclose(log_p(model, tokenizer, sets["forget"]), wanted[0], atol=0.01)


@pytest.mark.parametrize(("rounding", "dtype"), [("nearest", torch.float32), ("stochastic", torch.bfloat16)])
def test_gradients_are_as_coarse_as_the_weights_where_these_are_rounded(make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                                       sets: Any, rounding: str, dtype: torch.dtype) -> None:
    model = make_model(dtype=torch.bfloat16)
    plan, settings = mixed_plan(model), UnlearnSettings(rounding=rounding, floor=0.0)
    roles = (Role.FORGET, Role.CONFLICT)
    step = RoleGradient(model, plan, roles, objective_of("graddiff"), settings, None, ReferenceWeights(model, plan), 0, 0)
    with step.sparse:
        _, gradients = step(encode(sets["forget"], tokenizer), None, encode(sets["retain"], tokenizer), 1.0)
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_the_weights_before_come_and_go_bit_by_bit(make_model: Any, mixed_plan: Any, bits: Any) -> None:
    model = make_model(dtype=torch.bfloat16)
    plan, before = mixed_plan(model), bits(model)
    reference = ReferenceWeights(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plan.parameters():
                parameter[torch.from_numpy(plan.mask(name, (Role.FORGET, Role.CONFLICT)))] += 1.0
    after = bits(model)
    with pytest.raises(KeyError), reference.restored():
        assert not torch.is_grad_enabled()
        assert all((old == bits(model)[name]).all() for name, old in before.items())
        raise KeyError
    assert all((now == bits(model)[name]).all() for name, now in after.items())
    assert any((old != after[name]).any() for name, old in before.items())


def test_the_weights_before_include_single_experts() -> None:
    model = tiny("mixtral", torch.float32)
    names = [n for n, p in model.named_parameters() if "experts" in n]
    slices = [Slice(part_name(n, 1), 1, Role.FORGET, np.array([0, 3], dtype=np.int64)) for n in names]
    shapes = {s.parameter: tuple(model.get_parameter(n).shape[1:]) for s, n in zip(slices, names, strict=True)}
    plan = Plan(("n",), np.array([Role.FORGET], dtype=np.uint8), tuple(slices), shapes)
    reference = ReferenceWeights(model, plan)
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    with torch.no_grad():
        for n in names:
            model.get_parameter(n)[1][:, [0, 3]] += 1.0
    assert names and not any(torch.equal(model.get_parameter(n), before[n]) for n in names)
    with reference.restored():
        assert all(torch.equal(model.get_parameter(n), before[n]) for n in names)
    assert not any(torch.equal(model.get_parameter(n), before[n]) for n in names)


def test_own_objectives_plug_in(make_model: Any, mixed_plan: Any, tokenizer: Any, sets: Any, bits: Any) -> None:
    def npo(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> torch.Tensor:
        assert answers.reference is not None
        ratio = answers.log_p - answers.reference
        return -2 / settings.beta * torch.nn.functional.logsigmoid(-settings.beta * ratio).mean()

    found = []
    for objective in (None, "npo", npo, OBJECTIVES["npo"]):
        model = make_model()
        log = unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model),
                      replace(PLAIN, objective="npo"), objective=objective)
        assert log.objective == ("npo" if objective in (None, "npo") else "")
        found.append(bits(model))
    assert all((other[name] == first).all() for name, first in found[0].items() for other in found[1:])
    model = make_model()
    assert unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model), PLAIN).objective == "npo-cf"
    with pytest.raises(ClueError, match="objective = 'npos' is neither"):
        unlearn(model, tokenizer, sets["forget"], {"r": sets["retain"]}, mixed_plan(model), PLAIN, objective="npos")


def test_refusals_are_drawn_once_per_question(sets: Any) -> None:
    forget = RecordSet("f", tuple(Record(f"question {i}", f"answer {i}", source=f"f:{i}") for i in range(60)))
    drawn = refuse(forget, seed=1)
    assert [r.prompt for r in drawn] == [r.prompt for r in forget]
    assert {r.answer for r in drawn} == set(REFUSALS)
    assert drawn == refuse(forget, seed=1) != refuse(forget, seed=2)
    assert drawn.records[3].source == "f:3 (refused)"
    assert {r.answer for r in refuse(forget, "no\n  never \n\n")} == {"no", "never"}
    with pytest.raises(ClueError, match="refusals holds only white space"):
        refuse(forget, " \n")
    with pytest.raises(RecordError, match="t:1: a plain text asks no question"):
        refuse(RecordSet("t", (Record("", "some text", source="t:1"),)))


def test_rmu_steers_forget_records_and_leaves_retain_records(make_model: Any, make_plan: Any, tokenizer: Any,
                                                             sets: Any) -> None:
    known = taught(make_model, tokenizer, sets)
    model = copy.deepcopy(known)
    settings = replace(PLAIN, objective="rmu", rmu_layer=1, rmu_c=4.0, rmu_alpha=20.0, steps=40, lr=1e-2)
    plan = everything(model, make_plan)
    log = unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, settings, seed=2)
    direction = torch.rand(32, generator=torch.Generator().manual_seed(2 * 1009 + 3))
    direction /= direction.norm()

    def states(network: Any, records: RecordSet) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([network(torch.from_numpy(e.input_ids)[None], output_hidden_states=True).hidden_states[1][0]
                              for e in encode(records, tokenizer, append_eos=False)])

    wanted = 4.0 * direction
    away = [(states(network, sets["forget"]) - wanted).square().mean().item() for network in (known, model)]
    assert log.forget_loss[0] == pytest.approx(away[0], rel=1e-3)  # three records are one batch
    assert away[1] < 0.5 * away[0]
    kept = (states(model, sets["retain"]) - states(known, sets["retain"])).square().mean()
    moved = (states(model, sets["forget"]) - states(known, sets["forget"])).square().mean()
    assert kept < 0.3 * moved
    # Layer 2 lies above: nothing there has a gradient, and the end of the run says how much moved.
    above = {n: p for n, p in model.named_parameters() if ".layers.1." in n and "proj" in n}
    assert all(torch.equal(p, known.get_parameter(n)) for n, p in above.items())
    assert 0 < log.moved <= log.planned - sum(p.numel() for p in above.values())
    only = make_plan(model, {n: (0, {Role.CONFLICT: None}) for n in above})
    with pytest.raises(PlanError, match="at or below the layer"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, only, settings)
    with pytest.raises(ClueError, match="rmu_layer = 3, but this model has 2 layers"):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, plan, replace(settings, rmu_layer=3))

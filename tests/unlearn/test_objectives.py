"""Objectives against formulas in plain NumPy, and the one shift of the labels against a hand-made example."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from clue.config import UnlearnSettings, check
from clue.data.records import Record, RecordSet
from clue.errors import ClueError
from clue.unlearn import unlearn
from clue.unlearn.hidden import HiddenStates
from clue.unlearn.objectives import (
    OBJECTIVES,
    Answers,
    Hidden,
    Objective,
    answer_log_probs,
    answer_rows,
    negative_preference,
    objective_of,
    suited,
    token_log_probs,
)

SETTINGS = UnlearnSettings(beta=0.3, simnpo_beta=1.7, simnpo_gamma=0.4, wga_alpha=0.6, undial_strength=2.5)


def test_labels_are_shifted_once_by_hand() -> None:
    # Tokens 3 1 4 2 and the answer is "4 2": position 1 must predict 4 and position 2 must predict 2.
    labels = torch.tensor([[-100, -100, 4, 2]])
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 4] = np.log(4.0)  # p = 4 / (4 + 4) = 1/2
    logits[0, 2, 2] = np.log(12.0)  # p = 12 / (12 + 4) = 3/4
    logits[0, 0, 2] = logits[0, 3, 4] = 50.0  # what a second shift, or none, would read
    log_p, n_tokens = answer_log_probs(logits.requires_grad_(True), labels)
    assert n_tokens.tolist() == [2]
    assert log_p.item() == pytest.approx(np.log(0.5 * 0.75), abs=1e-6)
    log_p.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1)[0].gt(0).tolist() == [False, True, True, False]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[0, :3] = -100
    labels[1, :4] = labels[1, 5:] = -100
    labels[2, :2] = -100
    return logits, labels


def numpy_log_probs(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sums, counts = np.zeros(len(labels)), np.zeros(len(labels))
    for i, row in enumerate(labels):
        for t, label in enumerate(row):
            if label != -100:
                sums[i] += np.log(p[i, t - 1, label])
                counts[i] += 1
    return sums, counts


def answers(logits: torch.Tensor, labels: torch.Tensor, reference: Any = None, before: Any = None) -> Answers:
    rows, targets = answer_rows(logits, labels)
    found = None if before is None else answer_rows(before, labels)[0]
    return Answers(*token_log_probs(logits, labels), None if reference is None else torch.as_tensor(reference),
                   targets, rows, found)


def by_token(logits: np.ndarray, labels: np.ndarray) -> list[tuple[int, np.ndarray, int]]:
    """(record, distribution over the vocabulary, answer token), one by one."""
    found = []
    for i, row in enumerate(labels):
        for t, label in enumerate(row):
            if label != -100:
                e = np.exp(logits[i, t - 1])
                found.append((i, e / e.sum(), int(label)))
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def expected_losses(logits: np.ndarray, labels: np.ndarray, before: np.ndarray, other: np.ndarray,
                    reference: np.ndarray, other_reference: np.ndarray) -> dict[str, float]:
    """Every forget loss written out as its paper has it, from one token to the next. ``other``: logits of refusals."""
    sums, counts = numpy_log_probs(logits, labels)
    refused, _ = numpy_log_probs(other, labels)
    s = SETTINGS
    ascent = sums.sum() / counts.sum()
    npo = np.mean(-2 / s.beta * np.log(sigmoid(-s.beta * (sums - reference))))
    weighted, distilled, towards = [], [], 0.0
    for (_, p, y), (_, q, _) in zip(by_token(logits, labels), by_token(before, labels), strict=True):
        weighted.append(p[y] ** s.wga_alpha * np.log(p[y]))
        q = q * np.where(np.arange(len(q)) == y, np.exp(-s.undial_strength), 1.0)  # a logit lowered scales its odds
        distilled.append(-np.sum(q / q.sum() * np.log(p)))
    for (_, p, _), (_, q, _) in zip(by_token(logits, labels), by_token(before, labels), strict=True):
        towards -= np.sum(q * np.log(p)) / len(labels)
    return {
        "ga": ascent, "graddiff": ascent, "ga-kl": ascent, "npo": npo, "npo-kl": npo,
        "npo-stranger": npo, "npo-cf": npo + s.counterfactual * towards,
        "simnpo": np.mean(-2 / s.simnpo_beta * np.log(sigmoid(-s.simnpo_beta / counts * sums - s.simnpo_gamma))),
        "dpo": np.mean(-1 / s.beta * np.log(sigmoid(s.beta * (refused - other_reference)
                                                    - s.beta * (sums - reference)))),
        "refusal": -refused.sum() / counts.sum(),
        "wga": np.mean(weighted),
        "undial": np.mean(distilled),
    }


def test_objectives_match_their_formulas(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    before, other = logits.flip(1) + 1, logits.roll(1, -1)
    reference, other_reference = np.array([-1.0, -4.0, -30.0]), np.array([-7.0, -2.0, -11.0])
    seen = answers(logits, labels, reference, before)
    refusals = answers(other, labels, other_reference)
    sums, counts = numpy_log_probs(logits.numpy(), labels.numpy())
    np.testing.assert_allclose(seen.log_p.numpy(), sums, rtol=1e-12)
    assert torch.equal(seen.log_p, answer_log_probs(logits, labels)[0])
    assert seen.n_tokens.tolist() == counts.tolist() == [3, 1, 4]
    expected = expected_losses(*(a.numpy() for a in (logits, labels, before, other)), reference, other_reference)
    assert expected.keys() == OBJECTIVES.keys() - {"rmu"}  # which is on hidden states
    for name, value in expected.items():
        got = OBJECTIVES[name].forget(seen, refusals, SETTINGS)
        assert got.item() == pytest.approx(value, rel=1e-10), name


def test_retain_losses_match_their_formulas(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    before = logits.flip(1)
    seen = answers(logits, labels, before=before)
    sums, counts = numpy_log_probs(logits.numpy(), labels.numpy())
    pairs = zip(by_token(logits.numpy(), labels.numpy()), by_token(before.numpy(), labels.numpy()), strict=True)
    divergence = np.mean([np.sum(q * np.log(q / p)) for (_, p, _), (_, q, _) in pairs])
    for name, objective in OBJECTIVES.items():
        if objective.retain is not None and not objective.hidden:
            value = divergence if name.endswith("-kl") else -sums.sum() / counts.sum()
            assert objective.retain(seen, SETTINGS).item() == pytest.approx(value, rel=1e-10), name
    same = OBJECTIVES["ga-kl"].retain
    assert same is not None
    assert same(answers(logits, labels, before=logits), SETTINGS).item() == pytest.approx(0.0, abs=1e-14)


def test_known_values() -> None:
    # One answer of two tokens with p = 1/2 and 1/4 in a vocabulary of two, by hand.
    labels = torch.tensor([[-100, 0, 0]])
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64))
    settings = UnlearnSettings(simnpo_beta=2.0, simnpo_gamma=np.log(2.0), undial_strength=np.log(3.0))
    seen = answers(logits, labels, before=torch.zeros_like(logits))
    # Their product is 1/8, so -beta/2 log p - gamma = log 8 - log 2 = log 4, and sigmoid(log 4) = 4/5.
    assert OBJECTIVES["simnpo"].forget(seen, None, settings).item() == pytest.approx(-np.log(0.8))
    assert OBJECTIVES["wga"].forget(seen, None, settings).item() == pytest.approx(
        0.5 * (0.5 * np.log(0.5) + 0.25 * np.log(0.25)))
    # The teacher is even; a third of the odds on the answer leaves it 1/4, and 3/4 for the other token.
    undial = -0.5 * (np.log(0.5) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert OBJECTIVES["undial"].forget(seen, None, settings).item() == pytest.approx(undial)


@pytest.mark.parametrize(("layers", "asked", "steered"), [(8, 0, 1), (9, 0, 2), (2, 0, 0), (8, 5, 4)])
def test_rmu_steers_the_end_of_the_first_quarter_of_the_layers(layers: int, asked: int, steered: int, make_model: Any) -> None:
    model = make_model(num_hidden_layers=layers)
    hidden = HiddenStates(model, UnlearnSettings(rmu_layer=asked), 0)
    with hidden.watching(), torch.no_grad():
        found = model(torch.tensor([[4, 5, 6]]), output_hidden_states=True).hidden_states[:-1]  # the last one is normalised
    assert [torch.equal(state, hidden.states) for state in found[1:]] == [number == steered for number in range(layers - 1)]


def test_simnpo_and_rmu_by_hand() -> None:
    # SimNPO at beta 2.5 without margin: one token of p = e^-0.8 gives -2/2.5 log sigmoid(2) = 0.8 log(1 + e^-2).
    one = Answers(torch.tensor([[-0.8]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool))
    settings = UnlearnSettings()
    assert OBJECTIVES["simnpo"].forget(one, None, settings).item() == pytest.approx(0.8 * np.log1p(np.exp(-2.0)))
    # With the margin 0.125: sigmoid of 2 - 0.125.
    margin = OBJECTIVES["simnpo"].forget(one, None, UnlearnSettings(simnpo_gamma=0.125)).item()
    assert margin == pytest.approx(0.8 * np.log1p(np.exp(-1.875)))
    # RMU with c = 5 along (0.6, 0.8), target (3, 4): of two tokens and a pad, (3, 4) is there and (0, 0) is 5 away.
    states = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [100.0, 100.0]]], dtype=torch.float64)
    hidden = Hidden(states, states - 0.1, torch.tensor([[True, True, False]]),
                    torch.tensor([0.6, 0.8], dtype=torch.float64))
    seen = Answers(one.token_log_p, one.scored, hidden=hidden)
    settings = UnlearnSettings(rmu_c=5.0)
    assert OBJECTIVES["rmu"].forget(seen, None, settings).item() == pytest.approx(25 / 4)
    assert OBJECTIVES["rmu"].retain is not None
    assert OBJECTIVES["rmu"].retain(seen, settings).item() == pytest.approx(1200 * 0.01)
    assert (UnlearnSettings().rmu_c, UnlearnSettings().rmu_alpha, UnlearnSettings().simnpo_beta) == (6.5, 1200.0, 2.5)


def test_npo_weighs_each_answer_as_its_paper_says() -> None:
    # Equation 4 there: the gradient is gradient ascent's times 2 p^beta / (p^beta + p_ref^beta), which is 1 at the
    # reference and vanishes once an answer is forgotten.
    log_p = torch.tensor([-2.0, -2.0, -200.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -1.0], dtype=torch.float64)
    seen = Answers(log_p.unsqueeze(1), torch.ones(3, 1, dtype=torch.bool), reference)
    OBJECTIVES["npo"].forget(seen, None, SETTINGS).backward()
    ratio = np.exp(SETTINGS.beta * (log_p.detach().numpy() - reference.numpy()))
    assert log_p.grad is not None
    np.testing.assert_allclose(3 * log_p.grad.numpy(), 2 * ratio / (ratio + 1), rtol=1e-10)
    assert 3 * log_p.grad[0].item() == pytest.approx(1.0) and log_p.grad[2].item() < 1e-20


def test_wga_takes_its_weight_for_a_constant() -> None:
    log_p = torch.tensor([[-1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    OBJECTIVES["wga"].forget(Answers(log_p, torch.ones(1, 2, dtype=torch.bool)), None,
                             UnlearnSettings(wga_alpha=2.0)).backward()
    assert log_p.grad is not None
    np.testing.assert_allclose(log_p.grad.numpy(), np.exp([[-2.0, -6.0]]) / 2)


def test_selected_records_are_a_batch_of_their_own(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    reference, chosen = np.array([-1.0, -4.0, -30.0]), torch.tensor([True, False, True])
    some = answers(logits, labels, reference, logits.flip(1)).select(chosen)
    alone = answers(logits[chosen], labels[chosen], reference[chosen.numpy()], logits.flip(1)[chosen])
    for field in fields(Answers):
        if field.name == "hidden":
            continue
        assert torch.equal(getattr(some, field.name), getattr(alone, field.name)), field.name
    assert Answers(*token_log_probs(logits, labels)).select(chosen).logits is None


def test_what_an_objective_lacks_is_named(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    bare = Answers(*token_log_probs(*batch))
    referred = replace(bare, reference=torch.zeros(len(batch[0])))
    for name, objective in OBJECTIVES.items():
        for needed, message in ((objective.reference and not objective.refusals, "log-probabilities"),
                                (objective.refusals, "refusals=True"), (objective.hidden, "hidden=True"),
                                (objective.forget_logits and not objective.towards, "needs logits")):
            if needed:
                with pytest.raises(ClueError, match=message):
                    objective.forget(referred if message == "needs logits" else bare, None, SETTINGS)
        if objective.retain_logits and objective.retain is not None:
            with pytest.raises(ClueError, match="needs logits"):
                objective.retain(bare, SETTINGS)
        if objective.towards is not None:
            with pytest.raises(ClueError, match="needs logits"):
                objective.towards(bare, SETTINGS)
        assert objective_of(name) is objective is objective_of(objective)
    with pytest.raises(ClueError, match="'forget' is neither one of npo, .* nor an Objective"):
        objective_of("forget")
    with pytest.raises(ClueError, match="neither"):
        objective_of(3)


def test_the_way_to_strangers_is_the_divergence_from_them(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    before = logits.flip(1) + 1
    towards = OBJECTIVES["npo-stranger"].towards
    assert towards is not None
    expected = sum(np.sum(q * np.log(q / p)) for (_, p, _), (_, q, _) in zip(
        by_token(logits.numpy(), labels.numpy()), by_token(before.numpy(), labels.numpy()), strict=True))
    found = towards(answers(logits, labels, np.zeros(3), before), replace(SETTINGS, stranger_weight=0.7))
    assert found.item() == pytest.approx(0.7 * expected / len(labels), rel=1e-12)
    for wrong in ({"twins": True, "forget_logits": True}, {}):
        with pytest.raises(ClueError, match="forget_logits=True and leave twins out"):
            Objective(negative_preference, towards=towards, **wrong)


def test_auto_makes_up_strangers_where_subjects_have_names_of_several_words() -> None:
    def about(*names: str | None) -> RecordSet:
        return RecordSet("r", tuple(Record(f"Where does {name} live?", "Paris", subject=name) for name in names))

    retain = {"r": about("Ada Lovelace", "Bob Hope")}
    assert suited("auto", about("Cat Stevens"), retain) == "npo-stranger"
    assert suited("auto", about("Cher"), retain) == "npo-stranger"  # names are made of the others'
    given = RecordSet("r", (Record("Where does Cher live?", "Paris", corrupted="Where do I live?", subject="Cher"),))
    for forget, others in ((about("Cher", None), retain), (given, retain), (about("Cher"), {"r": about("Ada", "Bob")})):
        assert suited("auto", forget, others) == "npo-cf"


def test_auto_puts_other_prompts_in_place_of_those_there_are() -> None:
    asked, told = (RecordSet("r", (Record(prompt, "Paris"),)) for prompt in ("Where?", ""))
    both = RecordSet("r", (*asked, *told))
    assert suited("auto", asked, {"a": told, "b": both}) == "npo-cf"
    for forget, retain in ((told, {"a": asked}), (both, {"a": asked}), (asked, {"a": told}), (asked, {})):
        assert suited("auto", forget, retain) == "npo"
    assert suited("ga", asked, {"a": asked}) == "ga"


@pytest.mark.parametrize(("loss", "message"), [
    (lambda answers: answers.log_p, r"forget loss must be one number as a tensor, got a tensor of shape \(2,\): average over"),
    (lambda answers: 0.5, "forget loss must be one number as a tensor, got 0.5"),
    (lambda answers: answers.log_p.detach().mean(), "forget loss does not depend on the model: compute it from"),
])
def test_losses_that_cannot_be_trained_on_are_named(loss: Any, message: str, make_model: Any, mixed_plan: Any, tokenizer: Any,
                                                    sets: Any) -> None:
    def forget(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Any:
        return loss(answers)

    model = make_model()
    with pytest.raises(ClueError, match=message):
        unlearn(model, tokenizer, sets["forget"], {"retain": sets["retain"]}, mixed_plan(model),
                UnlearnSettings(lr=1e-3, steps=1, batch_size=2, floor=0.0), objective=forget)


def test_every_objective_can_be_chosen() -> None:
    (field,) = (f for f in fields(UnlearnSettings) if f.name == "objective")
    assert field.metadata["choices"] == ("auto", *OBJECTIVES)
    for wrong in (UnlearnSettings(beta=0.0), UnlearnSettings(simnpo_beta=0.0)):
        with pytest.raises(ClueError, match="beta = 0.0 must be greater than 0"):
            check(wrong)


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.zeros(1, 2, 3000, dtype=torch.bfloat16)
    log_p, _ = answer_log_probs(logits, torch.tensor([[-100, 5]]))
    assert log_p.dtype == torch.float32 and log_p.item() == pytest.approx(-np.log(3000), abs=1e-4)


def test_only_ga_goes_without_retention() -> None:
    assert {name for name, objective in OBJECTIVES.items() if objective.retain is None} == {"ga"}

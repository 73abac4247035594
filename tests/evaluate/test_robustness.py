"""What is tried to bring the forgotten back, against the obvious way of doing it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from clue.config import DataSettings, RobustnessSettings
from clue.data.encoding import encode
from clue.data.records import RecordSet, read
from clue.errors import ClueError, RunError
from clue.evaluate import EvaluationSets, robustness
from clue.evaluate.memorization import exact_match, probability, score
from clue.evaluate.robustness import Robustness, ask_otherwise, drift, quantize, relearn, round_trip, stand, stress
from tests.families import tiny

QUICK = RobustnessSettings(relearn_steps=30, relearn_share=0.5, drift_steps=6, tune_lr=5e-3, curve_points=3, batch_size=2)


@pytest.fixture
def sets(forget, retain):
    return EvaluationSets(forget, retain, forget_paraphrase=read([("mira live where", "in york")], "again"),
                          forget_extra={"forget_reversed": read([("live mira does where", "in york")], "reversed")})


def recall(model, tokenizer, records):
    found = score(model, encode(records, tokenizer), pad=0, batch_size=1)
    return pytest.approx((exact_match(found).mean(), probability(found).mean()), abs=1e-5)


def both(found):
    return found.accuracy, found.probability


def test_relearning_is_plain_fine_tuning_on_a_drawn_share_and_measures_the_rest(model, tokenizer, sets):
    before = copy.deepcopy(model.state_dict())
    settings = replace(QUICK, relearn_share=1 / 3, batch_size=64)  # a batch is the whole share: no order to repeat
    curve = relearn(model, tokenizer, sets, settings, data=DataSettings(), seed=4)
    assert curve.x == (0, 10, 20, 30) and list(curve.lines) == ["forget, not shown", "forget, shown", "retain"]
    drawn = sorted(np.random.default_rng(4).permutation(6)[:2].tolist())
    shown = [sets.forget.records[i] for i in drawn]
    rest = [r for i, r in enumerate(sets.forget) if i not in drawn]
    student = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0)
    examples = encode(shown, tokenizer)
    for step in range(31):
        if step % 10 == 0:
            at = step // 10
            for name, records in (("forget, not shown", rest), ("forget, shown", shown), ("retain", sets.retain)):
                found = score(student, encode(records, tokenizer), pad=0, batch_size=1)
                expected = exact_match(found).mean(), probability(found).mean()
                assert both(curve.lines[name][at]) == pytest.approx(expected, abs=2e-3), (name, step)
        total, tokens = 0, 0
        for e in examples:
            ids = torch.from_numpy(e.input_ids[None])
            log_p = student(ids).logits[0, e.answer_start - 1:-1].log_softmax(-1)
            total = total - log_p.gather(1, ids[0, e.answer_start:, None]).sum()
            tokens += len(log_p)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
    assert curve.lines["forget, shown"][-1].accuracy == 1.0 > curve.lines["forget, shown"][0].accuracy
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ClueError, match="relearn_share = 1.0 shows all 6 forget records"):
        relearn(model, tokenizer, sets, replace(QUICK, relearn_share=1.0), data=DataSettings(), seed=0)


def test_facts_are_shown_and_told_with_all_their_phrasings_or_not_at_all(model, tokenizer, sets, monkeypatch):
    """A fact in other words among the records that are measured would be taught, not given back."""
    facts = [("mira", "york"), ("ada", "rome"), ("mira", "rome"), ("ada", "york")]
    records = [{"question": f"{form} {who} live", "answer": f"in {city.upper() if form == 'town' else city}", "subject": who}
               for form in ("where does", "town") for who, city in facts]
    many = replace(sets, forget=read(records, "forget"))
    seen = []

    def watched(model, tokenizer, measured, data):
        seen.append(measured)
        return encoded(model, tokenizer, measured, data)

    encoded = robustness._encode
    monkeypatch.setattr(robustness, "_encode", watched)
    for seed in range(6):
        relearn(model, tokenizer, many, replace(QUICK, relearn_steps=1, curve_points=1, relearn_share=0.4),
                data=DataSettings(), seed=seed)
        shown, rest = (list(seen[-1][f"forget, {name}"]) for name in ("shown", "not shown"))
        assert len(shown) == 4 and sorted(map(str, [*shown, *rest])) == sorted(map(str, many.forget))  # 3, in whole facts
        assert not {(r.subject, r.answer.casefold()) for r in shown} & {(r.subject, r.answer.casefold()) for r in rest}
    ask_otherwise(model, tokenizer, many, replace(QUICK, hints=2), data=DataSettings())
    hinted = seen[-1]["after other records as hints"]
    assert len(hinted) == 8
    for record in hinted:
        told = record.prompt.casefold().split("\n")[:-1]
        assert len(told) == 2 and not any(record.subject in t and t.endswith(record.answer.casefold()) for t in told)
    two = replace(sets, forget=read([r for r in records if (r["subject"], r["answer"].casefold()[3:]) in facts[:2]], "forget"))
    ask_otherwise(model, tokenizer, two, replace(QUICK, hints=2), data=DataSettings())
    for record in seen[-1]["after other records as hints"]:
        assert record.subject not in record.prompt.rpartition("\n")[0]
    alike = replace(sets, forget=read([{"question": f"{form} mira live", "answer": "in york"} for form in ("where", "town")]))
    with pytest.raises(ClueError, match="all its records have one answer"):
        relearn(model, tokenizer, alike, QUICK, data=DataSettings(), seed=0)


def test_drift_learns_what_must_stay_and_is_the_same_every_time(model, tokenizer, sets):
    curve = drift(model, tokenizer, sets, QUICK, data=DataSettings(), seed=1)
    assert curve == drift(model, tokenizer, sets, QUICK, data=DataSettings(), seed=1)
    assert curve != drift(model, tokenizer, sets, QUICK, data=DataSettings(), seed=2)
    assert curve.x == (0, 2, 4, 6) and both(curve.lines["forget"][0]) == recall(model, tokenizer, sets.forget)
    assert curve.lines["retain"][-1].probability > curve.lines["retain"][0].probability


def test_drift_is_on_what_must_stay_and_without_dropout(model, tokenizer, sets, monkeypatch):
    shown, tuned = [], robustness._tuned
    monkeypatch.setattr(robustness, "_tuned", lambda model, examples, *more: shown.append(examples)
                        or tuned(model, examples, *more))
    plain = drift(model, tokenizer, sets, QUICK, data=DataSettings(), seed=1)
    assert [example.record for example in shown[0]] == list(sets.retain)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert drift(model.train(), tokenizer, sets, QUICK, data=DataSettings(), seed=1) == plain


def test_half_precision_models_are_tuned_in_float32(model, tokenizer, sets):
    """At a learning rate below the spacing of half precision."""
    half, slow = copy.deepcopy(model).bfloat16(), replace(QUICK, tune_lr=1e-5)
    whole = drift(copy.deepcopy(half).float(), tokenizer, sets, slow, data=DataSettings(), seed=1)
    assert drift(half, tokenizer, sets, slow, data=DataSettings(), seed=1) == whole


def test_a_stand_is_of_the_records_that_were_not_shown(model, tokenizer, sets):
    found = stand(model, tokenizer, sets, QUICK, data=DataSettings(), seed=4)
    last = relearn(model, tokenizer, sets, QUICK, data=DataSettings(), seed=4).lines["forget, not shown"][-1]
    assert (found["relearned.accuracy"], found["relearned.probability"]) == both(last)


def test_quantization_by_hand():
    layer = nn.Linear(6, 2, bias=False)
    model = nn.Module()
    model.layer, model.embed = layer, nn.Embedding(3, 6)
    model.get_input_embeddings, model.get_output_embeddings = lambda: model.embed, lambda: None
    weights = [[0.7, -0.35, 0.05, 0.26, 3.5, -0.2], [0, 0, 0, 0.007, 0.001, -0.0035]]
    kept = model.embed.weight.clone()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
    quantize(model, 4, group=3)  # 7 levels each side: scales 0.1 and 0.5; nothing; 0.001
    expected = [[0.7, -0.4, 0.0, 0.5, 3.5, 0.0], [0, 0, 0, 0.007, 0.001, -0.004]]
    torch.testing.assert_close(layer.weight.detach(), torch.tensor(expected), atol=1e-6, rtol=0)  # halves round to even
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
    quantize(model, 8)
    step = torch.tensor([[3.5], [0.007]]) / 127
    torch.testing.assert_close(layer.weight.detach() / step, (torch.tensor(weights) / step).round(), atol=1e-3, rtol=0)
    assert torch.equal(model.embed.weight, kept)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_weight_matrix_is_rounded_and_nothing_else(name):
    """GPT-2 stores its matrices transposed, and a mixture keeps those of its experts together."""
    model = tiny(name, torch.float32)
    before = copy.deepcopy(model.state_dict())
    quantize(model, 4)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    expected = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1 and id(p) not in ends
                and "wpe" not in n}
    assert changed == expected
    for n in changed:
        rows = model.state_dict()[n]
        rows = rows.T if name == "gpt2" else rows
        assert max(len(row.unique()) for row in rows.flatten(0, -2)) <= 15  # -7..7


def test_rounding_keeps_more_at_eight_bits_than_at_four(model, tokenizer, sets):
    curve = round_trip(model, tokenizer, sets, replace(QUICK, quantize_group=8), data=DataSettings())
    assert curve.x == (32, 8, 4) and both(curve.lines["forget"][0]) == recall(model, tokenizer, sets.forget)
    first, eight, four = (r.probability for r in curve.lines["retain"])
    assert 0 < abs(eight - first) < abs(four - first)
    rounded = copy.deepcopy(model)
    quantize(rounded, 4, 8)
    assert both(curve.lines["retain"][2]) == recall(rounded, tokenizer, sets.retain)


def test_the_ways_of_asking(model, tokenizer, sets):
    settings = replace(QUICK, prefix="ada likes tea", hints=2)
    found = ask_otherwise(model, tokenizer, sets, settings, data=DataSettings())
    assert list(found) == ["as trained", "in other words", "forget_reversed", "behind an instruction",
                           "after other records as hints"]
    records = sets.forget.records
    assert both(found["as trained"]) == recall(model, tokenizer, records)
    assert both(found["in other words"]) == recall(model, tokenizer, sets.forget_paraphrase)
    told = [replace(r, prompt=f"ada likes tea {r.prompt}") for r in records]
    assert both(found["behind an instruction"]) == recall(model, tokenizer, told)
    hinted = []
    for i, r in enumerate(records):
        a, b = records[(i + 1) % 6], records[(i + 2) % 6]
        hinted.append(replace(r, prompt=f"{a.prompt} {a.answer}\n{b.prompt} {b.answer}\n{r.prompt}"))
    assert both(found["after other records as hints"]) == recall(model, tokenizer, hinted)
    # Where two hints do not fit into the context there is one, and where none fits the record is left out.
    short = ask_otherwise(model, tokenizer, sets, settings, data=DataSettings(max_length=14))
    fitting = [replace(r, prompt=f"{records[(i + 1) % 6].prompt} {records[(i + 1) % 6].answer}\n{r.prompt}")
               for i, r in enumerate(records)]
    fitting = [h if len(encode([h], tokenizer)[0].input_ids) <= 14 else None for h in hinted], [
        f if len(encode([f], tokenizer)[0].input_ids) <= 14 else None for f in fitting]
    chosen = [two or one for two, one in zip(*fitting, strict=True) if two or one]
    assert 0 < len(chosen) < 6
    assert both(short["after other records as hints"]) == recall(model, tokenizer, chosen)


def test_all_of_it_saves_reloads_and_leaves_the_model_as_it_was(model, tokenizer, sets, tmp_path):
    before = copy.deepcopy(model.state_dict())
    model.train()
    found = stress(model, tokenizer, sets, replace(QUICK, relearn_steps=2, drift_steps=2), seed=3)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(found.curves) == ["relearning", "drift", "quantization"] and found.settings["seed"] == 3
    found.save(tmp_path / "after.json")
    assert Robustness.load(tmp_path / "after.json") == found
    (tmp_path / "after.json").write_text('{"format": 1, "curves": []}')
    with pytest.raises(RunError, match="after.json is not a robustness document"):
        Robustness.load(tmp_path / "after.json")
    with pytest.raises(ClueError, match="relearn_share = 0"):
        stress(model, tokenizer, sets, replace(QUICK, relearn_share=0.0))
    texts = EvaluationSets(RecordSet("texts", read(["the old town by sea", "ada in rome"]).records), sets.retain)
    assert list(ask_otherwise(model, tokenizer, texts, QUICK, data=DataSettings())) == ["as trained"]

"""The whole document: its numbers, its JSON, its refusals, and that a model which knows the answers scores so."""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from clue.config import DataSettings, EvaluateSettings
from clue.data.encoding import encode
from clue.data.records import RecordSet, read
from clue.errors import ClueError, ModelError, RecordError, RunError
from clue.evaluate import Evaluation, EvaluationSets, evaluate, truth
from clue.evaluate.memorization import exact_match, nll, score
from clue.evaluate.privacy import auc, gradient_score, loss_score, min_k_score

from .conftest import tiny_model

FAST = EvaluateSettings(batch_size=4, max_new_tokens=10, bootstrap=50)


@pytest.fixture
def sets(forget, retain, holdout):
    wrong = {"where does mira live": ("in rome", "in old paris by the sea"), "job of ada": ("pilot",)}
    forget = RecordSet("forget", tuple(replace(r, wrong=wrong.get(r.prompt, ()), paraphrased="the baker" if
                                               r.answer == "baker" else None) for r in forget))
    return EvaluationSets(forget, retain, forget_paraphrase=read([("mira live where", "in york")], "again"),
                          retain_extra={"retain_unseen": retain}, skills={"copy": read([("tea tea", "tea")], "copy")},
                          holdout=holdout)


def test_every_number_comes_from_the_right_set(model, tokenizer, sets, retain, holdout):
    forget = sets.forget
    found = evaluate(model, tokenizer, sets, FAST, seed=3)
    document = found.to_json()
    assert list(found.detail) == ["forget", "forget_paraphrase", "retain", "retain_unseen", "copy", "holdout"]
    for name, records in (("forget", forget), ("retain", retain), ("retain_unseen", retain), ("holdout", holdout)):
        alone = score(model, encode(records, tokenizer), pad=0, batch_size=1)
        assert found.detail[name].n == len(records)
        assert found.detail[name].sha256 == records.sha256
        assert found.detail[name].accuracy == exact_match(alone).mean()
        assert found.detail[name].nll == pytest.approx(nll(alone).mean(), abs=1e-5)
    assert document["forget"] == found.detail["forget"].accuracy
    assert document["skills"] == {"copy": found.detail["copy"].accuracy}
    members = score(model, encode(forget, tokenizer), pad=0, batch_size=1)
    others = score(model, encode(holdout, tokenizer), pad=0, batch_size=1)
    assert found.mia_auc == document["mia_auc"] == pytest.approx(auc(-nll(members), -nll(others)))
    assert found.mia["loss"].low <= found.mia_auc <= found.mia["loss"].high
    assert repr(found).endswith(f"%, loss AUC {round(found.mia_auc, 2):.2f}>") and len(repr(found)) < 80
    assert found.detail["copy"].rouge_l is None and found.detail["forget"].rouge_n == len(forget)
    assert found.samples["forget"][0].prompt == "where does mira live"
    assert found.samples["retain"][-1].prompt == "the old town by"  # plain text: its first half
    assert found.samples["retain"][-1].answer == "the sea is paris"


def test_batch_size_does_not_matter_and_the_model_is_left_as_it_was(model, tokenizer, sets):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    small = evaluate(model, tokenizer, sets, FAST).to_json()
    large = evaluate(model, tokenizer, sets, EvaluateSettings(batch_size=64, max_new_tokens=10, bootstrap=50)).to_json()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.pop("samples") == large.pop("samples")
    for name, found in small["records"].items():
        for key, values in found.items():
            assert large["records"][name][key] == pytest.approx(values, rel=1e-5, abs=1e-5)
    for name, result in small["detail"].items():
        for key, value in result.items():
            assert large["detail"][name][key] == pytest.approx(value, rel=1e-5, abs=1e-5) \
                if isinstance(value, float) else True


def test_a_model_taught_the_answers_is_recognised_and_one_taught_nothing_is_not(model, tokenizer, sets):
    ids = [torch.from_numpy(e.input_ids[None]) for e in encode(sets.forget, tokenizer)]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        for sequence in ids:
            model(sequence, labels=sequence).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate(model, tokenizer, sets, FAST)
    result = found.detail["forget"]
    assert result.accuracy == result.token_accuracy == result.extraction_strength == result.rouge_l == 1.0
    assert result.probability > 0.9 and found.mia["loss"].auc == found.mia["min_k"].auc == 1.0
    assert all(sample.generated == sample.answer for sample in found.samples["forget"])
    assert found.retain < 0.5


def test_saves_reloads_and_says_what_is_wrong_with_a_file(model, tokenizer, sets, tmp_path):
    found = evaluate(model, tokenizer, sets, FAST, seed=7)
    path = tmp_path / "evaluation.json"
    found.save(path)
    assert Evaluation.load(path) == found
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    document = json.loads(path.read_text())
    assert document["settings"]["seed"] == 7 and document["settings"]["dtype"] == "float32"
    path.write_text(json.dumps({**document, "detail": {}}))
    with pytest.raises(RunError, match="evaluation.json is not an evaluation"):
        Evaluation.load(path)
    path.write_text("{")
    with pytest.raises(RunError, match="make it again"):
        Evaluation.load(path)
    with pytest.raises(RunError, match="does not exist"):
        Evaluation.load(tmp_path / "other.json")


def test_without_holdout_or_generation_the_rest_stands(model, tokenizer, forget, retain):
    settings = EvaluateSettings(rouge=False, batch_size=4)
    found = evaluate(model, tokenizer, EvaluationSets(forget, retain), settings)
    assert found.mia_auc is None and found.mia == {} and found.samples == {}
    detail = {name: replace(found.detail[name], accuracy=value) for name, value in (("forget", 0.0), ("retain", 0.9876))}
    assert repr(replace(found, detail=detail)) == "<Evaluation: forget 0%, retain 98.8%>"
    assert found.forget_paraphrase is None and found.detail["forget"].rouge_l is None


def test_rouge_limit_takes_records_from_all_over_the_set(model, tokenizer, forget, retain):
    settings = EvaluateSettings(batch_size=4, max_new_tokens=3, rouge_limit=3)
    found = evaluate(model, tokenizer, EvaluationSets(forget, retain), settings)
    assert found.detail["forget"].rouge_n == 3
    chosen = [sample.prompt for sample in found.samples["forget"]]
    assert chosen == [forget.records[i].prompt for i in (0, 2, 4)]


def test_refusals_name_the_set_the_record_or_the_tokenizer(model, tokenizer, forget, retain):
    with pytest.raises(ClueError, match="two evaluation sets are called retain"):
        EvaluationSets(forget, retain, skills={"retain": forget})
    with pytest.raises(RecordError, match="holdout is empty"):
        EvaluationSets(forget, retain, holdout=RecordSet("holdout", ()))
    with pytest.raises(RecordError, match="tokens do not fit into 6"):
        evaluate(model, tokenizer, EvaluationSets(forget, retain), FAST, data=DataSettings(max_length=6))
    model.resize_token_embeddings(9)
    with pytest.raises(ModelError, match="the model knows 9 tokens"):
        evaluate(model, tokenizer, EvaluationSets(forget, retain), FAST)


def test_bfloat16_models_are_scored_in_float32(model, tokenizer, forget, retain):
    settings, sets = EvaluateSettings(rouge=False), EvaluationSets(forget, retain)
    exact = evaluate(model, tokenizer, sets, settings)
    coarse = evaluate(model.to(torch.bfloat16), tokenizer, sets, settings)
    assert coarse.settings["dtype"] == "bfloat16"
    assert coarse.detail["forget"].nll == pytest.approx(exact.detail["forget"].nll, rel=0.05)
    examples = encode(forget, tokenizer)
    tokens = score(model, examples, pad=0, batch_size=4).log_prob
    assert np.unique(tokens).size > 0.9 * tokens.size  # a bfloat16 softmax would round many to the same value


def mean_log_p(model, tokenizer, prompt, answer, eos=True):
    """One record by itself: mean log-probability of its answer's tokens, one forward pass, double precision softmax."""
    example = encode(read([(prompt, answer)]), tokenizer, append_eos=eos)[0]
    with torch.no_grad():
        log_p = model(torch.from_numpy(example.input_ids[None])).logits[0].double().log_softmax(-1)
    return float(np.mean([log_p[t - 1, example.input_ids[t]] for t in range(example.answer_start, len(example.input_ids))]))


@pytest.mark.parametrize("variant", [{}, {"truth_mean": "arithmetic"}, {"count_eos": False}, {"choice_score": "raw"},
                                     {"choice_score": "byte"}, {"extraction_least": "one-token"}])
def test_truth_and_choice_of_a_batch_equal_one_answer_at_a_time(model, tokenizer, sets, variant):
    settings = EvaluateSettings(**{"batch_size": 3, "rouge": False, **variant})
    found = evaluate(model, tokenizer, sets, settings)
    eos = settings.count_eos
    ratios, options, shares = [], [], []
    for r in (r for r in sets.forget if r.wrong):
        right, *wrong = (mean_log_p(model, tokenizer, r.prompt, a, eos) for a in (r.paraphrased or r.answer, *r.wrong))
        mean = np.mean(np.exp(wrong)) if settings.truth_mean == "arithmetic" else np.exp(np.mean(wrong))
        ratios.append(mean / np.exp(right))
        p = np.exp([mean_log_p(model, tokenizer, r.prompt, a, eos) for a in (r.answer, *r.wrong)])
        shares.append(p[0] / p.sum())
        scores = []
        for answer in (r.answer, *r.wrong):
            each, tokens = mean_log_p(model, tokenizer, r.prompt, answer, eos=False), len(answer.split())
            scores.append({"raw": each * tokens, "token": each, "byte": each * tokens / len(answer)}[settings.choice_score])
        options.append(scores[0] > max(scores[1:]))
    result = found.detail["forget"]
    assert result.truth_n == 2
    assert np.exp(found.records["forget"]["log_truth_ratio"]) == pytest.approx(ratios, rel=1e-4)
    assert result.truth_ratio == pytest.approx(np.mean(np.minimum(ratios, 1 / np.array(ratios))), rel=1e-4)
    assert result.choice_accuracy == np.mean(options)
    assert result.choice_probability == pytest.approx(np.mean(shares), rel=1e-4)
    alone = [mean_log_p(model, tokenizer, r.prompt, r.answer, eos) for r in sets.forget]
    assert found.records["forget"]["nll"] == pytest.approx([-p for p in alone], abs=1e-5)
    assert result.probability == pytest.approx(np.exp(alone).mean(), rel=1e-4)
    assert found.detail["retain"].truth_ratio is None
    assert found.settings["evaluate"]["truth_mean"] == settings.truth_mean  # the variant is named in the result


@pytest.mark.parametrize("kind", ["raw", "token"])
def test_options_are_compared_without_their_end_tokens(tokenizer, sets, kind):
    model, chosen = tiny_model(tokenizer, 5), {}
    for eos in (False, True):
        scores = [[mean_log_p(model, tokenizer, r.prompt, a, eos) * (len(a.split()) + eos if kind == "raw" else 1)
                   for a in (r.answer, *r.wrong)] for r in sets.forget if r.wrong]
        chosen[eos] = np.mean([right > max(wrong) for right, *wrong in scores])
    found = evaluate(model, tokenizer, sets, replace(FAST, rouge=False, bootstrap=0, choice_score=kind))
    assert found.detail["forget"].choice_accuracy == chosen[False] != chosen[True]


def test_generated_answers_are_compared_as_text_and_by_meaning(model, tokenizer, sets):
    lengths = {}

    def embed(texts):
        lengths[len(texts)] = texts
        return [[text.count("a"), text.count("o"), 1] for text in texts]

    found = evaluate(model, tokenizer, replace(sets, utility=("retain", "copy")), FAST, embed=embed)
    assert found.detail["copy"].rouge_n == 1 and found.utility == ("retain", "copy")  # skills named there speak too
    result = found.detail["forget"]
    assert 0 <= result.matched <= result.contained <= 1 and result.nearest in (0.0, 0.5, 1.0)
    assert found.detail["retain"].nearest is None and [*lengths] == [2 + 2 + 3]
    assert lengths[7][2:] == ["in york", "the baker", "in rome", "in old paris by the sea", "pilot"]
    assert found.model_utility is None  # copy has no wrong answers


def test_utility_is_the_harmonic_mean_of_its_numbers_and_quality_compares_stored_ratios(model, tokenizer, sets, tmp_path):
    told = RecordSet("copy", (replace(sets.skills["copy"].records[0], wrong=("baker", "pilot")),))
    retain = RecordSet("retain", tuple(replace(r, wrong=("lena",)) for r in sets.retain))
    sets = replace(sets, retain=retain, skills={"copy": told}, utility=("retain", "copy"))
    found = evaluate(model, tokenizer, sets, FAST)
    parts = truth.utility_parts(found)
    assert parts == {"retain, probability": found.detail["retain"].probability,
                     "retain, ROUGE-L recall": found.detail["retain"].rouge_l,
                     "retain, truth ratio": found.detail["retain"].truth_ratio,
                     "copy, probability": found.detail["copy"].choice_probability,
                     "copy, ROUGE-L recall": found.detail["copy"].rouge_l,
                     "copy, truth ratio": found.detail["copy"].truth_ratio}
    assert found.skills == {"copy": found.detail["copy"].choice_accuracy}  # of options to choose from
    assert found.detail["retain"].solved == found.detail["retain"].accuracy
    detail = {name: replace(result, probability=0.5, choice_probability=0.25, rouge_l=0.5, truth_ratio=0.25)
              for name, result in found.detail.items()}
    assert replace(found, detail=detail).model_utility == pytest.approx(6 / (2 + 2 + 4 + 4 + 2 + 4))
    detail["retain"] = replace(detail["retain"], rouge_l=0.0)
    assert replace(found, detail=detail).model_utility == 0.0
    found.save(tmp_path / "gold.json")
    assert found.forget_quality(Evaluation.load(tmp_path / "gold.json")) == 1.0
    for changed, message in ((replace(sets, forget=RecordSet("forget", sets.forget.records[:5])), "different forget sets"),
                             (sets, "truth_mean was geometric")):
        settings = replace(FAST, truth_mean="arithmetic") if changed is sets else FAST
        with pytest.raises(ClueError, match=message):
            found.forget_quality(evaluate(model, tokenizer, changed, settings))
    with pytest.raises(ClueError, match="append_eos was True for one evaluation and False for the other"):
        found.forget_quality(replace(found, settings={**found.settings, "data": asdict(DataSettings(append_eos=False))}))
    plain = evaluate(model, tokenizer, replace(sets, forget=retain, utility=()), FAST)
    bare = evaluate(model, tokenizer, EvaluationSets(sets.forget_paraphrase, retain), FAST)
    assert bare.forget_quality(plain) is None and plain.forget_quality(bare) is None


def test_every_attack_by_its_definition(tokenizer, sets):
    model, other = tiny_model(tokenizer, 1), tiny_model(tokenizer, 5)
    settings = EvaluateSettings(batch_size=2, rouge=False, bootstrap=0, attacks="loss,zlib,min_k,min_k++,gradnorm")
    found = evaluate(model, tokenizer, sets, settings, reference=other)
    expected = {name: [] for name in ("loss", "zlib", "min_k", "min_k++", "gradnorm", "reference")}
    for records in (sets.forget, sets.holdout):
        side = {name: [] for name in expected}
        for example in encode(records, tokenizer):
            ids, start = torch.from_numpy(example.input_ids[None]), example.answer_start
            model.zero_grad()
            logits = model(ids).logits[0, start - 1:-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, start:])
            loss.backward()
            each = logits.detach().double().log_softmax(-1)
            p = each.gather(1, ids[0, start:, None])[:, 0].numpy()
            mu = (each.exp() * each).sum(1).numpy()
            variance = (each.exp() * each.square()).sum(1).numpy() - mu ** 2
            least = max(1, int(0.4 * len(p) + 1e-9))
            with torch.no_grad():
                theirs = other(ids).logits[0, start - 1:-1].double().log_softmax(-1).gather(1, ids[0, start:, None])
            side["loss"].append(p.mean())
            side["zlib"].append(p.mean() / len(zlib.compress(example.record.answer.encode())))
            side["min_k"].append(np.sort(p)[:least].mean())
            side["min_k++"].append(np.sort((p - mu) / np.sqrt(np.maximum(variance, 1e-6)))[:least].mean())
            side["gradnorm"].append(-sum(float(w.grad.square().sum()) for w in model.parameters()) ** 0.5)
            side["reference"].append(p.mean() - float(theirs.mean()))
        for name, values in side.items():
            expected[name].append(values)
    assert set(found.mia) == set(expected)
    assert 0.5 not in {attack.auc for attack in found.mia.values()}  # which a score turned around would give too
    for name, (members, others) in expected.items():
        assert found.mia[name].auc == pytest.approx(auc(members, others), abs=1e-12), name
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    np.testing.assert_allclose(gradient_score(model, encode(sets.forget, tokenizer), pad=0), expected["gradnorm"][0],
                               rtol=1e-4)
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_attacks_leave_the_end_token_out_where_it_does_not_count(model, tokenizer, forget, retain, holdout):
    settings = replace(FAST, rouge=False, bootstrap=0, count_eos=False, attacks="loss,min_k,gradnorm")
    found = evaluate(model, tokenizer, EvaluationSets(forget, retain, holdout=holdout), settings)
    sides = [encode(records, tokenizer, append_eos=False) for records in (forget, holdout)]
    scores = [score(model, side, pad=0, batch_size=1) for side in sides]
    assert found.mia["loss"].auc == auc(*map(loss_score, scores))
    assert found.mia["min_k"].auc == auc(*(min_k_score(s, settings.min_k) for s in scores))
    assert found.mia["gradnorm"].auc == auc(*(gradient_score(model, side, pad=0) for side in sides))


def test_a_text_of_one_word_keeps_its_end_token_in_every_attack(model, tokenizer, forget, retain):
    """Without it nothing would be left to score, and the record would be as sure a member as there can be."""
    word = read(["tea"], "word")
    settings = replace(FAST, rouge=False, bootstrap=0, count_eos=False, attacks="loss,min_k,gradnorm")
    found = evaluate(model, tokenizer, EvaluationSets(forget, retain, holdout=word), settings)
    side, alone = encode(forget, tokenizer, append_eos=False), encode(word, tokenizer)
    scores = [score(model, examples, pad=0, batch_size=1) for examples in (side, alone)]
    assert found.mia["loss"].auc == auc(*map(loss_score, scores))
    assert found.mia["min_k"].auc == auc(*(min_k_score(s, settings.min_k) for s in scores))
    assert found.mia["gradnorm"].auc == auc(*(gradient_score(model, examples, pad=0) for examples in (side, alone))) > 0


def test_members_take_the_forget_sets_place_in_attacks(model, tokenizer, forget, retain, holdout):
    found = evaluate(model, tokenizer, EvaluationSets(forget, retain, holdout=holdout, members=retain),
                     replace(FAST, rouge=False, bootstrap=0))
    members, others = (score(model, encode(records, tokenizer), pad=0, batch_size=1) for records in (retain, holdout))
    assert found.mia["loss"].members == len(retain)
    assert found.mia_auc == pytest.approx(auc(-nll(members), -nll(others)))


def test_what_must_stay_is_to_be_told_from_wrong_answers(model, tokenizer, forget, retain):
    kept = RecordSet("retain", tuple(replace(r, wrong=("lena",)) for r in retain))
    found = evaluate(model, tokenizer, EvaluationSets(forget, kept), replace(FAST, rouge=False))
    ratios = np.exp(found.records["retain"]["log_truth_ratio"])
    assert found.detail["retain"].truth_ratio == pytest.approx(np.maximum(0, 1 - ratios).mean())
    result = replace(found.detail["retain"], purpose="skill", accuracy=0.25, choice_accuracy=1.0)
    assert result.solved == 1.0 and replace(result, n=result.n + 1).solved == 0.25  # one has no options


def test_attacks_that_nobody_knows_and_a_harness_that_is_not_there_are_named(model, tokenizer, sets):
    with pytest.raises(ClueError, match="attacks: 'rumour' is unknown; known are loss, zlib"):
        evaluate(model, tokenizer, sets, replace(FAST, attacks="loss,rumour"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ClueError, match=r"install clue-unlearn\[lm-eval\]"):
            evaluate(model, tokenizer, sets, replace(FAST, harness="wmdp_bio"))
    with pytest.raises(ClueError, match="utility names the set facts"):
        replace(sets, utility=("facts",))

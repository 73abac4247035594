"""The whole document: its numbers, its JSON, its refusals, and that a model which knows the answers scores so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clue.config import DataSettings, EvaluateSettings
from clue.data.encoding import encode
from clue.data.records import RecordSet, read
from clue.errors import ClueError, ModelError, RecordError, RunError
from clue.evaluate import Evaluation, EvaluationSets, evaluate
from clue.evaluate.memorization import exact_match, nll, score
from clue.evaluate.privacy import auc

FAST = EvaluateSettings(batch_size=4, max_new_tokens=10, bootstrap=50)


@pytest.fixture
def sets(forget, retain, holdout):
    return EvaluationSets(forget, retain, forget_paraphrase=read([("mira live where", "in york")], "again"),
                          retain_extra={"retain_unseen": retain}, skills={"copy": read([("tea tea", "tea")], "copy")},
                          holdout=holdout)


def test_every_number_comes_from_the_right_set(model, tokenizer, sets, forget, retain, holdout):
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
    for name, result in small["detail"].items():
        for key, value in result.items():
            assert large["detail"][name][key] == pytest.approx(value, abs=1e-5) if isinstance(value, float) else True


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

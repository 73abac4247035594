"""Measuring a model: one teacher-forced pass, one batched generation, and every measure as a reduction over the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..config import DataSettings, EvaluateSettings, check, check_seed, listed
from ..data.encoding import encode, length_limit, pad_id
from ..errors import ModelError
from . import generation, memorization, privacy, truth
from .evaluation import Evaluation, EvaluationSets, Sample, SetResult, require_sets
from .harness import harness
from .privacy import Attack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example
    from ..data.records import Record, RecordSet
    from .memorization import TokenScores

#: Answers kept of each generated set, for people to read.
_SAMPLES = 6
T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    """The examples of one set: its records, and of those that have wrong answers the right and the wrong ones.

    ``asked`` int64 [m] are those records; ``owner`` int64 [wrong] says which of them (0..m-1) a wrong answer belongs to.
    """

    name: str
    purpose: str
    set: RecordSet
    records: list[Example]
    right: list[Example]
    wrong: list[Example]
    asked: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Scores:
    """What the teacher-forced pass said of a part."""

    records: TokenScores
    right: TokenScores
    wrong: TokenScores


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets,
             settings: EvaluateSettings | None = None, *, data: DataSettings | None = None, seed: int = 0,
             reference: PreTrainedModel | None = None, embed: generation.Embed | None = None) -> Evaluation:
    """Measure a causal language model on every set.

    One teacher-forced pass over all records and their wrong answers gives every measure but those of generated answers,
    which are made for the forget and retain sets and those in ``sets.utility`` (at most ``settings.rouge_limit`` records
    of each, evenly spaced over the set). The model is left as it was. Results do not depend on the batch size beyond
    rounding.

        sets = clue.evaluate.EvaluationSets(forget=clue.read("forget.jsonl", "forget"),
                                            retain=clue.read("unseen.jsonl", "retain"))
        print(clue.evaluate(model, tokenizer, sets).detail["forget"])

    Args:
        model, tokenizer: a Hugging Face causal LM and its tokenizer.
        sets: what to measure on (:class:`clue.evaluate.EvaluationSets`).
        settings: what is measured, and how; the defaults when None.
        data: how records become tokens, which must be how the model was taught; the defaults when None.
        seed: of the bootstrap, the only random part.
        reference: a model of the same tokenizer that was trained on neither forget nor holdout set, for the attack of
            that name.
        embed: embeds texts, to judge generated answers by meaning (:func:`clue.evaluate.generation.nearest`).

    Returns:
        The :class:`clue.evaluate.Evaluation`: each set's measures, the privacy attacks and what follows from them, to save and
        to compare.

    Raises:
        RecordError: a record cannot be used (names it).
        ModelError: the tokenizer belongs to another model, the model's probabilities are not numbers, or a batch does
            not fit into memory.
        ClueError: a setting is out of range.
    """
    import torch

    settings, data = settings or EvaluateSettings(), data or DataSettings()
    check(settings, EvaluateSettings)
    check(data, DataSettings)
    seed = check_seed(seed)
    require_sets(sets)
    sides = ("forget" if sets.members is None else "members", "holdout")
    attacks = listed(settings.attacks) if sets.holdout is not None else []
    pad = pad_id(tokenizer)
    max_length = length_limit(model, data.max_length)

    def encoded(records: Sequence[Record]) -> list[Example]:
        return encode(records, tokenizer, chat=data.chat, append_eos=data.append_eos, max_length=max_length)

    parts = [_part(name, purpose, records, encoded) for name, purpose, records in sets]
    examples = [example for part in parts for group in (part.records, part.right, part.wrong) for example in group]
    for network in (model, reference):
        if network is not None:
            _check_vocabulary(network, examples)
    generated = {part.name: _spread(part.records, settings.rouge_limit) for part in parts
                 if settings.rouge and (part.purpose in ("forget", "retain") or part.name in sets.utility)}
    try:
        found = memorization.score(model, examples, pad=pad, batch_size=settings.batch_size, moments="min_k++" in attacks)
        answers = generation.generate(model, tokenizer, [example for some in generated.values() for example in some],
                                      pad=pad, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
        base = None if reference is None or sets.holdout is None else memorization.score(
            reference, [e for p in parts if p.name in sides for e in p.records], pad=pad,
            batch_size=settings.batch_size)
    except torch.OutOfMemoryError:
        raise ModelError(f"a batch of {settings.batch_size} records does not fit into the device's memory: evaluate"
                         " with a smaller batch size") from None

    scores = _by_part(parts, found)
    spoken: dict[str, list[Sample]] = {}
    first = 0
    for name, some in generated.items():
        spoken[name] = [Sample(_question(example, tokenizer), _reference(example, tokenizer), answer)
                        for example, answer in zip(some, answers[first:first + len(some)], strict=True)]
        first += len(some)

    ended = data.append_eos
    detail: dict[str, SetResult] = {}
    records: dict[str, dict[str, tuple[float | None, ...]]] = {}
    for part in parts:
        detail[part.name], records[part.name] = _known(part, scores[part.name], settings, ended)
        if part.name in generated:
            said, recall = _spoken(spoken[part.name], [e.record for e in generated[part.name]], embed)
            detail[part.name] = replace(detail[part.name], **said)
            records[part.name]["rouge_l"] = recall
    mia = {}
    if sets.holdout is not None:
        both = [part for part in parts if part.name in sides]
        mia = _attacks(model, both, {part.name: scores[part.name].records for part in both}, base, attacks, settings, ended,
                       pad=pad, seed=seed)
    tasks = listed(settings.harness)
    accuracies = harness(model, tokenizer, tasks, batch_size=settings.batch_size, seed=seed) if tasks else {}
    return Evaluation(detail, mia, {name: tuple(_spread(some, _SAMPLES)) for name, some in spoken.items()},
                      {"evaluate": asdict(settings), "data": asdict(data), "seed": seed,
                       "dtype": str(model.dtype).removeprefix("torch.")}, records, sets.utility,
                      accuracies)


def _part(name: str, purpose: str, records: RecordSet, encoded: Any) -> _Part:
    asked = [i for i, record in enumerate(records) if record.wrong]
    right, wrong, owner = [], [], []
    for j, i in enumerate(asked):
        record = records.records[i]
        right.append(replace(record, answer=record.paraphrased or record.answer))
        wrong += [replace(record, answer=answer) for answer in record.wrong]
        owner += [j] * len(record.wrong)
    return _Part(name, purpose, records, encoded(records), encoded(right), encoded(wrong),
                 np.array(asked, dtype=np.int64), np.array(owner, dtype=np.int64))


def _by_part(parts: Sequence[_Part], scores: TokenScores) -> dict[str, _Scores]:
    found, first = {}, 0
    for part in parts:
        ends = np.cumsum([first, len(part.records), len(part.right), len(part.wrong)]).tolist()
        found[part.name] = _Scores(*(scores.records(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)))
        first = ends[-1]
    return found


def _known(part: _Part, found: _Scores, settings: EvaluateSettings,
           ended: bool) -> tuple[SetResult, dict[str, tuple[float | None, ...]]]:
    """What the teacher-forced pass says of a set, and per record."""
    bare = ended and not settings.count_eos
    scores, right, wrong = (s.without_last() if bare and len(s) else s for s in (found.records, found.right, found.wrong))
    per = {"nll": memorization.nll(scores), "tokens": scores.length,
           "accuracy": memorization.exact_match(scores).astype(np.int64),
           "token_accuracy": memorization.token_accuracy(scores),
           "extraction_strength": memorization.extraction_strength(scores, least=settings.extraction_least)}
    truths: dict[str, Any] = {}
    if len(part.asked):
        ratio = per["log_truth_ratio"] = truth.log_truth_ratio(right, wrong, part.owner, settings.truth_mean)
        # Options are compared without the end token, as every harness does, and in the record's own words.
        options = [s.without_last() if ended else s for s in (found.records.select(part.asked), found.wrong)]
        sizes = tuple(np.array([len(e.record.answer.encode("utf-8", "replace")) for e in some], dtype=float)
                      for some in ([part.records[i] for i in part.asked], part.wrong))
        truths = {
            "truth_n": len(part.asked),
            "truth_ratio": float((truth.indistinct if part.purpose == "forget" else truth.truthful)(ratio).mean()),
            "choice_accuracy": float(truth.choice(options[0], options[1], part.owner, settings.choice_score,
                                                  (sizes[0], sizes[1])).mean()),
            "choice_probability": float(truth.choice_probability(scores.select(part.asked), wrong, part.owner).mean()),
        }
    result = SetResult(
        purpose=part.purpose, name=part.set.name, n=len(part.set), sha256=part.set.sha256,
        accuracy=float(per["accuracy"].mean()), token_accuracy=float(per["token_accuracy"].mean()),
        nll=float(per["nll"].mean()), extraction_strength=float(per["extraction_strength"].mean()),
        probability=float(memorization.probability(scores).mean()), perplexity=memorization.perplexity(scores), **truths)
    return result, {name: tuple(values.tolist()) for name, values in per.items()}


def _spoken(said: Sequence[Sample], records: Sequence[Record],
            embed: generation.Embed | None) -> tuple[dict[str, Any], tuple[float | None, ...]]:
    """What the generated answers of a set say, and the ROUGE-L recall of each."""
    true, answers = [s.answer for s in said], [s.generated for s in said]
    recall = generation.rouge_l_recall(true, answers)
    known = recall[~np.isnan(recall)]
    found: dict[str, Any] = {
        "rouge_l": float(known.mean()) if len(known) else None, "rouge_n": len(known),
        "contained": float(generation.contains(true, answers).mean()),
        "matched": float(generation.equals(true, answers).mean())}
    judged = [i for i, record in enumerate(records) if record.wrong]
    if embed is not None and judged:
        near = generation.nearest([answers[i] for i in judged], [records[i].paraphrased or true[i] for i in judged],
                                  [records[i].wrong for i in judged], embed)
        found["nearest"] = float(near.mean())
    return found, tuple(None if np.isnan(value) else float(value) for value in recall)


def _attacks(model: PreTrainedModel, sides: Sequence[_Part], found: Mapping[str, TokenScores], base: TokenScores | None,
             names: Sequence[str], settings: EvaluateSettings, ended: bool, *, pad: int, seed: int) -> dict[str, Attack]:
    """Every attack by name; ``sides`` are the members and the holdout set."""
    bare = ended and not settings.count_eos
    scores = [found[part.name].without_last() if bare else found[part.name] for part in sides]
    values: dict[str, list[npt.NDArray[np.float64]]] = {}
    for name in names:
        if name == "loss":
            values[name] = [privacy.loss_score(s) for s in scores]
        elif name == "zlib":
            values[name] = [privacy.zlib_score(s, [r.answer for r in part.set])
                            for s, part in zip(scores, sides, strict=True)]
        elif name == "min_k":
            values[name] = [privacy.min_k_score(s, settings.min_k) for s in scores]
        elif name == "min_k++":
            values[name] = [privacy.min_k_plus_score(s, settings.min_k) for s in scores]
        else:
            values[name] = [privacy.gradient_score(model, [_bare(e) for e in part.records] if bare else part.records, pad=pad)
                            for part in sides]
    if base is not None:
        split = len(sides[0].records)
        theirs = [base.records(0, split), base.records(split, len(base))]
        values["reference"] = [privacy.reference_score(s, other.without_last() if bare else other)
                               for s, other in zip(scores, theirs, strict=True)]
    return {name: privacy.attack(members, others, resamples=settings.bootstrap, seed=seed)
            for name, (members, others) in values.items()}


def _bare(example: Example) -> Example:
    """Without the token that ends it, which a record of one scored token keeps, as in :meth:`TokenScores.without_last`."""
    scored = len(example.input_ids) - max(example.answer_start, 1)
    return replace(example, input_ids=example.input_ids[:-1]) if scored > 1 else example


def _question(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a generated answer goes on from, as people know it: without chat template and special tokens."""
    if example.record.prompt:
        return example.record.prompt
    tokens = example.input_ids[:generation.prompt_length(example)]
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _reference(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a generated answer is compared with: the answer, or of plain text the second half."""
    if example.record.prompt:
        return example.record.answer
    tokens = example.input_ids[generation.prompt_length(example):]
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _spread(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` items (0: all), evenly spaced and always the same ones."""
    if not limit or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _check_vocabulary(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    for example in examples:
        largest = int(example.input_ids.max())
        if largest >= size:
            raise ModelError(f"the tokenizer gives token {largest}, the model knows {size} tokens: load the tokenizer"
                             " that belongs to this model")

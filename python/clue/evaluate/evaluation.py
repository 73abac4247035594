"""Evaluation: everything measured on one model, as a document that saves, reloads and compares."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DataSettings, EvaluateSettings
from ..data.atomic import write_atomically
from ..data.encoding import encode, length_limit, pad_id
from ..errors import ClueError, ModelError, RecordError, RunError
from . import memorization
from .generation import generate, prompt_length, rouge_l_recall
from .privacy import Attack, attack, loss_score, min_k_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example
    from ..data.records import RecordSet

FORMAT = 1
#: Answers kept of each generated set, for people to read.
_SAMPLES = 6


@dataclass(frozen=True)
class EvaluationSets:
    """The record sets a model is measured on.

    Attributes:
        forget: what must be forgotten; the members of the privacy attacks.
        retain: what must stay; the headline. Most honest where unlearning was never shown these records.
        forget_paraphrase: the same facts as ``forget``, asked in words never trained on.
        retain_extra: more of what must stay, by name.
        skills: general skills that must stay, by name.
        holdout: the same kind of records, never trained on; the non-members of the privacy attacks.
    """

    forget: RecordSet
    retain: RecordSet
    forget_paraphrase: RecordSet | None = None
    retain_extra: Mapping[str, RecordSet] = field(default_factory=dict)
    skills: Mapping[str, RecordSet] = field(default_factory=dict)
    holdout: RecordSet | None = None

    def __post_init__(self) -> None:
        names = [name for name, _, _ in self]
        for name in names:
            if names.count(name) > 1:
                raise ClueError(f"two evaluation sets are called {name}: give one of them another name")
        for name, _, records in self:
            if not len(records):
                raise RecordError(f"the evaluation set {name} is empty: give it at least one record, or leave it out")

    def __iter__(self) -> Iterator[tuple[str, str, RecordSet]]:
        """(name, purpose, records) of every set; purpose is forget, retain, skill or holdout."""
        yield "forget", "forget", self.forget
        if self.forget_paraphrase is not None:
            yield "forget_paraphrase", "forget", self.forget_paraphrase
        yield "retain", "retain", self.retain
        yield from ((name, "retain", records) for name, records in self.retain_extra.items())
        yield from ((name, "skill", records) for name, records in self.skills.items())
        if self.holdout is not None:
            yield "holdout", "holdout", self.holdout


@dataclass(frozen=True)
class SetResult:
    """What a model knows of one record set: means over its records, each defined in :mod:`.memorization`.

    Attributes:
        purpose: ``forget`` (lower is better), ``retain``, ``skill`` (higher is better) or ``holdout`` (for comparison).
        name: the record set's own name, where it was used under another one.
        n: number of records.
        sha256: hash of the set's contents, so that two evaluations can be known to have used the same records.
        accuracy: exact match: share of records whose every answer token is the model's first choice.
        token_accuracy: share of answer tokens that are the first choice (exact memorization).
        probability: length-normalised probability of the answer.
        nll: mean cross-entropy per answer token, in nats.
        extraction_strength: share of the answer that greedy decoding completes verbatim.
        rouge_l: ROUGE-L recall of greedy answers; None for skills and the holdout set, when generation is turned off,
            and where no reference has a word that rouge-score knows.
        rouge_n: number of records behind ``rouge_l``.
    """

    purpose: str
    name: str
    n: int
    sha256: str
    accuracy: float
    token_accuracy: float
    probability: float
    nll: float
    extraction_strength: float
    rouge_l: float | None = None
    rouge_n: int = 0


@dataclass(frozen=True)
class Sample:
    """One greedy answer, kept for people to read."""

    prompt: str
    answer: str
    generated: str


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one model.

    Attributes:
        detail: one result per record set, ``forget`` and ``retain`` always among them.
        mia: attacks by name, ``loss`` and ``min_k``; empty without a holdout set.
        samples: a few greedy answers per set; empty when generation was turned off.
        settings: what the numbers depend on besides model and records: settings, seed, dtype of the weights.
    """

    detail: Mapping[str, SetResult]
    mia: Mapping[str, Attack] = field(default_factory=dict)
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forget(self) -> float:
        """Exact-match accuracy on the forget set."""
        return self.detail["forget"].accuracy

    @property
    def forget_paraphrase(self) -> float | None:
        """Exact-match accuracy on the paraphrased forget set; None without one."""
        result = self.detail.get("forget_paraphrase")
        return None if result is None else result.accuracy

    @property
    def retain(self) -> float:
        """Exact-match accuracy on the (headline) retain set."""
        return self.detail["retain"].accuracy

    @property
    def skills(self) -> dict[str, float]:
        """Exact-match accuracy of every skill."""
        return {name: result.accuracy for name, result in self.detail.items() if result.purpose == "skill"}

    @property
    def mia_auc(self) -> float | None:
        """AUC of the loss attack, 0.5 is ideal; None without a holdout set."""
        return self.mia["loss"].auc if "loss" in self.mia else None

    def to_json(self) -> dict[str, Any]:
        """Plain values: the headline numbers first, then everything behind them."""
        return {
            "format": FORMAT,
            "forget": self.forget,
            "forget_paraphrase": self.forget_paraphrase,
            "retain": self.retain,
            "skills": self.skills,
            "mia_auc": self.mia_auc,
            "detail": {name: asdict(result) for name, result in self.detail.items()},
            "mia": {name: found.to_json() for name, found in self.mia.items()},
            "samples": {name: [asdict(sample) for sample in some] for name, some in self.samples.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError for anything else."""
        evaluation = cls(
            {name: SetResult(**result) for name, result in document["detail"].items()},
            {name: Attack.from_json(found) for name, found in document["mia"].items()},
            {name: tuple(Sample(**sample) for sample in some) for name, some in document["samples"].items()},
            document["settings"],
        )
        _ = evaluation.forget, evaluation.retain
        return evaluation

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(path, text.encode("utf-8", "replace"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote. Raises :class:`RunError` for a file that is missing or damaged."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise RunError(f"{path} has format {document['format']}, this version reads {FORMAT}: make it again"
                               " with `clue evaluate`")
            return cls.from_json(document)
        except FileNotFoundError:
            raise RunError(f"{path} does not exist: make it with `clue evaluate`") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not an evaluation ({error!r}): make it again with `clue evaluate`") from None


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets,
             settings: EvaluateSettings | None = None, *, data: DataSettings | None = None,
             seed: int = 0) -> Evaluation:
    """Measure a causal language model on every set.

    One teacher-forced pass over all records gives every measure but ROUGE-L, which generates greedy answers for the
    forget and retain sets (at most ``settings.rouge_limit`` records of each, evenly spaced over the set). The model is
    left as it was. Results do not depend on the batch size beyond rounding.

    Args:
        seed: of the bootstrap, the only random part.

    Raises:
        RecordError: a record cannot be used (names it).
        ModelError: the tokenizer belongs to another model, the model's probabilities are not numbers, or a batch does
            not fit into memory.
    """
    import torch

    settings, data = settings or EvaluateSettings(), data or DataSettings()
    pad = pad_id(tokenizer)
    max_length = length_limit(model, data.max_length)
    encoded = {name: encode(records, tokenizer, chat=data.chat, append_eos=data.append_eos, max_length=max_length)
               for name, _, records in sets}
    examples = [example for some in encoded.values() for example in some]
    _check_vocabulary(model, examples)
    generated = {name: _spread(some, settings.rouge_limit) for name, some in encoded.items()
                 if settings.rouge and name != "holdout" and name not in sets.skills}
    try:
        scores = memorization.score(model, examples, pad=pad, batch_size=settings.batch_size)
        answers = generate(model, tokenizer, [example for some in generated.values() for example in some], pad=pad,
                           batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
    except torch.OutOfMemoryError:
        raise ModelError(f"a batch of {settings.batch_size} records does not fit into the device's memory: evaluate"
                         " with a smaller batch size") from None

    parts: dict[str, memorization.TokenScores] = {}
    first = 0
    for name, some in encoded.items():
        parts[name] = scores.records(first, first + len(some))
        first += len(some)
    spoken: dict[str, list[Sample]] = {}
    first = 0
    for name, some in generated.items():
        spoken[name] = [Sample(_question(example, tokenizer), _reference(example, tokenizer), answer)
                        for example, answer in zip(some, answers[first:first + len(some)], strict=True)]
        first += len(some)

    detail = {name: _result(purpose, records, parts[name], spoken.get(name, []))
              for name, purpose, records in sets}
    mia: dict[str, Attack] = {}
    if sets.holdout is not None:
        members, others = parts["forget"], parts["holdout"]
        mia["loss"] = attack(loss_score(members), loss_score(others), resamples=settings.bootstrap, seed=seed)
        mia["min_k"] = attack(min_k_score(members, settings.min_k), min_k_score(others, settings.min_k),
                              resamples=settings.bootstrap, seed=seed)
    return Evaluation(detail, mia, {name: tuple(_spread(some, _SAMPLES)) for name, some in spoken.items()},
                      {"evaluate": asdict(settings), "data": asdict(data), "seed": seed,
                       "dtype": str(model.dtype).removeprefix("torch.")})


def privleak(evaluation: Evaluation, gold: Evaluation, name: str = "min_k") -> float | None:
    """How far the attack's AUC is from a retrained model's, in percent; 0 is ideal.

    ((1 - A) - (1 - A_r)) / (1 - A_r) * 100 with A the AUC of this model and A_r that of one retrained without the
    forget set (MUSE, Shi et al., ICLR 2025, arXiv 2407.06460, with AUC 1.0 = members recognised). Negative: members
    still stand out; positive: they were pushed below records the model never saw. None where either evaluation lacks
    the attack or the retrained model gives every member away (A_r = 1).
    """
    if name not in evaluation.mia or name not in gold.mia or gold.mia[name].auc == 1.0:
        return None
    a, a_r = evaluation.mia[name].auc, gold.mia[name].auc
    return ((1 - a) - (1 - a_r)) / (1 - a_r) * 100


def _result(purpose: str, records: RecordSet, scores: memorization.TokenScores, spoken: list[Sample]) -> SetResult:
    recall = rouge_l_recall([s.answer for s in spoken], [s.generated for s in spoken]) if spoken else np.empty(0)
    counted = recall[~np.isnan(recall)]
    return SetResult(
        purpose=purpose, name=records.name, n=len(records), sha256=records.sha256,
        accuracy=float(memorization.exact_match(scores).mean()),
        token_accuracy=float(memorization.token_accuracy(scores).mean()),
        probability=float(memorization.probability(scores).mean()),
        nll=float(memorization.nll(scores).mean()),
        extraction_strength=float(memorization.extraction_strength(scores).mean()),
        rouge_l=float(counted.mean()) if len(counted) else None, rouge_n=len(counted),
    )


def _question(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a generated answer goes on from, as people know it: without chat template and special tokens."""
    if example.record.prompt:
        return example.record.prompt
    tokens = example.input_ids[:prompt_length(example)]
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _reference(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text a generated answer is compared with: the answer, or of plain text the second half."""
    if example.record.prompt:
        return example.record.answer
    tokens = example.input_ids[prompt_length(example):]
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` items (0: all), evenly spaced and always the same ones."""
    if not limit or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _check_vocabulary(model: PreTrainedModel, examples: list[Example]) -> None:
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    for example in examples:
        largest = int(example.input_ids.max())
        if largest >= size:
            raise ModelError(f"the tokenizer gives token {largest}, the model knows {size} tokens: load the tokenizer"
                             " that belongs to this model")

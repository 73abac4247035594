"""The document of an evaluation: everything measured on one model; it saves, reloads and compares.

:mod:`.measure` makes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataSettings
from ..data.atomic import write_atomically
from ..data.records import RecordSet
from ..errors import ClueError, RecordError, RunError
from .privacy import Attack
from .truth import forget_quality, model_utility

if TYPE_CHECKING:
    from ..data.benchmarks import Benchmark

FORMAT = 2


@dataclass(frozen=True)
class EvaluationSets:
    """The record sets a model is measured on.

    Attributes:
        forget: what must be forgotten; the members of the privacy attacks, unless ``members`` are.
        retain: what must stay; the headline. Most honest where unlearning was never shown these records.
        forget_paraphrase: the same facts as ``forget``, asked in words never trained on.
        retain_extra: more of what must stay, by name.
        skills: general skills that must stay, by name.
        holdout: the same kind of records, never trained on; the non-members of the privacy attacks.
        forget_extra: more of what must be forgotten, by name.
        members: records that were trained on and must be forgotten, in the form of ``holdout``'s (texts, say, where the
            forget set is questions).
        utility: names of the sets behind :func:`clue.evaluate.truth.model_utility`, ``retain`` among them.
    """

    forget: RecordSet
    retain: RecordSet
    forget_paraphrase: RecordSet | None = None
    retain_extra: Mapping[str, RecordSet] = field(default_factory=dict)
    skills: Mapping[str, RecordSet] = field(default_factory=dict)
    holdout: RecordSet | None = None
    forget_extra: Mapping[str, RecordSet] = field(default_factory=dict)
    members: RecordSet | None = None
    utility: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, _, records in self:
            if not isinstance(records, RecordSet):
                raise ClueError(f"the evaluation set {name} must be a RecordSet, which clue.read(source) makes, got a"
                                f" {type(records).__name__}; more retain sets go into retain_extra, by name")
        names = [name for name, _, _ in self]
        for name in self.utility:
            if name not in names:
                raise ClueError(f"utility names the set {name}, which is not among {', '.join(names)}")
        for name in names:
            if names.count(name) > 1:
                raise ClueError(f"two evaluation sets are called {name}: give one of them another name")
        for name, _, records in self:
            if not len(records):
                raise RecordError(f"the evaluation set {name} is empty: give it at least one record, or leave it out")

    def __iter__(self) -> Iterator[tuple[str, str, RecordSet]]:
        """(name, purpose, records) of every set; purpose is forget, retain, skill, member or holdout."""
        yield "forget", "forget", self.forget
        if self.forget_paraphrase is not None:
            yield "forget_paraphrase", "forget", self.forget_paraphrase
        yield from ((name, "forget", records) for name, records in self.forget_extra.items())
        yield "retain", "retain", self.retain
        yield from ((name, "retain", records) for name, records in self.retain_extra.items())
        yield from ((name, "skill", records) for name, records in self.skills.items())
        if self.members is not None:
            yield "members", "member", self.members
        if self.holdout is not None:
            yield "holdout", "holdout", self.holdout

    @classmethod
    def of(cls, benchmark: Benchmark, *, forget: RecordSet | None = None,
           retain: RecordSet | None = None) -> EvaluationSets:
        """The sets of a benchmark; ``forget`` and ``retain`` stand in where it has none.

        Raises:
            ClueError: it lacks one of the two, and nothing stands in.
        """
        kept = dict(benchmark.retain)
        headline = kept.pop(next(iter(kept))) if kept else retain
        forget = benchmark.forget or forget
        if forget is None or headline is None:
            raise ClueError(f"the benchmark {benchmark.name} has no {'forget' if forget is None else 'retain'} set of its own:"
                            " give one")
        return cls(forget, headline, benchmark.forget_paraphrase, kept, benchmark.skills, benchmark.holdout,
                   benchmark.forget_extra, benchmark.members, benchmark.utility)


def require_sets(sets: Any) -> None:
    """Raise :class:`ClueError` unless these are evaluation sets."""
    if not isinstance(sets, EvaluationSets):
        raise ClueError(f"the sets to evaluate on must be clue.evaluate.EvaluationSets(forget=..., retain=...), got a"
                        f" {type(sets).__name__}")


@dataclass(frozen=True)
class SetResult:
    """What a model knows of one record set: means over its records, each defined in :mod:`.memorization`,
    :mod:`.generation` or :mod:`.truth`.

    Attributes:
        purpose: ``forget`` (lower is better), ``retain``, ``skill`` (higher is better), ``member`` or ``holdout`` (for
            comparison).
        name: the record set's own name, where it was used under another one.
        n: number of records.
        sha256: hash of the set's contents, so that two evaluations can be known to have used the same records.
        accuracy: exact match: share of records whose every answer token is the model's first choice.
        token_accuracy: share of answer tokens that are the first choice (exact memorization).
        probability: length-normalised probability of the answer.
        nll: mean cross-entropy per answer token, in nats, averaged over records.
        extraction_strength: share of the answer that greedy decoding completes verbatim.
        perplexity: exp of the cross-entropy per answer token, all tokens of the set together.
        rouge_l: ROUGE-L recall of greedy answers; None for the holdout set and for skills that are not in ``utility``,
            when generation is turned off, and where no reference has a word that rouge-score knows.
        rouge_n: number of records behind ``rouge_l``.
        contained: share of greedy answers that contain the true one.
        matched: share of greedy answers that are the true one, whatever the case.
        nearest: share of greedy answers whose embedding is nearest to the true one; None without an embedding.
        truth_n: number of records with wrong answers, behind the three below; None where there are none.
        truth_ratio: on a forget set mean min(R, 1/R), where *higher* is better; else mean max(0, 1 - R), higher too.
        choice_accuracy: share of records whose answer the model prefers to every wrong one.
        choice_probability: mean share of the answer in the probabilities of all options.
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
    perplexity: float | None = None
    rouge_l: float | None = None
    rouge_n: int = 0
    contained: float | None = None
    matched: float | None = None
    nearest: float | None = None
    truth_n: int = 0
    truth_ratio: float | None = None
    choice_accuracy: float | None = None
    choice_probability: float | None = None

    @property
    def solved(self) -> float:
        """Share of records that were answered well: multiple choice where every record of a skill has wrong answers to choose
        from (nobody asks whether a model ends its answer after the letter), else exact match."""
        if self.purpose == "skill" and self.truth_n == self.n and self.choice_accuracy is not None:
            return self.choice_accuracy
        return self.accuracy


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
        mia: attacks by name (:data:`clue.config.ATTACKS`, ``reference``); empty without a holdout set.
        samples: a few greedy answers per set; empty when generation was turned off.
        settings: what the numbers depend on besides model and records: settings, among them the variant of every
            measure, seed, dtype of the weights.
        records: per set and statistic one number per record, in order, so that another evaluation can be compared with
            this one later: ``nll``, ``tokens``, ``accuracy``, ``token_accuracy``, ``extraction_strength``, and where they
            were measured ``log_truth_ratio`` (records with wrong answers alone) and ``rouge_l`` (those generated for, None
            where the reference has no word).
        utility: the sets behind :attr:`model_utility`.
        harness: accuracy per task of lm-evaluation-harness (:mod:`.harness`).
    """

    detail: Mapping[str, SetResult]
    mia: Mapping[str, Attack] = field(default_factory=dict)
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, tuple[float | None, ...]]] = field(default_factory=dict)
    utility: tuple[str, ...] = ()
    harness: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        from ..report.svg import percent  # here: reports import evaluations

        said = [f"{name} {percent(self.detail[name].accuracy)}" for name in ("forget", "retain") if name in self.detail]
        if self.mia_auc is not None:
            said.append(f"loss AUC {self.mia_auc:.2f}")
        return f"<Evaluation: {', '.join(said)}>"

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
        """Accuracy of every skill (:attr:`SetResult.solved`)."""
        return {name: result.solved for name, result in self.detail.items() if result.purpose == "skill"}

    @property
    def mia_auc(self) -> float | None:
        """AUC of the loss attack, 0.5 is ideal; None without a holdout set."""
        return self.mia["loss"].auc if "loss" in self.mia else None

    @property
    def model_utility(self) -> float | None:
        """TOFU's model utility, higher is better; None where it was not measured."""
        return model_utility(self)

    def forget_quality(self, gold: Evaluation) -> float | None:
        """TOFU's forget quality against a model retrained without the forget set; None where it is not available."""
        return forget_quality(self, gold)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the headline numbers first, then everything behind them."""
        return {
            "format": FORMAT,
            "forget": self.forget,
            "forget_paraphrase": self.forget_paraphrase,
            "retain": self.retain,
            "skills": self.skills,
            "mia_auc": self.mia_auc,
            "model_utility": self.model_utility,
            "detail": {name: asdict(result) for name, result in self.detail.items()},
            "mia": {name: found.to_json() for name, found in self.mia.items()},
            "samples": {name: [asdict(sample) for sample in some] for name, some in self.samples.items()},
            "settings": dict(self.settings),
            "utility": list(self.utility),
            "harness": dict(self.harness),
            "records": {name: {key: list(values) for key, values in found.items()}
                        for name, found in self.records.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError for anything else."""
        evaluation = cls(
            {name: SetResult(**result) for name, result in document["detail"].items()},
            {name: Attack.from_json(found) for name, found in document["mia"].items()},
            {name: tuple(Sample(**sample) for sample in some) for name, some in document["samples"].items()},
            document["settings"],
            {name: {key: tuple(values) for key, values in found.items()} for name, found in document["records"].items()},
            tuple(document["utility"]), document["harness"],
        )
        _ = evaluation.forget, evaluation.retain
        return evaluation

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        text = _text(self.to_json(), 3) + "\n"
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


def _text(value: Any, depth: int, indent: str = "") -> str:
    """JSON with a line per entry down to ``depth``; what is deeper, the numbers per record above all, stays on its line."""
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(key, ensure_ascii=False)}: {_text(v, depth - 1, inner)}" for key, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def difference(evaluation: Evaluation, gold: Evaluation, sets: Sequence[str], settings: Sequence[str]) -> str:
    """Why two evaluations cannot be compared on some sets, where these settings decide, and what to do; empty where they can.
    How records become tokens always decides."""
    for name in sets:
        one, other = (e.detail[name].sha256 if name in e.detail else "" for e in (evaluation, gold))
        if one != other:
            return f"the two evaluations were measured on different {name} sets: evaluate both on the same records"
    for group, name in (*(("evaluate", name) for name in settings), *(("data", f.name) for f in fields(DataSettings))):
        mine, theirs = (e.settings.get(group, {}).get(name) for e in (evaluation, gold))
        if mine != theirs:
            return f"{name} was {mine} for one evaluation and {theirs} for the other: evaluate both with the same settings"
    return ""


def privleak(evaluation: Evaluation, gold: Evaluation, name: str = "min_k") -> float | None:
    """How far the attack's AUC is from a retrained model's, in percent; 0 is ideal.

    ((1 - A) - (1 - A_r)) / (1 - A_r) * 100 with A the AUC of this model and A_r that of one retrained without the
    forget set (MUSE, Shi et al., ICLR 2025, arXiv 2407.06460, with AUC 1.0 = members recognised). Negative: members
    still stand out; positive: they were pushed below records the model never saw. None where either evaluation lacks
    the attack, the two are of other records or settings, or the retrained model gives every member away (A_r = 1).
    """
    if name not in evaluation.mia or name not in gold.mia or gold.mia[name].auc == 1.0:
        return None
    members = "members" if "members" in evaluation.detail else "forget"
    if difference(evaluation, gold, (members, "holdout"), ("count_eos", *(["min_k"] if name.startswith("min_k") else []))):
        return None
    a, a_r = evaluation.mia[name].auc, gold.mia[name].auc
    return ((1 - a) - (1 - a_r)) / (1 - a_r) * 100

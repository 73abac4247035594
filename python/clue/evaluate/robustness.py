"""Robustness: does what was forgotten come back? Five ways to try, each on a copy of the model.

- relearning: a few steps of plain fine-tuning on a part of the forget set; the rest of it is measured (Lynch et al., 2024,
  arXiv 2402.16835; Hu et al., ICLR 2025, arXiv 2406.13356).
- drift: many steps of benign fine-tuning on what must stay.
- quantization: weights rounded to 8 and 4 bits (Zhang et al., ICLR 2025, arXiv 2410.16454).
- prompts: the forget set asked in other words (and languages, where there are such sets), behind an injected instruction,
  and after other forgotten records as hints (Patil et al., ICLR 2024, arXiv 2309.17410; Lynch et al., 2024).

:func:`stress` does all of it. Higher is worse throughout: it is what the model gives back.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DataSettings, RobustnessSettings, check, check_seed
from ..data.atomic import write_atomically
from ..data.encoding import IGNORED, batches, encode, length_limit, pad_id
from ..errors import ClueError, RunError
from ..model.answers import answer_logits
from .evaluation import EvaluationSets, require_sets
from .memorization import exact_match, probability, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.encoding import Example
    from ..data.records import Record, RecordSet

FORMAT = 1

#: Subject, where a record names one, and answer.
Fact = tuple[str | None, str]


@dataclass(frozen=True)
class Recall:
    """What a model gives back of a record set: exact match and length-normalised probability, means over records."""

    accuracy: float
    probability: float


@dataclass(frozen=True)
class Curve:
    """Recall of some record sets along one axis.

    Attributes:
        x_label: what ``x`` counts, with its unit.
        x: the points, in the order they were measured.
        lines: per set one :class:`Recall` for each point; the first set is the one the curve is about.
    """

    x_label: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[Recall, ...]]


@dataclass(frozen=True)
class Robustness:
    """Everything tried on one model.

    Attributes:
        curves: ``relearning``, ``drift`` and ``quantization``.
        prompts: recall of the forget set per way of asking, ``as trained`` first.
        settings: what the numbers depend on besides model and records.
    """

    curves: Mapping[str, Curve]
    prompts: Mapping[str, Recall]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, "curves": {name: {**asdict(curve), "x": list(curve.x), "lines": {
                    line: [asdict(r) for r in found] for line, found in curve.lines.items()}}
                    for name, curve in self.curves.items()},
                "prompts": {name: asdict(found) for name, found in self.prompts.items()}, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Robustness:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError for anything else."""
        curves = {name: Curve(c["x_label"], tuple(c["x"]), {line: tuple(Recall(**r) for r in found)
                                                            for line, found in c["lines"].items()})
                  for name, c in document["curves"].items()}
        return cls(curves, {name: Recall(**r) for name, r in document["prompts"].items()}, document["settings"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Robustness:
        """Read what :meth:`save` wrote. Raises :class:`RunError` for a file that is missing or damaged."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise KeyError("format")
            return cls.from_json(document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not a robustness document of this version ({error!r}): make it again with"
                           " `clue evaluate --robustness`") from None


def stress(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets,
           settings: RobustnessSettings | None = None, *, data: DataSettings | None = None, seed: int = 0) -> Robustness:
    """Try everything on one model, which is left as it was; needs memory for a copy of it and an optimizer.

    Args:
        seed: of which forget records are shown in relearning, and of the order of training batches.

    Raises:
        RecordError: a record cannot be used (names it).
        ClueError: a setting is out of range, or a forget set of one record is to be split.
    """
    settings, data = settings or RobustnessSettings(), data or DataSettings()
    check(settings, RobustnessSettings)
    check(data, DataSettings)
    seed = check_seed(seed)
    require_sets(sets)
    return Robustness(
        {"relearning": relearn(model, tokenizer, sets, settings, data=data, seed=seed),
         "drift": drift(model, tokenizer, sets, settings, data=data, seed=seed),
         "quantization": round_trip(model, tokenizer, sets, settings, data=data)},
        ask_otherwise(model, tokenizer, sets, settings, data=data),
        {"robustness": asdict(settings), "data": asdict(data), "seed": seed, "dtype": str(model.dtype).removeprefix("torch.")})


def stand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets, settings: RobustnessSettings,
          *, data: DataSettings, seed: int) -> dict[str, float]:
    """What is given back after relearning and after quantization, as numbers for a comparison.

    Returns:
        ``relearned.accuracy`` and ``relearned.probability``, of the forget records that relearning was not shown, after its
        last step; ``int4.accuracy``, ``int4.probability`` and ``int4.retain`` (an accuracy), and those of ``int8``.
    """
    last = relearn(model, tokenizer, sets, replace(settings, curve_points=1), data=data, seed=seed)
    back = last.lines["forget, not shown"][-1]
    found = {"relearned.accuracy": back.accuracy, "relearned.probability": back.probability}
    rounded = round_trip(model, tokenizer, sets, settings, data=data)
    for bits, forget, retain in zip(rounded.x, rounded.lines["forget"], rounded.lines["retain"], strict=True):
        if bits <= 8:
            name = f"int{bits:.0f}"
            found |= {f"{name}.accuracy": forget.accuracy, f"{name}.probability": forget.probability,
                      f"{name}.retain": retain.accuracy}
    return found


def relearn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets, settings: RobustnessSettings,
            *, data: DataSettings, seed: int) -> Curve:
    """Fine-tune a copy on a share of the forget set; recall of the rest (``not shown``), of the share, and of retain.

    Facts are drawn, not records: one in other words is shown with it. Otherwise what is given back would be what was taught.
    """
    facts = _facts(sets.forget)
    units = list(dict.fromkeys(facts))
    if len(units) < 2:
        raise ClueError("relearning shows a part of the forget set and measures the rest, and all its records have one answer:"
                        " give records of other facts")
    sizes = Counter(facts)
    wanted = max(1, round(settings.relearn_share * len(facts)))
    drawn: set[Fact] = set()
    for i in np.random.default_rng(seed).permutation(len(units)).tolist():
        if sum(sizes[unit] for unit in drawn) >= wanted:
            break
        drawn.add(units[i])
    if len(drawn) == len(units):
        raise ClueError(f"relearn_share = {settings.relearn_share} shows all {len(facts)} forget records and leaves none to"
                        " measure: lower it, or give more records")
    shown, rest = ([r for r, fact in zip(sets.forget, facts, strict=True) if (fact in drawn) == inside]
                   for inside in (True, False))
    measured = _encode(model, tokenizer, {"forget, not shown": rest, "forget, shown": shown, "retain": sets.retain}, data)
    return _tuned(model, measured["forget, shown"], measured, settings.relearn_steps, settings, pad_id(tokenizer), seed)


def _facts(records: Iterable[Record]) -> list[Fact]:
    """What each record states: its subject and its answer. Two that agree in both say the same thing in other words."""
    return [(r.subject, " ".join(r.answer.split()).casefold()) for r in records]


def drift(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets, settings: RobustnessSettings,
          *, data: DataSettings, seed: int) -> Curve:
    """Fine-tune a copy on the retain set, for long; recall of the forget set, and of retain."""
    measured = _encode(model, tokenizer, {"forget": sets.forget, "retain": sets.retain}, data)
    return _tuned(model, measured["retain"], measured, settings.drift_steps, settings, pad_id(tokenizer), seed)


def round_trip(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets,
               settings: RobustnessSettings, *, data: DataSettings) -> Curve:
    """Recall of the forget and retain set as stored, and with weights rounded to 8 and to 4 bits."""
    measured = _encode(model, tokenizer, {"forget": sets.forget, "retain": sets.retain}, data)
    pad = pad_id(tokenizer)
    points, found = [float(8 * model.dtype.itemsize)], [_recall(model, measured, settings, pad)]
    for bits, group in ((8, 0), (4, settings.quantize_group)):
        rounded = copy.deepcopy(model)
        quantize(rounded, bits, group)
        points.append(float(bits))
        found.append(_recall(rounded, measured, settings, pad))
    return _curve("bits per weight", points, found)


def ask_otherwise(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets,
                  settings: RobustnessSettings, *, data: DataSettings) -> dict[str, Recall]:
    """Recall of the forget set per way of asking: as trained, in other words, behind an injected instruction
    (``settings.prefix``), and after up to ``settings.hints`` other forget records, of other facts, with their answers."""
    records = list(sets.forget)
    limit = length_limit(model, data.max_length)

    def fits(record: Record) -> bool:
        example = encode([record], tokenizer, chat=data.chat, append_eos=data.append_eos)[0]
        return not limit or len(example.input_ids) <= limit

    asked: dict[str, Sequence[Record]] = {"as trained": records}
    if sets.forget_paraphrase is not None:
        asked["in other words"] = sets.forget_paraphrase.records
    asked |= {name: more.records for name, more in sets.forget_extra.items()}
    injected = [replace(r, prompt=f"{settings.prefix} {r.prompt}") for r in records if r.prompt]
    asked["behind an instruction"] = [r for r in injected if fits(r)]
    hinted, facts = [], _facts(records)
    for i, record in enumerate(records):
        others = (records[(i + j) % len(records)] for j in range(1, len(records)) if facts[(i + j) % len(records)] != facts[i])
        told = [f"{r.prompt} {r.answer}\n" for r in others if r.prompt]
        tries = (replace(record, prompt="".join(told[:n]) + record.prompt) for n in range(settings.hints, 0, -1))
        hinted += [*islice(filter(fits, tries), 1)] if record.prompt and told else []  # as many as the context holds
    asked["after other records as hints"] = hinted
    ways = _encode(model, tokenizer, {name: some for name, some in asked.items() if some}, data)
    return _recall(model, ways, settings, pad_id(tokenizer))


def quantize(model: PreTrainedModel, bits: int, group: int = 0) -> None:
    """Round every weight matrix, in place, to what symmetric absmax quantization would give back; embeddings and the
    unembedding are left alone, as is usual.

    A row's weights (of one output) share one scale, or each run of ``group`` of them along the inputs: scale = largest
    absolute weight / (2^(bits - 1) - 1), weight = round(weight / scale) * scale.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                continue
            for weight in module.parameters(recurse=False):
                if weight.ndim < 2 or id(weight) in kept:
                    continue
                rows = weight.detach().float()
                rows = rows.T if isinstance(module, Conv1D) else rows  # the only one that stores inputs first
                runs = rows.split(group or rows.shape[-1], dim=-1)
                rounded = []
                for run in runs:
                    scale = run.abs().amax(-1, keepdim=True) / most
                    rounded.append((run / scale.clamp(min=torch.finfo(run.dtype).tiny)).round() * scale)
                found = torch.cat(rounded, -1)
                weight.copy_(found.T if isinstance(module, Conv1D) else found)


def _tuned(model: PreTrainedModel, shown: Sequence[Example], measured: Mapping[str, Sequence[Example]], steps: int,
           settings: RobustnessSettings, pad: int, seed: int) -> Curve:
    """Recall of the measured sets along plain fine-tuning of all weights of a copy: AdamW at a constant rate, no weight
    decay, float32 weights whatever the model's own."""
    import torch
    from torch.nn.functional import cross_entropy

    student = copy.deepcopy(model).float()
    student.eval()  # without dropout
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.tune_lr, weight_decay=0.0)
    order = _endless(shown, settings, pad, torch.Generator().manual_seed(seed), student.device)
    stops = sorted({round(steps * i / settings.curve_points) for i in range(settings.curve_points + 1)})
    found = []
    for step in range(steps + 1):
        if step in stops:
            found.append(_recall(student, measured, settings, pad))
        if step < steps:
            logits, labels = answer_logits(student, next(order))
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return _curve("steps of fine-tuning", stops, found)


def _endless(examples: Sequence[Example], settings: RobustnessSettings, pad: int, generator: Any,
             device: Any) -> Iterator[Any]:
    while True:
        yield from batches(examples, settings.batch_size, generator=generator, pad=pad, device=device)


def _recall(model: PreTrainedModel, measured: Mapping[str, Sequence[Example]], settings: RobustnessSettings,
            pad: int) -> dict[str, Recall]:
    """Recall of every set, from one pass over all of them."""
    scores = score(model, [e for some in measured.values() for e in some], pad=pad, batch_size=settings.batch_size)
    known, likely = exact_match(scores), probability(scores)
    found, first = {}, 0
    for name, some in measured.items():
        own = slice(first, first := first + len(some))
        found[name] = Recall(float(known[own].mean()), float(likely[own].mean()))
    return found


def _curve(x_label: str, x: Sequence[float], found: Sequence[Mapping[str, Recall]]) -> Curve:
    return Curve(x_label, tuple(map(float, x)), {name: tuple(point[name] for point in found) for name in found[0]})


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, RecordSet | Sequence[Record]],
            data: DataSettings) -> dict[str, list[Example]]:
    limit = length_limit(model, data.max_length)
    return {name: encode(records, tokenizer, chat=data.chat, append_eos=data.append_eos, max_length=limit)
            for name, records in sets.items()}

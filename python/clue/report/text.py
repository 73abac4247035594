"""The same comparison as plain aligned text, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from ..evaluate.truth import incomparable
from .measures import titled
from .svg import number, percent

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation, SetResult
    from ..evaluate.robustness import Robustness

T = TypeVar("T")

WIDTH = 80
_LABEL = 30
_COLUMN = 10


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Exact match of every set, ROUGE-L and probability on the forget set, truth ratio, forget quality and model utility where
    they were measured, and the privacy attacks, one column per model; ASCII as long as the names are. More models than fit
    side by side continue below."""
    gold = evaluations.get("gold")
    return "\n\n".join("\n".join(_block(block, gold)) for block in _blocks(evaluations))


def robustness_table(found: Mapping[str, Robustness]) -> str:
    """Probability of the forget set's answers, one column per model: at the start and end of each curve, and per way of
    asking."""
    return "\n\n".join("\n".join(_robustness_block(block)) for block in _blocks(found))


def _blocks(columns: Mapping[str, T]) -> list[dict[str, T]]:
    names = list(columns)
    each = (WIDTH - _LABEL) // _COLUMN
    return [{name: columns[name] for name in names[i:i + each]} for i in range(0, len(names), each)]


def _robustness_block(found: Mapping[str, Robustness]) -> Iterator[str]:
    yield _line("", list(found))
    yield "robustness (probability of forgotten answers, lower is better)"
    for curve in dict.fromkeys(name for one in found.values() for name in one.curves):
        for place, label in ((0, "before"), (-1, "after")):
            cells = []
            for one in found.values():
                lines = one.curves[curve].lines
                cells.append(percent(lines[next(iter(lines))][place].probability))
            yield _line(f"  {label} {curve}", cells)
    for way in dict.fromkeys(way for one in found.values() for way in one.prompts):
        yield _line(f"  {way}", [percent(one.prompts[way].probability) if way in one.prompts else "" for one in found.values()])


def _block(evaluations: Mapping[str, Evaluation], gold: Evaluation | None) -> Iterator[str]:
    found = list(evaluations.values())
    yield _line("", [name for name in evaluations])
    titles = {"forget": "forget (exact match, lower is better)", "retain": "retain (exact match, higher is better)",
              "skill": "skills (exact match, or the choice where there is one; higher is better)",
              "member": "members (attacked as trained on)", "holdout": "holdout (never trained on)"}
    for purpose, title in titles.items():
        sets = dict.fromkeys(name for e in found for name, result in e.detail.items() if result.purpose == purpose)
        if sets:
            yield title
        for name in sets:
            yield _line(f"  {titled(name, found)}", [percent(e.detail[name].solved) if name in e.detail else "" for e in found])
        if purpose == "forget":
            yield _line("  forget, probability", [percent(e.detail["forget"].probability) for e in found])
            choices = [e.detail["forget"].choice_accuracy for e in found]
            if any(value is not None for value in choices):
                yield _line("  forget, multiple choice", ["" if v is None else percent(v) for v in choices])
            recalls = [_recall(e.detail["forget"]) for e in found]
            if any(recalls):
                yield _line("  forget, ROUGE-L recall", recalls)
            if "n/a" in recalls:
                yield "    (n/a: ROUGE knows words of a-z and 0-9 only, and no answer has any)"
    truths = [e.detail["forget"].truth_ratio for e in found]
    utilities = [e.model_utility for e in found]
    if any(value is not None for value in (*truths, *utilities)):
        yield "published scores (higher is better)"
    if any(value is not None for value in truths):
        yield _line("  forget truth ratio", ["" if v is None else percent(v) for v in truths])
        qualities = [None if gold is None or e is gold or incomparable(e, gold) else e.forget_quality(gold) for e in found]
        yield _line("  forget quality (p value)", ["n/a" if v is None else number(v) for v in qualities])
    if any(value is not None for value in utilities):
        yield _line("  model utility", ["" if v is None else percent(v) for v in utilities])
    attacks = dict.fromkeys(name for e in found for name in e.mia)
    if attacks:
        yield "privacy (AUC of the attack, 0.5 is ideal)"
    for name in attacks:
        yield _line(f"  {name}", [f"{e.mia[name].auc:.3f}" if name in e.mia else "" for e in found])


def _recall(result: SetResult) -> str:
    """ROUGE-L recall; empty where nothing was generated, which is another matter than answers without a word it knows."""
    if result.rouge_l is None:
        return "" if result.contained is None else "n/a"
    return percent(result.rouge_l)


def _line(label: str, cells: list[str]) -> str:
    label = _fit(label, _LABEL - 1).ljust(_LABEL)
    return (label + "".join(_fit(cell, _COLUMN - 1).rjust(_COLUMN) for cell in cells)).rstrip()


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 2] + ".."

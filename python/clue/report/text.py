"""The same comparison as plain aligned text, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .svg import percent

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation

WIDTH = 80
_LABEL = 30
_COLUMN = 10


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Exact match of every set, ROUGE-L and probability on the forget set, and the privacy attacks, one column per
    model; ASCII as long as the names are. More models than fit side by side continue below."""
    names = list(evaluations)
    each = (WIDTH - _LABEL) // _COLUMN
    blocks = [{name: evaluations[name] for name in names[i:i + each]} for i in range(0, len(names), each)]
    return "\n\n".join("\n".join(_block(block)) for block in blocks)


def _block(evaluations: Mapping[str, Evaluation]) -> Iterator[str]:
    found = list(evaluations.values())
    yield _line("", [name for name in evaluations])
    titles = {"forget": "forget (exact match, lower is better)", "retain": "retain (exact match, higher is better)",
              "skill": "skills (exact match, higher is better)", "holdout": "holdout (never trained on)"}
    for purpose, title in titles.items():
        sets = dict.fromkeys(name for e in found for name, result in e.detail.items() if result.purpose == purpose)
        if sets:
            yield title
        for name in sets:
            yield _line(f"  {name}", [percent(e.detail[name].accuracy) if name in e.detail else "" for e in found])
        if purpose == "forget":
            yield _line("  forget, probability", [percent(e.detail["forget"].probability) for e in found])
            recalls = [e.detail["forget"].rouge_l for e in found]
            if any(recall is not None for recall in recalls):
                yield _line("  forget, ROUGE-L recall", ["" if r is None else percent(r) for r in recalls])
    attacks = dict.fromkeys(name for e in found for name in e.mia)
    if attacks:
        yield "privacy (AUC of the attack, 0.5 is ideal)"
    for name in attacks:
        yield _line(f"  {name}", [f"{e.mia[name].auc:.3f}" if name in e.mia else "" for e in found])


def _line(label: str, cells: list[str]) -> str:
    label = _fit(label, _LABEL - 1).ljust(_LABEL)
    return (label + "".join(_fit(cell, _COLUMN - 1).rjust(_COLUMN) for cell in cells)).rstrip()


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 2] + ".."

"""A comparison for people: aligned text for a terminal, one HTML file, plain values for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from ..data.atomic import write_atomically
from ..evaluate.comparison import HEADLINE, HEADLINES, Group, Interval, RowSummary
from .html import groups_of
from .svg import Curve, percent, tradeoff

_LABEL = 17


def comparison_json(groups: Sequence[Group], **about: Any) -> dict[str, Any]:
    """Plain values: what was asked for, then every group with all measures of all rows."""
    return {**about, "groups": [_plain(asdict(group)) for group in groups]}


def comparison_table(groups: Sequence[Group], level: float) -> str:
    """Two blocks of lines per benchmark and objective: what is kept, against CLUE; and everything else."""
    return "\n\n".join("\n".join(_lines(group, level)) for group in groups)


def _lines(group: Group, level: float) -> list[str]:
    seeds = max((len(row.seeds) + row.diverged for row in group.rows), default=0)
    lines = [f"{group.benchmark}, {group.objective}, {seeds} seed{'s' * (seeds != 1)}: read where {percent(level)} of the"
             " forget records are forgotten",
             _line("", ["weights", "forgotten", "retain", "95%", "to clue", "95%", "p"], _WIDE)]
    for row in group.rows:
        kept, apart = row.measures.get(HEADLINE), (row.against or {}).get(HEADLINE)
        cells = [percent(row.share), row.failure if not row.seeds else percent(row.forgotten) + _mark(row),
                 _value(kept), _span(kept), _value(apart, signed=True), _span(apart, signed=True),
                 "" if apart is None or apart.p is None else f"{apart.p:.3f}"]
        lines.append(_line(row.row, cells, _WIDE))
    for name, measures in group.reference.items():
        lines.append(_line(f"({name})", ["", "", _number(measures.get(HEADLINE))], _WIDE))
    keys = [key for key in HEADLINES if key != HEADLINE and any(key in row.measures for row in group.rows)]
    widths = [len(HEADLINES[key]) + 1 if len(HEADLINES[key]) > 6 else 7 for key in keys] + [7, 6, 6]
    lines += ["", _line("", [*(HEADLINES[key] for key in keys), "CPU s", "steps", "MB"], widths)]
    for row in group.rows:
        cost = "" if not row.seeds else f"{row.localize_seconds + row.train_seconds:.0f}"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        values = [_value(row.measures.get(key)) for key in keys]
        lines.append(_line(row.row, [*values, cost, f"{row.steps:.0f}" if row.seeds else "", memory], widths))
    for name, measures in group.reference.items():
        lines.append(_line(f"({name})", [_number(measures.get(key)) for key in keys], widths))
    if any(row.reached < len(row.seeds) for row in group.rows):
        lines.append("* did not get there in its steps at every seed: read where it forgot most")
    ends = [row.row for row in group.rows if row.at_end]
    if ends:
        lines.append(f"learning rate at an end of the grid, where a wider one (--lrs) may find a better: {', '.join(ends)}")
    return lines


_WIDE = [9, 12, 8, 14, 9, 16, 7]


def _line(label: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    return (label.ljust(_LABEL) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))).rstrip()


def _mark(row: RowSummary) -> str:
    return "*" if row.reached < len(row.seeds) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _value(found: Interval | None, *, signed: bool = False) -> str:
    return "" if found is None else f"{found.mean:+.3f}" if signed else f"{found.mean:.3f}"


def _span(found: Interval | None, *, signed: bool = False) -> str:
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{found.low:+.3f}..{found.high:+.3f}" if signed else f"{found.low:.3f}..{found.high:.3f}"


def write_comparison(path: str | os.PathLike[str], *, title: str, groups: Sequence[Group], level: float,
                     provenance: Mapping[str, Any]) -> None:
    """Write the comparison as one HTML file, whole or not at all.

    Args:
        level: the level of forgetting that rows are compared at.
        provenance: anything nested of plain values.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    resources = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "span": _span, "value": _value}
    template = environment.from_string((resources / "comparison.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        style=Markup((resources / "report.css").read_text(encoding="utf-8")), title=title, level=level,
        groups=[_shown(group) for group in groups], provenance=groups_of(provenance))
    write_atomically(path, text.encode("utf-8", "replace"))


def _shown(group: Group) -> dict[str, Any]:
    keys = [key for key in HEADLINES if any(key in row.measures for row in group.rows)]
    curves = [Curve(row.row, row.curve, row.row == "clue") for row in group.rows if row.curve]
    plot = tradeoff(curves, label=f"{group.benchmark}, {group.objective}: accuracy on retain records against the share of"
                    " forget records forgotten; the table below has the values at the level compared",
                    x_label="forgotten", y_label="retain accuracy")
    return {"group": group, "keys": keys, "titles": HEADLINES, "headline": HEADLINE, "plot": plot,
            "seeds": max((len(row.seeds) + row.diverged for row in group.rows), default=0)}


def _plain(value: Any) -> Any:
    """JSON has no NaN: what a row without numbers has not is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value

"""Plots as inline SVG: lines, stacked columns, dumbbells. Plain shapes with CSS classes, no script, no fonts, no links.

Colours, dashes and text sizes are the style sheet's, so a plot follows the reader's colour scheme. Every mark carries a
``<title>`` that the browser shows on hover. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

WIDTH, HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 44
#: A line of more points than this is drawn as means over equal runs of them.
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line of a plot: its name, its CSS class, and points [n] each; points that are not finite are left out."""

    label: str
    style: str
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One row of a trade-off: its name, (x, y) shares, the last of which carries the name, and whether it stands out."""

    label: str
    points: Sequence[tuple[float, float]]
    stressed: bool


def number(value: float) -> str:
    """Three significant digits, as a person would write them: 1240, 3.14, 0.05, 2e-4."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal; 0% and 100% are written only where they are exact."""
    if value in (0, 1):
        return f"{value:.0%}"
    if 0 < value < 5e-4:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{100 * value:.1f}%"


def _whole(value: float) -> str:
    return f"{value:.0%}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``, at most ``most`` of them."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [i * step for i in range(first, last + 1)]


class _Axes:
    """Where data lie on the canvas, and the frame, ticks and labels around them."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]],
              y_ticks: Sequence[tuple[float, str]]) -> list[str]:
        parts = []
        for value, text in y_ticks:
            y = self.at_y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        base = HEIGHT - _BOTTOM
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        for value, text in x_ticks:
            parts.append(f'<text class="tick" x="{self.at_x(value):.1f}" y="{base + 17}" text-anchor="middle">'
                         f'{escape(text)}</text>')
        parts.append(f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}"'
                     f' text-anchor="middle">{escape(x_label)}</text>')
        parts.append(f'<text class="label" transform="translate(13 {(_TOP + base) / 2:.0f}) rotate(-90)"'
                     f' text-anchor="middle">{escape(y_label)}</text>')
        return parts


def line_plot(series: Sequence[Series], *, label: str, x_label: str, y_label: str, shares: bool = False,
              chance: bool = False, marks: Sequence[tuple[float, str]] = ()) -> Markup:
    """Lines over a common x.

    Args:
        label: what the plot shows, read out instead of it.
        shares: both axes run over [0, 1] and are written as percentages (a ROC curve).
        chance: draw the diagonal.
        marks: (x, text) of vertical lines.
    """
    drawn = [_thin(s) for s in series]
    drawn = [s for s in drawn if len(s.x)]
    if shares:
        axes, show, tick = _Axes((0, 1), (0, 1)), percent, _whole
        x_at = y_at = [0, 0.2, 0.4, 0.6, 0.8, 1]
    else:
        x_range, y_range = _range([s.x for s in drawn], pad=False), _range([s.y for s in drawn], pad=True)
        axes, show, tick = _Axes(x_range, y_range), number, number
        x_at, y_at = ticks(*x_range), ticks(*y_range)
    parts = axes.frame(x_label, y_label, [(v, tick(v)) for v in x_at], [(v, tick(v)) for v in y_at])
    if chance:
        parts.append(f'<line class="chance" x1="{axes.at_x(0):.1f}" y1="{axes.at_y(0):.1f}" x2="{axes.at_x(1):.1f}"'
                     f' y2="{axes.at_y(1):.1f}"><title>guessing</title></line>')
    for i, (value, text) in enumerate(marks):
        # Staggered, so that neighbouring texts do not run into each other.
        x, height = axes.at_x(value), _TOP + 10 + 15 * (i % 2)
        beside, anchor = (x + 5, "start") if x < 0.6 * WIDTH else (x - 5, "end")
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
                     f'<text class="tick" x="{beside:.1f}" y="{height}" text-anchor="{anchor}">{escape(text)}</text>')
    for s in drawn:
        points = [(axes.at_x(x), axes.at_y(y)) for x, y in zip(s.x, s.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {s.style}" points="{path}"><title>{escape(s.label)}</title></polyline>')
        # Invisible dots to hover over; many of them would only make the file large.
        for (x, y), a, b in list(zip(points, s.x, s.y, strict=True))[::max(1, len(points) // 60)]:
            text = f"{s.label}: {show(float(b))} at {x_label} {show(float(a))}"
            parts.append(f'<circle class="dot {s.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(text)}'
                         '</title></circle>')
    return _svg(parts, label)


def tradeoff(curves: Sequence[Curve], *, label: str, x_label: str, y_label: str) -> Markup:
    """Curves of two shares of which more is better in both, each named at its last point; the Pareto front of the last
    points is dashed."""
    last = [curve.points[-1] for curve in curves]
    xs, ys = ([p[axis] for curve in curves for p in curve.points] for axis in (0, 1))
    x_low, y_low = (max(0.0, min(values, default=0.0) - 0.04) for values in (xs, ys))
    axes = _Axes((x_low, 1 + 0.45 * (1 - x_low)), (y_low, 1.0))  # names stand to the right of 100%
    parts = axes.frame(x_label, y_label, [(v, _whole(v)) for v in ticks(x_low, 1.0)],
                       [(v, _whole(v)) for v in ticks(y_low, 1.0)])
    front = sorted({p for p in last if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in last)})
    if len(front) > 1:
        path = " ".join(f"{axes.at_x(x):.1f},{axes.at_y(y):.1f}" for x, y in front)
        parts.append(f'<polyline class="chance" fill="none" points="{path}"><title>Pareto front</title></polyline>')
    below = float(_TOP)
    drawn: tuple[list[str], list[str]] = ([], [])  # what is stressed lies on top
    for curve in sorted(curves, key=lambda curve: (-curve.points[-1][1], curve.label)):
        style, marks = "after" if curve.stressed else "holdout", drawn[curve.stressed]
        points = [(axes.at_x(x), axes.at_y(y)) for x, y in curve.points]
        marks.append(f'<polyline class="line {style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}">'
                     f'<title>{escape(curve.label)}</title></polyline>')
        for (x, y), (a, b) in zip(points, curve.points, strict=True):
            marks.append(f'<circle class="marker {style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(curve.label)}:'
                         f' {y_label} {percent(b)} at {percent(a)} {x_label}</title></circle>')
        x, y = points[-1]
        below = max(below, y + 4)  # names do not run into each other
        parts.append(f'<text class="tick" x="{axes.at_x(1) + 12:.1f}" y="{below:.1f}">{escape(curve.label)}</text>')
        below += 13
    return _svg(parts + drawn[False] + drawn[True], label)


def stacked_columns(columns: Sequence[str], stacks: Mapping[str, Sequence[int]], *, label: str, x_label: str,
                    y_label: str) -> Markup:
    """One column per entry of ``columns``, made of the counts of every stack (CSS class -> counts), bottom first."""
    totals = np.sum([list(counts) for counts in stacks.values()], axis=0)
    axes = _Axes((-0.5, len(columns) - 0.5), (0, max(1.0, float(totals.max(initial=0)) * 1.05)))
    each = max(1, math.ceil(len(columns) / 12))
    marks = sorted({round(v) for v in ticks(*axes.y)})
    parts = axes.frame(x_label, y_label, [(i, columns[i]) for i in range(0, len(columns), each)],
                       [(v, f"{v:,}") for v in marks])
    width = (axes.at_x(1) - axes.at_x(0)) * (0.72 if len(columns) <= 40 else 1)
    width = min(width, 44.0)
    for i, column in enumerate(columns):
        below = 0
        for style, counts in stacks.items():
            if counts[i]:
                top, bottom = axes.at_y(below + counts[i]), axes.at_y(below)
                text = f"{x_label} {column}: {counts[i]:,} {style}"
                parts.append(f'<rect class="fill {style}" x="{axes.at_x(i) - width / 2:.1f}" y="{top:.2f}"'
                             f' width="{width:.1f}" height="{bottom - top:.2f}"><title>{escape(text)}</title></rect>')
                below += counts[i]
    return _svg(parts, label)


def _across(share: float) -> str:
    """Where a share in [0, 1] lies on a strip; the ends leave room for half a marker."""
    return f"{4 + 92 * min(1.0, max(0.0, share)):.2f}%"


def strip_scale() -> Markup:
    """The scale that goes over a column of :func:`dumbbell` strips."""
    texts = (f'<text class="tick" x="{_across(v)}" y="12" text-anchor="middle">{v:.0%}</text>' for v in (0, 0.5, 1))
    return Markup(f'<svg class="scale" width="100%" height="16" role="img" aria-label="from 0% to 100%">'
                  f'{"".join(texts)}</svg>')


def dumbbell(values: Sequence[tuple[str, str, float]], *, style: str) -> Markup:
    """A strip from 0 to 1 as wide as its container, with one marker per (label, CSS class, value), and a bar of class
    ``style`` from the first to the second."""
    parts = [f'<line class="grid" x1="{_across(0)}" x2="{_across(1)}" y1="11" y2="11"/>']
    parts += [f'<line class="grid" x1="{_across(v)}" x2="{_across(v)}" y1="7" y2="15"/>' for v in np.linspace(0, 1, 5)]
    if len(values) > 1:
        first, second = _across(values[0][2]), _across(values[1][2])
        parts.append(f'<line class="bar {style}" x1="{first}" x2="{second}" y1="11" y2="11"/>')
    # The diamond below and filled dots on top, so that equal values stay visible.
    below = {"gold": 0, "before": 1}
    for label, kind, value in sorted(values, key=lambda v: below.get(v[1], 2)):
        title = f"<title>{escape(label)}: {percent(value)}</title>"
        shape = (f'<path class="marker gold" d="M0-6.5 6.5 0 0 6.5-6.5 0Z">{title}</path>' if kind == "gold" else
                 f'<circle class="marker {kind}" r="5">{title}</circle>')
        parts.append(f'<svg x="{_across(value)}" y="11" overflow="visible">{shape}</svg>')
    text = ", ".join(f"{label} {percent(value)}" for label, _, value in values)
    return Markup(f'<svg class="strip" width="100%" height="22" role="img" aria-label="{escape(text)}">{"".join(parts)}'
                  '</svg>')


def split_bar(parts: Sequence[tuple[str, str, int]]) -> Markup:
    """One bar as wide as its container, divided in proportion to (label, CSS class, count)."""
    total = sum(count for _, _, count in parts) or 1
    shapes: list[str] = []
    left = 0.0
    for label, style, count in parts:
        share = 100 * count / total
        shapes.append(f'<rect class="fill {style}" x="{left:.3f}%" width="{share:.3f}%" height="26"><title>'
                      f'{count:,} {escape(label)} ({percent(count / total)})</title></rect>')
        left += share
    text = ", ".join(f"{count:,} {label}" for label, _, count in parts)
    return Markup(f'<svg class="split" width="100%" height="26" role="img" aria-label="{escape(text)}">'
                  f'{"".join(shapes)}</svg>')


def _svg(parts: Sequence[str], label: str) -> Markup:
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
                  f'{"".join(parts)}</svg>')


def _range(values: Sequence[npt.NDArray[np.float64]], *, pad: bool) -> tuple[float, float]:
    """Smallest and largest value; with ``pad`` a little more on both sides, and 0 when it is close."""
    every = np.concatenate(list(values)) if values else np.zeros(1)
    low, high = float(every.min()), float(every.max())
    if not pad:
        return low, high if high > low else low + 1
    if 0 < low < 0.5 * high:
        low = 0.0
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def _thin(series: Series) -> Series:
    """Only the finite points, and no more than :data:`MOST_POINTS`: beyond that, means over equal runs."""
    keep = np.isfinite(series.x) & np.isfinite(series.y)
    x, y = series.x[keep], series.y[keep]
    if len(x) > MOST_POINTS:
        run = math.ceil(len(x) / MOST_POINTS)
        starts = np.arange(0, len(x), run)
        counts = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return Series(series.label, series.style, x, y)



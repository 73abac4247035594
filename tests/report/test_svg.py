"""Plots: ticks are round and inside, marks are where the data say, the markup is well formed and escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.report.svg import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Series,
    dumbbell,
    line_plot,
    number,
    percent,
    split_bar,
    stacked_columns,
    ticks,
)


def elements(plot, name):
    return [e for e in ElementTree.fromstring(str(plot)).iter() if e.tag == name]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_evenly_spaced_and_inside(low, span):
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= t <= low + span + slack for t in found)
    if len(found) > 1:
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-6)))
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-2


@pytest.mark.parametrize(("value", "text"), [(0, "0%"), (1, "100%"), (0.0001, "<0.1%"), (0.9999, ">99.9%"),
                                             (0.031, "3.1%"), (0.5, "50.0%"), (0.9994, "99.9%")])
def test_percentages_never_round_to_an_untrue_end(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (3.14159, "3.14"), (1240.4, "1240"), (0.05, "0.05"),
                                             (0.0002, "2e-4"), (-0.5, "-0.5"), (2.5e7, "2.5e7")])
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text


def test_a_line_goes_through_its_points_and_skips_what_is_not_a_number():
    y = np.array([0.0, 0.5, np.nan, np.inf, 1.0])
    plot = line_plot([Series("a <b>", "after", np.array([0.0, 0.5, 0.6, 0.7, 1.0]), y)], label='"roc" & more',
                     x_label="x", y_label="y", shares=True, chance=True)
    (line,) = elements(plot, "polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y2 < y0  # up is more
    assert line.find("title").text == "a <b>"


@given(st.lists(st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), max_size=30), max_size=3))
def test_any_data_stay_on_the_canvas(lines):
    series = [Series(f"s{i}", "after", np.arange(len(y), dtype=float), np.array(y, dtype=float))
              for i, y in enumerate(lines)]
    plot = line_plot(series, label="any", x_label="step", y_label="y", marks=[(0.0, "start")])
    for line in elements(plot, "polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_a_long_line_becomes_means_of_equal_runs():
    y = np.arange(100_000, dtype=float)
    plot = line_plot([Series("long", "after", y, y)], label="long", x_label="step", y_label="y")
    points = elements(plot, "polyline")[0].get("points").split()
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS
    assert len(str(plot)) < 40_000


def test_columns_are_stacked_in_proportion():
    plot = stacked_columns(["0", "1"], {"forget": [3, 0], "retain": [1, 2]}, label="roles", x_label="layer",
                           y_label="nodes")
    found = {r.find("title").text: (float(r.get("y")), float(r.get("height"))) for r in elements(plot, "rect")}
    assert set(found) == {"layer 0: 3 forget", "layer 0: 1 retain", "layer 1: 2 retain"}
    (y3, h3), (y1, h1), (_, h2) = (found[k] for k in ("layer 0: 3 forget", "layer 0: 1 retain", "layer 1: 2 retain"))
    assert h3 == pytest.approx(3 * h1, abs=0.05) and h2 == pytest.approx(2 * h1, abs=0.05)
    assert y1 + h1 == pytest.approx(y3, abs=0.05)  # on top of each other, no gap
    elements(stacked_columns(["0"], {"forget": [0]}, label="empty", x_label="layer", y_label="nodes"), "rect")


def test_strips_and_bars_say_their_values():
    strip = dumbbell([("Before", "before", 1.0), ("After", "after", 0.031), ("<Gold>", "gold", 0.0)], style="forget")
    assert 'aria-label="Before 100%, After 3.1%, &lt;Gold&gt; 0%"' in strip
    assert len(elements(strip, "circle")) == 2 and len(elements(strip, "path")) == 1
    bar = split_bar([("forced", "forced", 3), ("chosen", "chosen", 1)])
    assert [float(r.get("width").rstrip("%")) for r in elements(bar, "rect")] == [75.0, 25.0]
    elements(split_bar([("none", "free", 0)]), "rect")

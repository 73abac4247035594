"""The comparison for people: every row with its numbers, aligned in a terminal, escaped and self-contained as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clue.evaluate.comparison import HEADLINE, Cell, Group, Point, grouped
from clue.report import comparison_table, write_comparison
from clue.report.comparison import comparison_json
from clue.report.svg import Curve, tradeoff
from tests.report.test_report import EVIL, Page

KEYS = ("forget.accuracy", "retain_seen.accuracy", "skills", "mia.loss.auc")


def made(seeds: int = 3) -> list[Group]:
    """Five rows that win, lose, do not get there, diverge at one seed and at all."""
    cells = []
    for row, retain in (("clue", 0.97), ("wagle+metric", 0.9), ("slow", 0.99), ("shaky", 0.5), (EVIL, 0.4)):
        for seed in range(seeds):
            end = 0.7 if row == "slow" else 1.0
            points = tuple(Point(1e-4, 10 * i, end * i / 2, (0.9, 0.9), {HEADLINE: retain - 0.1 * i + 0.01 * seed,
                                 **dict.fromkeys(KEYS, 0.25)}, 3.0 * i) for i in (1, 2))
            gone = row == EVIL or (row == "shaky" and seed == 1)
            cells.append(Cell("world-hard", seed, "npo", row, 200, 1000, () if gone else points,
                              {"0.1": "loss nan"} if gone else {}, 2.0, None if gone else 5_000_000))
    references = {f"world-hard-{seed}": {"before": {HEADLINE: 1.0, "skills": 0.75}} for seed in range(seeds)}
    return grouped(cells, references, 1.0, (0.5, 1.0))


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_says_every_row(seeds: int) -> None:
    text = comparison_table(made(seeds), 1.0)
    assert max(map(len, text.splitlines())) <= 100
    lines = {line.split()[0]: line for line in text.splitlines()[2:9] if line}
    assert f"{seeds} seed" in text and "read where 100% of the forget records" in text
    assert "20.0%" in lines["clue"] and "100%" in lines["clue"]
    assert "70.0%*" in lines["slow"] and "* did not get there" in text
    assert "diverged" in lines[EVIL.split()[0]]
    assert ("0.770..0.790" in lines["clue"], "0.250" in lines["wagle+metric"]) == (seeds == 3, seeds == 3)
    assert "-0.070" in lines["wagle+metric"]
    assert "0.750" in text  # the model before


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    write_comparison(tmp_path / "c.html", title=EVIL, groups=made(), level=1.0, provenance={"seed": 0, "x": {"y": EVIL}})
    text = (tmp_path / "c.html").read_text()
    assert EVIL not in text and "<script" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    Page(text)  # every tag is closed in turn
    for expected in ("wagle+metric", "reached at 0 of 3", "diverged", "0.770..0.790", "-0.070", "0.250", "2 + 6", "before"):
        assert expected in text


def test_json_holds_every_measure_of_every_row() -> None:
    text = json.dumps(comparison_json(made(), target=1.0), allow_nan=False)
    group, = json.loads(text)["groups"]
    rows = {row["row"]: row for row in group["rows"]}
    assert list(rows) == ["clue", "wagle+metric", "slow", "shaky", EVIL]
    assert rows["clue"]["against"] is None and rows["shaky"]["against"][HEADLINE]["n"] == 2
    assert rows[EVIL]["diverged"] == 3 and rows[EVIL]["forgotten"] is None
    assert set(rows["clue"]["measures"]) == {HEADLINE, *KEYS}


def test_names_at_a_trade_off_do_not_run_into_each_other() -> None:
    curves = [Curve(f"row {i}", ((0.5, 0.9), (1.0, 0.8 + 0.001 * i)), i == 0) for i in range(8)]
    plot = str(tradeoff(curves, label="l", x_label="forgotten", y_label="kept"))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)">row', plot))
    assert len(heights) == 8 and all(b - a >= 12.9 for a, b in zip(heights, heights[1:], strict=False))
    assert "Pareto front" not in plot  # one row is best in both
    curves.append(Curve("other", ((0.6, 0.95),), False))
    assert "Pareto front" in str(tradeoff(curves, label="l", x_label="forgotten", y_label="kept"))
    curves = [Curve("clue", ((1.0, 0.9),), True), Curve("other", ((1.0, 0.9),), False)]  # at the same place: clue on top
    plot = str(tradeoff(curves, label="l", x_label="forgotten", y_label="kept"))
    assert plot.index('marker after"') > plot.index('marker holdout"')

"""Reports: one HTML file for people (:func:`write_report`), aligned text for a terminal (:func:`table`,
:func:`robustness_table`); and the same for comparisons (:func:`write_comparison`, :func:`comparison_table`)."""

from __future__ import annotations

from .comparison import comparison_table, write_comparison
from .html import write_report
from .text import robustness_table, table

__all__ = ["comparison_table", "robustness_table", "table", "write_comparison", "write_report"]

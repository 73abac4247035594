"""Reports: one HTML file for people (:func:`write_report`), aligned text for a terminal (:func:`table`,
:func:`robustness_table`)."""

from __future__ import annotations

from .html import write_report
from .text import robustness_table, table

__all__ = ["robustness_table", "table", "write_report"]

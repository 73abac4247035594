"""Reports: one HTML file for people (:func:`write_report`), aligned text for a terminal (:func:`table`)."""

from __future__ import annotations

from .html import write_report
from .text import table

__all__ = ["table", "write_report"]

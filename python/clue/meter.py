"""Meter: what a block costs, in processor time and memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Meter:
    """Processor time of all threads in a block, without its pauses, and the most memory the process held in it.

        with Meter() as meter:
            work()
            with meter.paused():
                look()
        meter.seconds, meter.peak

    Attributes:
        peak: bytes of device memory where a GPU is in use, else of main memory; None where the system only tells the peak
            since the process began. Known once the block has ended.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._spent, self._since = 0.0, 0.0
        self._most: list[int | None] = []  # of each stretch between pauses
        self._running = False

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        return self._spent + (time.process_time() - self._since if self._running else 0.0)

    def __enter__(self) -> Meter:
        self._most = []
        _forget_peak()
        self._since, self._running = time.process_time(), True
        return self

    def __exit__(self, *error: object) -> None:
        self._spent, self._running = self.seconds, False
        self._most.append(_peak())
        known = [peak for peak in self._most if peak is not None]
        self.peak = max(known) if len(known) == len(self._most) else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time and memory do not count."""
        self._spent, self._running = self.seconds, False
        self._most.append(_peak())
        try:
            yield
        finally:
            _forget_peak()
            self._since, self._running = time.process_time(), True


def _cuda() -> Any:
    """torch.cuda where it is in use."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _forget_peak() -> None:
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew from what is held now


def _peak() -> int | None:
    if (cuda := _cuda()) is not None:
        return int(cuda.max_memory_allocated())
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None

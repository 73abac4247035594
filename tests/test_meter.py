"""The meter counts a block's own processor time, and the memory of that block alone."""

from __future__ import annotations

import time

import numpy as np
import pytest

from clue.meter import Meter


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_pauses_do_not_count() -> None:
    start = time.process_time()
    with Meter() as meter:
        burn(0.02)
        with pytest.raises(KeyError), meter.paused():
            burn(0.05)
            raise KeyError
        burn(0.02)
    spent = time.process_time() - start
    assert 0.04 <= meter.seconds <= spent - 0.05
    before = meter.seconds
    burn(0.01)
    assert meter.seconds == before


def test_memory_of_pauses_does_not_count() -> None:
    with Meter() as meter:
        with meter.paused():
            np.ones(32 << 20)  # 256 MB
        np.ones(8 << 20)
    with Meter() as whole:
        np.ones(32 << 20)
    if meter.peak is None or whole.peak is None:
        pytest.skip("this system only tells the peak since the process began")
    assert whole.peak - (224 << 20) < meter.peak < whole.peak - (128 << 20)


def test_each_block_has_its_own_peak() -> None:
    with Meter() as large:
        np.ones(32 << 20)  # 256 MB
    with Meter() as small:
        pass
    if large.peak is None or small.peak is None:
        pytest.skip("this system only tells the peak since the process began")
    assert large.peak > 256 << 20
    assert small.peak < large.peak - (128 << 20)

"""What tests of exact numbers run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oracles.attribution import InDouble


@pytest.fixture
def in_double() -> Iterator[None]:
    """The unmodified float64 model computes everything in float64, its norms and rotations included."""
    with InDouble():
        yield

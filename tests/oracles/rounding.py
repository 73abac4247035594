"""Stochastic rounding to bfloat16 as csrc/update/rounding.hpp draws it, element by element, with Python's integers."""

from __future__ import annotations

import math
import struct

_64, _32 = 2**64 - 1, 2**32 - 1


def random_bits(key: int, index: int, element: int) -> int:
    """The 32 random bits of one element of one slice."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & _64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    z ^= z >> 31
    first, second = z & _32, z >> 32
    x = (element * 0x9E3779B9 + first) & _32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _32
    x = ((x ^ (x >> 15) ^ second) * 0x735A2D97) & _32
    return x ^ (x >> 15)


def rounded(value: float, random: int) -> float:
    """The bfloat16 below |value|, or the one above where the random number, as a share of 1, is within what is cut off.

    ``value`` is a float32; NaN and infinity stay.
    """
    if not math.isfinite(value):
        return value
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below, rest = bits >> 16, bits & 0xFFFF
    up = rest + (random >> 16) >= 2**16
    (found,) = struct.unpack("<f", struct.pack("<I", ((below + up) & 0xFFFF) << 16))
    return float(found)

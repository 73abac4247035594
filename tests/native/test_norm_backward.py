"""Norm backward: equal to its definition for both dtypes, with and without each part, and to itself bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue import _core

from .conftest import Native


def definition(grad, normal, scale, gain, centre):
    """As the stub reads, in float64."""
    tokens = len(scale)
    y = grad.double().view(len(grad) // max(tokens, 1), tokens, grad.shape[1])
    if gain is not None:
        y = y * gain.double()
    found = y
    if normal is not None:
        n = normal.double()
        found = found - n * (y * n).mean(-1, keepdim=True)
    if centre:
        found = found - y.mean(-1, keepdim=True)
    return (found * scale.double()[:, None]).view(grad.shape)


def arguments(seed, readers, tokens, width, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(readers * tokens, width), (tokens, width), (tokens,), (width,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), readers=st.integers(0, 4), tokens=st.integers(0, 5), width=st.integers(1, 150),
       dtype=st.sampled_from([torch.float32, torch.float64]), exact=st.booleans(), gained=st.booleans(),
       centre=st.booleans())
def test_equals_the_definition(native: Native, seed, readers, tokens, width, dtype, exact, gained, centre):
    grad, normal, scale, gain = arguments(seed, readers, tokens, width, dtype, native.device)
    normal, gain = normal if exact else None, gain if gained else None
    want = definition(grad, normal, scale, gain, centre)
    size = 1 + float(grad.abs().max()) * 20 if grad.numel() else 1.0
    native.kernels.norm_backward(grad, normal, scale, gain, centre)
    torch.testing.assert_close(grad.double(), want, rtol=0, atol=8 * width**0.5 * size * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_for_any_threads_and_instruction_set(dtype, threads, isa):
    found = []
    for name in _core.isas():
        _core.set_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grad, normal, scale, gain = arguments(7, 40, 23, 101, dtype)
            _core.norm_backward(grad, normal, scale, gain, True)
            found.append(grad)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("change", "error", "match"), [
    ({0: torch.zeros(6, 4, dtype=torch.bfloat16)}, TypeError, "^grad: float32 or float64, got bfloat16"),
    ({0: torch.zeros(6)}, ValueError, r"^grad: shape \[readers \* tokens, width\]"),
    ({0: torch.zeros(7, 4)}, ValueError, "^grad: a multiple of 3 rows, the tokens of scale, got 7"),
    ({0: torch.zeros(4, 6).T}, ValueError, "^grad: contiguous memory"),
    ({1: torch.zeros(3, 5)}, ValueError, "^normal: shape"),
    ({2: torch.zeros(3, 1)}, ValueError, r"^scale: shape \[tokens\]"),
    ({3: torch.zeros(4, dtype=torch.float64)}, TypeError, "^gain: float32, got float64"),
])
def test_wrong_arguments_are_named(change, error, match):
    given = [torch.zeros(6, 4), torch.zeros(3, 4), torch.zeros(3), torch.zeros(4)]
    for place, value in change.items():
        given[place] = value
    with pytest.raises(error, match=match):
        _core.norm_backward(*given, False)


def test_memory_that_is_written_belongs_to_nobody_else():
    grad = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="^normal: memory of its own, got that of grad"):
        _core.norm_backward(grad, grad[:3], torch.zeros(3), None, False)

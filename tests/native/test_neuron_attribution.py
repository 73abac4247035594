"""Neuron attribution: equal to its definition for every dtype and layout, and to itself bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue import _core

from ..oracles import neuron as oracle
from .conftest import Native

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def sums(neurons: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.zeros(neurons, dtype=wide, device=device) for _ in range(4)]


def inputs(seed: int, tokens: int, neurons: int, dtype: torch.dtype, device: str = "cpu", extra: int = 0
           ) -> list[Tensor]:
    """Four matrices, each a window into one that is ``extra`` columns wider."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(4, tokens, neurons + extra, generator=generator, dtype=torch.float64).to(device, dtype)
    return [m[:, extra // 2: extra // 2 + neurons] for m in wide]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 40), neurons=st.integers(1, 150),
       dtype=st.sampled_from(DTYPES), extra=st.integers(0, 9), masked=st.sampled_from([None, torch.uint8, torch.bool]))
def test_equals_the_definition(native: Native, seed: int, tokens: int, neurons: int, dtype: torch.dtype, extra: int,
                               masked: torch.dtype | None) -> None:
    matrices = inputs(seed, tokens, neurons, dtype, native.device, extra)
    mask = None
    if masked is not None:
        mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).gt(0.5).to(native.device, masked)
    out = sums(neurons, dtype, native.device)
    for total in out:
        total.fill_(0.5)
    native.kernels.neuron_attribution(*matrices, *out, mask=mask)
    epsilon = torch.finfo(out[0].dtype).eps
    expected = oracle.neuron_attribution(*matrices, mask)
    scale = oracle.magnitude(*matrices, mask)
    for got, want, size in zip(out, expected, scale, strict=True):
        assert torch.all((got.double() - 0.5 - want).abs() <= 2 * (tokens + 8) * epsilon * (size + 1))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 300), neurons=st.integers(1, 600),
       dtype=st.sampled_from(DTYPES), offset=st.integers(0, 3), masked=st.booleans())
def test_fewer_sums_and_the_count(native: Native, seed: int, tokens: int, neurons: int, dtype: torch.dtype, offset: int,
                                  masked: bool) -> None:
    """Whatever is left out, the rest stays what it was; rows that start anywhere; tokens counted and added."""
    matrices = inputs(seed, tokens, neurons, dtype, native.device, 2 * offset)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).gt(0.3).to(native.device) if masked else None
    full, count = sums(neurons, dtype, native.device), torch.full((1,), 5, dtype=torch.int64, device=native.device)
    native.kernels.neuron_attribution(*matrices, *full, mask=mask, out_count=count)
    assert count.item() == 5 + (tokens if mask is None else int(mask.sum()))
    scale = oracle.magnitude(*matrices, mask)
    for kept in ([0], [0, 2], [0, 1]):
        some: list[Tensor | None] = [s if i in kept else None for i, s in enumerate(sums(neurons, dtype, native.device))]
        native.kernels.neuron_attribution(*matrices[:3], matrices[3] if 1 in kept else None, *some, mask=mask)
        for i in kept:  # 16-bit inputs meet in registers three at a time instead of two
            found = some[i]
            assert found is not None
            epsilon = torch.finfo(found.dtype).eps
            assert torch.all((found - full[i]).double().abs() <= 2 * (tokens + 8) * epsilon * (scale[i] + 1))


def test_rows_wider_than_a_strip(native: Native) -> None:
    matrices = inputs(5, 7, 20003, torch.float32, native.device)
    out = sums(20003, torch.float32, native.device)
    native.kernels.neuron_attribution(*matrices, *out)
    for got, want in zip(out, oracle.neuron_attribution(*matrices), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_few_neurons_and_many_tokens(native: Native) -> None:
    """On a GPU the tokens are split over blocks, and the parts are added."""
    matrices = inputs(6, 4099, 48, torch.bfloat16, native.device)
    found = []
    for _ in range(2):
        found.append(sums(48, torch.bfloat16, native.device))
        native.kernels.neuron_attribution(*matrices, *found[-1])
    assert same_bits(*found)
    for got, want in zip(found[0], oracle.neuron_attribution(*matrices), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-3)


def test_long_sums_stay_accurate(native: Native) -> None:
    matrices = inputs(0, 5000, 70, torch.float32, native.device)
    out = sums(70, torch.float32, native.device)
    native.kernels.neuron_attribution(*matrices, *out)
    for got, want in zip(out, oracle.neuron_attribution(*matrices), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_are_not_read(native: Native, dtype: torch.dtype) -> None:
    matrices = inputs(1, 33, 90, dtype, native.device)
    mask = torch.arange(33, device=native.device).remainder(3).ne(1)
    poisoned = [m.clone() for m in matrices]
    for m in poisoned:
        m[~mask] = float("nan")
    out, expected = sums(90, dtype, native.device), sums(90, dtype, native.device)
    native.kernels.neuron_attribution(*poisoned, *out, mask=mask)
    native.kernels.neuron_attribution(*(m[mask] for m in matrices), *expected)
    tolerance = 0 if native.kernels is _core else 1e-4  # a GPU's warps share out masked tokens differently
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_repeated_calls_give_the_same_bits(native: Native) -> None:
    matrices = inputs(2, 300, 200, torch.bfloat16, native.device)
    first, second = sums(200, torch.bfloat16, native.device), sums(200, torch.bfloat16, native.device)
    for out in (first, second):
        native.kernels.neuron_attribution(*matrices, *out)
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_instruction_sets_give_the_same_bits(dtype: torch.dtype, threads: None, isa: None) -> None:
    matrices = inputs(3, 65, 1501, dtype)
    found, alone = [], []
    for name in _core.isas():
        _core.set_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sums(1501, dtype))
            _core.neuron_attribution(*matrices, *found[-1])
            alone.append(sums(1501, dtype)[:1])
            _core.neuron_attribution(*matrices[:3], None, alone[-1][0])
    assert all(same_bits(found[0], other) for other in found[1:])
    assert all(same_bits(alone[0], other) for other in alone[1:])


def test_a_cuda_graph_can_hold_it(native: Native) -> None:
    if native.device == "cpu":
        pytest.skip("needs a CUDA device")
    for neurons in (48, 70, 30000):  # tokens split, rows of no aligned length, blocks enough
        matrices = inputs(7, 2048, neurons, torch.float32, native.device)
        out, count = sums(neurons, torch.float32, native.device), torch.zeros(1, dtype=torch.int64, device=native.device)
        native.kernels.neuron_attribution(*matrices, *out)
        expected = [2 * o for o in out]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            native.kernels.neuron_attribution(*matrices, *out, out_count=count)
        graph.replay()
        assert same_bits(out, expected)
        assert count.item() == 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_exactly(native: Native, dtype: torch.dtype) -> None:
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None].to(native.device)
    zero, one = torch.zeros_like(every), torch.ones_like(every)
    out = sums(2**16, dtype, native.device)
    native.kernels.neuron_attribution(zero, every, one, zero, *out)
    torch.testing.assert_close(out[0], every[0].float(), rtol=0, atol=0, equal_nan=True)


def test_numpy_arrays_are_taken() -> None:
    matrices = inputs(4, 9, 20, torch.float32)
    out, expected = sums(20, torch.float32), sums(20, torch.float32)
    _core.neuron_attribution(*(m.numpy() for m in matrices), *(o.numpy() for o in out))
    _core.neuron_attribution(*matrices, *expected)
    assert same_bits(out, expected)


def replaced(position: int, value: Any) -> Callable[[list[Any]], None]:
    def change(arguments: list[Any]) -> None:
        arguments[position] = value
    return change


def shared_output(arguments: list[Any]) -> None:
    arguments[5] = arguments[4]


@pytest.mark.parametrize(("change", "error", "text"), [
    (replaced(1, torch.zeros(3, 5)), ValueError, r"^corrupted: shape \[3, 4\], got \[3, 5\]$"),
    (replaced(0, torch.zeros(4)), ValueError, r"^clean: shape \[tokens, neurons\], got \[4\]$"),
    (replaced(0, torch.zeros(3, 4, dtype=torch.int64)), TypeError, "^clean: bfloat16, float16, float32 or float64,"),
    (replaced(2, torch.zeros(3, 4).bfloat16()), TypeError, "^grad_clean: float32, got bfloat16$"),
    (replaced(3, torch.zeros(4, 3).T), ValueError, "^grad_corrupted: neurons next to each other in memory, got stride"),
    (replaced(4, torch.zeros(4, dtype=torch.float64)), TypeError, "^out_ns: float32, got float64$"),
    (replaced(6, torch.zeros(5)), ValueError, r"^out_sq_ns: shape \[4\], got \[5\]$"),
    (replaced(7, torch.zeros(8)[::2]), ValueError, "^out_sq_dn: contiguous memory, got a strided view$"),
    (replaced(8, torch.zeros(3)), TypeError, "^mask: uint8 or bool, got float32$"),
    (replaced(8, torch.zeros(4, dtype=torch.uint8)), ValueError, r"^mask: shape \[3\], got \[4\]$"),
    (shared_output, ValueError, "^out_dn: memory of its own, got that of out_ns$"),
    (replaced(3, None), TypeError, "^out_dn: None without a grad_corrupted, got a tensor$"),
    (replaced(5, None), TypeError, "^out_dn: a tensor where there is a grad_corrupted, got None$"),
    (replaced(6, None), TypeError, "^out_sq_dn: None without an out_dn and an out_sq_ns, got a tensor$"),
    (replaced(7, None), TypeError, "^out_sq_dn: a tensor where there are an out_dn and an out_sq_ns, got None$"),
    (replaced(4, None), TypeError, "^out_ns: a tensor .*, got builtins.NoneType$"),
    (replaced(9, torch.zeros(1)), TypeError, "^out_count: int64, got float32$"),
    (replaced(9, torch.zeros(2, dtype=torch.int64)), ValueError, r"^out_count: shape \[1\], got \[2\]$"),
])
def test_wrong_arguments_are_named(native: Native, change: Callable[[list[Any]], None], error: type[Exception],
                                   text: str) -> None:
    arguments: list[Any] = [*torch.zeros(4, 3, 4), *torch.zeros(4, 4), torch.ones(3, dtype=torch.uint8),
                            torch.zeros(1, dtype=torch.int64)]
    change(arguments)
    moved = [a if a is None else a.to(native.device) for a in arguments]
    if change is shared_output:
        moved[5] = moved[4]
    with pytest.raises(error, match=text):
        native.kernels.neuron_attribution(*moved)

"""Masked AdamW: torch's arithmetic on the slices, and not a bit changed anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue import _core

from ..oracles import adamw as oracle
from ..oracles import rounding
from .conftest import Native

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3,
                           "grad_scale": 1.0}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def slices(param: Tensor, index: Tensor, axis: int) -> Tensor:
    """The slices in the layout of the state: slices first."""
    found = param.index_select(axis, index)
    return found.T.contiguous() if axis == 1 else found.contiguous()


class Case:
    """A parameter inside a larger buffer, its gradient, state and some of its rows or columns."""

    def __init__(self, seed: int, shape: tuple[int, ...], axis: int, dtype: torch.dtype, *, compact: bool = False,
                 slices_first: bool = False, transposed: bool = False, master: bool = False, half_grad: bool = True,
                 device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.axis = axis
        self.buffer = normal(*(n + 3 for n in (shape[::-1] if transposed else shape))).to(device, dtype)
        window = self.buffer[tuple(slice(1, 1 + n) for n in (shape[::-1] if transposed else shape))]
        self.param = window.T if transposed else window
        n = int(torch.randint(0, shape[axis] + 1, (), generator=generator))
        self.index = torch.randperm(shape[axis], generator=generator)[:n].sort().values.to(device)
        half = dtype in (torch.bfloat16, torch.float16)
        grad = normal(*shape).to(device, dtype if half_grad or not half else torch.float32)
        self.grad = grad.index_select(axis, self.index) if compact else grad
        if slices_first and axis == 1:  # in memory; the shape stays
            self.grad = self.grad.T.contiguous().T
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        state = slices(self.param, self.index, axis).shape
        self.exp_avg = normal(*state).to(device, self.wide)
        self.exp_avg_sq = normal(*state).square().to(device, self.wide)
        self.master = normal(*state).to(device, torch.float32) if master and half else None

    def arguments(self) -> tuple[Any, ...]:
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.index, self.axis


shapes = st.one_of(st.tuples(st.integers(1, 70)), st.tuples(st.integers(1, 140), st.integers(1, 140)))


@settings(max_examples=120)
@given(seed=st.integers(0, 2**31), shape=shapes, axis=st.integers(0, 1), dtype=st.sampled_from(DTYPES),
       compact=st.booleans(), slices_first=st.booleans(), transposed=st.booleans(), master=st.booleans(),
       half_grad=st.booleans(), step=st.integers(1, 1000), grad_scale=st.sampled_from([1.0, 0.25]))
def test_equals_the_algorithm_and_nothing_else_moves(
        native: Native, seed: int, shape: tuple[int, ...], axis: int, dtype: torch.dtype, compact: bool,
        slices_first: bool, transposed: bool, master: bool, half_grad: bool, step: int, grad_scale: float) -> None:
    case = Case(seed, shape, min(axis, len(shape) - 1), dtype, compact=compact, slices_first=slices_first,
                master=master, half_grad=half_grad, transposed=transposed and len(shape) == 2, device=native.device)
    options = OPTIONS | {"step": step, "grad_scale": grad_scale}
    expected = oracle.masked_adamw(*case.arguments(), **options, master=case.master)
    before, grad = case.buffer.clone(), case.grad.clone()
    native.kernels.masked_adamw(*case.arguments(), **options, master=case.master)

    def close(got: Tensor, want: Tensor) -> None:
        fine = 1e-12 if case.wide == torch.float64 else 2e-6
        torch.testing.assert_close(got.double(), want, rtol=fine, atol=fine)

    close(case.exp_avg, expected["exp_avg"])
    close(case.exp_avg_sq, expected["exp_avg_sq"])
    got = case.param.index_select(case.axis, case.index)
    if case.master is not None:
        close(case.master.T if case.axis == 1 else case.master, expected["slices"])
        assert torch.equal(slices(case.param, case.index, case.axis), case.master.to(dtype))
    elif case.wide == dtype:
        close(got, expected["slices"])
    else:
        rough = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected["slices"], rtol=rough, atol=2e-6)

    # Undo the slices: what is left must be what was there.
    case.param.index_copy_(case.axis, case.index, _window(before, case).index_select(case.axis, case.index))
    assert torch.equal(bits(case.buffer), bits(before))
    assert torch.equal(bits(case.grad), bits(grad))


def _window(buffer: Tensor, case: Case) -> Tensor:
    return buffer.as_strided(case.param.shape, case.param.stride(), case.param.storage_offset())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_equal_torch(native: Native, axis: int, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(7)
    param = torch.randn(40, 50, generator=generator).to(native.device)
    index = torch.tensor([0, 3, 4, 17, 39], device=native.device)
    grads = [torch.randn(40, 50, generator=generator).to(native.device) for _ in range(20)]
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    expected = param.clone()
    expected.index_copy_(axis, index, oracle.torch_steps(param, grads, **options).index_select(axis, index))
    exp_avg = torch.zeros_like(slices(param, index, axis))
    exp_avg_sq = torch.zeros_like(exp_avg)
    for step, grad in enumerate(grads, 1):
        native.kernels.masked_adamw(param, grad, exp_avg, exp_avg_sq, index, axis, lr=3e-3, beta1=0.9, beta2=0.95,
                                    eps=1e-6, weight_decay=weight_decay, step=step, grad_scale=1.0)
    torch.testing.assert_close(param, expected, rtol=2e-6, atol=2e-6)
    untouched = torch.ones(param.shape[axis], dtype=torch.bool)
    untouched[index.cpu()] = False
    rest = untouched.nonzero().ravel().to(native.device)
    assert torch.equal(param.index_select(axis, rest), expected.index_select(axis, rest))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_keeps_what_half_precision_loses(native: Native, axis: int, dtype: torch.dtype) -> None:
    """Twenty steps at a tiny learning rate: with a master as torch in fp32 then rounded, without one nothing moves."""
    generator = torch.Generator().manual_seed(8)
    start = torch.randn(30, 20, generator=generator).to(native.device, dtype)
    grads = [torch.randn(30, 20, generator=generator).abs().to(native.device, dtype) for _ in range(20)]
    index = torch.tensor([1, 2, 19], device=native.device)
    options: dict[str, Any] = {"lr": 2e-6, "weight_decay": 0.0}
    expected = oracle.torch_steps(start.float(), [g.float() for g in grads], **options)
    moved, plain = start.clone(), start.clone()
    master = slices(start, index, axis).float()
    for param, copy in ((moved, master), (plain, None)):
        exp_avg, exp_avg_sq = torch.zeros_like(master), torch.zeros_like(master)
        for step, grad in enumerate(grads, 1):
            native.kernels.masked_adamw(param, grad, exp_avg, exp_avg_sq, index, axis, lr=2e-6, beta1=0.9, beta2=0.999,
                                        eps=1e-8, weight_decay=0.0, step=step, grad_scale=1.0, master=copy)
    torch.testing.assert_close(master, slices(expected, index, axis), rtol=1e-6, atol=1e-8)
    assert torch.equal(slices(moved, index, axis), master.to(dtype))
    away = slices(start, index, axis).float().abs() > 0.1  # near zero half precision is fine enough to move
    assert torch.equal(slices(plain, index, axis)[away], slices(start, index, axis)[away])


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), key=st.integers(0, 2**64 - 1), shape=shapes, axis=st.integers(0, 1),
       slices_first=st.booleans(), transposed=st.booleans(), half_grad=st.booleans())
def test_rounding_at_random_draws_by_place(native: Native, seed: int, key: int, shape: tuple[int, ...], axis: int,
                                           slices_first: bool, transposed: bool, half_grad: bool) -> None:
    """The same step into float32 weights, then the oracle's rounding of every element; nothing else moves."""
    case = Case(seed, shape, min(axis, len(shape) - 1), torch.bfloat16, slices_first=slices_first, half_grad=half_grad,
                transposed=transposed and len(shape) == 2, device=native.device)
    exact = case.param.float()
    native.kernels.masked_adamw(exact, case.grad.float(), case.exp_avg.clone(), case.exp_avg_sq.clone(), case.index,
                                case.axis, **OPTIONS)
    before = case.buffer.clone()
    native.kernels.masked_adamw(*case.arguments(), **OPTIONS, rounding_key=key)
    rows = slices(exact, case.index, case.axis).cpu().reshape(len(case.index), exact.numel() // exact.shape[case.axis])
    expected = [[rounding.rounded(value, rounding.random_bits(key, index, element)) for element, value in enumerate(row)]
                for index, row in zip(case.index.tolist(), rows.tolist(), strict=True)]
    got = slices(case.param, case.index, case.axis).float().cpu().reshape(rows.shape)
    assert torch.equal(got, torch.tensor(expected).reshape(rows.shape))
    case.param.index_copy_(case.axis, case.index, _window(before, case).index_select(case.axis, case.index))
    assert torch.equal(bits(case.buffer), bits(before))


def test_rounding_at_random_is_right_on_average(native: Native) -> None:
    """Steps of a hundredth of the spacing add up without a master, where rounding to nearest loses them all."""
    start = torch.full((40, 500), 1.0, dtype=torch.bfloat16, device=native.device)
    grad = torch.ones_like(start)
    index = torch.arange(40, device=native.device)
    lr, steps = 2.0**-7 / 100, 50
    moved = {}
    for key in (None, 5):
        param, exp_avg = start.clone(), torch.zeros(40, 500, device=native.device)
        exp_avg_sq = torch.zeros_like(exp_avg)
        for step in range(1, steps + 1):
            native.kernels.masked_adamw(param, grad, exp_avg, exp_avg_sq, index, 0, **OPTIONS | {
                "lr": lr, "weight_decay": 0.0, "step": step}, rounding_key=None if key is None else key + step)
        moved[key] = (start - param).float().mean().item() / (lr * steps)
    assert moved[None] == 0.0
    # Below 1 the spacing is 2^-8: a weight moves by one with chance 1/50 a step. 20 000 of them: deviation about 1%.
    assert moved[5] == pytest.approx(1.0, abs=0.05)


def test_special_values_survive_rounding_at_random(native: Native, isa: None) -> None:
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[None].to(native.device)
    index = torch.zeros(1, dtype=torch.int64, device=native.device)
    for name in _core.isas() if native.device == "cpu" else [""]:
        if name:
            _core.set_isa(name)
        param, state = every.clone(), torch.zeros(every.shape, device=native.device)
        native.kernels.masked_adamw(param, torch.zeros_like(every), state, state.clone(), index, 0,
                                    **OPTIONS | {"lr": 0.0}, rounding_key=2**64 - 1)
        nan = every.isnan()
        assert torch.equal(param.isnan(), nan)
        assert torch.equal(bits(param)[~nan], bits(every)[~nan])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_instruction_sets_give_the_same_bits(axis: int, dtype: torch.dtype, threads: None,
                                                         isa: None) -> None:
    found = []
    for name in _core.isas():
        _core.set_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            case = Case(9, (600, 500), axis, dtype, master=True)
            assert len(case.index) > 100  # enough for several threads
            _core.masked_adamw(*case.arguments(), **OPTIONS, master=case.master)
            found.append([case.buffer, case.exp_avg, case.exp_avg_sq])
            if dtype == torch.bfloat16:
                case = Case(9, (600, 500), axis, dtype)
                _core.masked_adamw(*case.arguments(), **OPTIONS, rounding_key=11)
                found[-1] += [case.buffer, case.exp_avg]
    for other in found[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_torch_does(native: Native, dtype: torch.dtype, isa: None) -> None:
    generator = torch.Generator().manual_seed(10)
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    random = torch.randint(-2**31, 2**31, (2**17,), generator=generator, dtype=torch.int64).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, 2**-24, 2**-25, 2**-25 * 1.0001, 2**-14, 1e-45, 3.4e38])
    between = (every[:-1] + every[1:]) / 2  # the ties
    values = torch.cat([every, random.view(torch.float32), edges, between])[None].to(native.device)
    index = torch.zeros(1, dtype=torch.int64, device=native.device)
    for name in _core.isas() if native.device == "cpu" else [""]:
        if name:
            _core.set_isa(name)
        param, grad = torch.zeros_like(values, dtype=dtype), torch.zeros_like(values, dtype=dtype)
        state = torch.zeros_like(values)
        native.kernels.masked_adamw(param, grad, state, state.clone(), index, 0, master=values.clone(),
                                    **OPTIONS | {"lr": 0.0})
        expected = values.to(dtype)
        nan = expected.isnan()
        assert torch.equal(param.isnan(), nan)
        assert torch.equal(bits(param)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize(("changes", "error", "text"), [
    ({"param": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "^param: bfloat16, float16, float32 or float64, got"),
    ({"param": torch.zeros(3, 1).expand(3, 4)}, ValueError, "^param: memory for every element, got an expanded view$"),
    ({"param": torch.zeros(3), "axis": 1}, ValueError, "^axis: 0 for a param of one dimension, got 1$"),
    ({"axis": 2}, ValueError, r"^axis: 0 \(rows\) or 1 \(columns\), got 2$"),
    ({"grad": torch.zeros(3, 5)}, ValueError,
     r"^grad: shape \[3, 4\] or, on the slices alone, \[2, 4\], got \[3, 5\]$"),
    ({"grad": torch.zeros(3, 4).double()}, TypeError, "^grad: float32 as param, got float64$"),
    ({"exp_avg": torch.zeros(4, 2)}, ValueError, r"^exp_avg: shape \[2, 4\], got \[4, 2\]$"),
    ({"exp_avg": torch.zeros(4, 2).T}, ValueError, "^exp_avg: contiguous memory, got a strided view$"),
    ({"exp_avg_sq": torch.zeros(2, 4).bfloat16()}, TypeError, "^exp_avg_sq: float32, got bfloat16$"),
    ({"index": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "^index: int64, got another$"),
    ({"master": torch.zeros(2, 4)}, TypeError, r"^master: None for a param in float32, got \S+$"),
    ({"rounding_key": 1}, TypeError, "^rounding_key: None for a param in float32, got a key$"),
    ({"param": torch.zeros(3, 4).bfloat16(), "master": torch.zeros(2, 4), "rounding_key": 1}, ValueError,
     "^rounding_key: None for a param with a master, which loses nothing, got a key$"),
    ({"lr": -1.0}, ValueError, "^lr: a number of at least 0, got -1"),
    ({"beta1": 1.0}, ValueError, r"^beta1: a number in \[0, 1\), got 1"),
    ({"eps": float("nan")}, ValueError, "^eps: a number of at least 0, got nan$"),
    ({"step": 0}, ValueError, "^step: a number of at least 1, got 0$"),
])
def test_wrong_arguments_are_named(native: Native, changes: dict[str, Any], error: type[Exception],
                                   text: str) -> None:
    arguments: dict[str, Any] = {"param": torch.zeros(3, 4), "grad": torch.zeros(3, 4), "exp_avg": torch.zeros(2, 4),
                                 "exp_avg_sq": torch.zeros(2, 4), "index": torch.tensor([0, 2]), "axis": 0,
                                 **OPTIONS, **changes}
    moved = {name: a.to(native.device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    if "expand" in text:
        moved["param"] = torch.zeros(3, 1, device=native.device).expand(3, 4)
    with pytest.raises(error, match=text):
        native.kernels.masked_adamw(**moved)


@pytest.mark.parametrize("index", [[2, 0], [1, 1], [-1, 0], [0, 3]])
def test_a_wrong_index_changes_nothing(index: list[int]) -> None:
    param, state = torch.ones(3, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match="^index: sorted unique numbers from 0 to 2, got -?[0-9]+ at position [01]$"):
        _core.masked_adamw(param, torch.ones(3, 4), state, state.clone(), torch.tensor(index), 0, **OPTIONS)
    assert torch.equal(param, torch.ones(3, 4)) and torch.equal(state, torch.ones(2, 4))


def test_shared_memory_is_refused(native: Native) -> None:
    param, state = torch.zeros(3, 4, device=native.device), torch.zeros(2, 4, device=native.device)
    index = torch.tensor([0, 2], device=native.device)
    with pytest.raises(ValueError, match="^exp_avg_sq: memory of its own, got that of exp_avg$"):
        native.kernels.masked_adamw(param, param.clone(), state, state, index, 0, **OPTIONS)
    with pytest.raises(ValueError, match="^grad: memory of its own, got that of param$"):
        native.kernels.masked_adamw(param, param, state, state.clone(), index, 0, **OPTIONS)

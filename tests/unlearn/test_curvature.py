"""Curvature factors: exact ones as the algebra says, sketched ones as the exact ones cut to their largest eigenvalues."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clue.data.encoding import Batch
from clue.errors import ClueError
from clue.types import Role
from clue.unlearn import RetainMetric
from clue.unlearn.curvature import DenseInverse, Factor, LowRankInverse

DAMPING = 0.1


def tokens(count: int, width: int, decay: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vectors whose curvature has eigenvalues that fall as decay^(2 k)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return torch.from_numpy(rng.normal(size=(count, width)) * decay ** np.arange(width) @ basis.T).to(dtype)


def expected(vectors: Tensor, rank: int | None = None) -> np.ndarray:
    """The damped inverse by the eigenvalues of the whole factor, those beyond the rank taken as zero."""
    factor = (vectors.T @ vectors).double().numpy()
    values, basis = np.linalg.eigh(factor)
    if rank is not None:
        values[: max(0, len(values) - rank)] = 0
    scale = factor.diagonal().mean()
    return (basis / (values / (scale * DAMPING) + 1)) @ basis.T


def matrix_of(inverse: Any, width: int) -> np.ndarray:
    left = inverse.apply(torch.eye(width, dtype=torch.float64), left=True).double().numpy()
    right = inverse.apply(torch.eye(width, dtype=torch.float64), left=False).double().numpy()
    np.testing.assert_allclose(left, right, atol=1e-6)
    return left


@pytest.mark.parametrize("index", [None, [0, 3, 4, 17]])
def test_up_to_the_width_it_is_exact(index: list[int] | None) -> None:
    vectors = tokens(50, 20, 0.9)
    factor = Factor(None if index is None else torch.tensor(index), exact_width=20)
    assert not factor.met
    for part in vectors.split(7):
        factor.add(part)
    found = factor.inverse(DAMPING)
    assert isinstance(found, DenseInverse) and factor.met
    chosen = vectors if index is None else vectors[:, index]
    np.testing.assert_allclose(matrix_of(found, chosen.shape[1]), expected(chosen), rtol=1e-10, atol=1e-12)
    assert factor.inverse(DAMPING) is found


@pytest.mark.parametrize(("dtype", "fine"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("count", [5, 12, 60])
def test_a_sketch_of_full_rank_loses_nothing(count: int, dtype: torch.dtype, fine: float) -> None:
    """The rank reaches what the tokens span: fewer tokens than the rank, as many, or a rank of the whole width."""
    rank = 40 if count == 60 else 12
    vectors = tokens(count, 40, 0.95, dtype=dtype)
    factor = Factor(None, exact_width=0, rank=rank)
    for part in vectors.split(4):
        factor.add(part)
    found = factor.inverse(DAMPING)
    assert isinstance(found, LowRankInverse)
    np.testing.assert_allclose(matrix_of(found, 40), expected(vectors), atol=fine)


@pytest.mark.parametrize("decay", [0.6, 0.8])
def test_a_sketch_keeps_the_largest_eigenvalues(decay: float) -> None:
    vectors = tokens(400, 60, decay, dtype=torch.float32)
    factor = Factor(None, exact_width=59, rank=16)
    for part in vectors.split(50):
        factor.add(part)
    found = factor.inverse(DAMPING)
    assert found is not None and sum(t.nbytes for t in found.tensors()) == 60 * 16 * 4 + 16 * 4
    got, best = matrix_of(found, 60), expected(vectors, 16)
    # Where the eigenvalues fall fast the sketch is as good as the exact decomposition cut to the same rank.
    assert np.abs(got - best).max() < (1e-3 if decay == 0.6 else 0.05)
    values = np.linalg.eigvalsh(got)
    assert values.min() > 0 and values.max() <= 1 + 1e-6


def test_the_least_of_the_eigenvalues_kept_is_as_good_as_the_others() -> None:
    """A sketch no wider than the rank is 2% off there."""
    vectors = tokens(400, 60, 0.6)
    factor = Factor(None, exact_width=59, rank=6)
    factor.add(vectors)
    found = factor.inverse(DAMPING)
    assert isinstance(found, LowRankInverse)
    values = torch.linalg.eigvalsh(vectors.T @ vectors).flip(0)[:6]
    absolute = DAMPING * float((vectors.T @ vectors).diagonal().mean())
    torch.testing.assert_close(found.shrink, values / (values + absolute), rtol=1e-4, atol=0)


@pytest.mark.parametrize("exact_width", [0, 100])
def test_a_step_in_half_precision_is_computed_in_the_factors_own(exact_width: int) -> None:
    factor = Factor(None, exact_width=exact_width, rank=4)
    factor.add(tokens(30, 12, 0.8, dtype=torch.float32))
    inverse, step = factor.inverse(DAMPING), torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert inverse is not None
    for left in (True, False):
        torch.testing.assert_close(inverse.apply(step, left=left), inverse.apply(step.float(), left=left), rtol=0, atol=0)


def test_equal_tokens_give_equal_bits() -> None:
    vectors = tokens(30, 24, 0.8, dtype=torch.float32)
    found = []
    for _ in range(2):
        factor = Factor(None, exact_width=8, rank=6)
        factor.add(vectors)
        found.append(factor.inverse(DAMPING))
    first, second = found
    assert isinstance(first, LowRankInverse) and isinstance(second, LowRankInverse)
    assert torch.equal(first.vectors, second.vectors) and torch.equal(first.shrink, second.shrink)


@pytest.mark.parametrize("exact_width", [0, 100])
def test_zero_curvature_changes_nothing(exact_width: int) -> None:
    factor = Factor(None, exact_width=exact_width, rank=3)
    factor.add(torch.zeros(4, 10))
    assert factor.met and factor.inverse(DAMPING) is None and factor.met


@pytest.mark.parametrize("exact_width", [0, 100])
def test_the_sum_is_freed_when_the_inverse_is_made(exact_width: int) -> None:
    factor = Factor(None, exact_width=exact_width, rank=3)
    factor.add(torch.ones(4, 10))
    total = weakref.ref(factor._total)
    factor.inverse(DAMPING)
    assert total() is None


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(ClueError, match="exact_width = -1 must not be negative, and rank = 3 must be at least 1"):
        Factor(None, exact_width=-1, rank=3)
    with pytest.raises(ClueError, match="rank = 0"):
        Factor(None, rank=0)


def test_a_metric_of_sketches_steps_as_the_exact_one(make_model: Any, make_plan: Any) -> None:
    """Biases, rows and columns, shared inputs: with a rank that reaches every eigenvalue nothing changes but memory."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    batches = [Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
               for ids in (torch.randint(0, 40, (2, 9), generator=generator) for _ in range(3))]
    layer = "model.layers.0"
    plan = make_plan(model, {f"{layer}.self_attn.q_proj.weight": (0, {Role.CONFLICT: [0, 3, 5]}),
                             f"{layer}.self_attn.k_proj.weight": (0, {Role.FORGET: [1, 2]}),
                             f"{layer}.mlp.down_proj.weight": (1, {Role.CONFLICT: [2, 4]})})
    exact = RetainMetric.measure(model, plan, batches, damping=DAMPING)
    sketched = RetainMetric.measure(model, plan, batches, damping=DAMPING, exact_width=8, rank=32)
    rough = RetainMetric.measure(model, plan, batches, damping=DAMPING, exact_width=8, rank=4)
    assert rough.bytes() < exact.bytes()
    for name, shape in ((f"{layer}.self_attn.q_proj.weight", (3, 32)), (f"{layer}.self_attn.k_proj.weight", (2, 32)),
                        (f"{layer}.mlp.down_proj.weight", (32, 2))):
        g = torch.randn(*shape, generator=generator)
        step = exact.precondition(name, g)
        torch.testing.assert_close(sketched.precondition(name, g), step, rtol=1e-3, atol=1e-4 * float(g.abs().max()))
        cut = rough.precondition(name, g)
        assert not torch.allclose(cut, step, rtol=1e-3) and float(cut.norm()) > float(step.norm())
    with pytest.raises(ClueError, match="rank = 0"):
        RetainMetric.measure(model, plan, batches, damping=DAMPING, rank=0)

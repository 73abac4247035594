"""SparseGradients of experts: any routing and any slices, whatever implementation of the experts runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from clue.plan import Plan, Slice
from clue.types import Role
from clue.unlearn import SparseGradients
from tests.families import tiny
from tests.oracles.sparse import slice_gradients
from tests.unlearn.test_sparse import IDS, assert_equal, both, checkpointing, oracle, random_plan, sparse_gradients


@settings(max_examples=40)
@given(st.data())
def test_any_routing_and_any_slices(data: st.DataObject) -> None:
    """Rows and columns of both matrices of some experts, some of them with no token at all; in float32 to 1e-6. What the
    experts write has the same bits, and the input and the routing weights get the gradients of autograd."""
    count, width, d, batch, seq = (data.draw(st.integers(2, 4)) for _ in range(5))
    top_k = data.draw(st.integers(1, count))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    config = MixtralConfig(hidden_size=d, intermediate_size=width, num_local_experts=count)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(experts)
    slices, shapes = [], {}
    for kind in ("gate_up_proj", "down_proj"):
        for number in range(count):
            axis = data.draw(st.sampled_from([None, 0, 1]))
            if axis is None:
                continue
            name, shape = f"0.{kind}[{number}]", tuple(getattr(experts, kind).shape[1:])
            roles = data.draw(st.lists(st.sampled_from([None, Role.FORGET, Role.CONFLICT]), min_size=shape[axis],
                                       max_size=shape[axis]))
            for role in (Role.FORGET, Role.CONFLICT):
                if chosen := [i for i, r in enumerate(roles) if r == role]:
                    slices.append(Slice(name, axis, role, np.array(chosen)))
                    shapes[name] = shape
    if not slices:
        slices, shapes = [Slice("0.down_proj[0]", 1, Role.CONFLICT, np.array([0]))], {"0.down_proj[0]": (d, width)}
    plan = Plan(("n",), np.array([Role.CONFLICT], dtype=np.uint8), tuple(slices), shapes)
    x, weights = torch.randn(batch * seq, d), torch.rand(batch * seq, top_k)
    index = torch.stack([torch.randperm(count)[:top_k] for _ in range(batch * seq)])
    factor = torch.randn(batch * seq, d) / 8
    forget = data.draw(st.integers(1, batch - 1))

    def loss(rows: slice) -> Tensor:
        return (experts(x[rows], index[rows], weights[rows]) * factor[rows]).sum()

    expected = slice_gradients(model, plan, lambda: loss(slice(0, forget * seq)), lambda: loss(slice(forget * seq, None)))
    given_ = [tensor.clone().requires_grad_() for tensor in (x, weights)]
    plain = experts(given_[0], index, given_[1])
    (plain * factor).sum().backward()
    experts.zero_grad()
    with SparseGradients(model, plan) as sparse:
        assert not sparse.dense
        for needs_grad in (False, True):
            sparse.split(forget=forget, retain=batch - forget, seq=seq)
            again = [tensor.clone().requires_grad_(needs_grad) for tensor in (x, weights)]
            got = experts(again[0], index, top_k_weights=again[1])
            assert torch.equal(got, plain)
            (got * factor).sum().backward()
            for mine, reference in zip(again, given_, strict=True):
                if needs_grad:
                    torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-6)
            taken = sparse.take()
            assert all(p.grad is None for p in experts.parameters())
            for name, (f, r) in expected.items():
                for part, reference in ((taken[name].forget, f), (taken[name].retain, r)):
                    assert (part is None) == (reference is None)
                    if part is not None:
                        scale = max(1.0, float(reference.abs().max()))
                        torch.testing.assert_close(part, reference, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_with_activation_checkpointing(implementation: str) -> None:
    model = tiny("qwen3_moe", torch.float32, experts_implementation=implementation)
    plan = random_plan(model)
    expected = oracle(model, plan)
    checkpointing(model)
    assert_equal(sparse_gradients(model, plan), expected, 1e-5)


def test_tokens_of_other_processes_experts_are_passed_over() -> None:
    """Expert parallelism gives them the number after the last expert, which the eager forward leaves out too."""
    model = tiny("mixtral", torch.float32)
    experts = model.model.layers[1].mlp.experts
    last = len(experts.down_proj)
    name = "model.layers.1.mlp.experts.down_proj[3]"
    plan = Plan((), np.zeros(0, dtype=np.uint8), (Slice(name, 0, Role.FORGET, np.array([1, 4])),),
                {name: tuple(experts.down_proj.shape[1:])})
    x, weights = torch.randn(5, 16), torch.rand(5, 2)
    index = torch.tensor([[0, last], [1, 3], [last, last], [3, 0], [last, 1]])
    plain = x.clone().requires_grad_()
    experts(plain, index, weights).square().sum().backward()
    expected = experts.down_proj.grad[3, [1, 4]]
    model.zero_grad()
    with SparseGradients(model, plan) as sparse:
        sparse.split(forget=5, retain=0, seq=1)
        again = x.clone().requires_grad_()
        experts(again, index, weights).square().sum().backward()
        torch.testing.assert_close(sparse.take()[name].forget, expected)
        torch.testing.assert_close(again.grad, plain.grad)


def test_a_pass_keeps_no_activations_of_experts() -> None:
    """Between forward and backward: the input and the routing, and no expert's hidden units."""
    model = tiny("mixtral", torch.float32)
    experts = model.model.layers[1].mlp.experts
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    x, index = torch.randn(10, 16, requires_grad=True), torch.tensor([[0, 1]] * 6 + [[2, 3]] * 4)
    with SparseGradients(model, random_plan(model)) as sparse, \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse.split(forget=1, retain=1, seq=5)
        experts(x, index, torch.rand(10, 2))
    assert sorted(sizes) == [(10, 2), (10, 2), (10, 16)]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    """bf16 weights, or bf16 autocast over float32 ones: float32 gradients, no worse than those of dense passes."""
    model = tiny("mixtral", torch.float32)
    plan = random_plan(model)

    def run(m: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return both(m)

    exact = slice_gradients(model, plan, lambda: both(model), lambda: both(model))
    model = model if autocast else model.to(torch.bfloat16)
    peer = slice_gradients(model, plan, lambda: run(model), lambda: run(model))
    with SparseGradients(model, plan) as sparse:
        sparse.split(forget=len(IDS), retain=0, seq=IDS.shape[1])
        run(model).backward()
        got = sparse.take()
    for name, (reference, _) in exact.items():
        assert got[name].forget.dtype == torch.float32
        error, other = (float((part - reference).norm()) for part in (got[name].forget, peer[name][0].float()))
        assert error < max(0.05 * float(reference.norm()), 1.2 * other), name

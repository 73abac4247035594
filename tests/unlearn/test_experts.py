"""Unlearning a mixture of experts: planned rows and columns of single experts move, and not a bit of anything else."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clue.circuit.attribution import graph_of
from clue.config import DataSettings, UnlearnSettings
from clue.model.anatomy import anatomy
from clue.pipeline import make_plan as plan_of
from clue.plan import Plan, verify
from clue.types import NodeKind, Role
from clue.unlearn import MaskedAdamW, PlanCallback, RetainMetric, unlearn
from clue.weights import parameter_of, view_of
from tests.families import tiny
from tests.unlearn.test_retain_metric import dense

IDS = torch.tensor([[1, 5, 7, 9, 4, 3, 2, 11], [1, 8, 6, 12, 3, 10, 9, 2]])


def expert_plan(model: Any) -> Plan:
    """Units of two experts (and of the shared one) of layer 1 in both roles, and one head; two experts stay whole."""
    body = anatomy(model)
    graph = graph_of(body)
    role = np.full(graph.n_nodes, Role.FREE)
    units = {0: Role.FORGET, 3: Role.CONFLICT, 4: Role.CONFLICT, 16: Role.CONFLICT, 23: Role.FORGET}
    if body.d_mlp > 32:
        units |= {32: Role.CONFLICT, 43: Role.FORGET}
    for unit, chosen in units.items():
        role[graph.node(NodeKind.NEURON, 1, unit)] = chosen
    role[graph.node(NodeKind.Q, 0, 2)] = Role.CONFLICT
    return plan_of(body, graph, SimpleNamespace(role=role), {})


def changed(model: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bool, per parameter: which bits moved."""
    return {name: p.detach().view(torch.int32) != before[name].view(torch.int32) for name, p in model.named_parameters()}


def assert_only_planned(moved: dict[str, torch.Tensor], plan: Plan, reached: float = 1.0) -> None:
    for name in plan.parameters():
        part, mask = view_of(moved[parameter_of(name)], name), torch.from_numpy(plan.mask(name))
        assert part[mask].float().mean() >= reached, name
        part &= ~mask
    assert not any(part.any() for part in moved.values())


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("stages", ["two", "joint"])
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_unlearning_moves_planned_units_only(name: str, stages: str, as_on_the_hub: bool, sets: Any, tokenizer: Any,
                                             tmp_path: Path) -> None:
    model = tiny(name, torch.float32, vocab_size=40, max_position_embeddings=64, experts_implementation="grouped_mm")
    plan = expert_plan(model)
    plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    before = copies(model)
    model.save_pretrained(tmp_path / "before", save_original_format=as_on_the_hub)
    retain = {"retain": sets["retain"]}
    log = unlearn(model, tokenizer, sets["forget"], retain, plan,
                  UnlearnSettings(objective="npo", stages=stages, steps=6, batch_size=3, lr=1e-2, weight_decay=0.1,
                                  warmup=0, metric=True), data=DataSettings(append_eos=False))
    assert log.steps > 1
    assert_only_planned(changed(model, before), plan, reached=0.9)
    model.save_pretrained(tmp_path / "after")
    found = verify(tmp_path / "before", tmp_path / "after", plan)
    assert found.ok
    assert 0.9 * found.planned <= found.changed <= found.planned == plan.weights_changed


def test_verify_finds_one_bit_of_an_expert(tmp_path: Path) -> None:
    model = tiny("mixtral", torch.bfloat16)
    plan = expert_plan(model)
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        down = model.model.layers[1].mlp.experts.down_proj
        down[0, 3, 0] += 1  # column 0 of expert 0 is planned
        down[1, 3, 0] += 1  # expert 1 is not
        model.model.layers[1].mlp.gate.weight[2, 1] += 1
    model.save_pretrained(tmp_path / "after")
    found = verify(tmp_path / "before", tmp_path / "after", plan)
    assert found.changed == 1
    assert found.outside == (("model.layers.1.mlp.experts.down_proj[1]", 1), ("model.layers.1.mlp.gate.weight", 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_that_of_a_matrix_alone(dtype: torch.dtype) -> None:
    """Every planned expert gets what the optimizer gives the same matrix as a parameter of its own, saved in between."""
    model = tiny("mixtral", dtype)
    plan = expert_plan(model)
    optimizer = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
    experts = model.model.layers[1].mlp.experts
    lone = torch.nn.Module()
    parts = [name for name in plan.parameters() if name.endswith("]")]
    for number, name in enumerate(parts):
        lone.register_parameter(f"p{number}", torch.nn.Parameter(view_of(getattr(experts, parameter_of(name).rpartition(
            ".")[2]).detach(), name).clone()))
    renamed = {name: f"p{number}" for number, name in enumerate(parts)}
    slices = tuple(type(s)(renamed[s.parameter], s.axis, s.role, s.index) for s in plan.slices if s.parameter in renamed)
    own = Plan(("n",), np.array([Role.CONFLICT], np.uint8), slices, {renamed[name]: plan.shapes[name] for name in parts})
    reference = MaskedAdamW(lone, own, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        for name in parts:
            stack = getattr(experts, parameter_of(name).rpartition(".")[2])
            getattr(lone, renamed[name]).grad = view_of(stack.grad, name).clone()
        if step == 2:  # into a fresh optimizer
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
            optimizer.load_state_dict(saved)
        optimizer.step()
        reference.step()
    for name in parts:
        stack = getattr(experts, parameter_of(name).rpartition(".")[2])
        assert torch.equal(view_of(stack, name), getattr(lone, renamed[name]))


def test_the_callback_keeps_whole_experts_and_the_rest_of_planned_ones() -> None:
    model = tiny("qwen2_moe", torch.float32)
    plan = expert_plan(model)
    before = copies(model)
    callback = PlanCallback(plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        planned = [view_of(dict(model.named_parameters())[parameter_of(n)].grad, n)[torch.from_numpy(plan.mask(n))]
                   for n in plan.parameters()]
        torch.testing.assert_close(norm, torch.cat(planned).norm())  # clipping counts planned weights only
        optimizer.step()
        callback.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
    assert_only_planned(changed(model, before), plan)
    callback.on_train_end(None, None, None)


def test_the_retain_metric_of_an_expert_matches_the_dense_solve() -> None:
    """A and G over the tokens routed to the expert, each token's gradient at the two linear maps from autograd alone."""
    from clue.data.encoding import Batch

    model = tiny("mixtral")
    plan = expert_plan(model)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    batch = Batch(input_ids=IDS, attention_mask=mask, labels=torch.where(mask.bool(), IDS, -100))
    metric = RetainMetric.measure(model, plan, [batch], damping=0.3, roles=(Role.CONFLICT,))
    module = model.model.layers[1].mlp.experts
    taps: dict[int, dict[str, torch.Tensor]] = {}

    def by_hand(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' forward once more, every token through every expert, keeping what passes through the two maps."""
        total = torch.zeros_like(x)
        for number in range(4):
            both = x @ module.gate_up_proj[number].T
            both.retain_grad()
            hidden = module.act_fn(both[:, :8]) * both[:, 8:]
            written = hidden @ module.down_proj[number].T
            written.retain_grad()
            used = ((index == number).any(1) & mask.bool().ravel()).nonzero()[:, 0]
            taps[number] = {"x": x, "both": both, "hidden": hidden, "written": written, "used": used}
            total = total + (weights * (index == number)).sum(1, keepdim=True) * written
        return total

    module.forward = by_hand
    logits = model(input_ids=IDS, attention_mask=mask).logits.log_softmax(-1)
    loss = -(logits[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0] * mask[:, 1:]).sum()
    loss.backward()
    checked = 0
    for s in plan.of_role(Role.CONFLICT):
        if not s.parameter.endswith("]"):
            continue
        seen = taps[int(s.parameter[-2])]
        used = seen["used"]
        assert len(used) > 2
        inputs, outputs = (("x", "both") if "gate_up" in s.parameter else ("hidden", "written"))
        a, g = seen[inputs].detach()[used].numpy(), seen[outputs].grad[used].numpy()
        a, g = (a, g[:, s.index]) if s.axis == 0 else (a[:, s.index], g)
        step = np.random.default_rng(0).normal(size=(g.shape[1], a.shape[1]))
        got = metric.precondition(s.parameter, torch.from_numpy(step)).numpy()
        np.testing.assert_allclose(got, dense(a, g, step), rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked == 4

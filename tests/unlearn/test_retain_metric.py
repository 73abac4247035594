"""RetainMetric against a dense Kronecker solve written out in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clue.circuit.attribution import graph_of
from clue.data.encoding import Batch
from clue.errors import ModelError, PlanError
from clue.model.anatomy import anatomy
from clue.pipeline import make_plan as plan_of
from clue.types import Role
from clue.unlearn import MaskedAdamW, RetainMetric
from clue.unlearn.optimizer import planned_index
from clue.weights import parameter_of, view_of
from tests.families import VARIANTS, tiny

DAMPING = 0.3


class TwoLayers(nn.Module):
    """logits = W2 tanh(W1 e + b): small enough to differentiate by hand. With ``transposed``, both weights are kept so."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.first: Any = nn.Linear(4, 5)
        self.second: Any = nn.Linear(5, 9, bias=False)
        if transposed:
            for name, linear in (("first", self.first), ("second", self.second)):
                same = Conv1D(linear.out_features, linear.in_features)
                same.weight.data.copy_(linear.weight.data.T)
                same.bias.data.copy_(0 * same.bias if linear.bias is None else linear.bias.data)
                setattr(self, name, same)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.second(torch.tanh(self.first(self.embed(input_ids)))))


def two_batches() -> list[Batch]:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
    first = Batch(input_ids=ids, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), labels=labels)
    last = Batch(input_ids=ids[:1, :3], attention_mask=torch.ones(1, 3, dtype=torch.int64), labels=labels[:1, :3])
    return [first, last]


def tokens_by_hand(model: TwoLayers) -> dict[str, np.ndarray]:
    """Inputs and output gradients of both layers, [unpadded tokens, channels], by the chain rule."""
    found: dict[str, list[np.ndarray]] = {"x": [], "dy": [], "h": [], "dz": []}
    e, w1, b, w2 = (p.detach().double().numpy() for p in
                    (model.embed.weight, model.first.weight, model.first.bias, model.second.weight))
    if isinstance(model.first, Conv1D):
        w1, w2 = w1.T, w2.T
    for batch in two_batches():
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            for t in range(int(mask.sum())):
                x = e[ids[t]]
                h = np.tanh(w1 @ x + b)
                z = w2 @ h
                dz = np.zeros(9)
                if t + 1 < len(ids) and labels[t + 1] != -100:
                    dz = np.exp(z) / np.exp(z).sum()
                    dz[labels[t + 1]] -= 1
                for key, value in (("x", x), ("h", h), ("dz", dz), ("dy", (w2.T @ dz) * (1 - h**2))):
                    found[key].append(value)
    return {key: np.stack(values) for key, values in found.items()}


def dense(x: np.ndarray, dy: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Solve (A (x) G) step = g with the whole Kronecker product as one matrix (column-major vec)."""
    a, c = x.T @ x / len(x), dy.T @ dy / len(dy)
    left = c / np.diag(c).mean() / DAMPING + np.eye(len(c))
    right = a / np.diag(a).mean() / DAMPING + np.eye(len(a))
    return np.linalg.solve(np.kron(right.T, left), g.flatten(order="F")).reshape(g.shape, order="F")


@pytest.mark.parametrize("roles", [(Role.CONFLICT,), (Role.FORGET, Role.CONFLICT)])
def test_rows_columns_and_bias_match_the_dense_solve(make_plan: Any, roles: tuple[Role, ...]) -> None:
    model = TwoLayers().train()
    rows, columns = [0, 2, 3], [1, 4]
    plan = make_plan(model, {"first.weight": (0, {Role.CONFLICT: rows, Role.FORGET: [4]}),
                             "first.bias": (0, {Role.CONFLICT: rows, Role.FORGET: [4]}),
                             "second.weight": (1, {Role.CONFLICT: columns, Role.FORGET: [0]})})
    metric = RetainMetric.measure(model, plan, two_batches(), damping=DAMPING, roles=roles)
    if Role.FORGET in roles:  # slices of both roles are one block of the curvature
        rows, columns = [0, 2, 3, 4], [0, 1, 4]
    hand = tokens_by_hand(model)
    generator = np.random.default_rng(0)
    ones = np.ones((len(hand["x"]), 1))
    for name, x, dy in (("first.weight", hand["x"], hand["dy"][:, rows]), ("first.bias", ones, hand["dy"][:, rows]),
                        ("second.weight", hand["h"][:, columns], hand["dz"])):
        g = generator.normal(size=(dy.shape[1], x.shape[1]))
        shape = (len(rows),) if name == "first.bias" else g.shape
        step = metric.precondition(name, torch.from_numpy(g.reshape(shape)).float())
        assert step.shape == shape and step.dtype == torch.float32
        np.testing.assert_allclose(step.numpy().reshape(g.shape), dense(x, dy, g), rtol=2e-5, atol=1e-6)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_transposed_weights_match_the_dense_solve(make_plan: Any) -> None:
    """Conv1D keeps W as [d_in, d_out]: planned outputs are columns of it, planned inputs are rows."""
    model = TwoLayers(transposed=True)
    outputs, inputs = [0, 2, 3], [1, 4]
    plan = make_plan(model, {"first.weight": (1, {Role.CONFLICT: outputs}), "first.bias": (0, {Role.CONFLICT: outputs}),
                             "second.weight": (0, {Role.CONFLICT: inputs})})
    metric = RetainMetric.measure(model, plan, two_batches(), damping=DAMPING)
    hand = tokens_by_hand(model)
    generator = np.random.default_rng(0)
    ones = np.ones((len(hand["x"]), 1))
    for name, x, dy in (("first.weight", hand["x"], hand["dy"][:, outputs]), ("first.bias", ones, hand["dy"][:, outputs]),
                        ("second.weight", hand["h"][:, inputs], hand["dz"])):
        g = generator.normal(size=(dy.shape[1], x.shape[1]))
        stored = g.ravel() if name == "first.bias" else g.T.copy()
        step = metric.precondition(name, torch.from_numpy(stored).float()).numpy()
        assert step.shape == stored.shape
        np.testing.assert_allclose(step.reshape(g.shape) if step.ndim == 1 else step.T, dense(x, dy, g), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_can_be_measured_and_trained(name: str) -> None:
    """Fused, transposed and flattened layers included: the metric covers every planned weight, and a step moves them all
    and nothing else."""
    body = anatomy(tiny(name, torch.float32))
    graph = graph_of(body)
    role = np.random.default_rng(0).choice([Role.CONFLICT, Role.FORGET, Role.FREE], graph.n_nodes)
    plan = plan_of(body, graph, SimpleNamespace(role=role), {})
    ids = torch.tensor([[1, 5, 7, 9, 4, 3], [1, 8, 6, 12, 3, 0]])
    mask = (ids != 0).long()
    batch = Batch(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100))
    metric = RetainMetric.measure(body.model, plan, [batch], damping=DAMPING)
    before = {parameter: value.detach().clone() for parameter, value in body.model.named_parameters()}
    optimizer = MaskedAdamW(body.model, plan, lr=1e-2)
    body.model(input_ids=ids, attention_mask=mask, labels=batch.labels).loss.backward()
    parameters = dict(body.model.named_parameters())
    for name in plan.parameters():
        axis, index = planned_index(plan, name, (Role.FORGET, Role.CONFLICT))
        gradient = view_of(parameters[parameter_of(name)].grad, name).index_select(axis, torch.from_numpy(index))
        step = metric.precondition(name, gradient)
        assert step.shape == gradient.shape
        assert torch.isfinite(step).all()
        if gradient.abs().max() > 1e-6:  # OPT's silent ReLU units have none
            assert (step - gradient).abs().max() > 1e-3 * gradient.abs().max()
    optimizer.step()
    changed = {parameter: (value.detach() != before[parameter]) for parameter, value in body.model.named_parameters()}
    for name in plan.parameters():
        part, mask = view_of(changed[parameter_of(name)], name), torch.from_numpy(plan.mask(name))
        reached = view_of(parameters[parameter_of(name)].grad, name)[mask].any()  # not so an expert without tokens
        assert part[mask].any() == reached
        part &= ~mask
    assert not any(part.any() for part in changed.values())


def test_shared_inputs_give_what_each_layer_alone_would(make_model: Any, make_plan: Any) -> None:
    # q, k and v read one tensor, and so do gate and up: the factor is accumulated once and must not mix layers.
    model = make_model()
    names = [f"model.layers.{layer}.{part}.weight" for layer in (0, 1)
             for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")]
    generator = torch.Generator().manual_seed(0)
    batches = [Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
               for ids in (torch.randint(0, 40, (2, 9), generator=generator) for _ in range(2))]
    together = make_plan(model, {name: (0, {Role.CONFLICT: [0, 3, 5]}) for name in names})
    metric = RetainMetric.measure(model, together, batches, damping=DAMPING)
    g = torch.randn(3, 32, generator=generator)
    for name in names:
        alone = make_plan(model, {name: (0, {Role.CONFLICT: [0, 3, 5]})})
        expected = RetainMetric.measure(model, alone, batches, damping=DAMPING).precondition(name, g)
        torch.testing.assert_close(metric.precondition(name, g), expected, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_planned_in_part_are_kept_apart(make_model: Any, make_plan: Any) -> None:
    """Columns of q and rows of k and v: one of the three reads some channels of what the others read whole."""
    model, layer = make_model(), "model.layers.0.self_attn."
    batches = [Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
               for ids in (torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0)),)]
    for columns in ("q_proj", "k_proj", "v_proj"):
        slices = {f"{layer}{part}.weight": (int(part == columns), {Role.CONFLICT: [0, 3, 5]})
                  for part in ("q_proj", "k_proj", "v_proj")}
        metric = RetainMetric.measure(model, make_plan(model, slices), batches, damping=DAMPING)
        for name, one in slices.items():
            shape = model.get_parameter(name).shape
            g = torch.randn((shape[0], 3) if one[0] else (3, shape[1]), generator=torch.Generator().manual_seed(1))
            expected = RetainMetric.measure(model, make_plan(model, {name: one}), batches, damping=DAMPING)
            torch.testing.assert_close(metric.precondition(name, g), expected.precondition(name, g), rtol=1e-5, atol=1e-6)


def test_inputs_that_are_shared_are_held_once_and_half_gradients_come_back_half(make_model: Any, make_plan: Any) -> None:
    model = make_model()
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    parts = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
    plan = make_plan(model, {name: (0, {Role.CONFLICT: [0, 3, 5]}) for name in parts})
    with torch.no_grad():  # as evaluation around it may have it
        metric = RetainMetric.measure(model, plan, [Batch(ids, torch.ones_like(ids), ids)], damping=DAMPING)
    assert metric.bytes() == 4 * (32 * 32 + 3 * 3 * 3)  # what all three read, and what each writes
    g = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    step = metric.precondition(parts[0], g)
    assert step.dtype == torch.bfloat16
    torch.testing.assert_close(step, metric.precondition(parts[0], g.float()).bfloat16())


def test_directions_retention_never_uses_are_kept(make_plan: Any) -> None:
    model = TwoLayers()
    with torch.no_grad():
        model.embed.weight[:, 2:] = 0.0  # retention uses inputs 0 and 1 only
    plan = make_plan(model, {"first.weight": (0, {Role.CONFLICT: [1]})})
    metric = RetainMetric.measure(model, plan, two_batches(), damping=1e-3)
    step = metric.precondition("first.weight", torch.ones(1, 4))[0]
    assert step[:2].abs().max() < 0.01 * step[2:].abs().min()
    assert step[2] == pytest.approx(step[3])


def test_only_linear_layers_can_be_measured(make_plan: Any) -> None:
    model = TwoLayers()
    plan = make_plan(model, {"embed.weight": (0, {Role.CONFLICT: [1]})})
    with pytest.raises(PlanError, match=r"embed\.weight does not belong to a linear layer"):
        RetainMetric.measure(model, plan, two_batches(), damping=DAMPING)


def test_the_head_sees_the_last_positions_alone(make_model: Any, make_plan: Any) -> None:
    """The models give logits where answers are predicted, and nowhere else."""
    model = make_model()
    plan = make_plan(model, {"lm_head.weight": (0, {Role.CONFLICT: [3, 7]})})
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, -100, 11, -100, -100]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    found = RetainMetric.measure(model, plan, [Batch(ids, mask, labels)], damping=DAMPING)
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    logits = model(ids, attention_mask=mask).logits
    handle.remove()
    seen[1].retain_grad()
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    (-log_p[labels[:, 1:] != -100].sum()).backward()
    kept = torch.zeros_like(mask, dtype=torch.bool)
    kept[:, 1:] = mask[:, 1:].bool()  # from the first position that predicts an answer's token
    x, dz = (tensor[kept].detach().double() for tensor in (seen[0], seen[1].grad))
    gradient = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    sides = []
    for rows in (dz[:, [3, 7]], x):
        factor = rows.T @ rows
        sides.append(torch.linalg.inv(factor / factor.diagonal().mean() / DAMPING + torch.eye(len(factor))))
    expected = sides[0] @ gradient.double() @ sides[1]
    torch.testing.assert_close(found.precondition("lm_head.weight", gradient).double(), expected, atol=1e-4, rtol=1e-3)


def test_a_metric_that_is_no_number_is_refused(make_model: Any, mixed_plan: Any) -> None:
    """As a factor of NaN it would count as none, and forgetting would go on without a metric."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    (batch, _) = two_batches()
    with pytest.raises(ModelError, match="the retain metric is not finite: the model gives NaN"):
        RetainMetric.measure(model, mixed_plan(model), [batch], damping=DAMPING)

"""SparseGradients: the gradients of dense backward passes on planned slices, and nothing computed elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clue.circuit.attribution import graph_of
from clue.errors import ClueError, PlanError
from clue.model.anatomy import anatomy
from clue.pipeline import make_plan as plan_of
from clue.plan import Plan, Slice
from clue.types import Role
from clue.unlearn import MaskedAdamW, SparseGradients
from clue.unlearn.objectives import token_log_probs
from clue.weights import weight_of
from tests.families import VARIANTS, tiny
from tests.oracles.sparse import slice_gradients

# Right-padded: two forget records, then three retain records that are longer.
IDS = torch.tensor([[1, 5, 7, 9, 0, 0, 0], [1, 8, 6, 12, 3, 0, 0],
                    [1, 4, 9, 5, 6, 11, 3], [1, 7, 7, 10, 12, 4, 0], [1, 9, 3, 8, 5, 0, 0]])
MASK = (IDS != 0).long()
LABELS = torch.where(MASK.bool(), IDS, -100)
FORGET, LAMBDA = 2, 0.7


def log_probs(model: nn.Module, rows: slice) -> Tensor:
    """Per token, [records, seq - 1]; a set on its own is padded no further than it needs."""
    width = int(MASK[rows].sum(1).max())
    logits = model(input_ids=IDS[rows, :width], attention_mask=MASK[rows, :width], use_cache=False).logits
    return token_log_probs(logits, LABELS[rows, :width])[0]


def forget_loss(log_p: Tensor) -> Tensor:
    return log_p.sum() / 7


def retain_loss(log_p: Tensor) -> Tensor:
    return -LAMBDA * log_p.sum() / 14


def both(model: nn.Module) -> Tensor:
    log_p = log_probs(model, slice(None))
    return forget_loss(log_p[:FORGET]) + retain_loss(log_p[FORGET:])


def oracle(model: nn.Module, plan: Plan) -> dict[str, tuple[Tensor, Tensor | None]]:
    return slice_gradients(model, plan, lambda: forget_loss(log_probs(model, slice(0, FORGET))),
                           lambda: retain_loss(log_probs(model, slice(FORGET, None))))


def sparse_gradients(model: nn.Module, plan: Plan, run: Callable[[nn.Module], Tensor] = both) -> Any:
    with SparseGradients(model, plan) as sparse:
        assert not sparse.dense
        sparse.split(forget=FORGET, retain=len(IDS) - FORGET, seq=IDS.shape[1])
        run(model).backward()
        assert all(p.grad is None for p in model.parameters())
        return sparse.take()


def test_whoever_asks_for_whole_gradients_gets_them(make_model: Any, mixed_plan: Any) -> None:
    """A membership attack that runs in the middle of a training, say."""
    model, plain = make_model(), make_model()
    both(plain).backward()
    with SparseGradients(model, mixed_plan(model)) as sparse:
        model.requires_grad_(True)
        both(model).backward()  # nobody said which samples are which
        for (name, p), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(p.grad, expected.grad), name
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        sparse.split(forget=FORGET, retain=len(IDS) - FORGET, seq=IDS.shape[1])
        both(model).backward()
        assert sparse.take() and all(p.grad is None for p in model.parameters())


def assert_equal(got: Any, expected: dict[str, tuple[Tensor, Tensor | None]], tolerance: float) -> None:
    """Largest difference relative to the largest gradient of the parameter."""
    assert list(got) == list(expected)
    for name, pair in expected.items():
        for part, reference in zip((got[name].forget, got[name].retain), pair, strict=True):
            assert (part is None) == (reference is None), name
            if reference is not None:
                assert part.shape == reference.shape and part.is_contiguous(), name
                scale = max(float(reference.abs().max()), 1e-3)
                assert float((part.to(reference.dtype) - reference).abs().max()) <= tolerance * scale, name


def random_plan(model: nn.Module, seed: int = 0) -> Plan:
    """Every kind of slice a family has, a third of the nodes each forget, conflict and free."""
    body = anatomy(model)
    graph = graph_of(body)
    role = np.random.default_rng(seed).choice([Role.CONFLICT, Role.FORGET, Role.FREE], graph.n_nodes)
    return plan_of(body, graph, SimpleNamespace(role=role), {})


def small_plan(model: nn.Module, slices: dict[str, tuple[int, dict[Role, list[int]]]]) -> Plan:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in slices}
    found = tuple(Slice(name, axis, role, np.array(index, dtype=np.int64))
                  for name, (axis, roles) in slices.items() for role, index in roles.items())
    return Plan(("n",), np.array([Role.CONFLICT], dtype=np.uint8), found, shapes)


UPPER = "model.layers.1.mlp."
NEURONS = {f"{UPPER}up_proj.weight": (0, {Role.FORGET: [0, 5], Role.CONFLICT: [2, 3, 20]}),
           f"{UPPER}up_proj.bias": (0, {Role.FORGET: [0, 5], Role.CONFLICT: [2, 3, 20]}),
           f"{UPPER}down_proj.weight": (1, {Role.FORGET: [0, 5], Role.CONFLICT: [2, 3, 20]})}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_gives_the_gradients_of_dense_passes_by_role(name: str) -> None:
    """Fused, transposed, biased and flattened layers included: one pass over the padded union of both sets gives what
    dense passes over each set give, from log-probabilities that are the same, and the forward has the same bits."""
    model = tiny(name, torch.float64)
    plan = random_plan(model)
    expected = oracle(model, plan)
    together = log_probs(model, slice(None)).detach()
    for rows in (slice(0, FORGET), slice(FORGET, None)):
        apart = log_probs(model, rows).detach()
        torch.testing.assert_close(together[rows, :apart.shape[1]], apart, rtol=0, atol=1e-5)
    assert_equal(sparse_gradients(model, plan), expected, 1e-6)
    single = tiny(name, torch.float32)
    logits = single(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    with SparseGradients(single, plan) as sparse:
        sparse.split(forget=FORGET, retain=3, seq=IDS.shape[1])
        assert torch.equal(single(input_ids=IDS, attention_mask=MASK, use_cache=False).logits, logits)
    assert not any("forward" in vars(module) for module in single.modules())


@settings(max_examples=60)
@given(st.data())
def test_any_layer_and_any_slices(data: st.DataObject) -> None:
    """nn.Linear and Conv1D, rows, columns and biases, any split of the batch, in float32 to 1e-6."""
    d_in, d_out, batch, seq = (data.draw(st.integers(2, 9)) for _ in range(4))
    transposed, planned = data.draw(st.booleans()), data.draw(st.sampled_from(["weight", "bias", "both"]))
    seed = data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    layer = Conv1D(d_out, d_in) if transposed else nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight)
    slices: dict[str, tuple[int, dict[Role, list[int]]]] = {}
    for kind, axis in (("weight", data.draw(st.integers(0, 1))), ("bias", 0)):
        if planned not in (kind, "both"):
            continue
        size = getattr(layer, kind).shape[axis]
        roles = data.draw(st.lists(st.sampled_from([None, Role.FORGET, Role.CONFLICT]), min_size=size, max_size=size))
        chosen = {role: [i for i, r in enumerate(roles) if r == role] for role in (Role.FORGET, Role.CONFLICT)}
        chosen = {role: index for role, index in chosen.items() if index} or {Role.FORGET: [size - 1]}
        slices[f"0.{kind}"] = axis, chosen
    model = nn.Sequential(layer, nn.Tanh())
    plan = small_plan(model, slices)
    flat = data.draw(st.booleans())
    x, weights = torch.randn(batch, seq, d_in), torch.randn(batch, seq, d_out)
    forget = data.draw(st.integers(0, batch))

    def loss(rows: slice) -> Tensor:
        return (model(x[rows]) * weights[rows]).sum() / 8

    shaped = x.flatten(0, 1) if flat else x
    inputs = shaped.clone().requires_grad_(True)
    expected = slice_gradients(model, plan, lambda: loss(slice(0, forget)), lambda: loss(slice(forget, None)))
    plain = model(inputs)
    (plain.view(batch, seq, d_out) * weights / 8).sum().backward()
    with SparseGradients(model, plan) as sparse:
        for needs_grad in (False, True):
            sparse.split(forget=forget, retain=batch - forget, seq=seq)
            again = shaped.clone().requires_grad_(needs_grad)
            got = model(again)
            assert torch.equal(got, plain)
            (got.view(batch, seq, d_out) * weights / 8).sum().backward()
            if needs_grad:
                torch.testing.assert_close(again.grad, inputs.grad, rtol=1e-6, atol=1e-6)
            taken = sparse.take()
            for name, (f, r) in expected.items():
                for part, reference, tokens in ((taken[name].forget, f, forget),
                                                (taken[name].retain, r, batch - forget)):
                    assert (part is None) == (reference is None or tokens == 0)
                    if part is not None:
                        torch.testing.assert_close(part, reference, rtol=1e-6, atol=1e-6)


def test_a_layer_takes_its_input_by_name_too() -> None:
    model = tiny("llama/biased", torch.float32)
    layer = model.get_submodule(UPPER.rstrip(".")).up_proj
    x = torch.randn(2, layer.in_features)
    with SparseGradients(model, small_plan(model, NEURONS), (Role.FORGET, Role.CONFLICT)) as sparse:
        sparse.split(forget=1, retain=1, seq=1)
        assert torch.equal(layer(input=x), layer(x))


def test_nothing_below_the_lowest_planned_layer_is_differentiated() -> None:
    model = tiny("llama/biased", torch.float32)
    seen: dict[str, bool] = {}
    handles = [module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(
        name, (out[0] if isinstance(out, tuple) else out).requires_grad))
        for name, module in model.named_modules() if name and not list(module.children())]
    plan = small_plan(model, {name: NEURONS[name] for name in (f"{UPPER}up_proj.weight", f"{UPPER}down_proj.weight")})
    with SparseGradients(model, plan) as sparse:
        sparse.split(forget=FORGET, retain=3, seq=IDS.shape[1])
        loss = both(model)
        above = {name for name, flag in seen.items() if flag}
        # Among these is act_fn: the gate is not planned, so it is as frozen as everything below.
        assert above == {f"{UPPER}up_proj", f"{UPPER}down_proj", "model.norm", "lm_head"}
        leaves, layers, todo, known = [], 0, [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in known:
                continue
            known.add(node)
            layers += type(node).__name__ == "_LinearBackward"
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            todo += [following for following, _ in node.next_functions]
        mine = [leaf for part in sparse._parts.values() for leaf in part.leaves]
        assert layers == 2 and {id(leaf) for leaf in leaves} == {id(leaf) for leaf in mine}
        loss.backward()
        # What a pass keeps: the gradients of the slices; the leaves themselves are a number each.
        assert all(leaf.untyped_storage().nbytes() == leaf.element_size() for leaf in mine)
        assert sum(leaf.grad.untyped_storage().nbytes() for leaf in mine) == 4 * (5 + 3) * (16 + 16)
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    for handle in handles:
        handle.remove()


def checkpointing(model: Any, **options: Any) -> Any:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(options or None)
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = tiny("llama/biased", torch.float64)
    plan = small_plan(model, NEURONS)
    expected = oracle(model, plan)
    embedding = model.get_input_embeddings()
    checkpointing(model, use_reentrant=reentrant)
    assert len(embedding._forward_hooks) == 1
    calls, differentiated = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: calls.append(torch.is_grad_enabled()))
    model.model.layers[0].register_forward_hook(lambda m, a, out: differentiated.append(out.requires_grad))
    got = sparse_gradients(model, plan)
    assert_equal(got, expected, 1e-6)
    assert differentiated[0] == reentrant  # the hook that makes embeddings differentiable sleeps unless it is needed
    assert len(calls) == (2 if reentrant else 1)
    assert len(embedding._forward_hooks) == 1


def test_autocast_keeps_the_bits_of_the_forward_and_sums_in_float32() -> None:
    model = tiny("llama/biased", torch.float32)
    plan = small_plan(model, NEURONS)
    exact = oracle(model, plan)

    def half(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return both(m)

    dense = slice_gradients(model, plan, lambda: half_part(model, slice(0, FORGET), forget_loss),
                            lambda: half_part(model, slice(FORGET, None), retain_loss))
    plain = half(model)
    losses = []

    def remembered(m: nn.Module) -> Tensor:
        losses.append(half(m))
        return losses[0]

    got = sparse_gradients(model, plan, remembered)
    assert torch.equal(losses[0], plain)
    for name, (forget, retain) in exact.items():
        parts = got[name].forget, got[name].retain
        for part, reference, peer in zip(parts, (forget, retain), dense[name], strict=True):
            assert part.dtype == torch.float32
            error, other = (float((x - reference).norm() / reference.norm()) for x in (part, peer))
            assert error < max(0.05, 1.2 * other), name


def half_part(model: nn.Module, rows: slice, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(log_probs(model, rows))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_float32_gradients_unless_told(dtype: torch.dtype, half: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9).to(dtype))
    plan = small_plan(model, {"0.weight": (0, {Role.FORGET: [1, 4], Role.CONFLICT: [5]}),
                              "0.bias": (0, {Role.CONFLICT: [5]})})
    x, weights = torch.randn(4, 300, 12).to(dtype), torch.randn(4, 300, 9).to(dtype)
    with SparseGradients(model, plan, half=half) as sparse:
        sparse.split(forget=1, retain=3, seq=300)
        (model(x) * weights).sum().backward()
        got = sparse.take()
    rounding = torch.finfo(dtype).eps if half else 1e-5
    exact = weights.double()[:1].flatten(0, 1).T @ x.double()[:1].flatten(0, 1)
    assert got["0.weight"].forget.dtype == (dtype if half else torch.float32)
    torch.testing.assert_close(got["0.weight"].forget.double(), exact[[1, 4, 5]], rtol=rounding, atol=1e-4)
    summed = weights.double()[1:, :, 5].sum()[None]
    assert got["0.bias"].retain.dtype == got["0.weight"].forget.dtype
    torch.testing.assert_close(got["0.bias"].retain.double(), summed, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("name", ["llama/biased", "gpt2"])
def test_compiled_models(name: str) -> None:
    model = tiny(name, torch.float64)
    plan = random_plan(model)
    expected = oracle(model, plan)
    torch._dynamo.reset()
    with SparseGradients(model, plan) as sparse:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for forget in (FORGET, 1, FORGET):  # another split compiles anew, and must not be mistaken for the first
            sparse.split(forget=forget, retain=len(IDS) - forget, seq=IDS.shape[1])
            both(compiled).backward()
            got = sparse.take()
    assert_equal(got, expected, 1e-6)
    torch._dynamo.reset()


def test_gradients_add_up_until_they_are_taken() -> None:
    model = tiny("llama/biased", torch.float64)
    plan = small_plan(model, NEURONS)
    expected = oracle(model, plan)
    with SparseGradients(model, plan) as sparse:
        for forget, retain, rows, loss in ((FORGET, 0, slice(0, FORGET), forget_loss),
                                           (0, 3, slice(FORGET, None), retain_loss)):
            sparse.split(forget=forget, retain=retain, seq=IDS.shape[1])
            loss(log_probs(model, rows)).backward()
        got = sparse.take()
        assert_equal(got, expected, 1e-6)
        assert all(part.forget is None and part.retain is None for part in sparse.take().values())


def test_one_role_moves_alone() -> None:
    model = tiny("llama/biased", torch.float64)
    plan = small_plan(model, NEURONS)
    with SparseGradients(model, plan, roles=(Role.FORGET,)) as sparse:
        sparse.split(forget=FORGET, retain=0, seq=IDS.shape[1])
        forget_loss(log_probs(model, slice(0, FORGET))).backward()
        got = sparse.take()
    for name, (forget, _) in oracle(model, plan).items():
        torch.testing.assert_close(got[name].forget, forget[[0, 3]])  # 0 and 5 of 0, 2, 3, 5, 20
        assert got[name].retain is None


def test_planned_weights_outside_linear_layers_are_dense() -> None:
    model = tiny("llama/biased", torch.float64)
    plan = small_plan(model, {"model.embed_tokens.weight": (0, {Role.FORGET: [5], Role.CONFLICT: [7, 9]}), **NEURONS})
    expected = oracle(model, plan)
    with SparseGradients(model, plan) as sparse:
        assert sparse.dense == ("model.embed_tokens.weight",)
        refused = r"embed_tokens\.weight .* run forget and retain batches apart"
        with pytest.raises(PlanError, match=refused):
            sparse.split(forget=1, retain=1, seq=2)
        sparse.split(forget=FORGET, retain=0, seq=IDS.shape[1])
        forget_loss(log_probs(model, slice(0, FORGET))).backward()
        with pytest.raises(PlanError, match=refused):
            sparse.split(forget=0, retain=3, seq=IDS.shape[1])
        first = sparse.take()
        sparse.split(forget=0, retain=3, seq=IDS.shape[1])
        retain_loss(log_probs(model, slice(FORGET, None))).backward()
        second = sparse.take()
        assert all(p.grad is None for p in model.parameters())
    got = {name: SimpleNamespace(forget=first[name].forget, retain=second[name].retain) for name in first}
    assert_equal(got, expected, 1e-6)


def test_single_weights_of_a_layer_with_planned_rows() -> None:
    """A layer that computes gradients by slices computes none of its whole weight: with a bias next to it that is planned by
    rows the single weights had none."""
    model = tiny("llama/biased", torch.float64)
    plan = small_plan(model, {f"{UPPER}up_proj.bias": NEURONS[f"{UPPER}up_proj.bias"]})
    flat = f"{UPPER}up_proj.weight[:]"
    plan = replace(plan, slices=(*plan.slices, Slice(flat, 0, Role.FORGET, np.array([1, 17, 40]))),
                   shapes={**plan.shapes, flat: (model.get_parameter(weight_of(flat)).numel(),)})
    expected = oracle(model, plan)
    with SparseGradients(model, plan) as sparse:
        assert set(sparse.dense) == set(expected)
        sparse.split(forget=FORGET, retain=0, seq=IDS.shape[1])
        forget_loss(log_probs(model, slice(0, FORGET))).backward()
        got = sparse.take()
    for name, (forget, _) in expected.items():
        torch.testing.assert_close(got[name].forget, forget)


def test_the_optimizer_takes_compact_gradients(bits: Any) -> None:
    model = tiny("llama/biased", torch.float32)
    plan = small_plan(model, NEURONS)
    dense = copy.deepcopy(model)
    optimizers = [MaskedAdamW(m, plan, lr=1e-2, weight_decay=0.1) for m in (model, dense)]
    before = bits(model)
    for _ in range(3):
        compact = {name: gradient.forget for name, gradient in sparse_gradients(model, plan).items()}
        for name, parameter in dense.named_parameters():
            if name in compact:
                axis, index = NEURONS[name][0], torch.tensor([0, 2, 3, 5, 20])
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad.index_copy_(axis, index, compact[name].movedim(0, axis))
        assert optimizers[0].grad_norm(compact) == pytest.approx(optimizers[1].grad_norm(), rel=1e-6)
        optimizers[0].step(gradients=compact, grad_scale=0.5)
        optimizers[1].step(grad_scale=0.5)
    after = bits(model)
    assert all(np.array_equal(after[name], now) for name, now in bits(dense).items())
    assert any(not np.array_equal(before[name], now) for name, now in after.items())
    with pytest.raises(ClueError, match=r"lm_head\.weight is not a parameter that this optimizer moves"):
        optimizers[0].step(gradients={"lm_head.weight": torch.zeros(1)})
    with pytest.raises(ClueError, match=r"down_proj\.weight must have shape \(5, 16\).* got \(16, 5\)"):
        optimizers[0].step(gradients={f"{UPPER}down_proj.weight": torch.zeros(16, 5)})


def test_everything_is_put_back() -> None:
    model = tiny("llama/biased", torch.float32)
    plan = small_plan(model, NEURONS)
    layer = model.get_submodule(f"{UPPER}up_proj")
    plain = layer.forward

    def foreign(x: Tensor) -> Tensor:
        return 2 * plain(x)

    layer.forward = foreign
    model.lm_head.weight.requires_grad_(False)
    flags, x = [p.requires_grad for p in model.parameters()], torch.ones(1, 16)
    sparse = SparseGradients(model, plan)
    for _ in range(2):  # it can be entered again
        with pytest.raises(ZeroDivisionError), sparse:
            sparse.split(forget=1, retain=0, seq=1)
            assert torch.equal(layer(x), foreign(x))
            raise ZeroDivisionError
        assert layer.forward is foreign
        assert [name for name, m in model.named_modules() if "forward" in vars(m)] == [f"{UPPER}up_proj"]
        assert [p.requires_grad for p in model.parameters()] == flags
    with sparse:
        with pytest.raises(ClueError, match="leave that context first"), SparseGradients(model, plan):
            pass
        assert layer.forward is not foreign
    assert layer.forward is foreign


def test_refusals() -> None:
    model = tiny("llama/biased", torch.float32)
    plan = small_plan(model, NEURONS)
    with SparseGradients(model, plan) as sparse:
        with torch.no_grad():
            both(model)  # nothing to differentiate: nothing to be told
        with pytest.raises(ClueError, match="call split before the model"):
            both(model)
        with pytest.raises(ClueError, match="must not be negative or all zero"):
            sparse.split(forget=0, retain=0, seq=1)
        sparse.split(forget=1, retain=2, seq=7)
        with pytest.raises(ClueError, match=r"up_proj got an input of shape \(5, 7, 16\) from 3 samples of 7"):
            both(model)
    only = small_plan(model, {f"{UPPER}up_proj.weight": (0, {Role.FORGET: [1]})})
    with pytest.raises(PlanError, match="names no conflict weight"):
        SparseGradients(model, only, roles=(Role.CONFLICT,))
    tied = tiny("gemma", torch.float32)
    plan = small_plan(tied, {"model.embed_tokens.weight": (0, {Role.FORGET: [1]})})
    with pytest.raises(PlanError, match="tied"):
        SparseGradients(tied, plan)
    norm = small_plan(model, {"model.norm.weight": (0, {Role.FORGET: [1]})})  # without a layer that is marked
    with SparseGradients(model, norm) as sparse, pytest.raises(ClueError, match="already computes sparse gradients"):
        sparse.__enter__()
    assert all(p.requires_grad for p in model.parameters())
    layer = nn.Linear(3, 2)
    alone = small_plan(nn.Sequential(layer), {"0.weight": (0, {Role.FORGET: [0]})})
    with SparseGradients(nn.Sequential(layer), alone) as sparse:
        sparse.split(forget=1, retain=0, seq=1)
        x = torch.ones(1, 3, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

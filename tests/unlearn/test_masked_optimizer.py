"""MaskedAdamW: torch's AdamW on the planned slices, nothing outside them, and a state that survives saving."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clue.delta import Delta
from clue.errors import ClueError, PlanError
from clue.plan import Plan, Slice
from clue.types import Role
from clue.unlearn import MaskedAdamW, PlanCallback, SparseGradients
from clue.unlearn.optimizer import planned_parameters
from clue.weights import view_of, weight_of
from tests.families import tiny
from tests.unlearn.test_sparse import random_plan

LR, BETAS, EPS, DECAY = 3e-2, (0.8, 0.95), 1e-6, 0.1


def gradients(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = grad.to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixed_plan", "scattered_plan"])
def test_parity_with_torch_on_the_same_slices(kind: str, dtype: torch.dtype, make_model: Any, request: Any, bits: Any,
                                              moved: Any) -> None:
    model = make_model(dtype=dtype)
    plan = request.getfixturevalue(kind)(model)
    optimizer = MaskedAdamW(model, plan, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    planned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(planned) == sorted(map(weight_of, plan.parameters()), key=list(dict(model.named_parameters())).index)
    # bf16 weights are a rounding of a float32 master, so the reference is AdamW in float32.
    work = torch.float32 if dtype == torch.bfloat16 else dtype
    twins = {name: p.detach().to(work).clone().requires_grad_(True) for name, p in planned.items()}
    reference = torch.optim.AdamW(twins.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    before = bits(model)
    for step in range(5):
        gradients(model, step)
        for name, twin in twins.items():
            assert planned[name].grad is not None
            twin.grad = 0.25 * planned[name].grad.to(work)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = LR * (1 - 0.1 * step)  # as a scheduler would
        optimizer.step(grad_scale=0.25)
        reference.step()
    moved(before, bits(model), plan)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-6}[dtype]
    for name in plan.parameters():
        parameter = planned[weight_of(name)]
        mask = torch.from_numpy(plan.mask(name))
        found, expected = view_of(parameter.detach(), name), view_of(twins[weight_of(name)].detach(), name)
        if dtype == torch.bfloat16:
            axis, index = optimizer._planned[parameter][0].axis, optimizer._planned[parameter][0].index
            master = optimizer._state_of(parameter, name)["master"]
            master = master.T if axis == 1 else master
            torch.testing.assert_close(master, expected.index_select(axis, index), rtol=tolerance, atol=tolerance)
            assert torch.equal(found.index_select(axis, index), master.bfloat16())
        else:
            torch.testing.assert_close(found[mask], expected[mask], rtol=tolerance, atol=tolerance)


def test_state_is_kept_for_planned_slices_only(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    optimizer = MaskedAdamW(model, plan)
    gradients(model, 0)
    optimizer.step()
    moments = sum(state[key].numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert moments == 2 * plan.weights_changed


def test_one_role_moves_alone(make_model: Any, mixed_plan: Any, bits: Any, moved: Any) -> None:
    for role in (Role.FORGET, Role.CONFLICT):
        model = make_model()
        plan = mixed_plan(model)
        optimizer = MaskedAdamW(model, plan, weight_decay=DECAY, roles=(role,))
        before = bits(model)
        for step in range(2):
            gradients(model, step)
            optimizer.step()
        moved(before, bits(model), plan, (role,))


def test_parameters_without_gradient_stay(make_model: Any, mixed_plan: Any, bits: Any) -> None:
    model = make_model()
    optimizer = MaskedAdamW(model, mixed_plan(model), weight_decay=DECAY)
    before = bits(model)
    optimizer.step()
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items())
    assert optimizer.grad_norm() == 0.0


def test_gradient_norm_counts_planned_weights_only(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    optimizer = MaskedAdamW(model, plan)
    gradients(model, 0)
    parts = [p.grad.numpy()[plan.mask(name)] for name, p in model.named_parameters() if p.requires_grad]
    expected = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in parts))
    assert optimizer.grad_norm() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "nearest"),
                                                 (torch.bfloat16, "stochastic")])
def test_saved_state_continues_bit_by_bit(dtype: torch.dtype, rounding: str, make_model: Any, mixed_plan: Any,
                                          bits: Any) -> None:
    model = make_model(dtype=dtype)
    plan = mixed_plan(model)
    first = MaskedAdamW(model, plan, lr=1e-3, weight_decay=DECAY, rounding=rounding, seed=4)
    for step in range(3):
        gradients(model, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    second = MaskedAdamW(other, plan, lr=7.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        for m, optimizer in ((model, first), (other, second)):
            gradients(m, step)
            optimizer.step()
    assert all(np.array_equal(now, bits(other)[name]) for name, now in bits(model).items())


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}])
@pytest.mark.parametrize("family", ["llama/biased", "qwen2_moe"])
def test_states_of_distributed_checkpoints_continue_bit_by_bit(family: str, options: dict[str, bool], bits: Any) -> None:
    """They call parameters by name, not by number, and say in their groups which is which."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    kind = StateDictOptions(**options)
    model = tiny(family, torch.bfloat16)
    plan = random_plan(model)
    first = MaskedAdamW(model, plan, lr=1e-3, weight_decay=DECAY)
    gradients(model, 0)
    first.step()
    first.zero_grad()
    other = copy.deepcopy(model)
    second = MaskedAdamW(other, plan, lr=7.0)
    set_optimizer_state_dict(other, second, copy.deepcopy(get_optimizer_state_dict(model, first, options=kind)), options=kind)
    assert all(np.array_equal(now, bits(other)[name]) for name, now in bits(model).items())
    assert {name: int(state["step"]) for name, state in second.slices().items()} == dict.fromkeys(plan.parameters(), 1)
    for m, optimizer in ((model, first), (other, second)):
        gradients(m, 1)
        optimizer.step()
    assert all(np.array_equal(now, bits(other)[name]) for name, now in bits(model).items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["mixed_plan", "scattered_plan"])
@pytest.mark.parametrize("way", ["load_state_dict", "revert", "after the optimizer's"])
def test_a_model_that_is_loaded_again_stays_so(way: str, kind: str, rounding: str, make_model: Any, request: Any,
                                               bits: Any) -> None:
    """The next step starts from these weights, not from the masters of those before."""
    model = make_model(dtype=torch.bfloat16)
    plan = request.getfixturevalue(kind)(model)
    start, before = copy.deepcopy(model), bits(model)
    optimizer = MaskedAdamW(model, plan, lr=1e-2, rounding=rounding)
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    assert any((before[name] != now).any() for name, now in bits(model).items())
    if way == "revert":
        Delta.between(start, model, plan).revert(model)
    else:
        if way != "load_state_dict":
            optimizer.load_state_dict(optimizer.state_dict())
        model.load_state_dict(start.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    gradients(model, 3)
    optimizer.step()
    assert all((before[name] == now).all() for name, now in bits(model).items())


def test_masters_that_still_fit_survive_a_loading(make_model: Any, mixed_plan: Any, bits: Any) -> None:
    """Of the very weights there are, or of a part of the model: what is below the rounding is not lost."""
    def train(load: Any) -> dict[str, Any]:
        model = make_model(dtype=torch.bfloat16)
        optimizer = MaskedAdamW(model, mixed_plan(model), lr=1e-4)
        for step in range(6):
            gradients(model, step)
            optimizer.step()
            load(model)
        return bits(model)

    expected = train(lambda model: None)
    for load in (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
                 lambda m: m.lm_head.load_state_dict(make_model(1).lm_head.state_dict())):
        found = train(load)
        assert all((expected[name] == now).all() for name, now in found.items() if name != "lm_head.weight")


def test_a_part_without_a_state_stays_without_one() -> None:
    """Asking for the slices' state begins none: one expert of two had a gradient, and what is saved can be loaded."""
    model = tiny("mixtral", torch.bfloat16)
    names = [f"model.layers.0.mlp.experts.down_proj[{number}]" for number in (0, 1)]
    shape = tuple(model.get_parameter(names[0][:-3]).shape[1:])
    plan = Plan((), np.zeros(0, dtype=np.uint8), tuple(Slice(name, 0, Role.FORGET, np.array([1, 2])) for name in names),
                dict.fromkeys(names, shape))
    optimizer = MaskedAdamW(model, plan)
    optimizer.step(gradients={names[0]: torch.ones(2, shape[1])})
    model.load_state_dict(tiny("mixtral", torch.bfloat16).state_dict())
    optimizer.step(gradients={names[0]: torch.ones(2, shape[1])})
    assert optimizer.slices().keys() == {names[0]}
    other = MaskedAdamW(model, plan)
    other.load_state_dict(optimizer.state_dict())
    assert other.slices().keys() == {names[0]}


def test_stochastic_rounding_needs_no_master(make_model: Any, mixed_plan: Any, bits: Any, moved: Any) -> None:
    """At a learning rate far below the spacing of bf16 weights move as in float32 on average, by the seed alone."""
    lr, steps = 3e-5, 40
    found: dict[tuple[torch.dtype, int], dict[str, Any]] = {}
    for dtype, seed in [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)]:
        model = make_model(dtype=torch.bfloat16).to(dtype)
        plan = mixed_plan(model)
        optimizer = MaskedAdamW(model, plan, lr=lr, rounding="stochastic", seed=seed)
        before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        kept = bits(model)
        for _ in range(steps):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved(kept, bits(model), plan)
        assert not any("master" in state for state in optimizer.state.values())
        now = {name: before[name] - p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
        again = found.setdefault((dtype, seed), now)
        assert all(torch.equal(again[name], change) for name, change in now.items())
    exact, first, other = (torch.cat([change[torch.from_numpy(plan.mask(name))] for name, change in of.items()])
                           for of in found.values())
    assert not torch.equal(first, other)
    # Weights near .02 lie 2^-14 apart, twice a step: forty steps leave each with a deviation of 3 spacings at most.
    deviation = 3 * 2**-13 / len(first) ** 0.5
    assert first.mean().item() == pytest.approx(exact.mean().item(), abs=4 * deviation)
    assert exact.mean().item() == pytest.approx(lr * steps, rel=1e-2)


def test_equal_weights_of_two_parameters_are_rounded_apart(make_model: Any, make_plan: Any) -> None:
    model = make_model(dtype=torch.bfloat16)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    optimizer = MaskedAdamW(model, make_plan(model, {name: (0, {Role.FORGET: None}) for name in names}), lr=1e-4,
                            rounding="stochastic")
    one, other = (model.get_parameter(name) for name in names)
    with torch.no_grad():
        other.copy_(one)
    optimizer.step(gradients={name: torch.ones(one.shape) for name in names})
    assert 0 < (one == other).float().mean() < 1


def test_gradients_of_other_slices_are_refused(make_model: Any, make_plan: Any, bits: Any) -> None:
    model, name = make_model(), "model.layers.0.mlp.up_proj.weight"
    optimizer = MaskedAdamW(model, make_plan(model, {name: (0, {Role.FORGET: [1, 2]})}))
    before = bits(model)
    with pytest.raises(ClueError, match=r"up_proj.weight must have shape \(2, 32\), one row for each .*, got \(3, 32\)"):
        optimizer.step(gradients={name: torch.ones(3, 32)})
    with pytest.raises(ClueError, match="gradients: lm_head.weight is not a parameter that this optimizer moves"):
        optimizer.step(gradients={"lm_head.weight": torch.ones(40, 32)})
    assert all(np.array_equal(before[key], now) for key, now in bits(model).items())


def test_an_older_state_is_rounded_to_nearest(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    optimizer = MaskedAdamW(model, mixed_plan(model))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["rounding"], group["seed"]
    optimizer.load_state_dict(state)
    gradients(model, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["rounding"] == "nearest"


def test_a_model_changed_behind_the_optimizer_is_refused(make_model: Any, mixed_plan: Any, bits: Any) -> None:
    def ready() -> tuple[Any, MaskedAdamW]:
        model = make_model()
        return model, MaskedAdamW(model, mixed_plan(model))

    model, optimizer = ready()
    model.bfloat16()
    gradients(model, 0)
    before = bits(model)
    with pytest.raises(ClueError, match="was float32 on cpu when the optimizer was made and now is bfloat16 on cpu: make the"
                                        " optimizer after moving"):
        optimizer.step()
    assert all(np.array_equal(before[name], now) for name, now in bits(model).items())
    for change in (lambda m: m.to("meta"), lambda m: m.load_state_dict(make_model(1).state_dict(), assign=True)):
        model, optimizer = ready()
        change(model)
        with pytest.raises(ClueError, match=r"model.layers.*is no longer the tensor that this optimizer was made with: make"):
            optimizer.step(gradients={})


def test_state_of_another_plan_is_refused(make_model: Any, make_plan: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = make_model()
    first = MaskedAdamW(model, make_plan(model, {name: (0, {Role.FORGET: [1, 2]})}))
    gradients(model, 0)
    first.step()
    second = MaskedAdamW(model, make_plan(model, {name: (0, {Role.FORGET: [1, 3]})}))
    with pytest.raises(PlanError, match=f"{name} belongs to other slices"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(PlanError, match=f"{name} belongs to other slices"):
        second.restore_slices(first.slices())


SQUARE = "model.layers.0.self_attn.q_proj.weight"
WIDE = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(("name", "axis"), [(SQUARE, 1), (WIDE, 1), ("model.layers.0.self_attn.o_proj.weight", 0)])
@pytest.mark.parametrize("older", [False, True])
def test_state_of_the_same_numbers_of_other_slices_is_refused(name: str, axis: int, older: bool, make_model: Any,
                                                              make_plan: Any) -> None:
    """Rows are no columns, nor those of another weight; states that do not say which they are of are told by their shapes."""
    model = make_model()
    first = MaskedAdamW(model, make_plan(model, {WIDE if name == WIDE else SQUARE: (0, {Role.FORGET: [1, 2]})}))
    gradients(model, 0)
    first.step()
    state = first.state_dict()
    if older:
        del state["param_groups"][0]["planned"]
    second = MaskedAdamW(model, make_plan(model, {name: (axis, {Role.FORGET: [1, 2]})}))
    if not older or name == WIDE:
        with pytest.raises(PlanError, match="belongs to other slices"):
            second.load_state_dict(state)
        assert not second.state
    both = MaskedAdamW(model, make_plan(model, {SQUARE: (0, {Role.FORGET: [1, 2]}), WIDE: (0, {Role.FORGET: [1, 2]})}))
    with pytest.raises(PlanError, match="belongs to other slices"):
        both.load_state_dict(state)


@pytest.mark.parametrize("kind", ["mixed_plan", "scattered_plan"])
@pytest.mark.parametrize(("saved", "loaded", "rounding"), [
    (torch.float32, torch.bfloat16, "nearest"), (torch.bfloat16, torch.float32, "nearest"),
    (torch.float32, torch.float64, "nearest"), (torch.float32, torch.bfloat16, "stochastic"),
    (torch.bfloat16, torch.float16, "stochastic")])
def test_a_state_goes_on_in_another_dtype(kind: str, saved: torch.dtype, loaded: torch.dtype, rounding: str, make_model: Any,
                                          request: Any) -> None:
    """At a learning rate below the spacing of half precision, where without masters most weights would stay."""
    model = make_model(dtype=saved)
    plan = request.getfixturevalue(kind)(model)
    first = MaskedAdamW(model, plan, lr=1e-4, rounding=rounding)
    gradients(model, 0)
    first.step()
    for way in ("load_state_dict", "restore_slices"):
        other = copy.deepcopy(model).to(loaded)
        rounds = "nearest" if loaded == torch.float16 else rounding
        second = MaskedAdamW(other, plan, lr=1e-4, rounding=rounds)
        getattr(second, way)(first.state_dict() if way == "load_state_dict" else first.slices())
        half = loaded in (torch.bfloat16, torch.float16)
        masters = half and not (loaded == torch.bfloat16 and rounding == "stochastic")
        states = second.slices()
        assert states.keys() == set(plan.parameters())
        for state in states.values():
            assert ("master" in state) == masters and int(state["step"]) == 1
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.float32 if half else loaded)
        before = {name: p.detach().clone() for name, p in other.named_parameters()}
        for _ in range(60):
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.ones_like(parameter)
            second.step()
        stayed = 0
        for name in plan.parameters():
            old, now = (view_of(weight, name) for weight in (before[weight_of(name)], other.get_parameter(weight_of(name))))
            stayed += int((old == now)[torch.from_numpy(plan.mask(name))].sum())
        assert stayed < 0.05 * plan.weights_changed


def test_state_of_another_optimizer_and_copies_are_refused(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    other = torch.optim.AdamW([p for n, p in model.named_parameters() if n in mixed_plan(model).parameters()])
    gradients(model, 0)
    other.step()
    optimizer = MaskedAdamW(model, mixed_plan(model))
    with pytest.raises(PlanError, match="the saved optimizer state is not one of MaskedAdamW: resume with the optimizer"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ClueError, match="a MaskedAdamW cannot be copied or pickled: keep its state_dict"):
        copy.deepcopy(optimizer)


def test_refusals(make_model: Any, make_plan: Any) -> None:
    with pytest.raises(PlanError, match="plan is a NoneType: give a Plan"):
        MaskedAdamW(make_model(), None)  # type: ignore[arg-type]
    tied = make_model(tie_word_embeddings=True)
    plan = make_plan(tied, {"model.embed_tokens.weight": (0, {Role.FORGET: [3]})})
    with pytest.raises(PlanError, match="model.embed_tokens.weight, which is tied to lm_head.weight"):
        MaskedAdamW(tied, plan)
    model = make_model()
    plan = make_plan(model, {"model.layers.0.mlp.up_proj.weight": (0, {Role.FORGET: [1, 2]})})
    with pytest.raises(PlanError, match="names no conflict weight"):
        MaskedAdamW(model, plan, roles=(Role.CONFLICT,))
    with pytest.raises(PlanError, match="made for another model"):
        MaskedAdamW(make_model(intermediate_size=64), plan)
    with pytest.raises(ClueError, match="lr = -1"):
        MaskedAdamW(model, plan, lr=-1)
    with pytest.raises(ClueError, match="rounding = 'up' must be nearest or stochastic"):
        MaskedAdamW(model, plan, rounding="up")
    for roles in (("forget",), "forget", Role.FORGET, (2,)):
        for use in (lambda r: MaskedAdamW(model, plan, roles=r), lambda r: SparseGradients(model, plan, r)):
            with pytest.raises(ClueError, match="roles = .* must be members of clue.Role: give"):
                use(roles)
    with pytest.raises(ClueError, match="roles = .* must be members of clue.Role: give"):
        PlanCallback(plan, ("forget",)).on_init_end(None, None, None, model=model)  # type: ignore[arg-type]
    half = make_model(dtype=torch.float16)
    with pytest.raises(ClueError, match="up_proj.weight is in float16, and stochastic rounding is for bfloat16: convert"):
        MaskedAdamW(half, plan, rounding="stochastic")


UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize("planned", [0, 1])
@pytest.mark.parametrize("kind", ["parameter", "rows", "buffer"])
def test_weights_tied_by_memory_are_tied(kind: str, planned: int, make_model: Any, make_plan: Any) -> None:
    """Two parameters over one memory, or one over a part of the other's: moving either moves both."""
    model = make_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    other = UP.format(1 - planned)
    if kind == "parameter":
        second.weight = torch.nn.Parameter(first.weight.detach())
    elif kind == "rows":
        taller = torch.randn(60, 32)
        first.weight, second.weight = torch.nn.Parameter(taller[:48]), torch.nn.Parameter(taller[12:])
    else:
        other = f"model.layers.{planned}.mlp.kept"
        model.model.layers[planned].mlp.register_buffer("kept", model.get_parameter(UP.format(planned)).detach()[40:])
    plan = make_plan(model, {UP.format(planned): (0, {Role.FORGET: [1, 2]})})
    callback = PlanCallback(plan)
    for use in (lambda: MaskedAdamW(model, plan), lambda: SparseGradients(model, plan),
                lambda: callback.on_init_end(None, None, None, model=model),
                lambda: callback.on_train_begin(None, None, None, model=model)):
        with pytest.raises(PlanError, match=rf"edits {UP.format(planned)}, which is tied to {other} \(they lie in the same"):
            use()


def test_weights_side_by_side_in_one_storage_are_not_tied(make_model: Any, mixed_plan: Any, bits: Any, moved: Any) -> None:
    """As a flattened model keeps them; nor are weights that lie nowhere yet, all at the same address."""
    model = make_model()
    plan = mixed_plan(model)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data = part.view(parameter.shape)
    optimizer, before = MaskedAdamW(model, plan), bits(model)
    gradients(model, 0)
    optimizer.step()
    moved(before, bits(model), plan)
    assert planned_parameters(make_model().to("meta"), plan, tuple(Role)).keys() == set(plan.parameters())
    with FakeTensorMode():
        assert planned_parameters(type(model)(model.config), plan, tuple(Role)).keys() == set(plan.parameters())


def test_an_optimizer_whose_weights_were_frozen_says_so(make_model: Any, mixed_plan: Any) -> None:
    """A second optimizer of one model freezes the first one's weights: that must not look like training."""
    model = make_model()
    plan = mixed_plan(model)
    first = MaskedAdamW(model, plan, roles=(Role.FORGET,))
    second = MaskedAdamW(model, plan, roles=(Role.CONFLICT,))
    gradients(model, 0)
    second.step()
    with pytest.raises(ClueError, match=r"does not require a gradient any more.*one for all roles"):
        first.step()
    name = next(iter(first._shapes))
    first.step(gradients={name: torch.ones(first._shapes[name])})  # these it is given


def test_no_parameters_are_added_to_those_of_the_plan(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    optimizer = MaskedAdamW(model, mixed_plan(model))
    free = next(p for p in model.parameters() if not p.requires_grad)
    planned = next(p for p in model.parameters() if p.requires_grad)
    for given in ([free], free, (p for p in [free]), [planned]):
        with pytest.raises(ClueError, match="add_param_group"):
            optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups) == 1

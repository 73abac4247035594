"""Plans: saved and reloaded whole, refused when damaged, and verified against two models bit by bit."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clue.circuit.attribution import graph_of
from clue.delta import Delta
from clue.errors import ModelError, PlanError
from clue.model.anatomy import anatomy
from clue.plan import Plan, Slice, Verification, verify
from clue.types import Role
from clue.unlearn import PlanCallback
from tests.families import tiny

SHAPES = {"up.weight": (6, 4), "down.weight": (4, 6), "up.bias": (6,)}


class Model(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, width)
        self.down = torch.nn.Linear(width, 4, bias=False)


def index(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def make_plan(**changes) -> Plan:
    values = {
        "nodes": ("embed", "m0.n0", "m0.n1", "logits"),
        "role": np.array([Role.FREE, Role.FORGET, Role.CONFLICT, Role.RETAIN], dtype=np.uint8),
        "slices": (Slice("up.weight", 0, Role.FORGET, index(0, 3)), Slice("up.weight", 0, Role.CONFLICT, index(1)),
                   Slice("down.weight", 1, Role.FORGET, index(0, 5)), Slice("up.bias", 0, Role.CONFLICT, index(1))),
        "shapes": SHAPES, "provenance": {"seed": 3},
    }
    return Plan(**{**values, **changes})


def test_counts_and_weights():
    plan = make_plan()
    assert plan.counts() == {"forget": 1, "conflict": 1, "retain": 1, "free": 1}
    assert plan.weights_changed == 2 * 4 + 1 * 4 + 2 * 4 + 1
    assert plan.parameters() == ["up.weight", "down.weight", "up.bias"]
    assert plan.mask("down.weight").sum(0).tolist() == [4, 0, 0, 0, 0, 4]


def single_weights() -> Plan:
    return make_plan(slices=(Slice("up.weight[:]", 0, Role.FORGET, index(0, 3, 23)),
                             Slice("up.weight[:]", 0, Role.CONFLICT, index(1, 22)),
                             Slice("down.weight", 1, Role.FORGET, index(0, 5))),
                     shapes={"up.weight[:]": (24,), "down.weight": (4, 6)})


@pytest.mark.parametrize("make", [make_plan, single_weights])
def test_round_trip_is_byte_identical(tmp_path, make):
    make().save(tmp_path / "a")
    again = Plan.load(tmp_path / "a")
    assert [(s.parameter, s.axis, s.role, s.index.tolist()) for s in again.slices] == [
        (s.parameter, s.axis, s.role, s.index.tolist()) for s in make().slices]
    assert again.weights_changed == make().weights_changed
    again.save(tmp_path / "b")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.nodes == make_plan().nodes
    assert again.provenance == {"seed": 3}
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["plan.json", "plan.safetensors"]


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    given = {"batch_size": np.int64(2), "share": np.float32(0.5), "on": np.bool_(True), "inner": [np.uint8(7)]}
    plan = make_plan(provenance=given)
    plan.save(tmp_path)
    assert Plan.load(tmp_path).provenance == {"batch_size": 2, "share": 0.5, "on": True, "inner": [7]}


def test_a_save_that_fails_leaves_the_plan_before(tmp_path, monkeypatch):
    make_plan().save(tmp_path / "plan")
    before = {file.name: file.read_bytes() for file in (tmp_path / "plan").iterdir()}
    for bad in ({"x": object()}, {"x": {np.int64(1): 2}}):
        for folder in ("plan", "new"):
            with pytest.raises(PlanError, match=r"provenance cannot be written \(.*: give it numbers, texts"):
                make_plan(slices=(), provenance=bad).save(tmp_path / folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        single_weights().save(tmp_path / "plan")
    assert {file.name: file.read_bytes() for file in (tmp_path / "plan").iterdir()} == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize(("slices", "message"), [
    ((Slice("up.weight", 0, Role.FORGET, index(0, 1)), Slice("up.weight", 0, Role.CONFLICT, index(1))),
     "1 of its slices are forget and conflict at once"),  # golden: roles are disjoint
    ((Slice("up.weight", 0, Role.FORGET, index(0, 6)),), "index 6 is outside"),
    ((Slice("up.weight", 0, Role.FORGET, index(3, 0)),), "sorted"),
    ((Slice("up.weight", 0, Role.FORGET, index(3, 3)),), "unique"),
    ((Slice("up.weight", 0, Role.FORGET, index(1)), Slice("up.weight", 0, Role.FORGET, index(3))), "one slice per role"),
    ((Slice("up.weight", 0, Role.RETAIN, index(3)),), "only forget and conflict"),
    ((Slice("other.weight", 0, Role.FORGET, index(3)),), "does not say its shape"),
    ((Slice("up.weight", 0, Role.FORGET, index(3)), Slice("up.weight", 1, Role.CONFLICT, index(3))), "one axis"),
    ((Slice("up.weight", 0, Role.FORGET, index(3)), Slice("up.weight[:]", 0, Role.CONFLICT, index(3))), "names both"),
    ((Slice("up.weight[:]", 0, Role.FORGET, index(3)), Slice("up.weight[1]", 0, Role.CONFLICT, index(3))), "names both"),
    ((Slice("up.weight[1][:]", 0, Role.FORGET, index(3)), Slice("up.weight[1]", 0, Role.CONFLICT, index(3))), "names both"),
    ((Slice("up.weight[:]", 0, Role.FORGET, index(24)),), "index 24 is outside"),
    ((Slice("up.weight", 0, Role.FORGET, index(-1, 2)),), "index -1 is outside"),
    ((Slice("up.weight", 0, Role.FORGET, index(1).astype(np.int32)),), "must be an int64 array, got int32"),
    ((Slice("up.weight", 0, Role.FORGET, [1]),), "must be an int64 array, got list"),
    ((Slice("up.weight", 0, 7, index(1)),), "only forget and conflict"),
])
def test_malformed_plans_are_refused(slices, message):
    with pytest.raises(PlanError, match=message):
        make_plan(slices=slices, shapes={**SHAPES, "up.weight[:]": (24,), "up.weight[1]": (6, 4), "up.weight[1][:]": (24,)})


@pytest.mark.parametrize("role", [np.uint8(9), np.float64(2)])
def test_roles_that_are_none_are_refused(role):
    with pytest.raises(PlanError, match="values of clue.Role"):
        make_plan(role=np.full(4, role))


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.load(tmp_path)
    make_plan().save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(PlanError, match="format 99"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(tmp_path)
    make_plan().save(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"1234")
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("change", [
    lambda d: d["slices"][0].update(role=5), lambda d: d.update(shapes=[]), lambda d: d["slices"][0].update(axis=float("inf")),
    lambda d: d["shapes"].update({"up.weight": [6, -4]}), lambda d: d["shapes"].update({"up.weight": [6, "x"]}),
    lambda d: d["shapes"].update({"up.weight": [6, 2**63]}), lambda d: d["shapes"].update({"up.weight": []})])
def test_files_that_say_what_cannot_be_are_refused(tmp_path, change):
    make_plan().save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError):
        Plan.load(tmp_path)


def test_a_plan_for_another_model_is_refused():
    make_plan().check(Model(6))
    with pytest.raises(PlanError, match=r"up\.weight of shape \(6, 4\), this model's is \(7, 4\)"):
        make_plan().check(Model(7))
    with pytest.raises(PlanError, match="does not have"):
        make_plan().check(torch.nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"wrapped \(DataParallel\).*: give the model inside, model.module"):
        make_plan().check(torch.nn.DataParallel(Model(6)))
    columns = Model(6)
    columns.up.weight = torch.nn.Parameter(torch.zeros(4, 6).T)
    with pytest.raises(PlanError, match=r"up\.weight.* does not lie in memory row by row"):
        single_weights().check(columns)


def test_weights_that_share_their_storage_are_not_planned():
    model = tiny("llama", torch.float32)
    first, last = model.model.layers
    last.mlp.up_proj.weight = first.mlp.up_proj.weight
    body = anatomy(model)
    graph = graph_of(body)
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj.weight shares its storage with another weight of this model"):
        Plan.of_roles(body, graph, np.where(graph.editable, Role.FORGET, Role.FREE).astype(np.uint8), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_verify_sees_every_bit(tmp_path, dtype):
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} | {"norm.weight": torch.ones(4)}
    plan = make_plan()
    for name in ("before", "after", "wrong"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "before" / "model.safetensors")
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    for s in plan.slices:
        moved[s.parameter][(slice(None),) * s.axis + (torch.from_numpy(s.index),)] += 1
    save_file(moved, tmp_path / "after" / "model.safetensors")
    found = verify(tmp_path / "before", tmp_path / "after", plan)
    assert found.ok
    assert found.changed == found.planned == plan.weights_changed
    assert str(found) == "exact: 21 of 21 planned weights changed, and not a bit of any other"

    bits = moved["up.weight"].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    bits[5, 2] ^= 1  # the last bit of one weight that no plan names
    moved["norm.weight"][0] = -0.0  # equal to zero as a number, not as bits
    weights["norm.weight"][0] = 0.0
    save_file(weights, tmp_path / "before" / "model.safetensors")
    save_file(moved, tmp_path / "wrong" / "model.safetensors")
    found = verify(tmp_path / "before", tmp_path / "wrong", plan)
    assert not found.ok
    assert found.outside == (("norm.weight", 1), ("up.weight", 1))
    assert "NOT exact: 2 weights outside the plan changed" in str(found)


def test_verify_takes_models_in_memory(tmp_path):
    torch.manual_seed(0)
    before, plan = Model(6), make_plan()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.up.weight[[0, 1, 3]] += 1
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    for old in (before, tmp_path):
        assert plan.verify(old, after) == verify(old, after, plan) == Verification(21, 12, ())
    with torch.no_grad():
        after.up.bias[2] += 1
    assert plan.verify(before, after).outside == (("up.bias", 1),)
    with torch.no_grad():
        after.up.weight[5] += 1  # beside planned rows: not counted among those that changed
    assert plan.verify(before, after) == Verification(21, 12, (("up.bias", 1), ("up.weight", 4)))
    with pytest.raises(PlanError, match="the model before and the model after do not hold the same tensors"):
        plan.verify(before, torch.nn.Linear(2, 2))


def test_slices_that_a_trainer_trains_are_no_weights_of_the_model():
    """A copy of a model that a Trainer with a PlanCallback was made for holds them, and the model in the end does not."""
    model, name = tiny("llama", torch.float32), "model.layers.0.mlp.up_proj.weight"
    plan = Plan((), np.zeros(0, dtype=np.uint8), (Slice(name, 0, Role.FORGET, index(1, 5)),), {name: (24, 16)})
    callback = PlanCallback(plan)
    callback.on_init_end(None, None, None, model=model)
    before = copy.deepcopy(model)
    assert len(list(before.parameters())) == len(list(tiny("llama").parameters())) + 1
    callback.release(model)
    with torch.no_grad():
        model.get_parameter(name)[1] += 1
    for one, other in ((before, model), (model, before)):
        assert plan.verify(one, other) == Verification(32, 16, ())
        assert Delta.between(one, other, plan).changed == 16


def test_verify_sees_single_weights(tmp_path):
    weights = {name: torch.zeros(SHAPES[name]) for name in ("up.weight", "down.weight")}
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    moved["up.weight"].view(-1)[[0, 1, 3, 23]] = 1.0
    moved["down.weight"][:, 5] = -0.0
    for name, tensors in (("before", weights), ("after", moved)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = verify(tmp_path / "before", tmp_path / "after", single_weights())
    assert (found.ok, found.planned, found.changed) == (True, 5 + 8, 4 + 4)
    moved["up.weight"].view(-1)[[2, 21]] = -0.0
    save_file(moved, tmp_path / "after" / "model.safetensors")
    assert verify(tmp_path / "before", tmp_path / "after", single_weights()).outside == (("up.weight", 2),)


def test_verify_refuses_two_different_models(tmp_path):
    for name, extra in (("a", {}), ("b", {"more.weight": torch.ones(2)})):
        (tmp_path / name).mkdir()
        save_file({n: torch.ones(s) for n, s in SHAPES.items()} | extra, tmp_path / name / "model.safetensors")
    with pytest.raises(PlanError, match="more.weight"):
        verify(tmp_path / "a", tmp_path / "b", make_plan())
    with pytest.raises(PlanError, match="holds no model weights"):
        verify(tmp_path, tmp_path / "b", make_plan())
    for name, change in (("half", lambda t: t.bfloat16()), ("wide", lambda t: torch.ones(*t.shape[:-1], 7))):
        (tmp_path / name).mkdir()
        save_file({n: change(torch.ones(s)) for n, s in SHAPES.items()}, tmp_path / name / "model.safetensors")
    with pytest.raises(PlanError, match=r"is F32 in .* and BF16 in .*save the original in the dtype"):
        verify(tmp_path / "a", tmp_path / "half", make_plan())
    with pytest.raises(PlanError, match=r"has shape .* not two versions of one model"):
        verify(tmp_path / "a", tmp_path / "wide", make_plan())

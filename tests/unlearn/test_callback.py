"""PlanCallback: a foreign training loop with any optimizer moves planned weights and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clue.errors import ClueError, PlanError
from clue.types import Role
from clue.unlearn import MaskedAdamW, PlanCallback, SparseGradients

from ..families import VARIANTS, tiny


def dataset() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (8, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("kind", ["mixed_plan", "scattered_plan"])
def test_any_optimizer_in_a_hand_written_loop(kind: str, make_model: Any, request: Any, bits: Any, moved: Any) -> None:
    model = make_model()
    plan = request.getfixturevalue(kind)(model)
    callback = PlanCallback(plan)
    # Decay and momentum move a weight even where its gradient is zero; the optimizer holds every parameter.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = bits(model)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    for row in dataset()[:4]:
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
    moved(before, bits(model), plan)
    callback.on_train_end(None, None, None)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("roles", [(Role.FORGET, Role.CONFLICT), (Role.FORGET,)])
def test_real_trainer(masked: bool, roles: tuple[Role, ...], tmp_path: Path, make_model: Any, mixed_plan: Any,
                      bits: Any, moved: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model()
    plan = mixed_plan(model)
    before = bits(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4,
                                  gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1, use_cpu=True,
                                  report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no")
    optimizers = (MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1, roles=roles), None) if masked else (None, None)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset(), optimizers=optimizers,
                      callbacks=[PlanCallback(plan, roles)])
    trainer.train()
    moved(before, bits(model), plan, roles)


def test_a_model_is_let_go_of_after_an_error(tmp_path: Path, make_model: Any, mixed_plan: Any, bits: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model()
    before = bits(model)
    callback = PlanCallback(mixed_plan(model))
    Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=dataset(), callbacks=[callback])  # never trains
    assert not any(p.requires_grad for p in model.model.parameters())
    callback.release(model)
    assert all(p.requires_grad for p in model.parameters()) and not list(model.children())[2:]
    assert bits(model).keys() == before.keys()
    with SparseGradients(model, mixed_plan(model)):
        pass


def test_a_callback_holds_one_model_at_a_time(tmp_path: Path, make_model: Any, mixed_plan: Any, bits: Any, moved: Any) -> None:
    """Given to the trainer of a second model, it lets go of the first, which would stay frozen; both can be trained."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    first, second = make_model(), make_model()
    before, callback = bits(first), PlanCallback(mixed_plan(first))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=2, learning_rate=1e-2,
                                  save_strategy="no", disable_tqdm=True)
    trainers = [Trainer(model=model, args=arguments, train_dataset=dataset(), callbacks=[callback])
                for model in (first, second)]
    assert all(p.requires_grad for p in first.parameters()) and bits(first).keys() == before.keys()
    assert not any("forward" in vars(module) for module in first.modules())
    for trainer, model in zip(reversed(trainers), (second, first), strict=True):
        trainer.train()
        moved(before, bits(model), mixed_plan(model))
        assert all(p.requires_grad for p in model.parameters()) and bits(model).keys() == before.keys()


def test_a_plan_for_another_model_is_refused(make_model: Any, mixed_plan: Any) -> None:
    plan = mixed_plan(make_model())
    with pytest.raises(PlanError, match="made for another model"):
        PlanCallback(plan).on_train_begin(None, None, None, model=make_model(intermediate_size=64))
    with pytest.raises(PlanError, match="plan is a NoneType: give a Plan"):
        PlanCallback(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("roles", [("forget",), "forget", Role.FORGET])
def test_roles_are_roles(roles: Any, make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    plan = mixed_plan(model)
    for start in (lambda: PlanCallback(plan, roles).on_init_end(None, None, None, model=model),
                  lambda: PlanCallback(plan, roles).on_train_begin(None, None, None, model=model),
                  lambda: SparseGradients(model, plan, roles)):
        with pytest.raises(ClueError, match="roles = .* must be members of clue.Role"):
            start()


def test_an_optimizer_without_a_planned_weight_is_refused(make_model: Any, mixed_plan: Any) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(make_model().parameters())
    callback = PlanCallback(mixed_plan(model))
    callback.on_init_end(None, None, None, model=model, optimizer=optimizer)
    with pytest.raises(ClueError, match="optimizer holds no planned weight, so nothing would be trained"):
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    assert all(p.requires_grad for p in model.parameters())


def test_a_loop_begun_again_after_an_error_keeps_the_bits(make_model: Any, mixed_plan: Any, make_plan: Any, bits: Any,
                                                          moved: Any) -> None:
    """Hooks that another callback, or this one, left behind would zero gradients of the new plan's weights."""
    model = make_model()
    other = make_plan(model, {"model.layers.0.mlp.gate_proj.weight": (0, {Role.FORGET: [9]})})
    plan = mixed_plan(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = PlanCallback(plan)
    for begun in (PlanCallback(other), callback, callback):
        begun.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    before = bits(model)
    row = dataset()[0]["input_ids"][None]
    model(input_ids=row, labels=row).loss.backward()
    optimizer.step()
    callback.on_optimizer_step(None, None, None)
    moved(before, bits(model), plan)
    callback.on_train_end(None, None, None, model=model)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_clipping_counts_planned_weights_alone_whatever_optimizer(make_model: Any, mixed_plan: Any) -> None:
    norms = []
    for masked in (False, True):
        model = make_model()
        plan = mixed_plan(model)
        optimizer = MaskedAdamW(model, plan) if masked else torch.optim.AdamW(model.parameters())
        callback = PlanCallback(plan)
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
        row = dataset()[0]["input_ids"][None]
        model(input_ids=row, labels=row).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert not parameter.grad[torch.from_numpy(~plan.mask(name))].any()
        callback.release(model)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert norms[0] == norms[1] > 0


def test_weight_decay_spares_what_the_trainer_spares(tmp_path: Path, make_model: Any, make_plan: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model()
    names = {name for name, _ in model.named_parameters() if "layers.0." in name or "model.norm" in name}
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    spared = {name for name in names if name not in Trainer(model=model, args=arguments).get_decay_parameter_names(model)}
    assert "model.norm.weight" in spared and any("bias" in name for name in spared) and spared < names
    plan = make_plan(model, {name: (0, {Role.FORGET: [0, 3]}) for name in names})
    callback = PlanCallback(plan)
    optimizer = Trainer(model=model, args=arguments, callbacks=[callback]).create_optimizer()
    assert callback._slices is not None
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {slices.name: decay[id(parameter)] for slices, parameter in callback._slices._planned} == {
        name: 0.0 if name in spared else 0.1 for name in names}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_spares_the_vectors_of_every_family(variant: str) -> None:
    """Slices tell what is spared by the dimensions of a weight."""
    from transformers import Trainer

    model = tiny(variant)
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert {name for name, parameter in model.named_parameters() if parameter.ndim > 1} == {
        name for name, _ in model.named_parameters() if name in decayed}  # of tied weights, those it has

"""What the processes of the distributed tests share: models, a plan, batches, and the run of a single process."""

# ruff: noqa: F401 -- the programs import everything from here

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clue.data.records import RecordSet
from clue.plan import Plan, Slice
from clue.types import Role
from clue.unlearn import MaskedAdamW, SparseGradients, curvature, metric, sharing
from tests.families import tiny
from tests.unlearn.conftest import FORGET as WORDS
from tests.unlearn.conftest import RETAIN, build_tokenizer, records
from tests.unlearn.test_sparse import FORGET, IDS, LABELS, MASK, forget_loss, random_plan, retain_loss

STEPS = 3


def model_and_plan(family: str) -> tuple[Any, Plan]:
    """Another model than FSDP's even split would like: an MLP of 24 and heads of 4 rows over 2 processes."""
    sizes = {"vocab_size": 40, "max_position_embeddings": 64}
    model = tiny(family, torch.float32, **sizes)
    return model, random_plan(model, seed=1)


def norm_plan(model: nn.Module) -> Plan:
    """Of the last norm's weight, which belongs to the outermost module."""
    shape = tuple(model.get_parameter("model.norm.weight").shape)
    index = np.arange(shape[0], dtype=np.int64)
    return Plan((), np.zeros(0, dtype=np.uint8), (Slice("model.norm.weight", 0, Role.CONFLICT, index),),
                {"model.norm.weight": shape})


def loss_of(model: nn.Module, rows: list[int]) -> Tensor:
    """The part of the loss that these samples contribute; all of them together make the batch's."""
    from clue.unlearn.objectives import token_log_probs

    logits = model(input_ids=IDS[rows], attention_mask=MASK[rows], use_cache=False).logits
    log_p = token_log_probs(logits, LABELS[rows])[0]
    first = sum(row < FORGET for row in rows)
    return forget_loss(log_p[:first]) + retain_loss(log_p[first:])


def reference(family: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, tuple[dict[str, Tensor], Any]]]:
    """What a process alone makes of the whole batch: all weights after dense gradients of half the loss, after gradients
    of slices, and after CLUE's own loop, with its log, by objective."""
    rows = list(range(len(IDS)))
    model, plan = model_and_plan(family)
    optimizer = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        loss_of(model, rows).backward()
        optimizer.step(grad_scale=0.5)
        optimizer.zero_grad()
    of_slices, of_loops = model_and_plan(family)[0], {name: model_and_plan(family)[0] for name in ("npo", "npo-stranger")}
    modules = (sharing, metric, curvature)
    together = sharing.place
    try:
        for module in modules:
            module.place = lambda: (0, 1)  # type: ignore[attr-defined]
        train_sparsely(of_slices, plan, rows)
        logs = {objective: unlearned(of_loop, plan, objective) for objective, of_loop in of_loops.items()}
    finally:
        for module in modules:
            module.place = together  # type: ignore[attr-defined]
    return whole(model), whole(of_slices), {name: (whole(of_loop), logs[name]) for name, of_loop in of_loops.items()}


def train_sparsely(model: nn.Module, plan: Plan, rows: list[int]) -> MaskedAdamW:
    """The same steps from the gradients of slices, this process's samples being ``rows``."""
    optimizer = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
    with SparseGradients(model, plan) as sparse:
        for _ in range(STEPS):
            first = sum(row < FORGET for row in rows)
            sparse.split(forget=first, retain=len(rows) - first, seq=IDS.shape[1])
            loss_of(model, rows).backward()
            found = sharing.added_up(sparse.take(), sparse)
            optimizer.step(gradients=combine(sparse, found), grad_scale=0.5)
    return optimizer


def combine(sparse: SparseGradients, found: Any) -> dict[str, Tensor]:
    """Forget gradients everywhere, retain gradients on conflict slices."""
    combined = {}
    for name, slices in sparse.planned.items():
        total = found[name].forget.clone()
        if found[name].retain is not None:
            total.index_add_(0, slices.conflict, found[name].retain)
        combined[name] = total
    return combined


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered where it is sharded."""
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()  # type: ignore[operator]
            for name, p in model.named_parameters()}


def digest(weights: dict[str, Tensor]) -> str:
    """One number for every bit of them."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode())
        found.update(weight.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def unlearned(model: nn.Module, plan: Plan, objective: str, settings: dict[str, Any] | None = None, **keywords: Any) -> Any:
    """CLUE's own loop, on three forget records and a batch that two processes cannot share evenly."""
    from clue.config import DataSettings, UnlearnSettings
    from clue.unlearn import unlearn

    settings = {"steps": STEPS, "batch_size": 3, "lr": 1e-2, "warmup": 0, "floor": 0.0} | (settings or {})
    forget, retain = (tuple(records(name, pairs)) for name, pairs in (("forget", WORDS), ("retain", RETAIN)))
    if objective == "npo-stranger":  # the last two words of a question are a name, of which "cat eat" and "dan live" are made
        forget, retain = (tuple(replace(record, subject=" ".join(record.prompt.split()[-2:])) if i in named else record
                                for i, record in enumerate(part)) for part, named in ((forget, (0, 1)), (retain, (0, 2))))
    return unlearn(model, build_tokenizer(), RecordSet("forget", forget), {"retain": RecordSet("retain", retain)}, plan,
                   UnlearnSettings(objective=objective, **settings),
                   data=DataSettings(append_eos=False), **keywords)


def compare(now: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor], plan: Plan) -> None:
    """Planned weights are the expected ones to float tolerance, and most moved (an expert may get no token, and stay); all
    others have every bit they had."""
    from clue.weights import parameter_of, view_of

    moved = {name: (weight != before[name]) for name, weight in now.items()}
    reached = 0
    for name in plan.parameters():
        mask = torch.from_numpy(plan.mask(name))
        part = view_of(moved[parameter_of(name)], name)
        reached += int(part[mask].sum())
        part &= ~mask
    assert reached > 0.5 * plan.weights_changed
    assert not any(part.any() for part in moved.values())
    for name, weight in now.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def held(optimizer: MaskedAdamW) -> int:
    """Scalars of optimizer state in this process, both moments counted."""
    def count(state: dict[str, Any]) -> int:
        return sum(value.numel() if key in ("exp_avg", "exp_avg_sq") else count(value) if isinstance(value, dict) else 0
                   for key, value in state.items() if isinstance(value, (Tensor, dict)))

    return sum(count(state) for state in optimizer.state.values())



"""Baselines as plans: each saves, trains only what it chose, and says what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clue
from clue import baselines
from clue.config import LocalizeSettings, UnlearnSettings
from clue.errors import ClueError, ModelError, PlanError
from clue.plan import Plan, verify
from clue.types import Role
from clue.unlearn import unlearn
from tests.families import tiny

RETAIN = ("retain", "skill")


def model_of(name: str = "llama", **changes: Any) -> Any:
    return tiny(name, torch.float32, vocab_size=40, **changes)


@pytest.mark.parametrize("method", baselines.BASELINES)
def test_only_what_was_chosen_moves(method: str, sets: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = model_of()
    retain = {name: sets[name] for name in RETAIN}
    before = [p.detach().clone() for p in model.parameters()]
    plan = baselines.localize(method, model, tokenizer, sets["forget"], retain, ratio=0.3)
    again = baselines.localize(method, model, tokenizer, sets["forget"], retain, ratio=0.3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    plan.save(tmp_path / "a")
    again.save(tmp_path / "b")
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    plan = Plan.load(tmp_path / "a")
    assert {s.role for s in plan.slices} == {Role.CONFLICT}
    about = plan.provenance["baseline"]
    assert about["name"] == method
    wanted = about["of"] if method == "all" else round(0.3 * about["of"])
    assert about["wanted"] == wanted
    assert plan.weights_changed == wanted or (
        method in ("sure", "depn", "eap", "memflex") and 0.6 * wanted < plan.weights_changed <= wanted)

    model.save_pretrained(tmp_path / "before")
    unlearn(model, tokenizer, sets["forget"], retain, plan, UnlearnSettings(steps=3, lr=1e-2, batch_size=2, floor=0.0))
    model.save_pretrained(tmp_path / "after")
    found = verify(tmp_path / "before", tmp_path / "after", plan)
    assert found.ok and found.changed > 0.4 * found.planned


def test_the_number_of_weights_is_exact(sets: Any, tokenizer: Any) -> None:
    model = model_of("gpt2")
    for count in (1, 2, 777):
        for method in ("random", "magnitude", "wanda", "snip"):
            plan = baselines.localize(method, model, tokenizer, sets["forget"], sets["retain"], weights=count)
            assert plan.weights_changed == count
    for count in (0, 10**9):
        with pytest.raises(PlanError, match=f"cannot choose {count} of"):
            baselines.random(model, tokenizer, sets["forget"], sets["retain"], weights=count)
    with pytest.raises(PlanError, match="finds nothing that fits into 1 weights"):
        baselines.memflex(model, tokenizer, sets["forget"], sets["retain"], weights=1)


def test_random_is_spread_and_depends_on_its_seed(sets: Any, tokenizer: Any) -> None:
    model = model_of()
    plans = [baselines.random(model, tokenizer, sets["forget"], sets["retain"], seed=seed) for seed in (0, 1)]
    masks = [{name: plan.mask(name) for name in plan.parameters()} for plan in plans]
    assert masks[0].keys() == masks[1].keys()
    assert any(not np.array_equal(masks[0][name], masks[1][name]) for name in masks[0])
    for mask in masks[0].values():
        assert abs(mask.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / mask.size)


def test_the_method_is_a_setting(sets: Any, tokenizer: Any) -> None:
    model = model_of()
    retain = {name: sets[name] for name in RETAIN}
    lines: list[str] = []
    plan = clue.localize(model, tokenizer, sets["forget"], retain, LocalizeSettings(method="snip", ratio=0.1),
                         progress=lines.append)
    other = baselines.snip(model, tokenizer, sets["forget"], retain, ratio=0.1)
    assert [s.index.tolist() for s in plan.slices] == [s.index.tolist() for s in other.slices]
    assert lines == [f"plan       snip: {plan.weights_changed} weights may change"]


def test_mistakes_are_named(sets: Any, tokenizer: Any) -> None:
    model = model_of()
    with pytest.raises(ClueError, match="'wagel' is no baseline: known are random"):
        baselines.localize("wagel", model, tokenizer, sets["forget"], sets["retain"])
    with pytest.raises(AttributeError, match="wagel"):
        _ = baselines.wagel
    with pytest.raises(ClueError, match=r"ratio = 1\.5 must lie in"):
        baselines.random(model, tokenizer, sets["forget"], sets["retain"], ratio=1.5)
    down = model.model.layers[1].mlp.down_proj
    row_by_row, down.weight = down.weight, torch.nn.Parameter(down.weight.detach().T.contiguous().T)
    with pytest.raises(ModelError, match=r"layers.1.mlp.down_proj.weight does not lie in memory row by row: copy it"):
        baselines.random(model, tokenizer, sets["forget"], sets["retain"])
    down.weight = row_by_row
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="shares its storage"):
        baselines.random(model, tokenizer, sets["forget"], sets["retain"])

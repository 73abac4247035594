"""The whole job in memory, on a small model that really knows its world: what must go goes, what must stay stays, and
the same inputs give the same plan, byte for byte, whatever the number of threads."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clue
from clue.circuit.faithfulness import evaluate_circuit
from clue.config import EvaluateSettings, LocalizeSettings, UnlearnSettings
from clue.data.world import World, build_world, train_model
from clue.evaluate import EvaluationSets, evaluate
from clue.model.anatomy import anatomy
from clue.pipeline import locate
from clue.types import Provenance, Role
from clue.unlearn import unlearn

LOCALIZE = LocalizeSettings(edges=0.3, neurons=0.3, batch_size=32)
UNLEARN = UnlearnSettings(lr=1e-3, steps=200, batch_size=12, floor=0.12)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(n_people=12, n_forget=2)


@pytest.fixture(scope="module")
def trained(world: World) -> Any:
    return train_model(world, size="small", steps=200)


def kept(world: World) -> dict[str, clue.RecordSet]:
    return {"retain": world.retain, "induction": world.skills_train["induction"]}


def test_the_whole_way(world: World, trained: Any) -> None:
    model = copy.deepcopy(trained)
    lines: list[str] = []
    found = locate(model, world.tokenizer, world.forget, kept(world), LOCALIZE, progress=lines.append)
    assert [line.split()[0] for line in lines] == ["pairs", "scores", "circuits", "roles", "plan"]
    assert found.assignment.optimal and found.plan.counts()["conflict"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))

    log = unlearn(model, world.tokenizer, world.forget, kept(world), found.plan, UNLEARN)
    assert log.final_forgotten == 1.0

    sets = EvaluationSets(forget=world.forget, retain=world.retain_unseen, forget_paraphrase=world.forget_paraphrase)
    settings = EvaluateSettings(rouge=False, bootstrap=0)
    before, after = (evaluate(m, world.tokenizer, sets, settings) for m in (trained, model))
    assert before.forget > 0.9 and before.retain > 0.9
    assert after.forget == 0.0
    assert after.forget_paraphrase is not None and after.forget_paraphrase <= 0.25
    assert after.retain > 0.9  # facts that neither localization nor training ever saw

    # Exactly the planned weights moved, and next to none of them stood still.
    masks = {name: found.plan.mask(name) for name in found.plan.parameters()}
    for (name, a), b in zip(model.named_parameters(), trained.parameters(), strict=True):
        differs = (a != b).numpy()
        mask = masks.get(name, np.zeros(differs.shape, dtype=bool))
        assert not (differs & ~mask).any(), name
        assert not mask.any() or differs[mask].mean() > 0.95, name


@pytest.mark.parametrize("granularity", ["neuron", "block"])
def test_the_number_of_threads_does_not_change_the_plan(world: World, trained: Any, tmp_path: Path,
                                                        granularity: str) -> None:
    threads = torch.get_num_threads()
    files = []
    try:
        for n in (1, 1, 2, 4):
            torch.set_num_threads(n)
            plan = clue.localize(trained, world.tokenizer, world.forget, kept(world),
                                 replace(LOCALIZE, granularity=granularity))
            plan.save(tmp_path / "plan")
            files.append([(tmp_path / "plan" / name).read_bytes() for name in ("plan.json", "plan.safetensors")])
    finally:
        torch.set_num_threads(threads)
    assert all(found == files[0] for found in files[1:])
    assert (plan.role == Role.CONFLICT).any()


def test_surgical_mode_plans_its_edits_alone(world: World, trained: Any) -> None:
    settings = replace(LOCALIZE, granularity="block", mode="surgical")
    found = locate(trained, world.tokenizer, world.forget, kept(world), settings)
    counts = found.plan.counts()
    assert found.assignment.optimal and found.assignment.forget_works[-1] == 0
    assert 0 < counts["forget"] + counts["conflict"] == found.assignment.statistics["edits"]
    with pytest.raises(clue.ClueError, match="mode = surgical reads the gates"):
        locate(trained, world.tokenizer, world.forget, kept(world), replace(settings, semantics="authors"))


def test_circuits_as_faithful_as_asked(world: World, trained: Any) -> None:
    lines: list[str] = []
    settings = replace(LOCALIZE, faithfulness=0.8, neurons=1.0)
    found = locate(trained, world.tokenizer, world.forget, kept(world), settings, progress=lines.append)
    body = anatomy(trained)
    for name, circuit in found.circuits.items():
        assert circuit.faithfulness is not None and circuit.faithfulness >= 0.8
        assert evaluate_circuit(body, found.pairs[name], circuit, settings).faithfulness > 0.5  # all pairs, not a sample
        assert f"{name} {len(circuit)} edges (faithfulness {circuit.faithfulness:.2f}" in lines[2]


def test_confirmed_gates_keep_what_found_them(world: World, trained: Any) -> None:
    settings = replace(LOCALIZE, neurons=0.1, confirm=20)
    plain, tested = (locate(trained, world.tokenizer, world.forget, kept(world), s).circuits["retain"]
                     for s in (replace(settings, confirm=0), settings))
    added = tested.provenance - plain.provenance  # bits are only ever added
    assert set(added.tolist()) <= {0, Provenance.CONFIRMED, Provenance.CONTRADICTED} and added.any()
    np.testing.assert_array_equal(tested.gate != plain.gate, added == Provenance.CONTRADICTED)
    assert np.isin(plain.provenance[added > 0], [Provenance.NOISING, Provenance.DENOISING, Provenance.BOTH]).all()

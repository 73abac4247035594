"""``clue plan``: what it says of a plan, and that one bit outside it does not go unseen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clue.circuit.graph import Graph
from clue.cli import main
from clue.plan import Plan, Slice
from clue.types import Role


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A run folder with a plan of two rows of ``up`` (one forget, one conflict), and the model before and after."""
    nodes = ("embed", "a0.h0", "m0.n0", "m0.n1", "m1.n0", "logits")
    role = np.array([Role.FREE, Role.RETAIN, Role.FORGET, Role.CONFLICT, Role.FREE, Role.RETAIN], np.uint8)
    slices = (Slice("up", 0, Role.FORGET, np.array([0])), Slice("up", 0, Role.CONFLICT, np.array([2])))
    Plan(nodes, role, slices, {"up": (4, 3)}).save(tmp_path / "run" / "plan")
    weights = {"up": torch.zeros(4, 3), "head": torch.ones(2, 2)}
    edited = {"up": weights["up"].clone(), "head": weights["head"]}
    edited["up"][0, 1] = 1.0
    for name, tensors in (("before", weights), ("after", edited)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def test_plan_show_counts_layers_slices_and_weights(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(plan / "run"), "--json", "--nodes", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"] == {"forget": 1, "conflict": 1, "retain": 2, "free": 2}
    assert facts["layers"] == {"embed": {"free": 1}, "0": {"retain": 1, "forget": 1, "conflict": 1}, "1": {"free": 1},
                               "logits": {"retain": 1}}
    assert facts["slices"] == {"up": {"axis": "rows", "of": 4, "forget": 1, "conflict": 1}}
    assert facts["weights_changed"] == 6
    assert facts["nodes"] == [{"node": "m0.n1", "role": "conflict"}]
    assert main(["plan", "show", str(plan / "run"), "--nodes", "9"]) == 0
    text = capsys.readouterr().out
    for expected in ("6 weights may change", "m0.n0  forget", "4 rows", "logits"):
        assert expected in text


def test_help_explains_the_names_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    graph = Graph(3, 4, 2, 300, True)
    for command in ("show", "explain"):
        with pytest.raises(SystemExit):
            main(["plan", command, "--help"])
        named = re.findall(r"\b[am]\d\S*\b>?", capsys.readouterr().out)
        assert named and set(named) <= set(graph.names)


def test_plan_verify_accepts_what_was_planned(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "verify", str(plan / "before"), str(plan / "after"), str(plan / "run")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("exact: 1 of 6 planned weights changed")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "planned": 6, "changed": 1, "outside": {}}


def test_plan_verify_finds_one_bit_outside_the_plan(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"up": torch.zeros(4, 3), "head": torch.ones(2, 2)}
    weights["up"][1, 2] = -0.0  # equal to 0.0 as a number, another bit pattern
    save_file(weights, plan / "after" / "model.safetensors")
    arguments = ["plan", "verify", str(plan / "before"), str(plan / "after"), str(plan / "run")]
    assert main(arguments) == 1
    assert "NOT exact: 1 weights outside the plan changed, in up (1)" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["outside"] == {"up": 1}


def test_plan_verify_says_what_it_cannot_compare(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "verify", str(plan / "nowhere"), str(plan / "after"), str(plan / "run")]) == 2
    assert f"{plan / 'nowhere'} does not exist: give the folder of a saved model; hub ids are not" in capsys.readouterr().err
    assert main(["plan", "verify", str(plan / "run"), str(plan / "after"), str(plan / "run")]) == 2
    assert "holds no model weights" in capsys.readouterr().err
    (plan / "run" / "plan" / "plan.json").write_text("{")
    assert main(["plan", "verify", str(plan / "before"), str(plan / "after"), str(plan / "run")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(plan: Path) -> None:
    command = f"{sys.executable} -m clue.cli plan show {plan / 'run'} --nodes 9 | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert (result.returncode, result.stderr) == (0, "")

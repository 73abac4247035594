"""Editability against the Newton decrement written out with NumPy, as costs, and as the weights of a run's conflicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clue.circuit.attribution import graph_of
from clue.cli import main
from clue.config import DataSettings, LocalizeSettings
from clue.data.encoding import batches, encode, pad_id
from clue.data.world import World, build_world, model_config, save_world
from clue.editability import DEAREST, Editability, editability
from clue.errors import ClueError
from clue.logic import Assignment
from clue.model.anatomy import anatomy
from clue.pipeline import locate, objectives
from clue.run_directory import Run
from clue.types import NodeKind

DAMPING = 0.05


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(n_people=12, n_forget=2)


@pytest.fixture(scope="module")
def model(world: World) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(model_config(world, "small")).double().eval()


def traffic(model: Any, module: Any, records: Any, tokenizer: Any, append_eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and output gradients of a linear layer, [tokens, channels], one record at a time."""
    xs, dys = [], []
    for example in encode(records, tokenizer, append_eos=append_eos):
        (batch,) = batches([example], 1, pad=pad_id(tokenizer), device="cpu")
        seen: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda _, args, output, seen=seen: seen.extend((args[0], output)))
        logits = model(batch.input_ids).logits
        handle.remove()
        labels = batch.labels[:, 1:]
        log_p = logits[:, :-1].log_softmax(-1)
        loss = -sum(log_p[0, t, labels[0, t]] for t in range(labels.shape[1]) if labels[0, t] != -100)
        (dy,) = torch.autograd.grad(loss, seen[1])
        xs.append(seen[0][0].detach().numpy())
        dys.append(dy[0].numpy())
    return np.concatenate(xs), np.concatenate(dys)


def inverse(vectors: np.ndarray) -> np.ndarray:
    factor = vectors.T @ vectors
    return np.linalg.inv(factor / (factor.diagonal().mean() * DAMPING) + np.eye(len(factor)))


def test_it_is_the_newton_decrement(world: World, model: Any) -> None:
    body = anatomy(model)
    graph = graph_of(body)
    chosen = [graph.node(NodeKind.NEURON, 1, n) for n in (0, 3, 5, 11)]
    nodes = np.zeros(graph.n_nodes, dtype=bool)
    nodes[chosen] = True
    nodes[graph.embed] = True  # asked for, but not editable
    found = editability(body, world.tokenizer, world.forget, {"retain": world.retain}, graph, nodes, damping=DAMPING,
                        batch_size=5)
    units = [int(graph.index[node]) for node in chosen]
    mlp = model.model.layers[1].mlp
    expected = np.zeros(len(units))
    for module, rows in ((mlp.gate_proj, True), (mlp.up_proj, True), (mlp.down_proj, False)):
        x, dy = traffic(model, module, world.retain, world.tokenizer, True)
        fx, fdy = traffic(model, module, world.forget, world.tokenizer, False)
        # The planned side of the layer is its units alone.
        a, g = (x, dy[:, units]) if rows else (x[:, units], dy)
        gradient = fdy[:, units].T @ fx if rows else fdy.T @ fx[:, units]
        expected += (gradient * (inverse(g) @ gradient @ inverse(a))).sum(1 if rows else 0)
    np.testing.assert_allclose(found.score[chosen], expected, rtol=1e-8)
    assert (found.score > 0).sum() == len(chosen)


def test_nothing_asked_is_nothing_measured(world: World, model: Any) -> None:
    body = anatomy(model)
    graph = graph_of(body)
    found = editability(body, world.tokenizer, world.forget, {"retain": world.retain}, graph,
                        np.zeros(graph.n_nodes, dtype=bool))
    assert not found.score.any()


def test_costs_are_what_forgetting_costs(tmp_path: Path) -> None:
    found = Editability(np.array([0.0, 8.0, 4.0, 1.0, 1e-9]))
    assert found.costs().tolist() == [DEAREST, 1, 2, 8, DEAREST]
    assert Editability(np.zeros(2)).costs().tolist() == [DEAREST, DEAREST]
    found.save(tmp_path)
    assert np.array_equal(Editability.load(tmp_path).score, found.score)
    (tmp_path / "editability.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ClueError, match="editability.safetensors is damaged: remove the folder"):
        Editability.load(tmp_path)


def test_the_solver_minimises_it(world: World, model: Any) -> None:
    settings = LocalizeSettings(edges=0.3, neurons=0.3, batch_size=32, weighting="editability")
    stages: dict[str, Any] = {}

    def keep(stage: str, make: Any) -> Any:
        return stages.setdefault(stage, make())

    retain = {"retain": world.retain}
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = locate(model, world.tokenizer, world.forget, retain, settings, data=DataSettings(), keep=keep)
    assert list(stages) == ["pairs", "scores", "circuits", "editability", "assignment", "plan"]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    role, costs = found.assignment.role, stages["editability"].costs()
    conflicts = (role == 3) & found.circuits["forget"].graph.editable
    assert found.assignment.optimal and conflicts.any()
    assert (stages["editability"].score[conflicts] > 0).all()
    assert found.assignment.cost >= costs[conflicts].sum() > conflicts.sum()
    with pytest.raises(ClueError, match="weighting = editability needs every node's editability"):
        objectives(found.scores, found.circuits["forget"].graph, settings)


def test_a_run_keeps_it_and_its_roles_are_explained(world: World, model: Any, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    save_world(world, tmp_path)
    model.float().save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    command = ["localize", "--model", str(tmp_path / "model"), "--forget", str(tmp_path / "forget.jsonl"), "--retain",
               str(tmp_path / "retain.jsonl"), "-o", str(run), "--weighting", "editability", "--limit", "8", "--edges", "0.3"]
    assert main(command) == 0
    kept = (run / "editability" / "editability.safetensors").read_bytes()
    assert main(command) == 0  # goes on with what is there
    assert (run / "editability" / "editability.safetensors").read_bytes() == kept
    made = Assignment.load(Run.open(run).path("assignment") / "assignment.json")
    graph = graph_of(anatomy(model.double()))
    node = int(np.flatnonzero((made.role == 3) & graph.editable)[0])
    capsys.readouterr()
    assert main(["plan", "explain", str(run), graph.name(node)]) == 0
    told = capsys.readouterr().out
    assert graph.name(node) in told and "conflict" in told
    assert main(["plan", "explain", str(run), "nobody"]) == 2
    assert "there is no node 'nobody'" in capsys.readouterr().err
    assert main([*command[:-1], "0.3", "--method", "random", "-o", str(tmp_path / "random")]) == 0
    assert main(["plan", "explain", str(tmp_path / "random"), "embed"]) == 2
    assert "was made with method = random, which gives nodes no roles" in capsys.readouterr().err

"""Graphs and circuits that no model has: refused by what is wrong with them, and before they cost memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clue.circuit.graph import MOST_NODES, Circuit, Graph
from clue.errors import CircuitError

DIMENSIONS = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_mlp": 3, "neurons": True}
WRONG = [
    ({"n_layers": 10**8}, "a graph of 1700000002 nodes is larger than any model's"), ({"n_layers": 0}, "n_layers must be"),
    ({"n_layers": True}, "n_layers must be a whole number, at least 1, got True"), ({"n_heads": "4"}, "n_heads must be"),
    ({"n_kv_heads": 0}, "n_kv_heads must be"), ({"d_mlp": -1}, "d_mlp must be a whole number, at least 0"),
    ({"d_mlp": 1.5}, "d_mlp must be"), ({"n_heads": 3}, "3 query heads cannot share 2 key/value groups evenly")]


def circuit() -> Circuit:
    graph = Graph(**DIMENSIONS)
    src, dst = np.array([0, graph.node(6)], np.int32), np.array([graph.logits, graph.logits], np.int32)
    return Circuit("c", graph, src, dst, np.zeros(2, np.uint8), np.ones(2, np.uint8), np.ones(2), np.ones(2))


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_dimensions_that_no_model_has(tmp_path, change, message):
    with pytest.raises(CircuitError, match=message):
        Graph(**{**DIMENSIONS, **change})
    path = tmp_path / "c.safetensors"
    circuit().save(path)
    save_file(load_file(path), path, metadata={"name": "c", "graph": json.dumps({**DIMENSIONS, **change})})
    with pytest.raises(CircuitError, match=message):
        Circuit.load(path)


def test_the_largest_models_fit():
    assert Graph(61, 128, 128, 257 * 2048, True).n_nodes < MOST_NODES / 8  # DeepSeek-V3: every expert's hidden units
    assert Graph(np.int64(2), 4, 4, 0, False).n_nodes == 2 + 2 * 17


@pytest.mark.parametrize(("part", "value", "message"), [
    ("gate", np.zeros(1, np.uint8), "gate has the shape"), ("ns", np.zeros(3), "ns has the shape"),
    ("provenance", np.zeros((2, 1), np.uint8), "provenance has the shape"), ("dst", np.zeros(1, np.int32), "dst has the shape"),
    ("gate", np.array([0, 7], np.uint8), "there is no gate 7"),
    ("dst", np.array([0, circuit().graph.logits], np.int32), "edge embed -> embed runs backwards")])
def test_edges_of_unequal_parts(tmp_path, part, value, message):
    path = tmp_path / "c.safetensors"
    circuit().save(path)
    metadata = {"name": "c", "graph": json.dumps(circuit().graph.to_json())}
    save_file({**load_file(path), part: value}, path, metadata=metadata)
    with pytest.raises(CircuitError, match=message):
        Circuit.load(path)
    save_file(load_file(tmp_path / "c.safetensors") | {part: getattr(circuit(), part)}, path, metadata=metadata)
    assert len(Circuit.load(path)) == 2

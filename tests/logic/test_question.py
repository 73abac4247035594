"""Questions in a file: whatever is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.errors import CircuitError
from clue.logic import assign
from clue.logic.question import read_question
from clue.types import Gate

GOOD: dict[str, Any] = {
    "nodes": ["in", "a", "b", "out"], "forget": {"f": [["in", "a", "AND"], ["a", "out", "AND"], ["b", "out", "AND"]]},
    "retain": {"r": [["a", "out", "OR"]], "s": [["b", "out", "ADDER"]]}, "weights": {"a": 5}}


def test_a_question_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(GOOD))
    question = read_question(path)
    assert question.graph.names == ("in", "a", "b", "out") and question.graph.editable.tolist() == [0, 1, 1, 0]
    circuits = (*question.forget, *question.retain)
    assert [(c.name, c.src.tolist(), c.dst.tolist(), c.gate.tolist()) for c in circuits] == [
        ("f", [0, 1, 2], [1, 3, 3], [Gate.AND] * 3), ("r", [1], [3], [Gate.OR]), ("s", [2], [3], [Gate.ADDER])]
    assert question.weights.tolist() == [1, 5, 1, 1]
    found = assign(question.forget, question.retain, weights=question.weights)  # type: ignore[arg-type]
    assert found.cost == 1


def test_weights_may_be_anything_below_the_limit_and_the_ends_are_never_editable() -> None:
    question = read_question("q.json", GOOD | {"weights": {"a": 0, "b": 2**62 - 1}, "editable": ["in", "b", "out"]})
    assert question.weights.tolist() == [1, 0, 2**62 - 1, 1]
    assert question.graph.editable.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(("change", "text"), [
    ({"nodes": None}, "'nodes' must list at least two names"),
    ({"nodes": ["in"]}, "'nodes' must list at least two names"),
    ({"nodes": ["in", "a b", "out"]}, "names without blanks"),
    ({"nodes": ["in", "a", "b", "a", "out"]}, "'nodes' has a name twice"),
    ({"node": []}, "unknown key 'node'"),
    ({"editable": "a"}, "'editable' must be a list"),
    ({"editable": ["x"]}, "editable: 'x' is not in 'nodes'"),
    ({"weights": [1]}, "'weights' must give an integer by node"),
    ({"weights": {"x": 1}}, "weights: 'x' is not in 'nodes'"),
    ({"weights": {"a": -1}}, "weights: a must have an integer"),
    ({"weights": {"a": 1.5}}, "weights: a must have an integer"),
    ({"weights": {"a": float("nan")}}, "weights: a must have an integer"),
    ({"weights": {"a": True}}, "weights: a must have an integer"),
    ({"weights": {"a": 2**62}}, "weights: a must have an integer"),
    ({"weights": {"a": 2**70}}, "weights: a must have an integer"),
    ({"forget": []}, "'forget' must give at least one circuit"),
    ({"retain": {"r": 3}}, "retain r: expected a list of edges"),
    ({"retain": {"r": [["a", "out"]]}}, r"retain r: edge 1 must be \[source, target, gate\]"),
    ({"retain": {"r": [["a", "out", 1]]}}, "retain r: edge 1 must be"),
    ({"retain": {"r": [["a", "out", "OR"], ["x", "out", "OR"]]}}, "retain r: edge 2: 'x' is not in 'nodes'"),
    ({"retain": {"r": [["a", "out", "XOR"]]}}, "retain r: edge 1: gate 'XOR' is none of AND, OR, ADDER"),
])
def test_mistakes_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CircuitError, match=f"q.json: .*{text}"):
        read_question("q.json", GOOD | change)


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["in", "a", "out", "AND"])
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "r"]), inner),
                    max_leaves=8)


@given(st.dictionaries(st.sampled_from(list(GOOD)), JSON, max_size=3))
def test_any_json_is_a_question_or_an_error(change: dict[str, Any]) -> None:
    try:
        question = read_question("q.json", GOOD | change)
        assign(question.forget, question.retain, weights=question.weights)  # type: ignore[arg-type]
    except CircuitError:
        pass


def test_files_that_are_no_json(tmp_path: Path) -> None:
    for text in ("", "[", "[" * 100_000):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(CircuitError, match="q.json is not JSON, or is cut short"):
            read_question(tmp_path / "q.json")
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(CircuitError, match="expected an object"):
        read_question(tmp_path / "q.json")


def test_a_circuit_told_twice_is_not_one_of_the_two(tmp_path: Path) -> None:
    """JSON's readers keep the last of two equal keys: the least cost would be proven of a question that nobody asked."""
    edges = '[["in", "a", "AND"], ["a", "out", "AND"]]'
    (tmp_path / "q.json").write_text(f'{{"nodes": ["in", "a", "out"], "forget": {{"f": {edges}, "f": {edges}}},'
                                     f' "retain": {{"r": {edges}}}}}')
    with pytest.raises(CircuitError, match="q.json: 'f' is there twice"):
        read_question(tmp_path / "q.json")

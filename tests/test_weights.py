"""Names of weights mean the same thing in a model, in its gradient, and in its files, whichever layout these have."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from clue.weights import flat_name, from_file, is_flat, member_of, parameter_of, part_name, shape_of, view_of, weight_of
from tests.families import tiny

STACK = "model.layers.0.mlp.experts.down_proj"


def test_a_part_is_a_view_of_its_parameter():
    stack = torch.zeros(3, 2, 5)
    view_of(stack, part_name("experts.down_proj", 1))[:, 4] = 1
    assert stack.nonzero().tolist() == [[1, 0, 4], [1, 1, 4]]
    assert view_of(stack, "experts.down_proj") is stack
    view_of(stack, flat_name(part_name("experts.down_proj", 2)))[6] = 2
    assert stack[2].nonzero().tolist() == [[1, 1]]


def test_names_come_apart_as_they_were_put_together():
    assert part_name(STACK, 3) == STACK + "[3]"
    assert (parameter_of(STACK + "[3]"), member_of(STACK + "[3]")) == (STACK, 3)
    assert (parameter_of(STACK), member_of(STACK)) == (STACK, None)
    flat = flat_name(part_name(STACK, 3))
    assert (parameter_of(flat), member_of(flat), weight_of(flat), is_flat(flat)) == (STACK, 3, STACK + "[3]", True)
    assert (weight_of(STACK), is_flat(STACK)) == (STACK, False)


@pytest.mark.parametrize(("name", "expected"), [
    ("stack[2]", (2, 5)), ("stack[2][:]", (10,)), ("matrix[:]", (20,)), ("other[:]", None),
    ("stack", (3, 2, 5)), ("matrix", (4, 5)), ("stack[3]", None), ("matrix[0]", None), ("other", None),
    ("conv1d.weight", (6, 1, 4)), ("conv1d.weight[:]", (24,)), ("conv1d.weight[0]", None),
])
def test_shapes(name, expected):
    parameters = {"stack": torch.zeros(3, 2, 5), "matrix": torch.zeros(4, 5), "conv1d.weight": torch.zeros(6, 1, 4)}
    assert shape_of(parameters, name) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "llama", "gemma3"])
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_files_lead_to_the_weights_of_the_model(name, as_on_the_hub, tmp_path):
    """Golden: save_pretrained's own files, put together as they say, are the model's weights, all and each once."""
    model = tiny(name, torch.float32)
    model.save_pretrained(tmp_path, save_original_format=as_on_the_hub)
    found: dict[str, dict[int, torch.Tensor]] = {}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for stored in file.keys():  # noqa: SIM118 -- not a mapping
            tensor = file.get_tensor(stored)
            for weight, position, member in from_file(stored, tensor.shape):
                assert position not in found.setdefault(weight, {})
                found[weight][position] = tensor if member is None else tensor[member]
    parameters = dict(model.named_parameters())
    experts = {n: p for n, p in parameters.items() if p.ndim == 3}  # the vision tower has a stack too, of one
    wanted = {part_name(n, i) for n, p in experts.items() for i in range(len(p))} | (parameters.keys() - experts.keys())
    assert found.keys() == wanted
    assert bool(experts) == (name != "llama")
    for weight, pieces in found.items():
        whole = torch.cat([pieces[position] for position in sorted(pieces)])
        assert torch.equal(whole, view_of(parameters[parameter_of(weight)], weight))

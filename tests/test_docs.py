"""The snippets of docs/training_stacks.md run as they stand, and move planned weights only."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from clue.weights import parameter_of
from tests.unlearn.test_trainer import arguments, rows, weights

from .families import tiny
from .unlearn.test_sparse import random_plan


def test_every_snippet(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "training_stacks.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 4
    model = tiny("llama", torch.float32, vocab_size=40)
    plan = random_plan(model)
    names: dict[str, object] = {"model": model, "plan": plan, "dataset": rows(), "arguments": arguments(tmp_path)}
    for snippet in snippets:
        before = weights(model)
        exec(snippet, names)
        planned = {parameter_of(name) for name in plan.parameters()}
        for name, old in before.items():
            differs = model.get_parameter(name).detach() != old
            assert bool(differs.any()) == (name in planned)
            assert not bool((differs & ~torch.from_numpy(plan.mask(name))).any() if name in planned else differs.any())

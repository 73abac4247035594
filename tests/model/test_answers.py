"""Answer logits are those of the whole sequence, without the part before the first answer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clue.data.encoding import Batch
from clue.model.answers import answer_logits


@pytest.mark.parametrize(("labels", "kept"), [
    ([[-100, -100, -100, 4, 5], [-100, -100, 7, 8, -100]], 4),
    ([[-100, 2, 3, 4, 5], [6, 7, 7, 8, -100]], 5),
    ([[-100, -100, -100, -100, 5], [-100, -100, -100, -100, -100]], 2),
    ([[-100] * 5, [-100] * 5], 5),  # nothing is predicted
])
def test_equals_the_end_of_the_whole(labels: list[list[int]], kept: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=8)).eval()
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        logits, shown = answer_logits(model, Batch(ids, mask, torch.tensor(labels)))
    torch.testing.assert_close(logits, whole[:, -kept:])
    assert torch.equal(shown, torch.tensor(labels)[:, -kept:])

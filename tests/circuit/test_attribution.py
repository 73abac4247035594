"""Edge and neuron scores against finite differences, the conservation law, and the flat gates whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from clue.circuit.attribution import Scores, attribute
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.errors import AttributionError
from clue.model.anatomy import anatomy
from tests.oracles.attribution import finite_difference, writer_outputs

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    config = CONFIGS[family](
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, initializer_range=0.4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype == torch.float64:
        in_double(model)
    for parameter in model.parameters():  # norms and biases too: at their initial 1 and 0 they would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.8, 0.3)
    return model


def in_double(model) -> None:
    """Transformers' RMS norms compute in float32 whatever their input; a finite difference needs all of float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)


def make_pairs(clean: list[list[int]], corrupted: list[list[int]], starts: list[int]) -> Pairs:
    def arrays(rows: list[list[int]]) -> tuple[np.ndarray, ...]:
        return tuple(np.array(row, dtype=np.int64) for row in rows)

    return Pairs(clean=arrays(clean), corrupted=arrays(corrupted), answer_start=np.array(starts, dtype=np.int64),
                 kind=("given",) * len(clean), sources=tuple(f"row {i}" for i in range(len(clean))), sha256="")


PAIRS = make_pairs([[1, 5, 7, 9, 4, 3], [1, 8, 6, 12, 3]], [[1, 6, 8, 9, 4, 3], [1, 8, 5, 10, 3]], [4, 3])


def margin(body, pairs: Pairs, i: int):
    """The target of one pair, written once more from its definition."""
    clean, corrupted, start = pairs.clean[i], pairs.corrupted[i], int(pairs.answer_start[i])
    with torch.no_grad():
        top = body.model(torch.from_numpy(corrupted)[None]).logits[0].argmax(-1)

    def target(logits):
        terms = [logits[0, t - 1, clean[t]] - logits[0, t - 1, top[t - 1]] for t in range(start, len(clean))]
        return sum(terms) / len(terms)

    return target


@pytest.mark.parametrize("family", CONFIGS)
def test_every_edge_equals_the_finite_difference(family):
    body = anatomy(tiny(family))
    scores = attribute(body, PAIRS, LocalizeSettings(batch_size=2))
    graph = scores.graph
    want_ns, want_dn = np.zeros_like(scores.ns), np.zeros_like(scores.dn)
    for i in range(2):
        clean, corrupted = (torch.from_numpy(ids[i])[None] for ids in (PAIRS.clean, PAIRS.corrupted))
        here, away = writer_outputs(body, clean), writer_outputs(body, corrupted)
        target = margin(body, PAIRS, i)
        for u, writer in enumerate(graph.writers):
            change = away[graph.name(writer)] - here[graph.name(writer)]
            for v, reader in enumerate(graph.readers):
                if graph.residual_edges[u, v]:
                    want_ns[u, v] += finite_difference(body, graph, clean, reader, change, target) / 2
                    want_dn[u, v] += finite_difference(body, graph, corrupted, reader, -change, target) / 2
    assert np.abs(want_ns).max() > 1e-3
    np.testing.assert_allclose(scores.ns, want_ns, atol=1e-6)
    np.testing.assert_allclose(scores.dn, want_dn, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_conservation(family, dtype, gap):
    scores = attribute(anatomy(tiny(family, dtype)), PAIRS)
    assert 0 <= scores.gap_ns < gap
    assert 0 <= scores.gap_dn < gap


def test_neuron_scores_equal_the_finite_difference():
    body = anatomy(tiny("llama"))
    scores = attribute(body, PAIRS)
    want = np.zeros((2, 2, body.d_mlp))
    for i in range(2):
        sides = [torch.from_numpy(ids[i])[None] for ids in (PAIRS.clean, PAIRS.corrupted)]
        target = margin(body, PAIRS, i)
        for number, layer in enumerate(body.layers):
            hidden = []
            for ids in sides:
                handle = layer.down.module.register_forward_pre_hook(lambda m, a, seen=hidden: seen.append(a[0].detach()))
                with torch.no_grad():
                    body.model(ids)
                handle.remove()
            for direction, (ids, change) in enumerate(zip(sides, (hidden[1] - hidden[0], hidden[0] - hidden[1]),
                                                          strict=True)):
                for unit in range(body.d_mlp):
                    values = []
                    for eps in (1e-5, -1e-5):
                        def shift(m, a, eps=eps, unit=unit, change=change):
                            moved = a[0].clone()
                            moved[..., unit] += eps * change[..., unit]
                            return (moved,)
                        handle = layer.down.module.register_forward_pre_hook(shift)
                        with torch.no_grad():
                            values.append(target(body.model(ids).logits))
                        handle.remove()
                    want[direction, number, unit] += float(values[0] - values[1]) / 2e-5 / 2
    np.testing.assert_allclose(scores.neuron_ns, want[0], atol=1e-6)
    np.testing.assert_allclose(scores.neuron_dn, want[1], atol=1e-6)


def test_neurons_add_up_to_their_mlp():
    """The down projection is linear, so an MLP's outgoing scores are the sum of its neurons'."""
    body = anatomy(tiny("llama"))
    scores = attribute(body, PAIRS)
    writers = [1 + (layer + 1) * (body.n_heads + 1) - 1 for layer in range(2)]
    last = scores.ns[writers[1]].sum()  # the last MLP writes to logits only: no path through later layers is missing
    assert last == pytest.approx(scores.neuron_ns[1].sum(), abs=1e-9)


def test_batch_size_and_padding_do_not_matter():
    body = anatomy(tiny("llama"))
    one, two = (attribute(body, PAIRS, LocalizeSettings(batch_size=size)) for size in (1, 2))
    np.testing.assert_allclose(one.ns, two.ns, atol=1e-12)
    np.testing.assert_allclose(one.neuron_sq_dn, two.neuron_sq_dn, atol=1e-12)


def test_model_is_left_as_it_was():
    model = tiny("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    attribute(anatomy(model), PAIRS)
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pair_that_changes_nothing_is_an_error():
    body = anatomy(tiny("llama"))
    top = body.model(torch.tensor([[1, 5, 7, 9]])).logits[0, -1].argmax()
    same = make_pairs([[1, 5, 7, 9, int(top)]], [[1, 5, 7, 9, int(top)]], [4])
    with pytest.raises(AttributionError, match="none of the 1 corrupted prompts"):
        attribute(body, same, name="people")


def test_a_broken_anatomy_is_refused():
    """Swap two layers in the table: the books no longer balance."""
    from dataclasses import replace

    body = anatomy(tiny("llama"))
    with pytest.raises(AttributionError, match="conservation"):
        attribute(replace(body, layers=(body.layers[0], replace(body.layers[1], o=body.layers[0].o))), PAIRS)


def test_scores_round_trip(tmp_path):
    scores = attribute(anatomy(tiny("llama")), PAIRS, name="people")
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert (again.name, again.graph, again.gap_dn) == ("people", scores.graph, scores.gap_dn)
    np.testing.assert_array_equal(again.neuron_dn, scores.neuron_dn)

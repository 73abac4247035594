"""What baselines rank by, against gradients that autograd computes record by record, for every kind of layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clue import baselines
from clue.baselines.candidates import candidates
from clue.baselines.gradients import Inputs, input_norms, mean_gradient, unit_attribution
from clue.baselines.scores import MEMFLEX_COSINE, MEMFLEX_GRADIENT, WAGLE_MU, memflex, random, wagle
from clue.data.encoding import IGNORED, collate, encode
from clue.data.records import Record
from clue.errors import ModelError
from clue.model.anatomy import anatomy
from clue.types import NodeKind, Role
from clue.weights import flat_name, parameter_of, view_of
from tests.families import tiny

#: Plain, transposed and fused, fused with flattened tokens, experts with a shared one.
FAMILIES = ("llama/biased", "gpt2", "opt", "gpt_neox", "qwen2_moe")


def inputs_for(name: str, sets: Any, tokenizer: Any, dtype: torch.dtype = torch.float64) -> Inputs:
    model = tiny(name, dtype, vocab_size=40)
    body = anatomy(model)
    forget = encode(sets["forget"], tokenizer, append_eos=False)
    retain = encode([*sets["retain"], *sets["skill"]], tokenizer)
    return Inputs(body, candidates(body), forget, retain, tokenizer.pad_token_id, 2, 0)


def records_loss(model: Any, example: Any) -> torch.Tensor:
    """The mean loss of one record's answer tokens, by cross-entropy, unpadded."""
    batch = collate([example], 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORED)


def gradients(inputs: Inputs, examples: Any) -> dict[str, torch.Tensor]:
    """Gradient of the mean record's loss, one record after the other."""
    model = inputs.body.model
    parameters = dict(model.named_parameters())
    torch.stack([records_loss(model, e) for e in examples]).mean().backward()  # type: ignore[no-untyped-call]
    found = {m.name: view_of(parameters[parameter_of(m.name)].grad, m.name).clone() for m in inputs.matrices}
    model.zero_grad()
    return found


def highest(scores: dict[str, torch.Tensor], count: int) -> dict[str, set[int]]:
    every = torch.cat([s.float().reshape(-1) for s in scores.values()])
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[torch.sort(every, descending=True, stable=True).indices[:count]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: set(part.nonzero()[:, 0].tolist()) for name, part in zip(scores, parts, strict=True)}


def planned(plan: Any) -> dict[str, set[int]]:
    return {name: set(np.flatnonzero(plan.mask(name)).tolist()) for name in plan.parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_candidates_are_every_matrix_of_the_layers(name: str) -> None:
    model = tiny(name, torch.float32)
    body = anatomy(model)
    covered = sum(matrix.size for matrix in candidates(body))
    layers = [p for block in body.layers for p in block.block.named_parameters() if p[1].ndim > 1]
    router = sum(p.numel() for n, p in layers if "router" in n or n.endswith(("mlp.gate.weight", "shared_expert_gate.weight")))
    assert covered == sum(p.numel() for _, p in layers) - router
    assert all(m.shape[m.axis] == (m.weight.T if m.transposed else m.weight).shape[0] for m in candidates(body))


@pytest.mark.parametrize("name", FAMILIES)
def test_mean_gradients(name: str, sets: Any, tokenizer: Any) -> None:
    inputs = inputs_for(name, sets, tokenizer)
    flags = [p.requires_grad for p in inputs.body.model.parameters()]
    for examples in (inputs.forget, inputs.retain):
        found, expected = mean_gradient(inputs, examples), gradients(inputs, examples)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key].float(), rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in inputs.body.model.parameters())
    assert flags == [p.requires_grad for p in inputs.body.model.parameters()]


def test_half_precision_gradients_are_added_up_in_float32(sets: Any, tokenizer: Any) -> None:
    """Many records: a bf16 sum would stop growing, a float32 one keeps the mean."""
    inputs = inputs_for("llama", sets, tokenizer, torch.bfloat16)
    once = mean_gradient(inputs, inputs.forget[:1])
    often = mean_gradient(inputs, [inputs.forget[0]] * 600)
    for name, gradient in once.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(often[name], gradient, rtol=2e-2, atol=2e-2 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_input_norms(name: str, sets: Any, tokenizer: Any) -> None:
    """|W| diag(norm)^2 |W|^T has the energy of the outputs that uncorrelated inputs would give; here: the norms of each
    module's own inputs, token by token."""
    inputs = inputs_for(name, sets, tokenizer)
    seen: dict[str, list[torch.Tensor]] = {}
    plain = [m for m in inputs.matrices if m.expert is None]
    handles = [m.module.register_forward_pre_hook(lambda module, args, n=m.name: seen.setdefault(n, []).append(
        args[0].reshape(-1, args[0].shape[-1]))) for m in plain]
    for example in inputs.forget:
        batch = collate([example], 0)
        inputs.body.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    found = input_norms(inputs, inputs.forget)
    assert found.keys() == {m.name for m in inputs.matrices}
    for matrix in plain:
        expected = torch.cat(seen[matrix.name]).square().mean(0).sqrt()
        torch.testing.assert_close(found[matrix.name].double(), expected, rtol=1e-4, atol=1e-6)
    for matrix in inputs.matrices:
        assert found[matrix.name].shape == (matrix.shape[1 - matrix.axis],)


@pytest.mark.parametrize("name", ["llama/biased", "gpt2", "opt"])
def test_padding_is_no_input(name: str, sets: Any, tokenizer: Any) -> None:
    inputs = inputs_for(name, sets, tokenizer)
    short, long = encode([Record("where does ada live", "paris"), Record("what does dan eat", "nuts and figs")], tokenizer)
    together, apart = input_norms(inputs, [short, long]), [input_norms(inputs, [example]) for example in (short, long)]
    counts = [len(example.input_ids) for example in (short, long)]
    for key, found in together.items():
        squares = sum(n * each[key].double().square() for n, each in zip(counts, apart, strict=True)) / sum(counts)
        torch.testing.assert_close(found.double(), squares.sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_unit_attribution_is_the_slope_of_scaling_a_unit(name: str, sets: Any, tokenizer: Any) -> None:
    """d loss / d scale of a hidden unit is the sum over tokens of activation times gradient."""
    inputs = inputs_for(name, sets, tokenizer)
    found = unit_attribution(inputs, inputs.forget)
    model, step = inputs.body.model, 3e-3  # llama norms compute in float32
    for layer, unit in ((0, 3), (1, 11)):
        module = inputs.body.layers[layer].down.module
        slopes = []
        for example in inputs.forget:
            losses = []
            for factor in (1 - step, 1 + step):
                def scale(module: Any, args: Any, factor: float = factor, unit: int = unit) -> Any:
                    x = args[0].clone()
                    x[..., unit] *= factor
                    return (x,)

                handle = module.register_forward_pre_hook(scale)
                with torch.no_grad():
                    losses.append(float(records_loss(model, example)))
                handle.remove()
            slopes.append(abs(losses[1] - losses[0]) / (2 * step))
        assert found[layer, unit] == pytest.approx(np.mean(slopes), rel=3e-3, abs=1e-6)


def test_depn_refuses_experts(sets: Any, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="experts"):
        baselines.depn(tiny("mixtral", torch.float32, vocab_size=40), tokenizer, sets["forget"], sets["retain"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["magnitude", "saliency", "snip", "wagle", "wanda"])
def test_the_weights_chosen_are_the_highest(method: str, name: str, sets: Any, tokenizer: Any) -> None:
    """Golden: each paper's score, dense, and one sort of all weights."""
    inputs = inputs_for(name, sets, tokenizer, torch.float32)
    model = inputs.body.model
    retain = {"retain": sets["retain"], "skill": sets["skill"]}
    plan = baselines.localize(method, model, tokenizer, sets["forget"], retain, weights=333, batch_size=2)
    assert plan.weights_changed == 333
    f, r = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))
    scores = {m.name: {"magnitude": m.weight.abs(), "saliency": f[m.name].abs(), "snip": (f[m.name] * m.weight).abs(),
                       "wagle": ((m.weight - r[m.name] / WAGLE_MU) * f[m.name]).abs(), "wanda": m.weight.abs()}[method]
              for m in inputs.matrices}
    if method != "wanda":
        expected = highest(scores, 333)
    else:
        norms, expected = input_norms(inputs, inputs.forget), {}
        total = sum(m.size for m in inputs.matrices)
        for m in inputs.matrices:
            by_input = norms[m.name][:, None] if m.transposed else norms[m.name][None]
            expected[m.name] = set((scores[m.name] * by_input).reshape(-1).argsort(descending=True).tolist())
            own = np.array(sorted(planned(plan)[flat_name(m.name)]))
            row = own % m.shape[1] if m.transposed else own // m.shape[1]
            taken = np.bincount(row, minlength=m.shape[m.axis])
            assert np.ptp(taken) <= 1 and abs(len(own) - 333 * m.size / total) <= 1
            for number, count in enumerate(taken):
                line = (scores[m.name] * by_input).movedim(m.axis, 0)[number]
                threshold = line.sort(descending=True).values[count - 1] if count else torch.inf
                chosen = own[row == number]
                assert all(float((scores[m.name] * by_input).reshape(-1)[i]) >= float(threshold) for i in chosen)
        return
    assert planned(plan) == {flat_name(key): chosen for key, chosen in expected.items() if chosen}


def test_the_weight_counts_in_wagle(sets: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its retain gradient over the curvature of the paper, a hundred thousandth, it hardly does."""
    monkeypatch.setattr("clue.baselines.scores.WAGLE_MU", 1.0)
    inputs = inputs_for("llama", sets, tokenizer)
    forget, retain = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))
    wanted = highest({m.name: ((m.weight.float() - retain[m.name]) * forget[m.name]).abs() for m in inputs.matrices}, 500)
    slices, about = wagle(inputs, 500)
    assert {s.parameter: set(s.index.tolist()) for s in slices} == {flat_name(n): some for n, some in wanted.items() if some}
    assert about == {"mu": 1.0}


def test_the_largest_gradient_waits_where_it_points_as_retention_does(sets: Any, tokenizer: Any,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_for("llama", sets, tokenizer)
    forget, retain = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))
    cosine = {n: float(torch.cosine_similarity(f.ravel(), retain[n].ravel(), dim=0)) for n, f in forget.items()}
    largest = max(forget, key=lambda name: float(forget[name].abs().mean()))
    monkeypatch.setattr("clue.baselines.scores.MEMFLEX_COSINE", cosine[largest] - 1e-3)
    ready = {n for n, c in cosine.items() if c < cosine[largest] - 1e-3 and float(forget[n].abs().mean()) > MEMFLEX_GRADIENT}
    slices, about = memflex(inputs, sum(m.size for m in inputs.matrices if m.name in ready))
    assert {s.parameter for s in slices} == ready != set() and about["ready_chosen"] == about["ready"] == len(ready)


def test_random_numbers_differ_from_matrix_to_matrix(sets: Any, tokenizer: Any) -> None:
    inputs = inputs_for("llama", sets, tokenizer)
    slices, _ = random(inputs, sum(m.size for m in inputs.matrices) // 2)
    first, second = (next(s.index for s in slices if f"layers.{layer}.mlp.up_proj" in s.parameter) for layer in (0, 1))
    assert len(np.setxor1d(first, second)) > 10


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rows_and_modules(name: str, sets: Any, tokenizer: Any) -> None:
    inputs = inputs_for(name, sets, tokenizer, torch.float32)
    model = inputs.body.model
    f, r = (mean_gradient(inputs, examples) for examples in (inputs.forget, inputs.retain))
    total = sum(m.size for m in inputs.matrices)
    retain = {"retain": sets["retain"], "skill": sets["skill"]}
    plan = baselines.sure(model, tokenizer, sets["forget"], retain, ratio=0.25, batch_size=2)
    axes = {m.name: m.axis for m in inputs.matrices}
    assert all(s.axis == axes[s.parameter] and s.role is Role.CONFLICT for s in plan.slices)
    smallest = min(m.shape[1 - m.axis] for m in inputs.matrices)
    assert 0 <= 0.25 * total - plan.weights_changed < smallest + 1
    inside, outside = [], []
    for m in inputs.matrices:
        norms = f[m.name].movedim(m.axis, 0).norm(dim=1)
        chosen = np.zeros(len(norms), dtype=bool)
        for s in plan.slices:
            if s.parameter == m.name:
                chosen[s.index] = True
        inside += norms[chosen].tolist()
        outside += [n for n, c in zip(norms.tolist(), chosen, strict=True) if not c and m.shape[1 - m.axis] == smallest]
    assert max(outside) <= sorted(inside)[max(0, len(inside) // 20)]  # but for the last few, which only fill up

    plan = baselines.memflex(model, tokenizer, sets["forget"], retain, ratio=0.4, batch_size=2)
    about = plan.provenance["baseline"]
    cosine = {m.name: float(torch.cosine_similarity(f[m.name].ravel(), r[m.name].ravel(), dim=0)) for m in inputs.matrices}
    ready = {n for n, c in cosine.items() if c < MEMFLEX_COSINE and float(f[n].abs().mean()) > 6e-4}
    assert (about["ready"], about["ready_chosen"]) == (len(ready), len(ready & set(plan.parameters())))
    whole = sum(m.size for m in inputs.matrices if m.name in set(plan.parameters()))
    assert plan.weights_changed == whole <= 0.4 * total
    best = max(ready, key=lambda n: float(f[n].abs().mean()))
    assert best in plan.parameters()


def test_nodes(sets: Any, tokenizer: Any) -> None:
    from clue.circuit.attribution import attribute, graph_of
    from clue.config import LocalizeSettings
    from clue.data.pairs import make_pairs

    inputs = inputs_for("llama", sets, tokenizer, torch.float32)
    model, body = inputs.body.model, inputs.body
    plan = baselines.depn(model, tokenizer, sets["forget"], sets["retain"], ratio=0.1)
    found = unit_attribution(inputs, inputs.forget)
    chosen = {(int(n[1]), int(n.split(".n")[1])) for n, role in zip(plan.nodes, plan.role, strict=True)
              if role == Role.CONFLICT}
    order = np.argsort(-found.ravel(), kind="stable")[:len(chosen)]
    assert chosen == {(int(i // body.d_mlp), int(i % body.d_mlp)) for i in order}

    plan = baselines.eap(model, tokenizer, sets["forget"], sets["retain"], ratio=0.3, seed=1)
    graph = graph_of(body)
    scores = attribute(body, make_pairs(inputs.forget, tokenizer, seed=1), LocalizeSettings()).node_scores(graph)
    taken = plan.role == Role.CONFLICT
    assert plan.nodes == graph.names and taken.any()
    kinds = (NodeKind.Q, NodeKind.K, NodeKind.V, NodeKind.HEAD, NodeKind.NEURON)
    best = max((n for n in range(graph.n_nodes) if graph.kind[n] in kinds), key=lambda n: scores[n])
    assert taken[best] and not np.any(taken & ~np.isin(graph.kind, kinds))

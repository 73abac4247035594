"""Edge and neuron scores against finite differences, the conservation law, and the flat gates whose scores are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from clue.circuit.attribution import Scores, attribute
from clue.circuit.faithfulness import measure
from clue.circuit.graph import Graph
from clue.config import LocalizeSettings
from clue.data.pairs import Pairs
from clue.errors import AttributionError, ClueError, ModelError, RecordError
from clue.model.anatomy import anatomy
from clue.model.patching import record
from clue.types import Direction, NodeKind
from tests.families import VARIANTS, tiny
from tests.oracles.attribution import (
    InDouble,
    chained,
    final_residual,
    finite_differences,
    with_injection,
    with_output,
    writer_outputs,
)


def make_pairs(clean: list[list[int]], corrupted: list[list[int]], starts: list[int]) -> Pairs:
    def arrays(rows: list[list[int]]) -> tuple[np.ndarray, ...]:
        return tuple(np.array(row, dtype=np.int64) for row in rows)

    return Pairs(clean=arrays(clean), corrupted=arrays(corrupted), answer_start=np.array(starts, dtype=np.int64),
                 kind=("given",) * len(clean), sources=tuple(f"row {i}" for i in range(len(clean))), sha256="")


PAIRS = make_pairs([[1, 5, 7, 9, 4, 3], [1, 8, 6, 12, 3]], [[1, 6, 8, 9, 4, 3], [1, 8, 5, 12, 3]], [4, 3])


def margin(body, pairs: Pairs, i: int):
    """The target of one pair, written once more from its definition; one value per sequence of a batch."""
    clean, corrupted, start = pairs.clean[i], pairs.corrupted[i], int(pairs.answer_start[i])
    with torch.no_grad():
        top = body.model(torch.from_numpy(corrupted)[None]).logits[0].argmax(-1)

    def target(logits):
        terms = [logits[:, t - 1, clean[t]] - logits[:, t - 1, top[t - 1]] for t in range(start, len(clean))]
        return sum(terms) / len(terms)

    return target


@cache
def measured(name: str):
    """Anatomy and scores of a tiny model, and what each of its writers adds in the corrupted run more than in the clean."""
    with InDouble():
        body = anatomy(tiny(name))
        scores = attribute(body, PAIRS, LocalizeSettings(batch_size=2))
        changes = []
        for clean, corrupted in zip(PAIRS.clean, PAIRS.corrupted, strict=True):
            here, away = (writer_outputs(body, torch.from_numpy(ids)[None]) for ids in (clean, corrupted))
            changes.append({name: away[name] - here[name] for name in here})
    return body, scores, changes


def differentiated(body, writers: list[str], changes, run):
    """Central finite differences of every writer's injection through ``run``: Ns and Dn, [writers], mean over pairs."""
    ns, dn = np.zeros(len(writers)), np.zeros(len(writers))
    for i, change in enumerate(changes):
        clean, corrupted = (torch.from_numpy(ids[i])[None] for ids in (PAIRS.clean, PAIRS.corrupted))
        target = margin(body, PAIRS, i)
        moved = torch.cat([change[writer] for writer in writers])
        ns += finite_differences(run, clean, moved, target).numpy() / len(changes)
        dn += finite_differences(run, corrupted, -moved, target).numpy() / len(changes)
    return ns, dn


@pytest.mark.parametrize("name", VARIANTS)
def test_every_edge_equals_the_finite_difference(name, in_double):
    body, scores, changes = measured(name)
    graph = scores.graph
    want_ns, want_dn = np.zeros_like(scores.ns), np.zeros_like(scores.dn)
    for v, reader in enumerate(graph.readers):
        u = np.flatnonzero(graph.residual_edges[:, v])
        writers = [graph.name(writer) for writer in graph.writers[u]]
        want_ns[u, v], want_dn[u, v] = differentiated(body, writers, changes, partial(with_injection, body, graph, reader))
    assert min(np.abs(want_ns).max(), np.abs(want_dn).max()) > 1e-2
    np.testing.assert_allclose(scores.ns, want_ns, atol=1e-6 * np.abs(want_ns).max())
    np.testing.assert_allclose(scores.dn, want_dn, atol=1e-6 * np.abs(want_dn).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_neuron_equals_the_finite_difference(name, in_double):
    """A hidden unit is a writer too: what it adds, through W_down and an output norm, is injected behind its MLP."""
    body, scores, changes = measured(name)
    for layer in range(body.n_layers):
        units = [f"m{layer}.n{i}" for i in range(body.d_mlp)]
        ns, dn = differentiated(body, units, changes, partial(with_output, body, layer))
        np.testing.assert_allclose(scores.neuron_ns[layer], ns, atol=1e-6 * np.abs(ns).max())
        np.testing.assert_allclose(scores.neuron_dn[layer], dn, atol=1e-6 * np.abs(dn).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_books_balance(name, in_double):
    """Writers add up to the residual stream, the scores of a reader to its total, and neurons to their MLP."""
    body, scores, changes = measured(name)
    graph = scores.graph
    for i, change in enumerate(changes):
        clean, corrupted = (final_residual(body, torch.from_numpy(ids[i])[None]) for ids in (PAIRS.clean, PAIRS.corrupted))
        torch.testing.assert_close(sum(change[graph.name(u)] for u in graph.writers), corrupted - clean)
    assert max(scores.gap_ns, scores.gap_dn) < 1e-12
    mlps = np.flatnonzero(graph.kind[graph.writers] == NodeKind.MLP)
    np.testing.assert_allclose(scores.ns[mlps].sum(1), scores.neuron_ns.sum(1), atol=1e-12)
    np.testing.assert_allclose(scores.dn[mlps].sum(1), scores.neuron_dn.sum(1), atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("norm", ["exact", "frozen"])
def test_conservation_in_single_precision(name, norm):
    scores = attribute(anatomy(tiny(name, torch.float32)), PAIRS, LocalizeSettings(norm=norm))
    assert 0 <= scores.gap_ns < 1e-4
    assert 0 <= scores.gap_dn < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_conservation_in_half_precision(name):
    """Of models as they are initialised. The gap is relative to a sum that may almost cancel: hence the median of seeds."""
    gaps = []
    for seed, stream in enumerate(("never", "never", "always")):
        body = anatomy(tiny(name, torch.bfloat16, seed, initial=True))
        scores = attribute(body, PAIRS, LocalizeSettings(stream=stream, tolerance=1.0))
        gaps += [scores.gap_ns, scores.gap_dn]
    assert 0 < np.median(gaps) < 6e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_does_not_explain_is_nobodys(dtype):
    """A part of the stream that no writer adds breaks the books in half precision as well."""
    body = anatomy(tiny("llama", dtype))
    assert attribute(body, PAIRS, LocalizeSettings(tolerance=2e-2)).gap_ns < 2e-2
    body.layers[0].block.register_forward_hook(lambda module, args, output: output + output.roll(1, -1) / 8)
    with pytest.raises(AttributionError, match="break the conservation law"):
        attribute(body, PAIRS)


def test_parallel_blocks_have_no_edge_to_their_own_mlp():
    parallel, sequential = (measured(name)[1].graph for name in ("gpt_neox", "gpt_neox/sequential"))
    assert not np.any(parallel.residual_edges & ~sequential.residual_edges)
    missing = {(sequential.name(sequential.writers[u]), sequential.name(sequential.readers[v]))
               for u, v in np.argwhere(sequential.residual_edges & ~parallel.residual_edges)}
    assert missing == {(f"a{layer}.h{head}", f"m{layer}.in") for layer in range(2) for head in range(4)}


def test_batch_size_and_padding_do_not_matter(in_double):
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
    with torch.no_grad():
        body.embed.weight[6] = body.embed.weight[5]
    top = body.model(torch.tensor([[1, 5, 7, 9]])).logits[0, -1].argmax()
    same = make_pairs([[1, 5, 7, 9, int(top)]], [[1, 6, 7, 9, int(top)]], [4])
    with pytest.raises(AttributionError, match="none of the 1 corrupted prompts"):
        attribute(body, same, name="people")


CLEAN, CORRUPTED = [1, 5, 7, 9, 4, 3], [1, 6, 8, 9, 4, 3]


@pytest.mark.parametrize(("clean", "corrupted", "start", "message"), [
    (CLEAN, [*CORRUPTED, 3], 4, "the clean sequence has 6 tokens but the corrupted one has 7; give sequences of the same"),
    (CLEAN, [6], 4, "the corrupted one has 1;"),  # torch would repeat it
    (CLEAN, [1, 6, 8, 9, 4, 5], 4, "the answers of the clean and the corrupted sequence differ; end both with the clean"),
    (CLEAN, CORRUPTED, 0, "the answer starts at 0 of 6 tokens; let answer_start leave at least one token before it"),
    (CLEAN, CORRUPTED, -1, "the answer starts at -1 of 6 tokens"),
    (CLEAN, CORRUPTED, 6, "the answer starts at 6 of 6 tokens"),
    ([], [], 0, "the answer starts at 0 of 0 tokens"),
    ([1, *[5] * 32], [2, *[5] * 32], 4, r"the sequences have 33 tokens, the model's context 32; shorten them"),
    (CLEAN, CLEAN, 4, "the corrupted prompt is the clean one, and nothing differs; give another"),
    (CLEAN, [1, 6, 99, 9, 4, 3], 4, "yields token 99, the model knows 13 tokens: use the tokenizer that belongs to this"),
    (CLEAN, [1, -6, 8, 9, 4, 3], 4, "yields token -6"),
])
def test_a_pair_that_cannot_be_compared_is_refused_by_name(clean, corrupted, start, message):
    body = anatomy(tiny("llama"))
    pairs = make_pairs([CLEAN, clean], [CORRUPTED, corrupted], [4, start])
    for run in (attribute, partial(measure, count=0, part=None)):
        with pytest.raises(RecordError, match=f"row 1: .*{message}"):
            run(body, pairs)
    with pytest.raises(RecordError, match="2 clean and 2 corrupted sequences, 2 answer starts, 2 kinds and 1 sources; give"):
        attribute(body, replace(pairs, sources=("row 0",)))


@pytest.mark.parametrize(("settings", "message"), [
    ({"target": "log-prob"}, "target = 'log-prob' is not one of margin, logprob"), ({"norm": "freeze"}, "exact, frozen"),
    ({"path": "eap-ig"}, "half, chained, full"), ({"stream": "no"}, "auto, always, never"), ({"batch_size": 0}, "at least 1"),
    ({"path_steps": 3}, "an even number")])
def test_a_setting_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ClueError, match=message):
        attribute(anatomy(tiny("llama")), PAIRS, LocalizeSettings(**settings))


@pytest.mark.parametrize("run", [attribute, partial(measure, count=0, part=None)])
def test_a_model_without_its_anatomy_is_refused_by_what_makes_one(run):
    with pytest.raises(ModelError, match=r"got a LlamaForCausalLM: bind the model with clue.model.anatomy.anatomy\(model\)"):
        run(tiny("llama"), PAIRS)


def test_named_arguments_replace_the_settings():
    body = anatomy(tiny("llama", torch.float32))
    settings = LocalizeSettings(path_steps=4, target="logprob", norm="frozen")
    named = attribute(body, PAIRS, steps=4, target="log-prob", norm="frozen")
    np.testing.assert_array_equal(named.ns, attribute(body, PAIRS, settings).ns)
    assert not np.array_equal(named.ns, attribute(body, PAIRS, settings, norm="exact").ns)
    with pytest.raises(ClueError, match="path_steps = 3"):
        attribute(body, PAIRS, steps=3)


@pytest.mark.parametrize(("direction", "own", "other"), [(Direction.NOISING, "ns", "dn"), ("denoising", "dn", "ns")])
def test_one_direction_alone_is_that_of_both(direction, own, other):
    body = anatomy(tiny("llama"))
    both, one = attribute(body, PAIRS), attribute(body, PAIRS, direction=direction)
    for array in ("", "neuron_", "neuron_sq_"):
        np.testing.assert_array_equal(getattr(one, array + own), getattr(both, array + own))
        assert not getattr(one, array + other).any()
    assert getattr(one, f"gap_{own}") == getattr(both, f"gap_{own}")
    assert np.isnan(getattr(one, f"gap_{other}"))
    with pytest.raises(ClueError, match=r"^direction = 'both' is not one of Direction.NOISING, Direction.DENOISING, None$"):
        attribute(body, PAIRS, direction="both")


def test_an_answer_that_corruption_makes_less_likely_is_enough_for_its_probability():
    """Its token stays on top: the margin is zero, the log-probability is not."""
    body = anatomy(tiny("llama"))
    top = int(body.model(torch.tensor([[1, 6, 8]])).logits[0, -1].argmax())
    pairs = make_pairs([[1, 5, 7, top]], [[1, 6, 8, top]], [3])
    with pytest.raises(AttributionError, match="changes the model's answer"):
        attribute(body, pairs)
    assert attribute(body, pairs, target="log-prob").ns.any()


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_padding_beyond_a_short_window_reaches_nobody(name, in_double):
    """transformers' own attention makes NaN of a row that may look at nothing, in float64."""
    body = anatomy(tiny(name, attn_implementation="eager", sliding_window=2))
    pairs = make_pairs([[1, 5, 7, 9, 4, 3, 2, 8, 6], [1, 8, 6]], [[1, 6, 8, 9, 4, 3, 2, 8, 6], [1, 5, 6]], [7, 2])
    together, apart = (attribute(body, pairs, LocalizeSettings(batch_size=size)) for size in (2, 1))
    np.testing.assert_allclose(together.ns, apart.ns, atol=1e-12)
    assert np.isfinite(measure(body, pairs, 0, lambda i: None).full).all()


def test_mixed_precision_around_it_changes_nothing():
    body = anatomy(tiny("llama", torch.float32))
    plain = attribute(body, PAIRS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attribute(body, PAIRS)
    np.testing.assert_array_equal(mixed.ns, plain.ns)


def test_weights_of_inference_mode_are_refused_and_stay_as_they_are():
    with torch.inference_mode():
        model = tiny("llama", torch.float32)
    body = anatomy(model)
    with pytest.raises(ModelError, match=r"weights that were made inside torch.inference_mode\(\) take none: load the model"):
        attribute(body, PAIRS)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stream", ["never", "always"])
def test_autocast_inside_the_forward_pass_is_named(stream):
    """As accelerate's prepare puts it there; it was told as an entry that does not fit."""
    model = tiny("llama", torch.float32)
    plain = attribute(anatomy(model), PAIRS)
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    body, settings = anatomy(model), LocalizeSettings(stream=stream)
    for run in (lambda: attribute(body, PAIRS, settings), lambda: measure(body, PAIRS, 0, None, settings)):
        with pytest.raises(ModelError, match=r"turns autocast on.*keep_fp32_wrapper=False"):
            run()
    del model.forward
    np.testing.assert_array_equal(attribute(body, PAIRS).ns, plain.ns)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inference_mode_is_refused_before_anything_runs():
    """Tensors of inference mode cannot be differentiated, and the error of torch would not say what to do."""
    body = anatomy(tiny("llama"))
    with torch.inference_mode(), pytest.raises(ModelError, match=r"inference_mode\(\) gives none: call this outside"):
        attribute(body, PAIRS)


def test_a_broken_anatomy_is_refused():
    """Swap two layers in the table: the books no longer balance."""
    body = anatomy(tiny("llama"))
    with pytest.raises(AttributionError, match="conservation"):
        attribute(replace(body, layers=(body.layers[0], replace(body.layers[1], o=body.layers[0].o))), PAIRS)


def test_an_entry_that_names_a_module_that_never_runs_is_refused():
    body = anatomy(tiny("llama"))
    apart = replace(body, layers=(replace(body.layers[0], mlp=torch.nn.Identity()), body.layers[1]))
    with pytest.raises(ModelError, match=r"1 of 2 layers passed .* llama entry .*mlp_input"):
        attribute(apart, PAIRS)


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_forward_pass_that_goes_past_what_is_watched_is_refused(stream):
    body = anatomy(tiny("llama"))
    block = body.layers[0].block
    forward = block.forward

    def past(x, **given):  # the layer does what it did, and nothing of it can be differentiated
        return x + (forward(x, **given) - x).detach()

    block.forward = past
    with pytest.raises(ModelError, match="no gradient reaches the modules of a layer that the llama entry names"):
        attribute(body, PAIRS, LocalizeSettings(stream=stream))
    block.forward = forward
    query = body.layers[1].q.module  # a kernel that uses the weight of a projection alone
    query.__class__ = type("Apart", (torch.nn.Linear,), {"__call__": lambda self, x: x @ self.weight.T})
    with pytest.raises(ModelError, match=r"[01] of [12] layers passed through .* llama entry names \(q, k and v\)"):
        attribute(body, PAIRS, LocalizeSettings(stream=stream))
    with pytest.raises(ModelError, match="1 of 2 layers passed through the modules that the llama entry names"):
        record(body, torch.tensor([[1, 5, 7]]), torch.ones(1, 3, dtype=torch.int64), torch.arange(3))


def test_scores_round_trip(tmp_path):
    scores = attribute(anatomy(tiny("llama")), PAIRS, name="people")
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert (again.name, again.graph, again.gap_dn) == ("people", scores.graph, scores.gap_dn)
    np.testing.assert_array_equal(again.neuron_dn, scores.neuron_dn)


# The path between the two prompts


def along_the_path(body, i: int, alpha: float) -> tuple[float, float]:
    """The target of pair i at one point of its path, and <corrupted - clean embedding, gradient there>, by autograd
    through the whole model."""
    target = margin(body, PAIRS, i)
    clean, corrupted = (torch.from_numpy(ids[i])[None] for ids in (PAIRS.clean, PAIRS.corrupted))
    here, away = (writer_outputs(body, ids)["embed"] for ids in (clean, corrupted))
    point = torch.lerp(here, away, alpha).requires_grad_()
    handle = body.layers[0].block.register_forward_pre_hook(
        lambda module, args, kwargs: ((point, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": point}),
        with_kwargs=True)
    value = target(body.model(clean).logits)[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(value, point)
    return float(value.detach()), float(((away - here) * gradient).sum())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_each_direction_is_the_mean_over_its_half_of_the_path(name, steps):
    """All readers of the embedding together see the embedding's whole gradient."""
    with InDouble():
        body = anatomy(tiny(name))
        points = [sum(along_the_path(body, i, step / (steps - 1))[1] for i in range(2)) / 2 for step in range(steps)]
        half = attribute(body, PAIRS, LocalizeSettings(batch_size=2, path_steps=steps))
        full = attribute(body, PAIRS, LocalizeSettings(batch_size=1, path_steps=steps, path="full"))
    middle = steps // 2
    assert half.ns[0].sum() == pytest.approx(np.mean(points[:middle]), rel=1e-8)
    assert half.dn[0].sum() == pytest.approx(-np.mean(points[middle:]), rel=1e-8)
    # Their mean is EAP-IG, edge by edge and neuron by neuron.
    np.testing.assert_allclose(full.ns, (half.ns - half.dn) / 2, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(full.ns, -full.dn, rtol=1e-12)
    np.testing.assert_allclose(full.neuron_ns, (half.neuron_ns - half.neuron_dn) / 2, rtol=1e-8, atol=1e-12)
    assert max(half.gap_ns, half.gap_dn, full.gap_ns) < 1e-9


def test_a_fine_full_path_adds_up_to_the_change_of_the_target():
    """Completeness of integrated gradients (arXiv 1703.01365): what the embedding carries is the whole difference."""
    with InDouble():
        body = anatomy(tiny("llama"))
        change = sum(along_the_path(body, i, 1.0)[0] - along_the_path(body, i, 0.0)[0] for i in range(2)) / 2
        gaps = [abs(attribute(body, PAIRS, LocalizeSettings(path_steps=steps, path="full")).ns[0].sum() - change)
                for steps in (2, 16, 128)]
    assert gaps[2] < 0.02 * abs(change)
    assert gaps[2] < gaps[1] / 4


# Chained runs


def differentiated_chain(body, writers: list[str], changes, run):
    """:func:`differentiated`, where both runs go on from every block with the mean of how far they were moved."""
    def both(prompts, end, _, extra):
        still = torch.zeros_like(extra)
        return run(prompts.repeat_interleave(len(extra), 0), torch.cat((extra, still) if end == 0 else (still, extra)))

    found = np.zeros((2, len(writers)))
    for i, change in enumerate(changes):
        prompts = torch.from_numpy(np.stack([PAIRS.clean[i], PAIRS.corrupted[i]]))
        of_one = margin(body, PAIRS, i)
        moved = torch.cat([change[writer] for writer in writers])
        for end, sign in enumerate((1, -1)):
            with chained(body, prompts):
                found[end] += finite_differences(partial(both, prompts, end), prompts[:1], sign * moved, partial(
                    lambda target, logits: sum(target(logits).chunk(2)), of_one)).numpy() / len(changes)
    return found


#: Each way in which a block reads the residual stream, and is read from.
SHAPES = ("llama", "granite", "gpt_neox", "gptj", "gemma2", "olmo2", "opt", "falcon", "falcon/sequential", "qwen2_moe", "phi")


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_chained_score_equals_the_finite_difference(name, stream, in_double):
    body, _, changes = measured(name)
    scores = attribute(body, PAIRS, LocalizeSettings(batch_size=2, path="chained", stream=stream))
    graph = scores.graph
    want = np.zeros((2, *scores.ns.shape))
    for v, reader in enumerate(graph.readers):
        u = np.flatnonzero(graph.residual_edges[:, v])
        writers = [graph.name(writer) for writer in graph.writers[u]]
        want[:, u, v] = differentiated_chain(body, writers, changes, partial(with_injection, body, graph, reader))
    for got, edges in zip((scores.ns, scores.dn), want, strict=True):
        assert np.abs(edges).max() > 1e-2
        np.testing.assert_allclose(got, edges, atol=1e-6 * np.abs(edges).max())
    for layer in range(body.n_layers):
        units = [f"m{layer}.n{i}" for i in range(body.d_mlp)]
        ns, dn = differentiated_chain(body, units, changes, partial(with_output, body, layer))
        np.testing.assert_allclose(scores.neuron_ns[layer], ns, atol=1e-6 * np.abs(ns).max())
        np.testing.assert_allclose(scores.neuron_dn[layer], dn, atol=1e-6 * np.abs(dn).max())


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("name", VARIANTS)
def test_chained_books_balance_however_many_pairs_go_together(name, stream, in_double):
    body = anatomy(tiny(name))
    settings = LocalizeSettings(path="chained", path_steps=4, stream=stream)
    one, both = (attribute(body, PAIRS, replace(settings, batch_size=size)) for size in (1, 2))
    assert max(both.gap_ns, both.gap_dn) < 1e-12
    for array in ("ns", "dn", "neuron_ns", "neuron_dn", "neuron_sq_ns", "neuron_sq_dn"):
        np.testing.assert_allclose(getattr(one, array), getattr(both, array), rtol=1e-9, atol=1e-12)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.model.modules())


@pytest.mark.parametrize("neurons", [True, False])
def test_a_node_is_as_strong_as_what_leaves_or_enters_it(neurons):
    graph, rng = Graph(2, 2, 1, 3, neurons), np.random.default_rng(0)
    edges = [np.where(graph.residual_edges, rng.normal(size=graph.residual_edges.shape), 0.0) for _ in range(2)]
    units = [rng.normal(size=(2, 3)) for _ in range(2)]
    found = Scores("s", graph, *edges, *units, *units, 1, 1, 1, 0.0, 0.0).node_scores(graph)
    for node in range(graph.n_nodes):
        ways = [0.0]
        for edge, unit in zip(edges, units, strict=True):
            if graph.kind[node] == NodeKind.NEURON:
                ways.append(unit[graph.layer[node], graph.index[node]])
            ways += [edge[writer].sum() for writer in np.flatnonzero(graph.writers == node)]
            ways += [edge[:, reader].sum() for reader in np.flatnonzero(graph.readers == node)]
        assert found[node] == pytest.approx(max(map(abs, ways)))

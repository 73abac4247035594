"""Patched runs of every family against a slow oracle, against the runs they lie between, and against attribution."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch

from clue.circuit.attribution import graph_of
from clue.circuit.target import Prompts
from clue.errors import CircuitError, ModelError
from clue.model import patching
from clue.model.anatomy import anatomy
from clue.model.experts import Routed
from clue.model.patching import Recording, patched, record
from tests.circuit.test_attribution import PAIRS, measured
from tests.families import VARIANTS, tiny
from tests.oracles.attribution import InDouble, hooks, with_injection, writer_outputs
from tests.oracles.patching import patched_logits

CLEAN, CORRUPTED = (torch.tensor([[1, 5, 7, 9, 4, 3], [1, 8, 6, 12, 3, 2]]),
                    torch.tensor([[1, 6, 8, 9, 4, 3], [1, 8, 5, 10, 3, 2]]))
MASK, POSITIONS = torch.ones_like(CLEAN), torch.arange(CLEAN.shape[1])
EVERYTHING = (MASK, POSITIONS)


@cache
def bound(name: str):
    """Anatomy and graph of a tiny model, and what its two runs carry."""
    with InDouble():
        body = anatomy(tiny(name))
        return body, graph_of(body), record(body, CLEAN, *EVERYTHING), record(body, CORRUPTED, *EVERYTHING)


def between(a: Recording, b: Recording, share: float) -> Recording:
    """What a run would carry whose difference from ``a`` is ``share`` times that of ``b``.

    Nothing lies between two routings: ``routed``, which only patched hidden units look at, stays that of ``a``.
    """
    values = {"routed": a.routed}
    for f in fields(Recording):
        if f.name in values:
            continue
        x, y = getattr(a, f.name), getattr(b, f.name)
        values[f.name] = torch.lerp(x, y, share) if isinstance(x, torch.Tensor) else [
            torch.lerp(i, j, share) for i, j in zip(x, y, strict=True)]
    return Recording(**values)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_patched_is_the_run_itself_and_everything_patched_the_other(name, in_double):
    body, graph, clean, corrupted = bound(name)
    none = np.zeros(graph.residual_edges.shape, dtype=bool)
    units = np.zeros((body.n_layers, body.d_mlp), dtype=bool)
    with torch.no_grad():
        own, others = (body.model(ids, use_cache=False).logits for ids in (CLEAN, CORRUPTED))
    assert torch.equal(clean.logits, own)
    assert torch.equal(patched(body, CLEAN, *EVERYTHING, corrupted, none, units), own)
    torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, ~none), others)
    # All edges but one reader's: the writers sum up to the residual stream, term by term.
    most = ~none
    most[1:, -1] = False
    torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, most), others)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_patched_edge_equals_the_injection_of_its_difference(name, in_double):
    body, graph, _, corrupted = bound(name)
    here, away = (writer_outputs(body, ids) for ids in (CLEAN, CORRUPTED))
    random = np.random.default_rng(0)
    for v in random.choice(len(graph.readers), 6, replace=False).tolist():
        u = int(random.choice(np.flatnonzero(graph.residual_edges[:, v])))
        edges = np.zeros(graph.residual_edges.shape, dtype=bool)
        edges[u, v] = True
        writer = graph.name(graph.writers[u])
        want = with_injection(body, graph, graph.readers[v], CLEAN, away[writer] - here[writer])
        torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, edges), want)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_many_patched_edges_and_neurons_equal_the_oracle(name, share, in_double):
    body, graph, _, corrupted = bound(name)
    random = np.random.default_rng(int(100 * share))
    edges = random.random(graph.residual_edges.shape) < share
    units = random.random((body.n_layers, body.d_mlp)) < share
    want = patched_logits(body, graph, CLEAN, CORRUPTED, edges, units)
    torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, edges, units), want)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_patched_run_routes_for_itself(name, in_double):
    """Some tokens go to experts that neither run alone sends them to, and the oracle is met there too."""
    body, graph, clean, corrupted = bound(name)
    own = 0
    for seed in range(4):
        random = np.random.default_rng(seed)
        edges = random.random(graph.residual_edges.shape) < 0.5
        units = random.random((body.n_layers, body.d_mlp)) < 0.5
        seen = []
        with hooks(*(layer.experts.module.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(Routed.of(args, {}))) for layer in body.layers)):
            found = patched(body, CLEAN, *EVERYTHING, corrupted, edges, units)
        torch.testing.assert_close(found, patched_logits(body, graph, CLEAN, CORRUPTED, edges, units))
        here, now, away = (torch.stack([run.index for run in runs]).sort(-1).values
                           for runs in (clean.routed, seen, corrupted.routed))
        own += int(((now != here).any(-1) & (now != away).any(-1)).sum())
    assert own > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_small_patch_does_what_the_score_says(name, in_double):
    """To first order the effect of an edge that carries eps times its difference is eps times its Ns."""
    body, scores, _ = measured(name)
    graph, eps = scores.graph, 1e-5
    prompts = Prompts.of(PAIRS, np.arange(2), torch.device("cpu"))
    given = (prompts.mask, prompts.positions)
    clean, corrupted = (record(body, ids, *given) for ids in (prompts.clean, prompts.corrupted))
    contrast = prompts.contrast(corrupted.logits)
    random = np.random.default_rng(1)
    for u, v in random.choice(np.argwhere(graph.residual_edges), 8, replace=False).tolist():
        edges = np.zeros(graph.residual_edges.shape, dtype=bool)
        edges[u, v] = True
        up, down = (prompts.values("margin", patched(body, prompts.clean, *given, between(clean, corrupted, share), edges),
                                   contrast).mean() for share in (eps, -eps))
        assert float(up - down) / (2 * eps) == pytest.approx(scores.ns[u, v], abs=1e-6 * np.abs(scores.ns).max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon", "opt", "olmo2/biased"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_tiles_and_what_is_held_do_not_matter(name, share, in_double, monkeypatch):
    body, graph, _, corrupted = bound(name)
    edges = np.random.default_rng(5).random(graph.residual_edges.shape) < share
    whole = patched(body, CLEAN, *EVERYTHING, corrupted, edges)
    monkeypatch.setattr(patching, "EXPANDED_BYTES", 0)
    torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, edges), whole)
    monkeypatch.setattr(patching, "TILE_BYTES", 1)
    torch.testing.assert_close(patched(body, CLEAN, *EVERYTHING, corrupted, edges), whole)


def test_padding_and_positions_do_not_matter(in_double):
    body, graph, _, corrupted = bound("llama")
    edges = np.random.default_rng(6).random(graph.residual_edges.shape) < 0.5
    whole = patched(body, CLEAN, *EVERYTHING, corrupted, edges)
    mask, at = MASK.clone(), torch.tensor([2, 3])
    mask[1, 5:] = 0
    ids, others = CLEAN.clone(), CORRUPTED.clone()
    ids[1, 5:] = others[1, 5:] = 0
    part = patched(body, ids, mask, at, record(body, others, mask, at), edges)
    torch.testing.assert_close(part, whole[:, at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "qwen2_moe"])
def test_coarser_dtypes_stay_exact_at_the_ends_and_near_between(name, dtype):
    body, graph, _, corrupted = bound(name)
    random = np.random.default_rng(7)
    some, units = (random.random(shape) < 0.5 for shape in (graph.residual_edges.shape, (body.n_layers, body.d_mlp)))
    coarse = anatomy(tiny(name).to(dtype))
    other = record(coarse, CORRUPTED, *EVERYTHING)
    none = np.zeros(graph.residual_edges.shape, dtype=bool)
    assert other.logits.dtype == torch.float32  # what is computed of them is not to be rounded again
    assert torch.equal(patched(coarse, CLEAN, *EVERYTHING, other, ~none), other.logits)
    assert torch.equal(patched(coarse, CLEAN, *EVERYTHING, other, none), record(coarse, CLEAN, *EVERYTHING).logits)
    with InDouble():
        want = patched(body, CLEAN, *EVERYTHING, corrupted, some, units)
    found = patched(coarse, CLEAN, *EVERYTHING, other, some, units).double()
    assert (found - want).norm() < (1e-4 if dtype == torch.float32 else 0.1) * want.norm()


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp"])
def test_what_the_model_does_not_compute_with_is_an_error(path):
    """A module of one layer is another one than when the model was bound: nothing passes through the old one."""
    model = tiny("llama")
    body = anatomy(model)
    model.model.layers[1].set_submodule(path, copy.deepcopy(model.model.layers[1].get_submodule(path)))
    with pytest.raises(ModelError, match="1 of 2 layers passed through the modules that the llama entry names"):
        record(body, CLEAN, *EVERYTHING)


def test_hooks_are_gone_afterwards_even_after_an_error():
    body, graph, _, corrupted = bound("llama")
    edges = np.ones(graph.residual_edges.shape, dtype=bool)
    with pytest.raises(IndexError):
        patched(body, CLEAN, *EVERYTHING, replace(corrupted, mlps=[]), edges)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.model.modules())


def test_shapes_are_checked():
    body, graph, _, corrupted = bound("llama")
    with pytest.raises(CircuitError, match=r"edges has shape \(2, 2\), this model's graph has \(11, 19\)"):
        patched(body, CLEAN, *EVERYTHING, corrupted, np.ones((2, 2), dtype=bool))
    with pytest.raises(CircuitError, match="neurons has shape"):
        patched(body, CLEAN, *EVERYTHING, corrupted, graph.residual_edges, np.ones((1, 1), dtype=bool))

"""Attribution under pressure: streamed runs, too little memory, several processes, and models left in training mode."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from clue.circuit import accumulation, attribution
from clue.circuit.attribution import attribute
from clue.config import LocalizeSettings
from clue.errors import AttributionError
from clue.model import capture
from clue.model.anatomy import anatomy
from tests.circuit.test_attribution import PAIRS, make_pairs
from tests.families import VARIANTS, tiny


def agree(one, other, tolerance=1e-12):
    for name in ("ns", "dn", "neuron_ns", "neuron_dn", "neuron_sq_ns", "neuron_sq_dn"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), err_msg=name)
    assert (one.tokens, one.pairs, one.informative) == (other.tokens, other.pairs, other.informative)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_streamed_run_gives_the_same_scores(name, in_double, monkeypatch):
    """Also where logits come one position at a time, readers one layer at a time, and tokens one at a time."""
    body = anatomy(tiny(name))
    settings = {"batch_size": 2, "path_steps": 4}
    whole = attribute(body, PAIRS, LocalizeSettings(stream="never", **settings))
    agree(attribute(body, PAIRS, LocalizeSettings(stream="always", **settings)), whole)
    monkeypatch.setattr(capture, "LOGIT_BYTES", 1)
    monkeypatch.setattr(attribution, "GROUP", 1)
    monkeypatch.setattr(attribution, "TILE_BYTES", 1)
    monkeypatch.setattr(accumulation, "COLUMNS", 1)
    agree(attribute(body, PAIRS, LocalizeSettings(stream="always", **settings)), whole)
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                   for module in body.model.modules())


@pytest.mark.parametrize(("name", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_model_of_one_layer_streams(name, layers, in_double):
    body = anatomy(tiny(name, **{layers: 1}))
    agree(*(attribute(body, PAIRS, LocalizeSettings(stream=stream)) for stream in ("always", "never")))


class Saved:
    """A tensor that autograd keeps for a backward pass, counted while it is alive."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel()
        Saved.now += self.size
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self):
        Saved.now -= self.size


def test_a_streamed_run_keeps_the_activations_of_one_layer():
    body = anatomy(tiny("llama", torch.float32, num_hidden_layers=12))
    most = {}
    for stream in ("never", "always"):
        Saved.now = Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            attribute(body, PAIRS, LocalizeSettings(batch_size=2, stream=stream))
        most[stream] = Saved.most
    assert most["always"] < most["never"] / 9


def test_auto_streams_what_does_not_fit(monkeypatch):
    body = anatomy(tiny("llama"))
    streamed = []
    run = capture.run
    monkeypatch.setattr(capture, "run", lambda *a, stream, **k: (streamed.append(stream), run(*a, stream=stream, **k))[1])
    attribute(body, PAIRS, LocalizeSettings(batch_size=2))
    assert streamed == [False, False]
    monkeypatch.setattr(attribution, "_available", lambda: 1)
    streamed.clear()
    attribute(body, PAIRS, LocalizeSettings(batch_size=2))
    assert streamed == [True, True]


@pytest.mark.parametrize(("said", "expected"), [
    ("MemTotal:  900 kB\nMemFree:  1 kB\nMemAvailable:  5 kB\nCached: 7 kB\n", 5120), ("MemFree:  1 kB\n", 6), (None, 6)])
def test_files_that_the_system_remembers_do_not_count_as_used(monkeypatch, said, expected):
    def read(path, **keywords):
        if said is None:
            raise FileNotFoundError(path)
        assert str(path) == "/proc/meminfo"
        return said

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 2, "SC_PAGE_SIZE": 3}.__getitem__)
    assert attribution._available() == expected


def test_too_little_memory_falls_back_and_says_so(monkeypatch):
    """Memory that suffices only for streamed runs of a single pair: every way out is taken, and nothing counts twice."""
    body = anatomy(tiny("llama"))
    want = attribute(body, PAIRS, LocalizeSettings(batch_size=2))
    run = capture.run

    def scarce(body, ids, *arguments, stream, **named):
        if len(ids) > 1 or not stream:
            raise torch.OutOfMemoryError("out of memory, tried to allocate 2 GiB\nand more")
        return run(body, ids, *arguments, stream=stream, **named)

    monkeypatch.setattr(capture, "run", scarce)
    with pytest.warns(UserWarning, match=r"people: out of memory \(.*2 GiB\); going on with") as told:
        found = attribute(body, PAIRS, LocalizeSettings(batch_size=2), name="people")
    said = [str(warning.message) for warning in told]
    assert [text.split("going on with ")[1] for text in said] == ["tiles of 8 MB", "tiles of 4 MB", "one layer at a time",
                                                                  "1 pairs at a time"]
    agree(found, want, 1e-9)


@pytest.mark.parametrize("message", [
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory", "neuron_attribution: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_no_memory_at_all_is_an_error_that_says_what_to_do(monkeypatch, message):
    def none(*arguments, **named):
        raise RuntimeError(message)

    monkeypatch.setattr(capture, "run", none)
    with pytest.warns(UserWarning, match="going on"), pytest.raises(AttributionError, match="single pair.*max_length"):
        attribute(anatomy(tiny("llama")), PAIRS, name="people")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(capture, "run", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        attribute(anatomy(tiny("llama")), PAIRS)


def test_dropout_and_checkpointing_left_on_do_not_matter():
    quiet = attribute(anatomy(tiny("llama", torch.float32)), PAIRS)
    model = tiny("llama", torch.float32, attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    for stream in ("never", "always"):
        agree(attribute(anatomy(model), PAIRS, LocalizeSettings(stream=stream)), quiet, 1e-4)
    assert model.training
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(("name", "changes"), [
    ("mixtral", {"output_router_logits": True}), ("qwen2_moe", {"output_router_logits": True, "output_hidden_states": True}),
    ("falcon/sequential", {"output_attentions": True, "attn_implementation": "eager"}),
])
def test_what_a_configuration_asks_for_besides_logits_does_not_matter(name, changes):
    asked = {key: value for key, value in changes.items() if key.startswith("output_")}
    body, plain = anatomy(tiny(name, **changes)), anatomy(tiny(name, **{k: v for k, v in changes.items() if k not in asked}))
    for stream in ("never", "always"):
        settings = LocalizeSettings(stream=stream)
        agree(attribute(body, PAIRS, settings), attribute(plain, PAIRS, settings), tolerance=1e-9)
    assert all(getattr(body.model.config, key) == value for key, value in asked.items())


def test_a_vanishing_gradient_is_an_error():
    """With all weights of the output at zero nothing reaches the logits."""
    model = tiny("llama", torch.float32)
    torch.nn.init.zeros_(model.model.norm.weight)
    pairs = make_pairs([[1, 5, 7, 9, 4]], [[1, 6, 8, 9, 4]], [4])
    with pytest.raises(AttributionError, match="gradient at the clean prompts is zero everywhere"):
        attribute(anatomy(model), pairs)


def test_neurons_alone_are_the_same_neurons():
    body = anatomy(tiny("qwen2", torch.float32))
    whole, alone = attribute(body, PAIRS), attribute(body, PAIRS, neurons_only=True)
    np.testing.assert_array_equal(alone.neuron_ns, whole.neuron_ns)
    np.testing.assert_array_equal(alone.neuron_sq_dn, whole.neuron_sq_dn)
    assert not alone.ns.any()


def test_processes_share_the_work():
    """Two gloo processes, three batches: both end with the scores of a single process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = textwrap.dedent("""
        import sys
        import numpy as np
        import torch.distributed as dist
        from clue.circuit.attribution import attribute
        from clue.config import LocalizeSettings
        from clue.errors import AttributionError
        from clue.model.anatomy import anatomy
        from tests.circuit.test_attribution import make_pairs
        from tests.circuit.test_streaming import agree
        from tests.families import tiny
        body = anatomy(tiny("llama"))
        random = np.random.default_rng(0)
        clean, corrupted = (random.integers(3, 13, (5, 6)).tolist() for _ in range(2))
        pairs = make_pairs(clean, [c[:3] + k[3:] for c, k in zip(corrupted, clean)], [4] * 5)
        settings = LocalizeSettings(batch_size=2)
        alone = attribute(body, pairs, settings)
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
        seen = []
        shared = attribute(body, pairs, settings, on_batch=lambda done, of: seen.append(done))
        assert len(seen) == 2 - rank, seen
        agree(shared, alone, 1e-6)
        assert abs(shared.gap_ns - alone.gap_ns) < 1e-6

        # One that fails does not leave the others waiting.
        def broken(done, of):
            raise ValueError("mine")

        try:
            attribute(body, pairs, settings, name="people", on_batch=broken if rank else None)
        except (ValueError, AttributionError) as error:
            assert str(error) == ("mine" if rank else "people: another of the processes failed; its own message says why")
        else:
            raise AssertionError("nothing was raised")
        dist.destroy_process_group()
    """)
    workers = [subprocess.Popen([sys.executable, "-c", program, str(rank), str(port)], stderr=subprocess.PIPE, text=True)
               for rank in range(2)]
    for worker in workers:
        error = worker.communicate(timeout=300)[1]
        assert worker.returncode == 0, error

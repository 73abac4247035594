"""Loading: what is no whole causal language model is told in one sentence."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from clue.config import Settings
from clue.errors import ModelError
from clue.loading import check_model, load_model, of_hub
from tests.families import tiny
from tests.unlearn.conftest import build_model, build_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def changed(saved: Path, tmp_path: Path, **fields: Any) -> str:
    folder = shutil.copytree(saved, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return str(folder)


def test_a_whole_model_is_loaded(saved: Path) -> None:
    model, tokenizer = load_model(str(saved), Settings())
    assert not model.training and tokenizer("where")["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), build_model().state_dict().values(), strict=True))


@pytest.mark.parametrize(("name", "width", "expected"), [("mixtral", "intermediate_size", "eager"),
                                                         ("qwen3_moe", "moe_intermediate_size", "eager"),
                                                         ("mixtral", None, "grouped_mm")])
def test_experts_of_any_width_run(name: str, width: str | None, expected: str, tmp_path: Path) -> None:
    """By default transformers multiplies them in a way that refuses rows which are no multiple of 16 bytes."""
    model = tiny(name, torch.float32, experts_implementation=None, **({width: 5} if width else {}))
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), Settings())
    assert loaded.config._experts_implementation == expected
    with torch.no_grad():
        logits = loaded(torch.tensor([[1, 5, 7, 9]])).logits
        loaded.set_experts_implementation("eager")
        torch.testing.assert_close(logits, loaded(torch.tensor([[1, 5, 7, 9]])).logits)


def test_weights_that_would_be_drawn_at_random_are_missing(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks 13 of \d+ weights of a LlamaForCausalLM, model\.layers\.2\..* first: give"):
        load_model(changed(saved, tmp_path, num_hidden_layers=3), Settings())
    base = tmp_path / "base"
    build_model().model.save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match=r"lacks 1 of \d+ weights of a LlamaForCausalLM, lm_head\.weight first"):
        load_model(str(base), Settings())
    tied = tmp_path / "tied"
    build_model(tie_word_embeddings=True).save_pretrained(tied)
    build_tokenizer().save_pretrained(tied)
    load_model(str(tied), Settings())  # its head is the embedding, which is there


@pytest.mark.parametrize("source", ["./nowhere", "some/folder/nowhere", "models/", "a b", "/nowhere"])
def test_what_is_neither_here_nor_a_hub_id_is_said_at_once(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    with pytest.raises(ModelError, match=f"{source} does not exist, and is no hub id either: give the folder of a saved"):
        load_model(source, Settings())
    assert of_hub("owner/name") and of_hub("gpt2") and not of_hub("tests")


@pytest.mark.parametrize("fields", [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {"num_attention_heads": "4"},
    {"hidden_size": 30}, {"model_type": "nobody-knows"},
])
def test_configurations_that_cannot_be_are_one_sentence(saved: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(changed(saved, tmp_path, **fields), Settings())


def test_a_tokenizer_that_cannot_be_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path)
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Nonsense"
    (Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(folder, Settings())


class Hub(BaseHTTPRequestHandler):
    """A hub that holds nothing, and hangs up where ``server.answers`` is off; it counts what it is asked."""

    def do_HEAD(self) -> None:
        self.server.asked += 1  # type: ignore[attr-defined]
        if self.server.answers:  # type: ignore[attr-defined]
            self.send_error(404)

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Hub)
    server.answers, server.asked = False, 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_does_not_answer_is_asked_twice(hub: Any, saved: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="nobody cannot be loaded .*find them in the cached files.*one this machine can"):
        load_model("nobody", Settings())
    assert hub.asked == 2
    downloaded = tmp_path / "models--owner--name"  # as the hub's library leaves it
    shutil.copytree(saved, downloaded / "snapshots" / ("a" * 40))
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("a" * 40)
    load_model("owner/name", Settings())
    check_model("owner/name")
    assert hub.asked == 6
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_model("owner/name", Settings())
    assert hub.asked == 6


def test_a_hub_that_answers_is_asked_for_the_files(hub: Any) -> None:
    hub.answers = True
    with pytest.raises(ModelError, match="nobody cannot be loaded"):
        check_model("nobody")
    assert hub.asked > 1

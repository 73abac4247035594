"""Loading: a causal language model and its tokenizer, from a folder or a hub id, or one sentence on why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from .config import Settings


def load_model(source: str, settings: Settings) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder or a hub id.

    Raises:
        ModelError: nothing is there, it is no causal language model, or its tokenizer cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .data.encoding import end_id, pad_id

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _told(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype)
    # Not every stage needs these tokens; the first command should be the one to say that they are missing.
    pad_id(tokenizer)
    if settings.data.append_eos:
        end_id(tokenizer)
    return network.to(device).eval(), tokenizer


def check_model(source: str) -> None:
    """Raise :class:`ModelError` unless a model's configuration is there: what can be said before its weights are read."""
    from transformers import AutoConfig

    with _told(source):
        AutoConfig.from_pretrained(source)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """What transformers raises for a model that it cannot load, as a :class:`ModelError`."""
    from safetensors import SafetensorError

    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json: give the folder of a saved causal language model, or a hub id")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{source} cannot be loaded as a causal language model ({reason}): give the folder of a saved"
                         " model with its tokenizer, or the hub id of one this machine can reach") from None

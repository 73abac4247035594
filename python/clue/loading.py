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
        ModelError: nothing is there, it is no causal language model, weights of it are missing, or its tokenizer cannot be
            read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .data.encoding import end_id, pad_id

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _told(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype, output_loading_info=True)
    network, told = loaded
    weights = {name for name, _ in network.named_parameters()}
    missing = sorted(weights & set(told["missing_keys"]))
    if missing:  # they were drawn at random, and anew with every load
        raise ModelError(f"{source} lacks {len(missing)} of {len(weights)} weights of a {type(network).__name__}, {missing[0]}"
                         " first: give a causal language model that was saved whole, with the config.json that belongs to it")
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


def of_hub(source: str) -> bool:
    """Whether a model is to be looked for on the hub, as nothing is here.

    Raises:
        ModelError: it cannot be there either, by its name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if Path(source).exists():
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ModelError(f"{source} does not exist, and is no hub id either: give the folder of a saved causal language model,"
                         " or a hub id (owner/name)") from None
    return True


@contextmanager
def _told(source: str) -> Iterator[None]:
    """What transformers raises for a model that it cannot load, as a :class:`ModelError`."""
    if not of_hub(source) and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json: give the folder of a saved causal language model, or a hub id")
    try:
        yield
    except Exception as error:  # of any kind: of packages that are missing, configurations, tokenizers, damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"{source} cannot be loaded as a causal language model ({reason}): give the folder of a saved"
                         " model with its tokenizer, or the hub id of one this machine can reach") from None

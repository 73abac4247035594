"""Loading: a causal language model and its tokenizer, from a folder or a hub id, or one sentence on why not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from .config import Settings

#: Seconds in which the hub is to answer.
ANSWER = 10
#: What torch's grouped matrix product wants the rows of experts' weights to be a multiple of, in bytes.
GROUPED_BYTES = 16


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
    with _told(source) as local:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=settings.dtype, output_loading_info=True,
                                                           local_files_only=local)
    network, told = loaded
    weights = {name for name, _ in network.named_parameters()}
    missing = sorted(weights & set(told["missing_keys"]))
    if missing:  # they were drawn at random, and anew with every load
        raise ModelError(f"{source} lacks {len(missing)} of {len(weights)} weights of a {type(network).__name__}, {missing[0]}"
                         " first: give a causal language model that was saved whole, with the config.json that belongs to it")
    # The grouped products that transformers takes by default refuse rows that are no multiple of so many bytes.
    ragged = any(p.ndim == 3 and p.shape[-1] * p.element_size() % GROUPED_BYTES for p in network.parameters())
    if ragged and getattr(network.config, "_experts_implementation", None) == "grouped_mm":
        network.set_experts_implementation("eager")
    # Not every stage needs these tokens; the first command should be the one to say that they are missing.
    pad_id(tokenizer)
    if settings.data.append_eos:
        end_id(tokenizer)
    return network.to(device).eval(), tokenizer


def check_model(source: str) -> None:
    """Raise :class:`ModelError` unless a model's configuration is there: what can be said before its weights are read."""
    from transformers import AutoConfig

    with _told(source) as local:
        AutoConfig.from_pretrained(source, local_files_only=local)


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


def _hub_answers(source: str) -> bool:
    """Whether the hub can be asked for a model, at the second attempt if not at the first. Transformers would ask it for
    every file of one, each time with pauses of 24 s, before it says that it cannot, or takes what an earlier download left."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    for pause in () if constants.HF_HUB_OFFLINE else (1, 0):
        try:
            get_session().head(hf_hub_url(source, "config.json"), timeout=ANSWER)
        except Exception:  # of two libraries, by the hub's version
            time.sleep(pause)
        else:
            return True
    return False


@contextmanager
def _told(source: str) -> Iterator[bool]:
    """What transformers raises for a model that it cannot load, as a :class:`ModelError`.

    Yields:
        whether to take what is on this machine alone.
    """
    remote = of_hub(source)
    if not remote and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json: give the folder of a saved causal language model, or a hub id")
    local = not (remote and _hub_answers(source))
    try:
        yield local
    except Exception as error:  # of any kind: of packages that are missing, configurations, tokenizers, damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"{source} cannot be loaded as a causal language model ({reason}): give the folder of a saved"
                         " model with its tokenizer, or the hub id of one this machine can reach") from None

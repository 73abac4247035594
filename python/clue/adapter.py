"""Adapter: a delta as low-rank factors in the file format of PEFT (``adapter_config.json``, ``adapter_model.safetensors``).

A change of k rows of a weight is B A with B the k unit columns of these rows and A their changes; a change of k columns is
B A with A the k unit rows and B the changes. So the rank is k, and the product is exact: what an adapter adds is the
difference of the weights, in float32. Where k is so large that the factors are no smaller than the weight, and where PEFT
knows no factors for the module (the router of a mixture of experts, say), the module is stored whole instead, its bias
included (PEFT's ``modules_to_save``). The difference of two numbers rounds, and so does adding it to a weight in
its own dtype: an adapter gives the changed model to within that rounding, not bit by bit, which a delta does.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.atomic import new_folder
from .errors import DeltaError
from .run_directory import require_free
from .saved_model import SavedModel
from .weights import member_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .delta import Delta

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: What PEFT takes for target modules where no module has factors; an empty list it refuses.
_NO_MODULE = "dummy-target-modules"


@dataclass(frozen=True)
class Exported:
    """What an adapter holds.

    Attributes:
        ranks: rank of each module's factors.
        whole: modules that are stored whole.
        largest_difference: the largest difference, over all planned weights, between the changed model and the model with
            the adapter merged, both in the model's dtype.
    """

    ranks: dict[str, int]
    whole: tuple[str, ...]
    largest_difference: float


def export(delta: Delta, model: str | os.PathLike[str], out: str | os.PathLike[str]) -> Exported:
    """Write a delta as an adapter, whole or not at all.

    Args:
        model: folder of the model before, whose weights the adapter is to be loaded next to.
        out: the new folder.

    Raises:
        DeltaError: the model is another, the delta changes weights that no adapter can hold (biases, experts, tied
            weights), or ``out`` cannot be written.
        RunError: something is at ``out`` already.
    """
    import torch
    from safetensors.torch import save_file

    from .model.anatomy import is_transposed

    out = Path(out)
    require_free(out)
    saved = SavedModel(model)
    delta.check_folder(saved)
    network = _network(saved)
    modules = dict(network.named_modules())
    tied: dict[int, list[str]] = {}  # names of one parameter
    for name, parameter in network.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole: list[str] = []
    largest = 0.0
    for change in delta.changes:
        if change.changed == 0:
            continue
        module, _, kind = change.parameter.rpartition(".")
        if kind != "weight" or len(change.shape) != 2 or member_of(change.parameter) is not None:
            raise DeltaError(f"the delta changes {change.parameter}, which an adapter cannot hold (biases, experts and"
                             " single weights): use the delta itself")
        if change.dtype not in _DTYPES:
            raise DeltaError(f"{change.parameter} is {change.dtype}, which is not a number that can be added to: use the"
                             " delta itself")
        layer = modules.get(module)
        own = [] if layer is None else list(layer.state_dict())
        if layer is None or "weight" not in own or not saved.keys() >= {f"{module}.{name}" for name in own}:
            raise DeltaError(f"{module} is not in {saved.folder} as its config.json describes it: give the folder of a causal"
                             " language model with the config.json that belongs to it")
        if twins := [name for name in tied[id(layer.weight)] if name != change.parameter]:
            raise DeltaError(f"the delta changes {change.parameter}, which is tied to {twins[0]}, and an adapter would leave"
                             " that as it was: use the delta itself")
        transposed, embedding = is_transposed(layer), type(layer) is torch.nn.Embedding  # subclasses may look up otherwise
        # Conv1D (GPT-2) keeps its weight transposed; PEFT's factors are those of a linear layer's, or of an embedding's
        # transposed weight.
        flip = bool(transposed) or embedding
        bits = np.take(saved.bits(change.parameter), change.index, change.axis)
        before, after = (_floats(values, change.dtype) for values in (bits, bits ^ change.xor))
        if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise DeltaError(f"{change.parameter} holds numbers that are not finite, whose difference cannot be added: use"
                             " the delta itself")
        difference = (after.double() - before.double()).float()
        axis = change.axis
        size = change.shape
        if flip:
            difference, axis, size = difference.T, 1 - axis, (size[1], size[0])
        k = len(change.index)
        key = f"base_model.model.{module}"
        if (transposed is None and not embedding) or k * (size[0] + size[1]) >= size[0] * size[1]:
            for name in own:
                full = saved.bits(f"{module}.{name}").copy()
                if name == "weight":
                    full[(slice(None),) * change.axis + (change.index,)] ^= change.xor
                tensors[f"{key}.{name}"] = _floats(full, saved.dtype(f"{module}.{name}"))
            whole.append(module)
            continue
        units = torch.zeros((k, size[axis]), dtype=torch.float32)
        units[torch.arange(k), torch.from_numpy(change.index)] = 1.0
        a, b = (difference, units.T) if axis == 0 else (units, difference)
        for letter, factor in (("A", a), ("B", b)):
            tensors[f"{key}.lora_embedding_{letter}" if embedding else f"{key}.lora_{letter}.weight"] = factor.contiguous()
        ranks[module] = k
        largest = max(largest, _merged_off(before, after, difference.T if flip else difference))
    if not tensors:
        raise DeltaError("the delta changes nothing, so there is no adapter to write")
    try:
        with new_folder(out) as temporary:
            save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            config = _config(ranks, whole, str(model), any(map(is_transposed, modules.values())))
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise DeltaError(f"{out} cannot be written ({error.strerror}): free some space, or choose another folder with"
                         " -o") from None
    return Exported(ranks, tuple(whole), largest)


def _config(ranks: dict[str, int], whole: list[str], model: str, transposed: bool) -> dict[str, Any]:
    """PEFT's configuration; every module's alpha is its rank, so that its product is added as it is."""
    most = max(ranks.values(), default=1)
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "inference_mode": True,
            "r": most, "lora_alpha": most, "rank_pattern": ranks, "alpha_pattern": ranks, "lora_dropout": 0.0,
            "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": transposed,
            "target_modules": sorted(ranks) or _NO_MODULE, "modules_to_save": sorted(whole) or None}


def _network(saved: SavedModel) -> nn.Module:
    """A saved model without its values, as its ``config.json`` describes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(saved.folder, trust_remote_code=False)
            network: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any kind: of packages that are missing, damaged configurations
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DeltaError(f"{saved.folder} does not say what model it is ({reason}): give the folder of a saved causal language"
                         " model") from None
    return network


def _floats(bits: Any, dtype: str) -> Tensor:
    import torch

    signed = np.ascontiguousarray(bits).view(f"<i{bits.itemsize}")
    return torch.from_numpy(signed.copy()).view(getattr(torch, _DTYPES[dtype]))


def _merged_off(before: Tensor, after: Tensor, difference: Tensor) -> float:
    """How far the merged slice is from the changed one: the difference is rounded to the weight's dtype and added."""
    merged = before + difference.to(before.dtype)
    return float((merged.double() - after.double()).abs().max())

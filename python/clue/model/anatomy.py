"""Anatomy: where each model family keeps its heads, projections, norms and weight slices.

A family is one :class:`Family` entry: paths of modules, nothing executable. :func:`anatomy` binds an entry to a model
and checks that the paths, shapes and head counts it finds there agree with the model's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..types import NodeKind

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Module paths of one family: the first four from the model, the others from a layer."""

    embed: str
    layers: str
    final_norm: str
    head: str
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    mlp_norm: str
    gate: str | None
    up: str
    down: str


_LLAMA = Family(
    embed="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

#: ``config.model_type`` -> where things are. SmolLM and SmolLM2 are ``llama``.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


@dataclass(frozen=True)
class Projection:
    """One linear layer: the module, and the name of its weight in ``model.state_dict()``."""

    module: nn.Module
    name: str

    @property
    def weight(self) -> torch.Tensor:
        """The weight, [d_out, d_in]."""
        return cast("torch.Tensor", self.module.weight)

    @property
    def biased(self) -> bool:
        """Whether the projection has a bias."""
        return getattr(self.module, "bias", None) is not None


@dataclass(frozen=True)
class Layer:
    """The parts of one transformer layer. ``gate`` is ``None`` in a plain two-matrix MLP."""

    attention_norm: nn.Module
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    mlp_norm: nn.Module
    gate: Projection | None
    up: Projection
    down: Projection


@dataclass(frozen=True)
class Anatomy:
    """A family's entry bound to one model."""

    family: str
    model: nn.Module
    embed: nn.Module
    layers: tuple[Layer, ...]
    final_norm: nn.Module
    head: nn.Module
    d_model: int
    d_head: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    context: int

    @property
    def n_layers(self) -> int:
        """Number of transformer layers."""
        return len(self.layers)

    def slices(self, kind: NodeKind, layer: int, index: int) -> list[tuple[str, int, npt.NDArray[np.int64]]]:
        """The (parameter, axis, indices) a node owns: rows of q, k, v, gate and up; columns of o and down.

        A head's output owns *columns* of W_o; key and value groups are those of the model's configuration; a neuron
        owns its row of gate and up and its column of down. Nodes without weights own nothing.
        """
        part = self.layers[layer] if 0 <= layer < self.n_layers else None
        if part is None or kind in (NodeKind.EMBED, NodeKind.LOGITS, NodeKind.MLP_IN):
            return []
        head = np.arange(index * self.d_head, (index + 1) * self.d_head, dtype=np.int64)
        inputs = [p for p in (part.gate, part.up) if p is not None]
        if kind is NodeKind.Q:
            return _rows([part.q], head)
        if kind is NodeKind.K:
            return _rows([part.k], head)
        if kind is NodeKind.V:
            return _rows([part.v], head)
        if kind is NodeKind.HEAD:
            return [(part.o.name, 1, head)]
        unit = np.array([index], dtype=np.int64) if kind is NodeKind.NEURON else np.arange(self.d_mlp, dtype=np.int64)
        return [*_rows(inputs, unit), (part.down.name, 1, unit)]


def _rows(projections: Sequence[Projection], index: npt.NDArray[np.int64]) -> list[tuple[str, int, npt.NDArray[np.int64]]]:
    found = [(p.name, 0, index) for p in projections]
    found += [(p.name.removesuffix("weight") + "bias", 0, index) for p in projections if p.biased]
    return found


def anatomy(model: nn.Module) -> Anatomy:
    """Bind the model's family to the model.

    Raises:
        ModelError: no entry for this ``config.model_type`` (the message says what an entry needs), a path that leads
            nowhere, weights that are quantised or wrapped, or shapes that contradict the configuration.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ModelError(
            f"no anatomy entry for model family {kind!r} (known: {', '.join(sorted(FAMILIES))}): add one to"
            " clue.model.anatomy.FAMILIES with the module paths of embedding, layers, final norm, head, and per layer"
            " of both norms and the q, k, v, o, gate, up and down projections"
        )
    family = FAMILIES[kind]
    layers = []
    stack = _module(model, family.layers)
    for number in range(len(cast(Any, stack))):
        prefix = f"{family.layers}.{number}"
        layers.append(Layer(
            attention_norm=_module(model, f"{prefix}.{family.attention_norm}"),
            q=_projection(model, f"{prefix}.{family.q}"),
            k=_projection(model, f"{prefix}.{family.k}"),
            v=_projection(model, f"{prefix}.{family.v}"),
            o=_projection(model, f"{prefix}.{family.o}"),
            mlp_norm=_module(model, f"{prefix}.{family.mlp_norm}"),
            gate=_projection(model, f"{prefix}.{family.gate}") if family.gate else None,
            up=_projection(model, f"{prefix}.{family.up}"),
            down=_projection(model, f"{prefix}.{family.down}"),
        ))
    n_heads = int(config.num_attention_heads)
    n_kv_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    d_head = int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)
    found = Anatomy(
        family=kind, model=model, embed=_module(model, family.embed), layers=tuple(layers),
        final_norm=_module(model, family.final_norm), head=_module(model, family.head),
        d_model=int(config.hidden_size), d_head=d_head, n_heads=n_heads, n_kv_heads=n_kv_heads,
        d_mlp=int(config.intermediate_size), context=int(config.max_position_embeddings),
    )
    for number, layer in enumerate(found.layers):
        for part, expected in (("q", (n_heads * d_head, found.d_model)), ("k", (n_kv_heads * d_head, found.d_model)),
                               ("v", (n_kv_heads * d_head, found.d_model)), ("o", (found.d_model, n_heads * d_head)),
                               ("up", (found.d_mlp, found.d_model)), ("down", (found.d_model, found.d_mlp))):
            projection = getattr(layer, part)
            shape = tuple(projection.weight.shape)
            if shape != expected:
                raise ModelError(f"{projection.name} has shape {shape}, the configuration says {expected}:"
                                 f" the {kind} entry does not fit layer {number} of this model")
    return found


def check_weights(model: nn.Module) -> None:
    """Raise :class:`ModelError` naming the first parameter that holds a NaN or an infinity."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise ModelError(f"{name} holds {count} NaN or infinite weights: load an intact copy of the model")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"this {type(model).__name__} has no module {path}: load it as a causal language model, and"
                         " merge adapters first (for example with merge_and_unload)") from None


def _projection(model: nn.Module, path: str) -> Projection:
    from torch import nn

    module = _module(model, path)
    if type(module) is not nn.Linear:
        raise ModelError(f"{path} is a {type(module).__name__}, not a plain linear layer: merge adapters and load the"
                         " weights unquantised before localizing")
    return Projection(module, f"{path}.weight")

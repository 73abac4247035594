"""Anatomy: where each model family keeps its heads, projections, norms and weight slices.

:func:`anatomy` binds the entry of :mod:`clue.model.families` that fits a model's configuration to the model and checks
that the paths and shapes it finds there agree with it.

The residual stream is what every layer receives and passes on. What a family adds to it before the first layer
(embedding, its scale and norm, positions) is one writer, so no entry describes it.
"""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..types import NodeKind
from .experts import Experts, Shared, is_experts
from .families import FAMILIES, Family, NormKind

if TYPE_CHECKING:
    import torch
    from torch import nn

    Ints = npt.NDArray[np.int64]
    #: (parameter, axis, indices)
    Owned = tuple[str, int, Ints]

#: Plain linear layers, y = x W^T + b: class -> whether the weight is kept transposed, [d_in, d_out].
_LINEAR = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
    "transformers.pytorch_utils.Conv1D": True,
}


@dataclass(frozen=True)
class Projection:
    """One linear map: a linear layer, or the part of its outputs that belongs to q, k, v, gate or up.

    Attributes:
        module: the linear layer.
        name: name of its weight in ``model.state_dict()``.
        transposed: the weight is kept as [d_in, d_out].
        outputs: int64 [d_out], the outputs of the layer that are this projection's, in its own order.
    """

    module: nn.Module
    name: str
    transposed: bool
    outputs: Ints

    @cached_property
    def _chosen(self) -> slice | torch.Tensor:
        import torch

        first, last = int(self.outputs[0]), int(self.outputs[-1])
        if np.array_equal(self.outputs, np.arange(first, last + 1)):
            return slice(first, last + 1)  # a view, not a copy
        return torch.from_numpy(self.outputs)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, [d_out, d_in]."""
        whole = cast("torch.Tensor", self.module.weight)
        return (whole.T if self.transposed else whole)[self._chosen]

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, [d_out]."""
        whole = cast("torch.Tensor | None", getattr(self.module, "bias", None))
        return None if whole is None else whole[self._chosen]

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """This projection's part, [..., d_out], of the layer's output or of a gradient there."""
        return output[..., self._chosen]

    def rows(self, index: Ints) -> list[Owned]:
        """What makes the outputs ``index`` of this projection: rows of W (columns where it is transposed), biases."""
        found = [(self.name, 1 if self.transposed else 0, self.outputs[index])]
        if getattr(self.module, "bias", None) is not None:
            found.append((self.name.removesuffix("weight") + "bias", 0, self.outputs[index]))
        return found

    def columns(self, index: Ints) -> list[Owned]:
        """What reads the inputs ``index``: columns of W (rows where it is transposed)."""
        return [(self.name, 0 if self.transposed else 1, index)]


@dataclass(frozen=True)
class Norm:
    """One normalisation layer."""

    module: nn.Module
    kind: NormKind

    @property
    def gain(self) -> torch.Tensor | None:
        """What the normal vector is multiplied by, [d_model]; ``None`` for a norm without weights."""
        weight = cast("torch.Tensor | None", getattr(self.module, "weight", None))
        return 1 + weight if weight is not None and self.kind == "rms+1" else weight

    @property
    def epsilon(self) -> float:
        """What is added to the mean square or variance."""
        return float(getattr(self.module, "variance_epsilon", getattr(self.module, "eps", 0.0)) or 0.0)


@dataclass(frozen=True)
class Layer:
    """The parts of one transformer layer; see :class:`Family` for what may be ``None``.

    ``block`` is the layer itself, whose input is the residual stream; the input of ``mlp`` is what the MLP reads.
    ``multiplier`` is the factor on everything the layer adds to the residual stream. Where there are ``experts``, they
    are the whole MLP: ``up`` and ``down`` are ``None`` there, and nowhere else.
    """

    block: nn.Module
    attention_norm: Norm | None
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp: nn.Module
    gate: Projection | None
    up: Projection | None
    down: Projection | None
    experts: Experts | None
    mlp_output_norm: Norm | None
    multiplier: float

    @property
    def mlp_writer(self) -> nn.Module:
        """The module whose output, times ``multiplier``, is what the MLP adds to the residual stream."""
        if self.mlp_output_norm is not None:
            return self.mlp_output_norm.module
        return self.mlp if self.down is None else self.down.module

    @property
    def projections(self) -> KeysView[nn.Module]:
        """The modules of q, k and v, each once: where they are fused it is one."""
        return dict.fromkeys((self.q.module, self.k.module, self.v.module)).keys()


@dataclass(frozen=True)
class Anatomy:
    """A family's entry bound to one model."""

    family: str
    model: nn.Module
    embed: nn.Module
    layers: tuple[Layer, ...]
    final_norm: Norm
    parallel: bool
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

    def slices(self, kind: NodeKind, layer: int, index: int) -> list[Owned]:
        """The (parameter, axis, indices) a node owns: rows of q, k, v, gate and up; columns of o and down.

        A head's output owns *columns* of W_o; key and value groups are those of the model's configuration; a neuron
        owns its row of gate and up and its column of down, those of its expert where there are experts. Nodes without
        weights own nothing. In transposed weights rows and columns change places, and parts of a fused weight are offset
        within it, so that one parameter may come twice (gate and up), always with the same axis. The parameter may be
        one matrix of a stack (see :mod:`clue.weights`).
        """
        part = self.layers[layer] if 0 <= layer < self.n_layers else None
        if part is None or kind in (NodeKind.EMBED, NodeKind.LOGITS, NodeKind.MLP_IN):
            return []
        head = np.arange(index * self.d_head, (index + 1) * self.d_head, dtype=np.int64)
        if kind is NodeKind.Q:
            return part.q.rows(head)
        if kind is NodeKind.K:
            return part.k.rows(head)
        if kind is NodeKind.V:
            return part.v.rows(head)
        if kind is NodeKind.HEAD:
            return part.o.columns(head)
        unit = np.array([index], dtype=np.int64) if kind is NodeKind.NEURON else np.arange(self.d_mlp, dtype=np.int64)
        if part.experts is not None:
            return part.experts.slices(unit)
        assert part.up is not None and part.down is not None
        return [*(part.gate.rows(unit) if part.gate else []), *part.up.rows(unit), *part.down.columns(unit)]


def anatomy(model: nn.Module) -> Anatomy:
    """Bind the model's family to the model.

    Raises:
        ModelError: no entry for this ``config.model_type`` or this variant of it (the message says what an entry
            needs), a path that leads nowhere, weights that are quantised or wrapped, or shapes that contradict the
            configuration.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"the model must be a loaded Hugging Face causal language model, got a {type(model).__name__}: load"
                         " it with AutoModelForCausalLM.from_pretrained, or give the model inside its wrapper (.module)")
    require_plain(model)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ModelError(
            f"no anatomy entry for model family {kind!r} (known: {', '.join(FAMILIES)}): add one to"
            " clue.model.families.FAMILIES with the module paths of embedding, layers and final norm, and per layer"
            " of the norms, the MLP and the q, k, v, o, gate, up and down projections, and how fused projections are laid"
            " out"
        )
    config = config.get_text_config()  # of a model that also reads images, the part that writes text
    family = _variant(kind, config)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} is not in memory (offloaded, or never loaded): load the model with a device_map that"
                             " keeps every layer on a device")
    if getattr(cast(Any, model), "get_output_embeddings", lambda: None)() is None:
        raise ModelError(f"this {type(model).__name__} has no language modelling head: load it as a causal language model")
    _require_causal(model, family.layers)
    d_model, n_heads = int(config.hidden_size), int(config.num_attention_heads)
    groups = getattr(config, family.kv_heads, None) if isinstance(family.kv_heads, str) else family.kv_heads
    n_kv_heads = int(groups or n_heads)
    d_head = int(getattr(config, "head_dim", None) or d_model // n_heads)
    width = int(getattr(config, family.d_mlp, None) or 4 * d_model)
    if n_heads % n_kv_heads:
        raise ModelError(f"the configuration says {n_heads} heads share {n_kv_heads} key/value groups, which do not divide"
                         " them")
    multiplier = float(getattr(config, family.multiplier)) if family.multiplier else 1.0
    parts = _head_layout(family, n_heads, n_kv_heads, d_head)
    n_experts = int(getattr(config, family.n_experts)) if family.experts else 0
    hidden = width  # of what gate, up and down are: the MLP, or the shared expert
    if n_experts:
        hidden = int(getattr(config, family.d_shared)) if family.down else 0
    parts["gate"] = np.arange(hidden)
    parts["up"] = np.arange(hidden) + (hidden if family.gate == family.up else 0)
    parts["o"] = parts["down"] = np.arange(d_model)
    inputs = {"o": n_heads * d_head, "down": hidden}
    layers = []
    for number in range(len(cast(Any, _module(model, family.layers)))):
        prefix = f"{family.layers}.{number}"

        def norm(path: str | None, prefix: str = prefix) -> Norm | None:
            return None if path is None else _norm(model, f"{prefix}.{path}", family.norm, d_model)

        def projection(part: str, prefix: str = prefix) -> Projection:
            path = getattr(family, part)
            outputs = sum(len(parts[other]) for other in parts if getattr(family, other) == path)
            return _projection(model, f"{prefix}.{path}", parts[part], (outputs, inputs.get(part, d_model)), kind)

        gate, up, down = (projection(part) if getattr(family, part) else None for part in ("gate", "up", "down"))
        experts = None
        if family.experts:
            shared = None
            if gate and up and down and family.shared_scale:
                shared = Shared(gate, up, down, _module(model, f"{prefix}.{family.shared_scale}"))
            experts = _experts(model, f"{prefix}.{family.experts}", n_experts, width, d_model, shared)
            gate = up = down = None
        layers.append(Layer(
            block=_module(model, prefix), attention_norm=norm(family.attention_norm), q=projection("q"),
            k=projection("k"), v=projection("v"), o=projection("o"),
            attention_output_norm=norm(family.attention_output_norm), mlp_norm=norm(family.mlp_norm),
            mlp=_module(model, f"{prefix}.{family.mlp}"), gate=gate, up=up, down=down, experts=experts,
            mlp_output_norm=norm(family.mlp_output_norm), multiplier=multiplier,
        ))
    return Anatomy(
        family=kind, model=model, embed=_module(model, family.embed), layers=tuple(layers),
        final_norm=_norm(model, family.final_norm, family.norm, d_model),
        parallel=family.parallel, d_model=d_model, d_head=d_head, n_heads=n_heads, n_kv_heads=n_kv_heads,
        d_mlp=n_experts * width + hidden if n_experts else width,
        context=int(getattr(config, family.context) if isinstance(family.context, str) else family.context),
    )


def bound(body: Anatomy) -> Anatomy:
    """The anatomy that is asked for; raises :class:`ModelError` where a model was given itself."""
    if not isinstance(body, Anatomy):
        raise ModelError(f"this needs the anatomy of a model, got a {type(body).__name__}: bind the model with"
                         " clue.model.anatomy.anatomy(model)")
    return body


def _require_causal(model: nn.Module, layers: str) -> None:
    """Tokens that see later ones would differ, and be depended on, where nothing is looked for."""
    for name, module in _module(model, layers).named_modules(prefix=layers):
        if getattr(module, "is_causal", True) is False:
            raise ModelError(f"{name} sees later tokens (is_causal = False): load the model as a causal language model"
                             " (use_bidirectional_attention = False in its configuration, where that is what says so)")


def require_plain(model: nn.Module, instead: str = "") -> None:
    """Compiled code runs past the hooks that watch a layer, and nothing of what is scored or measured would be seen.

    Raises:
        ModelError: the model, or a module of it, is compiled; ``instead`` names another remedy.
    """
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            raise ModelError(f"{name or 'the model'} is compiled (torch.compile), so that its layers cannot be watched: load it"
                             f" again, or give the one inside (._orig_mod), and compile it afterwards{instead}")


def _variant(kind: str, config: Any) -> Family:
    """The entry of the family whose conditions the configuration meets."""
    for family in FAMILIES[kind]:
        if all(getattr(config, name, False) == value for name, value in family.when):
            return family
    names = dict.fromkeys(name for family in FAMILIES[kind] for name, _ in family.when)
    has = ", ".join(f"{name} = {getattr(config, name, None)}" for name in names)
    covered = "; ".join(", ".join(f"{name} = {value}" for name, value in family.when) for family in FAMILIES[kind])
    raise ModelError(f"this {kind} model has {has}, and no {kind} entry of clue.model.families.FAMILIES covers that"
                     f" (covered: {covered})")


def _head_layout(family: Family, n_heads: int, n_kv_heads: int, d_head: int) -> dict[str, Ints]:
    """q, k and v -> the outputs of their module that are theirs, int64 [heads or groups * d_head]."""
    counts = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
    if family.fused == "grouped":
        blocks = np.arange(n_heads + 2 * n_kv_heads).reshape(n_kv_heads, -1)  # [groups, query heads, key, value]
        chosen = {"q": blocks[:, :-2].ravel(), "k": blocks[:, -2], "v": blocks[:, -1]}
    elif family.fused == "concatenated":
        every = np.split(np.arange(n_heads + 2 * n_kv_heads), [n_heads, n_heads + n_kv_heads])
        chosen = dict(zip("qkv", every, strict=True))
    else:
        chosen = {part: np.arange(count) for part, count in counts.items()}
    return {part: (heads[:, None] * d_head + np.arange(d_head)).ravel() for part, heads in chosen.items()}


def check_weights(model: nn.Module) -> None:
    """Raise :class:`ModelError` naming the first parameter that holds a NaN or an infinity."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise ModelError(f"{name} holds {count} NaN or infinite weights: load an intact copy of the model")


def is_transposed(module: nn.Module) -> bool | None:
    """Whether a plain linear layer keeps its weight as [d_in, d_out]; ``None`` for anything but a plain linear layer.

    Subclasses are not plain: adapters and quantised layers compute something else than their weight says.
    """
    return _LINEAR.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"this {type(model).__name__} has no module {path}: load it as a causal language model, and"
                         " merge adapters first (for example with merge_and_unload)") from None


def _norm(model: nn.Module, path: str, kind: NormKind, d_model: int) -> Norm:
    """Bind a norm and try it on one vector: the conservation law would not notice a norm of another kind."""
    import torch

    norm = Norm(_module(model, path), kind)
    if norm.gain is not None and tuple(norm.gain.shape) != (d_model,):
        raise ModelError(f"{path}.weight has shape {tuple(norm.gain.shape)}, the configuration says {(d_model,)}: the entry"
                         " does not fit this model")
    like = next(norm.module.parameters(), next(model.parameters()))
    x = torch.linspace(-1e-3, 2e-3, d_model, dtype=like.dtype, device=like.device)  # small: epsilon shows
    with torch.no_grad():
        found = norm.module(x[None])[0].double()
    y = x.double()
    if kind == "layer":
        y = y - y.mean()
    y = y * torch.rsqrt(y.square().mean() + norm.epsilon)
    bias = getattr(norm.module, "bias", None)
    if norm.gain is not None:
        y = y * norm.gain.detach().double()
    if bias is not None:
        y = y + bias.detach().double()
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(found, y, rtol=tolerance, atol=tolerance, equal_nan=True):  # check_weights names NaNs
        raise ModelError(f"{path} does not compute what its entry says ({kind!r}): the entry does not fit this model")
    return norm


def _projection(model: nn.Module, path: str, outputs: Ints, expected: Sequence[int], kind: str) -> Projection:
    module = _module(model, path)
    transposed = is_transposed(module)
    if transposed is None:
        raise ModelError(f"{path} is a {type(module).__name__}, not a plain linear layer: merge adapters and load the"
                         " weights unquantised before localizing")
    shape = tuple(cast("torch.Tensor", module.weight).shape)
    expected = tuple(reversed(expected)) if transposed else tuple(expected)
    if shape != expected:
        raise ModelError(f"{path}.weight has shape {shape}, the configuration says {expected}:"
                         f" the {kind} entry does not fit this model")
    return Projection(module, f"{path}.weight", transposed, outputs)


def _experts(model: nn.Module, path: str, count: int, width: int, d_model: int, shared: Shared | None) -> Experts:
    module = _module(model, path)
    if not is_experts(module):
        raise ModelError(f"{path} is a {type(module).__name__}, not experts with plain weights: merge adapters and load the"
                         " weights unquantised before localizing")
    for name, expected in (("gate_up_proj", (count, 2 * width, d_model)), ("down_proj", (count, d_model, width))):
        shape = tuple(cast("torch.Tensor", getattr(module, name)).shape)
        if shape != expected:
            raise ModelError(f"{path}.{name} has shape {shape}, the configuration says {expected}: load all experts of the"
                             " model, and its own configuration")
    return Experts(module, path, count, width, shared)

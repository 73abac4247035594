"""Families: where each model family keeps its heads, projections, norms, experts and dimensions; a table, nothing executable.

One or more :class:`Family` entries per ``config.model_type``; :func:`clue.model.anatomy.anatomy` binds the one that fits
a model's configuration to the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

NormKind = Literal["rms", "rms+1", "layer"]


@dataclass(frozen=True)
class Family:
    """One family: module paths (the first three from the model, the others from a layer), layouts and config names.

    Projections kept in one module name the same path. Fused q, k and v are ``concatenated`` (all q, all k, all v) or
    ``grouped`` (for each key/value group its query heads, its key, its value; with one group per head this is the
    per-head interleaving of GPT-NeoX). A fused gate and up are gate first. Conv1D weights, which are transposed, are
    recognised by their class.

    Attributes:
        norm: ``rms`` (times weight), ``rms+1`` (times 1 + weight) or ``layer`` (centred, times weight, plus bias).
        attention_norm, mlp_norm: ``None`` where a reader takes the residual stream as it is; one path for both where
            attention and MLP share a norm.
        mlp: the module whose input is what the MLP reads, after its norm.
        gate: ``None`` in a plain two-matrix MLP.
        experts: in a mixture of experts the module that keeps the routed experts; ``gate``, ``up`` and ``down`` are then
            those of the shared expert, ``None`` without one.
        shared_scale: the linear layer whose sigmoid scales the shared expert.
        attention_output_norm, mlp_output_norm: norms between a block and the residual stream, parts of the writer.
        parallel: attention and MLP of a layer read the same residual stream.
        kv_heads: configuration name of the number of key/value groups, or the number itself; one per head when the
            configuration has no such name or no value for it.
        d_mlp: configuration name of the number of hidden units (of one routed expert); 4 d_model when it has no such name
            or no value.
        d_shared, n_experts: configuration names of the shared expert's number of hidden units and of the number of
            routed experts.
        context: configuration name of the longest sequence, or the number itself.
        multiplier: configuration name of the factor on everything a layer adds to the residual stream.
        when: (configuration name, value) pairs that must hold for the entry to apply.
    """

    embed: str
    layers: str
    final_norm: str
    q: str
    k: str
    v: str
    o: str
    up: str | None
    down: str | None
    gate: str | None = None
    experts: str | None = None
    shared_scale: str | None = None
    fused: Literal["concatenated", "grouped"] | None = None
    norm: NormKind = "rms"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    parallel: bool = False
    kv_heads: str | int = "num_key_value_heads"
    d_mlp: str = "intermediate_size"
    d_shared: str = "shared_expert_intermediate_size"
    n_experts: str = "num_experts"
    context: str | int = "max_position_embeddings"
    multiplier: str | None = None
    when: tuple[tuple[str, object], ...] = ()


_LLAMA = Family(
    embed="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_GATE_UP = replace(_LLAMA, gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
# One graph has one number of hidden units per layer, so layers with and without experts do not mix.
_MIXTURE = replace(_LLAMA, experts="mlp.experts", gate=None, up=None, down=None)
_QWEN_MIXTURE = replace(_MIXTURE, d_mlp="moe_intermediate_size",
                        when=(("mlp_only_layers", []), ("decoder_sparse_step", 1)))
_GEMMA = replace(_LLAMA, norm="rms+1")
_GEMMA2 = replace(
    _GEMMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_GPT2 = Family(
    embed="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    norm="layer",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    fused="concatenated",
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    d_mlp="n_inner",
    when=(("add_cross_attention", False),),
)
_GPTJ = replace(
    _GPT2,
    mlp_norm="ln_1",
    parallel=True,
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    fused=None,
    o="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
    when=(),
)
_NEOX = Family(
    embed="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    norm="layer",
    q="attention.query_key_value",
    k="attention.query_key_value",
    v="attention.query_key_value",
    fused="grouped",
    o="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    when=(("use_parallel_residual", False),),
)
_BLOOM = Family(
    embed="transformer.word_embeddings",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    norm="layer",
    q="self_attention.query_key_value",
    k="self_attention.query_key_value",
    v="self_attention.query_key_value",
    fused="grouped",
    o="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    context=2048,  # what it was trained on; ALiBi itself sets no limit, and the configuration names none
    when=(("apply_residual_connection_post_layernorm", False), ("slow_but_exact", False)),
)
_FALCON = replace(_BLOOM, kv_heads="num_kv_heads", d_mlp="ffn_hidden_size", context="max_position_embeddings")
_FALCONS = (
    replace(_FALCON, parallel=True, mlp_norm="input_layernorm", kv_heads=1,  # 7B
            when=(("new_decoder_architecture", False), ("multi_query", True), ("parallel_attn", True))),
    replace(_FALCON, parallel=True, attention_norm="ln_attn", mlp_norm="ln_mlp",  # 40B, 180B
            when=(("new_decoder_architecture", True), ("parallel_attn", True), ("num_ln_in_parallel_attn", 2))),
    replace(_FALCON, parallel=True, mlp_norm="input_layernorm",  # 11B
            when=(("new_decoder_architecture", True), ("parallel_attn", True), ("num_ln_in_parallel_attn", 1))),
    replace(_FALCON,  # RefinedWeb 1B, 7B
            when=(("new_decoder_architecture", False), ("multi_query", False), ("parallel_attn", False))),
)

#: ``config.model_type`` -> its entries; the first whose ``when`` holds applies. SmolLM and SmolLM2 are ``llama``,
#: Pythia is ``gpt_neox``, GLM-4-9B is ``glm``, and Gemma 3 from 4B on, which also reads images, is ``gemma3``.
FAMILIES: dict[str, tuple[Family, ...]] = {
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "mixtral": (_MIXTURE,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "qwen2_moe": (replace(_QWEN_MIXTURE, gate="mlp.shared_expert.gate_proj", up="mlp.shared_expert.up_proj",
                          down="mlp.shared_expert.down_proj", shared_scale="mlp.shared_expert_gate"),),
    "qwen3_moe": (_QWEN_MIXTURE,),
    "smollm3": (_LLAMA,),
    "granite": (replace(_LLAMA, multiplier="residual_multiplier"),),
    "starcoder2": (replace(_LLAMA, norm="layer", gate=None, up="mlp.c_fc", down="mlp.c_proj"),),
    "phi3": (replace(_GATE_UP, q="self_attn.qkv_proj", k="self_attn.qkv_proj", v="self_attn.qkv_proj",
                     fused="concatenated"),),
    "phi": (replace(_LLAMA, norm="layer", final_norm="model.final_layernorm", mlp_norm="input_layernorm", parallel=True,
                    o="self_attn.dense", gate=None, up="mlp.fc1", down="mlp.fc2"),),
    "gpt2": (_GPT2,),
    "gptj": (_GPTJ,),
    "gpt_neox": (replace(_NEOX, parallel=True, when=(("use_parallel_residual", True),)), _NEOX),
    "opt": (replace(_LLAMA, norm="layer", embed="model.decoder.embed_tokens", layers="model.decoder.layers",
                    final_norm="model.decoder.final_layer_norm", attention_norm="self_attn_layer_norm",
                    mlp_norm="final_layer_norm", o="self_attn.out_proj", mlp="fc1", gate=None, up="fc1", down="fc2",
                    d_mlp="ffn_dim", when=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False))),),
    "falcon": _FALCONS,
    "bloom": (_BLOOM,),
    "gemma": (_GEMMA,),
    "gemma2": (_GEMMA2,),
    "gemma3_text": (_GEMMA2,),
    "gemma3": (replace(_GEMMA2, embed="model.language_model.embed_tokens", layers="model.language_model.layers",
                       final_norm="model.language_model.norm"),),
    "olmo2": (replace(_LLAMA, attention_norm=None, mlp_norm=None, attention_output_norm="post_attention_layernorm",
                      mlp_output_norm="post_feedforward_layernorm"),),
    "glm": (_GATE_UP,),
    "glm4": (replace(_GATE_UP, attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"),),
}

"""A tiny random model of every family and variant that the anatomy table covers.

Two layers, four heads, d_model 16, two key/value groups where the family has them, and no weight at a value that would
hide a mistake: norm weights and biases are random too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
LLAMA = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
         "initializer_range": 0.4}
GPT2 = {"vocab_size": 13, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32,
        "initializer_range": 0.4, **TOKENS}
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
MIXTURE = {**LLAMA, "num_experts_per_tok": 2, "experts_implementation": "eager"}  # the default has no float64
QWEN_MIXTURE = {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 8}
FALCON = {**COMMON, "ffn_hidden_size": 24, "initializer_range": 0.4, "bias": True}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4}

#: name -> (``model_type``, configuration); the name is the family's, with the variant after a slash.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama/biased": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA),
    "mixtral": ("mixtral", {**MIXTURE, "num_local_experts": 4, "intermediate_size": 8}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MIXTURE, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("qwen3_moe", QWEN_MIXTURE),
    "qwen3_moe/normalised": ("qwen3_moe", {**QWEN_MIXTURE, "norm_topk_prob": True, "num_experts_per_tok": 3}),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {**LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 1.5,
                            "attention_multiplier": 0.4}),
    "starcoder2": ("starcoder2", LLAMA),
    "phi3": ("phi3", LLAMA),
    "phi": ("phi", {**LLAMA, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "gpt2/default width": ("gpt2", {**GPT2, "n_inner": None}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 2}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox/sequential": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "opt": ("opt", {**COMMON, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "init_std": 0.4}),
    "falcon": ("falcon", FALCON),
    "falcon/grouped": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon/grouped, one norm": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
                                            "num_ln_in_parallel_attn": 1}),
    "falcon/sequential": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "bloom": ("bloom", {**COMMON, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", {**LLAMA, "query_pre_attn_scalar": 4}),
    "gemma3_text": ("gemma3_text", {**LLAMA, "query_pre_attn_scalar": 4}),
    "gemma3": ("gemma3", {"text_config": {**LLAMA, "query_pre_attn_scalar": 4}, "vision_config": VISION,
                          "mm_tokens_per_image": 4, "image_token_index": 12}),
    "olmo2": ("olmo2", LLAMA),
    "olmo2/biased": ("olmo2", {**LLAMA, "attention_bias": True}),
    "glm": ("glm", LLAMA),
    "glm4": ("glm4", LLAMA),
}


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, initial: bool = False, **changes: Any) -> Any:
    """The tiny model of a variant, always the same one for the same arguments; ``initial`` as transformers initialise it."""
    family, settings = VARIANTS[name]
    text = settings.get("text_config", settings)  # of a model that also reads images, the part that writes text
    text = {key: value for key, value in text.items() if not initial or key not in ("initializer_range", "init_std")}
    text |= changes
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **({**settings, "text_config": text} if "text_config" in settings else text))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():  # norms and biases too: at their initial 1 and 0 they would hide mistakes
        if parameter.ndim == 1 and not initial:
            torch.nn.init.normal_(parameter, 0.8, 0.3)
    return model

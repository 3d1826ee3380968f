"""Small random models of every family that transformers can make a decoder of, from their own default settings.

Each default configuration is shrunk by what its settings are called; what that does not get right stands in a table.
Weights are drawn large, so that attention is peaked and a wrong slot shows in the logits. No file and no network.
"""

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 120
LAYERS = 4

# The first pattern that the whole name of a setting matches says how large it is in a small model.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size\w*", VOCABULARY),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"\w*_token_(id|index)s?|mask_index", 4),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|\w*max_(source|target)_positions|seq_length", 512),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers", LAYERS),
    (r"num_nextn_predict_layers|num_mtp_modules|mtp_num_hidden_layers|num_mtp_layers", 0),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|\w*_num_key_value_heads|\w*kv_n_heads", 2),
    (r"n_heads?|num_heads|\w*_attention_heads|num_\w*heads", 4),
    (r"\w*head_dim|kv_channels|d_kv", 16),
    (r"rotary_dim|\w*_size_per_layer_input", 8),
    (r"\w*hidden_size|d_model|n_embd|dim|embedding_size|emb_dim|word_embed_proj_dim", 64),
    (r"moe_intermediate_size|shared_\w*intermediate_size|expert_ffn_hidden_size", 48),
    (r"\w*intermediate_size|\w*ffn_dim|n_inner|d_ff|dim_ff|ffn_hidden_size|mlp_hidden_size", 96),
    (r"\w*lora_rank", 16),
    (r"n_group|topk_group|num_expert_group\w*|n_groups|n_shared_experts|num_shared_experts", 1),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts", 4),
    (r"\w*_experts_per_tok\w*|moe_topk|top_k|moe_k|num_selected_experts|moe_top_k", 2),
    (r"moe_num_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"sliding_window\w*|window_size|attention_\w*_size|swa_window_size", 8),
)

_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_HEADS: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2}
_EVERY_SECOND: list[str] = ["linear_attention", "full_attention"] * 2
_ZAMBA: dict[str, Any] = {"num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
}

# Settings of families whose defaults say too little, or contradict themselves once they are small.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": _EVERY_SECOND,
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
    },
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "state_size": 16, "chunk_size": 8},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {"sliding_window": None},
    "nemotron": _HEADS,
    "recurrent_gemma": {"attention_window_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {**_ZAMBA, "mamba_d_state": 16, "n_mamba_heads": 8, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def small_model(name: str) -> Any:
    """Build a small model of a family, its weights drawn anew."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**_small(CONFIG_MAPPING[name], _SPECIAL.get(name, {})))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for at, weight in model.named_parameters():
        if weight.dim() >= 2 and weight.is_floating_point():
            embeds = any(word in at for word in ("embed", "lm_head", "wte"))
            weight.data.normal_(0, 1.0 if embeds else 1.2 * weight.shape[-1] ** -0.5)
        elif "sink" in at:
            weight.data.normal_(0, 1)  # zeros, as they are made, would hide a head that is mixed up
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _small(kind: type[PretrainedConfig], more: dict[str, Any]) -> dict[str, Any]:
    """Shrink the default settings of a kind of configuration; `more` are settings as they shall be."""
    default = kind()
    known = {name: value for name, value in default.to_dict().items() if not name.startswith("_")}
    settings: dict[str, Any] = {}
    for name, value in known.items():
        inner = vars(default).get(name)
        if isinstance(inner, PretrainedConfig):
            settings[name] = _small(type(inner), {})
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes = [size for pattern, size in _SIZES if re.fullmatch(pattern, name)]
            settings |= {name: sizes[0]} if sizes else {}
    if "kv_lora_rank" in known and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latents are spread over all heads
    if isinstance(known.get("layer_types"), list) and "layer_types" in vars(default):
        kinds = list(dict.fromkeys(known["layer_types"]))  # each kind of layer once, then again
        settings["layer_types"] = (kinds * LAYERS)[:LAYERS]
    if "is_decoder" in known:
        settings["is_decoder"] = True
    return {**settings, **more}

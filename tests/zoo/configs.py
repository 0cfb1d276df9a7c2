"""A tiny configuration of any model class, by the names of its fields."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 128
LENGTH = 12
WINDOW = 5
"""Shorter than LENGTH, so that windows hide something."""

SIZES = {
    r"(\w+_)?vocab_size\w*": VOCABULARY,
    r"type_vocab_size": 2,
    r"(hidden_size|d_model|n_embd|model_dim|embed_dim|hidden_dim|dim|encoder_hidden_size"
    r"|text_hidden_size|output_proj_dim|projection_dim|out_hidden_size|embedding_size"
    r"|encoder_hidden_dim|embedding_dim|emb_dim|vision_hidden_size|decoder_hidden_size"
    r"|cross_attention_hidden_size|text_embed_dim|output_dim|word_embed_proj_dim|width|n_embed"
    r"|vision_feature_dim|projector_hidden_size|text_config_hidden_size|proj_codevector_dim"
    r"|encoder_width|pooler_output_size|output_hidden_size|conditioning_dim|vision_output_dim"
    r"|mm_hidden_size|audio_hidden_size|multimodal_hidden_size|decoder_dim|lstm_dim)": 64,
    r"(intermediate_size|\w*_intermediate_size|ffn_dim|\w*_ffn_dim|d_ff|n_inner|ffn_hidden_size"
    r"|mlp_dim|dim_feedforward|\w*dim_feedforward|hidden_dim_ff|expert_dim|inner_dim"
    r"|d_inner|ff_dim|\w*mlp_hidden_size|block_ff_dim)": 96,
    r"(num_attention_heads|n_heads?|\w+_attention_heads|num_heads|num_query_heads|attention_heads"
    r"|encoder_num_heads|decoder_num_heads|num_attn_heads)": 4,
    r"(head_dim|d_kv|\w*v_head_dim|qk_nope_head_dim|qk_rope_head_dim|attention_head_size"
    r"|attention_key_dim|head_size|global_head_dim|key_value_head_dim|attention_head_dim|qk_head_dim"
    r"|kv_channels|\w+_head_dim)": 16,
    r"(kv_lora_rank|q_lora_rank|o_lora_rank|\w*lora_rank|\w*_rank)": 32,
    r"(num_hidden_layers|n_layers?|\w*_layers|num_layers|num_blocks|depth|resampler_depth"
    r"|num_encoder_blocks_text)": 2,
    r"(num_mtp_layers|num_nextn_predict_layers)": 0,
    r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_experts_per_tok"
    r"|moe_topk|moe_k|top_k_experts|num_experts_per_token|moe_top_k|expert_top_k"
    r"|num_selected_experts|n_activated_experts|experts_top_k)": 2,
    r"(n_group|topk_group|first_k_dense_replace|num_expert_group|n_shared_experts)": 1,
    r"(max_position_embeddings|n_positions|n_ctx|max_\w*positions?|max_position|max_seq_len"
    r"|max_target_positions|max_sequence_length|original_max_position_embeddings)": 64,
    r"(sliding_window|local_attention|window|attention_window_size|attention_chunk_size"
    r"|sliding_window_size|local_window_size)": WINDOW,
    r"window_size": 5,
    r"(chunk_size|mamba_chunk_size|mamba_d_state|state_size|ssm_state_size)": 8,
    r"(linear_num_key_heads|linear_num_value_heads|mamba_n_heads|mamba_num_heads)": 4,
    r"(index_topk|indexer_topk)": 4,
    r"(query_pre_attn_scalar)": 16,
    r"(rotary_dim)": 8,
    r"num_conv_pos_embeddings": 16,
    r"num_conv_pos_embedding_groups": 4,
    r"(num_queries|num_query_tokens|num_latents)": 8,
    r"(pruned_heads)": None,
}

SMALL_IMAGE = {r"image_size": 32, r"patch_size": 8, r"num_frames": 2, r"img_size": 32}
"""For configurations of vision transformers, whose patches are many otherwise."""

LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|encoder_layers|decoder_layers|num_layers|\w+_layers|depth)"
)
FEW = {"num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"}
TOKEN = re.compile(r"\w*(_token_id|_token_index|_token_idx|_tok_id)$")

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SOME_EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
FORECAST = {"prediction_length": 4, "context_length": 12}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "autoformer": FORECAST,
    "informer": FORECAST,
    "time_series_transformer": FORECAST,
    "hunyuan_v1_dense": {"rope_parameters": {**PLAIN_ROPE, "alpha": 1.0}},
    "hunyuan_v1_moe": {"rope_parameters": {**PLAIN_ROPE, "alpha": 1.0}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v2": SOME_EXPERTS,
    "deepseek_ocr2_text": SOME_EXPERTS,
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
}
"""Values by model_type replace those by which the rules above would break a configuration."""


def tiny(config_class: type, shrink: int = 2, default: Any = None) -> Any:
    """shrink: 2, everything; 1, layers and vocabulary; 0, nothing."""
    default = config_class() if default is None else default
    return _shrunk(default, shrink)


def _shrunk(default: PreTrainedConfig, shrink: int) -> PreTrainedConfig:
    names = [f.name for f in dataclasses.fields(default) if f.init]
    names += [n for n in default.sub_configs if n not in names]
    own = OVERRIDES.get(default.model_type, {}) if shrink == 2 else {}
    changes: dict[str, Any] = {}
    for name in names:
        value = _known(default, name)
        if isinstance(value, PreTrainedConfig):
            changes[name] = _shrunk(value, shrink)
        elif isinstance(value, bool):
            continue
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            changes[name] = (kinds * 2)[: max(2, len(kinds))]
        elif (
            name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and shrink == 2
        ):
            changes[name] = _sections(copy.deepcopy(value))
        elif isinstance(value, int):
            size = _size(name, value, shrink)
            if size is not None:
                changes[name] = size
    _fit_tokens(default, names, changes)
    if shrink == 2:
        _fit_heads(default, names, changes)
    kinds_of_layers = changes.get("layer_types")
    if kinds_of_layers:
        for name in FEW & set(changes):
            changes[name] = len(kinds_of_layers)
    if "pad_token_id" in names and _known(default, "pad_token_id") is None:
        changes["pad_token_id"] = 0
    changes.update(own)
    kept = {
        name: copy.deepcopy(getattr(default, name))
        for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder")
        if name in names
    }
    return type(default)(**{**kept, **changes})


def _known(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # several values, by layer
        return None


def _sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding in time, height and width gets sections for head_dim 16."""
    for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        if "rope_type" in part:  # where it is not used, it is ignored
            half = int(16 * part.get("partial_rotary_factor", 1.0)) // 2
            part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        for name in ("short_factor", "long_factor"):
            if isinstance(part.get(name), list):
                part[name] = part[name][:8]
    return rope


def _size(name: str, value: int, shrink: int) -> int | None:
    if shrink == 0:
        return None
    if shrink == 1:
        if LAYERS.fullmatch(name):
            return min(value, 2)
        return min(value, 1024) if name == "vocab_size" else None
    for pattern, size in (SIZES | SMALL_IMAGE).items():
        if re.fullmatch(pattern, name):
            return size if size is None or value > size or name in ("head_dim",) else value
    return None


def _fit_heads(default: Any, names: list[str], changes: dict[str, Any]) -> None:
    for name in ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num"):
        groups, heads = _known(default, name), _known(default, "num_attention_heads")
        known = name in names and isinstance(groups, int) and isinstance(heads, int)
        if known:
            changes[name] = changes.get("num_attention_heads", heads) if groups == heads else 2


def _fit_tokens(default: Any, names: list[str], changes: dict[str, Any]) -> None:
    """Special tokens inside of the vocabulary, each its own, away from what inputs use."""
    size = changes.get("vocab_size") or _known(default, "vocab_size")
    if not isinstance(size, int):
        size = VOCABULARY
        texts = [c for c in changes.values() if isinstance(c, PreTrainedConfig)]
        sizes = [c.vocab_size for c in texts if isinstance(getattr(c, "vocab_size", None), int)]
        size = min(sizes, default=VOCABULARY)
    free = size - 1
    for name in names:
        value = _known(default, name)
        if TOKEN.fullmatch(name) and isinstance(value, int) and value >= size:
            changes[name], free = free, free - 1

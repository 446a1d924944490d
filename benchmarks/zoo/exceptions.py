"""Settings that a tiny config needs beside small sizes, by model type."""

from __future__ import annotations

from typing import Any

_HYBRID = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}
_SERIES = {"prediction_length": 8, "context_length": 16}
_CODEC = {"upsample_groups": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def _rope(*sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "bros": {"dim_bbox": 8},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "csm": {"codec_config": _CODEC},
    "deepseek_v2": {**_EXPERTS, "first_k_dense_replace": 1},
    "dots1": {**_EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": _rope(1, 1, 2),
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": _rope(1, 1, 0),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8, "mamba_d_head": 8},
    "informer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kyutai_speech_to_text": {"codec_config": _CODEC},
    "led": {"attention_window": 8},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 1},
    "mimi": _CODEC,
    "moonshine_streaming": {"num_key_value_heads": 4},
    "pocket_tts_audio_tokenizer": _CODEC,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "timm_backbone": {"backbone": "resnet18"},
    "time_series_transformer": _SERIES,
}  # fmt: skip

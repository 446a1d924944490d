"""Settings that a tiny config needs beside small sizes, by model type."""

from __future__ import annotations

from typing import Any

_HYBRID = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "bros": {"dim_bbox": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8, "mamba_d_head": 8},
    "informer": {"prediction_length": 8, "context_length": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 1},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
}

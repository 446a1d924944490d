"""Architectures of different block topologies, for the tests."""

from __future__ import annotations

LIBRARIES = ("diffusers", "timm", "torchvision")

SUBSET = (
    # Norm, attention, norm, MLP; norms around both; parallel; norm after.
    "llama", "qwen3", "gemma2", "phi3", "glm4", "olmo2", "cohere", "gptj", "gpt_neox", "falcon",
    "stablelm", "persimmon", "nemotron", "opt", "xglm", "ctrl",
    # Experts, recurrences and convolutions.
    "mixtral", "qwen2_moe", "deepseek_v3", "zaya", "minimax", "mamba", "jamba", "qwen3_next",
    "rwkv",
    # Encoders, and encoders with decoders.
    "bert", "albert", "deberta-v2", "modernbert", "xlnet", "t5", "bart", "prophetnet",
    # Images, sound, and several at once.
    "vit", "convnext", "qwen2_5_vl_vision", "clip", "wav2vec2", "whisper",
)  # fmt: skip

"""Small configs: what their numbers are called says how small they may become."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .exceptions import CONFIGS

# What is made small: all sizes to the same few numbers, all by the same factor, or the counts.
LADDER = ("all", "but images", "an eighth", "layers", "nothing")
EIGHTH = 8
# Names of sizes, and what they become; the first that fits counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|^n_tokens$|_vocab$", 128),
    (r"key_value_heads|kv_heads|key_value_groups$", 2),
    (r"heads?$|^(encoder_|decoder_)?attention_heads$", 4),
    (r"head_dim$|head_size$|^d_kv$|^d_head$|^dim_head$|dim_per_head$|rotary_dim$|kv_channels", 8),
    (r"lora_rank|low_rank", 16),
    (r"(experts|^topk|num_experts_per_tok|moe_k|moe_topk|experts_per_tok|^top_k)$", 2),
    (r"n_group|topk_group|n_groups$", 1),
    (r"layers?$|^depth$|^layers$|num_blocks$|hidden_groups$|_depth$|n_blocks$", 2),
    (r"moe_intermediate|expert_intermediate|expert_ffn", 16),
    (r"intermediate|ffn|d_ff$|mlp_dim|n_inner|dim_ff|feedforward|_ff$|dff$", 48),
    (r"position(s|_embeddings)$|^n_ctx$|max_seq_len$|max_length$", 128),
    (r"(hidden_size\w*|d_model|hidden_dim\w*|n_embd|embed_dim|embedding_size|_dim|^dim|_dims|width|"
     r"embed_size|_channels|embeds_size|emb_dim|output_size|_hidden|d_inner|hid_dim|_planes|"
     r"num_filters|inner_dim|channel)$", 32),
    (r"num_queries|num_latents|query_tokens|object_queries", 8),
    (r"image_seq_length|num_patches", 16),
)  # fmt: skip
# Sizes that some configs leave to their checkpoints.
UNSET = {"vocab_size": 128, "head_dim": 8, "num_key_value_heads": 4, "pad_token_id": 0}
FIXED = re.compile(
    r"num_channels|in_channels|state_dim|act_dim|kernel|audio_channels|input_channels|iou_head_depth"
)
COARSE = re.compile(r"layers?$|^depth$|vocab_size|positions|position_embeddings|experts$")
KEPT = re.compile(
    r"heads?$|n_head|kv_heads|layers?$|depth$|vocab|token|_id$|_index|_idx|image_size|patch|kernel|"
    r"position|num_|max_|sampl|rate|theta|window|stride|length|n_fft|hop|bins"
)
LAYER_KINDS = ("layer_types", "layers_block_type")
TOKEN = re.compile(r"(token_id|token_index|_id|_index|_idx)$")


def small_configs(
    model_type: str, rungs: Sequence[str], failures: list[str]
) -> Iterator[tuple[str, Any]]:
    """Configs to try, the smallest first; why one is missing is added to `failures`."""
    cls = CONFIG_MAPPING[model_type]
    for shrunk in rungs:
        try:
            yield shrunk, small(cls, shrunk, CONFIGS.get(model_type, {}))
        except Exception as error:
            lines = " ".join(str(error).split())
            failures.append(f"config ({shrunk}): {type(error).__name__}: {lines[:200]}")


def small(cls: Any, shrunk: str, fixed: dict[str, Any], given: Any = None) -> Any:
    """A config of this class, made small.

    Args:
        cls: a config class of transformers.
        shrunk: `"all"`, or what is left large.
        fixed: values that are known to be needed, of sub-configs as dicts; those that a
            sub-config needs wherever it is are known too.
        given: the config of this class that the config around it has, if there is one.
    """
    if shrunk == "nothing":
        return cls(**fixed)
    try:
        default = cls()
    except Exception:
        default = None
    values: dict[str, Any] = _choices_of(cls, default, given)
    sub_configs = dict.fromkeys([*getattr(cls, "sub_configs", {}), *_configs_in(default)])
    for field in dataclasses.fields(cls):
        name = field.name
        if name in sub_configs or name in fixed:
            continue
        value = _default_of(field)
        if value is None and name in LAYER_KINDS and default is not None:
            value = _get(default, name)
        smaller = _smaller(name, value, shrunk)
        if smaller != value:
            values[name] = smaller
    for name in sub_configs:
        inner = _get(default, name)
        known = fixed.get(name, {})
        if isinstance(inner, PreTrainedConfig) and isinstance(known, dict):
            known = {**CONFIGS.get(type(inner).model_type, {}), **known}
            values[name] = small(type(inner), shrunk, known, inner)
        elif name in fixed:
            values[name] = known
    _agree(cls, values, default, shrunk)
    values.update(_stages(cls, default, given))
    values.update({k: v for k, v in fixed.items() if k not in sub_configs})
    return cls(**values)


def _choices_of(cls: Any, default: Any, given: Any) -> dict[str, Any]:
    """What is not a size, and that the config around has chosen otherwise."""
    chosen = {}
    for field in dataclasses.fields(cls):
        value = _get(given, field.name)
        if isinstance(value, (str, bool)) and value != _get(default, field.name):
            chosen[field.name] = value
    return chosen


def _configs_in(config: Any) -> list[str]:
    return [
        k for k, v in getattr(config, "__dict__", {}).items() if isinstance(v, PreTrainedConfig)
    ]


def _get(config: Any, name: str) -> Any:
    """A setting; some may not be asked for, because layers differ in them."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _agree(cls: Any, values: dict[str, Any], default: Any, shrunk: str) -> None:
    """Numbers that depend on each other."""
    kinds = next(filter(None, map(values.get, LAYER_KINDS)), None)
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if kinds and name in values:
            values[name] = len(kinds)
    heads = _get(default, "num_attention_heads")
    ungrouped = heads is not None and _get(default, "num_key_value_heads") == heads
    if ungrouped and shrunk in ("all", "but images"):
        values["num_key_value_heads"] = 4
    has_sections = "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ())
    rope = _get(default, "rope_parameters") or {}
    if shrunk == "all" and has_sections and not any(isinstance(v, dict) for v in rope.values()):
        values["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
        }  # fmt: skip
    for name in ("first_k_dense_replace", "moe_layer_start_index"):
        if _get(default, name):
            values[name] = 1
    for name in ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"):
        if _get(default, name):
            values[name] = 4
    if shrunk == "all":
        values.update({k: v for k, v in UNSET.items() if default and _get(default, k) is None})
    names = {field.name for field in dataclasses.fields(cls)}
    for name in list(values):
        if name not in names:
            del values[name]


def _stages(cls: Any, default: Any, given: Any) -> dict[str, Any]:
    """The stages of a backbone that the config around has chosen, in a backbone with few layers."""
    chosen = list(_get(given, "out_indices") or ())
    if not chosen or chosen == list(_get(default, "out_indices") or ()):
        return {}
    names = {field.name for field in dataclasses.fields(cls)}
    layers = _get(given, "num_hidden_layers")
    if "num_hidden_layers" in names and layers == len(given.stage_names) - 1:
        count = max(len(chosen), 2)  # Each layer is a stage.
        kept = list(range(count + 1))[-len(chosen) :]
        return {"num_hidden_layers": count, "out_indices": kept}
    return {"out_indices": chosen}


def _default_of(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _smaller(name: str, value: Any, shrunk: str) -> Any:
    if name.startswith("chunk_size_feed"):
        return value
    if shrunk == "an eighth":
        value = _eighth(name, value)
    if isinstance(value, (list, tuple)) and value and shrunk in ("all", "but images"):
        if name in LAYER_KINDS:
            kinds = list(dict.fromkeys(value))
            return kinds * 2 if len(kinds) == 1 else kinds
        return _smaller_list(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if "drop" in name and isinstance(value, float) and value < 1:
        return 0.0
    if not isinstance(value, int):
        return value
    if TOKEN.search(name):
        return value if value < 100 else 100 + sum(map(ord, name)) % 27
    if FIXED.search(name):
        return value
    if name == "image_size" and shrunk == "all":
        return min(value, 64)
    if shrunk in ("layers", "an eighth") and not COARSE.search(name):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value


def _eighth(name: str, value: Any) -> Any:
    """Sizes divided by the same number, so that what fits together still does."""
    if isinstance(value, dict):
        return {key: _eighth(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and re.search(r"depths|layers|num_blocks|layer_nums", name):
        return type(value)(min(item, 2) if type(item) is int else item for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(_eighth(name, item) for item in value)
    if type(value) is not int or KEPT.search(name) or value % EIGHTH or value < 2 * EIGHTH:
        return value
    return value // EIGHTH


def _smaller_list(name: str, value: Any) -> Any:
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if re.search(r"depths|layers|num_blocks|layer_nums", name):
        return type(value)(min(item, 2) for item in value)
    if re.search(r"hidden_size|embed_dim|channels|dims?$|widths", name) and min(value) >= 64:
        return type(value)(item // 4 for item in value)
    if re.search(r"out_indices|fullatt|deepstack|layer_ids|indexes|indices", name):
        return type(value)(min(item, 1) for item in value[:1])
    return value

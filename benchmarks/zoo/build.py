"""Tiny models of every architecture in transformers, with inputs they take.

A config is made small by what its numbers are called; where the result is not accepted, less
of it is made small. Inputs are tried until the model runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.utils import logging

from .exceptions import CONFIGS
from .inputs import Inputs, candidates

logging.set_verbosity_error()

LARGEST = 32_000_000  # Parameters of a model that is still called tiny.
# In what order the classes of an architecture are tried: the first one that runs is taken.
KINDS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM",
    "CAUSAL_LM", "CTC", "",
)  # fmt: skip

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
    r"num_channels|in_channels|state_dim|act_dim|kernel|audio_channels|input_channels"
)
COARSE = re.compile(r"layers?$|^depth$|vocab_size|positions|position_embeddings|experts$")
KEPT = re.compile(
    r"heads?$|n_head|kv_heads|layers?$|depth$|vocab|token|_id$|_index|_idx|image_size|patch|kernel|"
    r"position|num_|max_|sampl|rate|theta|window|stride|length|n_fft|hop|bins"
)
TOKEN = re.compile(r"(token_id|token_index|_id|_index|_idx)$")


class Built(NamedTuple):
    """A model that runs, and how to run it."""

    model: nn.Module
    inputs: Inputs
    shrunk: str


class Unbuildable(Exception):
    """No tiny model of an architecture runs; the message says why the last one did not."""


def architectures() -> list[str]:
    """Every model type, one of each kind first; towers and text models have types of their own."""
    known: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for name in CONFIG_MAPPING:
        module = model_type_to_module_name(name)
        ranks[name] = known[module] = known.get(module, 0) + 1
    return sorted(ranks, key=lambda name: min(ranks[name], 2))


def classes_of(model_type: str) -> list[str]:
    """The names of its model classes, the one with most of the model first."""
    found: dict[str, None] = {}
    names = [f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES" for kind in KINDS]
    names += sorted(
        name for name in vars(modeling_auto) if re.match("MODEL_.*_MAPPING_NAMES", name)
    )
    for name in names:
        entry = getattr(modeling_auto, name).get(model_type, ())
        found.update(dict.fromkeys([entry] if isinstance(entry, str) else entry))
    return list(found) or [cls.__name__ for cls in _classes_with(CONFIG_MAPPING[model_type])]


def _classes_with(config: Any) -> list[Any]:
    """The model classes beside a config class that are made from it; towers have no other."""
    try:
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return []
    return [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and cls.config_class is config
        and "forward" in vars(cls)
    ]


def named(model_type: str, class_name: str) -> Any:
    """A model class; some are not public."""
    config = CONFIG_MAPPING[model_type]
    private = {cls.__name__: cls for cls in _classes_with(config)}
    return private.get(class_name) or getattr(transformers, class_name, None)


def build(model_type: str, class_name: str | None = None) -> Built:
    """A tiny model of an architecture in eval mode, its norms not ones, its biases not zeros.

    Raises:
        Unbuildable: nothing that was tried could be built and run.
    """
    failures: list[str] = []
    for name in [class_name] if class_name else classes_of(model_type)[:4]:
        cls = named(model_type, name)
        if cls is None:
            failures.append(f"transformers has no {name}")
            continue
        for shrunk, config in _configs(model_type, failures):
            try:
                model = _model(cls, config)
            except Exception as error:
                failures.append(said("build", error))
                continue
            for inputs in candidates(model):
                try:
                    run(model, inputs)
                except Exception as error:
                    failures.append(said("run", error))
                else:
                    return Built(model, inputs, shrunk)
    # The first complaint about the smallest model tells most.
    raise Unbuildable(" | ".join(dict.fromkeys(failures[:1] + failures[-2:])) or "no class")


def seed() -> None:
    """The same random numbers for every run of a model."""
    torch.manual_seed(3)
    numpy.random.seed(3)
    random.seed(3)


def run(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns, without gradients."""
    seed()
    with torch.no_grad():
        return model(**inputs)


def said(what: str, error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{what}: {type(error).__name__}: {' '.join(lines)[:200]}"


def _model(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(config).parameters())
        except Exception:
            size = 0  # Some need numbers while they are built.
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    seed()
    model: nn.Module = cls(config)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError("too many parameters")
    return perturbed(model)


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode and float32, with noise on every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_complex():
                scale = 0.3 if parameter.ndim == 1 else 0.05
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
    return model.float().eval()


def _configs(model_type: str, failures: list[str]) -> Iterator[tuple[str, Any]]:
    cls = CONFIG_MAPPING[model_type]
    for shrunk in LADDER:
        try:
            yield shrunk, small(cls, shrunk, CONFIGS.get(model_type, {}))
        except Exception as error:
            failures.append(said(f"config ({shrunk})", error))


def small(cls: Any, shrunk: str, fixed: dict[str, Any]) -> Any:
    """A config of this class, made small.

    Args:
        cls: a config class of transformers.
        shrunk: `"all"`, or what is left large.
        fixed: values that are known to be needed, of sub-configs as dicts.
    """
    if shrunk == "nothing":
        return cls(**fixed)
    try:
        default = cls()
    except Exception:
        default = None
    values: dict[str, Any] = {}
    sub_configs = dict.fromkeys([*getattr(cls, "sub_configs", {}), *_configs_in(default)])
    for field in dataclasses.fields(cls):
        name = field.name
        if name in sub_configs or name in fixed:
            continue
        value = _default_of(field)
        if value is None and name == "layer_types" and default is not None:
            value = _get(default, name)
        smaller = _smaller(name, value, shrunk)
        if smaller != value:
            values[name] = smaller
    for name in sub_configs:
        inner = _get(default, name)
        known = fixed.get(name, {})
        if isinstance(inner, PreTrainedConfig) and isinstance(known, dict):
            values[name] = small(type(inner), shrunk, known)
    _agree(cls, values, default, shrunk)
    values.update({k: v for k, v in fixed.items() if k not in sub_configs})
    return cls(**values)


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
    kinds = values.get("layer_types")
    for name in ("num_hidden_layers", "num_layers", "n_layer"):
        if kinds and name in values:
            values[name] = len(kinds)
    heads = _get(default, "num_attention_heads")
    ungrouped = heads is not None and _get(default, "num_key_value_heads") == heads
    if ungrouped and shrunk in ("all", "but images"):
        values["num_key_value_heads"] = 4
    if shrunk == "all" and "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
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
        if name == "layer_types":
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

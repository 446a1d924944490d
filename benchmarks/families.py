"""Which families `fuse` finds in which architectures, and why not in the others.

Builds every model from a tiny config with random weights, fuses it, and runs it: a group
counts as fused only if its kernel ran and its members did not.

    python benchmarks/families.py
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from typing import Any

import torch
import transformers
from common import machine, print_table
from torch import Tensor, nn

from module_fusion import FusionReport, fuse, report

FAMILIES = ("rms_norm_mlp", "patch_embeddings")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEAD = {**GROUPED, "head_dim": 8}
IMAGES = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
TOWER = {"depth": 2, "num_heads": 4, "patch_size": 4}
WINDOWED = {"fullatt_block_indexes": [1], "window_size": 16, "out_hidden_size": 32}
# Model class, config class, sizes. A module path stands before a name that is not public.
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    ("Qwen3ForCausalLM", "Qwen3Config", HEAD),
    ("MistralForCausalLM", "MistralConfig", GROUPED),
    ("GemmaForCausalLM", "GemmaConfig", HEAD),
    ("Gemma2ForCausalLM", "Gemma2Config", HEAD),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", HEAD),
    ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **GROUPED, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }),
    ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        **HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }),
    ("PhiForCausalLM", "PhiConfig", TEXT),
    ("CohereForCausalLM", "CohereConfig", GROUPED),
    ("GPT2LMHeadModel", "GPT2Config", GPT),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    ("FalconForCausalLM", "FalconConfig", {**TEXT, "parallel_attn": False}),
    ("BloomForCausalLM", "BloomConfig", {
        "vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    }),
    ("MptForCausalLM", "MptConfig", {
        "vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    }),
    ("PersimmonForCausalLM", "PersimmonConfig", TEXT),
    ("BertForMaskedLM", "BertConfig", TEXT),
    ("ViTModel", "ViTConfig", IMAGES),
    ("SiglipVisionModel", "SiglipVisionConfig", IMAGES),
    ("CLIPVisionModel", "CLIPVisionConfig", IMAGES),
    ("Dinov2Model", "Dinov2Config", IMAGES),
    ("models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
     "models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",
     {**TOWER, "embed_dim": 32, "hidden_size": 32}),
    ("models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
     "models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
     {**TOWER, **WINDOWED, "hidden_size": 32, "intermediate_size": 48}),
    ("models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
     "models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig",
     {**TOWER, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
      "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
]  # fmt: skip


def named(name: str) -> Any:
    """A class of transformers."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}".rstrip(".")), attribute)


def build(model: str, config: str, sizes: dict[str, Any]) -> nn.Module:
    """A tiny model with random weights; its norms are not ones."""
    torch.manual_seed(0)
    built: nn.Module = named(model)(named(config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Token ids, an image, or the patches of two images, one per row."""
    torch.manual_seed(1)
    taken = inspect.signature(type(model).forward).parameters
    if "grid_thw" in taken:
        patches = torch.randn(2 * 16, 3 * 2 * 4 * 4)
        return {"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if "pixel_values" in taken:
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.arange(12).view(2, 6)}


def outcome(found: FusionReport, ran: FusionReport, family: str) -> str:
    """One cell of the table."""
    calls = {group.paths: (group.kernel_calls, group.member_calls) for group in ran.groups}
    fused = [group for group in found.fused if group.family == family]
    on_kernel = [g for g in fused if calls[g.paths][0] and not calls[g.paths][1]]
    parts = [f"{len(on_kernel)} fused"] if on_kernel else []
    if len(on_kernel) < len(fused):
        reasons = {group.reason for group in ran.groups if group.member_calls}
        parts.append(
            f"{len(fused) - len(on_kernel)} ran the modules: {'; '.join(map(str, reasons))}"
        )
    reasons = {str(group.reason): group for group in found.skipped if group.family == family}
    for reason in reasons:
        count = sum(g.reason == reason for g in found.skipped if g.family == family)
        parts.append(f"{count} refused: {reason}")
    return "; ".join(parts) or "none there"


def from_timm() -> tuple[nn.Module, dict[str, Tensor]] | None:
    """A vision transformer of timm, None where that is not installed."""
    try:
        import timm
    except ImportError:
        return None
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    return model, {"x": torch.randn(2, 3, 32, 32)}


def from_diffusers() -> tuple[nn.Module, dict[str, Tensor]] | None:
    """The transformer of Stable Diffusion 3, None where diffusers is not installed."""
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError:
        return None
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=16, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([1, 2]),
    }
    return model, inputs


def row(name: str, built: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    with torch.no_grad():
        expected = built(**inputs)[0]
        found = fuse(built)
        difference = (built(**inputs)[0] - expected).abs().max() / expected.abs().max()
    ran = report(built)
    cells = [outcome(found, ran, family) for family in FAMILIES]
    return [name, *cells, f"{difference:.1e}"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"transformers {transformers.__version__}, {machine()}\n")
    rows = []
    for name, config, sizes in MODELS:
        model = build(name, config, sizes)
        rows.append(row(name.rpartition(".")[2], model, inputs_of(model)))
    others = {"timm vit_tiny_patch16": from_timm(), "diffusers SD3 transformer": from_diffusers()}
    rows += [row(name, *found) for name, found in others.items() if found is not None]
    print_table(("model", *FAMILIES, "largest relative difference"), rows)


if __name__ == "__main__":
    main()

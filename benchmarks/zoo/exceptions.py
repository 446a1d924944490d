"""Settings that a tiny config needs beside small sizes, and special inputs, by model type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HYBRID = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}
_SERIES = {"prediction_length": 8, "context_length": 16}
_CODEC = {"upsample_groups": 8}
_EFFICIENT = {
    "image_size": 32,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 8],
    "out_channels": [8, 16],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}
_HGNET = {
    "stem_channels": (3, 8, 8),
    "stage_in_channels": (8, 32, 128, 256),
    "stage_mid_channels": (8, 8, 16, 16),
    "stage_num_blocks": (1, 1, 1, 1),
    "stage_numb_of_layers": (2, 2, 2, 2),
}
_DETR = {
    "num_queries": 8,
    "encoder_in_channels": (128, 256, 512),
    "decoder_in_channels": (32, 32, 32),
}
_HGNET_DETR = {"backbone_config": _HGNET, **_DETR}
_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{kind}_{ratio}ratio": [
            [k if "v" in axes else 1, k if "h" in axes else 1],
            1,
            [k // 2 if "v" in axes else 0, k // 2 if "h" in axes else 0],
        ]
        for kind, axes in (
            ("vertical_long_to_small_conv", "v"),
            ("horizontal_small_to_long_conv", "h"),
            ("symmetric_conv_long", "vh"),
        )
        for ratio, k in (("long", 7), ("mid", 5), ("short", 3))
    },
}
# A window is as large as the last stage.
_SWIN = {"embed_dim": 12, "window_size": 2}
_PE_VISION = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": None}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def _rope(*sections: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


CONFIGS: dict[str, dict[str, Any]] = {
    "align": {"vision_config": _EFFICIENT, "projection_dim": 16},
    "align_vision_model": {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 3, 5],
        "in_channels": [32, 8, 16], "out_channels": [8, 16, 24], "strides": [1, 2, 2],
        "num_block_repeats": [2, 2, 2], "expand_ratios": [1, 6, 6], "hidden_dim": 1280,
    },
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "blip-2": {"image_token_index": 5},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bros": {"dim_bbox": 8},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "chmv2": {"backbone_config": {"return_class_token": True}},
    "clap": {"audio_config": {"projection_dim": 32}},
    "clap_audio_model": {
        "hidden_size": 128, "patch_embeds_hidden_size": 16, "spec_size": 128, "window_size": 4,
    },
    "clvp": {"decoder_config": {"decoder_fixing_codes": (83, 45, 45, 100)}},
    "clvp_encoder": {"hidden_size": 128, "num_attention_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "csm": {"codec_config": _CODEC},
    "d_fine": _HGNET_DETR,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {
        **_EXPERTS, "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2,
    },
    "deepseek_ocr2_vision": {"sam_config": {"downsample_channels": [32, 32]}},
    "deepseek_v2": {**_EXPERTS, "first_k_dense_replace": 1},
    "deimv2": _HGNET_DETR,
    "depth_pro": {
        "patch_size": 32, "intermediate_hook_ids": (1, 0),
        "scaled_images_feature_dims": (32, 32, 16),
        "intermediate_feature_dims": (16, 16),
        "image_model_config": {"patch_size": 4, "image_size": 32},
        "patch_model_config": {"patch_size": 4, "image_size": 32},
        "fov_model_config": {"patch_size": 4, "image_size": 32},
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "donut-swin": _SWIN,
    "dots1": {**_EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 32}, "text_config": {"num_key_value_heads": 4},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
        "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2,
    },
    "edgetam_vision_model": {
        "backbone_config": {
            "architecture": "repvit_m1",
            "model_args": {
                "in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
                "embed_dim": [8, 16, 32, 64], "depth": [2, 2, 2, 2],
            },
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "efficientloftr": {
        "hidden_size": 64, "out_features": [16, 16, 32, 64], "stage_num_blocks": [1, 2, 2, 2],
        "num_attention_heads": 8,
    },
    "efficientnet": _EFFICIENT,
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe_text": _rope(1, 1, 2),
    "fast_vlm": {
        "vision_config": {"architecture": "test_vit", "hidden_size": 64, "model_args": None},
    },
    "fastspeech2_conformer": {
        "encoder_linear_units": 48, "decoder_linear_units": 48, "speech_decoder_postnet_units": 32,
    },
    "fastspeech2_conformer_hifigan": {"model_in_dim": 80, "upsample_initial_channel": 128},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config": {"upsample_initial_channel": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n_vision": {"architecture": "test_vit"},
    "glm4v_moe_text": _rope(1, 1, 0),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]]},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8, "mamba_d_head": 8},
    "grounding-dino": {"backbone_config": {"embed_dim": 48}, "num_queries": 8},
    "idefics": {
        "vision_config": {"image_size": 32, "patch_size": 8}, "additional_vocab_size": 3,
        "use_resampler": False, "cross_layer_interval": 1,
    },
    "informer": _SERIES,
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"video_token_index": 5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "janus_vqgan": {"num_patches": 4, "num_embeddings": 64},
    "kosmos-2": {"latent_query_num": 4},
    "kyutai_speech_to_text": {"codec_config": _CODEC},
    "led": {"attention_window": 8},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1,
    },
    "llama4_vision_model": {"intermediate_size": 128},
    "lw_detr": {"projector_scale_factors": [1.0], "num_queries": 8, "group_detr": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 1},
    "mask2former": {"feature_size": 32, "mask_feature_size": 32},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "mimi": _CODEC,
    "mllama_vision_model": {"intermediate_layers_indices": [0]},
    "mm-grounding-dino": {"backbone_config": {"embed_dim": 48}, "num_queries": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "molmo2_vision": {"image_size": [56, 56], "num_position_embeddings": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moshi_depth": {"input_size": 32},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neucodec": {"quantization_dim": 64},
    "paddleocr_vl_text": _rope(2, 1, 1),
    "pe_audio_video_encoder": {
        "video_config": {"vision_config": _PE_VISION},
    },
    "pe_video_encoder": {"vision_config": _PE_VISION},
    "perceiver": {"d_latents": 32, "num_self_attends_per_block": 2, "output_shape": [1, 2, 16, 16]},
    "perception_lm": {
        "vision_config": {"architecture": "test_vit", "model_args": {"embed_dim": 64}},
    },
    "pi0": {"vlm_config": {"image_token_index": 5}},
    "pocket_tts_audio_tokenizer": _CODEC,
    "pp_doclayout_v2": {**_HGNET_DETR, "class_thresholds": [0.5] * 20, "class_order": [*range(20)]},
    "pp_doclayout_v3": _HGNET_DETR,
    "pp_doclayout_v4": _HGNET_DETR,
    "pp_formulanet_vision": {"post_conv_in_channels": 32},
    "pp_ocrv5_server_det": {
        "intraclass_block_config": _INTRACLASS, "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "pp_ocrv5_server_rec": {
        "backbone_config": {
            **_HGNET, "stage_num_blocks": (1, 1, 2, 1), "stem_strides": [2, 1, 1, 1, 1],
            "stage_downsample": [True] * 4,
            "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]],
        },
    },
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 128},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rt_detr": _DETR,
    "rt_detr_v2": _DETR,
    "sam": {"vision_config": {"num_pos_feats": 16}},
    "sam2_hiera_det_model": {
        "hidden_size": 8, "image_size": [64, 64], "blocks_per_stage": [1, 2, 3, 2],
        "embed_dim_per_stage": [8, 16, 32, 64], "global_attention_blocks": [4],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam3_tracker_video": {"image_size": 56},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_hq": {"vision_config": {"num_pos_feats": 16}, "mask_decoder_config": {"vit_dim": 32}},
    "seggpt": {
        "image_size": (64, 32), "num_hidden_layers": 5, "merge_index": 0,
        "intermediate_hidden_state_indices": (1, 2, 3, 4),
    },
    "slanet": {"max_text_length": 8},
    "slanext": {"post_conv_in_channels": 32, "max_text_length": 8},
    "speecht5_hifigan": {"model_in_dim": 80, "upsample_initial_channel": 128},
    "step3p5": {"sliding_window": 8},
    "swin": _SWIN,
    "swin2sr": {
        "depths": [2, 2], "image_size": 16, "num_heads": [4, 4], "window_size": 4,
    },
    "swinv2": _SWIN,
    "time_series_transformer": _SERIES,
    "timm_backbone": {"backbone": "resnet18"},
    "timm_wrapper": {"model_args": {"layers": [2, 2, 2, 2], "channels": [16, 32, 64, 128]}},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "uvdoc": {
        "bridge_connector": (128, 128), "backbone_config": {"out_indices": [1, 2, 3, 4, 5, 6]},
    },
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vitmatte": {"convstream_hidden_sizes": [8, 16, 32], "fusion_hidden_sizes": [32, 16, 8, 8]},
    "xcodec2": {"quantization_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
    },
}  # fmt: skip


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _codes(*shape: int) -> Tensor:
    return torch.randint(1, 16, shape, generator=torch.Generator().manual_seed(2))


def _whole(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _ids(*tokens: int) -> Tensor:
    return torch.tensor([tokens] * 2)


_MASK_DECODER = {
    "image_embeddings": _noise(1, 32, 4, 4),
    "image_positional_embeddings": _noise(1, 32, 4, 4),
    "sparse_prompt_embeddings": _noise(1, 1, 2, 32),
    "dense_prompt_embeddings": _noise(1, 32, 4, 4),
    "multimask_output": True,
    "high_resolution_features": [_noise(1, 4, 16, 16), _noise(1, 8, 8, 8)],
}
_PROMPTS = {
    "input_points": _noise(1, 1, 2, 2),
    "input_labels": _whole(1, 1, 2),
    "input_boxes": _noise(1, 1, 4),
    "input_masks": _noise(1, 1, 16, 16),
}
# Values of parameters of `forward`; a parameter with None is not given.
INPUTS: dict[str, dict[str, Any]] = {
    "blip-2": {"input_ids": _ids(*[5] * 8, 7, 8, 9)},
    "blip_2_qformer": {"query_embeds": _noise(2, 8, 32), "encoder_hidden_states": _noise(2, 4, 32)},
    "blt": {"use_cache": False},
    "clap": {"input_features": _noise(2, 1, 256, 64)},
    "clap_audio_model": {"input_features": _noise(2, 1, 256, 64)},
    "decision_transformer": {
        "states": _noise(2, 5, 17), "actions": _noise(2, 5, 4), "rewards": _noise(2, 5, 1),
        "returns_to_go": _noise(2, 5, 1), "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    },
    "deepseek_ocr2_encoder": {"inputs_embeds": _noise(2, 8, 32), "num_patches": 4},
    "depth_pro": {"pixel_values": _noise(2, 3, 128, 128)},
    "edgetam_mask_decoder": _MASK_DECODER,
    "edgetam_prompt_encoder": _PROMPTS,
    "edgetam_video_mask_decoder": _MASK_DECODER,
    "edgetam_video_prompt_encoder": _PROMPTS,
    "fastspeech2_conformer_hifigan": {"spectrogram": _noise(2, 16, 80)},
    "florence_vision": {"hidden_states": _noise(2, 3, 64, 64)},
    "fun_asr_nano_encoder": {
        "input_features": _noise(2, 12, 560), "input_features_mask": _whole(2, 12),
    },
    "gemma3n_audio": {"audio_mel": _noise(2, 48, 128), "audio_mel_mask": torch.zeros(2, 48) > 0},
    "gemma4_audio": {"input_features": _noise(2, 48, 128), "attention_mask": _whole(2, 48) > 0},
    "gemma4_vision": {
        "pixel_values": _noise(2, 36, 768),
        "pixel_position_ids": torch.cartesian_prod(*[torch.arange(6)] * 2).repeat(2, 1, 1),
    },
    "granite_speech5_ctc": {"input_features": _noise(2, 32, 320), "attention_mask": _whole(2, 32)},
    "granite_speech5_encoder": {
        "input_features": _noise(2, 32, 320), "attention_mask": _whole(2, 32),
    },
    "idefics": {
        "attention_mask": _whole(2, 6),
        "pixel_values": _noise(2, 1, 3, 32, 32),
        "image_attention_mask": _whole(2, 6, 1),
    },
    "idefics2_perceiver": {"context": _noise(2, 6, 32), "attention_mask": _whole(2, 6)},
    "inkling2_vision": {
        "pixel_values": _noise(8, 40, 40, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
    },
    "inkling_audio": {"audio_input_ids": _codes(2, 6, 80)},
    "inkling_vision": {"pixel_values": _noise(4, 2, 40, 40, 3)},
    "instructblip": {"input_ids": _ids(*[5] * 8, 7, 8, 9)},
    "instructblipvideo": {
        "input_ids": _ids(*[5] * 16, 7, 8, 9), "pixel_values": _noise(2, 2, 3, 64, 64),
    },
    "jev": {
        "marks": torch.tensor([[2, 4]]), "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    },
    "kimi_k25_vision": {"pixel_values": _noise(32, 3, 14, 14)},
    "kosmos-2": {
        "image_embeds_position_mask": _ids(0, 1, 1, 1, 1, 0) > 0,
        "pixel_values": _noise(2, 3, 64, 64),
    },
    "kosmos_2_5_vision_model": {"hidden_states": _noise(2, 6, 32), "attention_mask": _whole(2, 6)},
    "kyutai_speech_to_text": {"input_ids": _codes(2, 6, 33)},
    "lxmert": {"visual_feats": _noise(2, 5, 32), "visual_pos": _noise(2, 5, 4)},
    "minicpm_ocr_vision": {"pixel_values": _noise(1, 3, 16, 512), "target_sizes": _ids(4, 4)},
    "minicpmv4_6_vision": {"pixel_values": _noise(1, 3, 16, 512), "target_sizes": _ids(4, 4)},
    "minicpmv4_7_vision": {"pixel_values": _noise(1, 3, 16, 512), "target_sizes": _ids(4, 4)},
    "mllama_vision_model": {
        "pixel_values": _noise(2, 1, 4, 3, 64, 64), "aspect_ratio_ids": _whole(2, 1),
        "aspect_ratio_mask": _whole(2, 1, 4),
    },
    "molmo2_adapter": {
        "image_features": _noise(2, 16, 64), "pooled_patches_idx": torch.arange(32).view(8, 4),
    },
    "molmo2_vision": {"pixel_values": _noise(2, 16, 588)},
    "moshi_depth": {"input_ids": _codes(2, 6), "last_hidden_state": _noise(2, 6, 32)},
    "muse_glimmer_assistant": {
        "noise_embeds": _noise(2, 4, 32), "context_hidden_states": _noise(2, 6, 160),
    },
    "muse_spark_audio": {"input_values": _noise(2, 3840)},
    "neucodec": {"input_values": _noise(2, 1, 3200), "input_features": _noise(2, 10, 32)},
    "oneformer": {"task_inputs": _noise(2, 77)},
    "paddleocr_vl_vision": {"pixel_values": _noise(1, 32, 3, 14, 14)},
    "pe_audio_video": {
        "input_values": _noise(2, 1, 7680), "pixel_values_videos": _noise(2, 2, 3, 384, 384),
    },
    "pe_audio_video_encoder": {
        "input_values": _noise(2, 1, 7680), "pixel_values_videos": _noise(2, 2, 3, 384, 384),
    },
    "pe_video": {"pixel_values_videos": _noise(2, 2, 3, 384, 384)},
    "pe_video_encoder": {"pixel_values_videos": _noise(2, 2, 3, 384, 384)},
    "phi4_multimodal_audio": {"hidden_states": _noise(2, 64, 80), "mask": _whole(2, 64) > 0},
    "pi0": {
        "state": _noise(2, 32), "input_ids": _ids(*[5] * 16, 7, 8), "attention_mask": _whole(2, 18),
        "pixel_values": _noise(2, 1, 3, 64, 64), "pixel_attention_mask": _whole(2, 1) > 0,
    },
    "pp_ocrv5_mobile_rec": {"pixel_values": _noise(2, 3, 48, 64)},
    "qwen2_5_omni_audio_encoder": {
        "input_features": _noise(128, 400), "feature_lens": torch.tensor([200, 200]),
        "aftercnn_lens": torch.tensor([100, 100]),
    },
    "qwen2_5_omni_bigvgan": {"mel_spectrogram": _noise(1, 32, 16)},
    "qwen2_5_omni_dit": {
        "hidden_states": _noise(1, 12, 32), "condition_vector": _noise(1, 20, 32),
        "speaker_embedding": _noise(1, 12, 32), "quantized_code": _codes(1, 6),
        "time_step": torch.tensor(0.5),
    },
    "qwen2_5_omni_token2wav": {
        "code": _codes(1, 6), "conditioning": _noise(1, 32), "reference_mel": _noise(1, 20, 32),
        "num_steps": 2,
    },
    "qwen3_asr_encoder": {
        "input_features": _noise(2, 128, 200), "input_features_mask": _whole(2, 200),
    },
    "qwen3_omni_moe_audio_encoder": {
        "input_features": _noise(128, 400), "feature_lens": torch.tensor([200, 200]),
    },
    "qwen3_omni_moe_talker_code_predictor": {"input_ids": None, "inputs_embeds": _noise(2, 6, 32)},
    "qwen3_omni_moe_talker_text": {"input_ids": None, "inputs_embeds": _noise(2, 6, 32)},
    "rag": {
        "context_input_ids": _codes(10, 6), "context_attention_mask": _whole(10, 6),
        "doc_scores": _noise(2, 5), "decoder_input_ids": _codes(2, 6),
    },
    "sam2_video_mask_decoder": _MASK_DECODER,
    "sam2_video_prompt_encoder": _PROMPTS,
    "sam3_tracker_video_mask_decoder": _MASK_DECODER,
    "sam3_tracker_video_prompt_encoder": _PROMPTS,
    "sam_hq_prompt_encoder": {"masks": _noise(2, 1, 16, 16)},
    "sam_prompt_encoder": {"masks": _noise(2, 1, 16, 16)},
    "seggpt": {
        "pixel_values": _noise(2, 3, 32, 32), "prompt_pixel_values": _noise(2, 3, 32, 32),
        "prompt_masks": _noise(2, 3, 32, 32),
    },
    "siglip2": {
        "pixel_values": _noise(2, 16, 768), "pixel_attention_mask": _whole(2, 16),
        "spatial_shapes": _ids(4, 4),
    },
    "siglip2_vision_model": {
        "pixel_values": _noise(2, 16, 768), "pixel_attention_mask": _whole(2, 16),
        "spatial_shapes": _ids(4, 4),
    },
    "speecht5_hifigan": {"spectrogram": _noise(2, 16, 80)},
    "tvp": {
        "pixel_values": _noise(1, 2, 3, 64, 64), "input_ids": _codes(1, 6),
        "attention_mask": _whole(1, 6),
    },
    "vibevoice_diffusion": {
        "noisy_images": _noise(2, 64), "timesteps": torch.ones(2), "condition": _noise(2, 32),
    },
    "video_llama_3_vision": {"merge_sizes": torch.tensor([2, 2])},
    "voxtral_realtime": {"input_features": _noise(2, 128, 48)},
    "xcodec": {"input_values": _noise(2, 1, 3200)},
    "xcodec2": {"input_values": _noise(2, 1, 3200), "input_features": _noise(2, 10, 32)},
}  # fmt: skip

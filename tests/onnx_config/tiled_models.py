"""Tiny models that read texts with images which come as tiles, or with their sizes beside them."""

from __future__ import annotations

from typing import Any

import transformers

__all__ = ["IMAGE_TOKEN", "TILED", "tiled_config"]

IMAGE_TOKEN = 57

_TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": None,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_RESOLUTIONS = [[16, 16], [16, 32], [32, 16], [32, 32], [48, 16], [16, 48], [48, 48]]
_PERCEIVER = {
    "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "num_key_value_heads": 1,
    "resampler_head_dim": 8,
}  # fmt: skip
_LLAMA = {**_TEXT, "model_type": "llama"}
_CLIP = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 32}

TILED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolVLMForConditionalGeneration": (
        "SmolVLMConfig",
        {"vision_config": {**_VISION, "model_type": "smolvlm_vision"}, "text_config": _LLAMA, "scale_factor": 2,
         "image_token_id": IMAGE_TOKEN},
    ),
    "Idefics2ForConditionalGeneration": (
        "Idefics2Config",
        {"vision_config": {**_VISION, "model_type": "idefics2_vision", "image_size": 32},
         "text_config": {**_TEXT, "model_type": "mistral"}, "perceiver_config": _PERCEIVER,
         "image_token_id": IMAGE_TOKEN},
    ),
    "LlavaNextForConditionalGeneration": (
        "LlavaNextConfig",
        {"vision_config": _CLIP, "text_config": _LLAMA, "image_token_index": IMAGE_TOKEN,
         "image_grid_pinpoints": _RESOLUTIONS, "vision_feature_layer": -1},
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "LlavaOnevisionConfig",
        {"vision_config": {**_VISION, "model_type": "siglip_vision_model"},
         "text_config": {**_TEXT, "model_type": "qwen2"}, "image_token_index": IMAGE_TOKEN, "video_token_index": 58,
         "image_grid_pinpoints": _RESOLUTIONS, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_4"},
    ),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {"vision_config": {**_VISION, "model_type": "pixtral", "image_size": 112, "head_dim": 8},
         "text_config": {**_TEXT, "model_type": "mistral"}, "image_token_index": IMAGE_TOKEN, "spatial_merge_size": 2,
         "vision_feature_layer": -1},
    ),
    "PixtralForConditionalGeneration": (
        "LlavaConfig",
        {"vision_config": {**_VISION, "model_type": "pixtral", "image_size": 32, "head_dim": 8}, "text_config": _LLAMA,
         "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    # Images as they are, which the graph of the whole takes.
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {"vision_config": _CLIP, "text_config": _LLAMA, "image_token_index": IMAGE_TOKEN, "image_seq_length": 16,
         "vision_feature_layer": -1},
    ),
    # Features for several layers of the decoder, not for places in a text.
    "Granite4VisionForConditionalGeneration": (
        "Granite4VisionConfig",
        {"vision_config": {**_CLIP, "hidden_size": 64},
         "text_config": {**_TEXT, "model_type": "granite4_vision_text", "hidden_size": 64},
         "image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": _RESOLUTIONS, "downsample_rate": "1/2",
         "deepstack_layer_map": [[1, 0]], "spatial_target_layers": [1], "spatial_vision_layer": -1,
         "qformer_config": {"model_type": "blip_2_qformer", "hidden_size": 64, "num_hidden_layers": 1,
                            "num_attention_heads": 1, "intermediate_size": 32, "encoder_hidden_size": 64,
                            "cross_attention_frequency": 1}},
    ),
}  # fmt: skip
"""Class, or what is called one of, -> its config class and what that is given."""


def tiled_config(name: str) -> Any:
    """Return the config of a class by its name."""
    made, values = TILED[name]
    architecture = f"{made.removesuffix('Config')}ForConditionalGeneration"
    return getattr(transformers, made)(**values, architectures=[architecture])

"""Configs of small segmenters that are asked about points and boxes: one of each way to embed an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["SEGMENTERS", "make_telling"]

SIDE = 32
_DECODER = {
    "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "iou_head_depth": 2,
    "num_hidden_layers": 2, "attention_downsample_rate": 1,
}  # fmt: skip
_PROMPTS = {"hidden_size": 16, "image_size": SIDE, "patch_size": 4, "image_embedding_size": 8, "mask_input_channels": 4}
_VISION = {
    "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 4, "window_size": 4, "mlp_dim": 32, "num_pos_feats": 8,
}  # fmt: skip


def _sam() -> Any:
    import transformers

    return transformers.SamConfig(
        vision_config={**_VISION, "global_attn_indexes": [1]},
        prompt_encoder_config=_PROMPTS,
        mask_decoder_config=_DECODER,
    )


def _sam_hq() -> Any:
    import transformers

    return transformers.SamHQConfig(
        vision_config={**_VISION, "global_attn_indexes": [0, 1]},
        prompt_encoder_config=_PROMPTS,
        mask_decoder_config={**_DECODER, "vit_dim": 16},
    )


def _sam2() -> Any:
    import transformers

    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=64, patch_kernel_size=7, patch_stride=4, patch_padding=3,
        window_positional_embedding_background_size=[2, 2], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[3],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    return transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={**_DECODER, "hidden_size": 32},
    )


SEGMENTERS = {"SamModel": _sam, "SamHQModel": _sam_hq, "Sam2Model": _sam2}
"""Class -> what returns a config of it: embeddings are a tensor, a tensor and a list, and a list."""


def make_telling(model: torch.nn.Module) -> None:
    """Give a segmenter weights with which its answers depend on the image; as it is made they hardly do."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            was_norm = parameter.ndim == 1 and bool(parameter.any())
            parameter.copy_(scale * torch.randn_like(parameter) + was_norm)

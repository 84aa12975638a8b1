"""What the layers of torch take: told by their own settings, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["LayerWish", "wish_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWish:
    """What a layer takes."""

    sizes: Mapping[int, int] = field(default_factory=dict)
    """Position of an axis -> its size."""
    rank: tuple[int, ...] = ()
    """Numbers of axes, the likeliest first; empty: any."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Position of an axis -> what it is called, where that is not the usual name."""
    whole: bool = False
    """Whether it takes whole numbers."""
    limit: int = 2
    """Exclusive upper bound of whole numbers."""


def wish_of(layer: torch.nn.Module) -> LayerWish | None:
    nn = torch.nn
    match layer:
        case nn.Embedding() | nn.EmbeddingBag():
            return LayerWish(whole=True, limit=layer.num_embeddings)
        case nn.Linear() | nn.Bilinear():
            return LayerWish(sizes={-1: layer.in_features if isinstance(layer, nn.Linear) else layer.in1_features})
        case nn.Conv1d() | nn.ConvTranspose1d():
            return LayerWish(rank=(3,), sizes={1: layer.in_channels}, names={1: "num_channels", 2: "sequence_length"})
        case nn.Conv2d() | nn.ConvTranspose2d():
            return LayerWish(rank=(4,), sizes={1: layer.in_channels})
        case nn.Conv3d() | nn.ConvTranspose3d():
            return LayerWish(rank=(5,), sizes={1: layer.in_channels})
        case nn.BatchNorm1d():
            return LayerWish(rank=(2, 3), sizes={1: layer.num_features})
        case nn.BatchNorm2d():
            return LayerWish(rank=(4,), sizes={1: layer.num_features})
        case nn.BatchNorm3d():
            return LayerWish(rank=(5,), sizes={1: layer.num_features})
        case nn.GroupNorm():
            return LayerWish(sizes={1: layer.num_channels})
        case nn.LayerNorm() | nn.RMSNorm():
            shape = layer.normalized_shape
            return LayerWish(sizes={-position: size for position, size in enumerate(reversed(shape), start=1)})
        case nn.RNNBase():
            return LayerWish(rank=(3,), sizes={-1: layer.input_size})
        case nn.MultiheadAttention():
            return LayerWish(rank=(3,), sizes={-1: layer.embed_dim})
        case _:
            return None

"""What sizes a config declares, for text, images, sounds and series.

A composite config holds one config per kind of data; what is asked of it is asked of the part that the argument
in question belongs to, then of the whole.
"""

from __future__ import annotations

import re
from typing import Any

from onnx_config.patterns import CONFIG_SIZES

__all__ = ["config_for", "config_size", "embedding_size", "image_size", "longest", "modality_of", "sub_configs"]

_MODALITIES = (
    (re.compile(r"^pixel_|_pixel_|image|video|bool_masked_pos|pixel_mask"), "image"),
    (re.compile(r"input_features|input_values|audio|speech|^padding_mask$"), "audio"),
    (re.compile(r"^past_|^future_|static_|time"), "time"),
    # How large images are, in patches or pixels.
    (re.compile(r"(^|_)(grid_\w+|sizes|shapes)$"), "image"),
)
_SUBCONFIGS = {
    "image": ("vision_config", "vision", "encoder", "backbone_config"),
    "audio": ("audio_config", "audio_encoder", "encoder"),
    "text": ("text_config", "decoder"),
    "time": (),
}


def modality_of(name: str) -> str:
    """Return ``text``, ``image``, ``audio`` or ``time``: what kind of data an argument carries.

    >>> modality_of("pixel_values"), modality_of("input_ids")
    ('image', 'text')
    """
    return next((kind for pattern, kind in _MODALITIES if pattern.search(name)), "text")


def config_for(config: Any, modality: str) -> Any:
    """Return the part of a composite config that describes ``modality``; the config itself where it is plain."""
    for name in _SUBCONFIGS[modality]:
        for holder in sub_configs(config):
            sub = getattr(holder, name, None)
            if sub is not None and hasattr(sub, "to_dict"):
                return sub
    return config


def sub_configs(config: Any) -> list[Any]:
    """Return a config and all configs that it holds, outermost first."""
    found = [config]
    for part in found:
        values = vars(part).values() if hasattr(part, "to_dict") else ()
        found += [v for v in values if hasattr(v, "to_dict") and all(v is not f for f in found)]
    return found


def config_size(config: Any, axis: str, modality: str) -> int | None:
    """Return the size that a config declares for an axis; what describes ``modality`` is asked first."""
    for holder in (config_for(config, modality), *sub_configs(config)):
        # Where a config names what has so many of something: channels of its sounds, say.
        of_modality = axis.replace("num_", f"{modality}_")
        for name in (axis, axis.replace("number_of_", "num_"), of_modality, *CONFIG_SIZES.get(axis, ())):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def embedding_size(config: Any) -> int | None:
    """Return how many numbers stand for one token of a text; ``None`` where the config does not say."""
    for holder in (config_for(config, "text"), config):
        for name in ("hidden_size", "d_model", "n_embd"):
            if isinstance(value := getattr(holder, name, None), int) and value > 0:
                return value
    return None


def image_size(config: Any) -> tuple[int, int] | None:
    """Return (height, width) in pixels where the config declares them."""
    for holder in (config_for(config, "image"), *sub_configs(config)):
        for name in ("image_size", "input_size"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value, value
            if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
                return value[0], value[1]
    return None


def longest(config: Any, axis: str, name: str) -> int | None:
    """Return the largest size that the config allows for an axis of tokens; ``None``: no limit declared."""
    if axis not in ("sequence_length", "decoder_sequence_length") or modality_of(name) != "text":
        return None
    part = config_for(config, "text")
    names = ("max_target_positions",) if axis.startswith("decoder") else ("max_source_positions",)
    for holder in (part, config):
        for attribute in ("max_position_embeddings", *names):
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and value > 0:
                return value
    return None

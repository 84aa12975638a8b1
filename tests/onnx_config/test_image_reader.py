"""What features of images are made of is found where the inputs of a model are a text's alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from onnx_config.input_lessons import TEXT_ONLY
from onnx_config.parts import Role, fusion_parts, without_images
from onnx_config.spec import ModelSpec
from onnx_config.tile_models import Arrangement, arrangement_of
from onnx_config.universal_config import UniversalOnnxConfig
from tests.onnx_config.tiled_models import IMAGE_TOKEN, tiled_config

_TILES = ("batch_size", "num_images", 3)


@cache
def spec_of(name: str) -> ModelSpec:
    return UniversalOnnxConfig(tiled_config(name)).spec


@pytest.mark.parametrize(
    ("name", "arrangement", "shapes"),
    [
        pytest.param(
            "SmolVLMForConditionalGeneration",
            Arrangement.TILES,
            {"pixel_values": (*_TILES, 16, 16), "pixel_attention_mask": (*_TILES[:2], 16, 16)},
            id="tiles-of-one-size-and-a-mask",
        ),
        pytest.param(
            "Idefics2ForConditionalGeneration",
            Arrangement.TILES,
            {
                "pixel_values": (*_TILES, "height", "width"),
                "pixel_attention_mask": (*_TILES[:2], "height", "width"),
            },
            id="images-of-any-size-and-a-mask",
        ),
        pytest.param(
            "LlavaNextForConditionalGeneration",
            Arrangement.SIZED_TILES,
            {"pixel_values": ("image_batch_size", "num_tiles", 3, 16, 16), "image_sizes": ("image_batch_size", 2)},
            id="tiles-of-pictures-of-any-size",
        ),
        pytest.param(
            "LlavaOnevisionForConditionalGeneration",
            Arrangement.SIZED_TILES,
            {
                "pixel_values": ("image_batch_size", "num_tiles", 3, 16, 16),
                "image_sizes": ("image_batch_size", 2),
                "batch_num_images": ("text_batch_size",),
            },
            id="and-how-many-belong-to-each-text",
        ),
        pytest.param(
            "Mistral3ForConditionalGeneration",
            Arrangement.ALONE,
            {"pixel_values": (1, 3, "height", "width")},
            id="one-image-at-its-own-size",
        ),
        pytest.param(
            "PixtralForConditionalGeneration",
            Arrangement.ALONE,
            {"pixel_values": (1, 3, "height", "width")},
            id="rather-than-many-of-one-size",
        ),
    ],
)
def test_what_features_are_made_of(name: str, arrangement: Arrangement, shapes: dict[str, Any]) -> None:
    spec = spec_of(name)
    assert spec.images is not None
    encoder = spec.images.encoder
    assert {tensor.name: tensor.shape for tensor in encoder.inputs} == shapes
    assert arrangement_of(encoder) is arrangement
    assert spec.images.token == IMAGE_TOKEN
    assert [part.part for part in fusion_parts(spec)] == [
        Role.VISION_ENCODER, Role.EMBED_TOKENS, Role.DECODER_MERGED,
    ]  # fmt: skip
    assert not any(note.startswith(TEXT_ONLY) or "is fixed" in note for note in spec.notes)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("LlavaForConditionalGeneration", id="the-inputs-hold-images"),
        pytest.param("Granite4VisionForConditionalGeneration", id="its-features-go-elsewhere"),
    ],
)
def test_where_there_is_nothing_to_be_found(name: str) -> None:
    assert spec_of(name).images is None


def test_the_text_alone_says_what_it_does_without() -> None:
    spec = spec_of("LlavaNextForConditionalGeneration")
    alone = without_images(spec)
    assert alone.images is None
    assert alone.assumed[-1].startswith(TEXT_ONLY)
    assert not fusion_parts(alone)
    assert without_images(alone) == alone


def test_images_of_one_size_are_what_is_left_of_images_of_any() -> None:
    spec = spec_of("PixtralForConditionalGeneration")
    alone = without_images(spec)
    assert [tensor.shape[-2:] for tensor in alone.inputs if tensor.name == "pixel_values"] == [(32, 32)]
    assert "height is fixed at 32" in alone.assumed[-1]


def test_a_text_without_a_cache_is_no_such_model() -> None:
    assert not fusion_parts(replace(spec_of("SmolVLMForConditionalGeneration"), cache=()))

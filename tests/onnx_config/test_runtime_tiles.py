"""Texts with images that come as tiles, or with their sizes beside them: the graphs answer as PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from onnx_config import AutoModelForONNX
from onnx_config.errors import InputError
from onnx_config.export import steps
from onnx_config.parts import GRAPH_FILES, Role, fusion_parts
from tests.onnx_config.test_runtime_fusion import Parts, make
from tests.onnx_config.tiled_models import IMAGE_TOKEN, tiled_config

Tensors = dict[str, torch.Tensor]

_WORDS = 6


def convert(name: str, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    def build() -> Any:
        config = tiled_config(name)
        # All layers of an encoder are alike, and each takes seconds to trace.
        config.vision_config.num_hidden_layers = 1
        return getattr(transformers, name)(config)

    return make(build, fusion_parts, tmp_path_factory.mktemp(name))


def texts(counts: list[int], generator: torch.Generator) -> Tensors:
    """Return a text for each of ``counts``, padded on the left, with so many places for features."""
    length = max(counts) + _WORDS
    ids = torch.randint(3, 50, (len(counts), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(counts):
        begin = length - _WORDS - count
        ids[row, :begin], mask[row, :begin] = 0, 0
        ids[row, begin + 1 : begin + 1 + count] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": mask}


def illustrated(reference: Any, images: Tensors, rows: Callable[[list[int]], list[int]]) -> Tensors:
    """Return images with texts that have places for them, by the number of features of each image."""
    with torch.no_grad():
        found = reference.get_image_features(**images, return_dict=True).pooler_output
    return {**texts(rows([len(part) for part in found]), torch.Generator().manual_seed(4)), **images}


def tiles(reference: Any) -> Tensors:
    """Return three texts: with three images, with two and with none; part of an image is hidden."""
    pixels = torch.randn(3, 3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    pixels[1, 2], pixels[2] = 0, 0
    mask = torch.ones(3, 3, 16, 16, dtype=torch.bool)
    mask[0, 1, :, 8:] = False
    return illustrated(reference, {"pixel_values": pixels, "pixel_attention_mask": mask}, list)


def pictures(reference: Any) -> Tensors:
    """Return three texts: with one picture, with two and with none."""
    images = {
        "pixel_values": torch.randn(3, 10, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
        "image_sizes": torch.tensor([[40, 20], [33, 48], [16, 16]]),
    }
    if "batch_num_images" in fusion_inputs(reference):
        images["batch_num_images"] = torch.tensor([1, 2])
    return illustrated(reference, images, lambda counts: [counts[0], counts[1] + counts[2], 0])


def single_images(reference: Any) -> Tensors:
    """Return three texts: two with an image each, of different sizes, and one with none."""
    images = {
        "pixel_values": torch.randn(2, 3, 56, 40, generator=torch.Generator().manual_seed(3)),
        "image_sizes": torch.tensor([[24, 40], [56, 16]]),
    }
    return illustrated(reference, images, lambda counts: [*counts, 0])


def fusion_inputs(reference: Any) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(reference.get_image_features).parameters


CASES = {
    "SmolVLMForConditionalGeneration": tiles,
    "LlavaOnevisionForConditionalGeneration": pictures,
    "Mistral3ForConditionalGeneration": single_images,
}


@pytest.fixture(scope="module", params=[pytest.param(name, id=name) for name in CASES])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Tensors]:
    parts = convert(request.param, tmp_path_factory)
    return parts, CASES[request.param](parts.reference)


@pytest.mark.slow
def test_texts_about_tiles_are_those_of_pytorch(converted: tuple[Parts, Tensors]) -> None:
    parts, inputs = converted
    assert parts.together()["difference"] is None
    model = AutoModelForONNX.from_pretrained(parts.folder, threads=1)
    with torch.no_grad():
        want = parts.reference(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, want, atol=1e-4, rtol=1e-3)
    asked = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, "do_sample": False}
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    alone["input_ids"] = torch.where(alone["input_ids"] == IMAGE_TOKEN, 9, alone["input_ids"])
    for given, options in ((inputs, {}), (inputs, {"num_beams": 3}), (alone, {})):
        answers = [one.generate(**given, **asked, **options) for one in (parts.reference, model)]
        assert torch.equal(*answers)
    # What the class itself says where features and places are not as many.
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN] = 9
    with pytest.raises(ValueError, match=r"[Ii]mage features and image tokens do not match"):
        model(**inputs)
    if "video_token_id" in parts.reference.config.to_dict():
        with pytest.raises(InputError, match="makes features of videos"):
            model(**alone, pixel_values_videos=torch.zeros(1, 2, 3, 16, 16))


@pytest.mark.slow
def test_a_picture_of_more_tiles_than_are_given_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("next")
    config = tiled_config("LlavaNextForConditionalGeneration")
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlavaNextForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    encoder = fusion_parts(steps.ModelSpec.from_json(steps.detect({"folder": str(folder)})))[0]
    path = folder / GRAPH_FILES[Role.VISION_ENCODER]
    request = {"folder": str(folder), "spec": encoder.to_json(), "dtype": "float32", "opset": None}
    steps.export({**request, "output": str(path)})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.zeros((1, 3, 3, 16, 16), np.float32)
    features = session.run(None, {"pixel_values": pixels, "image_sizes": np.array([[16, 32]])})[0]
    assert len(features) == 16 + 4 * (8 + 1)
    with pytest.raises(Exception, match="no_more_tiles_than_are_given"):
        session.run(None, {"pixel_values": pixels, "image_sizes": np.array([[48, 48]])})

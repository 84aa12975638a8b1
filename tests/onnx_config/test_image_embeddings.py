"""What segmenters of several classes make of an image, and what they are asked about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_config import UniversalOnnxConfig
from onnx_config.image_embeddings import arguments_of, by_argument, by_name
from tests.tiny_segmenters import SEGMENTERS


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("SamModel", ["image_embeddings"]),
        ("SamHQModel", ["image_embeddings", "intermediate_embeddings.0", "intermediate_embeddings.1"]),
        ("Sam2Model", ["image_embeddings.0", "image_embeddings.1", "image_embeddings.2"]),
    ],
)
def test_embeddings_are_called_as_the_arguments_that_take_them(architecture: str, named: list[str]) -> None:
    config = SEGMENTERS[architecture]()
    config.architectures = [architecture]
    universal = UniversalOnnxConfig(config)
    spec = universal.spec
    assert [tensor.name for tensor in spec.inputs] == ["pixel_values", "input_points", "input_labels"]
    assert [tensor.name for tensor in spec.embeddings] == named
    points, (boxes,) = spec.inputs[1], spec.boxes
    assert boxes.name == "input_boxes"
    assert boxes.shape == (*points.shape[:2], 4)
    inputs = universal.generate_dummy_inputs(framework="np", **{str(points.shape[2]): 200})
    side = inputs["pixel_values"].shape[-1]
    assert 0.9 * side < inputs["input_points"].max() < side
    assert inputs["input_points"].min() >= 0
    assert set(np.unique(inputs["input_labels"])) == {-10, -1, 0, 1}


@pytest.mark.parametrize(
    "given",
    [
        {"image_embeddings": 1},
        {"image_embeddings": [1, 2, 3]},
        {"image_embeddings": 1, "intermediate_embeddings": [2, 3]},
    ],
)
def test_what_arguments_are_given_is_named_and_back(given: dict[str, Any]) -> None:
    named: dict[str, Any] = {}
    for argument, value in given.items():
        named |= by_name(argument, value)
    assert arguments_of(named) == tuple(given)
    assert by_argument(dict(reversed(named.items()))) == dict(reversed(given.items()))

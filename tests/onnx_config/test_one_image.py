"""Encoders of images with grids that take one image at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from onnx_config.errors import InputError
from onnx_config.one_image import image_by_image, of_one_image
from onnx_config.runtime.fusion import _listed
from onnx_config.runtime.images import run_images
from onnx_config.spec import GridRule, ModelSpec, TensorSpec, ValueRule

GRID = GridRule(patches="total_patches", step=2)


def encoder(**values: Any) -> ModelSpec:
    inputs = (
        TensorSpec(name="pixel_values", dtype="float32", shape=("total_patches", 12)),
        TensorSpec(name="image_grid_thw", dtype="int64", shape=("num_images", 3)),
        TensorSpec(name="image_merge_sizes", dtype="int64", shape=("num_images",)),
    )
    return ModelSpec(
        model_type="any", task="image-text-to-text", task_family="image-text-to-text", architecture="Any",
        inputs=inputs, outputs=(), axis_ranges={"total_patches": (4, None), "num_images": (1, None)},
        sizes={"total_patches": 96, "num_images": 3}, preprocessor=None, parameters=None,
        values={"image_grid_thw": ValueRule(grid=GRID)} | values,
    )  # fmt: skip


def test_an_encoder_of_many_becomes_one_of_one() -> None:
    single = of_one_image(encoder())
    assert single is not None
    assert [tensor.shape for tensor in single.inputs] == [("total_patches", 12), (1, 3), (1,)]
    assert (set(single.axis_ranges), set(single.sizes)) == ({"total_patches"}, {"total_patches"})
    assert of_one_image(single) is None


def test_one_without_grids_stays_as_it_is() -> None:
    assert of_one_image(encoder(image_grid_thw=ValueRule())) is None


def test_each_image_has_its_patches_and_its_row() -> None:
    feed = {
        "pixel_values": np.arange(12).reshape(12, 1),
        "image_grid_thw": np.array([[1, 2, 2], [2, 2, 2]]),
        "image_merge_sizes": np.array([1, 2]),
    }
    first, second = image_by_image(feed)
    assert first["pixel_values"][:, 0].tolist() == [0, 1, 2, 3]
    assert second["pixel_values"][:, 0].tolist() == list(range(4, 12))
    assert (second["image_grid_thw"].tolist(), second["image_merge_sizes"].tolist()) == ([[2, 2, 2]], [2])


def summing() -> Any:
    """Return a graph that gives a feature for each block of four patches, and another one for a layer."""

    def run(feed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = feed["pixel_values"].unflatten(0, (-1, 4)).sum(1)
        return {"image_features": made, "deep.0": 2 * made}

    shapes = {"pixel_values": ("total_patches", 3), "image_grid_thw": (1, 3)}
    inputs = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    return SimpleNamespace(run=run, inputs=inputs, output_names=("image_features", "deep.0"))


def features_of(feed: dict[str, torch.Tensor]) -> Any:
    made = run_images(lambda **_: None, summing(), feed, feed)
    assert made is not None
    return _listed(made, "image_features")


def test_features_come_as_a_list_of_those_of_each_image() -> None:
    feed = {"pixel_values": torch.ones(12, 3), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]])}
    features = features_of(feed)
    assert [len(part) for part in features.pooler_output] == [1, 2]
    assert [[len(part) for part in layer] for layer in features["deep"]] == [[1, 2]]
    assert features["deep"][0][1][0, 0] == 8


@pytest.mark.parametrize("rows", [[[1, 2, 2]], [[1, 2, 2], [1, 2, 8]], []])
def test_grids_of_other_patches_are_refused(rows: list[list[int]]) -> None:
    feed = {"pixel_values": torch.ones(12, 3), "image_grid_thw": torch.tensor(rows).reshape(-1, 3)}
    if rows and sum(h * w for _, h, w in rows) > 12:
        feed["pixel_values"] = torch.ones(24, 3)
    with pytest.raises(InputError, match="other patches than the"):
        features_of(feed)

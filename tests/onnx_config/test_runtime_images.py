"""What a graph of images is handed: ones where they are missing, images at their own size, nothing it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from onnx_config.errors import InputError
from onnx_config.runtime.graph_session import GraphSession
from onnx_config.runtime.images import images_for, run_images


def graph(tmp_path: Path, inputs: dict[str, tuple[int, list[Any]]]) -> GraphSession:
    """Return a graph that gives the pixels of its images, one to a row of features."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    out = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["count", 1])
    shape = helper.make_tensor("flat", TensorProto.INT64, [2], [-1, 1])
    node = helper.make_node("Reshape", ["pixel_values", "flat"], ["image_features"])
    made = helper.make_model(
        helper.make_graph([node], "images", given, [out], [shape]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    path = tmp_path / "images.onnx"
    onnx.save(made, path)
    return GraphSession(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), torch.device("cpu"))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the class is not asked")


TILES = {
    "pixel_values": (TensorProto.FLOAT, ["rows", "tiles", 1, 2, 2]),
    "pixel_attention_mask": (TensorProto.BOOL, ["rows", "tiles", 2, 2]),
}
GRIDS = {
    "pixel_values": (TensorProto.FLOAT, ["patches", 2]),
    "image_grid_thw": (TensorProto.INT64, [1, 3]),
}
ALONE = {"pixel_values": (TensorProto.FLOAT, [1, 1, "height", "width"])}


def test_a_mask_that_is_not_given_is_all_ones(tmp_path: Path) -> None:
    pixels = torch.ones(2, 3, 1, 2, 2)
    feed = images_for(graph(tmp_path, TILES), {"pixel_values": pixels, "pixel_attention_mask": None})
    assert feed["pixel_attention_mask"].shape == (2, 3, 2, 2)
    assert feed["pixel_attention_mask"].all()


@pytest.mark.parametrize(
    ("value", "known"),
    [
        pytest.param(torch.tensor([1, 1]), True, id="all-ones-change-nothing"),
        pytest.param(torch.tensor([2]), False, id="others-would"),
    ],
)
def test_what_the_graph_does_not_know_is_refused(tmp_path: Path, value: torch.Tensor, known: bool) -> None:
    given = {"pixel_values": torch.ones(2, 1, 1, 2, 2), "batch_num_images": value}
    if known:
        assert "batch_num_images" not in images_for(graph(tmp_path, TILES), given)
        return
    with pytest.raises(InputError, match="came with batch_num_images"):
        images_for(graph(tmp_path, TILES), given)


def test_features_of_a_row_stay_together(tmp_path: Path) -> None:
    pixels = torch.arange(1.0, 25).reshape(2, 3, 1, 2, 2)
    pixels[1, 2] = 0
    feed = images_for(graph(tmp_path, TILES), {"pixel_values": pixels})
    # As a graph would that leaves out what is all zeros.
    session = graph(tmp_path, TILES)
    session.run = lambda _: {"image_features": pixels.flatten()[:20, None]}  # type: ignore[method-assign]  # a stand-in
    found = run_images(refuse, session, feed, {})
    assert found is not None
    assert [len(part) for part in found["image_features"]] == [12, 8]


def test_each_image_is_read_at_its_own_size(tmp_path: Path) -> None:
    pixels = torch.arange(24.0).reshape(2, 1, 3, 4)
    given = {"pixel_values": pixels, "image_sizes": torch.tensor([[3, 2], [1, 4]])}
    session = graph(tmp_path, ALONE)
    found = run_images(refuse, session, images_for(session, given), given)
    assert found is not None
    assert [part.flatten().tolist() for part in found["image_features"]] == [[0, 1, 4, 5, 8, 9], [12, 13, 14, 15]]
    given["image_sizes"] = torch.tensor([[4, 2], [1, 4]])
    with pytest.raises(InputError, match="Image 1 is said to be 4 by 2 pixels"):
        run_images(refuse, session, images_for(session, given), given)


def test_each_image_is_read_with_the_patches_of_its_grid(tmp_path: Path) -> None:
    feed = {"pixel_values": torch.arange(12.0).reshape(6, 2), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2]])}
    session = graph(tmp_path, GRIDS)
    found = run_images(refuse, session, feed, feed)
    assert found is not None
    assert [part.flatten().tolist() for part in found["image_features"]] == [[*range(8)], [*range(8, 12)]]
    with pytest.raises(InputError, match="other patches than the 6 that there are"):
        run_images(refuse, session, {**feed, "image_grid_thw": feed["image_grid_thw"][:1]}, feed)


def test_images_side_by_side_are_read_together(tmp_path: Path) -> None:
    side_by_side = {"pixel_values": (TensorProto.FLOAT, ["images", 1, 2, 2])}
    pixels = torch.ones(2, 1, 2, 2)
    assert run_images(refuse, graph(tmp_path, side_by_side), {"pixel_values": pixels}, {}) is None

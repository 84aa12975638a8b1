"""Models that are told how the patches of images lie: dummy inputs that agree, graphs for every grid."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import vision_utils

from onnx_config.config_sizes import modality_of
from onnx_config.export.grids import grids_in_tensors
from onnx_config.export.patch_grids import Patches, boundaries, resampled_table, same_part
from onnx_config.export.trace import trace_model
from onnx_config.grid_values import grid_rows, room_for_grids
from onnx_config.spec import GridRule, TensorSpec, ValueRule
from onnx_config.universal_config import UniversalOnnxConfig

GRIDS = [
    pytest.param([[1, 2, 2]], id="one-block"),
    pytest.param([[1, 4, 8], [2, 6, 4]], id="an-image-and-a-video"),
    pytest.param([[3, 10, 12], [1, 2, 2], [1, 14, 18]], id="larger-than-windows"),
]

PACKED = GridRule(patches="total_patches", step=2, frames=True)


@pytest.mark.parametrize(("images", "patches"), [(1, 4), (1, 44), (2, 96), (3, 12), (5, 100), (7, 28)])
def test_grids_name_the_patches_that_there_are(images: int, patches: int) -> None:
    rows = grid_rows(PACKED, images, 3, {"total_patches": patches})
    assert rows.prod(axis=-1).sum() == patches
    assert not (rows[:, 1:] % 2).any()


def test_each_image_has_room_for_its_patches() -> None:
    rule = GridRule(patches="max_num_patches", packed=False)
    rows = grid_rows(rule, 4, 2, {"max_num_patches": 13})
    assert rows.shape == (4, 2)
    assert rows.prod(axis=-1).tolist() == [13, 10, 12, 13]


def test_room_is_made_for_the_grids_of_all_images() -> None:
    inputs = [TensorSpec(name="grid_thw", dtype="int64", shape=("num_images", 3))]
    rules = {"grid_thw": ValueRule(grid=PACKED)}
    assert room_for_grids(inputs, rules, {"num_images": 5, "total_patches": 7})["total_patches"] == 20
    assert room_for_grids(inputs, rules, {"num_images": 1, "total_patches": 47})["total_patches"] == 44


@pytest.mark.parametrize("rule", [ValueRule(grid=PACKED), ValueRule(choices=(1, 2)), ValueRule(below=3)])
def test_a_rule_survives_json(rule: ValueRule) -> None:
    assert ValueRule.from_json(rule.to_json()) == rule


@pytest.mark.parametrize("name", ["grid_thw", "spatial_shapes", "merge_sizes", "image_sizes"])
def test_what_tells_of_images_is_of_images(name: str) -> None:
    assert modality_of(name) == "image"


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("rows", GRIDS)
def test_positions_are_those_of_transformers(rows: list[list[int]], merge: int) -> None:
    from transformers import vision_utils

    grid = torch.tensor(rows)
    patches = Patches(grid, int(grid.prod(-1).sum()), merge)
    found = torch.stack([patches.frame, patches.row, patches.column], dim=-1)
    assert torch.equal(found, vision_utils.get_vision_position_ids(grid, merge, include_temporal=True))
    ends = vision_utils.get_vision_cu_seqlens(grid)
    assert boundaries(patches.frame_number)[: len(ends)].tolist() == ends.tolist()
    assert bool(patches.fits)


@pytest.mark.parametrize("rows", GRIDS)
def test_windows_and_tables_are_those_of_transformers(rows: list[list[int]]) -> None:
    from transformers import vision_utils

    grid = torch.tensor(rows)
    order, ends = vision_utils.get_vision_window_index(grid, 2, 56, 14)
    table = vision_utils.get_vision_interpolation_indices_and_weights(grid, 6, "bicubic", spatial_merge_size=2)
    with grids_in_tensors(torch.nn.Identity()) as grids:
        grids.counts.append(int(grid.prod(-1).sum()))
        own_order, own_ends = vision_utils.get_vision_window_index(grid, 2, 56, 14)
        own = vision_utils.get_vision_interpolation_indices_and_weights(grid, 6, "bicubic", spatial_merge_size=2)
    assert torch.equal(own_order, order)
    assert own_ends[: len(ends)].tolist() == ends.tolist()
    assert torch.equal(own[0], table[0])
    torch.testing.assert_close(own[1], table[1])


@pytest.mark.parametrize(
    ("rows", "count", "merge"),
    [([[1, 4, 6]], 32, 2), ([[1, 3, 4]], 12, 2), ([[1, 4, 4], [1, 2, 2]], 16, 2)],
    ids=["too-few", "half-a-block", "too-many"],
)
def test_a_grid_that_does_not_fit_is_seen(rows: list[list[int]], count: int, merge: int) -> None:
    assert not bool(Patches(torch.tensor(rows), count, merge).fits)


@pytest.mark.parametrize("size", [(3, 5), (6, 6), (11, 4), (1, 1), (16, 13)])
def test_a_table_is_resampled_as_in_torch(size: tuple[int, int]) -> None:
    table = torch.randn(6, 6, 5, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(
        table.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False, antialias=True
    )
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    found = resampled_table(table, rows, columns, torch.tensor(size).expand(*size, 2))
    torch.testing.assert_close(found, want[0].permute(1, 2, 0), atol=1e-5, rtol=1e-5)


def test_blocks_are_averaged_as_in_transformers() -> None:
    from transformers import VideoLlama3VisionConfig, VideoLlama3VisionModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = VideoLlama3VisionModel(VideoLlama3VisionConfig(**sizes)).eval()
    grid, merge = torch.tensor([[1, 6, 12], [2, 4, 8], [1, 3, 5], [1, 8, 8]]), torch.tensor([3, 2, 1, 4])
    hidden = torch.randn(int(grid.prod(-1).sum()), 8, generator=torch.Generator().manual_seed(0))
    want = model.pixel_unshuffle(hidden, grid, merge)
    with grids_in_tensors(model):
        found = model.pixel_unshuffle(hidden, grid, merge)
    torch.testing.assert_close(found, want)


def test_members_of_one_part_see_one_another() -> None:
    assert same_part(torch.tensor([2, 0, 1]), 3).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def _siglip2() -> Any:
    from transformers import Siglip2VisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Siglip2VisionConfig(**sizes, patch_size=2, num_patches=16, architectures=["Siglip2VisionModel"])


def _qwen() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "depth": 2, "num_heads": 2, "out_hidden_size": 8}
    name = "Qwen2_5_VisionTransformerPretrainedModel"
    return Qwen2_5_VLVisionConfig(
        **sizes, patch_size=4, window_size=16, fullatt_block_indexes=[1], architectures=[name]
    )


def test_patches_of_each_image_with_room_to_spare() -> None:
    found = UniversalOnnxConfig(_siglip2())
    shapes = {spec.name: spec.shape for spec in found.inference.inputs}
    assert shapes == {
        "pixel_values": ("batch_size", "max_num_patches", 12),
        "pixel_attention_mask": ("batch_size", "max_num_patches"),
        "spatial_shapes": ("batch_size", 2),
    }
    inputs = found.generate_dummy_inputs(batch_size=3, framework="np", max_num_patches=17)
    assert inputs["pixel_attention_mask"].sum(axis=-1).tolist() == inputs["spatial_shapes"].prod(axis=-1).tolist()


def test_patches_of_all_images_one_after_another() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = _qwen()
    found = UniversalOnnxConfig.from_model(Qwen2_5_VisionTransformerPretrainedModel(config))
    shapes = {spec.name: spec.shape for spec in found.inference.inputs}
    assert shapes == {"hidden_states": ("total_patches", 96), "grid_thw": ("num_images_or_videos", 3)}
    inputs = found.generate_dummy_inputs(framework="np", num_images_or_videos=5, total_patches=101)
    assert inputs["grid_thw"].prod(axis=-1).sum() == len(inputs["hidden_states"]) == 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_graph_takes_every_grid_and_refuses_one_that_does_not_fit(tmp_path: Path) -> None:
    import onnxruntime
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    model = Qwen2_5_VisionTransformerPretrainedModel(_qwen()).eval()

    def inputs(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        grid = torch.tensor(rows)
        return {"hidden_states": torch.randn(int(grid.prod(-1).sum()), 96), "grid_thw": grid}

    trace = trace_model(
        model,
        inputs([[1, 4, 8], [2, 6, 4]]),
        [
            TensorSpec(name="hidden_states", dtype="float32", shape=("total_patches", 96)),
            TensorSpec(name="grid_thw", dtype="int64", shape=("num_images", 3)),
        ],
        ["pooler_output"],
        axis_ranges={"total_patches": (4, None), "num_images": (1, None)},
        opset=20,
        flags={},
    )
    path = tmp_path / "model.onnx"
    onnx_ir.save(trace.model, path)
    session = onnxruntime.InferenceSession(path)
    for rows in ([[1, 2, 2]], [[3, 10, 12], [1, 2, 2], [1, 14, 18]], [[1, 6, 8]]):
        given = inputs(rows)
        with torch.no_grad():
            want = model(**given).pooler_output
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        np.testing.assert_allclose(found, want.numpy(), atol=1e-5)
    other = {**inputs([[1, 4, 8]]), "grid_thw": torch.tensor([[1, 4, 6]])}
    with pytest.raises(Exception, match="the_grid_of_the_images_is_taken_to_name_the_patches_that_there_are"):
        session.run(None, {name: tensor.numpy() for name, tensor in other.items()})


def test_what_is_imported_meanwhile_keeps_its_own_functions() -> None:
    name = "transformers.models.qwen2_vl.modeling_qwen2_vl"
    importlib.import_module("transformers.models.qwen2_vl")
    there = sys.modules.pop(name, None)
    try:
        with grids_in_tensors(torch.nn.Linear(1, 1)):
            module = importlib.import_module(name)
            assert module.get_vision_position_ids.__module__ == "onnx_config.export.grids"
        assert module.get_vision_position_ids is vision_utils.get_vision_position_ids
        assert module.get_vision_position_ids.__module__ == "transformers.vision_utils"
    finally:
        sys.modules.pop(name, None)
        if there is not None:
            sys.modules[name] = there

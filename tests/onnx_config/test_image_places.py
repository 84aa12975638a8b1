"""Dummy texts agree with the grids of their images: each image has its tokens, in the order of the grids."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from onnx_config.image_places import mark_places, places_needed, put_places
from onnx_config.input_generator import with_room
from onnx_config.spec import GridRule, PlacesRule, TensorSpec, ValueRule

TOKEN = 7
INPUTS = (
    TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),
    TensorSpec(name="pixel_values", dtype="float32", shape=("total_patches", 12)),
    TensorSpec(name="image_grid_thw", dtype="int64", shape=("num_images", 3)),
)
RULES = {
    "input_ids": ValueRule(places=PlacesRule(token=TOKEN, grid="image_grid_thw")),
    "image_grid_thw": ValueRule(grid=GridRule(patches="total_patches", step=2)),
    "mm_token_type_ids": ValueRule(marks=True),
}


def placed(grid: list[list[int]], texts: int, length: int) -> np.ndarray:
    arrays = {"input_ids": np.full((texts, length), 30), "image_grid_thw": np.array(grid)}
    put_places(RULES, arrays)
    return arrays["input_ids"]


def runs(row: np.ndarray) -> list[int]:
    return [len(list(group)) for token, group in groupby(row.tolist()) if token == TOKEN]


@pytest.mark.parametrize(
    ("grid", "texts", "expected"),
    [
        pytest.param([[1, 4, 4]], 1, [[4]], id="one"),
        pytest.param([[1, 4, 4], [1, 2, 6]], 2, [[4], [3]], id="one-for-each-text"),
        pytest.param([[1, 4, 4], [1, 2, 2], [2, 2, 4]], 2, [[4, 1], [4]], id="two-in-one-text-do-not-touch"),
        pytest.param([[1, 4, 4]], 3, [[4], [], []], id="texts-without-an-image"),
    ],
)
def test_each_image_has_a_token_for_each_of_its_blocks(
    grid: list[list[int]], texts: int, expected: list[list[int]]
) -> None:
    assert [runs(row) for row in placed(grid, texts, 20)] == expected


def test_the_end_of_a_text_stays_its_end() -> None:
    row = placed([[1, 8, 8]], 1, 9)[0]
    assert (row[0], row[-1]) == (30, 30)
    assert runs(row) == [7]


def test_blocks_of_other_edges_are_counted_by_them() -> None:
    rules = {
        "input_ids": ValueRule(places=PlacesRule(token=TOKEN, grid="image_grid_thw", edges="image_merge_sizes")),
        "image_grid_thw": ValueRule(grid=GridRule(patches="total_patches", step=2)),
        "image_merge_sizes": ValueRule(choices=(1, 2)),
    }
    arrays = {
        "input_ids": np.full((2, 30), 9),
        "image_grid_thw": np.array([[1, 4, 4], [1, 4, 4]]),
        "image_merge_sizes": np.array([1, 2]),
    }
    put_places(rules, arrays)
    assert [runs(row) for row in arrays["input_ids"]] == [[16], [4]]


@pytest.mark.parametrize(("texts", "images", "patches"), [(1, 1, 4), (1, 3, 96), (2, 3, 96), (3, 2, 40), (4, 9, 36)])
def test_room_is_made_for_the_longest_text(texts: int, images: int, patches: int) -> None:
    sizes = {"batch_size": texts, "sequence_length": 2, "num_images": images, "total_patches": patches}
    room = with_room(INPUTS, RULES, sizes)
    assert room["sequence_length"] == places_needed(INPUTS, RULES, room) > 2
    assert with_room(INPUTS, RULES, {**sizes, "sequence_length": 500})["sequence_length"] == 500


def test_marks_follow_the_tokens() -> None:
    arrays = {"input_ids": np.array([[1, TOKEN, TOKEN, 3]]), "mm_token_type_ids": np.zeros((1, 4), np.int32)}
    mark_places(RULES, arrays)
    assert arrays["mm_token_type_ids"].tolist() == [[0, 1, 1, 0]]
    assert arrays["mm_token_type_ids"].dtype == np.int32


@pytest.mark.parametrize(
    "rule", [RULES["input_ids"], ValueRule(marks=True), ValueRule(places=PlacesRule(token=1, grid="g", edges="e"))]
)
def test_rules_survive_json(rule: ValueRule) -> None:
    assert ValueRule.from_json(rule.to_json()) == rule


def test_tokens_that_stand_for_something_are_told() -> None:
    assert ValueRule(tokens=((3, 2, None),)).stand_ins == (3,)
    assert RULES["input_ids"].stand_ins == (TOKEN,)

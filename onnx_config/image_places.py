"""Where tokens stand for images in dummy texts, so that they agree with the grids of the images.

A text has a token for each block of patches of its images. Which patches an image has, its row of the grids says; the
images of a batch are dealt out to the texts one after another, and an ordinary token lies between two of one text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_config.grid_values import grid_rows
from onnx_config.spec import TensorSpec, ValueRule

__all__ = ["mark_places", "places_needed", "put_places"]

_TEXT = "input_ids"


def places_needed(inputs: Sequence[TensorSpec], rules: Mapping[str, ValueRule], sizes: Mapping[str, int]) -> int:
    """Return how many tokens the longest text has at least; 0 where no grids say so.

    >>> from onnx_config.spec import GridRule, PlacesRule
    >>> rules = {
    ...     "input_ids": ValueRule(places=PlacesRule(token=9, grid="image_grid_thw")),
    ...     "image_grid_thw": ValueRule(grid=GridRule(patches="total_patches", step=2)),
    ... }
    >>> inputs = [TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),
    ...           TensorSpec(name="image_grid_thw", dtype="int64", shape=("num_images", 3))]
    >>> places_needed(inputs, rules, {"batch_size": 1, "sequence_length": 1, "num_images": 2, "total_patches": 12})
    6
    """
    shapes = {spec.name: spec for spec in inputs}
    rule = rules[_TEXT].places if _TEXT in rules and _TEXT in shapes else None
    if rule is None or rule.grid not in shapes or (grid := rules[rule.grid].grid) is None:
        return 0
    images, columns = shapes[rule.grid].resolve(sizes)
    edges = None
    if rule.edges is not None and rule.edges in rules:
        edges = np.resize(np.array(rules[rule.edges].choices), images)
    counts = _counts(grid_rows(grid, images, columns, sizes), grid.step if edges is None else edges)
    return max((1 + sum(n + 1 for n in row) for row in _dealt(counts, shapes[_TEXT].resolve(sizes)[0])), default=0)


def put_places(rules: Mapping[str, ValueRule], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write the tokens that stand for images into the text, in place; what a text is too short for is missing."""
    rule = rules[_TEXT].places if _TEXT in rules and _TEXT in arrays else None
    if rule is None or rule.grid not in arrays or (grid := rules[rule.grid].grid) is None:
        return
    edges: Any = grid.step if rule.edges is None else arrays[rule.edges]
    ids = arrays[_TEXT]
    for row, counts in zip(ids, _dealt(_counts(arrays[rule.grid], edges), len(ids)), strict=True):
        position = 1
        for count in counts:
            # The last token is the end of the text.
            row[position : min(position + count, len(row) - 1)] = rule.token
            position += count + 1


def mark_places(rules: Mapping[str, ValueRule], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Let the inputs that mark them say where tokens stand for images, in place."""
    if _TEXT not in arrays or _TEXT not in rules:
        return
    for name, rule in rules.items():
        if rule.marks and name in arrays:
            arrays[name] = np.isin(arrays[_TEXT], rules[_TEXT].stand_ins).astype(arrays[name].dtype)


def _counts(grid: npt.NDArray[Any], edges: Any) -> list[int]:
    """Return how many blocks each image has."""
    counts: list[int] = (grid.prod(axis=-1) // np.asarray(edges) ** 2).tolist()
    return counts


def _dealt(counts: Sequence[int], rows: int) -> list[list[int]]:
    """Return what each of ``rows`` texts has of the images, in their order."""
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for number, count in enumerate(counts):
        dealt[number * rows // len(counts)].append(count)
    return dealt

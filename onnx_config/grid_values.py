"""Values of inputs that say how many rows and columns of patches images have, so that they agree with the patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_config.spec import GridRule, TensorSpec, ValueRule, size_of

__all__ = ["grid_rows", "room_for_grids", "shown_patches"]

_WITH_FRAMES = 3
_SHARES = (1, 3, 2)
"""Of the patches that there are, one after another: images are of different sizes."""


def grid_rows(rule: GridRule, images: int, columns: int, sizes: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Return rows and columns of patches of each image, frames first where there are three ``columns``.

    Together they name the patches that there are, where these are enough and a multiple of the square of the step.

    >>> grid_rows(GridRule(patches="num_patches", step=2), 3, 3, {"num_patches": 96}).tolist()
    [[1, 4, 4], [1, 10, 4], [1, 4, 10]]
    """
    blocks = size_of(rule.patches, sizes) // rule.step**2
    rows = []
    for number, share in enumerate(_shares(blocks, images) if rule.packed else _rooms(blocks, images)):
        many = rule.frames and columns == _WITH_FRAMES and number % 2 and share % 2 == 0
        frames = 2 if many else 1
        rows.append([frames, *(rule.step * edge for edge in _edges(share // frames, number))])
    return np.array(rows, np.int64).reshape(images, _WITH_FRAMES)[:, -columns:]


def _shares(blocks: int, images: int) -> list[int]:
    """Return how many of ``blocks`` each image has; one at least, so that they may be more together.

    Every other image has an even number, which may be two frames.
    """
    weights = [_SHARES[number % len(_SHARES)] for number in range(images)]
    free = max(0, blocks - images)
    shares = [1 + free * weight // sum(weights) for weight in weights]
    shares = [share - share % 2 if number % 2 and share > 1 else share for number, share in enumerate(shares)]
    shares[-1] += max(0, blocks - sum(shares))
    return shares


def _rooms(blocks: int, images: int) -> list[int]:
    return [max(1, blocks - (0, 3, 1)[number % len(_SHARES)]) for number in range(images)]


def _edges(blocks: int, number: int) -> tuple[int, int]:
    """Return how many blocks lie below and beside one another, as near to a square as can be; now wide, now high."""
    short = next(edge for edge in range(isqrt(blocks), 0, -1) if blocks % edge == 0)
    return (short, blocks // short) if number % 2 == 0 else (blocks // short, short)


def room_for_grids(
    inputs: Sequence[TensorSpec], rules: Mapping[str, ValueRule], sizes: Mapping[str, int]
) -> dict[str, int]:
    """Return ``sizes`` with as many patches as the images have at least, and no part of a block."""
    room = dict(sizes)
    for spec in inputs:
        grid = rules[spec.name].grid if spec.name in rules else None
        if grid is not None and isinstance(grid.patches, str) and grid.patches in room:
            unit = grid.step**2
            whole = room[grid.patches] // unit * unit
            room[grid.patches] = max(whole, grid.least(spec.resolve(sizes)[0]))
    return room


def shown_patches(
    inputs: Sequence[TensorSpec], rules: Mapping[str, ValueRule], arrays: dict[str, npt.NDArray[Any]]
) -> None:
    """Let masks over patches show those that the images have, in place."""
    for spec in inputs:
        grid = rules[spec.name].grid if spec.name in rules else None
        if grid is None or grid.packed:
            continue
        counts = arrays[spec.name].prod(axis=-1)
        for mask in inputs:
            if mask.name.endswith("mask") and mask.shape[-1:] == (grid.patches,) and len(mask.shape) > 1:
                shown = np.arange(arrays[mask.name].shape[-1])[None, :] < counts[:, None]
                arrays[mask.name] = shown.astype(arrays[mask.name].dtype)

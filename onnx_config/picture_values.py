"""Values of inputs that tell of pictures cut into tiles: how large they were, and which rows they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_config.spec import PictureRule, size_of

__all__ = ["blanked", "picture_sizes", "shares"]


def picture_sizes(rule: PictureRule, rows: int, sizes: Mapping[str, int], *, first: int) -> npt.NDArray[np.int64]:
    """Return height and width of so many pictures, none of which becomes more tiles than there are.

    The first picture becomes as many tiles as can be, so that none of them goes without; the others are any.

    Args:
        rule: Which sizes there are.
        rows: How many pictures.
        sizes: Dynamic axis -> size.
        first: A number by which other pictures come first.

    >>> rule = PictureRule(sizes=((8, 8, 2), (8, 16, 3), (16, 16, 5)), tiles="num_tiles")
    >>> picture_sizes(rule, 3, {"num_tiles": 4}, first=0).tolist()
    [[8, 16], [8, 16], [8, 8]]
    """
    room = max(size_of(rule.tiles, sizes), min(tiles for _, _, tiles in rule.sizes))
    fitting = [(height, width, tiles) for height, width, tiles in rule.sizes if tiles <= room]
    most = max(tiles for _, _, tiles in fitting)
    largest = [picture for picture in fitting if picture[2] == most]
    chosen = [largest[first % len(largest)], *(fitting[(first + at) % len(fitting)] for at in range(1, rows))]
    return np.array([picture[:2] for picture in chosen[:rows]], np.int64).reshape(rows, 2)


def shares(count: int, rows: int) -> npt.NDArray[np.int64]:
    """Return how many of ``count`` members belong to each of so many rows: as many to each, and the rest to the first.

    >>> shares(5, 3).tolist(), shares(2, 3).tolist()
    ([2, 2, 1], [1, 1, 0])
    """
    each, left = divmod(count, max(1, rows))
    return np.array([each + (row < left) for row in range(rows)], np.int64)


def blanked(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return members (rows, members, …), the last one all zeros in every other row that has more than one."""
    filled = values.copy()
    if filled.ndim > 1 and filled.shape[1] > 1:
        filled[1::2, -1] = 0
    return filled

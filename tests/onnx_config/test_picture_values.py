"""Values that tell of pictures cut into tiles agree with the tiles that there are."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_config.picture_values import blanked, picture_sizes, shares
from onnx_config.spec import PictureRule

RULE = PictureRule(sizes=((8, 8, 2), (8, 16, 3), (16, 16, 5), (7, 9, 3)), tiles="num_tiles")


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize(("tiles", "allowed"), [(1, {2}), (2, {2}), (4, {2, 3}), (9, {2, 3, 5})])
def test_no_picture_becomes_more_tiles_than_there_are(tiles: int, allowed: set[int], first: int) -> None:
    counts = {(height, width): count for height, width, count in RULE.sizes}
    found = picture_sizes(RULE, 4, {"num_tiles": tiles}, first=first)
    assert {counts[height, width] for height, width in found.tolist()} <= allowed
    # As many as there are, so that all tiles are read.
    assert counts[tuple(found[0].tolist())] == max(allowed)


def test_other_pictures_come_first_by_a_number() -> None:
    sizes = {"num_tiles": 5}
    found = {tuple(map(tuple, picture_sizes(RULE, 3, sizes, first=first).tolist())) for first in range(4)}
    assert len(found) > 2


@pytest.mark.parametrize(("count", "rows"), [(3, 3), (5, 2), (2, 4), (0, 2)])
def test_shares_are_all_there_is(count: int, rows: int) -> None:
    found = shares(count, rows)
    assert (found.sum(), len(found), int(found.min() >= 0)) == (count, rows, 1)


def test_blanks_are_the_last_of_every_other_row() -> None:
    filled = blanked(np.ones((3, 2, 4)))
    assert filled.sum(axis=-1).tolist() == [[4, 4], [4, 0], [4, 4]]
    # Of one alone there would be nothing left.
    assert blanked(np.ones((3, 1, 4))).all()

"""What a model makes of the features of a picture's tiles, computed with tensors alone, for pictures of every size.

A picture of any size is brought to the one of several resolutions that suits it best, padded, and cut into tiles; one
more tile is all of it, made small. The features of the tiles are put together again as they lie in the picture, those
of the padding are cut off, a row of them ends with an embedding of its own, and where they are too many they are made
fewer. PyTorch does so picture by picture in Python. Here a graph works out, for each of the features that come out,
which of those that went in it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onnx_config.export.patch_grids import numbered_by, quotient

__all__ = ["Packing", "best_resolutions", "packed"]

_FEWER_FROM = 1.1
"""How many times as many as there may be a side has to have before features are made fewer, as PyTorch has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How tiles lie in pictures."""

    resolutions: tuple[tuple[int, int], ...]
    """Height and width in pixels of what pictures are brought to."""

    tile: int
    """Edge of a tile in pixels."""

    side: int
    """Edge of a tile in features."""

    most: int | None = None
    """How many tiles' features are kept as they are; ``None``: any number."""

    @property
    def longest(self) -> int:
        """How many features come of one picture at most."""
        grids = [
            (height // self.tile * self.side, width // self.tile * self.side) for height, width in self.resolutions
        ]
        return self.side**2 + max(height * (width + 1) for height, width in grids)


def best_resolutions(sizes: torch.Tensor, resolutions: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return which of ``resolutions`` suits each picture best: the most of it is left, and the least is wasted.

    Args:
        sizes: (pictures, 2): height and width of each.
        resolutions: What there is; of equals, the first.

    Returns:
        (pictures, 2).

    >>> best_resolutions(torch.tensor([[10, 40], [30, 30]]), [(16, 16), (16, 32), (32, 16)]).tolist()
    [[16, 32], [16, 16]]
    """
    table = torch.tensor(resolutions, dtype=torch.int64, device=sizes.device)
    # In the very numbers that Python reckons with, which round a few sizes down by one.
    original = sizes.double()
    ratios = table.double()[None] / original[:, None]
    scale = torch.minimum(ratios[..., 1], ratios[..., 0])
    fitted = (original[:, None] * scale[..., None]).long()
    left = torch.minimum(fitted[..., 0] * fitted[..., 1], (sizes[:, 0] * sizes[:, 1])[:, None])
    whole = (table[:, 0] * table[:, 1])[None].expand_as(left)
    best = left == left.amax(dim=1, keepdim=True)
    least = torch.where(best, whole, whole.max() + 1).amin(dim=1, keepdim=True)
    index = torch.arange(len(resolutions), device=sizes.device)[None]
    first = torch.where(best & (whole == least), index, len(resolutions)).amin(dim=1)
    return table[first]


def packed(
    features: torch.Tensor,
    sizes: torch.Tensor,
    packing: Packing,
    *,
    tiles: Any,
    newline: torch.Tensor | None,
    shares: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of pictures, one picture after another (count, width), and whether the tiles are all there.

    Args:
        features: (pictures * tiles, features of a tile, width): those of the tiles; the first tile of a picture is all
            of it made small, the last ones may be none of its.
        sizes: (pictures, 2): height and width of each picture in pixels.
        packing: How the tiles lie in it.
        tiles: How many tiles there are of each picture, a size that may be a symbol.
        newline: (width,): what ends a row; ``None``: nothing does.
        shares: How many of the pictures belong together each time; of those that do, the first tile is all that
            counts. ``None``: each is for itself.
    """
    side, base = packing.side, packing.side**2
    sizes = sizes.long()
    best = best_resolutions(sizes, packing.resolutions)
    high, wide = quotient(best[:, 0], packing.tile), quotient(best[:, 1], packing.tile)
    top, left, rows, columns = _without_padding(sizes, high * side, wide * side)
    down, along = (rows, columns) if packing.most is None else _fewer(rows, columns, packing.most * base)
    needed = high * wide + 1
    fits = torch.tensor(True)
    if shares is not None:
        fits = shares.sum() == sizes.shape[0]
        alone = shares[numbered_by(shares.cumsum(0), torch.arange(sizes.shape[0], device=sizes.device))] == 1
        down, along = torch.where(alone, down, 1), torch.where(alone, along, 0)
        needed = torch.where(alone, needed, 1)
    fits = fits & (needed <= tiles).all()
    in_row = along + (0 if newline is None else 1)
    count = base + down * in_row
    # Which features there are, of as many as there might be.
    place = torch.arange(packing.longest, device=sizes.device)
    index = (place[None] < count[:, None]).flatten().nonzero().squeeze(1)
    picture = quotient(index, packing.longest)
    at = index - picture * packing.longest
    first = picture * tiles * base
    within = (at - base).clamp(min=0)
    row = quotient(within, in_row[picture].clamp(min=1))
    column = within - row * in_row[picture]
    whole = at < base
    ends = ~whole & (column == along[picture])
    column = torch.where(ends, 0, column)
    flat = features.flatten(0, 1)

    def of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, x = y + top[picture], x + left[picture]
        tile = 1 + quotient(y, side) * wide[picture] + quotient(x, side)
        found = first + tile * base + y % side * side + x % side
        # Where tiles are missing, it is said so: what is put together then is anything.
        return flat[torch.where(fits, torch.where(whole, first + at, torch.where(ends, first, found)), 0)]

    if packing.most is None:
        made = of(row, column)
    else:
        made = _between(of, row, column, rows=(rows, down), columns=(columns, along), picture=picture)
    return made if newline is None else torch.where(ends[:, None], newline[None].to(made.dtype), made), fits


def _without_padding(sizes: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return where pictures begin in what they were brought to, and how high and wide they are there.

    As PyTorch has it, in whole numbers: what it rounds to seven places and then down is a fraction of whole numbers.
    """
    original_height, original_width = sizes[:, 0], sizes[:, 1]
    is_wider = original_width * height > width * original_height
    over = height - quotient(original_height * width, original_width)
    beside = width - quotient(original_width * height, original_height)
    top = torch.where(is_wider, quotient(over, 2), 0)
    left = torch.where(is_wider, 0, quotient(beside, 2))
    return top, left, height - 2 * top, width - 2 * left


def _fewer(rows: torch.Tensor, columns: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many rows and columns are left of each picture's."""
    ratio = ((rows * columns).double() / most).sqrt()
    are_fewer = ratio > _FEWER_FROM

    def divided(number: torch.Tensor) -> torch.Tensor:
        # As Python divides fractions and rounds down, which the quotient rounded down is not always.
        exact = number.double()
        return ((exact - torch.fmod(exact, ratio)) / ratio).round().long()

    return torch.where(are_fewer, divided(rows), rows), torch.where(are_fewer, divided(columns), columns)


def _between(
    of: Any,
    row: torch.Tensor,
    column: torch.Tensor,
    *,
    rows: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[torch.Tensor, torch.Tensor],
    picture: torch.Tensor,
) -> torch.Tensor:
    """Return what bilinear interpolation makes of the features ``of`` rows and columns, at one place for each."""
    (upper, lower, down), (before, after, along) = (
        _taps(at, before[picture], now[picture]) for at, (before, now) in ((row, rows), (column, columns))
    )
    above = of(upper, before) * (1 - along)[:, None] + of(upper, after) * along[:, None]
    below = of(lower, before) * (1 - along)[:, None] + of(lower, after) * along[:, None]
    made: torch.Tensor = above * (1 - down)[:, None] + below * down[:, None]
    return made


def _taps(at: torch.Tensor, size: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return between which two of ``size`` numbers the one at a place of those ``made`` lies, and how far."""
    scale = size.float() / made.float().clamp(min=1.0)
    source = (scale * (at.float() + 0.5) - 0.5).clamp(min=0.0)
    first = torch.minimum(source.long(), (size - 1).clamp(min=0))
    second = torch.minimum(first + 1, (size - 1).clamp(min=0))
    return first, second, source - first.float()

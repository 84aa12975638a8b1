"""What follows from the grids of images, computed with tensors alone, so that a graph computes it for every grid.

Vision encoders that read images of any size are given the patches of all of them, one after another, and a row of whole
numbers for each image: frames, rows of patches, patches in a row. Where a patch stands, and which others it attends
to, PyTorch works out image by image in Python. Here the same is worked out for all patches at once. There are as many
as the encoder was given, a size that a graph has anyway, so that none depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

__all__ = ["Patches", "boundaries", "numbered_by", "quotient", "resampled_table", "same_part"]


@dataclass(frozen=True)
class Patches:
    """The patches of images, which lie one after another by their grids."""

    grid: torch.Tensor
    """(images, 3): frames, rows, columns of each image."""

    count: Any
    """How many patches there are together, a size that may be a symbol."""

    merge: Any = 1
    """Edge of the blocks that neighbouring patches come in, one after another: a number, or (images,)."""

    @cached_property
    def index(self) -> torch.Tensor:
        """(patches,): their numbers."""
        return torch.arange(self.count, device=self.grid.device)

    @cached_property
    def _sizes(self) -> torch.Tensor:
        return self.grid.prod(dim=-1)

    @cached_property
    def image(self) -> torch.Tensor:
        """(patches,): the image of each."""
        # A grid that names fewer patches than there are is refused elsewhere.
        return numbered_by(self._sizes.cumsum(0), self.index).clamp(max=self.grid.shape[0] - 1)

    def of_image(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each patch the value of its image, of values (images,)."""
        return values[self.image]

    @cached_property
    def height(self) -> torch.Tensor:
        """(patches,): rows of each one's image."""
        return self.of_image(self.grid[:, 1])

    @cached_property
    def width(self) -> torch.Tensor:
        """(patches,): columns of each one's image."""
        return self.of_image(self.grid[:, 2])

    @cached_property
    def within_image(self) -> torch.Tensor:
        """(patches,): their numbers within their images."""
        return self.index - self.of_image(self._sizes.cumsum(0) - self._sizes)

    @cached_property
    def frame(self) -> torch.Tensor:
        """(patches,): the frame within its image."""
        return quotient(self.within_image, self.height * self.width)

    @cached_property
    def within_frame(self) -> torch.Tensor:
        """(patches,): their numbers within their frames."""
        return self.within_image - self.frame * self.height * self.width

    @cached_property
    def edge(self) -> Any:
        """The edge of each one's block, as a number or (patches,)."""
        return self.of_image(self.merge) if isinstance(self.merge, torch.Tensor) else self.merge

    @cached_property
    def _in_block(self) -> tuple[torch.Tensor, torch.Tensor]:
        edge = self.edge
        return quotient(self.within_frame, edge) % edge, self.within_frame % edge

    @cached_property
    def row(self) -> torch.Tensor:
        """(patches,): the row of each within its frame."""
        edge = self.edge
        block = quotient(quotient(self.within_frame, edge * edge), quotient(self.width, edge))
        row: torch.Tensor = block * edge + self._in_block[0]
        return row

    @cached_property
    def column(self) -> torch.Tensor:
        """(patches,): the column of each within its frame."""
        edge = self.edge
        block = quotient(self.within_frame, edge * edge) % quotient(self.width, edge)
        column: torch.Tensor = block * edge + self._in_block[1]
        return column

    @cached_property
    def frame_number(self) -> torch.Tensor:
        """(patches,): the number of each one's frame among those of all images."""
        return (self.within_frame == 0).long().cumsum(0) - 1

    @property
    def fits(self) -> torch.Tensor:
        """Whether the grids name as many patches as there are, in whole blocks."""
        edge = self.merge[:, None] if isinstance(self.merge, torch.Tensor) else self.merge
        whole = (self.grid[:, 1:] % edge == 0).all()
        fits: torch.Tensor = (self._sizes.sum() == self.count) & whole
        return fits


def quotient(number: torch.Tensor, by: Any) -> torch.Tensor:
    """Return how often ``by`` goes into numbers that are not negative; to round down for any takes many more nodes."""
    return torch.div(number, by, rounding_mode="trunc")


def numbered_by(ends: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the number of the part that each index lies in, of parts that end before ``ends``.

    >>> numbered_by(torch.tensor([2, 5]), torch.arange(5)).tolist()
    [0, 0, 1, 1, 1]
    """
    return (index[:, None] >= ends[None, :]).long().sum(dim=1)


def boundaries(numbers: torch.Tensor) -> torch.Tensor:
    """Return where parts begin, given the number of the part of each (count,); (count + 1,), the last ones at the end.

    There may be as many parts as there are members; where there are fewer, the others are empty.

    >>> boundaries(torch.tensor([0, 0, 1, 1, 1])).tolist()
    [0, 2, 5, 5, 5, 5]
    """
    parts = torch.arange(numbers.shape[0] + 1, device=numbers.device)
    return (numbers[None, :] < parts[:, None]).long().sum(dim=1)


def same_part(lengths: torch.Tensor, count: Any) -> torch.Tensor:
    """Return whether two of ``count`` members lie in one part, by the lengths of the parts; (count, count).

    >>> same_part(torch.tensor([1, 2]), 3).int().tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """
    part = numbered_by(lengths.long().cumsum(0), torch.arange(count, device=lengths.device))
    return part[:, None] == part[None, :]


def resampled_table(
    table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Return what bilinear interpolation with antialiasing makes of a table, at one place for each of ``rows``.

    Args:
        table: (height, width, features).
        rows: (…): rows of the places in the image that the table is brought to.
        columns: (…): their columns.
        sizes: (…, 2): height and width of that image.

    Returns:
        (…, features).
    """
    height, width = table.shape[0], table.shape[1]
    down = _taps(rows, sizes[..., 0], height)
    along = _taps(columns, sizes[..., 1], width)
    by_row = torch.matmul(down, table.flatten(1)).unflatten(-1, (width, table.shape[2]))
    return torch.matmul(along.unsqueeze(-2), by_row).squeeze(-2)


def _taps(place: torch.Tensor, size: torch.Tensor, side: int) -> torch.Tensor:
    """Return the share of each of ``side`` numbers in the one at ``place`` of ``size`` that they are brought to.

    As PyTorch has it: a triangle as wide as the scale where that makes an image smaller, cut off at its ends.
    """
    scale = side / size.float()
    support = scale.clamp(min=1.0)
    center = scale * (place.float() + 0.5)
    first = (center - support + 0.5).long().clamp(min=0)
    last = (center + support + 0.5).long().clamp(max=side)
    index = torch.arange(side, device=place.device)
    distance = (index + 0.5 - center[..., None]).abs() / support[..., None]
    inside = (index >= first[..., None]) & (index < last[..., None])
    weights = (1.0 - distance).clamp(min=0.0) * inside
    return weights / weights.sum(dim=-1, keepdim=True)

"""Modules from no library, one for each way of saying what ``forward`` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Dictionary",
    "Documented",
    "Flat",
    "Image",
    "Length",
    "Line",
    "Pair",
    "Picky",
    "Sound",
    "Tables",
    "Text",
    "Unannotated",
]


class Line(nn.Module):
    """One tensor in, one out; only the layer says how long a row is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Image(nn.Module):
    """A convolution over images of any size from 5 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.conv(image).mean((2, 3)))


class Flat(nn.Module):
    """Images of 28 pixels only, which shows in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5)
        self.head = nn.Linear(4 * 12 * 12, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.max_pool2d(self.conv(image), 2).flatten(1))


class Sound(nn.Module):
    """A convolution in time; an output has an input's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 9)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        return {"wave": self.conv(wave), "energy": wave.pow(2).mean((1, 2))}


@dataclass
class Scores:
    """What `Text` returns; a field may be empty."""

    scores: Tensor
    pooled: Tensor
    nothing: Tensor | None = None


class Text(nn.Module):
    """Whole numbers for two tables, of one length, which positions limit; an optional mask is no input."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.kinds = nn.Embedding(3, 16)
        self.positions = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 12)

    def forward(self, tokens: Tensor, kinds: Tensor, mask: Tensor | None = None) -> Scores:
        places = torch.arange(tokens.shape[1])
        hidden = self.words(tokens) + self.kinds(kinds) + self.positions(places)
        if mask is not None:
            hidden = hidden * mask[..., None]
        scores = self.head(hidden)
        return Scores(scores=scores, pooled=scores.mean(1))


class Both(NamedTuple):
    """What `Pair` returns."""

    total: Tensor
    product: Tensor


class Pair(nn.Module):
    """Two tensors of one shape, and a matrix that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 36).reshape(9, 4))

    def forward(self, left: Tensor, right: Tensor) -> Both:
        return Both(left + right, left @ self.weight)


class Dictionary(nn.Module):
    """Returns tensors in containers."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x * 2, {"mean": x.mean(-1)}


class Documented(nn.Module):
    """No layer tells anything; the docstring does."""

    def forward(self, points: Tensor, weights: Tensor) -> Tensor:
        """Return the centre of some points.

        Args:
            points: coordinates, of shape (batch, num_points, 3).
            weights (`torch.Tensor` of shape `(batch, num_points)`):
                how much each counts.
        """
        if points.dim() != 3 or points.shape[-1] != 3 or weights.dim() != 2:
            raise ValueError("wrong points")
        return (points * weights[..., None]).sum(1)


class Tables(nn.Module):
    """Looks whole numbers up in a table of seven rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 4, mode="mean")

    def forward(self, choice: torch.LongTensor) -> Tensor:
        return self.table(choice)


class Length(nn.Module):
    """Its output's length is a sum: no axis of the inputs."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second, first[:, :1]], dim=1)


class Picky(nn.Module):
    """Says nothing of what it wants."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 77 or x.dim() != 3:
            raise ValueError("no")
        return x.sum(-1)


class Unannotated(nn.Module):
    """Names no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x, rows, scale=None):  # type: ignore[no-untyped-def]  # this is what it is for
        return self.head(x) * rows[:, None, None], x.mean()

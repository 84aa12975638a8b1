"""At which sizes a graph is compared with its model: never only where it was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CheckShape", "check_shapes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckShape:
    """One set of sizes to compare at."""

    label: str
    """What it is there to find, for reports."""

    sizes: Mapping[str, int]
    """Dynamic axis -> size in elements."""

    padding: bool = False
    """Whether later rows are padded, with 0 in the mask."""

    seed: int = 0
    """Seed of the values."""


def check_shapes(
    sizes: Mapping[str, int], ranges: Mapping[str, tuple[int, int | None]], *, masked: bool
) -> tuple[CheckShape, ...]:
    """Return five shapes or more, each unlike the traced one, each axis at two sizes at least.

    Args:
        sizes: Dynamic axis -> size at which the graph was traced.
        ranges: Dynamic axis -> smallest and largest size allowed.
        masked: Whether a mask among the inputs can hide padding.

    >>> [s.label for s in check_shapes({"batch_size": 2}, {"batch_size": (1, None)}, masked=False)]
    ['one row', 'odd sizes', 'smallest sizes', 'large sizes', 'another batch']
    """
    shapes = [
        CheckShape(label="one row", sizes=_with(sizes, ranges, batch=1, other=_medium), seed=1),
        CheckShape(label="odd sizes", sizes=_with(sizes, ranges, batch=3, other=_odd), seed=2),
        CheckShape(label="smallest sizes", sizes=_with(sizes, ranges, batch=1, other=_smallest), seed=3),
        CheckShape(label="large sizes", sizes=_with(sizes, ranges, batch=5, other=_large), seed=4),
        CheckShape(label="another batch", sizes=_with(sizes, ranges, batch=4, other=_traced), seed=5),
    ]
    if masked:
        shapes.append(
            CheckShape(label="padded rows", sizes=_with(sizes, ranges, batch=3, other=_medium), padding=True, seed=6)
        )
    # A graph without dynamic axes can only be compared on other values.
    return tuple(shapes if sizes else shapes[:4])


def _with(
    sizes: Mapping[str, int],
    ranges: Mapping[str, tuple[int, int | None]],
    *,
    batch: int,
    other: Sequence[float] | None,
) -> dict[str, int]:
    chosen = {}
    for number, (axis, traced) in enumerate(sorted(sizes.items())):
        low, high = ranges.get(axis, (1, None))
        if axis.endswith("batch_size"):
            # Two batches in one model (texts and images) are never of one size, but for the single row.
            size = batch if batch == 1 else batch + number
        elif other is None:
            size = low
        else:
            factor, offset, step = other
            image = axis in ("height", "width")
            size = int(traced * factor) // (32 if image else 1) * (32 if image else 1) + int(
                offset if not image else step
            )
        chosen[axis] = max(low, min(size, high) if high is not None else size)
    return chosen


_traced = (1.0, 0, 0)
_medium = (0.75, 1, 0)
_odd = (1.0, 7, 5)
_large = (2.0, 9, 0)
_smallest = None

"""Axes that an input's documentation leaves out and that of an input beside it tells.

Points in an image are documented as ``(batch_size, num_points, 2)`` where their labels are
``(batch_size, point_batch_size, num_points)``: each label has a point, and so the points have the labels' axes.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_config.draft import Draft

__all__ = ["shapes_with_shared_axes"]

Shape = tuple[int | str, ...]


def shapes_with_shared_axes(draft: Draft) -> Iterator[tuple[str, Shape, str]]:
    """Yield an input, its shape with an axis that another one has between two of its own, and the other one."""
    for name, spec in draft.specs.items():
        for other in draft.specs.values():
            for position in range(1, len(other.shape) - 1):
                shared = other.shape[:position] + other.shape[position + 1 :]
                axis = other.shape[position]
                if isinstance(axis, str) and axis not in spec.shape and spec.shape[: len(shared)] == shared:
                    yield name, (*other.shape, *spec.shape[len(shared) :]), other.name

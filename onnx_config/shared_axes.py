"""Axes that an input's documentation leaves out and that of an input beside it tells.

Points in an image are documented as ``(batch_size, num_points, 2)`` where their labels are
``(batch_size, point_batch_size, num_points)``: each label has a point, and so the points have the labels' axes.
A mask of images whose shape is not told at all says which token of a text looks at which of several images.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx_config.config_sizes import modality_of
from onnx_config.draft import Draft

__all__ = ["shapes_with_shared_axes"]

Shape = tuple[int | str, ...]


def shapes_with_shared_axes(draft: Draft) -> Iterator[tuple[str, Shape, str]]:
    """Yield an input, its shape with an axis that another one has between two of its own, and the other one.

    And a mask of images whose shape is not documented, with the axes of the text and of the images in one row.
    """
    yield from _masks_of_images(draft)
    for name, spec in draft.specs.items():
        for other in draft.specs.values():
            for position in range(1, len(other.shape) - 1):
                shared = other.shape[:position] + other.shape[position + 1 :]
                axis = other.shape[position]
                if isinstance(axis, str) and axis not in spec.shape and spec.shape[: len(shared)] == shared:
                    yield name, (*other.shape, *spec.shape[len(shared) :]), other.name


def _masks_of_images(draft: Draft) -> Iterator[tuple[str, Shape, str]]:
    ids = draft.specs.get("input_ids")
    # Rows of several images, each with its channels, its height and its width.
    several = [s for s in draft.specs.values() if modality_of(s.name) == "image" and len(s.shape) == 5]
    for name, spec in draft.specs.items():
        argument = draft.declaration.argument(name)
        told = argument is None or argument.shape is not None
        if name.endswith("mask") and modality_of(name) == "image" and not told and ids is not None:
            for images in several:
                shape = (*ids.shape, images.shape[1])
                if shape != spec.shape:
                    yield name, shape, f"{ids.name} and of {images.name}"

"""Encoders that are given images whose grids are told, one at a time: those whose code goes from image to image.

A graph has no loop over as many images as there are, and a graph of one image needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from onnx_config.draft import GEOMETRY
from onnx_config.spec import ModelSpec

__all__ = ["image_by_image", "of_one_image", "takes_one_image"]

_THREE = 3


def of_one_image(spec: ModelSpec) -> ModelSpec | None:
    """Return the spec of an encoder of one image, of one that takes many with their grids; ``None`` for any other."""
    told = next((name for name, rule in spec.values.items() if rule.grid is not None and rule.grid.packed), None)
    grid = next((tensor for tensor in spec.inputs if tensor.name == told), None)
    if grid is None or not isinstance(images := grid.shape[0], str):
        return None
    inputs = tuple(replace(t, shape=tuple(1 if axis == images else axis for axis in t.shape)) for t in spec.inputs)
    return replace(
        spec,
        inputs=inputs,
        axis_ranges={axis: limits for axis, limits in spec.axis_ranges.items() if axis != images},
        sizes={axis: size for axis, size in spec.sizes.items() if axis != images},
    )


def takes_one_image(shapes: Mapping[str, Any]) -> bool:
    """Return whether a graph whose inputs have these shapes takes one image, with its grid.

    >>> takes_one_image({"pixel_values": ("total_patches", 12), "image_grid_thw": (1, 3)})
    True
    >>> takes_one_image({"pixel_values": ("total_patches", 12), "image_grid_thw": ("num_images", 3)})
    False
    """
    return any(GEOMETRY.search(name) and tuple(shape) == (1, _THREE) for name, shape in shapes.items())


def image_by_image(feed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what an encoder is given of each image, of arrays or tensors for all images, whose patches follow on."""
    of_images = [name for name in feed if GEOMETRY.search(name)]
    grid = next(feed[name] for name in of_images if feed[name].shape[1:] == (_THREE,))
    first = 0
    for number, count in enumerate(grid.prod(-1).tolist()):
        last = first + count
        yield {
            name: value[number : number + 1] if name in of_images else value[first:last] for name, value in feed.items()
        }
        first = last

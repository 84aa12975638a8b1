"""What a segmenter is asked: points and boxes in the image, and labels of each kind that its class documents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.config_sizes import image_size
from onnx_config.image_embeddings import BOXES, POINT_LABELS, POINTS
from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnx_config.declarations import Declaration

__all__ = ["prompt_values"]

_LISTED = re.compile(r"- `(-?\d+)`:")
_USUAL_SIDE = 1024


def prompt_values(
    spec: TensorSpec, shape: tuple[int, ...], config: Any, declaration: Declaration, generator: np.random.Generator
) -> npt.NDArray[Any] | None:
    """Return the values of an input that is a prompt about an image; ``None`` where it is none.

    Labels are all those that the documentation lists, such as that of a point which only fills a place.
    """
    if shape[-1:] == (2,) and spec.name == POINTS:
        return (generator.random(shape) * _sides(config)).astype(spec.dtype)
    if shape[-1:] == (4,) and spec.name == BOXES:
        corners = generator.random((*shape[:-1], 2, 2)) * _sides(config)
        return np.sort(corners, axis=-2).reshape(shape).astype(spec.dtype)
    if spec.name == POINT_LABELS and (listed := _labels(declaration)):
        return generator.choice(listed, shape).astype(spec.dtype)
    return None


def _sides(config: Any) -> tuple[int, int]:
    """Return the width and the height of an image: the order of a point's coordinates."""
    height, width = image_size(config) or (_USUAL_SIDE, _USUAL_SIDE)
    return width, height


def _labels(declaration: Declaration) -> list[int]:
    argument = declaration.argument(POINT_LABELS)
    return [] if argument is None else [int(found) for found in _LISTED.findall(argument.documentation)]

"""What a segmenter makes of an image once, and is then asked about as often as one likes.

Such a class has a method ``get_image_embeddings``, and its ``forward`` takes what that gives in the place of the image:
a tensor, a list of such, or a tuple with a member for each of several arguments. It is asked about points, and some
classes about boxes too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration
    from onnx_config.probe import Probe
    from onnx_config.shape_inference import Inference

__all__ = [
    "BOXES",
    "EMBED",
    "IMAGE",
    "POINTS",
    "POINT_LABELS",
    "arguments_of",
    "box_prompts",
    "by_argument",
    "by_name",
    "image_embeddings",
]

IMAGE = "pixel_values"
"""What they are made of."""

POINTS = "input_points"
"""Points (batch_size, things asked about, points of each, 2) in pixels."""

POINT_LABELS = "input_labels"
"""What each point says of the thing that is asked about."""

BOXES = "input_boxes"
"""Boxes (batch_size, things asked about, 4) in pixels, each by two corners."""

EMBED = "get_image_embeddings"
"""The method that makes them."""

_ARGUMENT = "image_embeddings"
_ENDS = "_embeddings"
_CORNERS = 4


def image_embeddings(declaration: Declaration, found: Inference, probe: Probe) -> tuple[TensorSpec, ...]:
    """Return the embeddings of a batch of images, by a run on shapes alone; empty where there are none.

    They are called like the arguments that take them; those of a list ``image_embeddings.0``, ``image_embeddings.1``, …
    Their first axis is that of the images; all others are fixed.
    """
    image = next((spec for spec in found.inputs if spec.name == IMAGE), None)
    if image is None or not hasattr(probe.model, EMBED) or declaration.argument(_ARGUMENT) is None:
        return ()
    answer = probe.run({IMAGE: (image.resolve(found.sizes), image.dtype)}, method=EMBED)
    if answer.outputs is None:
        return ()
    rows = image.resolve(found.sizes)[0]
    names = _names(answer.outputs, [a.name for a in declaration.arguments if a.name.endswith(_ENDS)])
    specs = [
        TensorSpec(name=names[name], dtype=dtype, shape=(image.shape[0], *shape[1:]))
        for name, (shape, dtype) in answer.outputs.items()
        if shape and shape[0] == rows
    ]
    # An image of any size would have embeddings of any size.
    fixed = all(isinstance(size, int) for size in image.shape[1:])
    return tuple(specs) if fixed and len(specs) == len(answer.outputs) else ()


def _names(made: Iterable[str], arguments: list[str]) -> dict[str, str]:
    """Return by which names is taken what the method gives, where that is numbered by its place in it."""
    made = list(made)
    members = arguments_of(made)
    if 1 < len(members) == len(arguments):
        taken = dict(zip(members, arguments, strict=True))
        return {name: ".".join([taken[name.partition(".")[0]], *name.split(".")[1:]]) for name in made}
    return {name: _ARGUMENT if name == "output" else f"{_ARGUMENT}.{name}" for name in made}


def box_prompts(
    declaration: Declaration, found: Inference, probe: Probe, embeddings: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """Return the boxes that a segmenter takes beside any number of points, none among them; empty where it takes none.

    This is by runs on shapes alone. There is a box for each thing that points ask about.
    """
    argument = declaration.argument(BOXES)
    points = next((spec for spec in found.inputs if spec.name == POINTS), None)
    if argument is None or argument.shape is None or points is None or not embeddings:
        return ()
    # Each thing has several points and one box: of the axes of the points, boxes lack that one.
    if len(points.shape) != len(argument.shape) + 1 or argument.shape[-1] != _CORNERS:
        return ()
    boxes = TensorSpec(name=BOXES, dtype=points.dtype, shape=(*points.shape[:-2], _CORNERS))
    count = points.shape[-2]
    if any(spec.name == BOXES for spec in found.inputs) or not isinstance(count, str):
        return ()
    asked = (*found.inputs, boxes)
    with_some, with_none = (
        probe.run({spec.name: (spec.resolve(sizes), spec.dtype) for spec in asked}).outputs
        for sizes in (found.sizes, {**found.sizes, count: 0})
    )
    return (boxes,) if with_some is not None and with_some == with_none else ()


def arguments_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments that take what has these names.

    >>> arguments_of(["image_embeddings", "intermediate_embeddings.0", "intermediate_embeddings.1"])
    ('image_embeddings', 'intermediate_embeddings')
    """
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def by_name(argument: str, value: Any) -> dict[str, Any]:
    """Return what an argument is given, a tensor or a list of such, by the names of the tensors.

    >>> by_name("image_embeddings", [1, 2])
    {'image_embeddings.0': 1, 'image_embeddings.1': 2}
    """
    if isinstance(value, (list, tuple)):
        return {f"{argument}.{number}": member for number, member in enumerate(value)}
    if isinstance(value, Mapping):
        return {f"{argument}.{number}": member for number, member in value.items()}
    return {argument: value}


def by_argument(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors by the arguments that take them, a list where there are several for one.

    >>> by_argument({"image_embeddings": 1, "intermediate_embeddings.1": 3, "intermediate_embeddings.0": 2})
    {'image_embeddings': 1, 'intermediate_embeddings': [2, 3]}
    """
    given: dict[str, Any] = {}
    for argument in arguments_of(named):
        numbers = sorted(int(name.partition(".")[2]) for name in named if name.startswith(f"{argument}."))
        given[argument] = [named[f"{argument}.{number}"] for number in numbers] if numbers else named[argument]
    return given

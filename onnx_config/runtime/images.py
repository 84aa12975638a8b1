"""What is handed to the graph that makes features of images, where more belongs to them than pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onnx_config.draft import GEOMETRY
from onnx_config.errors import InputError
from onnx_config.runtime.graph_session import GraphSession

__all__ = ["as_list", "images_for", "run_images"]

_IMAGE = "pixel_values"
_TILED = ("rows", "tiles", "channels", "height", "width")


def images_for(graph: GraphSession, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return those of the arguments ``given`` that a graph takes, filled up with ones where transformers does so.

    A mask of images, or the number of images of each text, is all ones where it is not given: a model whose method
    takes it otherwise is not converted so.

    Raises:
        InputError: If a tensor is given that the graph does not know.
    """
    unknown = [
        name
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
        and name not in graph.inputs
        and not (_is_alone(graph) and GEOMETRY.search(name))
        and not bool((value == 1).all())
    ]
    if unknown:
        raise InputError(
            f"The images came with {', '.join(unknown)}, and the graph takes {', '.join(graph.inputs)}. Leave it out, "
            "or use the model in PyTorch."
        )
    feed = {name: given[name] for name in graph.inputs if given.get(name) is not None}
    image = feed.get(_IMAGE)
    if image is not None and image.ndim == len(_TILED):
        for name, value in graph.inputs.items():
            if name in feed:
                continue
            if name.endswith("mask"):
                feed[name] = torch.ones(image.shape[:2] + image.shape[3:], dtype=value.dtype, device=image.device)
            elif len(value.shape) == 1:
                feed[name] = torch.ones(image.shape[:1], dtype=value.dtype, device=image.device)
    return feed


def run_images(
    graph: GraphSession, feed: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return what a graph makes of images: of all at once, or one at a time where it takes one, at its own size."""
    if not _is_alone(graph):
        return graph.run(feed)
    images = feed[_IMAGE]
    sizes = next((value for name, value in given.items() if value is not None and GEOMETRY.search(name)), None)
    found = []
    for number, image in enumerate(images):
        height, width = image.shape[-2:] if sizes is None else map(int, sizes[number])
        if height > image.shape[-2] or width > image.shape[-1]:
            raise InputError(
                f"Image {number + 1} is said to be {height} by {width} pixels, and there are {image.shape[-2]} by "
                f"{image.shape[-1]}."
            )
        found.append(graph.run({**feed, _IMAGE: image[None, :, :height, :width]}))
    return {name: torch.cat([answer[name] for answer in found]) for name in graph.output_names}


def as_list(original: Any, shapes: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a class's method hands features on as a list, as it tells itself on shapes alone.

    One that asks for values, which shapes do not have, has as many features of each image as these say: a list.
    """
    try:
        told = original(**{**shapes, "return_dict": True})
    # The class's own code decides what it raises without values.
    except Exception:  # noqa: BLE001
        return True
    return isinstance(getattr(told, "pooler_output", told), (list, tuple))


def _is_alone(graph: GraphSession) -> bool:
    """Return whether a graph takes one image of any size."""
    image = graph.inputs.get(_IMAGE)
    return image is not None and image.shape[0] == 1 and isinstance(image.shape[-1], str)

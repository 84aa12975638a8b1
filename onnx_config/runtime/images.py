"""The graph that makes features of images: what it is handed beside pixels, and which features are of which image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from onnx_config.draft import GEOMETRY
from onnx_config.errors import InputError
from onnx_config.one_image import image_by_image, takes_one_image
from onnx_config.runtime.graph_session import GraphSession
from onnx_config.tile_models import features_in

__all__ = ["images_for", "run_images"]

_IMAGE = "pixel_values"
_TILED = ("rows", "tiles", "channels", "height", "width")


def images_for(graph: GraphSession, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return those of the arguments ``given`` that a graph takes, filled up with ones where transformers does so.

    A mask of images, or the number of images of each text, is all ones where it is not given: a model whose method
    takes it otherwise is not converted so.

    Raises:
        InputError: If a tensor is given that the graph does not know.
    """
    if _IMAGE not in graph.inputs:
        return {name: given[name] for name in graph.inputs if given.get(name) is not None}
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
    original: Callable[..., Any], graph: GraphSession, feed: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> dict[str, list[torch.Tensor]] | None:
    """Return the features that a graph makes, of each image or row; ``None``: it takes images side by side.

    Which features belong together decides where they go when a text is gone on with in several ways. A graph of one
    image is run for each. One of tiles gives the features of all one after another; how many each image has is told by
    the class itself where sizes say so, on shapes alone.

    Args:
        original: The class's method, of a model on the meta device.
        graph: What makes features.
        feed: What it is given.
        given: What the method was called with.

    Returns:
        By the name of the graph's output, its part for each image or row.

    Raises:
        InputError: If there are not as many features as the images should have, or other images than their sizes or
            grids tell.
    """
    image = feed.get(_IMAGE)
    if image is not None and _is_alone(graph):
        return _one_by_one(graph, _at_their_sizes(feed, given))
    if image is not None and image.ndim == len(_TILED):
        return _of_tiles(original, graph, feed)
    if takes_one_image({name: value.shape for name, value in graph.inputs.items()}):
        return _one_by_one(graph, _by_their_grids(feed))
    return None


def _one_by_one(graph: GraphSession, images: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    answers = [graph.run(image) for image in images]
    return {name: [answer[name] for answer in answers] for name in graph.output_names}


def _at_their_sizes(feed: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what a graph of one image is given of each, cut to the size that it is said to have."""
    sizes = next((value for name, value in given.items() if value is not None and GEOMETRY.search(name)), None)
    for number, image in enumerate(feed[_IMAGE]):
        height, width = image.shape[-2:] if sizes is None else map(int, sizes[number])
        if height > image.shape[-2] or width > image.shape[-1]:
            raise InputError(
                f"Image {number + 1} is said to be {height} by {width} pixels, and there are {image.shape[-2]} by "
                f"{image.shape[-1]}."
            )
        yield {**feed, _IMAGE: image[None, :, :height, :width]}


def _by_their_grids(feed: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return what a graph of one image is given of each: the patches that its grid tells."""
    images = list(image_by_image(feed))
    given, told = (sum(_patches(one) for one in many) for many in ([feed], images))
    if given != told or not images:
        raise InputError(f"The grids of the images tell of other patches than the {given} that there are.")
    return images


def _patches(feed: Mapping[str, torch.Tensor]) -> int:
    return next(tensor for tensor in feed.values() if tensor.is_floating_point()).shape[0]


def _of_tiles(
    original: Callable[..., Any], graph: GraphSession, feed: Mapping[str, torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """Return the features of each image that was cut into tiles, of a graph that leaves out tiles of zeros."""
    image = feed[_IMAGE]
    (output,) = graph.output_names
    made = graph.run(feed)[output]
    sizes = {name: tensor.cpu() for name, tensor in feed.items() if GEOMETRY.search(name)}
    if sizes:
        others = {name: tensor.cpu() for name, tensor in feed.items() if name != _IMAGE}
        told = original(**{_IMAGE: image.to("meta"), **others, "return_dict": True})
        counts = [len(part) for part in features_in(told)]
    else:
        filled = (image != 0).flatten(2).any(dim=-1).sum(dim=1)
        each, left = divmod(len(made), max(1, int(filled.sum())))
        counts = [] if left else [each * int(count) for count in filled]
    if sum(counts) != len(made):
        raise InputError(
            f"The graph gives {len(made)} features of images that have {' + '.join(map(str, counts)) or 'other ones'}."
        )
    return {output: list(made.split(counts))}


def _is_alone(graph: GraphSession) -> bool:
    """Return whether a graph takes one image of any size."""
    image = graph.inputs.get(_IMAGE)
    return image is not None and image.shape[0] == 1 and isinstance(image.shape[-1], str)

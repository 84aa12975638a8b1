"""The modules that compute the features of images that come as tiles, or with their sizes beside them.

Each calls the model's own ``get_image_features``. Where that takes pictures apart in Python by the values of its
inputs, it is called for all of them as for one while it is traced, and what depends on values is computed in tensors.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from onnx_config.draft import GEOMETRY
from onnx_config.spec import ModelSpec

__all__ = [
    "IMAGE",
    "Arrangement",
    "TileModel",
    "arrangement_of",
    "feature_counts",
    "features_in",
    "features_method",
    "packing_of",
    "takes_sizes",
    "with_sizes",
]

IMAGE = "pixel_values"
_METHOD = "get_image_features"

_IN_PIXELS = re.compile(r"(^|_)sizes$")
_TILES = 5
_COUNTER = "image_size_to_num_patches"
_COUNTER_TAKES = ("image_size", "grid_pinpoints", "patch_size")
_PACKER = "pack_image_features"
_ASPECT = "vision_aspect_ratio"
_SHARES = "batch_num_images"
_MISSING = "a picture is taken to have no more tiles than are given"


class Arrangement(StrEnum):
    """How images are given."""

    TILES = "tiles"
    """So many in a row of texts, (rows, images, channels, height, width); those that are all zeros are none."""

    SIZED_TILES = "sized_tiles"
    """So many tiles of a picture, and how high and wide each picture was."""

    ALONE = "alone"
    """One at a time, of any size."""


def arrangement_of(spec: ModelSpec) -> Arrangement | None:
    """Return how a graph takes images; ``None``: as they are, side by side."""
    image = next((tensor for tensor in spec.inputs if tensor.name == IMAGE), None)
    if image is None:
        return None
    if len(image.shape) == _TILES:
        sized = any(GEOMETRY.search(tensor.name) for tensor in spec.inputs)
        return Arrangement.SIZED_TILES if sized else Arrangement.TILES
    return Arrangement.ALONE if image.shape[0] == 1 and len(image.axis_names) > 1 else None


def features_method(model: Any) -> Any:
    """Return what a model makes features of images with: its inner one's method, which those around hand on to.

    ``None``: there is none.
    """
    inner = getattr(model, "base_model", model)
    return getattr(inner, _METHOD, None) or getattr(model, _METHOD, None)


def takes_sizes(model: Any) -> str | None:
    """Return the argument of ``get_image_features`` that says how large each image is; ``None``: there is none."""
    names = inspect.signature(features_method(model)).parameters
    return next((name for name in names if _IN_PIXELS.search(name)), None)


def features_in(returned: Any) -> list[torch.Tensor]:
    """Return the features (count, width) that a model's ``get_image_features`` returned, of each image or row."""
    features = getattr(returned, "pooler_output", returned)
    parts = list(features) if isinstance(features, (list, tuple)) else [features]
    rows = [row for part in parts for row in (part if part.ndim > len(("count", "width")) else [part])]
    return [row.flatten(0, -2) for row in rows]


def with_sizes(model: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of images that come one at a time with the size beside, where the model asks for it."""
    name = takes_sizes(model)
    if name is None or name in feed:
        return dict(feed)
    return {**feed, name: np.array([feed[IMAGE].shape[-2:]] * feed[IMAGE].shape[0], np.int64)}


def feature_counts(model: Any, feed: Mapping[str, Any]) -> list[int]:
    """Return how many features each image, or each row of images, has."""
    with torch.no_grad():
        given = {name: torch.from_numpy(value.copy()) for name, value in with_sizes(model, feed).items()}
        return [len(part) for part in features_in(features_method(model)(**given, return_dict=True))]


class TileModel(torch.nn.Module):
    """Calls what a model makes features of images with, and gives them all one after another (count, width)."""

    def __init__(self, model: torch.nn.Module, *, arrangement: Arrangement, output: str) -> None:
        """Take images by their ``arrangement``, and call the features ``output``."""
        super().__init__()
        self.model = model
        """A model of transformers that has a method ``get_image_features``."""
        self._arrangement = arrangement
        self._output = output

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def forward(self, use_cache: bool | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
        """Return the features; ``use_cache`` is for the decoder and ignored."""
        method = features_method(self.model)
        traced = torch.compiler.is_exporting()
        if self._arrangement is Arrangement.ALONE and (name := takes_sizes(self.model)) is not None:
            inputs[name] = _sizes_of(inputs[IMAGE], traced=traced)
        if not traced:
            return {self._output: torch.cat(features_in(method(**inputs, return_dict=True)))}
        from onnx_config.export.shape_products import products_of_shapes

        conditions: dict[str, torch.Tensor] = {}
        with _one_part(), products_of_shapes(method):
            if self._arrangement is Arrangement.SIZED_TILES:
                with _packed_at_once(self.model, inputs, conditions) as once:
                    returned = method(**once, return_dict=True)
            elif self._arrangement is Arrangement.TILES:
                once = {name: tensor.flatten(0, 1).unsqueeze(0) for name, tensor in inputs.items()}
                returned = method(**once, return_dict=True)
            else:
                returned = method(**inputs, return_dict=True)
        features = features_in(returned)
        return {self._output: features[0] if len(features) == 1 else torch.cat(features), **conditions}


def _sizes_of(images: torch.Tensor, *, traced: bool) -> Any:
    """Return height and width of one image; while it is traced, as sizes that may be symbols."""
    sides = [(images.shape[-2], images.shape[-1])]
    return sides if traced else torch.tensor(sides, device=images.device)


class _All:
    """The lengths of the parts of something that has one part."""


@contextmanager
def _one_part() -> Iterator[None]:
    """Have what is taken apart into one part stay whole, until the exit, rather than ask how long that is."""

    def listed(original: Any) -> Any:
        def tolist(tensor: torch.Tensor) -> Any:
            is_length = tensor.dim() == 1 and tensor.shape[0] == 1 and not tensor.is_floating_point()
            return _All() if is_length else original(tensor)

        return tolist

    def divided(original: Any) -> Any:
        def split(tensor: torch.Tensor, sizes: Any = None, dim: int = 0, **options: Any) -> Any:
            sizes = options.pop("split_size_or_sections", options.pop("split_size", sizes))
            if isinstance(sizes, _All) or (isinstance(sizes, (list, tuple)) and len(sizes) == 1):
                return (tensor.view_as(tensor),)
            return original(tensor, sizes, dim)

        return split

    with ExitStack() as stack:
        for tensors in (torch.Tensor, FakeTensor, FunctionalTensor):
            stack.enter_context(patch.object(tensors, "tolist", listed(tensors.tolist)))
        for owner in (torch, torch.Tensor):
            stack.enter_context(patch.object(owner, "split", divided(owner.split)))
        yield


def packing_of(model: torch.nn.Module) -> Any:
    """Return how the tiles of a model's pictures lie; ``None``: it does not say, or puts them together otherwise."""
    from onnx_config.export.packed_tiles import Packing

    owner = _packer_of(model)
    config = getattr(owner, "config", None)
    vision = getattr(config, "vision_config", None)
    resolutions, tile = getattr(config, "image_grid_pinpoints", None), getattr(vision, "image_size", None)
    patch_size = getattr(vision, "patch_size", None)
    if not resolutions or not isinstance(tile, int) or not isinstance(patch_size, int) or tile < patch_size:
        return None
    most = None
    if _ASPECT in inspect.signature(getattr(owner, _PACKER)).parameters:
        digits = str(getattr(config, _ASPECT, "")).rpartition("_")[2]
        if not digits.isdecimal():
            return None
        most = int(digits)
    pairs = tuple((int(height), int(width)) for height, width in resolutions)
    return Packing(resolutions=pairs, tile=tile, side=tile // patch_size, most=most)


def _packer_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module that puts features together: the innermost, to which those around it hand on."""
    return next((module for module in reversed(list(model.modules())) if _packs(module)), None)


def _packs(module: torch.nn.Module) -> bool:
    """Return whether a module works out tiles, and puts their features together, by the functions known here."""
    counter = getattr(sys.modules.get(type(module).__module__), _COUNTER, None)
    if counter is None or tuple(inspect.signature(counter).parameters) != _COUNTER_TAKES:
        return False
    packer = getattr(module, _PACKER, None)
    takes = inspect.signature(packer).parameters if callable(packer) else {}
    return {"image_features", "image_sizes", "image_newline"} <= set(takes)


@contextmanager
def _packed_at_once(
    model: torch.nn.Module, inputs: dict[str, Any], conditions: dict[str, torch.Tensor]
) -> Iterator[dict[str, Any]]:
    """Have the tiles of all pictures be those of one, put together at once; yield what to call the method with.

    What is taken for granted is added to ``conditions``.
    """
    from onnx_config.export.granted import condition_name
    from onnx_config.export.packed_tiles import packed

    packing = packing_of(model)
    name = next(name for name in inputs if GEOMETRY.search(name))
    tiles, sizes = inputs[IMAGE].shape[1], inputs[name]
    pixels = inputs[IMAGE].flatten(0, 1)

    def counted(image_size: Any, grid_pinpoints: Any, patch_size: int) -> Any:
        return pixels.shape[0]

    def together(signature: inspect.Signature) -> Any:
        def pack_image_features(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            (features,) = given["image_features"]
            newline = given.get("image_newline")
            made, fits = packed(features, sizes, packing, tiles=tiles, newline=newline, shares=inputs.get(_SHARES))
            conditions[condition_name(_MISSING)] = fits
            return [made], None

        return pack_image_features

    owner = _packer_of(model)
    assert owner is not None
    packer = together(inspect.signature(getattr(owner, _PACKER)))
    with (
        patch.object(sys.modules[type(owner).__module__], _COUNTER, counted),
        patch.object(owner, _PACKER, packer),
    ):
        yield {IMAGE: pixels, name: [None]}

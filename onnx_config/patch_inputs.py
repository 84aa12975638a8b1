"""Inputs of encoders that are given patches of images, and whole numbers that say how the patches lie in each image.

What such a class documents of its inputs is mostly an image's height and width. That it takes patches shows in the
other input: three numbers for each image are frames, rows and columns, and the patches of all images come one after
another; two are rows and columns, and each image has room for as many patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from onnx_config.config_sizes import config_size, sub_configs
from onnx_config.draft import GEOMETRY, Draft
from onnx_config.spec import GridRule, ValueRule

__all__ = ["MOST_PATCHES", "TOTAL_PATCHES", "patch_drafts"]

TOTAL_PATCHES = "total_patches"
"""Axis of the patches of all images, one after another."""

MOST_PATCHES = "max_num_patches"
"""Axis of the patches of one image, with room to spare."""

_BLOCKS = 24
_IMAGES = 3
_THREE, _TWO = 3, 2
_COLOURS = 3
_MERGE_SIZES = (1, 2)


def patch_drafts(draft: Draft) -> Iterator[tuple[Draft, str]]:
    """Yield the draft with patches in the place of images, once for each number of values that a patch may have.

    Where it has them already, and may have several frames of an image, yield it with one frame of each.
    """
    for name, rule in draft.rules.items():
        if rule.grid is not None and rule.grid.frames:
            other = draft.copy()
            other.rules[name] = replace(rule, grid=replace(rule.grid, frames=False))
            yield other, f"{name} names one frame of each image"
    grid = next((name for name in draft.specs if _says_grid(draft, name)), None)
    patches = _patches_input(draft)
    if grid is None or patches is None:
        return
    packed = draft.specs[grid].shape[-1] == _THREE
    if not packed and not grid.endswith("shapes"):
        # Heights and widths in pixels, of images as they are.
        return
    for width in _widths(draft, packed=packed):
        other = draft.copy()
        # Edges of blocks that are an input differ from image to image.
        edges = [name for name, spec in draft.specs.items() if GEOMETRY.search(name) and len(spec.shape) == 1]
        step = max(_MERGE_SIZES) if edges else _merge_size(draft)
        axis = TOTAL_PATCHES if packed else MOST_PATCHES
        rows = draft.specs[patches].shape[0]
        _reshape(other, patches, (axis, *width) if packed else (rows, axis, *width))
        if not packed:
            _reshape(other, grid, (rows, _TWO))
            for mask in [n for n in draft.specs if n.endswith("mask") and draft.specs[n].shape[0] == rows]:
                _reshape(other, mask, (rows, axis))
        images = other.specs[grid].shape[0]
        if packed and isinstance(images, str):
            other.sizes[images] = _IMAGES
        other.sizes[axis] = _BLOCKS * step**2
        other.smallest[axis] = step**2
        if step > 1:
            other.steps[axis] = step**2
        named = GridRule(patches=axis, step=step, packed=packed, frames=packed and not grid.startswith("image"))
        other.rules[grid] = replace(draft.rules.get(grid, ValueRule()), grid=named)
        other.rules.update({name: ValueRule(choices=_MERGE_SIZES) for name in edges})
        how = "of all images one after another" if packed else "of each image, with room to spare"
        yield other, f"{patches} holds patches {how}, {math.prod(width)} numbers each, and {grid} says how they lie"


def _says_grid(draft: Draft, name: str) -> bool:
    spec = draft.specs[name]
    rule = draft.rules.get(name)
    is_free = rule is None or rule.grid is None
    return bool(GEOMETRY.search(name)) and is_free and len(spec.shape) == _TWO and spec.shape[-1] in (_TWO, _THREE)


def _patches_input(draft: Draft) -> str | None:
    """Return the input that holds the images: the main one, else the first of fractions."""
    names = [name for name in (draft.declaration.main_input, *draft.specs) if name in draft.specs]
    return next((name for name in names if draft.specs[name].dtype.startswith("float")), None)


def _widths(draft: Draft, *, packed: bool) -> list[tuple[int, ...]]:
    """Return the sizes that a patch may have: its pixels, in all colours, and in as many frames as are read at once.

    Some configs have frames for videos only; what was found out already comes last but for patches that are images.
    """
    colours = config_size(draft.config, "num_channels", "image") or _COLOURS
    edge = config_size(draft.config, "patch_size", "image")
    found: list[int] = []
    if edge is not None:
        frames = config_size(draft.config, "temporal_patch_size", "image") or 1
        found += [colours * frames * edge**2, colours * edge**2]
    name = _patches_input(draft)
    last = draft.specs[name].shape[-1] if name is not None and draft.specs[name].shape else None
    found += [last] if isinstance(last, int) else []
    images = [(colours, edge, edge)] if packed and edge is not None else []
    return [*((width,) for width in dict.fromkeys(found)), *images]


def _merge_size(draft: Draft) -> int:
    """Return the edge of the blocks of patches that are made one."""
    for part in sub_configs(draft.config):
        for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
            value = getattr(part, name, None)
            edges = value if isinstance(value, (list, tuple)) else [value]
            if all(isinstance(edge, int) and edge > 0 for edge in edges) and edges:
                return math.lcm(*edges)
    return 1


def _reshape(draft: Draft, name: str, shape: tuple[int | str, ...]) -> None:
    # As it is: what a config calls by the name of the axis is the number of patches of some image.
    draft.specs[name] = replace(draft.specs[name], shape=shape)

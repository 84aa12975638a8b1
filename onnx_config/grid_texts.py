"""Texts with images whose grids are told, while a class is asked what it takes: tokens that stand for their blocks.

Such a class counts the positions of tokens by the grids, so that it is not enough that there are as many tokens as
features: each image must have its own, and those of two images must not touch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from onnx_config.config_sizes import modality_of
from onnx_config.declarations import Role
from onnx_config.draft import GEOMETRY, Draft
from onnx_config.image_places import places_needed
from onnx_config.spec import PlacesRule, ValueRule

__all__ = ["generates_from_grids", "marked_drafts", "placed_drafts"]

_TEXT = "input_ids"
_OF_IMAGES = re.compile(r"\bimage\b")
_KINDS = re.compile(r"_token_type_ids$")
_ROOM = 3
_THREE = 3


def generates_from_grids(draft: Draft, name: str) -> bool:
    """Return whether a text that goes on is read with images, of which the argument ``name`` tells the grids."""
    argument = draft.declaration.argument(name)
    shape = None if argument is None else argument.shape
    gives = any(field.name == "logits" for field in draft.declaration.outputs)
    if shape is None or not gives or _TEXT not in draft.specs or modality_of(name) != "image":
        return False
    # The edges of blocks, one for each image, are told beside its grid.
    beside = len(shape) == 1 and any(generates_from_grids(draft, other) for other in draft.specs if other != name)
    return shape[-1] == _THREE or beside


def placed_drafts(draft: Draft, tokens: Iterable[int]) -> Iterator[tuple[Draft, str]]:
    """Yield the draft with each of ``tokens`` for the blocks of its images, where it is told their grids."""
    grid = next((name for name, rule in draft.rules.items() if rule.grid is not None and rule.grid.packed), None)
    present = draft.rules.get(_TEXT, ValueRule())
    if grid is None or _TEXT not in draft.specs or present.places is not None:
        return
    edges = [name for name, spec in draft.specs.items() if GEOMETRY.search(name) and len(spec.shape) == 1]
    for token in tokens:
        other = draft.copy()
        places = PlacesRule(token=token, grid=grid, edges=edges[0] if edges else None)
        other.rules[_TEXT] = replace(present, tokens=(), places=places)
        _make_room(other, grid)
        told = f"a token {token} stands in a text for each block of patches that {grid} tells of"
        marked = _marked(other)
        if marked is not None:
            yield marked, f"{told}, and {', '.join(marked.specs.keys() - other.specs.keys())} says which these are"
        yield other, told


def _marked(draft: Draft) -> Draft | None:
    """Return the draft with what is documented to tell tokens of images from others; ``None`` where nothing is.

    Some classes count other positions without it, and do not ask.
    """
    marked = draft
    for argument in draft.declaration.arguments:
        kinds = argument.preprocessed or _KINDS.search(argument.name) is not None
        if (
            kinds
            and _OF_IMAGES.search(argument.documentation) is not None
            and argument.role is Role.DATA
            and argument.name not in draft.specs
        ):
            other = marked.copy()
            other.add(argument.name)
            marked = next((with_it for with_it, _ in marked_drafts(other, argument.name)), marked)
    return None if marked is draft else marked


def marked_drafts(draft: Draft, name: str) -> Iterator[tuple[Draft, str]]:
    """Yield the draft with the input ``name``, which it has, marking the tokens that stand for images.

    Nothing is yielded where it is not told the grids of images, or ``name`` is no whole number for each token.
    """
    spec, ids = draft.specs[name], draft.specs.get(_TEXT)
    told = any(rule.grid is not None and rule.grid.packed for rule in draft.rules.values())
    documented = [draft.declaration.argument(argument) for argument in (name, _TEXT)]
    alike = len({None if argument is None else argument.shape for argument in documented}) == 1
    if ids is None or not told or not alike or not spec.dtype.startswith("int"):
        return
    other = draft.copy()
    # Whatever it is called, it is of no other text than these ids.
    other.specs[name] = replace(spec, shape=ids.shape)
    other.rules[name] = ValueRule(marks=True)
    yield other, f"{name} was added since the model asks for it, and says which tokens stand for images"


def _make_room(draft: Draft, grid: str) -> None:
    """Let texts be long enough for twice as many patches in one of them, or images smaller where they cannot be."""
    axis, rule = draft.specs[_TEXT].shape[-1], draft.rules[grid].grid
    if not isinstance(axis, str) or rule is None or not isinstance(rule.patches, str):
        return
    most = draft.largest(axis, _TEXT)
    images = draft.specs[grid].resolve(draft.sizes)[0]
    while True:
        needed = _needed(draft, {rule.patches: 2 * draft.sizes[rule.patches], "batch_size": 1})
        smaller = draft.sizes[rule.patches] // 2 // rule.step**2 * rule.step**2
        if most is None or needed + _ROOM <= most or smaller < images * rule.step**2:
            break
        draft.sizes[rule.patches] = smaller
    draft.sizes[axis] = max(draft.sizes[axis], needed + _ROOM)
    if most is not None:
        draft.sizes[axis] = min(draft.sizes[axis], most)
    draft.smallest[axis] = max(draft.smallest.get(axis, 1), _needed(draft, {}))


def _needed(draft: Draft, sizes: Mapping[str, int]) -> int:
    return places_needed(tuple(draft.specs.values()), draft.rules, {**draft.sizes, **sizes})

"""Lessons about the sizes of axes: the one that a refusal tells, larger ones, multiples, other images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from onnx_config.candidate import Ask, Candidate, candidate_of_size
from onnx_config.config_sizes import config_size, modality_of
from onnx_config.draft import IMAGE_AXES, Draft, is_batch
from onnx_config.probe import ProbeResult
from onnx_config.refusals import is_one_row_only, is_too_small, reshaped, wrong_sizes

__all__ = ["growth", "image_sizes", "multiples", "named_numbers", "one_row", "size_one", "solved_sizes"]

_MAX_GROWTH = 1 << 17
_IMAGE_SIZES = (32, 64, 224, 16, 30)
_MAX_POSITIONS = 12
_LARGE = 1000
_REFUSED_SIZE = re.compile(r"\b(?:got|found|is|has):? (?P<size>\d+)\.?$")


def one_row(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Fix the batch at one row where the model takes no more."""
    if not is_one_row_only(answer.refusal or ""):
        return
    other = draft.copy()
    for axis in [a for a in other.axes() if is_batch(a)]:
        other.sizes[axis] = 1
        other.freeze(axis)
    yield Candidate(draft=other, why=f"the batch is fixed at one row: {answer.refusal}"[:300], sure=True)


def size_one(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let an axis whose size is refused, and no other named in its place, be of one: sounds of one channel, say."""
    refusal = answer.refusal or ""
    refused = _REFUSED_SIZE.search(refusal)
    if refused is None or wrong_sizes(refusal):
        return
    found = [item for item in _positions(draft) if item[2] == int(refused["size"])]
    if len(found) == 1 and not is_batch(draft.specs[found[0][0]].shape[found[0][1]]):
        yield candidate_of_size(draft, found[0][:2], 1, refusal)


def solved_sizes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Find the axis that a refused size depends on by moving each, and solve for the size that is wanted."""
    for index, (got, want) in enumerate(wrong_sizes(answer.refusal or "")):
        if got == want:
            continue
        # How many rows there are is never what is wrong with one size.
        single = [[item] for item in _positions(draft) if not is_batch(draft.specs[item[0]].shape[item[1]])]
        for group in (*single, *_sides(draft)):
            size = group[0][2]
            slope = _slope(draft, answer, ask, group=group, index=index)
            if not slope:
                continue
            solution = size - (got - want) / slope
            if solution != int(solution) or solution < 1 or solution > _MAX_GROWTH:
                continue
            where = ", ".join(f"axis {position} of {name}" for name, position, _ in group)
            why = f"{where} has size {int(solution)}: {answer.refusal}"[:300]
            yield Candidate(draft=_with_size(draft, group, int(solution)), why=why, sure=True)


def _slope(
    draft: Draft, answer: ProbeResult, ask: Ask, *, group: list[tuple[str, int, int]], index: int
) -> float | None:
    """Return by how much a refused size grows with each step of an axis, as far as it grows with one step or two.

    Frames may count in pairs, and of an odd number one is left out.
    """
    size = group[0][2]
    got, want = wrong_sizes(answer.refusal or "")[index]
    for step in (size,) if size > _LARGE else (1, 2):
        there = wrong_sizes(ask(_with_size(draft, group, size + step)).refusal or "")
        if index >= len(there):
            return None
        if slope := ((there[index][0] - there[index][1]) - (got - want)) / step:
            return slope
    return None


def _with_size(draft: Draft, group: list[tuple[str, int, int]], size: int) -> Draft:
    other = draft.copy()
    for name, position, _ in group:
        other.set_size(name, position, size)
    return other


def _sides(draft: Draft) -> list[list[tuple[str, int, int]]]:
    """Return the heights, and the widths, of several images, which may have to be one."""
    groups = []
    for side in IMAGE_AXES:
        found = [
            (name, position, draft.sizes[axis])
            for name, spec in draft.specs.items()
            for position, axis in spec.axes.items()
            if axis.endswith(side) and axis in draft.sizes
        ]
        if len(found) > 1:
            groups.append(found)
    return groups


def _positions(draft: Draft) -> list[tuple[str, int, int]]:
    """Return (input, axis, size) of all that may have another size, each named axis once; rows come last."""
    found: dict[Any, tuple[str, int, int]] = {}
    for name, spec in draft.specs.items():
        for position, (axis, size) in enumerate(zip(spec.shape, spec.resolve(draft.sizes), strict=True)):
            found.setdefault(axis if isinstance(axis, str) else (name, position), (name, position, size))
    return sorted(found.values(), key=lambda item: item[1] == 0)[:_MAX_POSITIONS]


def multiples(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let an axis be a multiple of what the model cuts it into."""
    step = reshaped(answer.refusal or "")
    if step is None:
        return
    for name, position, size in _positions(draft):
        if position:
            whole = -(-max(size, 2 * step) // step) * step
            candidate = candidate_of_size(draft, (name, position), whole, f"a multiple of {step}", sure=False)
            axis = draft.specs[name].shape[position]
            if isinstance(axis, str):
                candidate.draft.steps[axis] = step
            yield candidate


def growth(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Make inputs larger, the main one first."""
    if not is_too_small(answer.refusal or ""):
        return
    main = draft.declaration.main_input
    for name in sorted(draft.specs, key=lambda n: (n != main, modality_of(n) == "text")):
        axes = [a for a in draft.specs[name].axis_names if not is_batch(a)]
        if not axes or max(draft.sizes[a] for a in axes) * 4 > _MAX_GROWTH:
            continue
        other = draft.copy()
        for axis in axes:
            other.sizes[axis] *= 4 if len(axes) == 1 else 2
        why = f"{', '.join(axes)} was made larger: {answer.refusal}"[:200]
        yield Candidate(draft=other, why=why, sure=name == main and modality_of(name) != "text")


def named_numbers(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Try the numbers of the message as sizes, and added to sizes."""
    numbers = [int(n) for n in dict.fromkeys(re.findall(r"\b\d{1,4}\b", answer.refusal or "")) if int(n) > 0][:6]
    for name, position, size in _positions(draft):
        for number in numbers:
            for other in (size + number, number) if position else (number,):
                if other != size:
                    yield candidate_of_size(draft, (name, position), other, answer.refusal or "", sure=False)


def image_sizes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Try other image sizes."""
    if not set(IMAGE_AXES) <= set(draft.axes()):
        return
    # Some encoders are given patches, each as an image.
    patch = config_size(draft.config, "patch_size", "image")
    for size in (*_IMAGE_SIZES, *(() if patch is None else (patch,))):
        if draft.sizes["height"] == draft.sizes["width"] == size:
            continue
        other = draft.copy()
        other.sizes.update(dict.fromkeys(IMAGE_AXES, size))
        yield Candidate(draft=other, why=f"images of {size} pixels a side: {answer.refusal}"[:200], sure=False)

"""Where a model computes otherwise than the graph of its trace, and what becomes of the graph there.

A trace holds one way of computing. A model that branches by a size is traced once more for the other way, or its image
sizes are fixed, or the graph refuses the sizes at which it does not hold; where that leaves too little, it is no graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.cache_layout import PAST_AXIS
from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.limits import AxisLimit, is_worth_having, limit_axis
from onnx_config.export.sample import SIDES, Sample
from onnx_config.spec import ModelSpec, base_axis, size_of

if TYPE_CHECKING:
    from onnx_config.export.trace import Trace

__all__ = ["Branch", "branches_of", "without_branches"]

_LARGEST_TRIED = 4096
_NEXT_TRIED = 32
_MOST_TURNS = 2
_SHORTER = 2
"""A sound of so small a share of the usual one is none that anybody gives a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Sizes of an axis at which a model computes otherwise than its graph."""

    axis: str

    size: int
    """The one next to those that the graph holds for."""

    why: str
    """What differs there."""

    stops: bool = False
    """Whether the graph gives nothing there, rather than other numbers: it refuses such sizes by itself."""


def without_branches(
    spec: ModelSpec,
    sample: Sample,
    fixed: tuple[str, ...],
    trace_with: Callable[[tuple[str, ...], tuple[AxisLimit, ...]], tuple[Trace, tuple[Branch, ...]]],
    *,
    write: Callable[[Trace], object],
) -> tuple[Trace, list[str]]:
    """Return a trace that holds at all sizes of its axes or refuses those at which it does not, and notes of that.

    Args:
        spec: What the model takes and gives.
        sample: What it is traced with.
        fixed: Axes that are fixed from the start.
        trace_with: Traces with the given axes fixed, in another way beyond each of the given turns, and writes that;
            returns also where the model branches.
        write: Writes a trace whose graph was changed.

    Raises:
        ModelError: If it computes otherwise at other sizes of an axis that can neither be fixed, nor be traced in both
            ways, nor be limited to sizes that are of use (``export_failed``).
    """
    notes: list[str] = []
    sides = {axis for axis in spec.axis_ranges if axis.endswith(SIDES)}
    turns: tuple[AxisLimit, ...] = ()
    trace, found = trace_with(fixed, turns)
    while True:
        sample = replace(sample, sizes={**sample.sizes, **trace.sizes})
        branches = tuple(branch for branch in found if not _refuses_by_itself(branch, spec, sample))
        free = sides - set(fixed)
        moving = sorted(branch.axis for branch in branches if branch.axis in free)
        if sample.image_size is not None and moving:
            # An image can be brought to the one size that preprocessors make.
            why = next(branch.why for branch in branches if branch.axis == moving[0])
            notes.append(
                f"{', '.join(sorted(free))} is fixed, since the model computes otherwise at other sizes: {why}"
            )
            fixed = (*fixed, *free)
        elif (turn := _turn_at(branches, spec, sample, turns)) is not None:
            turns = (*turns, turn)
        else:
            break
        try:
            trace, found = trace_with(fixed, turns)
        except ModelError:
            if not turns:
                raise
            # The other way cannot be traced.
            turns = turns[:-1]
            break
    for turn in turns:
        notes.append(
            f"up to {turn.axis} {turn.bound} the graph computes in one way, and in another beyond, as the model does"
        )
    for branch in branches:
        limit = _limit_before(branch, spec, sample)
        limit_axis(trace.model, limit, spec.inputs)
        end = "most" if limit.least is None else "least"
        notes.append(
            f"{limit.axis} is at {end} {limit.bound}, and the graph refuses {'more' if end == 'most' else 'less'}: the "
            f"model computes otherwise then, and one graph holds one way of computing only ({branch.why})"
        )
    for branch in found:
        if _refuses_by_itself(branch, spec, sample):
            notes.append(
                f"beside the traced sizes of the other axes, {branch.axis} is at most {branch.size - 1}: the model"
                " makes its tables longer then, and the graph stops"
            )
    if branches:
        write(trace)
    return trace, notes


def _refuses_by_itself(branch: Branch, spec: ModelSpec, sample: Sample) -> bool:
    """Return whether a graph ends where a model only makes a table of positions longer, and is of use up to there."""
    if not branch.stops or branch.size <= sample.sizes.get(branch.axis, branch.size):
        return False
    ranges = spec.axis_ranges
    largest = ranges.get(branch.axis, (1, None))[1]
    if largest is None and branch.axis == PAST_AXIS:
        # A past is as long as the texts that it is of.
        steps = [high for axis, (_, high) in ranges.items() if axis.endswith("sequence_length") and high is not None]
        largest = max(steps, default=None)
    return is_worth_having(AxisLimit(axis=branch.axis, most=branch.size - 1), largest)


def _turn_at(
    branches: tuple[Branch, ...], spec: ModelSpec, sample: Sample, turns: tuple[AxisLimit, ...]
) -> AxisLimit | None:
    """Return the size after which a model that branches could be traced once more; ``None``: there is none to try."""
    if len(turns) >= _MOST_TURNS or spec.states:
        return None
    for branch in branches:
        traced = sample.sizes.get(branch.axis)
        if traced is None or branch.axis.endswith((*SIDES, "batch_size")):
            continue
        most = branch.size - 1 if branch.size > traced else branch.size
        turn = AxisLimit(axis=branch.axis, most=most, refuses=False)
        if turn not in turns:
            return turn
    return None


def _limit_before(branch: Branch, spec: ModelSpec, sample: Sample) -> AxisLimit:
    """Return the limit up to which, or from which, a graph holds.

    Raises:
        ModelError: If the model computes otherwise at sizes that are in daily use.
    """
    limit = AxisLimit(axis=branch.axis, most=branch.size - 1)
    largest = spec.axis_ranges.get(branch.axis, (1, None))[1]
    traced = sample.sizes.get(branch.axis, branch.size)
    above = branch.size > traced
    if above and is_worth_having(limit, largest):
        return limit
    if branch.size < traced // _SHORTER and _counts_readings(branch.axis, spec):
        return AxisLimit(axis=branch.axis, least=branch.size + 1)
    up_to = f" The graph would hold up to {limit.bound} only, which is too little to be of use." if above else ""
    raise ModelError(
        f"{spec.architecture} computes otherwise at other sizes of {branch.axis}, and one graph holds one way of "
        f"computing only: {branch.why}.{up_to}",
        kind=ErrorKind.EXPORT_FAILED,
    )


def _counts_readings(axis: str, spec: ModelSpec) -> bool:
    """Return whether an axis counts what a sensor gave, of which a few are no sound; a text may be one token."""
    if axis.endswith((*SIDES, "batch_size")):
        return False
    return any(axis in tensor.axis_names and tensor.dtype.startswith("float") for tensor in spec.inputs)


def branches_of(
    untried: tuple[tuple[str, int], ...], path: Path, spec: ModelSpec, universal: Any, model: Any
) -> tuple[Branch, ...]:
    """Return at which of the ``untried`` sizes of axes the model takes another branch than its graph.

    Of a length that is too short for the graph's way, it is the longest such: what is next to one is looked at, too.
    """
    from onnx_config.export.parity import STOPS, difference_at
    from onnx_config.export.reference import compute_references
    from onnx_config.export.session import open_session
    from onnx_config.export.shapes import LONG_TEXT, CheckShape, Float64
    from onnx_config.input_generator import generate_inputs

    session = None
    untried = tuple(one for one in dict.fromkeys(_of_plain_axes(untried)) if one[0] in spec.sizes)

    def apart(axis: str, sizes: Iterable[int]) -> Iterator[Branch]:
        """Yield those of the sizes of an axis at which the two differ."""
        nonlocal session
        shapes = [CheckShape(label="another branch", sizes={**spec.sizes, axis: size}) for size in sizes]
        feeds = [
            (
                shape,
                generate_inputs(spec.inputs, universal.config, universal.declaration, shape.sizes, rules=spec.values),
            )
            for shape in shapes
        ]
        # What the model itself refuses is no branch of it.
        references, _ = compute_references(
            model,
            feeds,
            flags=universal.forward_flags,
            device="cpu",
            float64=Float64.NEEDED,
            reload=partial(copy.deepcopy, model),
        )
        if references and session is None:
            session = open_session(path, device="cpu", threads=1)
        for reference in references:
            if (why := difference_at(session, reference)) is not None:
                yield Branch(axis=axis, size=reference.shape.sizes[axis], why=why, stops=why.startswith(STOPS))

    found = []
    for axis, size in untried:
        if size > _LARGEST_TRIED:
            continue
        for branch in apart(axis, [size]):
            longer = range(size + 1, min(size + _NEXT_TRIED, spec.sizes[axis])) if axis not in SIDES else ()
            last = branch
            for other in apart(axis, longer):
                last = other if other.size == last.size + 1 else last
            found.append(last)
    for axis in dict.fromkeys(axis for axis, _ in untried if axis.endswith("sequence_length")):
        most = spec.axis_ranges.get(axis, (1, None))[1]
        long = LONG_TEXT if most is None else min(LONG_TEXT, most)
        beyond = [size for other, size in untried if other == axis and spec.sizes[axis] < size < long]
        if beyond and all(branch.axis != axis for branch in found):
            # Two ways of attending may be nearly the same where the one begins, and not in a long text.
            found += [replace(branch, size=min(beyond)) for branch in apart(axis, [long]) if not branch.stops]
    return tuple(found)


def _of_plain_axes(untried: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield the sizes with those of a multiple of an axis as the sizes of that axis on either side.

    >>> list(_of_plain_axes([("8*sequence_length", 17), ("height", 4)]))
    [('sequence_length', 2), ('sequence_length', 3), ('height', 4)]
    """
    for axis, size in untried:
        base = base_axis(axis)
        if base == axis:
            yield axis, size
        else:
            step = size_of(axis, {base: 1})
            yield from ((base, number) for number in sorted({size // step, -(-size // step)}) if number)

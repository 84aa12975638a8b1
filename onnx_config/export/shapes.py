"""At which sizes a graph is compared with its model: never only where it was traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from types import MappingProxyType

from onnx_config.cache_layout import PAST_AXIS

__all__ = ["FEWEST_SHAPES", "LONG_TEXT", "CheckShape", "Float64", "check_shapes"]

FEWEST_SHAPES = 4
"""How many shapes must be compared before a graph is called anything."""


class Float64(StrEnum):
    """When the PyTorch model is run in float64 too, which tells its own error."""

    HALF = "half"
    """At the smaller half of the shapes, and elsewhere where it decides."""
    NEEDED = "needed"
    """Where it decides: where an output differs by more than what counts as equal anyway."""
    NEVER = "never"
    """Not at all, which spares the memory for twice its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckShape:
    """One set of sizes to compare at."""

    label: str
    """What it is there to find, for reports."""

    sizes: Mapping[str, int]
    """Dynamic axis -> size in elements."""

    padding: bool = False
    """Whether later rows are padded, with 0 in the mask."""

    seed: int = 0
    """Seed of the values."""

    begins: bool = False
    """Whether nothing came before, so that the states that a model keeps are zeros."""

    doubled: bool = True
    """Whether the model is run in float64 too where that decides; it then takes twice the memory."""

    chosen: bool = True
    """Whether a mask of the tokens that are to be treated otherwise picks any."""


def check_shapes(
    sizes: Mapping[str, int],
    ranges: Mapping[str, tuple[int, int | None]],
    *,
    steps: Mapping[str, int] = MappingProxyType({}),
    masked: bool,
    row_elements: int = 0,
    states: bool = False,
    chooses: bool = False,
    count: int = 0,
    proven: bool = False,
) -> tuple[CheckShape, ...]:
    """Return five shapes or more, none of them the traced one, each axis at two sizes at least.

    Of inputs so large that one row takes seconds, no more than two shapes have the same sizes where four are left so.
    An axis whose range has one size only stays there. Without dynamic axes, or with none that can move, the
    shapes differ in their values only, and four are enough.

    Args:
        sizes: Dynamic axis -> size at which the graph was traced.
        ranges: Dynamic axis -> smallest and largest size allowed.
        steps: Dynamic axis -> what its size must be a multiple of, where that is more than one.
        masked: Whether a mask among the inputs can hide padding.
        row_elements: Numbers in one row of the largest input; where there are many, one shape has three rows and the
            others have one.
        states: Whether the model takes states of a fixed size, so that to begin a text is another matter than to go
            on with one.
        chooses: Whether a second mask among the inputs picks tokens; models look whether it picks any.
        count: How many shapes at least; those beyond the usual ones are of random sizes, the same ones every time.
        proven: Whether the graph was verified at all these shapes with other weights. A long text, half of all tokens,
            is there to find a graph of a text's first chunk alone, which no weights make of it: it is left out.

    >>> [s.label for s in check_shapes({"batch_size": 2}, {"batch_size": (1, None)}, masked=False)]
    ['one row', 'odd sizes', 'smallest sizes', 'large sizes', 'another batch']
    """
    limits = {axis: ranges.get(axis, (1, None)) for axis in sizes}
    # What grows in one way need not in the other, and whoever waits pays for both.
    grows = any(not _is_batch(axis) and low != high for axis, (low, high) in limits.items())
    heavy = row_elements > _MANY_ELEMENTS
    # ONNX Runtime keeps what PyTorch computes as it goes: the attention of each pixel to all others, say.
    few = heavy or any(axis.endswith(_IMAGE_AXES) and low != high for axis, (low, high) in limits.items())
    shapes = [
        CheckShape(label="one row", sizes=_with(sizes, limits, batch=1, other=_medium), seed=1),
        CheckShape(label="odd sizes", sizes=_with(sizes, limits, batch=1 if heavy else 3, other=_odd), seed=2),
        CheckShape(label="smallest sizes", sizes=_with(sizes, limits, batch=1, other=_smallest), seed=3),
        CheckShape(
            label="large sizes",
            sizes=_with(sizes, limits, batch=1 if few else 2 if grows else 5, other=_large),
            seed=4,
        ),
        CheckShape(
            label="another batch",
            sizes=_with(sizes, limits, batch=3 if heavy else 4, other=_traced),
            seed=5,
            doubled=not heavy,
        ),
    ]
    if not proven and (longer := _longer(sizes, limits)):
        one = _with(sizes, limits, batch=1, other=_medium)
        shapes.append(CheckShape(label="a long text", sizes={**one, **longer}, seed=10))
    if masked:
        shapes.append(
            CheckShape(label="padded rows", sizes=_with(sizes, limits, batch=3, other=_medium), padding=True, seed=6)
        )
    if chooses:
        shapes += [
            CheckShape(
                label=label, sizes=_with(sizes, limits, batch=batch, other=change), chosen=False, seed=30 + batch
            )
            for label, batch, change in (("nothing picked", 2, _odd), ("nothing picked in many", 3, _large))
        ]
    if states:
        shapes = [*map(_begun, shapes), *_stepping(sizes, limits, masked=masked)]
    elif PAST_AXIS in sizes:
        shapes += _continued(sizes, limits, masked=masked)
    shapes += _further(sizes, limits, count - len(shapes), masked=masked, begins=states)
    if PAST_AXIS in sizes:
        shapes = [_fitting(shape, limits) for shape in shapes]
    # A graph without dynamic axes can only be compared on other values.
    if not sizes:
        return tuple(shapes[:4] + shapes[5:])
    found = [_whole(shape, steps, limits) for shape in _unlike(_moved(shapes, limits), sizes, limits)]
    return tuple(_told_apart(found) if heavy else found)


def _told_apart(shapes: list[CheckShape]) -> list[CheckShape]:
    """Return the shapes without those that differ from two others in their values only, and the fewest at least."""
    kept: list[CheckShape] = []
    spare = len(shapes) - FEWEST_SHAPES
    for shape in shapes:
        alike = [one for one in kept if replace(one, label=shape.label, seed=shape.seed) == shape]
        if len(alike) < _SAME_SIZES or spare <= 0:
            kept.append(shape)
        else:
            spare -= 1
    return kept


def _longer(sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]]) -> dict[str, int]:
    """Return lengths that hold several chunks of a model that works through a text by chunks.

    A graph of its first chunk alone is right up to there, and at none of the sizes next to that of the trace would it
    be anything else.
    """
    found = {}
    for axis, traced in sizes.items():
        high = limits[axis][1]
        length = LONG_TEXT if high is None else min(LONG_TEXT, high)
        if axis.endswith("sequence_length") and axis != PAST_AXIS and length > _large.plain(traced):
            found[axis] = length
    return found


def _continued(
    sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]], *, masked: bool
) -> Iterator[CheckShape]:
    """Yield how a text is read, and how it is gone on with."""
    begun = _with(sizes, limits, batch=2, other=_medium)
    yield CheckShape(label="nothing before", sizes={**begun, PAST_AXIS: 0}, padding=masked, seed=7)
    if masked:
        # Where nothing is hidden and nothing came before, transformers makes no mask at all, and some models then see
        # what they would not see otherwise.
        alone = _with(sizes, limits, batch=1, other=_medium)
        yield CheckShape(label="nothing before, nothing hidden", sizes={**alone, PAST_AXIS: 0}, seed=9)
    one = {axis: max(1, limits[axis][0]) for axis in sizes if axis.endswith("sequence_length")}
    yield CheckShape(
        label="one token after many", sizes={**begun, **one, PAST_AXIS: _LONG_PAST}, padding=masked, seed=8
    )


def _further(
    sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]], count: int, *, masked: bool, begins: bool
) -> Iterator[CheckShape]:
    """Yield ``count`` shapes of sizes that nobody chose, every other one padded where a mask can say so."""
    random = Random(0)
    for number in range(count):
        change = _Change(random.uniform(0.1, _MOST_RANDOM), random.randrange(5))
        yield CheckShape(
            label=f"random {number + 1}",
            sizes=_with(sizes, limits, batch=random.choice((1, 1, 2, 3)), other=change),
            padding=masked and number % 2 == 1,
            seed=100 + number,
            begins=begins,
        )


def _begun(shape: CheckShape) -> CheckShape:
    """Return ``shape`` with nothing in the past."""
    return replace(shape, begins=True, sizes={axis: 0 if axis == PAST_AXIS else n for axis, n in shape.sizes.items()})


def _stepping(
    sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]], *, masked: bool
) -> Iterator[CheckShape]:
    """Yield how a text is gone on with by a model that keeps states."""
    one = {axis: max(1, limits[axis][0]) for axis in sizes if axis.endswith("sequence_length")}
    for number, (label, batch, length, past) in enumerate(_STEPS):
        changed = one if length == 1 else {axis: size + length for axis, size in one.items()}
        past_of = {PAST_AXIS: past} if PAST_AXIS in sizes else {}
        padding = masked and bool(past_of) and batch > 1
        yield CheckShape(
            label=label,
            sizes={**_with(sizes, limits, batch=batch, other=_medium), **changed, **past_of},
            padding=padding,
            seed=7 + number,
        )


def _fitting(shape: CheckShape, limits: Mapping[str, tuple[int, int | None]]) -> CheckShape:
    """Return ``shape`` with no more in the past than leaves room for the new steps."""
    steps = "decoder_sequence_length" if "decoder_sequence_length" in shape.sizes else "sequence_length"
    most = limits.get(steps, (1, None))[1]
    if most is None:
        return shape
    room = max(0, most - shape.sizes.get(steps, 0))
    return replace(shape, sizes={**shape.sizes, PAST_AXIS: min(shape.sizes[PAST_AXIS], room)})


def _whole(shape: CheckShape, steps: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]]) -> CheckShape:
    """Return ``shape`` with every size a multiple of its step, rounded up where there is room."""
    sizes = dict(shape.sizes)
    for axis, step in steps.items():
        if axis in sizes:
            high = limits[axis][1]
            size = -(-sizes[axis] // step) * step
            sizes[axis] = size if high is None or size <= high else high // step * step
    return replace(shape, sizes=sizes)


def _with(
    sizes: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]], *, batch: int, other: _Change
) -> dict[str, int]:
    chosen = {}
    batches = 0
    for axis, traced in sorted(sizes.items()):
        low, high = limits[axis]
        if _is_batch(axis):
            # Two batches in one model (texts and images) are never of one size, but for the single row.
            # Rows that come in groups are as many groups.
            size = low * (batch if batch == 1 else batch + batches)
            batches += 1
        elif axis.endswith(_IMAGE_AXES):
            size = other.image(traced)
        else:
            size = other.plain(traced)
        chosen[axis] = max(low, size if high is None else min(size, high))
    return chosen


def _is_batch(axis: str) -> bool:
    return axis.endswith("batch_size")


@dataclass(frozen=True, slots=True)
class _Change:
    """How the axes other than the batch differ from the traced ones; a factor of zero: as small as can be."""

    factor: float
    offset: int = 0
    image_offset: int = 0

    def plain(self, traced: int) -> int:
        return int(traced * self.factor) + self.offset

    def image(self, traced: int) -> int:
        # Many image models take multiples of 32 only, or pad to them: one shape of all tries another size.
        if not self.factor or traced < _IMAGE_STEP:
            return self.plain(traced)
        # Attention over all pixels grows with the square of their number.
        size = int(traced * min(self.factor, _LARGEST_IMAGE))
        size = (size + _IMAGE_STEP - 1 if size > traced else size) // _IMAGE_STEP * _IMAGE_STEP
        return max(_IMAGE_STEP, size) + self.image_offset


_LONG_PAST = 33
# The usual shapes have the large sizes; many more of those would cost more than they tell.
_MOST_RANDOM = 1.4
LONG_TEXT = 300
"""The longest text that is compared: chunks are of 64, of 128 or of 256 tokens, and this is a multiple of none."""
_STEPS = (("one token", 1, 1, 5), ("one token after many", 2, 1, _LONG_PAST), ("more tokens after some", 3, 4, 9))
# An image of 800 pixels each way: what is computed of five such takes gigabytes.
_MANY_ELEMENTS = 3 * 800**2
_SAME_SIZES = 2
_IMAGE_AXES = ("height", "width")
_IMAGE_STEP = 32
_LARGEST_IMAGE = 1.5
_traced = _Change(1.0)
_medium = _Change(0.75, 1)
_odd = _Change(1.0, 7, 5)
_large = _Change(2.0, 9)
_smallest = _Change(0.0)


def _candidates(axis: str, size: int, limits: Mapping[str, tuple[int, int | None]]) -> Iterator[int]:
    """Yield sizes of ``axis`` other than ``size``, the most likely to be accepted first."""
    low, high = limits[axis]
    steps = (*((_IMAGE_STEP, -_IMAGE_STEP) if axis in _IMAGE_AXES else ()), 1, -1, 2, -2)
    yield from (size + step for step in steps if low <= size + step and (high is None or size + step <= high))


def _moved(shapes: list[CheckShape], limits: Mapping[str, tuple[int, int | None]]) -> list[CheckShape]:
    """Return ``shapes`` with each axis at two sizes at least, and images not only at multiples of 32."""
    odd = shapes[1]
    for axis, (low, high) in limits.items():
        found = {shape.sizes[axis] for shape in shapes}
        at = odd.sizes[axis]
        if axis in _IMAGE_AXES and all(size % _IMAGE_STEP == 0 for size in found):
            wanted = next((s for s in (at + 5, at + 1, at - 1) if low <= s and (high is None or s <= high)), at)
        elif len(found) == 1:
            wanted = next(_candidates(axis, at, limits), at)
        else:
            continue
        odd = replace(odd, sizes={**odd.sizes, axis: wanted})
    return [shapes[0], odd, *shapes[2:]]


def _unlike(
    shapes: list[CheckShape], traced: Mapping[str, int], limits: Mapping[str, tuple[int, int | None]]
) -> list[CheckShape]:
    """Return ``shapes`` with one axis moved in each that is the traced one, if any axis can move.

    Moved is rather an axis that keeps two sizes over all shapes.
    """
    changed = list(shapes)
    for number, shape in enumerate(shapes):
        if dict(shape.sizes) != dict(traced):
            continue
        others = changed[:number] + changed[number + 1 :]
        moves = [
            (len({size, *(o.sizes[axis] for o in others)}) > 1, axis, size)
            for axis in sorted(traced, key=lambda a: not _is_batch(a))
            for size in _candidates(axis, traced[axis], limits)
        ]
        if moves:
            _, axis, size = next((m for m in moves if m[0]), moves[0])
            changed[number] = replace(shape, sizes={**shape.sizes, axis: size})
    return changed

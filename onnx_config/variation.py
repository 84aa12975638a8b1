"""Which axes are dynamic: one axis at a time is varied, and what moves with it is tied to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from onnx_config.config_sizes import modality_of
from onnx_config.draft import DEFAULT_SIZES, IMAGE_AXES, Draft, is_batch
from onnx_config.probe import ProbeResult
from onnx_config.refusals import token_counts

__all__ = ["Moved", "Shapes", "grow_unseen_axes", "vary_axes"]

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
Moved = dict[str, tuple[int, Shapes]]
Run = Callable[[Mapping[str, int]], ProbeResult]

_GROWTHS = (4, 16)
_LARGE_SIDE = 512
"""Pixels of a side from which half as many more take seconds to run."""
_LARGE_GROWTH = 128
"""Pixels by which such a side grows first."""


def vary_axes(draft: Draft, run: Run) -> Moved:
    """Vary each axis of a settled draft; fix or tie those that cannot move alone, and find the smallest sizes.

    ``run`` calls the model at sizes. Changes ``draft``. Returns, per axis that moves, its second size and the
    outputs there.
    """
    _split_rows(draft, run)
    moved: Moved = {}
    for axis in draft.axes():
        if axis not in draft.axes():  # tied to one before
            continue
        found = _another(draft, axis, run)
        if isinstance(found, tuple):
            moved[axis] = found
            continue
        if (tied := _tied(draft, axis, run, known=moved)) is not None:
            moved[axis] = tied
            continue
        if axis not in draft.axes():
            continue
        size = draft.sizes[axis]
        draft.freeze(axis)
        if found is not None and not found.undecidable:
            draft.learned.append(f"{axis} is fixed at {size}: {found.refusal}"[:300])
    _find_smallest(draft, [axis for axis in moved if axis in draft.axes()], run)
    return moved


def grow_unseen_axes(draft: Draft, moved: Moved, outputs: Shapes, run: Run) -> None:
    """Make axes longer that no output shows, where what is made of them may be one step only at these sizes.

    Of a sound of two frames an encoder makes one step, and so it does of three. A graph that is traced there takes one
    step for granted, as tracing does with every size of one. Changes ``draft.sizes``.
    """
    if not _single_steps(outputs):
        return
    read = [spec for name, spec in draft.specs.items() if modality_of(name) == "text" and not name.endswith("mask")]
    texts = {axis for spec in read for axis in spec.axis_names}
    for axis, (_, there) in moved.items():
        if is_batch(axis) or axis not in draft.sizes or axis in IMAGE_AXES:
            continue
        # Of a text, no step is made of many tokens where others are made of one.
        if _shapes(there) != _shapes(outputs) and (axis in texts or not _single_steps(outputs) & _single_steps(there)):
            continue
        most = draft.ranges()[axis][1]
        for factor in _GROWTHS:
            size = draft.sizes[axis] * factor
            longer = None if most is not None and size > most else run({**draft.sizes, axis: size}).outputs
            if longer is not None and _single_steps(longer) < _single_steps(outputs) & _single_steps(there):
                draft.sizes[axis] = size
                break


def _single_steps(outputs: Shapes) -> set[tuple[str, int]]:
    """Return where outputs have one step, by name and axis; rows, which come first, are none."""
    return {
        (name, position)
        for name, (shape, _) in outputs.items()
        for position, size in enumerate(shape)
        if position and size == 1
    }


def _shapes(outputs: Shapes) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in outputs.items()}


def _split_rows(draft: Draft, run: Run) -> None:
    """Let texts and images, or sounds, be of different numbers where the model compares each with each.

    Then it returns a table of scores, one side for each. That it returns anything is not enough: a decoder may reshape
    another number of sounds into something that fits.
    """
    kinds = {name: modality_of(name) for name in draft.specs}
    shared = {kinds[name] for name, spec in draft.specs.items() if "batch_size" in spec.axis_names}
    if len(shared) < 2 or "text" not in shared or draft.rules:
        return
    specs, sizes = dict(draft.specs), dict(draft.sizes)
    for name, spec in specs.items():
        shape = tuple(f"{kinds[name]}_batch_size" if axis == "batch_size" else axis for axis in spec.shape)
        draft.specs[name] = replace(spec, shape=shape)
    rows = sizes["batch_size"]
    draft.sizes.update({f"{kind}_batch_size": rows if kind == "text" else rows + 1 for kind in shared})
    outputs = run(draft.sizes).outputs or {}
    if not any(sorted(shape) == [rows, rows + 1] for shape, _ in outputs.values()):
        draft.specs, draft.sizes = specs, sizes


def _another(draft: Draft, axis: str, run: Run) -> tuple[int, Shapes] | ProbeResult | None:
    """Return a second size and the outputs there, else the first refusal; ``None`` if there is no room."""
    first: ProbeResult | None = None
    for size in _other_sizes(axis, draft.sizes[axis], draft.ranges()[axis][1]):
        result = run({**draft.sizes, axis: size})
        if result.outputs is None and _scale_placeholders(draft, axis, size, result.refusal or ""):
            result = run({**draft.sizes, axis: size})
        if result.outputs is not None:
            # A second size may be a multiple of the step by chance, of an image's sides also on purpose.
            if first is not None or axis in draft.steps or axis in IMAGE_AXES:
                step = _step(draft, axis, run)
                if step > 1:
                    draft.steps[axis] = step
            return size, result.outputs
        first = first or result
    return _shorter(draft, axis, run) or first


def _shorter(draft: Draft, axis: str, run: Run) -> tuple[int, Shapes] | None:
    """Return a smaller size and the outputs there, where only larger ones are refused."""
    size = draft.sizes[axis]
    smaller = size * 2 // 3
    if axis.endswith(IMAGE_AXES) or is_batch(axis) or smaller < 1 or axis in draft.steps:
        return None
    result = run({**draft.sizes, axis: smaller})
    if result.outputs is None:
        return None
    draft.most[axis] = size
    return smaller, result.outputs


def _step(draft: Draft, axis: str, run: Run) -> int:
    """Return the smallest number of elements that the size of ``axis``, a multiple of it, can grow by."""
    size = draft.sizes[axis]
    for step in (s for s in range(1, size) if size % s == 0):
        if run({**draft.sizes, axis: size + step}).outputs is not None:
            return step
    return size


def _scale_placeholders(draft: Draft, axis: str, size: int, refusal: str) -> bool:
    """Let the placeholders in a text follow an axis that as many more features came with; return whether they do."""
    counts = token_counts(refusal)
    rule = draft.rules.get("input_ids")
    base = draft.sizes[axis]
    if counts is None or rule is None or counts[1] * size != counts[2] * base:
        return False
    tokens = tuple(
        (token, count // base, axis) if scale is None and not count % base else (token, count, scale)
        for token, count, scale in rule.tokens
    )
    draft.rules["input_ids"] = replace(rule, tokens=tokens)
    text = draft.specs["input_ids"].shape[-1]
    if isinstance(text, str):
        needed = 2 + sum(count for _, count in draft.rules["input_ids"].placeholders({**draft.sizes, axis: size}))
        draft.sizes[text] = max(draft.sizes[text], needed + 3)
    return tokens != rule.tokens


def _tied(draft: Draft, axis: str, run: Run, *, known: Moved) -> tuple[int, Shapes] | None:
    """Find an axis that moves in step with ``axis`` and give both one name."""
    size = draft.sizes[axis]
    for other in draft.axes():
        if other == axis or other in known:
            continue
        base = draft.sizes[other]
        for longer in _other_sizes(axis, size, draft.ranges()[axis][1]):
            if longer * base % size:
                continue
            result = run({**draft.sizes, axis: longer, other: longer * base // size})
            if result.outputs is None:
                continue
            # Of two names for one size, the one that every model has stays.
            better = base == size and other in DEFAULT_SIZES and axis not in DEFAULT_SIZES
            if base % size == 0 and not better:
                draft.learned.append(f"{other} moves with {axis}")
                draft.tie(other, axis if base == size else f"{base // size}*{axis}")
                return longer, result.outputs
            if size % base == 0:
                draft.learned.append(f"{axis} moves with {other}")
                draft.tie(axis, other if base == size else f"{size // base}*{other}")
                known[other] = (longer * base // size, result.outputs)
                return None
    return None


def _other_sizes(axis: str, size: int, largest: int | None) -> Iterator[int]:
    """Yield second sizes for an axis, by which an output's dependence shows."""
    if axis in IMAGE_AXES:
        # A multiple of 32, the usual product of a vision model's strides; of a large image by no more than shows.
        other = max(32, size * 3 // 2 // 32 * 32)
        sizes = [other + 32 if other == size else other, size * 2]
        if size >= _LARGE_SIDE:
            sizes = [size + _LARGE_GROWTH, *([size * 3 // 2] if size % 2 == 0 else []), size * 2]
    else:
        sizes = [size * 3 // 2 if size > 1000 else size + 5 if size > 5 else size + 1, size * 2]
    fitting = [s for s in sizes if largest is None or s <= largest]
    yield from fitting or ([size - 1] if size > 1 else [])


def _find_smallest(draft: Draft, axes: Sequence[str], run: Run) -> None:
    """Find the smallest size of each axis at which the model accepts its inputs."""

    def accepts(**sizes: int) -> bool:
        result = run({**draft.sizes, **sizes})
        return result.outputs is not None or result.undecidable

    least = {axis: min(max(draft.smallest.get(axis, 1), draft.steps.get(axis, 1)), draft.sizes[axis]) for axis in axes}
    if not axes or accepts(**least):
        draft.smallest.update(least)
        return
    guess = 1
    # Rows are hardly ever what is too small.
    for axis in sorted(axes, key=is_batch):
        # Height and width, say, mostly have one limit.
        if 1 < guess <= draft.sizes[axis] and accepts(**{axis: guess}) and not accepts(**{axis: guess - 1}):
            draft.smallest[axis] = guess
            continue
        draft.smallest[axis] = guess = _bisect(
            axis, (least[axis], draft.sizes[axis]), accepts, step=draft.steps.get(axis, 1)
        )
    # Each alone is large enough beside the others' usual sizes; all of them together need not be.
    for rows, part in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 2), (3, 3)):
        together = {axis: _between(draft, axis, rows if is_batch(axis) else part) for axis in axes}
        if accepts(**together):
            draft.smallest.update(together)
            return


def _between(draft: Draft, axis: str, part: int) -> int:
    """Return a size ``part`` quarters of the way from the smallest to the usual one."""
    least, step = draft.smallest[axis], draft.steps.get(axis, 1)
    return min(draft.sizes[axis], least + -(-(draft.sizes[axis] - least) * part // (4 * step)) * step)


def _bisect(axis: str, between: tuple[int, int], accepts: Callable[..., bool], *, step: int) -> int:
    """Return the smallest multiple of ``step`` between two sizes that is accepted; the larger one is."""
    low, high = between
    if accepts(**{axis: low}):
        return low
    refused, accepted = low // step, high // step
    while accepted - refused > 1:
        middle = (refused + accepted) // 2
        refused, accepted = (refused, middle) if accepts(**{axis: middle * step}) else (middle, accepted)
    return accepted * step

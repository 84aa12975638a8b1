"""What a model is traced with: inputs of sizes that stand for all sizes, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from onnx_config.export.escapes import Escapes
    from onnx_config.export.limits import AxisLimit
    from onnx_config.export.ties import TieWatch
    from onnx_config.export.trace import Trace

__all__ = [
    "SIDES",
    "Sample",
    "escapes_at",
    "image_size_of",
    "sample_of",
    "tensors_of",
    "ties_in_padding",
    "trace_sample",
    "uneven_sizes",
]

SIDES = ("height", "width")
"""Ends of the names of axes that are an image's."""

EscapesAt = Callable[[ModelSpec, Mapping[str, int]], "tuple[Mapping[str, torch.Tensor], Escapes]"]

_UNEVEN_LENGTH = 19
_SHORTER = 3
_MOST_CHUNK_LENGTHS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Inputs that a model takes, and what came of them."""

    sizes: Mapping[str, int]
    """Dynamic axis -> size."""

    inputs: Mapping[str, torch.Tensor]

    returned: tuple[str, ...]
    """Names of the outputs, in the model's order."""

    watch: TieWatch
    """Whether it chose among values, and among equal ones."""

    image_size: tuple[int, int] | None
    """Height and width that images are brought to; ``None``: no file says."""

    def kept(self, spec: ModelSpec) -> list[str]:
        """Return which outputs a graph keeps: those that the spec names, or all where it returns none of them."""
        expected = {tensor.name for tensor in spec.outputs}
        return [name for name in self.returned if name in expected] or list(self.returned)

    def notes(self, spec: ModelSpec) -> list[str]:
        """Return what the spec says of the outputs and this checkpoint does not keep."""
        lost = [tensor.name for tensor in spec.outputs if tensor.name not in self.returned]
        return [f"{name} is declared, yet this checkpoint does not return it" for name in lost]


def sample_of(spec: ModelSpec, universal: Any, model: Any, folder: Path, *, fixed: Iterable[str] = ()) -> Sample:
    """Run ``model`` on inputs that it takes; return them and what it did.

    Args:
        spec: What it takes.
        universal: Its configuration.
        model: The loaded model; it is the same after the call.
        folder: The model's folder, where preprocessors say which size images are brought to.
        fixed: Axes that the graph will hold at the sample's size.

    Raises:
        ModelError: If images of no particular size would be fixed (``export_failed``), or the model refuses what its
            declarations suggest (``unsupported``).
    """
    import torch

    from onnx_config.export.ties import TieWatch
    from onnx_config.export.trace import NO_SIZE
    from onnx_config.module_state import preserved_state
    from onnx_config.probe import flat_outputs

    sides = {axis for axis in spec.axis_ranges if axis.endswith(SIDES)}
    size = image_size_of(spec, universal, folder)
    fixed = tuple(fixed)
    if size is None and sides & set(fixed):
        raise ModelError(
            f"The graph of {spec.architecture} holds for images of the traced size only. {NO_SIZE}",
            kind=ErrorKind.EXPORT_FAILED,
        )
    tried: list[Mapping[str, int]] = [uneven_sizes(spec, fixed), spec.sizes]
    if size is not None and set(SIDES) <= sides:
        # An image whose size has to be fixed is to have the one that it will be brought to.
        tried.insert(0, {**tried[0], **dict(zip(SIDES, size, strict=True))})
    while True:
        sizes = tried.pop(0)
        inputs = tensors_of(spec, universal, sizes)
        try:
            # A model that adapts itself to the sizes it meets would be traced as it is after that.
            with torch.no_grad(), preserved_state(model), TieWatch() as watch:
                returned = [name for name, _ in flat_outputs(model(**inputs, **universal.forward_flags))]
        # The model's own code decides what it raises on inputs that it does not take.
        except Exception as error:
            if tried:
                continue
            raise ModelError(
                f"{spec.architecture} refuses the inputs that its declarations suggest "
                f"({', '.join(f'{n} {list(t.shape)}' for n, t in inputs.items())}): {type(error).__name__}: {error}",
                kind=ErrorKind.UNSUPPORTED,
            ) from error
        return Sample(sizes=sizes, inputs=inputs, returned=tuple(returned), watch=watch, image_size=size)


def trace_sample(
    spec: ModelSpec,
    universal: Any,
    model: Any,
    sample: Sample,
    *,
    turns: Iterable[AxisLimit] = (),
    escapes: EscapesAt | None = None,
    **options: Any,
) -> Trace:
    """Trace ``model`` with its sample, for the outputs of its spec.

    A model that keeps states computes otherwise where it goes on with one token, for which it is traced once more; so
    is one that decides by the values of its inputs.

    Args:
        spec: What the model takes and gives.
        universal: Its configuration.
        model: The loaded model.
        sample: What it is traced with.
        turns: Sizes after which it computes in another way, for which it is traced, too.
        escapes: Returns inputs to trace with, and what the model's code reads on them; ``None``: not known.
        **options: As of `trace_model`.
    """
    from onnx_config.export.decisions import by_decision
    from onnx_config.export.escapes import DecisionError
    from onnx_config.export.granted import condition_name
    from onnx_config.export.one_token import ONE_TOKEN, one_token_spec
    from onnx_config.export.rows import joined_outputs
    from onnx_config.export.trace import trace_model
    from onnx_config.export.turns import in_two_ways, size_beyond, size_within

    def trace(
        spec: ModelSpec, sizes: Mapping[str, int], inputs: Mapping[str, torch.Tensor], lengths: Collection[int] = ()
    ) -> Trace:
        def traced(inputs: Mapping[str, torch.Tensor], **known: Any) -> Trace:
            return trace_model(
                model,
                inputs,
                spec.inputs,
                sample.kept(spec),
                axis_ranges=spec.axis_ranges,
                flags=universal.forward_flags,
                sides=sample.image_size is not None,
                lengths=lengths,
                joined=joined_outputs(spec.outputs, spec.axis_ranges),
                **known,
                **options,
            )

        try:
            return traced(inputs, escapes=None if escapes is None else lambda: escapes(spec, sizes))
        except ModelError as error:
            ways = error.__cause__.ways if isinstance(error.__cause__, DecisionError) else None
            if ways is None:
                raise
        first = traced(ways[0].feed, reading=ways[0].reading, decides=ways[0].decides)
        second = traced(ways[1].feed, reading=ways[1].reading)
        said = f"the graph decides by the values of its inputs as the model does ({ways[0].decides}, or not)"
        return replace(
            first,
            model=by_decision(first.model, second.model, condition_name(ways[0].decides)),
            notes=tuple(dict.fromkeys((*first.notes, *second.notes, said))),
            untried=tuple(sorted({*first.untried, *second.untried})),
        )

    found = _of_any_number_of_chunks(trace, spec, universal, sample, fixed=options.get("fixed", ()))
    traced = {**sample.sizes, **found.sizes}
    for turn in (*turns, *((ONE_TOKEN,) if spec.states else ())):
        beyond = turn.bound >= traced[turn.axis]
        other = one_token_spec(spec, turn.axis) if turn.bound == 1 else spec
        size = size_beyond(turn, spec.axis_ranges[turn.axis][1]) if beyond else size_within(turn)
        sizes = {**traced, turn.axis: size}
        way = trace(other, sizes, tensors_of(other, universal, sizes))
        few, many = (found, way) if beyond else (way, found)
        found = replace(
            found,
            model=in_two_ways(few.model, many.model, turn, spec.inputs),
            notes=(*found.notes, *(note for note in way.notes if note not in found.notes)),
            # Models with states are compared at one token and at more in any case.
            untried=found.untried if turn is ONE_TOKEN else _untried_together(few, many, turn),
        )
    return found


def _of_any_number_of_chunks(
    trace: Callable[..., Trace], spec: ModelSpec, universal: Any, sample: Sample, *, fixed: Iterable[str]
) -> Trace:
    """Return a trace of a text that is more than one chunk, where the model works by chunks and such a trace is made.

    Args:
        trace: Makes a trace of a spec, of sizes, of inputs, and of the sizes that are to be of more than one chunk.
        spec: What the model takes.
        universal: Its configuration.
        sample: What is traced at first.
        fixed: Axes that stay as the sample has them.
    """
    from onnx_config.export.limits import AxisLimit
    from onnx_config.export.one_chunk import OneChunkError
    from onnx_config.export.shapes import LONG_TEXT
    from onnx_config.export.turns import size_beyond

    free = {axis for axis in sample.sizes if axis.endswith("sequence_length")} - set(fixed)
    sizes, inputs = dict(sample.sizes), sample.inputs
    beyond: dict[str, int] = {}

    def to_try(found: Trace, least: int) -> Trace:
        """Return a trace of which the first texts that are longer than a chunk are still to be tried."""
        return replace(found, untried=(*found.untried, *((a, n) for a, n in beyond.items() if n > least)))

    for _ in range(_MOST_CHUNK_LENGTHS):
        try:
            found = trace(spec, sizes, inputs, {sizes[axis] for axis in free})
            # Nobody compares longer ones than this otherwise.
            return to_try(replace(found, sizes=sizes), LONG_TEXT)
        except OneChunkError as error:
            ends = {axis: spec.axis_ranges.get(axis, (1, None))[1] for axis in free if sizes[axis] == error.size}
            ends = {axis: end for axis, end in ends.items() if end is None or end > error.most}
            if not ends:
                break
            beyond = dict.fromkeys(ends, error.most + 1)
            for axis, end in ends.items():
                step = spec.axis_steps.get(axis, 1)
                sizes[axis] = -(-size_beyond(AxisLimit(axis=axis, most=error.most), end) // step) * step
            inputs = tensors_of(spec, universal, sizes)
        except ModelError:
            if sizes == sample.sizes:
                raise
            break
    # The model takes no longer text, or cannot be traced with one: what holds within the first chunk is told apart.
    return to_try(trace(spec, sample.sizes, sample.inputs), 0)


def _untried_together(few: Trace, many: Trace, turn: AxisLimit) -> tuple[tuple[str, int], ...]:
    """Return what of two ways is still to be tried: what neither holds for, and the sizes next to the turn."""
    low = [(axis, size) for axis, size in few.untried if axis != turn.axis or size <= turn.bound]
    high = [(axis, size) for axis, size in many.untried if axis != turn.axis or size > turn.bound]
    return tuple(sorted({*low, *high, (turn.axis, turn.bound), (turn.axis, turn.bound + 1)}))


def tensors_of(
    spec: ModelSpec,
    universal: Any,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    padding: bool = False,
    chosen: bool = True,
) -> dict[str, torch.Tensor]:
    """Return the inputs of the spec at ``sizes``, by name.

    Later rows are padded where ``padding`` is true, and a second mask picks no token where ``chosen`` is not.
    """
    import torch

    from onnx_config.input_generator import generate_inputs

    arrays = generate_inputs(
        spec.inputs,
        universal.config,
        universal.declaration,
        sizes,
        rules=spec.values,
        seed=seed,
        padding=padding,
        chosen=chosen,
    )
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def ties_in_padding(spec: ModelSpec, universal: Any, model: Any, sizes: Mapping[str, int]) -> bool:
    """Return whether padded rows make a top-k choose among equal values: a padding token's embedding is mostly zero."""
    import torch

    from onnx_config.export.ties import TieWatch
    from onnx_config.module_state import preserved_state

    if not any(tensor.name.endswith("mask") for tensor in spec.inputs):
        return False
    inputs = tensors_of(spec, universal, sizes, padding=True)
    with torch.no_grad(), preserved_state(model), TieWatch() as watch:
        try:
            model(**inputs, **universal.forward_flags)
        # The model's own code decides what it raises on inputs that it does not take.
        except Exception:  # noqa: BLE001
            return False
    return bool(watch.seen)


def image_size_of(spec: ModelSpec, universal: Any, folder: Path) -> tuple[int, int] | None:
    """Return the size that images are brought to, where a file of the model says so."""
    from onnx_config.config_sizes import image_size
    from onnx_config.preprocessors import image_size_in
    from onnx_config.tile_models import arrangement_of

    if arrangement_of(spec) is not None and any(set(SIDES) <= set(tensor.shape) for tensor in spec.inputs):
        # Each at its own size: one size is of no use, and the largest takes gigabytes to trace.
        return None
    if universal.source is not None:
        # Another library's: its sizes are those of the spec.
        return spec.sizes.get("height", 0), spec.sizes.get("width", 0)
    return image_size(universal.config) or image_size_in(folder)


def escapes_at(spec: ModelSpec, universal: Any, model: Any, sizes: Mapping[str, int]) -> tuple[Any, Escapes]:
    """Return inputs to trace with, and what the model's code reads on them and at the sizes of the checks.

    Later rows are padded in them, since code that looks whether anything is takes the way for all only then; the same
    is read of inputs of these sizes with nothing padded, and with nothing picked.
    """
    from onnx_config.export.escapes import escapes_of
    from onnx_config.export.shapes import CheckShape, check_shapes
    from onnx_config.input_generator import picks_tokens, with_room
    from onnx_config.module_state import preserved_state

    masked = any(tensor.name.endswith("mask") for tensor in spec.inputs)
    picks = picks_tokens(spec.inputs)
    first, *beside = (
        CheckShape(label="traced", sizes=sizes, padding=padding, chosen=chosen)
        for padding in ((True, False) if masked else (False,))
        for chosen in ((True, False) if picks else (True,))
    )
    shapes = [first]
    for shape in check_shapes(
        sizes, spec.axis_ranges, steps=spec.axis_steps, masked=masked, states=bool(spec.states), chooses=picks
    ):
        room = with_room(spec.inputs, spec.values, {**spec.sizes, **shape.sizes})
        shapes.append(replace(shape, sizes=room))

    def tensors(shape: CheckShape) -> Mapping[str, torch.Tensor]:
        return tensors_of(spec, universal, shape.sizes, seed=shape.seed, padding=shape.padding, chosen=shape.chosen)

    feeds, others = list(map(tensors, shapes)), list(map(tensors, beside))
    with preserved_state(model):
        return feeds[0], escapes_of(lambda feed: model(**feed, **universal.forward_flags), feeds, beside=others)


def uneven_sizes(spec: ModelSpec, fixed: Iterable[str]) -> dict[str, int]:
    """Return the sizes to trace at, each length of a text an odd one that is no multiple of anything.

    A model that fills its sequence up to whole chunks, windows or blocks takes a branch of its own where there is
    nothing to fill up, and so would its graph. What comes in groups comes in two of them: of one, torch takes for
    granted that there is one.
    """
    uneven = {}
    for axis, size in spec.sizes.items():
        high = spec.axis_ranges.get(axis, (1, None))[1]
        free = axis.endswith("sequence_length") and axis not in fixed
        uneven[axis] = _UNEVEN_LENGTH if free and size < _UNEVEN_LENGTH <= (high or _UNEVEN_LENGTH) else size
        if free and size == high and size > _SHORTER:
            # Nor is it the longest one, which some models take as it is and bring all others to.
            uneven[axis] = size - _SHORTER
        if axis not in fixed and size == spec.axis_steps.get(axis):
            uneven[axis] = 2 * size
    return uneven

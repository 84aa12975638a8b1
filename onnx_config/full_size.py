"""From what a shrunken twin showed to what the full model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnx_config.draft import IMAGE_AXES
from onnx_config.shape_inference import Inference
from onnx_config.spec import TensorSpec, ValueRule

if TYPE_CHECKING:
    from onnx_config.probe import Probe, ProbeResult
    from onnx_config.twin import Twin

__all__ = ["answer_at_full_size", "at_full_size", "is_confirmed", "with_full_widths", "with_larger_images"]

_TELLING_SIZE = 8
_TEXT = ("input_ids", "attention_mask")
_GROWTHS = (2, 4, 8)


def answer_at_full_size(
    found: Inference, twin: Twin, *, shallow: Callable[[], Probe], full: Probe, flags: Mapping[str, Any]
) -> ProbeResult:
    """Return what the full model says, on shapes alone, to the inputs that ``twin`` accepted.

    A shallow model answers as the full one does, sooner, unless it gives fewer outputs than the full one has layers:
    then the full one is asked.

    Args:
        found: What the twin showed.
        twin: The twin.
        shallow: Builds the model with the twin's depth and the full model's widths.
        full: The full model.
        flags: Further keyword arguments of ``forward``.
    """
    shapes = {tensor.name: (tensor.resolve(found.sizes), tensor.dtype) for tensor in found.inputs}
    answer = _answer(found, shapes, twin, shallow=shallow, full=full, flags=flags)
    text = found.values.get("input_ids", ValueRule())
    if answer.undecidable and text.places is not None:
        # Where images go into a text shows in values only; a text alone has outputs of the same sizes.
        alone = {name: shapes[name] for name in shapes if name in _TEXT}
        by_text = _answer(found, alone, twin, shallow=shallow, full=full, flags=flags)
        return answer if by_text.outputs is None else by_text
    return answer


def with_full_widths(found: Inference, twin: Twin) -> Iterator[Inference]:
    """Yield what a twin showed with its inputs as wide as the full model's, where that was cut: embeddings, say."""
    inputs = tuple(replace(t, shape=tuple(_translated(size, twin) for size in t.shape)) for t in found.inputs)
    if inputs != found.inputs:
        yield replace(found, inputs=inputs)


def with_larger_images(found: Inference) -> Iterator[Inference]:
    """Yield what a twin showed at larger images, which are also the smallest then.

    A detector picks as many places of an image as it has queries, and the full model has more of those than the twin.
    """
    sides = [axis for axis in found.sizes if axis.endswith(IMAGE_AXES)]
    for factor in _GROWTHS if sides else ():
        sizes = {axis: found.sizes[axis] * factor for axis in sides}
        most = {axis: found.axis_ranges[axis][1] for axis in sides}
        if all(high is None or sizes[axis] <= high for axis, high in most.items()):
            ranges = {axis: (sizes[axis], most[axis]) for axis in sides}
            yield replace(found, sizes={**found.sizes, **sizes}, axis_ranges={**found.axis_ranges, **ranges})


def _answer(
    found: Inference,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    twin: Twin,
    *,
    shallow: Callable[[], Probe],
    full: Probe,
    flags: Mapping[str, Any],
) -> ProbeResult:
    by_layer = any("." in tensor.name for tensor in found.outputs)
    answer = None
    if twin.shallow is not None and not by_layer:
        # The class may refuse to be built shallow: the full one was built.
        with suppress(Exception):
            answer = shallow().run(shapes, **flags)
    if answer is not None and (answer.outputs is not None or answer.undecidable):
        return answer
    return full.run(shapes, **flags)


def is_confirmed(found: Inference, answer: ProbeResult) -> bool:
    """Return whether the full model says to the twin's inputs what the twin said, as far as shapes alone tell."""
    if answer.outputs is None:
        return answer.undecidable
    return all(
        tensor.name in answer.outputs
        and len(shape := answer.outputs[tensor.name][0]) == len(tensor.shape)
        and all(shape[position] == found.sizes.get(axis, shape[position]) for position, axis in tensor.axes.items())
        for tensor in found.outputs
    )


def at_full_size(found: Inference, twin: Twin, answer: ProbeResult) -> Inference:
    """Return what ``twin`` showed with the output sizes of the full model.

    Where shapes alone could not answer, since the answer depends on values, a size is translated by what was shrunk,
    and that is noted as assumed.

    Args:
        found: What the twin showed.
        twin: The twin.
        answer: What the full model said, as `answer_at_full_size` gives it.
    """
    if answer.outputs is None:
        outputs = tuple(replace(t, shape=tuple(_translated(size, twin) for size in t.shape)) for t in found.outputs)
        note = f"output sizes are those of a shrunken model, translated: {answer.refusal}"[:300]
        return replace(found, outputs=outputs, assumed=(*found.assumed, note))
    small = {tensor.name: tensor for tensor in found.outputs}
    fields = {name.partition(".")[0] for name in small}
    outputs = tuple(
        _merged(small.get(name), name, shape, dtype, found.sizes)
        for name, (shape, dtype) in answer.outputs.items()
        if name in small or ("." in name and name.partition(".")[0] in fields)
    )
    return replace(found, outputs=outputs)


def _translated(size: int | str, twin: Twin) -> int | str:
    # Small numbers coincide: of two labels and two layers, say, only the layers were cut.
    if isinstance(size, str) or size < _TELLING_SIZE:
        return size
    return twin.to_full(size) or size


def _merged(
    small: TensorSpec | None, name: str, shape: tuple[int, ...], dtype: str, sizes: Mapping[str, int]
) -> TensorSpec:
    """Return an output of the full model, its axes named as the twin's."""
    if small is not None and len(small.shape) == len(shape):
        named = tuple(a if isinstance(a, str) else size for a, size in zip(small.shape, shape, strict=True))
        return replace(small, shape=named, dtype=dtype)
    # One more of a list that grows with the depth: its rows are the model's.
    rows = next((axis for axis in sizes if axis.endswith("batch_size") and sizes[axis] == shape[0]), None)
    return TensorSpec(name=name, dtype=dtype, shape=(rows, *shape[1:]) if rows is not None and shape else shape)

"""Whether a segmenter's graphs, one after the other, answer what the PyTorch model answers in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnx_config.export.generation import run_named
from onnx_config.export.parity import FALLBACK_TOLERANCE, max_difference
from onnx_config.image_embeddings import BOXES, IMAGE, POINT_LABELS, POINTS
from onnx_config.input_generator import Array, generate_inputs
from onnx_config.parts import Role
from onnx_config.spec import ModelSpec

__all__ = ["prompted_difference", "prompts_compared"]

_SEED = 12
_SMALL = 1e-2
_MORE = 2


def prompted_difference(sessions: Mapping[Role, Any], model: Any, spec: ModelSpec, universal: Any) -> str | None:
    """Return what the graphs answer otherwise to prompts about one batch of images; ``None``: nothing.

    The images are embedded once, and asked about as `prompts_compared` says.

    Args:
        sessions: A session for the image and one for each kind of prompts.
        model: The loaded model of transformers.
        spec: What the whole model takes and gives.
        universal: The whole model's configuration.
    """
    embedded: Mapping[str, Array] | None = None
    for what, role, image, prompts in _asked(spec, universal):
        want = _told(model, {**image, **prompts})
        if embedded is None:
            embedded = run_named(sessions[Role.VISION_ENCODER], image)
        none = _no_points(prompts[BOXES]) if BOXES in prompts and POINTS not in prompts else {}
        got = run_named(sessions[role], {**embedded, **prompts, **none})
        for name, value in got.items():
            difference, problem = _difference(value, want[name])
            largest = float(np.abs(want[name]).max(initial=0.0))
            # Each graph was compared for itself; what goes wrong between them moves answers by more than a hundredth.
            allowed = min(FALLBACK_TOLERANCE * max(1.0, largest), _SMALL * largest)
            if problem is not None or difference > allowed:
                said = problem or f"is off by {difference:.3g}, where {allowed:.3g} is allowed"
                return f"asked about {what}, {name} {said}"
    return None


def prompts_compared(spec: ModelSpec) -> str:
    """Return what `prompted_difference` asks about, for a reader."""
    return "points, and other points" + (", boxes, and boxes with points" if spec.boxes else "")


def _asked(spec: ModelSpec, universal: Any) -> Iterator[tuple[str, Role, Mapping[str, Array], Mapping[str, Array]]]:
    """Yield prompts about the same images: what they are, the graph that answers, the images, and the prompts."""
    axes = {axis for tensor in spec.inputs if tensor.name == IMAGE for axis in tensor.axis_names}
    more = {axis: size if axis in axes else size + _MORE for axis, size in spec.sizes.items()}
    more = {axis: min(size, spec.axis_ranges[axis][1] or size) for axis, size in more.items()}
    image: dict[str, Array] | None = None
    for number, (what, sizes) in enumerate((("points", spec.sizes), ("other points", more))):
        made = _made(spec, universal, sizes, _SEED + number)
        image = {IMAGE: made[IMAGE]} if image is None else image
        yield what, Role.PROMPT_DECODER, image, {name: made[name] for name in made if name not in (IMAGE, BOXES)}
    if spec.boxes and image is not None:
        made = {name: value for name, value in made.items() if name != IMAGE}
        boxes = {name: value for name, value in made.items() if name not in (POINTS, POINT_LABELS)}
        yield "boxes", Role.PROMPT_DECODER_WITH_BOXES, image, boxes
        yield "boxes with points", Role.PROMPT_DECODER_WITH_BOXES, image, made


def _made(spec: ModelSpec, universal: Any, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    return generate_inputs(
        (*spec.inputs, *spec.boxes), universal.config, universal.declaration, sizes, rules=spec.values, seed=seed
    )


def _told(model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return what the model says."""
    import torch

    from onnx_config.probe import flat_outputs

    with torch.no_grad():
        returned = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in flat_outputs(returned)}


def _no_points(boxes: Array) -> dict[str, Array]:
    """Return no points for each box, with their labels."""
    shape = (*boxes.shape[:-1], 0)
    return {POINTS: np.zeros((*shape, 2), np.float32), POINT_LABELS: np.zeros(shape, np.int64)}


def _difference(got: Array, want: Array) -> tuple[float, str | None]:
    if got.shape != want.shape:
        return float("inf"), f"has shape {got.shape} for {want.shape}"
    return max_difference(got, want)

"""Whether a segmenter's two graphs, one after the other, answer what the PyTorch model answers in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_config.export.generation import run_named
from onnx_config.export.parity import FALLBACK_TOLERANCE, max_difference
from onnx_config.input_generator import generate_inputs
from onnx_config.parts import Role
from onnx_config.spec import ModelSpec

__all__ = ["prompted_difference"]

_SEED = 12


def prompted_difference(sessions: Mapping[Role, Any], model: Any, spec: ModelSpec, universal: Any) -> str | None:
    """Return what the graphs answer otherwise to prompts about a batch of images; ``None``: nothing.

    Args:
        sessions: A session for the image and one for the prompts.
        model: The loaded model of transformers.
        spec: What the whole model takes and gives.
        universal: The whole model's configuration.
    """
    import torch

    from onnx_config.probe import flat_outputs

    inputs = generate_inputs(
        spec.inputs, universal.config, universal.declaration, spec.sizes, rules=spec.values, seed=_SEED
    )
    with torch.no_grad():
        returned = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    want = {name: value.numpy() for name, value in flat_outputs(returned)}
    embedded = run_named(sessions[Role.VISION_ENCODER], inputs)
    got = run_named(sessions[Role.PROMPT_DECODER], {**inputs, **embedded})
    for name, value in got.items():
        difference, problem = max_difference(value, want[name])
        allowed = FALLBACK_TOLERANCE * max(1.0, float(np.abs(want[name]).max(initial=0.0)))
        if problem is not None or difference > allowed:
            return f"{name} {problem or f'is off by {difference:.3g}, where {allowed:.3g} is allowed'}"
    return None

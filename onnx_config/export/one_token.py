"""One graph of two traces: of a model that goes on with one token, and of the same model that reads many.

Models that keep states compute the two in different ways: a step of a recurrence, and all steps of it at once.
"""

from __future__ import annotations

from dataclasses import replace

from onnx_config.export.limits import AxisLimit
from onnx_config.spec import ModelSpec

__all__ = ["ONE_TOKEN", "one_token_spec"]

ONE_TOKEN = AxisLimit(axis="sequence_length", most=1, refuses=False)
"""The turn of such a model."""


def one_token_spec(spec: ModelSpec, axis: str = ONE_TOKEN.axis) -> ModelSpec:
    """Return ``spec`` with ``axis`` fixed at one; what covers the past too is as long as ever."""
    inputs = tuple(replace(t, shape=tuple(1 if size == axis else size for size in t.shape)) for t in spec.inputs)
    return replace(spec, inputs=inputs, sizes={**spec.sizes, axis: 1})

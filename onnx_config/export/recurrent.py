"""Keeps recurrent layers whole, as ONNX has them, in a trace that would take them apart step by step.

``torch.export`` writes an LSTM or a GRU out as so many steps as the sample has, which fixes the length and makes a
graph that grows with it. The translation of both is there in ``onnxscript``; it only never meets one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["WHOLE_LAYERS", "recurrent_layers_whole"]

_aten = torch.ops.aten
_OURS = torch.library.Library("onnx_ferry", "DEF")


def _whole(layer: Any) -> Any:
    """Return an operator of ours that computes what one of torch's does, and that torch does not take apart."""
    name = layer._schema.name.removeprefix("aten::")
    _, bracket, signature = str(layer._schema).partition("(")
    _OURS.define(f"{name}{bracket}{signature}")
    _OURS.impl(name, layer, "CompositeExplicitAutograd")
    torch.library.register_fake(f"onnx_ferry::{name}", _shapes, lib=_OURS)
    return getattr(torch.ops.onnx_ferry, name).default


def _shapes(values: torch.Tensor, hx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Return what a layer tells of each step, both directions beside each other, and its states at the end."""
    directions = 2 if arguments[5] else 1
    states = hx if isinstance(hx, (list, tuple)) else (hx,)
    steps = values.new_empty((*values.shape[:2], directions * states[0].shape[-1]))
    return (steps, *(state.new_empty(state.shape) for state in states))


WHOLE_LAYERS: Mapping[Any, Any] = {_whole(layer): layer for layer in (_aten.lstm.input, _aten.gru.input)}
"""What stands for a layer in a trace -> the operator that has a translation, with the same arguments."""


@contextmanager
def recurrent_layers_whole() -> Iterator[None]:
    """Have the exporter meet one operator for each such layer, until the exit."""
    with ExitStack() as stack:
        for whole in WHOLE_LAYERS:
            name = whole._schema.name.removeprefix("onnx_ferry::")
            stack.enter_context(patch.object(torch._VF, name, _kept_whole(whole, getattr(torch._VF, name))))
        yield


def _kept_whole(whole: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def layer(*arguments: Any) -> Any:
        return whole(*arguments) if _has_translation(*arguments) else original(*arguments)

    return layer


def _has_translation(*arguments: Any) -> bool:
    """Return whether the arguments are those of a layer as ONNX has it.

    Texts packed without what fills them up come with their lengths before their state; a layer that projects its state
    has a weight more.
    """
    _, _, params, has_biases, layers, _, _, bidirectional, _ = arguments
    if not isinstance(has_biases, bool):
        return False
    return bool(len(params) == layers * (2 if bidirectional else 1) * (4 if has_biases else 2))

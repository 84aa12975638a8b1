"""Keeps recurrent layers whole, as ONNX has them, in a trace that would take them apart step by step.

``torch.export`` writes an LSTM or a GRU out as so many steps as the sample has, which fixes the length and makes a
graph that grows with it. The translation of both is there in ``onnxscript``; it only never meets one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["WHOLE_LAYERS", "recurrent_layers_whole"]

_aten = torch.ops.aten


@torch.library.custom_op("onnx_ferry::lstm", mutates_args=())
def _lstm(  # noqa: PLR0917  # as torch calls it
    values: torch.Tensor,
    hx: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _aten.lstm.input(  # type: ignore[no-any-return]  # an operator
        values, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )


@_lstm.register_fake
def _lstm_shapes(
    values: torch.Tensor, hx: Sequence[torch.Tensor], *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    directions = 2 if arguments[5] else 1
    # Of one that projects its state, the state is narrower than the cell.
    return _over_time(values, hx[0], directions), hx[0].new_empty(hx[0].shape), hx[1].new_empty(hx[1].shape)


@torch.library.custom_op("onnx_ferry::gru", mutates_args=())
def _gru(  # noqa: PLR0917  # as torch calls it
    values: torch.Tensor,
    hx: torch.Tensor,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _aten.gru.input(  # type: ignore[no-any-return]  # an operator
        values, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )


@_gru.register_fake
def _gru_shapes(values: torch.Tensor, hx: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _over_time(values, hx, 2 if arguments[5] else 1), hx.new_empty(hx.shape)


def _over_time(values: torch.Tensor, state: torch.Tensor, directions: int) -> torch.Tensor:
    """Return what a layer tells of each step, beside each other for both directions."""
    return values.new_empty((*values.shape[:2], directions * state.shape[-1]))


WHOLE_LAYERS: Mapping[Any, Any] = {
    torch.ops.onnx_ferry.lstm.default: _aten.lstm.input,
    torch.ops.onnx_ferry.gru.default: _aten.gru.input,
}
"""What stands for a layer in a trace -> the operator that has a translation, with the same arguments."""


@contextmanager
def recurrent_layers_whole() -> Iterator[None]:
    """Have the exporter meet one operator for each such layer, until the exit."""
    with ExitStack() as stack:
        for name, whole in (("lstm", torch.ops.onnx_ferry.lstm), ("gru", torch.ops.onnx_ferry.gru)):
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

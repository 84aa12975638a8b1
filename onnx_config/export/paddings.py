"""Says in numbers what a convolution says in a word: that it fills up its input, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["padded_by_numbers", "says_padding"]

_aten = torch.ops.aten

_NUMBERED: Mapping[Any, Any] = {
    _aten.conv1d.padding: _aten.conv1d.default,
    _aten.conv2d.padding: _aten.conv2d.default,
    _aten.conv3d.padding: _aten.conv3d.default,
}
_DEFAULTS = (None, [1], "valid", [1], 1)


def says_padding(node: torch.fx.Node) -> Any:
    """Return the operator that a convolution with a word is with numbers; ``None``: it is none, or uneven."""
    return _NUMBERED.get(node.target) if node.target in _NUMBERED and _numbers(node) is not None else None


def padded_by_numbers(node: torch.fx.Node) -> None:
    """Let a node for which there is such an operator be that one."""
    tensors, bias, stride, _, dilation, groups = _parts(node)
    node.args, node.target = (*tensors, bias, stride, _numbers(node), dilation, groups), says_padding(node)


def _parts(node: torch.fx.Node) -> Any:
    """Return the arguments; of strides and dilations, torch takes one for all axes, and ONNX one for each."""
    given: list[Any] = [*node.args, *_DEFAULTS[len(node.args) - 2 :]]
    tensors, (bias, stride, word, dilation, groups) = given[:2], given[2:]
    axes = len(tensors[1].meta["val"].shape) - 2
    each = [list(steps) * (axes if len(steps) == 1 else 1) for steps in (stride, dilation)]
    return tensors, bias, each[0], word, each[1], groups


def _numbers(node: torch.fx.Node) -> list[int] | None:
    tensors, _, _, word, dilation, _ = _parts(node)
    kernel = tensors[1].meta["val"].shape[2:]
    if node.kwargs or not all(isinstance(size, int) for size in kernel):
        return None
    filled = [step * (size - 1) if word == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
    # As many on either side, or it takes another operator.
    return [both // 2 for both in filled] if all(both % 2 == 0 for both in filled) else None

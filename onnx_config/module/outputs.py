"""Names for what a module returns, whatever it returns it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from onnx_config.probe import flat_outputs

__all__ = ["NamedOutputs", "named_outputs"]


class NamedOutputs(torch.nn.Module):
    """A module whose outputs have names: returns a dict of the tensors in what the module returns.

    A field of a dataclass or a named tuple goes by its name, a member of a tuple as ``output_0``, a lone tensor as
    ``output``; a name that an input has gets ``_output`` behind it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        """The module, unchanged."""

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Run the module and name what it returns."""
        return named_outputs(self.module(**inputs), inputs)


def named_outputs(value: Any, inputs: Mapping[str, Any] | Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Return the tensors of what a module returned, by name.

    >>> sorted(named_outputs((torch.zeros(1), {"a": torch.zeros(1)}), ["a"]))
    ['output_0', 'output_1.a']
    """
    found = dict(flat_outputs(_as_mapping(value)))
    return {f"{name}_output" if name in inputs else name: tensor for name, tensor in found.items()}


def _as_mapping(value: Any) -> Any:
    """Return containers as dicts with the names that they should have; a tensor, or what holds none, as it is."""
    if isinstance(value, torch.Tensor) or hasattr(value, "items"):
        return {k: _as_mapping(v) for k, v in value.items()} if hasattr(value, "items") else value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_mapping(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: _as_mapping(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return {f"output_{i}": _as_mapping(item) for i, item in enumerate(value)}
    return value

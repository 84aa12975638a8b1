"""One run of a module: what it returned, or what it said and which layer said it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

from onnx_config.module.outputs import named_outputs
from onnx_config.module_state import preserved_state

__all__ = ["Answer", "is_same", "run_module"]


@dataclass(frozen=True, slots=True)
class Answer:
    outputs: dict[str, torch.Tensor] | None
    refusal: str = ""
    layer: torch.nn.Module | None = None
    """The innermost module that refused."""
    given: torch.Tensor | None = None
    """What it was given first."""
    input: str | None = None
    """The input that this is, unchanged."""


def run_module(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Answer:
    """Call the module; what it raises is an answer."""
    with torch.no_grad(), preserved_state(module), _entered(module) as entered:
        try:
            value = module(**{n: v.clone() for n, v in inputs.items()})
            _register(value)
            returned = named_outputs(value, inputs)
        # The module's own code decides what it raises.
        except Exception as error:  # noqa: BLE001
            text = " ".join(f"{error}".split()) or type(error).__name__
            layer, given = entered[-1] if entered else (None, None)
            same = [n for n, v in inputs.items() if given is not None and is_same(given, v)]
            return Answer(None, text, layer, given, same[0] if len(same) == 1 else None)
    return Answer(returned)


def _register(value: Any) -> None:
    """Let torch.export take a dataclass as an output: it knows tuples and dicts, but a dataclass has to be named."""
    if is_dataclass(value) and not hasattr(value, "items") and type(value) not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(type(value))


def is_same(given: torch.Tensor, value: torch.Tensor) -> bool:
    return given.shape == value.shape and given.dtype == value.dtype and torch.equal(given, value)


@contextmanager
def _entered(module: torch.nn.Module) -> Iterator[list[tuple[torch.nn.Module, torch.Tensor | None]]]:
    """Keep a list of the modules that were entered and did not return, each with the first tensor it was given."""
    stack: list[tuple[torch.nn.Module, torch.Tensor | None]] = []

    def enter(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        stack.append((part, given))

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for part in module.modules():
        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()

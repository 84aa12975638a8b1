"""Which axes of a module's inputs may move, how far, and which sizes of its outputs move with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onnx_config.errors import InternalError
from onnx_config.module.inputs import ModuleInputs
from onnx_config.module.run import is_same, run_module
from onnx_config.spec import TensorSpec

__all__ = ["find_limits", "vary"]


def find_limits(module: torch.nn.Module, found: ModuleInputs, examples: Mapping[str, torch.Tensor]) -> None:
    """Find out which whole numbers the inputs may hold: those of the table that they are looked up in."""
    inputs = {name: examples[name].clone() if name in examples else value for name, value in found.tensors().items()}
    limits: dict[str, int] = {}

    def look(part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        for name, value in inputs.items():
            if given is not None and not value.is_floating_point() and is_same(given, value):
                size = int(part.num_embeddings)  # type: ignore[arg-type]  # only tables are asked
                limits[name] = min(limits.get(name, size), size)

    tables = [m for m in module.modules() if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag))]
    handles = [table.register_forward_pre_hook(look, with_kwargs=True) for table in tables]
    try:
        run_module(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found.limits.update(limits)


def vary(module: torch.nn.Module, found: ModuleInputs) -> None:
    """Find which axes may have other sizes, the smallest of each, and which sizes of outputs move with them."""
    base = run_module(module, found.tensors()).outputs
    if base is None:
        raise InternalError(f"{type(module).__name__} refuses inputs that it accepted before.")
    moved: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}
    for axis in sorted(found.used()):
        size = found.sizes[axis]
        tried = [run_module(module, found.tensors({**found.sizes, axis: n})) for n in (size + 1, size + 5, size * 2)]
        accepted = next((n for n, a in zip((size + 1, size + 5, size * 2), tried, strict=True) if a.outputs), None)
        low, high = _range(module, found, axis) if accepted is not None else (size, size)
        if accepted is None or (high is not None and high < 2 * low):
            # A layer that rounds takes the next size or two as well; that is no axis to rely on.
            said = next((a.refusal for a in reversed(tried) if a.outputs is None), "no other size is accepted")
            found.notes.append(f"{axis} is fixed at {size}: {said}"[:300])
            found.fix_everywhere(axis, size)
            continue
        found.ranges[axis] = (low, high)
        outputs = next(a.outputs for a in tried if a.outputs is not None)
        moved[axis] = (accepted, outputs)
    found.outputs = tuple(_output(name, value, found.sizes, moved) for name, value in base.items())


def _range(module: torch.nn.Module, found: ModuleInputs, axis: str) -> tuple[int, int | None]:
    """Return the smallest size of an axis, and the largest where one of those tried is refused."""

    def accepts(size: int) -> bool:
        return run_module(module, found.tensors({**found.sizes, axis: size})).outputs is not None

    def limit(accepted: int, refused: int) -> int:
        while abs(accepted - refused) > 1:
            middle = (refused + accepted) // 2
            refused, accepted = (refused, middle) if accepts(middle) else (middle, accepted)
        return accepted

    size = found.sizes[axis]
    smallest = 1 if accepts(1) else limit(size, 1)
    largest = size
    for factor in (2, 4, 8):
        if not accepts(size * factor):
            return smallest, limit(largest, size * factor)
        largest = size * factor
    return smallest, None


def _output(
    name: str,
    value: torch.Tensor,
    sizes: Mapping[str, int],
    moved: Mapping[str, tuple[int, Mapping[str, torch.Tensor]]],
) -> TensorSpec:
    shape: list[int | str] = []
    for position, size in enumerate(value.shape):
        causes = []
        for axis, (other, outputs) in moved.items():
            there = outputs[name].shape if name in outputs else value.shape
            if len(there) == len(value.shape) and there[position] != size:
                causes.append((axis, other, there[position]))
        if not causes:
            shape.append(size)
        elif len(causes) == 1 and size == sizes[causes[0][0]] and causes[0][1] == causes[0][2]:
            shape.append(causes[0][0])
        else:
            shape.append(f"{name}_dim_{position}".replace(".", "_"))
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))

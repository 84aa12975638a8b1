"""Names of a traced graph: inputs and outputs are called as the model calls them, and axes as its inputs' specs do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import onnx_ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from onnx_config.spec import TensorSpec, axes_of

__all__ = ["keep_outputs", "name_axes", "name_like_forward"]

_SYMBOL = re.compile(r"\b[su]\d+\b")
"""How torch calls a size."""


def name_axes(
    program: onnx_ir.Model, specs: Iterable[TensorSpec], dynamic: Collection[str]
) -> tuple[dict[str, str], list[str], set[str]]:
    """Give the graph's axes their names, on every value.

    Args:
        program: The graph, whose axes are called by torch's symbols; it is changed in place.
        specs: Its inputs, by their axes.
        dynamic: The axes that it was traced with as dynamic ones.

    Returns the names by symbol, notes of what is fixed or tied, and the axes that are fixed.
    """
    names: dict[str, str] = {}
    notes: list[str] = []
    fixed: set[str] = set()
    by_name = {spec.name: spec for spec in specs}
    for value in program.graph.inputs:
        spec = by_name.get(value.name or "")
        if spec is None or value.shape is None:
            continue
        for position, axis in spec.axes.items():
            if not set(dynamic) & set(axes_of(axis)):
                continue
            size = _size(value.shape[position])
            if isinstance(size, int):
                fixed.update(axes_of(axis))
                notes.append(f"{axis} of {spec.name} is fixed at {size} in the graph")
            elif size is not None and names.setdefault(size, axis) != axis:
                notes.append(f"{axis} of {spec.name} is tied to {names[size]} in the graph")
    for value in _values(program):
        if value.shape is not None:
            dims = [_renamed(size, names) for size in value.shape]
            value.shape = onnx_ir.Shape(dims, frozen=value.shape.frozen)
    for value in program.graph.outputs:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_plain(size, f"{value.name}_dim_{i}") for i, size in enumerate(value.shape)])
    return names, list(dict.fromkeys(notes)), fixed


def keep_outputs(program: onnx_ir.Model, kept: tuple[str, ...]) -> None:
    """Remove the outputs that were not asked for, with all nodes that only they need, in place."""
    outputs = program.graph.outputs
    wanted = [value for value in outputs if (value.name or "").removeprefix("output.") in kept]
    if not wanted or len(wanted) == len(outputs):
        return
    outputs[:] = wanted
    RemoveUnusedNodesPass()(program)


def name_like_forward(program: onnx_ir.Model) -> None:
    """Take back the prefixes that the exporter gives to a name shared by an input and an output, where it can."""
    for value in program.graph.inputs:
        value.name = (value.name or "").removeprefix("input.")
    taken = {value.name for value in program.graph.inputs}
    for value in program.graph.outputs:
        plain = (value.name or "").removeprefix("output.")
        if plain not in taken:
            value.name = plain
    # Inputs and outputs keep their names; a value inside that has the same one gets another.
    NameFixPass()(program)


def _size(dim: int | onnx_ir.SymbolicDim) -> int | str | None:
    """Return a number, a symbol or formula, or ``None`` for an unknown size."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = str(dim.value)
    # The exporter writes the one size that an axis was narrowed down to as a symbol called "2".
    return int(text) if text.isdecimal() else text


def _renamed(dim: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    size = _size(dim)
    if not isinstance(size, str):
        return size
    # An input's own size may be a formula, such as twice a symbol, and is then looked up as a whole.
    return names.get(size) or _SYMBOL.sub(lambda found: names.get(found[0], found[0]), size)


def _plain(dim: int | onnx_ir.SymbolicDim, fallback: str) -> int | str:
    """Return a size of an output as a reader wants it: a number, a name, or a formula over names."""
    size = _size(dim)
    if size is None or (isinstance(size, str) and _SYMBOL.search(size)):
        return fallback.replace(".", "_")
    return size


def _values(program: onnx_ir.Model) -> Iterable[onnx_ir.Value]:
    seen: set[int] = set()
    for graph in program.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        for node in graph:
            for value in node.outputs:
                if id(value) not in seen:
                    seen.add(id(value))
                    yield value

"""Nodes of one layer held against those of the next: the same, each with its own weights, on what came before it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import onnx_ir

__all__ = ["NodePairs", "NotRepeatedError", "next_name"]

_NUMBERS = re.compile(r"(\d+)")
_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


class NotRepeatedError(ValueError):
    """The layers of a traced graph do not follow from one another as those that it lacks would have to."""


class NodePairs:
    """What corresponds in two lists of nodes."""

    def __init__(self, weights: Container[str]) -> None:
        """Pair nodes of a model of which ``weights`` are the names of parameters and buffers."""
        self.same: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """Value that the first nodes make -> the same of the others."""
        self.handed: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """What the others read of the first ones -> what those read in its place."""
        self.numbered: dict[onnx_ir.Value, onnx_ir.Value] = {}
        """Weight or input that the others read -> that of the first ones."""
        self._weights = weights

    def is_written(self, value: onnx_ir.Value) -> bool:
        """Return whether a value is what the code wrote as a number: under a name of its own for each layer."""
        return value.is_initializer() and value.name not in self._weights

    def pair(self, ones: Sequence[onnx_ir.Node], others: Sequence[onnx_ir.Node]) -> None:
        """Hold two lists of nodes against each other, in their order.

        Raises:
            NotRepeatedError: If they do not correspond.
        """
        if len(ones) != len(others) or not others:
            raise NotRepeatedError(f"{len(ones)} nodes are followed by {len(others)}")
        for one, other in zip(ones, others, strict=True):
            if one.op_identifier() != other.op_identifier() or len(one.outputs) != len(other.outputs):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
            self.same.update(zip(one.outputs, other.outputs, strict=True))
        for one, other in zip(ones, others, strict=True):
            if len(one.inputs) != len(other.inputs) or list(one.attributes) != list(other.attributes):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}, which reads otherwise")
            for mine, its in zip(one.inputs, other.inputs, strict=True):
                self._pair_values(mine, its)
            for name in one.attributes:
                self._pair_attributes(one.attributes[name], other.attributes[name])

    def _pair_attributes(self, one: onnx_ir.Attr, other: onnx_ir.Attr) -> None:
        if one.type != other.type or one.is_ref() or other.is_ref():
            raise NotRepeatedError(f"attribute {one.name} is of another kind")
        if one.type in _GRAPHS:
            graphs = [a.as_graphs() if a.type is _GRAPHS[1] else [a.as_graph()] for a in (one, other)]
            if len(graphs[0]) != len(graphs[1]):
                raise NotRepeatedError(f"attribute {one.name} holds other graphs")
            for mine, its in zip(*graphs, strict=True):
                if len(mine.inputs) != len(its.inputs) or len(mine.outputs) != len(its.outputs) or mine.initializers:
                    raise NotRepeatedError(f"attribute {one.name} holds another graph")
                self.same.update(zip(mine.inputs, its.inputs, strict=True))
                nodes, others = list(mine), list(its)
                if nodes or others:
                    self.pair(nodes, others)
                for value, other_value in zip(mine.outputs, its.outputs, strict=True):
                    self._pair_values(value, other_value)
        elif not _is_equal(one.value, other.value):
            raise NotRepeatedError(f"attribute {one.name} differs")

    def _pair_values(self, one: onnx_ir.Value | None, other: onnx_ir.Value | None) -> None:
        """Hold what two nodes read in the same place against each other."""
        if one is None or other is None:
            if one is not other:
                raise NotRepeatedError("an input is left out")
        elif one in self.same:
            if self.same[one] is not other:
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
        elif one is other:
            return
        elif other in self.same:
            if self.handed.setdefault(other, one) is not one:
                raise NotRepeatedError(f"{other.name} follows two values")
        elif (one.is_initializer() and other.is_initializer()) or (one.is_graph_input() and other.is_graph_input()):
            self._pair_numbered(one, other)
        else:
            raise NotRepeatedError(f"{one.name} is followed by {other.name}, from elsewhere")

    def _pair_numbered(self, one: onnx_ir.Value, other: onnx_ir.Value) -> None:
        kept = self.numbered.setdefault(other, one)
        if kept is not one:
            raise NotRepeatedError(f"{other.name} follows two weights")
        if self.is_written(one) and self.is_written(other):
            if (
                one.const_value is None
                or other.const_value is None
                or not _is_equal(one.const_value, other.const_value)
            ):
                raise NotRepeatedError(f"{one.name} is followed by {other.name}")
        elif _step(one.name or "", other.name or "") is None:
            raise NotRepeatedError(f"{one.name} is followed by {other.name}")


def next_name(one: str, other: str, repeat: int) -> str:
    """Return the name that goes on as two others do, so many steps later.

    >>> next_name("layers.3.weight", "layers.5.weight", 2)
    'layers.9.weight'

    Raises:
        NotRepeatedError: If they differ in something else than one number.
    """
    if (step := _step(one, other)) is None:
        raise NotRepeatedError(f"{one} is followed by {other}")
    parts = _NUMBERS.split(other)
    parts[step[0]] = str(int(parts[step[0]]) + repeat * step[1])
    return "".join(parts)


def _step(one: str, other: str) -> tuple[int, int] | None:
    """Return which part of two names is a number that differs, and by how much; ``None``: they differ otherwise.

    >>> _step("layers.3.weight", "layers.5.weight"), _step("layers.3.weight", "layers.5.bias")
    ((1, 2), None)
    """
    mine, its = _NUMBERS.split(one), _NUMBERS.split(other)
    differing = [n for n, (a, b) in enumerate(itertools.zip_longest(mine, its)) if a != b]
    # Every second part is a number.
    if len(mine) != len(its) or len(differing) != 1 or differing[0] % 2 == 0:
        return None
    return differing[0], int(its[differing[0]]) - int(mine[differing[0]])


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two values of attributes, or two constants, are the same."""
    if hasattr(one, "numpy") and hasattr(other, "numpy"):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one is other or np.array_equal(one.numpy(), other.numpy(), equal_nan=one.dtype.is_floating_point())
    # Of numbers that are none, no two are equal; they are not written into a graph that is to repeat them.
    return bool(one == other)

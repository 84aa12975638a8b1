"""Decisions that a graph takes for granted, and refuses inputs for which its model would decide otherwise.

A model that asks whether anything is marked, and was told no for all inputs that were tried, is traced as if that were
always so. For the inputs of tomorrow that is a guess, and a graph that guesses gives numbers that are wrong without a
word. So the question stays in the graph: what was asked is computed, and where the answer is another one than the
trace took, an ``Expand`` to a size that is none ends the run; its name says which line of the model asked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir
import torch

__all__ = ["condition_name", "conditions_returned", "refuse_otherwise"]

Granted = Mapping[str, list[tuple[torch.Tensor, Any]]]

_PREFIX = "taken_for_granted_"
_BODIES = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
_TYPES = onnx_ir.DataType
_NUMBERS = (_TYPES.FLOAT, _TYPES.FLOAT16, _TYPES.BFLOAT16, _TYPES.DOUBLE, _TYPES.INT64, _TYPES.INT32)


@contextmanager
def conditions_returned(model: torch.nn.Module, *granted: Granted) -> Iterator[None]:
    """Have ``model`` return, beside its outputs, whether each decision is as it is ``granted`` to be.

    What is granted is filled in while the model runs: what it is -> what was computed, and what it is taken to be.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(*arguments: Any, **options: Any) -> Any:
        returned = original(*arguments, **options)
        found = dict(chain.from_iterable(map(_conditions, granted)))
        # What returns no fields by name has no place for more of them.
        return {**returned, **found} if found and isinstance(returned, Mapping) else returned

    with patch.object(model, "forward", forward):
        yield


def _conditions(granted: Granted) -> Iterator[tuple[str, torch.Tensor]]:
    for name, decisions in granted.items():
        holds = [(tensor == value).all() for tensor, value in decisions]
        yield condition_name(name), torch.stack(holds).all()


def condition_name(granted: str) -> str:
    """Return the name of the output that tells whether what is taken for granted holds.

    >>> condition_name("modeling_x.py:7 is taken to find True")
    'taken_for_granted_modeling_x_py_7_is_taken_to_find_True'
    """
    return f"{_PREFIX}{re.sub(r'[^a-zA-Z0-9]+', '_', granted)}"


def refuse_otherwise(program: onnx_ir.Model, kept: Collection[str]) -> None:
    """Turn the conditions among a graph's outputs into nodes that end a run where they do not hold, in place.

    ``kept`` are the names of the outputs that will remain, conditions too.
    """
    graph = program.graph
    conditions = [value for value in graph.outputs if _name(value).startswith(_PREFIX) and _name(value) not in kept]
    if not conditions:
        return
    graph.outputs[:] = [value for value in graph.outputs if value not in conditions]
    computed = [i for i, v in enumerate(graph.outputs) if v.dtype in _NUMBERS and v.producer() is not None]
    at = next((i for i in computed if _name(graph.outputs[i]) in kept), next(iter(computed), None))
    if at is None:
        return
    for condition in conditions:
        if _depends_on_inputs(condition):
            graph.outputs[at] = _checked(graph, graph.outputs[at], condition)


def _name(value: onnx_ir.Value) -> str:
    return (value.name or "").removeprefix("output.")


def _depends_on_inputs(value: onnx_ir.Value) -> bool:
    """Return whether a value is computed of an input that its caller gives."""
    seen: set[int] = set()
    left = [value]
    while left:
        current = left.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if current.is_graph_input() and current.const_value is None:
            return True
        producer = current.producer()
        if producer is not None:
            left += [given for given in producer.inputs if given is not None]
            # What a loop reads from outside is none of its node's inputs.
            if any(a.type in _BODIES for a in producer.attributes.values()):
                return True
    return False


def _checked(graph: onnx_ir.Graph, output: onnx_ir.Value, condition: onnx_ir.Value) -> onnx_ir.Value:
    """Return ``output`` with a zero added that only comes about where ``condition`` holds."""
    label = _name(condition).removeprefix(_PREFIX)

    def constant(name: str, numbers: list[int]) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.array(numbers, dtype=np.int64), name=f"{label}_{name}")
        made = onnx_ir.Value(name=tensor.name, const_value=tensor, type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
        made.shape = onnx_ir.Shape([len(numbers)])
        graph.register_initializer(made)
        return made

    zeros = constant("zeros", [0, 0])
    # Two zeros can be expanded to two, and to three by nobody.
    size = onnx_ir.node("Where", [condition, constant("as_traced", [2]), constant("otherwise", [3])])
    expanded = onnx_ir.node("Expand", [zeros, size.outputs[0]], name=label)
    least = onnx_ir.node("ReduceMax", [expanded.outputs[0]], attributes={"keepdims": 0})
    cast = onnx_ir.node("Cast", [least.outputs[0]], attributes={"to": int(output.dtype or onnx_ir.DataType.FLOAT)})
    added = onnx_ir.node("Add", [output, cast.outputs[0]])
    result = added.outputs[0]
    result.type, result.shape = output.type, output.shape
    result.name, output.name = output.name, f"{output.name}_before_{label}"
    graph.extend([size, expanded, least, cast, added])
    return result

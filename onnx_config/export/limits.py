"""Sizes that a graph refuses: of a model that computes in two ways by length, a graph holds one, up to a limit.

A model may attend to all tokens of a short text and to blocks of a long one. A graph of the first way would give
numbers for a long text too, and wrong ones. So the limit belongs into the graph: the first input that has the axis goes
through an ``Expand`` to the smaller of its own size and the limit, which changes nothing up to there, and which no
device can carry out beyond. It copies a few numbers, depends on what comes in, so that no optimiser can work it out
beforehand, and its name says what was wrong. The names are also how a graph tells its limits to whoever compares it.

A ``Reshape`` would not do: onnxsim takes it for granted that every reshape of a graph is possible, and writes -1 for
the size that is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir

from onnx_config.spec import TensorSpec

__all__ = ["AxisLimit", "is_worth_having", "limit_axis", "limit_of", "limits_in", "within"]

_NAMES = {
    "Expand": re.compile(r"(?P<axis>\w+)_is_at_most_(?P<most>\d+)"),
    "LessOrEqual": re.compile(r"(?:\w+/)*(?P<axis>\w+)_turns_after_(?P<most>\d+)"),
}
"""Operator of the node that a limit is found by -> its name, behind those of the ways that lead there."""

# A size of one can be expanded to any: the node below cannot refuse it.
_FEWEST = 2
_SHARE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLimit:
    """The largest size of one axis that a graph takes, or that it computes in one way.

    >>> AxisLimit(axis="sequence_length", most=704).node
    'sequence_length_is_at_most_704'
    >>> AxisLimit(axis="sequence_length", most=704, refuses=False).node
    'sequence_length_turns_after_704'
    """

    axis: str
    """Name of a dynamic axis."""

    most: int
    """Its largest size, in elements."""

    refuses: bool = True
    """Whether the graph refuses more; else it computes in another way then, as its model does."""

    @property
    def node(self) -> str:
        """Name of the node that refuses more, or that asks which way to take."""
        return f"{self.axis}_{'is_at_most' if self.refuses else 'turns_after'}_{self.most}"


def is_worth_having(limit: AxisLimit, largest: int | None) -> bool:
    """Return whether a graph with this limit is of use beside the model, which takes ``largest`` (``None``: any size).

    Who takes a model for its length is not served by a graph for a sixth of it; half is most of what it is given.

    >>> [is_worth_having(AxisLimit(axis="sequence_length", most=n), 4096) for n in (2047, 2048)]
    [False, True]
    """
    return limit.most >= _FEWEST and largest is not None and _SHARE * limit.most >= largest


def limit_axis(program: onnx_ir.Model, limit: AxisLimit, specs: Iterable[TensorSpec]) -> None:
    """Make a graph refuse more than ``limit``, in place.

    Args:
        program: The graph.
        limit: The limit.
        specs: The inputs, by their axes.

    Raises:
        ValueError: If no input that the graph uses has the axis.
    """
    graph = program.graph
    by_name = {spec.name: spec for spec in specs}
    for value in graph.inputs:
        spec = by_name.get(value.name or "")
        at = [i for i, axis in spec.axes.items() if axis == limit.axis] if spec is not None else []
        if at and value.uses():
            _pass_through(graph, value, at[0], limit)
            return
    raise ValueError(f"no input that the graph uses has the axis {limit.axis}")


def _pass_through(graph: onnx_ir.Graph, value: onnx_ir.Value, position: int, limit: AxisLimit) -> None:
    """Let all that uses ``value`` use what comes out of a node that refuses more than the limit at ``position``."""
    assert value.shape is not None

    def constant(name: str, numbers: list[int]) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.array(numbers, dtype=np.int64), name=f"{limit.node}_{name}")
        made = onnx_ir.Value(name=tensor.name, const_value=tensor, type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
        made.shape = onnx_ir.Shape([len(numbers)])
        graph.register_initializer(made)
        return made

    def node(operator: str, inputs: list[onnx_ir.Value], name: str, **attributes: int) -> onnx_ir.Node:
        made = onnx_ir.node(operator, inputs, attributes=attributes, name=name)
        made.outputs[0].name = f"{name}_out"
        made.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
        return made

    uses = tuple(value.uses())
    size = node("Shape", [value], f"{limit.node}_size", start=position, end=position + 1)
    taken = node("Min", [size.outputs[0], constant("limit", [limit.most])], f"{limit.node}_taken")
    nodes, wanted = [size, taken], taken.outputs[0]
    if after := len(value.shape) - position - 1:
        # To a size of one all sizes can be expanded, also that which is there.
        whole = node("Concat", [wanted, constant("others", [1] * after)], f"{limit.node}_wanted", axis=0)
        nodes, wanted = [*nodes, whole], whole.outputs[0]
    checked = node("Expand", [value, wanted], limit.node)
    checked.outputs[0].type = value.type
    # If it were said that the size is the same, optimisers would take the node for one that does nothing.
    checked.outputs[0].shape = onnx_ir.Shape(None if i == position else size for i, size in enumerate(value.shape))
    graph.insert_before(graph[0], [*nodes, checked])
    for use in uses:
        use.node.replace_input_with(use.idx, checked.outputs[0])


def limits_in(program: onnx_ir.Model) -> tuple[AxisLimit, ...]:
    """Return the limits that a graph holds itself to, and where it turns."""
    return tuple(limit for graph in program.graphs() for node in graph if (limit := limit_of(node)) is not None)


def limit_of(node: onnx_ir.Node) -> AxisLimit | None:
    """Return the limit that a node stands for; ``None``: for none."""
    name = _NAMES[node.op_type].fullmatch(node.name or "") if node.op_type in _NAMES else None
    if name is None:
        return None
    return AxisLimit(axis=name["axis"], most=int(name["most"]), refuses=node.op_type == "Expand")


def within(
    ranges: Mapping[str, tuple[int, int | None]], limits: Iterable[AxisLimit]
) -> dict[str, tuple[int, int | None]]:
    """Return ``ranges`` with no axis larger than its limit; where a graph only turns, it takes more.

    >>> within({"sequence_length": (2, None), "batch_size": (1, None)}, [AxisLimit(axis="sequence_length", most=704)])
    {'sequence_length': (2, 704), 'batch_size': (1, None)}
    """
    narrowed = dict(ranges)
    for limit in (limit for limit in limits if limit.refuses):
        low, high = narrowed.get(limit.axis, (1, None))
        narrowed[limit.axis] = (low, limit.most if high is None else min(high, limit.most))
    return narrowed

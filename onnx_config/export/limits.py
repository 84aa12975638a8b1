"""Sizes that a graph refuses: of a model that computes in two ways by length, a graph holds one, beside a limit.

A model may attend to all tokens of a short text and to blocks of a long one. A graph of the first way would give
numbers for a long text too, and wrong ones. So the limit belongs into the graph: the first input that has the axis goes
through an ``Expand`` to the smaller of its own size and the limit, which changes nothing up to there, and which no
device can carry out beyond. It copies a few numbers, depends on what comes in, so that no optimiser can work it out
beforehand, and its name says what was wrong. The names are also how a graph tells its limits to whoever compares it.

That a graph is of too short ones, it says by an ``Expand`` of two numbers to two and as many as are missing, of which
the smaller size is made.

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
    "Expand": re.compile(r"(?P<axis>\w+)_is_at_(?P<end>most|least)_(?P<size>\d+)"),
    "LessOrEqual": re.compile(r"(?:\w+/)*(?P<axis>\w+)_turns_(?P<end>after)_(?P<size>\d+)"),
}
"""Operator of the node that a limit is found by -> its name, behind those of the ways that lead there."""

# A size of one can be expanded to any: the node below cannot refuse it.
_FEWEST = 2
_SHARE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLimit:
    """The largest or the smallest size of one axis that a graph takes, or the largest that it computes in one way.

    >>> AxisLimit(axis="sequence_length", most=704).node
    'sequence_length_is_at_most_704'
    >>> AxisLimit(axis="sequence_length", least=65).node
    'sequence_length_is_at_least_65'
    >>> AxisLimit(axis="sequence_length", most=704, refuses=False).node
    'sequence_length_turns_after_704'
    """

    axis: str
    """Name of a dynamic axis."""

    most: int | None = None
    """Its largest size, in elements; ``None``: it is the smallest that is limited."""

    refuses: bool = True
    """Whether the graph refuses what is beyond; else it computes in another way then, as its model does."""

    least: int | None = None
    """Its smallest size."""

    @property
    def bound(self) -> int:
        """The last size on this side of the limit."""
        bound = self.least if self.most is None else self.most
        assert bound is not None
        return bound

    @property
    def beyond(self) -> int:
        """The first size on the other side."""
        return self.bound + (1 if self.least is None else -1)

    @property
    def node(self) -> str:
        """Name of the node that refuses what is beyond, or that asks which way to take."""
        end = "at_most" if self.least is None else "at_least"
        return f"{self.axis}_{f'is_{end}' if self.refuses else 'turns_after'}_{self.bound}"


def is_worth_having(limit: AxisLimit, largest: int | None) -> bool:
    """Return whether a graph with this limit is of use beside the model, which takes ``largest`` (``None``: any size).

    Who takes a model for its length is not served by a graph for a sixth of it; half is most of what it is given. Of
    one for longer sizes only, it depends on what they count.

    >>> [is_worth_having(AxisLimit(axis="sequence_length", most=n), 4096) for n in (2047, 2048)]
    [False, True]
    """
    return limit.bound >= _FEWEST and largest is not None and _SHARE * limit.bound >= largest


def limit_axis(program: onnx_ir.Model, limit: AxisLimit, specs: Iterable[TensorSpec]) -> None:
    """Make a graph refuse what is beyond ``limit``, in place.

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
    """Let all that uses ``value`` use what comes out of nodes that refuse what is beyond the limit at ``position``."""
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
    bound, passing = constant("limit", [limit.bound]), limit.node
    if limit.least is None:
        nodes = [size, node("Min", [size.outputs[0], bound], f"{limit.node}_taken")]
    else:
        passing = f"{limit.node}_passed"
        larger = node("Max", [size.outputs[0], bound], f"{limit.node}_larger")
        missing = node("Sub", [larger.outputs[0], size.outputs[0]], f"{limit.node}_missing")
        count = node("Add", [missing.outputs[0], constant("two", [2])], f"{limit.node}_count")
        # Two numbers can be expanded to two only.
        zeros = node("Expand", [constant("zeros", [0, 0]), count.outputs[0]], limit.node)
        none = node("ReduceMax", [zeros.outputs[0]], f"{limit.node}_none")
        taken = node("Add", [size.outputs[0], none.outputs[0]], f"{limit.node}_taken")
        nodes = [size, larger, missing, count, zeros, none, taken]
    wanted = nodes[-1].outputs[0]
    if after := len(value.shape) - position - 1:
        # To a size of one all sizes can be expanded, also that which is there.
        whole = node("Concat", [wanted, constant("others", [1] * after)], f"{limit.node}_wanted", axis=0)
        nodes, wanted = [*nodes, whole], whole.outputs[0]
    checked = node("Expand", [value, wanted], passing)
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
    size = int(name["size"])
    if name["end"] == "least":
        return AxisLimit(axis=name["axis"], least=size)
    return AxisLimit(axis=name["axis"], most=size, refuses=node.op_type == "Expand")


def within(
    ranges: Mapping[str, tuple[int, int | None]], limits: Iterable[AxisLimit]
) -> dict[str, tuple[int, int | None]]:
    """Return ``ranges`` with no axis beyond its limit; where a graph only turns, it takes more.

    >>> limits = [AxisLimit(axis="sequence_length", most=704), AxisLimit(axis="batch_size", least=2)]
    >>> within({"sequence_length": (2, None), "batch_size": (1, None)}, limits)
    {'sequence_length': (2, 704), 'batch_size': (2, None)}
    """
    narrowed = dict(ranges)
    for limit in (limit for limit in limits if limit.refuses):
        low, high = narrowed.get(limit.axis, (1, None))
        if limit.least is not None:
            narrowed[limit.axis] = (max(low, limit.least), high)
        else:
            narrowed[limit.axis] = (low, limit.bound if high is None else min(high, limit.bound))
    return narrowed

"""One graph of two traces: of a model that computes in one way up to some size of an axis, and in another beyond.

A model may attend to all tokens of a short text and to blocks of a long one, or take a short cut where there is one
token. A trace holds one way of computing. Where each way can be traced, which of the two is taken is an ONNX ``If``
over the size; what both read of weights lies outside of it. The name of the node that compares the sizes is how a graph
tells its turn to whoever compares it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir
from onnx_ir.passes.common import NameFixPass

from onnx_config.export.either import Condition, either_way
from onnx_config.export.limits import AxisLimit, limit_of
from onnx_config.spec import TensorSpec

__all__ = ["in_two_ways", "one_way", "size_beyond", "size_within"]

_BEYOND = 10
_STEP = 64


def in_two_ways(few: onnx_ir.Model, many: onnx_ir.Model, turn: AxisLimit, specs: Iterable[TensorSpec]) -> onnx_ir.Model:
    """Return one model that computes ``few`` up to the turn, else ``many``; both are taken apart for it.

    Its inputs and outputs are those of ``many``; those of ``few`` have the same names.

    Args:
        few: The graph of sizes up to ``turn.bound``.
        many: The graph of larger ones.
        turn: The axis, and the largest size for which ``few`` holds.
        specs: The inputs, by their axes.

    Raises:
        ValueError: If no input has the axis.
    """
    name, position = _place(turn.axis, specs)

    def turning(inputs: Mapping[str, onnx_ir.Value], _: onnx_ir.Graph) -> Condition:
        size = onnx_ir.node("Shape", [inputs[name]], attributes={"start": position, "end": position + 1})
        most = onnx_ir.tensor(np.array([turn.bound], dtype=np.int64), name=f"{turn.node}_most")
        largest = onnx_ir.Value(name=most.name, const_value=most)
        compared = onnx_ir.node("LessOrEqual", [size.outputs[0], largest], name=turn.node)
        squeezed = onnx_ir.node("Squeeze", [compared.outputs[0]])
        return Condition([size, compared, squeezed], squeezed.outputs[0], [largest])

    return either_way(few, many, ("few", "many"), turning)


def one_way(model: onnx_ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Leave of a graph that turns only the way that inputs of these shapes take, in place; others stay as they are."""
    while (found := _turning(model.graph)) is not None:
        node, size, most = found
        shape = shapes[_given(size.inputs[0]).name or ""]
        fits = shape[size.attributes["start"].as_int()] <= most
        branch = node.attributes["then_branch" if fits else "else_branch"].as_graph()
        ends = list(branch.outputs)
        branch.outputs.clear()
        nodes = list(branch)
        branch.remove(nodes)
        model.graph.insert_before(node, nodes)
        for given, end in zip(list(node.outputs), ends, strict=True):
            given.replace_all_uses_with(end, replace_graph_outputs=True)
            end.name, given.name = given.name, f"{given.name}_of_both_ways"
        model.graph.remove(node)
        # Two ways may call a node by one name.
        NameFixPass()(model)


def _turning(graph: onnx_ir.Graph) -> tuple[onnx_ir.Node, onnx_ir.Node, int] | None:
    """Return the first node that chooses by a turn, the node that tells the size, and the last one before the turn."""
    for node in graph:
        compared: onnx_ir.Node | None = node
        while compared is not None and compared.op_type in ("If", "Squeeze", "Cast", "Reshape"):
            compared = compared.inputs[0].producer() if compared.inputs[0] is not None else None
        if node.op_type == "If" and compared is not None and (turn := limit_of(compared)) is not None:
            size = compared.inputs[0].producer() if compared.inputs[0] is not None else None
            if size is not None and size.op_type == "Shape":
                return node, size, turn.bound
    return None


def _given(value: onnx_ir.Value | None) -> onnx_ir.Value:
    """Return the input that a value is, which may have passed by limits."""
    while value is not None and (node := value.producer()) is not None:
        value = node.inputs[0]
    assert value is not None
    return value


def size_beyond(turn: AxisLimit, largest: int | None, *, whole: bool = False) -> int:
    """Return a size beyond a turn to trace at, which is no multiple of anything, or a ``whole`` one to compare at.

    What fills its sequence up to whole blocks does not where there is nothing to fill up.

    >>> turn = AxisLimit(axis="sequence_length", most=704, refuses=False)
    >>> size_beyond(turn, 4096), size_beyond(turn, 4096, whole=True), size_beyond(turn, 706)
    (715, 768, 706)
    """
    size = (turn.bound // _STEP + 1) * _STEP if whole else (turn.bound + _BEYOND) | 1
    return size if largest is None else min(size, largest)


def size_within(turn: AxisLimit) -> int:
    """Return a size before a turn to trace at, the last one or the one before where that may be whole blocks.

    >>> [size_within(AxisLimit(axis="sequence_length", most=most, refuses=False)) for most in (1, 4, 63, 704)]
    [1, 4, 63, 703]
    """
    return turn.bound if turn.bound % 2 or turn.bound <= _BEYOND else turn.bound - 1


def _place(axis: str, specs: Iterable[TensorSpec]) -> tuple[str, int]:
    """Return an input that has ``axis``, and where."""
    for spec in specs:
        for position, size in spec.axes.items():
            if size == axis:
                return spec.name, position
    raise ValueError(f"no input has the axis {axis}")

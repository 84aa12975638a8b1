"""A graph for one row made one for any number of rows, which it computes one after another.

Some models take the rows of a batch apart in Python (``for image in images``, ``zip(rows, sizes)``), so that every
trace holds for the number of rows that it was made with. Their graph of one row becomes the body of an ONNX ``Scan``,
which goes over the first axis of the inputs and stacks the outputs, or lays them one after another where the model puts
what it makes of all rows into one. Rows that do not depend on one another are what the parity of every graph is checked
on.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir

from onnx_config.spec import TensorSpec

__all__ = ["joined_outputs", "row_axis", "scan_rows"]


def row_axis(specs: Iterable[TensorSpec], axes: Iterable[str]) -> str | None:
    """Return the dynamic axis that counts rows: the first axis of some inputs, and none of any other.

    >>> row_axis([TensorSpec(name="x", dtype="float32", shape=("batch_size", 4))], ["batch_size"])
    'batch_size'
    >>> row_axis([TensorSpec(name="x", dtype="float32", shape=(4, "batch_size"))], ["batch_size"])
    """
    tensors = tuple(specs)
    first = {tensor.shape[0] for tensor in tensors if tensor.shape}
    rows = [axis for axis in axes if axis.endswith("batch_size")]
    if len(rows) != 1 or rows[0] not in first:
        return None
    deeper = [axis for tensor in tensors for axis in tensor.shape[1:] if isinstance(axis, str)]
    # A formula such as 2*batch_size has rows in groups.
    formulas = [axis for axis in first if isinstance(axis, str) and axis != rows[0] and rows[0] in axis]
    return None if formulas or any(rows[0] in axis for axis in deeper) else rows[0]


def joined_outputs(outputs: Iterable[TensorSpec], axes: Iterable[str]) -> list[str]:
    """Return the outputs that look like all rows one after another: one row, as long as no input is.

    >>> shape = (1, "last_hidden_state_dim_1", 32)
    >>> joined_outputs([TensorSpec(name="last_hidden_state", dtype="float32", shape=shape)], ["batch_size", "height"])
    ['last_hidden_state']
    """
    known = set(axes)
    return [
        tensor.name
        for tensor in outputs
        if len(tensor.shape) > 1 and tensor.shape[0] == 1 and isinstance(tensor.shape[1], str)
        and tensor.shape[1] not in known
    ]  # fmt: skip


def scan_rows(program: onnx_ir.Model, axis: str, inputs: Iterable[str], *, joined: Iterable[str] = ()) -> None:
    """Make the graph of one row one of any number, in place.

    Args:
        program: The graph; its outputs and the named inputs have a first axis of size 1.
        axis: The name of that axis from now on.
        inputs: The inputs to go over; the others are the same for every row.
        joined: Outputs that hold what comes of all rows one after another along their second axis; their first stays 1.

    Raises:
        ValueError: If an output's first axis is not one row.
    """
    graph = program.graph
    taken = set(inputs)
    for value in graph.outputs:
        if value.shape is None or len(value.shape) == 0 or value.shape[0] != 1:
            raise ValueError(f"the first axis of {value.name}, {value.shape}, is not one row")
    zero = onnx_ir.Value(name="row_axis", const_value=onnx_ir.tensor(np.array([0], dtype=np.int64), name="row_axis"))
    graph.register_initializer(zero)

    body_inputs, openers, outer = [], [], []
    for value in graph.inputs:
        if value.name not in taken:
            continue
        assert value.shape is not None
        rest = list(value.shape)[1:]
        row = onnx_ir.Value(name=f"{value.name}_row", type=value.type, shape=onnx_ir.Shape(rest))
        opened = onnx_ir.node("Unsqueeze", [row, zero], name=f"open_{value.name}")
        opened.outputs[0].name = f"{value.name}_rows_of_one"
        opened.outputs[0].type = value.type
        opened.outputs[0].shape = onnx_ir.Shape([1, *rest])
        value.replace_all_uses_with(opened.outputs[0])
        value.shape = onnx_ir.Shape([axis, *rest])
        body_inputs.append(row)
        openers.append(opened)
        outer.append(value)

    nodes = list(graph)
    one_after_another = set(joined)
    body_outputs, closers, results, ends, joiners = [], [], [], [], []
    for value in graph.outputs:
        assert value.shape is not None
        rest = list(value.shape)[1:]
        closed = onnx_ir.node("Squeeze", [value, zero], name=f"close_{value.name}")
        closed.outputs[0].name = f"{value.name}_of_row"
        closed.outputs[0].type = value.type
        closed.outputs[0].shape = onnx_ir.Shape(rest)
        body_outputs.append(closed.outputs[0])
        closers.append(closed)
        results.append(onnx_ir.Value(name=value.name, type=value.type, shape=onnx_ir.Shape([axis, *rest])))
        ends.append(results[-1])
        if value.name in one_after_another and rest:
            results[-1].name = f"{value.name}_by_row"
            joiners += _joiners(graph, results[-1], value.name)
            ends[-1] = joiners[-1].outputs[0]
        value.name = f"{value.name}_of_one"
    graph.outputs.clear()
    graph.remove(nodes)
    body = onnx_ir.Graph(body_inputs, body_outputs, nodes=[*openers, *nodes, *closers], name="row")
    scan = onnx_ir.Node(
        "",
        "Scan",
        outer,
        [onnx_ir.AttrGraph("body", body), onnx_ir.AttrInt64("num_scan_inputs", len(outer))],
        outputs=results,
        name="scan_rows",
    )
    graph.extend([scan, *joiners])
    graph.outputs.extend(ends)


def _joiners(graph: onnx_ir.Graph, rows: onnx_ir.Value, name: str) -> list[onnx_ir.Node]:
    """Return the nodes that lay the rows of ``rows`` one after another in one row, called ``name``."""
    assert rows.shape is not None
    both = onnx_ir.tensor(np.array([1, -1], dtype=np.int64), name=f"{name}_in_one_row")
    start = onnx_ir.Value(name=both.name, const_value=both)
    graph.register_initializer(start)
    rest = onnx_ir.node("Shape", [rows], attributes={"start": 2}, name=f"rest_of_{name}")
    whole = onnx_ir.node("Concat", [start, rest.outputs[0]], attributes={"axis": 0}, name=f"shape_of_{name}")
    for node in (rest, whole):
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    end = onnx_ir.node("Reshape", [rows, whole.outputs[0]], name=f"join_{name}")
    end.outputs[0].name, end.outputs[0].type = name, rows.type
    end.outputs[0].shape = onnx_ir.Shape([1, f"{name}_dim_1", *list(rows.shape)[2:]])
    return [rest, whole, end]

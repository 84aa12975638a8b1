"""What a graph decides while it runs: the places that its top-k, its argmax and its comparisons take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir

from onnx_config.export.graph_file import read_graph

__all__ = ["choices_of_graph"]

Array = npt.NDArray[Any]

_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT16, None)


def choices_of_graph(path: Path, inputs: Mapping[str, Array], *, device: str, threads: int) -> list[Array]:
    """Run the graph of a file with its choices as further outputs, and return those in the order of its nodes.

    Choices inside loops are not seen. The file is only read.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.parity import open_session

    model = read_graph(path)
    chosen = list(_chosen(model.graph))
    for value, kind in chosen:
        value.dtype = kind
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    names = [value.name or "" for value, _ in chosen]
    if not names:
        return []
    session = open_session(path, device=device, threads=threads, graph=onnx_ir.to_proto(model).SerializeToString())
    wanted = {i.name for i in session.get_inputs()}
    made: list[Array] = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
    return made


def _chosen(graph: onnx_ir.Graph) -> Iterator[tuple[onnx_ir.Value, onnx_ir.DataType]]:
    """Yield what holds a choice in the graph, with its element type."""
    for node in graph:
        first = node.inputs[0] if node.inputs else None
        if first is None or first.dtype not in _FLOATS:
            continue
        if node.op_type == "TopK":
            places = node.outputs[1]
            # Where the rows were looked at in another order, what counts is what stands there.
            orders = [n.outputs[0] for n, at in places.uses() if n.op_type == "Gather" and at == 1 and _constant(n)]
            yield from ((value, onnx_ir.DataType.INT64) for value in (orders or [places]))
        elif node.op_type in ("ArgMax", "ArgMin"):
            yield node.outputs[0], onnx_ir.DataType.INT64
        elif node.op_type in _COMPARISONS:
            yield node.outputs[0], onnx_ir.DataType.BOOL


def _constant(node: onnx_ir.Node) -> bool:
    data = node.inputs[0]
    return data is not None and data.const_value is not None and data.shape is not None and len(data.shape) == 1

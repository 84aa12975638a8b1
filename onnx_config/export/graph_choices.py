"""What a graph decides while it runs: the places that its top-k, its argmax and its comparisons take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir

from onnx_config.export.choices import GraphChoice
from onnx_config.export.graph_file import read_graph
from onnx_config.export.turns import one_way

__all__ = ["choices_of_graph"]

Array = npt.NDArray[Any]

_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT16, None)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a graph holds a choice."""

    scores: tuple[onnx_ir.Value, ...]
    """What it takes from, or both sides of a comparison."""
    places: onnx_ir.Value


def choices_of_graph(path: Path, inputs: Mapping[str, Array], *, device: str, threads: int) -> list[GraphChoice]:
    """Run the graph of a file with its choices as further outputs, and return those in the order of its nodes.

    Choices inside loops are not seen; of a graph that turns, those of the way that is taken. The file is only read.

    Raises:
        InputError: If the device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.session import open_session

    model = read_graph(path)
    one_way(model, {name: value.shape for name, value in inputs.items()})
    chosen = list(_chosen(model.graph))
    names: dict[str, None] = {}
    given = {value.name or "" for value in model.graph.inputs}
    known = {value.name or "": value.const_value for value in model.graph.initializers.values()}
    for place in chosen:
        for value in (*place.scores, place.places):
            name = value.name or ""
            if name in given or name in known or name in names:
                continue
            names[name] = None
            if not value.is_graph_output():
                # Graphs need not say the types of what lies inside; the runtime infers those of outputs, too.
                model.graph.outputs.append(value)
    if not chosen:
        return []
    session = open_session(path, device=device, threads=threads, graph=onnx_ir.to_proto(model).SerializeToString())
    wanted = {i.name for i in session.get_inputs()}
    found: dict[str, Array] = {name: constant.numpy() for name, constant in known.items() if constant is not None}
    found |= {name: value for name, value in inputs.items() if name in wanted}
    found |= zip(names, session.run(list(names), {name: found[name] for name in wanted}), strict=True)
    return [_read(place, found) for place in chosen if found[place.scores[0].name or ""].dtype.kind == "f"]


def _read(place: _Place, found: Mapping[str, Array]) -> GraphChoice:
    first, *second = (found[value.name or ""] for value in place.scores)
    scores = first - second[0] if second else first
    return GraphChoice(scores=scores, places=found[place.places.name or ""])


def _chosen(graph: onnx_ir.Graph) -> Iterator[_Place]:
    """Yield where a graph holds its choices; where it says of no type, also what chooses among whole numbers."""
    for node in graph:
        first = node.inputs[0] if node.inputs else None
        if first is None or first.dtype not in _FLOATS:
            continue
        if node.op_type == "TopK":
            places = node.outputs[1]
            # Where the rows were looked at in another order, what counts is what stands there in theirs.
            orders = [n.outputs[0] for n, at in places.uses() if n.op_type == "Gather" and at == 1 and _constant(n, 0)]
            before = first.producer()
            if orders and before is not None and before.op_type == "Gather" and before.inputs[0] is not None:
                first = before.inputs[0]
            yield from (_Place((first,), value) for value in (orders or [places]))
        elif node.op_type in ("ArgMax", "ArgMin"):
            yield _Place((first,), node.outputs[0])
        elif node.op_type in _COMPARISONS and node.inputs[1] is not None:
            yield _Place((first, node.inputs[1]), node.outputs[0])


def _constant(node: onnx_ir.Node, at: int) -> bool:
    data = node.inputs[at]
    return data is not None and data.const_value is not None and data.shape is not None and len(data.shape) == 1

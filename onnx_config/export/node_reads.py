"""What the nodes of a graph read, also in the graphs that they hold.

What the body of a loop reads from outside is none of its node's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir
from onnx_ir.traversal import RecursiveGraphIterator

__all__ = ["nested", "nodes_behind", "read_from_outside", "values_read"]


def nested(nodes: Iterable[onnx_ir.Node]) -> Iterator[onnx_ir.Node]:
    """Return nodes with those of the graphs that they hold."""
    return RecursiveGraphIterator(onnx_ir.GraphView((), (), nodes=tuple(nodes)))


def values_read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """Yield what a node reads, and what is read in the graphs that it holds."""
    for inner in nested([node]):
        yield from (value for value in inner.inputs if value is not None)


def read_from_outside(nodes: Sequence[onnx_ir.Node]) -> Iterator[onnx_ir.Value]:
    """Yield what nodes read that neither they nor the graphs that they hold make."""
    made: set[onnx_ir.Value] = set()
    for node in nested(nodes):
        made.update(node.outputs)
        if node.graph is not None and node.graph is not nodes[0].graph:
            made.update(node.graph.inputs)
    yield from (value for node in nodes for value in values_read(node) if value not in made)


def nodes_behind(value: onnx_ir.Value, graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
    """Yield the nodes of ``graph`` that ``value`` is computed by, each once."""
    seen: set[onnx_ir.Node] = set()
    left = [value]
    while left:
        node = left.pop().producer()
        if node is None or node in seen or node.graph is not graph:
            continue
        seen.add(node)
        yield node
        left += values_read(node)

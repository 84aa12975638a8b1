"""Which nodes of a traced graph belong to which layer of its model, and what they read.

torch notes for each node in which module it was computed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir

__all__ = ["is_of_no_layer", "layers_of_nodes", "nested", "read_from_outside"]

_SCOPES = "pkg.torch.onnx.name_scopes"


def layers_of_nodes(graph: onnx_ir.Graph, path: str) -> dict[onnx_ir.Node, int]:
    """Return which layer of a list each node belongs to, of those that do.

    What the model computes between two layers belongs to the later one, as does what only one layer reads.
    """
    within = re.compile(rf"{re.escape(path)}\.(\d+)(?:\.|$)")
    layers: dict[onnx_ir.Node, int] = {}
    behind: set[onnx_ir.Node] = set()
    nodes = list(graph)
    outermost = {inner: node for node in nodes for inner in nested([node])}
    for node in nodes:
        layer = _layer(node, within)
        if layer is not None:
            layers[node] = layer
        if layer is not None or any(value.producer() in behind for value in _read(node)):
            behind.add(node)
    given = {value.producer() for value in graph.outputs}
    for node in reversed(nodes):
        if node in layers:
            continue
        readers = {layers.get(outermost[use.node]) for value in node.outputs for use in value.uses()}
        known = readers - {None}
        if known and (node in behind or (len(readers) == 1 and node not in given)):
            layers[node] = min(reader for reader in readers if reader is not None)
    return layers


def nested(nodes: Iterable[onnx_ir.Node]) -> Iterator[onnx_ir.Node]:
    """Yield nodes with those of the graphs that they hold."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type is onnx_ir.AttributeType.GRAPH:
                yield from nested(attribute.as_graph())
            elif attribute.type is onnx_ir.AttributeType.GRAPHS:
                for graph in attribute.as_graphs():
                    yield from nested(graph)


def read_from_outside(nodes: Sequence[onnx_ir.Node]) -> Iterator[onnx_ir.Value]:
    """Yield what nodes read that neither they nor the graphs that they hold make."""
    within = list(nested(nodes))
    made = {value for node in within for value in node.outputs}
    for node in within:
        if node.graph is not nodes[0].graph and node.graph is not None:
            made.update(node.graph.inputs)
    yield from (value for node in nodes for value in _read(node) if value not in made)


def is_of_no_layer(value: onnx_ir.Value) -> bool:
    """Return whether a value was computed without any weight: of sizes, of masks and of what the code wrote."""
    waiting, seen = [value], {value}
    while waiting:
        made = waiting.pop()
        if made.is_initializer():
            return False
        if (node := made.producer()) is not None:
            new = set(_read(node)) - seen
            seen |= new
            waiting += new
    return True


def _layer(node: onnx_ir.Node, within: re.Pattern[str]) -> int | None:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return None
    found = [within.match(scope) for scope in ast.literal_eval(scopes)[:-1]]
    return next((int(match[1]) for match in found if match), None)


def _read(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    for inner in nested([node]):
        yield from (value for value in inner.inputs if value is not None)

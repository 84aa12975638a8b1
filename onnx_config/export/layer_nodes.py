"""Which nodes of a traced graph belong to which layer of its model.

torch notes for each node in which module it was computed.
"""

from __future__ import annotations

import ast
import re

import onnx_ir

from onnx_config.export.node_reads import nested, nodes_behind, values_read

__all__ = ["is_of_no_layer", "layers_of_nodes"]

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
        if layer is not None or any(value.producer() in behind for value in values_read(node)):
            behind.add(node)
    given = {value.producer() for value in graph.outputs}
    for node in reversed(nodes):
        if node in layers:
            continue
        readers = {layers.get(outermost[use.node]) for value in node.outputs for use in value.uses()}
        known = [reader for reader in readers if reader is not None]
        if known and (node in behind or (len(readers) == 1 and node not in given)):
            layers[node] = min(known)
    return layers


def is_of_no_layer(value: onnx_ir.Value, graph: onnx_ir.Graph) -> bool:
    """Return whether a value was computed without any weight: of sizes, of masks and of what the code wrote."""
    return not any(read.is_initializer() for node in nodes_behind(value, graph) for read in values_read(node))


def _layer(node: onnx_ir.Node, within: re.Pattern[str]) -> int | None:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return None
    found = [within.match(scope) for scope in ast.literal_eval(scopes)[:-1]]
    return next((int(match[1]) for match in found if match), None)

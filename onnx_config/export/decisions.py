"""One graph of two traces: of a model that decides by the values of its inputs, and was traced with either decision.

A model may look whether any token is to be treated otherwise, and do so only then. A trace holds one decision. Where
each can be traced, what was asked is computed ahead of both, and an ONNX ``If`` takes the one or the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir

from onnx_config.export.either import Condition, either_way

__all__ = ["by_decision"]


def by_decision(first: onnx_ir.Model, second: onnx_ir.Model, decision: str) -> onnx_ir.Model:
    """Return one model that computes ``first`` where it decides as that was traced, else ``second``.

    Both are taken apart for it. Its outputs are those of ``second``.

    Args:
        first: A graph that has one output more, which tells whether the decision is the one that it was traced with.
        second: The graph of the other decision.
        decision: The name of that output.

    Raises:
        ValueError: If there is no such output.
    """
    asked = next((value for value in first.graph.outputs if value.name == decision), None)
    if asked is None:
        raise ValueError(f"the graph does not tell {decision}")

    def asking(_: Mapping[str, onnx_ir.Value], branch: onnx_ir.Graph) -> Condition:
        needed = set(_behind(asked, branch))
        nodes = [node for node in branch if node in needed]
        # What both the question and the answer need is computed once, ahead of both.
        branch.remove(nodes)
        return Condition(nodes, asked)

    return either_way(first, second, ("as_asked", "otherwise"), asking)


def _behind(value: onnx_ir.Value, graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
    """Yield the nodes of ``graph`` that ``value`` is computed by."""
    seen: set[onnx_ir.Node] = set()
    left = [value]
    while left:
        node = left.pop().producer()
        if node is None or node in seen or node.graph is not graph:
            continue
        seen.add(node)
        yield node
        left += [given for given in node.inputs if given is not None]
        for attribute in node.attributes.values():
            bodies = (
                [attribute.as_graph()]
                if attribute.type == onnx_ir.AttributeType.GRAPH
                else attribute.as_graphs()
                if attribute.type == onnx_ir.AttributeType.GRAPHS
                else []
            )
            # What a loop reads from outside is none of its node's inputs.
            left += [
                given for body in bodies for inner in body.all_nodes() for given in inner.inputs if given is not None
            ]

"""One graph of two traces: of a model that decides by the values of its inputs, and was traced with either decision.

A model may look whether any token is to be treated otherwise, and do so only then. A trace holds one decision. Where
each can be traced, what was asked is computed ahead of both, and an ONNX ``If`` takes the one or the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

from onnx_config.export.either import Condition, either_way
from onnx_config.export.node_reads import nodes_behind

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
        needed = set(nodes_behind(asked, branch))
        nodes = [node for node in branch if node in needed]
        # What both the question and the answer need is computed once, ahead of both.
        branch.remove(nodes)
        return Condition(nodes, asked)

    return either_way(first, second, ("as_asked", "otherwise"), asking)

"""Keeps onnxscript's rewriting rules from taking a small constant for zero, and from looking where nothing can match.

Its patterns compare constants with an absolute tolerance of 1e-8, so that the rule ``x + 0 -> x`` also takes the
epsilon of a normalization away where that is 1e-8: Helium's, by 7e-5 of its output. A pattern of several outputs is
compared with all pairs of nodes in the graph, so that the time grows with the square of the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from onnxscript.rewriter import _matcher, _rewrite_rule

__all__ = ["exact_patterns"]

# Constants of patterns, such as the square root of two, are compared with their float32.
_RELATIVE = 1e-6


@contextmanager
def exact_patterns() -> Iterator[None]:
    """Have patterns match their own constants only, and look where they can match only, until the exit."""
    matcher, rule = _matcher.SimplePatternMatcher, _rewrite_rule.RewriteRule
    match_constant, match, try_rewrite = matcher._match_constant, matcher.match, rule.try_rewrite

    def match_exactly(self: Any, pattern_constant: Any, value: Any) -> bool:
        pattern_constant._abs_tol = 0.0
        pattern_constant._rel_tol = min(pattern_constant._rel_tol, _RELATIVE)
        return match_constant(self, pattern_constant, value)

    def try_own_operator(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        last = self._target_pattern.output_nodes[0]
        if not (last.op.matches(node.op_type) and last.domain.matches(node.domain)):
            return None
        return try_rewrite(self, model, graph, node, **options)

    def match_near(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            first, *others = self.pattern.output_nodes
            shared = [n for n, value in enumerate(first.inputs) if all(value in other.inputs for other in others)]
            if shared and len(node.inputs) > shared[0]:
                graph = _Readers(graph, node.inputs[shared[0]])
        return match(self, model, graph, node, **options)

    with (
        patch.object(matcher, "_match_constant", match_exactly),
        patch.object(matcher, "match", match_near),
        patch.object(rule, "try_rewrite", try_own_operator),
    ):
        yield


class _Readers:
    """Those nodes of a graph that read one value, as a graph to look for further outputs of a pattern in."""

    def __init__(self, graph: Any, value: Any) -> None:
        self.graph = getattr(graph, "graph", graph)
        """The graph itself, also of a function."""
        self._nodes = [] if value is None else list(dict.fromkeys(use.node for use in value.uses()))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._nodes)

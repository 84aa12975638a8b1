"""Keeps onnxscript's rewriting rules from taking a small constant for zero.

Its patterns compare constants with an absolute tolerance of 1e-8, so that the rule ``x + 0 -> x`` also takes the
epsilon of a normalization away where that is 1e-8: Helium's, by 7e-5 of its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxscript.rewriter import _matcher

__all__ = ["exact_constants"]

# Constants of patterns, such as the square root of two, are compared with their float32.
_RELATIVE = 1e-6


@contextmanager
def exact_constants() -> Iterator[None]:
    """Have patterns match their own constants only, until the exit."""
    owner = _matcher.SimplePatternMatcher
    original = owner._match_constant

    def match_constant(self: Any, pattern_constant: Any, value: Any) -> bool:
        pattern_constant._abs_tol = 0.0
        pattern_constant._rel_tol = min(pattern_constant._rel_tol, _RELATIVE)
        return original(self, pattern_constant, value)

    owner._match_constant = match_constant  # type: ignore[method-assign]
    try:
        yield
    finally:
        owner._match_constant = original  # type: ignore[method-assign]

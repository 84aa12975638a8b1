"""Keeps torch from giving up over equations between sizes that hold for all sizes.

torch solves what a trace asks of each size, and expects an equation among it to leave one size only. Of a text that is
filled up to whole blocks, it asks whether so many blocks of so many tokens are as many tokens as there are, which is
true whatever the length is: torch then stops with an assertion of its own. Such an equation says nothing, and goes.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import sympy
from sympy.solvers.inequalities import reduce_inequalities
from torch.fx.experimental.symbolic_shapes import DimConstraints

__all__ = ["no_vacuous_equations"]


def no_vacuous_equations() -> Any:
    """Have torch solve without such equations until the exit."""
    original = DimConstraints.solve

    def solve(constraints: DimConstraints) -> None:
        for symbol in list(constraints._symbols_with_equalities):
            conditions = constraints._univariate_inequalities[symbol]
            solution = reduce_inequalities(conditions, symbol)
            if _leaves_a_range(solution):
                constraints._symbols_with_equalities.discard(symbol)
                kept = {c for c in conditions if not isinstance(c, sympy.Eq)}
                constraints._univariate_inequalities[symbol] = kept
        original(constraints)

    return patch.object(DimConstraints, "solve", solve)


def _leaves_a_range(solution: Any) -> bool:
    parts = solution.args if isinstance(solution, sympy.And) else (solution,)
    return not any(isinstance(part, sympy.Eq) for part in parts) and solution != sympy.false

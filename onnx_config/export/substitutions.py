"""Loops written in Python that change the rows of one matrix by its earlier rows, and nothing else.

Such a loop may solve a triangular system, which `onnx_config.export.triangular` finds out when it meets the matrix.
"""

from __future__ import annotations

import ast

__all__ = ["HELPER", "beside_substitution"]

HELPER = "_ferry_triangular"
"""The name under which rewritten code finds `onnx_config.export.triangular`."""

_LOOP = "_rows"
# With these alone, what is left of a matrix is a polynomial in each of its numbers.
_METHODS = frozenset({"clone", "contiguous", "sum", "transpose", "unsqueeze", "squeeze"})
_OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.MatMult)


def beside_substitution(loop: ast.For) -> ast.If | None:
    """Return a loop as it stands and as an inverse, and the question which it is; ``None`` where it cannot be one."""
    call = loop.iter
    if (
        loop.orelse
        or not isinstance(loop.target, ast.Name)
        or not isinstance(call, ast.Call)
        or ast.unparse(call.func) != "range"
        or not 1 <= len(call.args) <= 2
        or call.keywords
    ):
        return None
    matrices: set[str] = set()
    made: dict[str, None] = {}
    for statement in loop.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                made[name] = None
                read = [value]
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=places)], value=value):
                matrices.add(name)
                read = [value, places]
            case _:
                return None
        if not all(map(_is_polynomial, read)):
            return None
    if len(matrices) != 1 or matrices & made.keys() or loop.target.id in made:
        return None
    names = {node.id for node in ast.walk(ast.Module(body=loop.body, type_ignores=[])) if isinstance(node, ast.Name)}
    if names - {loop.target.id, *matrices, *made}:
        return None
    if not any(_is_end(node, loop.target.id) for node in ast.walk(loop)):
        return None
    (matrix,) = matrices
    limits = [ast.unparse(argument) for argument in call.args]
    given = [f"_limit_{number}" for number in range(len(limits))]
    lines = [
        f"def {_LOOP}({', '.join([matrix, *given])}):",
        f"    for {loop.target.id} in range({', '.join(given)}):",
        "        pass",
        f"if {HELPER}.inverts({', '.join([_LOOP, matrix, *limits])}):",
        f"    {HELPER}.inverted_in_place({matrix})",
        # Whoever reads what the last row left in passing is told that it is not there.
        *(f"    {name} = None; del {name}" for name in made),
        "else:",
        "    pass",
    ]
    definition, both = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.FunctionDef)
    assert isinstance(both, ast.If)
    inner = definition.body[0]
    assert isinstance(inner, ast.For)
    inner.body = ast.parse(ast.unparse(ast.Module(body=loop.body, type_ignores=[]))).body
    both.orelse = [loop]
    whole = ast.If(test=ast.Constant(value=True), body=[definition, both], orelse=[])
    own = {id(node) for node in ast.walk(loop)}
    for node in ast.walk(whole):
        if id(node) not in own and isinstance(node, ast.stmt | ast.expr | ast.arg):
            ast.copy_location(node, loop)
    return whole


def _is_end(node: ast.AST, index: str) -> bool:
    """Return whether a node takes what lies before the ``index``-th."""
    return isinstance(node, ast.Slice) and isinstance(node.upper, ast.Name) and node.upper.id == index


def _is_polynomial(value: ast.expr) -> bool:
    """Return whether only sums, products and parts of numbers are taken."""
    for node in ast.walk(value):
        match node:
            case ast.Call(func=ast.Attribute(attr=method)) if method in _METHODS:
                continue
            case ast.Attribute() | ast.Name() | ast.Constant() | ast.Subscript() | ast.Slice() | ast.Tuple():
                continue
            case ast.keyword(arg=name) if name is not None:
                continue
            case ast.BinOp(op=operation) if isinstance(operation, _OPERATIONS):
                continue
            case ast.UnaryOp(op=ast.USub()) | ast.operator() | ast.unaryop() | ast.expr_context():
                continue
            case _:
                return False
    return True

"""Loops written in Python that take the ``i``-th so many tokens of a text, as loops that take the ``i``-th chunk.

Such a loop counts where its chunk begins and where it ends, which is at the end of the text at the latest:
``start = i * size; end = min(start + size, length)``. What is computed of these alone is taken out of the loop; in
place of ``x[:, start:end]`` a step reads the ``i``-th of the chunks that `onnx_config.export.chunks_of` makes of ``x``.
Those are whole ones, and the last is what the text leaves of it: the loop over chunks passes it by, and it is gone
through afterwards, as the code has it.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

__all__ = ["HELPER", "Windows"]

HELPER = "_ferry_chunks"
"""The name under which rewritten code finds `onnx_config.export.chunks_of`."""

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult)


@dataclass(slots=True)
class Windows:
    """A loop over the chunks of a text, taken apart."""

    loop: ast.For
    places: list[ast.Assign] = field(default_factory=list)
    """The statements that compute places alone."""
    taken: dict[tuple[str, int, str], str] = field(default_factory=dict)
    """Tensor, axis, and the first and the last place of a chunk -> the name of the chunks."""
    rest: list[ast.stmt] = field(default_factory=list)
    """What else a step does, on its chunks."""

    @classmethod
    def of(cls, loop: ast.For, local: frozenset[str]) -> Windows | None:
        """Return what a loop over chunks consists of; ``None``: it is none."""
        call = loop.iter
        if (
            loop.orelse
            or not isinstance(loop.target, ast.Name)
            or not isinstance(call, ast.Call)
            or ast.unparse(call.func) != "range"
            or len(call.args) != 1
            or call.keywords
        ):
            return None
        found = cls(loop)
        moving = {loop.target.id}
        written = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for statement in loop.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if _is_place(value, moving, written):
                    found.places.append(statement)
                    moving.add(name)
                case _:
                    found.rest.append(copy.deepcopy(statement))
        if any(_names(statement, ast.Store) & moving for statement in found.rest):
            return None
        reads = _Reads(found, moving, local - written)
        found.rest = [reads.visit(statement) for statement in found.rest]
        return found if found.taken and loop.target.id not in found.used else None

    @property
    def used(self) -> set[str]:
        """Names that a step reads beside its chunks."""
        return {
            node.id
            for statement in self.rest
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and node.id not in self.taken.values() and not hasattr(node, "chunk")
        }

    def beside(self) -> tuple[ast.If, ast.For]:
        """Return the question whether these are chunks, with a loop over them and one over the rest, and the former."""
        (count,) = self.loop.iter.args  # type: ignore[attr-defined]  # a call, as was seen
        assert isinstance(self.loop.target, ast.Name)
        index = self.loop.target.id
        used = self.used
        sizes = [name for s in self.places for name in sorted(_names(s, ast.Store)) if name in used]
        carried = sorted({name for s in self.rest for name in _names(s, ast.Store)} & self._read_before())
        taken = "".join(f"({name}, {axis}), " for name, axis, _ in self.taken)
        ends = "".join(f"({ends}), " for _, _, ends in self.taken)
        lists = sorted({name for s in self.rest if (name := _appended(s)) is not None})
        lines = [
            f"def _places({index}):",
            f"    return ({ends}), ({''.join(f'{name}, ' for name in sizes)})",
            f"_chunks = {HELPER}.chunks({ast.unparse(count)}, _places, ({taken}))",
            "if _chunks is not None:",
            *(f"    {name} = _chunks.size({at})" for at, name in enumerate(sizes)),
            *(f"    {name} = _chunks.of({at})" for at, name in enumerate(self.taken.values())),
            "    _kept = _chunks.kept",
            f"    for {index} in range(_chunks.count):",
            *(f"        _before_{at} = {name}" for at, name in enumerate(carried)),
            *(
                f"        {name} = {HELPER}.after(_kept[{index}], {name}, _before_{at})"
                for at, name in enumerate(carried)
            ),
            *(f"    {name} = _chunks.entries({name})" for name in lists),
            f"    for {index} in _chunks.rest:",
            "        pass",
            "else:",
            "    pass",
        ]
        definition, assigned, both = ast.parse("\n".join(lines)).body
        assert isinstance(definition, ast.FunctionDef)
        assert isinstance(both, ast.If)
        definition.body[:0] = self.places
        whole, last = (statement for statement in both.body if isinstance(statement, ast.For))
        whole.body[len(carried) : len(carried)] = self.rest
        last.body = copy.deepcopy(self.loop.body)
        both.orelse = [self.loop]
        return ast.If(test=ast.Constant(value=True), body=[definition, assigned, both], orelse=[]), whole

    def _read_before(self) -> set[str]:
        """Return the names that a step reads before it writes them, if it does."""
        written: set[str] = set()
        found: set[str] = set()
        for statement in self.rest:
            found |= _names(statement, ast.Load) - written
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                found |= {statement.target.id} - written
            written |= _names(statement, ast.Store)
        return found


class _Reads(ast.NodeTransformer):
    """Puts the ``i``-th of the chunks where a step takes them out of a tensor."""

    def __init__(self, windows: Windows, moving: set[str], tensors: frozenset[str]) -> None:
        self._windows = windows
        self._moving = moving
        self._tensors = tensors

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        elements = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        at = [i for i, element in enumerate(elements) if self._is_window(element)]
        if len(at) != 1 or not isinstance(node.value, ast.Name) or node.value.id not in self._tensors:
            return self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            # What a step writes stays where it is, and the loop as it stands.
            return self.generic_visit(node)
        before, after = elements[: at[0]], elements[at[0] + 1 :]
        if not all(map(_is_whole, (*before, *after))):
            return self.generic_visit(node)
        axis = -1 - len(after) if any(isinstance(element, ast.Constant) for element in before) else len(before)
        window = elements[at[0]]
        assert isinstance(window, ast.Slice)
        assert window.lower is not None
        assert window.upper is not None
        key = (node.value.id, axis, f"{ast.unparse(window.lower)}, {ast.unparse(window.upper)}")
        name = self._windows.taken.setdefault(key, f"_chunks_{len(self._windows.taken)}")
        index = copy.copy(self._windows.loop.target)
        assert isinstance(index, ast.Name)
        index = ast.Name(id=index.id, ctx=ast.Load())
        index.chunk = True  # type: ignore[attr-defined]  # it is no use of the number
        return ast.Subscript(value=ast.Name(id=name, ctx=ast.Load()), slice=index, ctx=ast.Load())

    def _is_window(self, element: ast.expr) -> bool:
        return (
            isinstance(element, ast.Slice)
            and element.step is None
            and element.lower is not None
            and element.upper is not None
            and bool(_names(element.lower, ast.Load) & self._moving)
            and bool(_names(element.upper, ast.Load) & self._moving)
        )


def _names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def _appended(statement: ast.stmt) -> str | None:
    """Return the list that a statement appends to."""
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"))):
            return name
    return None


def _is_place(value: ast.expr, moving: set[str], written: set[str]) -> bool:
    """Return whether a value is reckoned of places and of numbers that are the same for all steps, and of a place."""
    for node in ast.walk(value):
        match node:
            case ast.Name(id=name) if name in moving or name == "min" or name not in written:
                continue
            case ast.Call(func=ast.Name(id="min"), keywords=[]) | ast.Attribute(value=ast.Name()) | ast.Constant():
                continue
            case ast.BinOp(op=operation) if isinstance(operation, _ARITHMETIC):
                continue
            case ast.operator() | ast.expr_context():
                continue
            case _:
                return False
    return bool(_names(value, ast.Load) & moving)


def _is_whole(element: ast.expr) -> bool:
    whole = isinstance(element, ast.Slice) and element.lower is None and element.upper is None and element.step is None
    return whole or (isinstance(element, ast.Constant) and element.value is ...)

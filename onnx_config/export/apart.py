"""Takes single operators of a traced program apart, where they stand."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["take_apart"]

_Node = torch.fx.Node


def take_apart(graph: torch.fx.Graph, has_spelling: Callable[[_Node], bool], translated: set[Any]) -> None:
    """Replace operators without a spelling by what torch computes them of, where all of that has one.

    What writes into its arguments stays, since what looks at them is elsewhere; so does what cannot be taken apart.

    Args:
        graph: The program's; changed in place. Every node has the value that it had on shapes, in ``meta["val"]``.
        has_spelling: Whether an operator can be translated as it stands, or under another name.
        translated: Operators with a translation of their own, which are not taken apart.
    """
    left = [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and not has_spelling(node)
    ]
    if not left:
        return
    from torch.onnx._internal.exporter import _decomp

    table = _decomp.create_onnx_friendly_decomposition_table(translated)
    for node in left:
        parts = _parts(node, table)
        if parts is None:
            continue
        for counted in parts.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default):
            _count_along_axis(counted)
        if all(_stands_alone(part) and has_spelling(part) for part in parts.nodes):
            _put_in_place(node, parts)


def _parts(node: _Node, table: Any) -> torch.fx.Graph | None:
    """Return what an operator is computed of, its node arguments as placeholders; ``None``: that cannot be told."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    given, structure = pytree.tree_flatten((node.args, node.kwargs))
    places = [place for place, value in enumerate(given) if isinstance(value, _Node)]
    values = [given[place].meta.get("val") for place in places]
    # A number of rows that depends on values has a name in the program, and would be given another.
    if any(value is None for value in values) or free_unbacked_symbols(node.meta.get("val")):
        return None

    def run(*arguments: Any) -> Any:
        filled = list(given)
        for place, argument in zip(places, arguments, strict=True):
            filled[place] = argument
        positional, named = pytree.tree_unflatten(filled, structure)
        return node.target(*positional, **named)  # type: ignore[operator]  # an overload

    mode = detect_fake_mode(values)
    environment = None if mode is None else mode.shape_env
    # What a decomposition makes of shapes alone is to be as fake as what it is given, and what it takes for granted of
    # sizes would hold for all of the program.
    with (
        torch.no_grad(),
        mode or nullcontext(),
        nullcontext() if environment is None else environment.error_on_new_guards(),
    ):
        try:
            return make_fx(run, decomposition_table=table)(*values).graph
        # Each decomposition has its own reasons to refuse; the program is traced again then.
        except Exception:  # noqa: BLE001
            return None


def _count_along_axis(node: _Node) -> None:
    """Let the number of elements of a tensor of one axis be its size, which has a translation."""
    (tensor,) = node.args
    if isinstance(tensor, _Node) and tensor.meta["val"].dim() == 1:
        node.target, node.args = torch.ops.aten.sym_size.int, (tensor, 0)


def _stands_alone(part: _Node) -> bool:
    if part.op == "call_function":
        writes = isinstance(part.target, torch._ops.OpOverload) and part.target._schema.is_mutable
        return "val" in part.meta and not writes
    return part.op in ("placeholder", "output")


def _put_in_place(node: _Node, parts: torch.fx.Graph) -> None:
    given = [value for value in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(value, _Node)]
    made = dict(zip(parts.find_nodes(op="placeholder"), given, strict=True))
    (end,) = parts.find_nodes(op="output")
    result = end.args[0]
    taken = list(node.users)
    if not isinstance(result, _Node) and not all(user.target is operator.getitem for user in taken):
        return
    with node.graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                made[part] = node.graph.node_copy(part, made.__getitem__)
                made[part].meta = {**node.meta, "val": part.meta["val"]}
    if isinstance(result, _Node):
        node.replace_all_uses_with(made[result])
    else:
        for user in taken:
            user.replace_all_uses_with(made[result[user.args[1]]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)

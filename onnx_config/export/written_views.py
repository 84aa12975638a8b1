"""Turns a write into a part of a tensor, or into one that is also looked at in another way, into a new tensor.

``y[:, 0].add_(1)`` changes ``y``. What the part is then is put in its place in a new tensor, and whatever looks at the
memory later, under whichever name, looks at that in the same way. This is what torch does when it takes a program
apart, for which it runs all of it twice more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch

__all__ = ["drop_unread_writes", "write_to_new_tensor"]

_aten = torch.ops.aten
_Node = torch.fx.Node


def drop_unread_writes(graph: torch.fx.Graph, *, is_new: Callable[[_Node], bool]) -> None:
    """Take out writes into memory that nothing looks at later, such as the first weights of a layer made in vain."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable or node.users:
            continue
        if [a.name for a in target._schema.arguments if a.alias_info is not None] != ["self"]:
            continue
        *_, root = _path(node.args[0])
        if is_new(root) and all(
            order[user] <= order[node] for look in _looks(root, order, order[node], is_new) for user in look.users
        ):
            graph.erase_node(node)


def write_to_new_tensor(
    node: _Node, order: dict[_Node, int], *, is_new: Callable[[_Node], bool], copying: Callable[[Any], Any]
) -> bool:
    """Replace a node that writes into its first argument; return whether that was possible.

    Args:
        node: The one that writes. What it writes must be of the type of what it is written into.
        order: Each node of the program -> its place; what is added is where ``node`` is.
        is_new: Whether what a node returns shares no memory with what it was given.
        copying: Operator that writes -> the one that gives a new tensor instead.
    """
    path = list(_path(node.args[0]))
    root = path[-1]
    if any(view.kwargs or view.target not in _PUT for view in path[:-1]) or not _is_owned(root, is_new):
        return False
    if _sizes(node) != _sizes(path[0]):
        return False  # Such as one that adds an axis to what it is given.
    looks = list(_looks(root, order, order[node], is_new))
    late = {look: [user for user in look.users if order[user] > order[node]] for look in looks}
    late[node] = list(node.users)
    # A look at something that may or may not be this memory: what it is of later is not known.
    if any(not _is_plain(look) and look is not root and _is_seen(look, late) for look in looks):
        return False
    graph = node.graph

    def add(target: Any, arguments: tuple[Any, ...], like: Any, options: dict[str, Any] | None = None) -> _Node:
        with graph.inserting_before(node):
            made = graph.call_function(target, arguments, options or {})
        made.meta = {**node.meta, "val": like}
        order[made] = order[node]
        return made

    value = _written(node, add, copying)
    for view, whole in pairwise(path):
        value = _PUT[view.target](add, whole, value, *view.args[1:])
    again: dict[_Node, _Node] = {root: value}

    def look_again(look: _Node) -> _Node:
        if look not in again:
            of = look_again(look.args[0])  # type: ignore[arg-type]  # a view's
            again[look] = add(look.target, (of, *look.args[1:]), look.meta["val"], dict(look.kwargs))
        return again[look]

    for look, users in late.items():
        for user in users:
            user.replace_input_with(look, look_again(path[0] if look is node else look))
    graph.erase_node(node)
    return True


def _is_owned(root: _Node, is_new: Callable[[_Node], bool]) -> bool:
    """Return whether nobody else looks at the memory of a node, be it new or that of what it alone was given."""
    if is_new(root):
        return True
    if (
        root.op != "call_function"
        or not isinstance(root.target, torch._ops.OpOverload)
        or root.target._schema.is_mutable
    ):
        return False
    given = [value for value in root.all_input_nodes if isinstance(value.meta.get("val"), torch.Tensor)]
    return len(given) == 1 and is_new(given[0]) and set(given[0].users) == {root}


def _sizes(node: _Node) -> list[str]:
    """Return the sizes of a tensor, of which symbols are compared by what they are called."""
    return [str(size) for size in node.meta["val"].shape]


def _path(written: Any) -> Iterator[_Node]:
    """Yield a view, that of which it is one, and so on, up to what is none."""
    yield written
    while _is_plain(written):
        written = written.args[0]
        yield written


def _is_plain(node: _Node) -> bool:
    """Return whether a node is a look at its first argument in any case."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        return False
    results = target._schema.returns
    one = len(results) == 1 and isinstance(node.meta.get("val"), torch.Tensor)
    return one and results[0].alias_info is not None and bool(node.args) and isinstance(node.args[0], _Node)


def _looks(root: _Node, order: dict[_Node, int], end: int, is_new: Callable[[_Node], bool]) -> Iterator[_Node]:
    """Yield what was made before ``end`` and may share memory with ``root``, and that itself."""
    left, seen = [root], {root}
    while left:
        look = left.pop()
        yield look
        more = [user for user in look.users if order[user] < end and user not in seen and not is_new(user)]
        seen.update(more)
        left += more


def _is_seen(look: _Node, late: dict[_Node, list[_Node]]) -> bool:
    """Return whether anything that was made of a look is used later."""
    return bool(late.get(look)) or any(_is_seen(user, late) for user in look.users if user in late and user is not look)


def _written(node: _Node, add: Callable[..., _Node], copying: Callable[[Any], Any]) -> _Node:
    """Return what is at the written place afterwards."""
    written: Any = node.args[0]
    place = written.meta["val"]
    if node.target is not _aten.copy_.default:
        return add(copying(node.target), node.args, place, dict(node.kwargs))
    source: Any = node.args[1]
    if source.meta["val"].dtype != place.dtype:
        source = add(_aten._to_copy.default, (source,), source.meta["val"].to(place.dtype), {"dtype": place.dtype})
    if _sizes(source) == _sizes(written):
        return source  # type: ignore[no-any-return]  # a node
    return add(_aten.expand_as.default, (source, written), place)


def _inverse(add: Any, whole: _Node, part: _Node, order: Any) -> _Node:
    rank = len(order)
    back = sorted(range(rank), key=lambda axis: order[axis] % rank)
    return add(_aten.permute.default, (part, back), whole.meta["val"])  # type: ignore[no-any-return]


def _reshaped(add: Any, whole: _Node, part: _Node, *_: Any) -> _Node:
    shape = whole.meta["val"].shape
    sizes = [
        size if isinstance(size, int) else add(_aten.sym_size.int, (whole, axis), size)
        for axis, size in enumerate(shape)
    ]
    return add(_aten.view.default, (part, sizes), whole.meta["val"])  # type: ignore[no-any-return]


_PUT: dict[Any, Callable[..., _Node]] = {
    _aten.slice.Tensor: lambda add, whole, part, *at: add(
        _aten.slice_scatter.default, (whole, part, *at), whole.meta["val"]
    ),
    _aten.select.int: lambda add, whole, part, *at: add(
        _aten.select_scatter.default, (whole, part, *at), whole.meta["val"]
    ),
    _aten.transpose.int: lambda add, whole, part, *axes: add(_aten.transpose.int, (part, *axes), whole.meta["val"]),
    _aten.permute.default: _inverse,
    _aten.view.default: _reshaped,
    _aten.unsqueeze.default: lambda add, whole, part, axis: add(_aten.squeeze.dim, (part, axis), whole.meta["val"]),
}
"""View -> how a changed part is put back into the whole that it is one of."""

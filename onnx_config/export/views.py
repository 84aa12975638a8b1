"""Keeps what a model writes into a part of a tensor where it reads the whole of it later.

The exporter turns a write at indices into a new tensor, which takes the place of the one that was written into. Where
that is a part, or a transposed view, of another tensor, that one is then read as if nothing had been written: whether
``x[rows, columns, :] = value`` writes into ``x`` itself or into all of it as a part is up to torch, and of sizes that
are symbols it is the latter. Such a write is left as it is, and torch makes it one into the whole when it takes the
program apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["written_parts_kept"]

_FIX = "_fix_index_put_inplace"


@contextmanager
def written_parts_kept() -> Iterator[None]:
    """Have the exporter leave writes into parts of tensors alone until the exit."""
    from transformers.exporters.utils import _FX_NODE_FIXES

    fixes: list[Any] = _FX_NODE_FIXES["onnx"]
    before = list(fixes)
    fixes[:] = [_sparing(fix) if fix.__name__ == _FIX else fix for fix in before]
    try:
        yield
    finally:
        fixes[:] = before


def _sparing(fix: Any) -> Any:
    def spared(module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
        if node.target is torch.ops.aten.index_put_.default and _is_read_elsewhere(node):
            return False
        return bool(fix(module, node))

    return spared


def _is_read_elsewhere(write: torch.fx.Node) -> bool:
    """Return whether the memory that a node writes into is read after it by another name."""
    written = write.args[0]
    if not isinstance(written, torch.fx.Node):
        return False
    root = written
    while _is_view(root):
        root = root.args[0]  # type: ignore[assignment]  # that of which it is a view
    order = {node: number for number, node in enumerate(write.graph.nodes)}
    left, seen = [root], {root}
    while left:
        node = left.pop()
        # What was written into is read by the write's own name afterwards.
        if node is not written and any(order[user] > order[write] for user in node.users):
            return True
        views = {user for user in node.users if _is_view(user) and user.args[0] is node and order[user] < order[write]}
        left += views - seen
        seen |= views
    return False


def _is_view(node: torch.fx.Node) -> bool:
    """Return whether what a node returns is memory of its first argument, or may be."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not node.args or not isinstance(node.args[0], torch.fx.Node):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)

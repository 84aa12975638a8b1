"""Spares a traced program its second trace where nothing in it has to be taken apart.

Before torch translates a program to ONNX it traces it once more, to turn composite operators into simpler ones and
writes in place into copies; that takes a third of an export and more. Most models hold nothing but operators that have
a translation of their own, a few other spellings of such, some that are taken apart where they stand, and writes into
tensors that nobody else looks at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch

from onnx_config.export.apart import take_apart
from onnx_config.export.paddings import padded_by_numbers, says_padding
from onnx_config.export.recurrent import WHOLE_LAYERS
from onnx_config.export.written_views import drop_unread_writes, write_to_new_tensor

__all__ = ["decomposed_where_needed"]

_aten = torch.ops.aten

_SAME: Mapping[Any, Any] = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.__xor__.Tensor: _aten.bitwise_xor.Tensor,
    _aten.clip.default: _aten.clamp.default,
    _aten.clip.Tensor: _aten.clamp.Tensor,
    _aten.min.other: _aten.minimum.default,
    _aten.max.other: _aten.maximum.default,
}
"""Operator -> the one that it is another name for."""

_UNTRANSLATED: Mapping[Any, Any] = {
    _aten._is_all_true.default: _aten.all.default,
    _aten._is_any_true.default: _aten.any.default,
}
"""The same, where the name has no translation, and taking the program apart does not change it."""

_CASTS = frozenset({_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout})
"""Conversions that return their argument itself where it is already as wanted, unless asked for a copy."""

_NOTHING = frozenset({_aten.alias.default, _aten.detach.default, _aten.detach_.default, _aten.lift_fresh_copy.default})
"""Operators that change nothing in a graph without gradients."""

_CHECKS = frozenset(
    {
        _aten._assert_async.default,
        _aten._assert_async.msg,
        _aten._assert_scalar.default,
        _aten._assert_tensor_metadata.default,
        _aten.sym_constrain_range_for_size.default,
    }
)
"""Operators that compute nothing; torch drops them too."""

_POOLED: Mapping[Any, tuple[int, ...]] = {
    _aten.adaptive_avg_pool1d.default: (-1,),
    _aten.adaptive_avg_pool2d.default: (-2, -1),
}
"""Poolings that are a mean over these axes where one value is left of each."""

_NORMALIZE = _aten._native_batch_norm_legit_no_training.default

_NEW = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.linear.default,
        _aten.matmul.default,
        _aten.ones_like.default,
        _aten.zeros_like.default,
    }
)
"""Composites that always return a tensor of their own."""


def decomposed_where_needed() -> Any:
    """Have ``torch.onnx`` trace a program again only if it holds what has no translation as it stands."""
    from torch.onnx._internal.exporter import _decomp, _fx_passes

    original: Callable[..., Any] = _fx_passes.decompose_with_registry

    def decompose(program: Any, registry: Any) -> Any:
        for node in program.graph_module.graph.nodes:
            node.target = _UNTRANSLATED.get(node.target, node.target)
        drop_unread_writes(program.graph_module.graph, is_new=_is_new)
        translated = set(_decomp.get_onnx_implemented_overloads(registry))
        take_apart(program.graph_module.graph, lambda node: _has_spelling(node, translated), translated)
        spelled = _spelled(program.graph_module.graph, translated)
        _name_outputs(program)
        program.graph_module.recompile()
        if not spelled:
            program = original(program, registry)
        # Under their own names, torch would have taken them apart.
        for node in program.graph_module.graph.nodes:
            node.target = WHOLE_LAYERS.get(node.target, node.target)
        return program

    # Looked up by its name at each call.
    return patch.object(_fx_passes, "decompose_with_registry", decompose)


def _name_outputs(program: Any) -> None:
    """Let a program's signature name the nodes that it returns now."""
    (returned,) = program.graph_module.graph.find_nodes(op="output")
    for spec, node in zip(program.graph_signature.output_specs, returned.args[0], strict=True):
        if isinstance(node, torch.fx.Node):
            spec.arg.name = node.name


def _spelled(graph: torch.fx.Graph, translated: set[Any]) -> bool:
    """Give each node an operator that has a translation; return whether that was possible for all.

    Every change by itself leaves what the graph computes.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    if not all(_has_spelling(node, translated) for node in graph.nodes):
        return False
    for node in list(graph.nodes):
        if node.target is _aten.batch_norm.default:
            _normalize_as_stored(node, order)
            continue
        if says_padding(node) is not None:
            padded_by_numbers(node)
        if node.target in _POOLED:
            node.args, node.target = (node.args[0], list(_POOLED[node.target]), True), _aten.mean.dim
        if node.target in _NOTHING or (node.target in _CASTS and not _converts(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.target in _CHECKS:
            graph.erase_node(node)
            continue
        if node.op == "call_function" and "val" not in node.meta:
            # One of the exporter's own; torch reads the shape of each.
            arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
            node.meta["val"] = node.target(*arguments, **named)
        if _writes(node):
            if not _keeps_type(node):
                return False
            if not _write_to_copy(node, order):
                if not write_to_new_tensor(node, order, is_new=_is_new, copying=_copying):
                    return False
                continue
        if node.target in _SAME:
            node.target = _SAME[node.target]
        elif node.target in _CASTS:
            node.target = _aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
    return True


def _normalize_as_stored(node: torch.fx.Node, order: dict[torch.fx.Node, int]) -> None:
    """Let a batch normalization that does not train be the operator that does nothing else."""
    values, weight, bias, mean, variance, _, momentum, epsilon, *_ = node.args
    arguments = (values, weight, bias, mean, variance, momentum, epsilon)
    graph = node.graph
    with graph.inserting_before(node):
        normalized = graph.call_function(_NORMALIZE, arguments)
        first = graph.call_function(operator.getitem, (normalized, 0))
    normalized.meta = {**node.meta, "val": _NORMALIZE(*torch.fx.node.map_arg(arguments, lambda a: a.meta["val"]))}
    first.meta = {**node.meta, "val": normalized.meta["val"][0]}
    order[normalized] = order[first] = order[node]
    node.replace_all_uses_with(first)
    graph.erase_node(node)


def _converts(node: torch.fx.Node) -> bool:
    """Return whether a conversion makes a new tensor."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an overload
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    before, after = node.args[0].meta.get("val"), node.meta["val"]  # type: ignore[union-attr]  # a tensor
    return bool(given.get("copy")) or before is None or before.dtype != after.dtype


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _has_spelling(node: torch.fx.Node, translated: set[Any]) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload) or target in _NOTHING or target in _CHECKS:
        return True
    if target is _aten.batch_norm.default:
        # One that trains counts what it sees.
        return not node.args[5] and _NORMALIZE in translated
    if target in _POOLED:
        return set(node.args[1]) == {1} and _aten.mean.dim in translated  # type: ignore[arg-type]  # its sizes
    if target._schema.is_mutable:
        target = _copying(target)
    target = says_padding(node) or target
    return target in translated or target in _SAME or target in _CASTS or target in WHOLE_LAYERS


def _copying(target: torch._ops.OpOverload) -> Any:
    """Return the operator that gives a new tensor instead of writing into its first argument."""
    name = target._schema.name.removeprefix("aten::")
    changed = [a.name for a in target._schema.arguments if a.alias_info is not None]
    if not name.endswith("_") or name.endswith("__") or changed != ["self"]:
        return None
    operators = getattr(_aten, name[:-1], None)
    copying = getattr(operators, target._overloadname, None) or getattr(operators, "default", None)
    # One that takes other arguments computes something else.
    same = copying is not None and [a.name for a in copying._schema.arguments] == [
        a.name for a in target._schema.arguments
    ]
    return copying if same else None


def _write_to_copy(node: torch.fx.Node, order: Mapping[torch.fx.Node, int]) -> bool:
    """Let a node that writes into its first argument return a new tensor, where that is the same.

    It is where the tensor is new itself and nothing was made before that may share its memory; what reads it later
    then reads the new one.
    """
    written = node.args[0]
    if not isinstance(written, torch.fx.Node) or "val" not in written.meta or not _is_new(written):
        return False
    if any(order[user] < order[node] and not _is_new(user) for user in written.users):
        return False
    node.target = _copying(node.target)  # type: ignore[arg-type]  # an operator's overload
    written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    return True


def _keeps_type(node: torch.fx.Node) -> bool:
    """Return whether a write would give the written type also if it gave a new tensor, which may be of a larger one."""
    written = node.args[0]
    if not isinstance(written, torch.fx.Node) or "val" not in written.meta:
        return False
    arguments = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, torch.fx.Node)]
    types = {v.dtype for a in arguments if isinstance(v := a.meta.get("val"), torch.Tensor)}
    kept = written.meta["val"].dtype
    if torch.Tag.pointwise in node.target.tags and any(torch.promote_types(kept, dtype) != kept for dtype in types):  # type: ignore[union-attr]  # an overload
        return False
    return not any(dtype.is_floating_point and dtype != kept for dtype in types)


def _is_new(node: torch.fx.Node) -> bool:
    """Return whether what a node returns shares no memory with what it was given."""
    if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
        return _is_new(node.args[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _NEW or node.target is _aten._to_copy.default:
        return True
    if node.target is _aten.einsum.default:
        # Of one tensor, it may be another look at that.
        return len(node.args[1]) > 1  # type: ignore[arg-type]  # tensors
    schema = node.target._schema
    # A composite may return its argument itself, whatever its schema says.
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    return not composite and not schema.is_mutable and all(result.alias_info is None for result in schema.returns)

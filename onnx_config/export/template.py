"""A graph without its weights, which any checkpoint of the same structure can be bound to.

Every weight is an input of such a graph while it is optimized and simplified, so that nothing that is done to it
depends on what the weights hold; what a weight is, a list beside the graph says. Constants that were computed from the
config alone stay in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_config.export.origins import Origins

__all__ = [
    "TemplateGraph",
    "Weight",
    "fold_transposes",
    "lift_weights",
    "lifted_weights",
    "read_weights",
    "unused_removed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight of a graph, and what is to be put there."""

    name: str
    """Of the value in the graph."""

    folder: str | None
    """Folder of the checkpoint, relative to the model's: ``"."`` for most; ``None``: not a tensor of a checkpoint."""

    key: str
    """Name of the tensor in the checkpoint, or, where it is not one of a checkpoint, in the loaded module."""

    shape: tuple[int, ...]
    """As stored."""

    permutation: tuple[int, ...] | None = None
    """Axes of the stored tensor in the order in which the graph takes them; ``None``: as stored."""

    buffer: bool = False
    """Whether it is no parameter; a buffer may hold the infinities of a mask."""

    @property
    def bound_shape(self) -> tuple[int, ...]:
        """Shape of the value in the graph."""
        return self.shape if self.permutation is None else tuple(self.shape[axis] for axis in self.permutation)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateGraph:
    """A graph without weights, on disk."""

    path: Path
    """The ``.onnx`` file: its first inputs are the model's, the others its weights."""

    weights: tuple[Weight, ...]

    def write_weights(self) -> None:
        """Write the list of the weights beside the graph."""
        _list_of(self.path).write_text(json.dumps([asdict(weight) for weight in self.weights]), encoding="utf-8")


def read_weights(path: Path) -> tuple[Weight, ...]:
    """Return the weights of the template graph at ``path``.

    Raises:
        OSError: If the list is not there.
        ValueError, LookupError, TypeError: If it is none.
    """
    return tuple(_weight(entry) for entry in json.loads(_list_of(path).read_text(encoding="utf-8")))


def _list_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.weights.json")


def _weight(entry: dict[str, Any]) -> Weight:
    order = entry.pop("permutation")
    return Weight(
        **{**entry, "shape": tuple(entry["shape"])}, permutation=None if order is None else tuple(int(i) for i in order)
    )


def lift_weights(
    model: onnx_ir.Model, origins: Origins, *, root: Path, computed: Iterable[str], buffers: Iterable[str] = ()
) -> tuple[Weight, ...]:
    """Make the weights inputs of the graph; return what they are, one for tensors that are the same.

    Args:
        model: A graph as traced, changed in place.
        origins: Which of its tensors are the checkpoint's.
        root: The model's folder.
        buffers: Names of tensors that are no parameters.
        computed: Names of parameters that are not a tensor of the checkpoint as it stands, but computed of some.
    """
    graph = model.graph
    of_module, of_buffers = set(computed), set(buffers)
    found: dict[tuple[str | None, str], onnx_ir.Value] = {}
    weights = []
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        origin = origins.of(raw) if isinstance(raw, torch.Tensor) else None
        if origin is not None:
            source: tuple[str | None, str] = (origin.file.parent.relative_to(root).as_posix(), origin.key)
        elif name in of_module:
            source = (None, name)
        else:
            continue
        del graph.initializers[name]
        if source in found:
            value.replace_all_uses_with(found[source])
            continue
        assert raw is not None
        found[source] = value
        value.const_value = None
        value.shape = onnx_ir.Shape(list(raw.shape))
        graph.inputs.append(value)
        buffer = name in of_buffers
        weights.append(Weight(name=name, folder=source[0], key=source[1], shape=tuple(raw.shape), buffer=buffer))
    return tuple(weights)


def lifted_weights(model: onnx_ir.Model, lifted: Iterable[Sequence[Weight]]) -> tuple[Weight, ...]:
    """Return the weights among the inputs of a graph that was made of one trace or several, each once.

    Args:
        model: The graph; of inputs that are one weight under two names, the first stays.
        lifted: What `lift_weights` returned of each trace, also of those that came to nothing.
    """
    named = {weight.name: weight for weights in lifted for weight in weights}
    found: dict[tuple[str | None, str], onnx_ir.Value] = {}
    kept = []
    for value in list(model.graph.inputs):
        weight = named.get(value.name or "")
        if weight is None:
            continue
        first = found.setdefault((weight.folder, weight.key), value)
        if first is value:
            kept.append(weight)
        else:
            value.replace_all_uses_with(first)
            model.graph.inputs.remove(value)
    return tuple(kept)


def unused_removed(model: onnx_ir.Model, weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Take weights that nothing reads off the graph; return the others."""
    RemoveUnusedNodesPass()(model)
    named = {weight.name for weight in weights}
    kept = [value for value in model.graph.inputs if value.name not in named or value.uses()]
    model.graph.inputs[:] = kept
    there = {value.name for value in kept}
    return tuple(weight for weight in weights if weight.name in there)


def fold_transposes(model: onnx_ir.Model, weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Let weights that are only ever transposed, one way, be bound transposed; return them so.

    A weight that is also read as it is stored (an embedding that is the head's too) stays, and is stored once.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    folded = []
    for weight in weights:
        value = inputs[weight.name]
        nodes = [node for node, _ in value.uses()]
        orders = {_order(node, len(weight.shape)) for node in nodes}
        order = next(iter(orders)) if len(orders) == 1 else None
        if order is None or weight.permutation is not None:
            folded.append(weight)
            continue
        for node in nodes:
            node.outputs[0].replace_all_uses_with(value)
            # It may lie in a branch.
            if node.graph is not None:
                node.graph.remove(node, safe=True)
        new = replace(weight, permutation=order)
        value.shape = onnx_ir.Shape(list(new.bound_shape))
        folded.append(new)
    return tuple(folded)


def _order(node: onnx_ir.Node, rank: int) -> tuple[int, ...] | None:
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    order = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
    return tuple(order)

"""A float32 graph in float16, but for what must stay float32; or with its weights in bfloat16.

Inputs and outputs stay float32 at the border of the graph, the cache of keys and values included. That is what those
who run such files feed: transformers.js makes an empty cache of float32 unless a ``kv_cache_dtype`` in its own part of
the config says otherwise, its published ``model_fp16.onnx`` were made by converters that keep inputs and outputs, and
NumPy has no bfloat16 at all. optimum makes graphs with float16 inputs only where a whole model was loaded in float16 on
a GPU.

A node computes in float32 for one of these reasons, each of an operator or of a measurement and none of a model:

- its operator adds up many terms, or takes powers and exponents of them (means, norms, softmax): a square of 256
  is beyond float16 already;
- it counts: positions and lengths that were whole numbers are no longer exact beyond 2048, and an angle made of them
  would be any angle;
- ONNX knows no float16 for it, or it holds graphs of its own (loops, choices);
- what goes in or comes out was measured to be beyond half of float16's range, over inputs of several sizes.

ONNX Runtime's CPU provider has no kernels for arithmetic in bfloat16 (nor ONNX a convolution of it before opset 22), so
there the weights are bfloat16 in the file and float32 once loaded. Of a checkpoint in bfloat16 nothing is lost so.

What such a graph computes on a GPU cannot be seen on the CPU as it is: where the CPU provider has no kernel in float16
it casts, and takes out the casts between two such nodes, so that a number that overflows on a GPU never does there. For
that `rounded` gives a graph in which every number is rounded as the types say.

Weights go from one file to the other block by block; the memory used does not grow with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from onnx_config.export.streamed import StreamedTensor, read_without_weights, write_streamed

__all__ = ["LARGEST", "Halved", "magnitudes", "rounded", "write_bfloat16", "write_float16"]

Array = npt.NDArray[Any]

LARGEST = 65504.0
"""Largest number in float16."""

_ALLOWED = LARGEST / 2
"""What other inputs than those measured may double."""

_SUMS = frozenset(
    {
        "CumSum", "Einsum", "Exp", "GlobalAveragePool", "GlobalLpPool", "GroupNormalization", "InstanceNormalization",
        "LRN", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Pow",
        "RMSNormalization", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean",
        "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax", "Softplus", "Sqrt", "BatchNormalization",
    }
)  # fmt: skip
_COUNTING = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitCast", "Cast", "CastLike", "ConstantOfShape", "Cos", "EyeLike", "GridSample",
        "Multinomial", "NonMaxSuppression", "OneHot", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike", "Range", "Resize", "RoiAlign", "Sin", "TopK", "Upsample",
    }
)  # fmt: skip
_SINGLE, _HALF = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16
_FEW = 1024
"""A constant of so many numbers is kept in both types, where both are read."""
_BLOCK = 8 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Halved:
    """What was written."""

    files: tuple[Path, ...]

    kept: Mapping[str, int]
    """Why nodes compute in float32: operator and reason -> how many."""

    def note(self) -> str:
        """Return the operators that stay float32, for a reader."""
        if not self.kept:
            return "every operator computes in float16"
        return "computes in float32: " + ", ".join(f"{count} {what}" for what, count in sorted(self.kept.items()))


def magnitudes(path: Path, feeds: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Return the largest magnitude of every float32 value of a graph over ``feeds``, by its name.

    A magnitude of NaN or infinity is infinite. Values inside of loops and choices are not looked at.

    Raises:
        ModelError: If ONNX Runtime refuses the graph.
    """
    from onnx_config.export.session import open_session

    model = _typed(path)
    graph = model.graph
    wanted = [value for node in graph for value in node.outputs if value.dtype == _SINGLE and value.name]
    taps = []
    for number, value in enumerate(wanted):
        size = onnx_ir.node("Abs", [value])
        most = onnx_ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0})
        most.outputs[0].name = f"tap_{number}"
        most.outputs[0].type = onnx_ir.TensorType(_SINGLE)
        most.outputs[0].shape = onnx_ir.Shape([])
        graph.extend([size, most])
        taps.append(most.outputs[0])
    graph.outputs[:] = taps
    session = open_session(
        path, device="cpu", options=_plain_options(), graph=onnx_ir.to_proto(_nameless(model)).SerializeToString()
    )
    names = [value.name for value in session.get_inputs()]
    largest = dict.fromkeys((value.name or "" for value in wanted), 0.0)
    for feed in feeds:
        try:
            found = session.run(None, {name: feed[name] for name in names})
        # A size that the runtime refuses, with empty values say, tells nothing.
        except Exception:  # noqa: BLE001, S112
            continue
        for name, size in zip(largest, found, strict=True):
            magnitude = float(size)
            # The maximum over nothing is the lowest number.
            largest[name] = max(largest[name], magnitude if np.isfinite(magnitude) or magnitude < 0 else float("inf"))
    for value in graph.initializers.values():
        if value.dtype == _SINGLE and value.name:
            largest[value.name] = max((_magnitude(block) for block in _blocks(_array(value))), default=0.0)
    return largest


def _magnitude(block: Array) -> float:
    magnitude = float(np.abs(block).max(initial=0.0))
    return magnitude if np.isfinite(magnitude) else float("inf")


def _plain_options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # What is fused is not looked at.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def write_float16(path: Path, output: Path, *, largest: Mapping[str, float]) -> Halved:
    """Write the graph of ``path`` in float16.

    Args:
        path: A graph in float32; it stays as it is.
        output: The file to write.
        largest: Magnitudes of its values, as `magnitudes` returns them.
    """
    model = _typed(path)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    beyond = {name for name, size in largest.items() if size > _ALLOWED}
    kept: Counter[str] = Counter()
    graph = model.graph
    counted = _counts(graph)
    changed = _Halving(graph)
    for node in list(graph):
        reason = _reason(node, model, beyond, counted)
        if reason is None and not any(value.dtype == _SINGLE for value in node.outputs):
            reason = ""  # It has floats to read only; comparing them needs all their digits.
        if reason:
            kept[f"{node.op_type} ({reason})"] += 1
        changed.take(node, half=reason is None)
    changed.finish()
    RemoveUnusedNodesPass()(model)
    return Halved(files=_write(model, output, changed.weights()), kept=dict(kept))


def write_bfloat16(path: Path, output: Path) -> Halved:
    """Write the graph of ``path`` with its weights in bfloat16, which are turned into float32 when it is loaded."""
    model = _typed(path)
    graph = model.graph
    weights = {}
    for value in list(graph.initializers.values()):
        array = _array(value) if value.dtype == _SINGLE else None
        if array is None or array.size <= _FEW:
            continue
        stored = onnx_ir.Value(
            name=f"{value.name}_bf16", shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.BFLOAT16)
        )
        name = value.name or ""
        del graph.initializers[name]
        cast = onnx_ir.node("Cast", [stored], attributes={"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].type = onnx_ir.TensorType(_SINGLE)
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.outputs[0].name = name
        value.name = None
        graph.insert_before(graph[0], cast)
        weights[stored] = array
    written = _write(model, output, weights)
    return Halved(files=written, kept={"every operator (weights are bfloat16)": len(list(graph))} if weights else {})


def rounded(path: Path) -> bytes:
    """Return a float16 graph that computes in float32 and rounds each number to float16, as a GPU does.

    Products add up in float32 and are rounded once, as they are on GPUs too. Its weights are those in ``path``.
    """
    model = _typed(path)
    graph = model.graph
    single: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in list(graph):
        if node.op_type in ("Cast", "CastLike") or node.domain not in ("", "ai.onnx"):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == _HALF:
                if value not in single:
                    single[value] = _cast_before(graph, node, value, _SINGLE)
                node.replace_input_with(index, single[value])
        for value in node.outputs:
            if value.dtype == _HALF:
                cast = onnx_ir.node("Cast", [value], attributes={"to": _HALF})
                cast.outputs[0].type = onnx_ir.TensorType(_HALF)
                value.replace_all_uses_with(cast.outputs[0])
                cast.replace_input_with(0, value)
                value.type = onnx_ir.TensorType(_SINGLE)
                graph.insert_after(node, cast)
    _forget_shapes(graph)
    return bytes(onnx_ir.to_proto(_nameless(model)).SerializeToString())


def _cast_before(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, to: onnx_ir.DataType) -> onnx_ir.Value:
    cast = onnx_ir.node("Cast", [value], attributes={"to": to})
    cast.outputs[0].type = onnx_ir.TensorType(to)
    graph.insert_before(node, cast)
    return cast.outputs[0]


class _Halving:
    """Gives the nodes of a graph float16 or float32, one after the other, and casts where the two meet."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._as_half: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._as_single: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._stored: dict[onnx_ir.Value, Array] = {}
        self._outputs = set(graph.outputs)
        self._inner = [node for inner in graph.subgraphs() for node in inner]

    def take(self, node: onnx_ir.Node, *, half: bool) -> None:
        """Let a node compute in float16, or in float32."""
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if half and value.dtype == _SINGLE and not _is_float_always(node, index):
                node.replace_input_with(index, self._halved(value, node))
            elif not half and value.dtype == _HALF:
                node.replace_input_with(index, self._single(value, node))
        if half:
            for value in node.outputs:
                if value.dtype == _SINGLE:
                    value.type = onnx_ir.TensorType(_HALF)

    def finish(self) -> None:
        """Turn outputs into float32, and what graphs inside of nodes read of this one."""
        for node in self._inner:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == _HALF and value.graph is self._graph:
                    node.replace_input_with(index, self._single(value, None))
        for index, value in enumerate(self._graph.outputs):
            if value.dtype == _HALF:
                single = self._single(value, None)
                # Whoever reads the output by its name gets float32.
                value.name, single.name = f"{value.name}_fp16", value.name
                single.shape = value.shape
                self._graph.outputs[index] = single

    def weights(self) -> dict[onnx_ir.Value, Array]:
        """Return the constants that are float16 now, each with its values in float32."""
        return self._stored

    def _halved(self, value: onnx_ir.Value, node: onnx_ir.Node) -> onnx_ir.Value:
        if value in self._as_half:
            return self._as_half[value]
        if value.is_initializer():
            new = onnx_ir.Value(name=f"{value.name}_fp16", shape=value.shape, type=onnx_ir.TensorType(_HALF))
            self._stored[new] = _array(value)
            if _array(value).size > _FEW:
                # Whoever reads it in float32 too reads what was rounded, instead of a second copy.
                self._as_single.setdefault(new, self._cast(new, _SINGLE, node))
                for user, index in list(value.uses()):
                    if user is not node:
                        user.replace_input_with(index, self._as_single[new])
                self._as_half[self._as_single[new]] = new
        else:
            new = self._cast(value, _HALF, node)
            self._as_single[new] = value
        self._as_half[value] = new
        return new

    def _single(self, value: onnx_ir.Value, node: onnx_ir.Node | None) -> onnx_ir.Value:
        if value not in self._as_single:
            self._as_single[value] = self._cast(value, _SINGLE, None)
            self._as_half[self._as_single[value]] = value
        return self._as_single[value]

    def _cast(self, value: onnx_ir.Value, to: onnx_ir.DataType, before: onnx_ir.Node | None) -> onnx_ir.Value:
        cast = onnx_ir.node("Cast", [value], attributes={"to": to})
        cast.outputs[0].type = onnx_ir.TensorType(to)
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, cast)
        else:
            # An input or a constant: any node may read it.
            self._graph.insert_before(self._graph[0], cast)
        return cast.outputs[0]


def _reason(node: onnx_ir.Node, model: onnx_ir.Model, beyond: Collection[str], counted: Collection[str]) -> str | None:
    """Return why a node must compute in float32; ``None``: it need not, or has no floats."""
    floats = [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == _SINGLE]
    holds = any(attribute.type in _GRAPHS for attribute in node.attributes.values())
    if not floats and not holds:
        return None
    if holds:
        return "holds graphs"
    if any(value.name in beyond for value in floats):
        return "beyond float16"
    if any(value.name in counted for value in node.outputs):
        return "counts"
    if node.op_type in _SUMS:
        return "sums"
    if node.op_type in _COUNTING:
        return "" if node.op_type in ("Cast", "ConstantOfShape") else "counts"
    if not _takes_half(node, model):
        return "no float16"
    return None


_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def _takes_half(node: onnx_ir.Node, model: onnx_ir.Model) -> bool:
    """Return whether ONNX says that an operator takes float16 wherever it takes float32."""
    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get("", 1), "")
    except onnx.defs.SchemaError:
        return False
    return all(
        "tensor(float16)" in constraint.allowed_type_strs
        for constraint in schema.type_constraints
        if "tensor(float)" in constraint.allowed_type_strs
    )


def _is_float_always(node: onnx_ir.Node, index: int) -> bool:
    """Return whether an input is float32 whatever the others are."""
    return node.op_type == "Resize" and index == 2


def _counts(graph: onnx_ir.Graph) -> set[str]:
    """Return the floats that are computed of whole numbers alone, and of constants: positions, lengths, angles."""
    found: set[str] = set()
    for node in graph:
        floats = [value for value in node.inputs if value is not None and value.dtype == _SINGLE]
        moving = [value for value in floats if not value.is_initializer()]
        made = node.op_type in ("Cast", "Range") and not floats
        if made or (moving and all(value.name in found for value in moving)):
            found |= {value.name for value in node.outputs if value.dtype == _SINGLE and value.name}
    return found


def _typed(path: Path) -> onnx_ir.Model:
    """Return a graph whose values have element types, with its weights on the disk."""
    model = onnx.shape_inference.infer_shapes(read_without_weights(path))
    typed = onnx_ir.from_proto(model)
    onnx_ir.external_data.set_base_dir(typed.graph, path.parent)
    return typed


def _nameless(model: onnx_ir.Model) -> onnx_ir.Model:
    """Give names to what has none, as they are written."""
    from onnx_ir.passes.common import NameFixPass

    NameFixPass()(model)
    return model


def _array(value: onnx_ir.Value) -> Array:
    """Return the numbers of a constant; those in a file stay there until they are read."""
    tensor = value.const_value
    assert tensor is not None  # an initializer has one
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        array: Array = tensor.numpy()
        return array
    # onnx_ir refuses files that have a second name, as those of a checkpoint that a graph is linked to have.
    file = Path(tensor.base_dir) / tensor.location
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return np.memmap(file, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)


def _blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    return (flat[first : first + _BLOCK] for first in range(0, flat.size, _BLOCK))


def _as_stored(array: Array) -> Iterator[bytes]:
    return (block.tobytes() for block in _blocks(array))


def _as_float16(array: Array) -> Iterator[bytes]:
    return (block.astype("<f2").tobytes() for block in _blocks(array))


def _as_bfloat16(array: Array) -> Iterator[bytes]:
    """Yield the upper halves of float32 numbers, rounded to the nearest, of two to the even one."""
    for block in _blocks(array):
        bits = block.astype("<f4").view("<u4")
        half = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")
        # A NaN would be rounded to infinity.
        yield np.where(np.isnan(block), np.uint16(0x7FC0), half).astype("<u2").tobytes()


def _write(model: onnx_ir.Model, output: Path, made: Mapping[onnx_ir.Value, Array]) -> tuple[Path, ...]:
    """Write a graph, its weights one by one."""
    streamed: list[StreamedTensor] = []
    for value, array in made.items():
        write = _as_float16 if value.dtype == _HALF else _as_bfloat16
        streamed.append(_tensor(value, array, array.size * 2, write))
    for name, value in list(model.graph.initializers.items()):
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            streamed.append(_tensor(value, array := _array(value), array.nbytes, _as_stored))
            del model.graph.initializers[name]
    _forget_shapes(model.graph)
    return write_streamed(onnx_ir.to_proto(_nameless(model)), streamed, output)


def _tensor(
    value: onnx_ir.Value, array: Array, nbytes: int, write: Callable[[Array], Iterator[bytes]]
) -> StreamedTensor:
    return StreamedTensor(
        name=value.name or "",
        data_type=int(value.dtype or onnx_ir.DataType.UNDEFINED),
        shape=array.shape,
        nbytes=nbytes,
        blocks=partial(write, array),
    )


def _forget_shapes(graph: onnx_ir.Graph) -> None:
    """As `onnx_config.export.graph_file.forget_shapes` does, types included: runtimes infer both."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
                value.type = None

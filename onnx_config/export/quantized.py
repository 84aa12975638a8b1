"""A float32 graph with weights of 8 or 4 bits, by ONNX Runtime's own quantizers, and a look at what they did.

What a quantizer does wrong need not show in the numbers that come out: a channel of zeros among hundreds moves them
less than rounding to 4 bits does. So its weights are turned back into numbers and compared with the float32 ones,
channel by channel: none may be off by more than its own rounding allows.

The quantizers hold a whole graph in memory, so unlike `onnx_config.export.half` this takes a few times the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.graph_file import EMBED_LIMIT_BYTES
from onnx_config.variants import Variant

__all__ = ["BLOCK_SIZE", "WeightFault", "quantize", "weight_faults"]

Array = npt.NDArray[Any]

BLOCK_SIZE = 32
"""Numbers that share one scale at 4 bits, as in the published ``model_q4.onnx``."""

_TURNED = "_turned"
"""End of the name of a weight that a node read transposed."""
_TURNED_BY_OTHERS = "_Transposed"
"""The same, as ONNX Runtime writes it."""
_HALF = "_fp16"
"""End of the name of a weight in float16."""

_LEAST_SHARE = 0.02
"""Error of a channel, as a share of its length, that is never too much: at 8 bits a channel of small numbers beside
one of large ones has few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFault:
    """A quantized weight that is not what it was made of."""

    name: str
    channel: int
    error: float
    """Largest difference in the channel."""
    step: float
    """What rounding allows."""

    def __str__(self) -> str:
        return (
            f"{self.name} is off by {self.error:.3g} in channel {self.channel}, where its rounding allows "
            f"{self.step:.3g}"
        )


def quantize(path: Path, output: Path, variant: Variant) -> int:
    """Write the graph of ``path`` in ``variant``; return how many of its weights are quantized, which may be none.

    Raises:
        ModelError: If the quantizer fails (``unsupported``).
    """
    with _quiet():
        try:
            if variant in (Variant.Q4, Variant.Q4F16):
                _quantize_blocks(path, output)
            else:
                _quantize_dynamically(path, output, variant)
        # The quantizers do not say what they raise.
        except Exception as error:
            if isinstance(error, (MemoryError, OSError)):
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelError(f"ONNX Runtime's quantizer failed: {text}", kind=ErrorKind.UNSUPPORTED) from error
    return len(_names(onnx.load(str(output), load_external_data=False)))


def _quantize_blocks(path: Path, output: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(path))
    _products_for_gemms(model.graph)
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=0)
    quantizer.process()
    _save(quantizer.model.model, output)


def _quantize_dynamically(path: Path, output: Path, variant: Variant) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    unsigned = variant is Variant.QUANTIZED
    graph = onnx.load(str(path), load_external_data=False).graph
    held = {tensor.name for tensor in graph.initializer}
    # The quantizer stops at a convolution with weights that are computed.
    computed = [node.name for node in _nodes(graph) if node.op_type == "Conv" and node.input[1] not in held]
    quantize_dynamic(
        str(path),
        str(output),
        # The CPU's integer convolution takes unsigned weights only.
        op_types_to_quantize=["MatMul", "Gemm", "Attention", "LSTM", *(["Conv"] if unsigned else [])],
        weight_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        nodes_to_exclude=computed,
        per_channel=True,
        # Two products of 8 bits overflow the 16 in which processors without VNNI add them; 7 bits do not.
        reduce_range=True,
        use_external_data_format=path.with_name(f"{path.name}_data").is_file(),
        extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
    )
    # Its names are not those of the ecosystem.
    _save(onnx.load(str(output)), output)


def _products_for_gemms(graph: onnx.GraphProto) -> None:
    """Write a product and an addition for each that is one node, since the quantizer knows products only."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        name = node.input[1]
        if settings.get("transB", 0):
            turned = f"{name}{_TURNED}"
            if turned not in weights:
                values = np.ascontiguousarray(onnx.numpy_helper.to_array(weights[name]).T)
                weights[turned] = onnx.numpy_helper.from_array(values, turned)
                graph.initializer.append(weights[turned])
            name = turned
        added = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}_product" if added else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.name}_product"))
        if added:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=node.name))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in _nodes(graph) for name in node.input}
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


def _save(model: onnx.ModelProto, output: Path) -> None:
    del model.graph.value_info[:]
    data = output.with_name(f"{output.name}_data")
    for left in (data, output.with_name(f"{output.name}.data")):
        left.unlink(missing_ok=True)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EMBED_LIMIT_BYTES:
        onnx.save(model, str(output), save_as_external_data=True, location=data.name, size_threshold=1024)
    else:
        onnx.save(model, str(output))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizers' advice from standard error."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def weight_faults(original: Path, quantized: Path) -> list[WeightFault]:
    """Return the worst fault of each weight of ``quantized`` that is not what rounding makes of it in ``original``.

    Raises:
        ModelError: If a quantized weight cannot be told to be one of the original's (``unsupported``).
    """
    faults = []
    for name, want, got, step in _quantized(onnx.load(str(quantized)), onnx.load(str(original))):
        # One channel a column; a step for each number.
        error = np.abs(got - want)
        length = np.sqrt((want**2).sum(axis=0))
        allowed = 1.01 * step.max(axis=0)
        worst = error.max(axis=0)
        share = np.sqrt((error**2).sum(axis=0)) / np.maximum(length, np.finfo(np.float32).tiny)
        lost = (share > 0.5) & (length > 0)
        wrong = ((worst > allowed) & (share > _LEAST_SHARE)) | (lost & (worst > 0.51 * step.max(axis=0)))
        if wrong.any():
            channel = int(np.argmax(np.where(wrong, share, -1)))
            faults.append(
                WeightFault(name=name, channel=channel, error=float(worst[channel]), step=float(step[:, channel].max()))
            )
    return faults


def _quantized(model: onnx.ModelProto, original: onnx.ModelProto) -> Iterator[tuple[str, Array, Array, Array]]:
    """Yield the name of each quantized weight, what it was, what it is, and the size of a step at each number.

    All are matrices whose columns are channels.
    """
    before = {tensor.name: tensor for tensor in original.graph.initializer}
    after = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, node in _names(model).items():
        turned = name.endswith((_TURNED, _TURNED_BY_OTHERS))
        plain = name.removesuffix(_TURNED).removesuffix(_TURNED_BY_OTHERS)
        plain = plain if plain in before else plain.removesuffix(_HALF)
        if plain not in before:
            raise ModelError(
                f"The quantized weight {name} is none of the float32 graph's, so it cannot be compared with it.",
                kind=ErrorKind.UNSUPPORTED,
            )
        want = onnx.numpy_helper.to_array(before[plain]).astype(np.float32)
        want = want.T if turned else want
        if node is None:
            yield plain, *_of_integers(want, after, name)
        else:
            yield plain, *_of_blocks(want, after, node)


def _names(model: onnx.ModelProto) -> dict[str, onnx.NodeProto | None]:
    """Return the quantized weights by their names before, each with the node that reads its blocks, if it has such."""
    names = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, onnx.NodeProto | None] = {
        name.removesuffix("_quantized"): None
        for name in names
        if name.endswith("_quantized") and f"{name.removesuffix('_quantized')}_scale" in names
    }
    for node in _nodes(model.graph):
        if node.op_type == "MatMulNBits":
            found.setdefault(node.input[1].removesuffix("_Q4"), node)
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _of_integers(original: Array, after: dict[str, onnx.TensorProto], name: str) -> tuple[Array, Array, Array]:
    whole = onnx.numpy_helper.to_array(after[f"{name}_quantized"]).astype(np.float32)
    scale = onnx.numpy_helper.to_array(after[f"{name}_scale"]).astype(np.float32).reshape(-1)
    zero = onnx.numpy_helper.to_array(after[f"{name}_zero_point"]).astype(np.float32).reshape(-1)
    want = original.reshape(whole.shape)
    axis = next((i for i in (whole.ndim - 1, 0) if whole.shape[i] == scale.size), whole.ndim - 1)
    # A convolution's channels come first, a product's last.
    columns = [np.moveaxis(values, axis, -1).reshape(-1, whole.shape[axis]) for values in (want, whole)]
    steps = np.broadcast_to(scale, columns[1].shape)
    return columns[0], (columns[1] - zero) * scale, steps


def _of_blocks(original: Array, after: dict[str, onnx.TensorProto], node: onnx.NodeProto) -> tuple[Array, Array, Array]:
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, size = numbers["K"], numbers["N"], numbers["block_size"]
    packed = onnx.numpy_helper.to_array(after[node.input[1]]).reshape(columns, -1)
    scale = onnx.numpy_helper.to_array(after[node.input[2]]).astype(np.float32).reshape(columns, -1)
    digits = np.empty((columns, packed.shape[1] * 2), np.float32)
    digits[:, 0::2], digits[:, 1::2] = packed & 0x0F, packed >> 4
    steps = np.repeat(np.abs(scale), size, axis=1)[:, :rows]
    got = (digits[:, :rows] - 8) * np.repeat(scale, size, axis=1)[:, :rows]
    return original.reshape(rows, columns), got.T, steps.T

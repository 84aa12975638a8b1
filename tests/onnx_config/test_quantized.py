"""Weights of 8 and 4 bits: what a quantizer did is seen from its weights, a lost channel too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from onnx_config.export.quantized import quantize, weight_faults
from onnx_config.variants import Variant

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 128)).astype(np.float32)
WEIGHT = (RANDOM.standard_normal((128, 96)) / 10).astype(np.float32)
WHOLE = (Variant.INT8, Variant.QUANTIZED, Variant.Q4)


def write_graph(path: Path, node: onnx.NodeProto, **weights: np.ndarray) -> Path:
    ends = [make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy"]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = make_graph([node], "g", ends[:1], ends[1:], held)
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10), str(path))
    return path


def product(path: Path, weight: np.ndarray = WEIGHT) -> Path:
    return write_graph(path, make_node("MatMul", ["x", "w"], ["y"], name="p"), w=weight)


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize(
    "node",
    [
        pytest.param(make_node("MatMul", ["x", "w"], ["y"], name="p"), id="product"),
        pytest.param(make_node("Gemm", ["x", "w", "b"], ["y"], name="p"), id="product-and-sum"),
        pytest.param(make_node("Gemm", ["x", "t", "b"], ["y"], name="p", transB=1), id="transposed"),
    ],
)
def test_products_are_quantized_and_no_healthy_weight_is_accused(
    tmp_path: Path, node: onnx.NodeProto, variant: Variant
) -> None:
    weights = {"w": WEIGHT, "b": np.ones(96, np.float32), "t": np.ascontiguousarray(WEIGHT.T)}
    path = write_graph(tmp_path / "model.onnx", node, **{n: weights[n] for n in node.input if n != "x"})
    assert quantize(path, tmp_path / "q.onnx", variant) == 1
    assert weight_faults(path, tmp_path / "q.onnx") == []
    assert (tmp_path / "q.onnx").stat().st_size < 0.4 * path.stat().st_size
    want = run(path)
    assert np.linalg.norm(run(tmp_path / "q.onnx") - want) < 0.15 * np.linalg.norm(want)


HEALTHY: dict[str, Callable[[], np.ndarray]] = {
    "a-channel-of-zeros": lambda: WEIGHT * (np.arange(96) != 7),
    "rows-of-many-sizes": lambda: WEIGHT * np.logspace(-3, 1, 128)[:, None],
    "channels-of-many-sizes": lambda: WEIGHT * np.logspace(-3, 1, 96)[None],
    "one-large-number": lambda: np.where(np.arange(WEIGHT.size).reshape(WEIGHT.shape) == 500, 5.0, WEIGHT),
    "all-alike": lambda: np.full_like(WEIGHT, 0.3),
    "positive": lambda: np.abs(WEIGHT) + 1,
    "rows-no-multiple-of-a-block": lambda: WEIGHT[:100],
}


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in HEALTHY.items()])
def test_no_healthy_weight_is_accused(tmp_path: Path, make: Callable[[], np.ndarray], variant: Variant) -> None:
    path = product(tmp_path / "model.onnx", make().astype(np.float32))
    assert quantize(path, tmp_path / "q.onnx", variant) == 1
    assert weight_faults(path, tmp_path / "q.onnx") == []


def zero_channel(path: Path, channel: int) -> None:
    """Make one channel of the quantized weight zeros."""
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == "w_Q4":
            array[channel] = 0x88
        elif tensor.name == "w_quantized":
            zero = next(t for t in model.graph.initializer if t.name == "w_zero_point")
            array[:, channel] = onnx.numpy_helper.to_array(zero).reshape(-1)[0]
        else:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, str(path))


def swap_channels(path: Path, channel: int) -> None:
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name in ("w_Q4", "w_quantized"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            view = array if tensor.name == "w_Q4" else array.T
            view[[channel, channel + 1]] = view[[channel + 1, channel]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, str(path))


@pytest.mark.parametrize("variant", WHOLE)
@pytest.mark.parametrize("fault", [zero_channel, swap_channels])
def test_a_quantizer_that_spoils_a_channel_is_caught(
    tmp_path: Path, fault: Callable[[Path, int], None], variant: Variant
) -> None:
    path = product(tmp_path / "model.onnx")
    quantize(path, tmp_path / "q.onnx", variant)
    fault(tmp_path / "q.onnx", 41)
    (found,) = weight_faults(path, tmp_path / "q.onnx")
    assert found.name == "w"
    assert found.channel in (41, 42)


def test_a_graph_without_products_of_weights_has_none_quantized(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", make_node("Add", ["x", "b"], ["y"]), b=np.ones(128, np.float32))
    assert quantize(path, tmp_path / "q.onnx", Variant.Q4) == 0

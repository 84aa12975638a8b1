"""Graphs in float16: what stays float32 and why, what a user feeds, and that weights are not held in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from onnx_config.export import half
from onnx_config.export.half import magnitudes, rounded, write_bfloat16, write_float16
from onnx_config.export.session import open_session

FLOAT, HALF, LONG = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 64)).astype(np.float32)
WEIGHT = (RANDOM.standard_normal((64, 64)) / 8).astype(np.float32)


def write_graph(path: Path, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, np.ndarray], **inputs: int) -> Path:
    """Write nodes that make ``y`` of ``x``."""
    takes = [make_tensor_value_info(n, kind, ["n", 64]) for n, kind in (inputs or {"x": FLOAT}).items()]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = make_graph(list(nodes), "g", takes, [make_tensor_value_info("y", FLOAT, None)], held)
    model = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def run(path: Path, x: np.ndarray = X, name: str = "x") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: x})[0]


def run_rounded(path: Path, x: np.ndarray = X) -> np.ndarray:
    return open_session(path, device="cpu", graph=rounded(path)).run(None, {"x": x})[0]


def halved(path: Path, *, x: np.ndarray = X, measured: bool = True, name: str = "x") -> tuple[Path, half.Halved]:
    output = path.with_name("half.onnx")
    return output, write_float16(path, output, largest=magnitudes(path, [{name: x}]) if measured else {})


def types_of(path: Path) -> dict[str, set[int]]:
    """Return the element types of what each operator's first input is, by operator."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    known = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    known |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found: dict[str, set[int]] = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, set()).add(known[node.input[0]])
    return found


def test_products_are_float16_and_what_a_user_feeds_is_float32(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", [make_node("MatMul", ["x", "w"], ["y"])], {"w": WEIGHT})
    output, made = halved(path)
    model = onnx.load(str(output))
    assert [tensor.data_type for tensor in model.graph.initializer] == [HALF]
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [FLOAT, FLOAT]
    assert [value.name for value in model.graph.output] == ["y"]
    assert types_of(output)["MatMul"] == {HALF}
    assert output.stat().st_size < 0.6 * path.stat().st_size
    assert made.note() == "every operator computes in float16"
    assert np.abs(run(output) - run(path)).max() < 5e-3


@pytest.mark.parametrize(
    ("nodes", "weights", "operator", "reason"),
    [
        pytest.param(
            [make_node("Mul", ["x", "big"], ["m"]), make_node("Div", ["m", "big"], ["y"])],
            {"big": np.full((1,), 3e4, np.float32)}, "Mul", "beyond float16", id="what-overflows",
        ),
        pytest.param(
            [make_node("Add", ["x", "huge"], ["m"]), make_node("Sub", ["m", "huge"], ["y"])],
            {"huge": np.full((64,), 1e5, np.float32)}, "Add", "beyond float16", id="a-weight-that-overflows",
        ),
        pytest.param(
            [make_node("ReduceMean", ["x"], ["m"]), make_node("Mul", ["x", "m"], ["y"])], {}, "ReduceMean", "sums",
            id="a-mean",
        ),
        pytest.param([make_node("Softmax", ["x"], ["y"])], {}, "Softmax", "sums", id="softmax"),
    ],
)  # fmt: skip
def test_what_stays_float32_is_named(
    tmp_path: Path, nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], operator: str, reason: str
) -> None:
    path = write_graph(tmp_path / "model.onnx", nodes, weights)
    output, made = halved(path)
    assert f"1 {operator} ({reason})" in made.note()
    assert types_of(output)[operator] == {FLOAT}
    assert np.abs(run(output) - run(path)).max() < 0.02


def test_an_overflow_that_nobody_measured_is_one(tmp_path: Path) -> None:
    nodes = [make_node("Mul", ["x", "big"], ["m"]), make_node("Div", ["m", "big"], ["y"])]
    path = write_graph(tmp_path / "model.onnx", nodes, {"big": np.full((1,), 6e4, np.float32)})
    unmeasured, _ = halved(path, measured=False)
    # The CPU does not round between two operators that it has no kernels for.
    assert np.isfinite(run(unmeasured)).all()
    assert not np.isfinite(run_rounded(unmeasured)).all()
    measured, _ = halved(path)
    assert np.isfinite(run_rounded(measured)).all()


def test_rounding_of_every_number_is_seen(tmp_path: Path) -> None:
    nodes = [make_node("Add", ["x", "thousand"], ["m"]), make_node("Sub", ["m", "thousand"], ["y"])]
    path = write_graph(tmp_path / "model.onnx", nodes, {"thousand": np.full((1,), 1000, np.float32)})
    output, _ = halved(path)
    want = ((X.astype(np.float16) + np.float16(1000)) - np.float16(1000)).astype(np.float32)
    assert np.array_equal(run_rounded(output), want)


def test_positions_stay_exact(tmp_path: Path) -> None:
    """An angle of position 30001 must not become that of 30000."""
    nodes = [
        make_node("Cast", ["ids"], ["p"], to=FLOAT), make_node("Mul", ["p", "slow"], ["angle"]),
        make_node("Cos", ["angle"], ["c"]), make_node("MatMul", ["c", "w"], ["y"]),
    ]  # fmt: skip
    weights = {"slow": np.full((1,), 0.5, np.float32), "w": WEIGHT}
    path = write_graph(tmp_path / "model.onnx", nodes, weights, ids=LONG)
    ids = np.arange(30_000, 30_192).reshape(3, 64)
    output, made = halved(path, x=ids, name="ids")
    assert "1 Mul (counts)" in made.note()
    assert "1 Cos (counts)" in made.note()
    assert np.abs(run(output, ids, "ids") - run(path, ids, "ids")).max() < 0.01


def test_a_mask_of_the_lowest_number_stays_a_mask(tmp_path: Path) -> None:
    nodes = [
        make_node("Greater", ["x", "zero"], ["seen"]), make_node("Where", ["seen", "zero", "lowest"], ["mask"]),
        make_node("Add", ["x", "mask"], ["scores"]), make_node("Softmax", ["scores"], ["y"]),
    ]  # fmt: skip
    lowest = np.full((1,), np.finfo(np.float32).min, np.float32)
    path = write_graph(tmp_path / "model.onnx", nodes, {"zero": np.zeros(1, np.float32), "lowest": lowest})
    hidden = np.concatenate([X, -np.abs(X[:1])])  # a row of which nothing is seen
    output, _ = halved(path, x=hidden)
    assert np.abs(run(output, hidden) - run(path, hidden)).max() < 1e-3


def test_a_loop_keeps_its_types_and_reads_what_it_read(tmp_path: Path) -> None:
    inner = make_graph([make_node("Add", ["h", "one"], ["b"])], "b", [], [make_tensor_value_info("b", FLOAT, None)])
    other = make_graph([make_node("Identity", ["h"], ["o"])], "o", [], [make_tensor_value_info("o", FLOAT, None)])
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"]), make_node("If", ["yes"], ["z"], then_branch=inner, else_branch=other),
        make_node("MatMul", ["z", "w"], ["y"]),
    ]  # fmt: skip
    weights = {"w": WEIGHT, "one": np.ones(1, np.float32), "yes": np.array(True)}
    path = write_graph(tmp_path / "model.onnx", nodes, weights)
    output, made = halved(path)
    assert "1 If (holds graphs)" in made.note()
    assert np.abs(run(output) - run(path)).max() < 0.02


def test_a_weight_that_is_read_in_both_types_is_stored_once(tmp_path: Path) -> None:
    nodes = [
        make_node("ReduceMean", ["w"], ["m"], keepdims=0), make_node("MatMul", ["x", "w"], ["p"]),
        make_node("Mul", ["p", "m"], ["y"]),
    ]  # fmt: skip
    path = write_graph(tmp_path / "model.onnx", nodes, {"w": WEIGHT + 1})
    output, _ = halved(path)
    assert output.stat().st_size < 0.6 * path.stat().st_size
    assert np.abs(run(output) / run(path) - 1).max() < 0.01


def test_bfloat16_weights_are_half_the_bytes_and_run_on_the_cpu(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", [make_node("MatMul", ["x", "w"], ["y"])], {"w": WEIGHT})
    output = tmp_path / "half.onnx"
    write_bfloat16(path, output)
    assert output.stat().st_size < 0.6 * path.stat().st_size
    assert 0 < np.abs(run(output) - run(path)).max() < 0.05
    exact = (WEIGHT.view(np.uint32) & 0xFFFF0000).view(np.float32)
    write_bfloat16(write_graph(path, [make_node("MatMul", ["x", "w"], ["y"])], {"w": exact}), output)
    assert np.array_equal(run(output), run(path))


def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    weight = np.concatenate([WEIGHT, WEIGHT * 1e30, WEIGHT * 1e-30]).astype(np.float32)
    weight[0, :4] = [np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]
    path = write_graph(tmp_path / "model.onnx", [make_node("MatMul", ["x", "w"], ["y"])], {"w": weight})
    write_bfloat16(path, tmp_path / "half.onnx")
    (stored,) = onnx.load(str(tmp_path / "half.onnx")).graph.initializer
    want = torch.from_numpy(weight).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(np.frombuffer(stored.raw_data, np.int16).reshape(want.shape), want)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(half, "_BLOCK", 64 * 1024)
    large = np.zeros((64, 64 * 2048), np.float32)
    path = write_graph(tmp_path / "model.onnx", [make_node("MatMul", ["x", "w"], ["y"])], {"w": large})
    write: Any = write_bfloat16 if kind == "bfloat16" else lambda a, b: write_float16(a, b, largest={})
    tracemalloc.start()
    write(path, tmp_path / "half.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.nbytes / 8
    assert (tmp_path / "half.onnx").stat().st_size > large.nbytes / 2

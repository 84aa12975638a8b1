"""Graphs read without their weights and written block by block: what comes back is what went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_config.export.streamed import StreamedTensor, read_without_weights, stamp, write_streamed

LARGE = np.arange(4096, dtype=np.float32).reshape(64, 64)
SMALL = np.arange(64, dtype=np.float32)


def write_graph(path: Path, *, beside: bool = False) -> Path:
    """Write ``x @ LARGE + SMALL``."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 64]) for name in "xy")
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["p"]), onnx.helper.make_node("Add", ["p", "b"], ["y"])]
    weights = [onnx.numpy_helper.from_array(LARGE, "w"), onnx.numpy_helper.from_array(SMALL, "b")]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, {"onnx_ferry.source": "tiny"})
    onnx.save(model, str(path), save_as_external_data=beside, location=f"{path.name}_data")
    return path


def answer(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 64), np.float32)})[0]


def test_large_weights_stay_in_the_file_and_are_found_there(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx")
    model = read_without_weights(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert not tensors["w"].raw_data
    assert np.array_equal(onnx.numpy_helper.to_array(tensors["b"]), SMALL)
    place = {entry.key: entry.value for entry in tensors["w"].external_data}
    found = np.memmap(tmp_path / place["location"], np.float32, "r", int(place["offset"]), (64, 64))
    assert np.array_equal(found, LARGE)


def test_weights_beside_a_graph_stay_named_as_they_are(tmp_path: Path) -> None:
    model = read_without_weights(write_graph(tmp_path / "model.onnx", beside=True))
    (place,) = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert place == "model.onnx_data"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x3a\xff\xff\xff\x7f", id="a-length-beyond-the-end"),
        pytest.param(b"\x3f\x00", id="a-kind-that-there-is-not"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"empty|beyond the end|unknown kind"):
        read_without_weights(tmp_path / "model.onnx")


@pytest.mark.parametrize("limit", [pytest.param(1 << 20, id="inside"), pytest.param(100, id="beside")])
def test_what_is_streamed_is_what_runs(tmp_path: Path, limit: int) -> None:
    model = read_without_weights(write_graph(tmp_path / "model.onnx"))
    del model.graph.initializer[:]
    weights = [
        StreamedTensor(name=n, data_type=1, shape=a.shape, nbytes=a.nbytes, blocks=lambda a=a: (b.tobytes() for b in a))
        for n, a in (("w", LARGE), ("b", SMALL))
    ]
    files = write_streamed(model, weights, tmp_path / "out.onnx", embed_limit_bytes=limit)
    assert [file.name for file in files] == ["out.onnx"] if limit > 100 else ["out.onnx", "out.onnx_data"]
    assert np.array_equal(answer(tmp_path / "out.onnx"), answer(tmp_path / "model.onnx"))


def test_a_weight_that_is_shorter_than_was_said_is_an_error(tmp_path: Path) -> None:
    model = read_without_weights(write_graph(tmp_path / "model.onnx"))
    short = StreamedTensor(name="w", data_type=1, shape=(64, 64), nbytes=LARGE.nbytes, blocks=lambda: [b"1234"])
    with pytest.raises(ValueError, match="w has 4 bytes where 16384 were announced"):
        write_streamed(model, [short], tmp_path / "out.onnx")


def test_a_stamp_is_added_and_nothing_else_changes(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx")
    before = answer(path)
    stamp(path, {"onnx_ferry.variant": "fp16"})
    props = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert props == {"onnx_ferry.source": "tiny", "onnx_ferry.variant": "fp16"}
    assert np.array_equal(answer(path), before)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

"""`AutoModelForONNX` answers as the transformers model does, and serves nothing that was not verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from onnx import TensorProto, helper, save

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.artifact import copy_side_files, list_files, write_ferry_file
from tests.onnx_config.converted import Converted

IDS = [[7, 8, 9, 10], [11, 12, 0, 0], [13, 14, 15, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
TYPES = [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.fixture
def artifact(bert: Converted, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bert.stored.parent, tmp_path / "artifact"))
    copy_side_files(bert.source, folder)
    return folder


@pytest.fixture(scope="module")
def reference(bert: Converted) -> Any:
    return transformers.BertModel.from_pretrained(bert.source).eval()


@pytest.fixture(scope="module")
def model(bert: Converted) -> AutoModelForONNX:
    return AutoModelForONNX.from_pretrained(bert.stored.parent, threads=1)


GIVEN = {
    "everything": {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES},
    "no-segments": {"input_ids": IDS, "attention_mask": MASK},
    "no-mask": {"input_ids": IDS, "token_type_ids": TYPES},
    "ids-only": {"input_ids": IDS},
}


@pytest.mark.parametrize("given", [pytest.param(value, id=name) for name, value in GIVEN.items()])
def test_outputs_are_those_of_pytorch(model: AutoModelForONNX, reference: Any, given: dict[str, Any]) -> None:
    inputs = {name: torch.tensor(value) for name, value in given.items()}
    with torch.no_grad():
        want = reference(**inputs)
    got = model(**inputs)
    assert list(got.keys()) == list(want.keys()) == ["last_hidden_state", "pooler_output"]
    for name in want:
        assert isinstance(got[name], torch.Tensor)
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=1e-4)
    assert torch.equal(got.last_hidden_state, got[0])


def test_numpy_in_numpy_out(model: AutoModelForONNX) -> None:
    outputs = model(**{name: np.array(value) for name, value in GIVEN["everything"].items()})
    assert isinstance(outputs.last_hidden_state, np.ndarray)
    assert outputs.last_hidden_state.dtype == np.float32


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(lambda value: value, id="lists"),
        pytest.param(lambda value: np.array(value, np.int32), id="int32"),
        pytest.param(lambda value: torch.tensor(value, dtype=torch.bfloat16), id="bfloat16"),
        pytest.param(lambda value: torch.tensor(value, requires_grad=False).T.contiguous().T, id="not-contiguous"),
    ],
)
def test_other_element_types_are_converted(model: AutoModelForONNX, cast: Any) -> None:
    want = model(**{name: np.array(value) for name, value in GIVEN["everything"].items()})
    got = model(**{name: cast(value) for name, value in GIVEN["everything"].items()})
    assert np.array_equal(np.asarray(got.last_hidden_state), want.last_hidden_state)


def test_what_the_graph_does_not_take_is_left_out(model: AutoModelForONNX) -> None:
    extra = {"special_tokens_mask": [[0] * 4] * 3, "length": 4, "return_dict": True}
    assert model(input_ids=np.array(IDS), **extra).pooler_output.shape == (3, 32)


def test_a_tokenizer_feeds_it(model: AutoModelForONNX, artifact: Path, reference: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    batch = tokenizer(["the ferry leaves", "a captain reads the weather"], padding=True, return_tensors="pt")
    with torch.no_grad():
        want = reference(**batch).last_hidden_state
    torch.testing.assert_close(model(**batch).last_hidden_state, want, atol=2e-5, rtol=1e-4)


def test_an_image_model_runs_too(vit: Converted) -> None:
    reference = transformers.ViTForImageClassification.from_pretrained(vit.source).eval()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        want = reference(pixels).logits
    got = AutoModelForONNX.from_pretrained(vit.stored.parent, threads=1)(pixel_values=pixels)
    torch.testing.assert_close(got.logits, want, atol=2e-5, rtol=1e-4)


def test_a_missing_input_is_named(model: AutoModelForONNX) -> None:
    with pytest.raises(InputError, match="'input_ids' is missing"):
        model(attention_mask=np.array(MASK))


def test_a_shape_that_the_graph_does_not_take_is_said_so(model: AutoModelForONNX) -> None:
    with pytest.raises(InputError, match=r"cannot run the graph on input_ids \[4\]"):
        model(input_ids=np.array(IDS[0]), attention_mask=np.array(MASK), token_type_ids=np.array(TYPES))


def identity_graph(folder: Path, **inputs: tuple[int, list[str | int]]) -> Path:
    """Write a graph that returns each of its inputs; made for what the filled-in ones hold."""
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_out", dtype, shape) for name, (dtype, shape) in inputs.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    graph = helper.make_graph(nodes, "g", values, outputs)
    folder.mkdir(exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")
    return folder


INT, BOOL, FLOAT = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT


@pytest.mark.parametrize(
    ("name", "dtype", "source", "shape", "value"),
    [
        pytest.param("attention_mask", INT, "input_ids", (2, 3), 1, id="text"),
        pytest.param("attention_mask", BOOL, "input_values", (2, 3), True, id="sound"),
        pytest.param("decoder_attention_mask", INT, "decoder_input_ids", (2, 3), 1, id="decoder"),
        pytest.param("token_type_ids", INT, "input_ids", (2, 3), 0, id="segments"),
        pytest.param("pixel_mask", INT, "pixel_values", (2, 3, 4, 5), 1, id="pixels"),
    ],
)
def test_what_is_missing_is_filled_in(
    tmp_path: Path, name: str, dtype: int, source: str, shape: tuple[int, ...], value: Any
) -> None:
    kind = FLOAT if "values" in source else INT
    wanted = shape if len(shape) == 2 else (shape[0], *shape[2:])
    axes = {n: [f"{n}_{i}" for i in range(len(s))] for n, s in ((source, shape), (name, wanted))}
    folder = identity_graph(tmp_path, **{source: (kind, axes[source]), name: (dtype, axes[name])})  # type: ignore[arg-type]
    model = AutoModelForONNX.from_pretrained(folder)
    outputs = model(**{source: np.zeros(shape, np.float32 if kind == FLOAT else np.int64)})
    assert outputs[f"{name}_out"].shape == wanted
    assert (outputs[f"{name}_out"] == value).all()
    with pytest.raises(InputError, match=f"'{source}' is missing"):
        model(**{name: np.ones(wanted)})


# -------------------------------------------------------------------------------------------------------- loading


def register(folder: Path, verdict: str | None) -> None:
    entry = {"id": "tiny", "parity": None if verdict is None else {"verdict": verdict}}
    write_ferry_file(folder, entry, list_files(folder))


@pytest.mark.parametrize("verdict", ["verified", None])
def test_what_is_verified_is_served(artifact: Path, verdict: str | None) -> None:
    register(artifact, verdict)
    model = AutoModelForONNX.from_pretrained(str(artifact))
    assert model.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert (model.device, model.config.model_type) == ("cpu", "bert")


@pytest.mark.parametrize("verdict", ["mismatch", "unstable", "not_run"])
def test_what_is_not_is_served_only_when_asked_for(artifact: Path, verdict: str) -> None:
    register(artifact, verdict)
    with pytest.raises(ModelError, match=f"is in quarantine: .* the verdict is {verdict}") as caught:
        AutoModelForONNX.from_pretrained(artifact)
    assert caught.value.kind is ErrorKind.MISMATCH
    AutoModelForONNX.from_pretrained(artifact, allow_quarantined=True)


def test_a_folder_of_another_converter_is_read_too(artifact: Path) -> None:
    (artifact / "onnx").mkdir()
    (artifact / "model.onnx").rename(artifact / "onnx" / "model.onnx")
    model = AutoModelForONNX.from_pretrained(artifact)
    assert model(input_ids=np.array(IDS)).last_hidden_state.shape == (3, 4, 32)
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_graph_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no model\.onnx\. Give the folder of a converted model") as caught:
        AutoModelForONNX.from_pretrained(tmp_path / name)
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_graph_that_is_broken_is_refused(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"refuses the graph model\.onnx") as caught:
        AutoModelForONNX.from_pretrained(artifact)
    assert caught.value.kind is ErrorKind.RUNTIME_FAILED


def test_a_ferry_file_that_is_broken_is_an_error(artifact: Path) -> None:
    (artifact / "ferry.json").write_text(json.dumps({"schema": 1, "model": []}))
    with pytest.raises(InputError, match="is not of schema 1"):
        AutoModelForONNX.from_pretrained(artifact)


def test_generation_is_not_offered(model: AutoModelForONNX) -> None:
    with pytest.raises(ModelError, match=r"without a cache, so generate\(\) would compute every token anew") as caught:
        model.generate(input_ids=np.array(IDS))
    assert caught.value.kind is ErrorKind.UNSUPPORTED

"""`AutoModelForONNX` answers as the transformers model does, and serves nothing that was not verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, save

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.artifact import copy_side_files, list_files, write_ferry_file
from tests.onnx_config.converted import Converted
from tests.onnx_config.test_cached_model import Continued

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
    assert (model.device, model.config.model_type) == (torch.device("cpu"), "bert")


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


def test_a_graph_without_a_cache_does_not_generate(model: AutoModelForONNX) -> None:
    with pytest.raises(ModelError, match=r"carries no cache.*text-generation-with-past") as caught:
        model.generate(input_ids=np.array(IDS))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert not model.can_generate()
    assert model.generation_config is None


def test_a_session_stays_where_it_is(model: AutoModelForONNX) -> None:
    assert model.to("cpu") is model.to(torch.device("cpu")) is model.eval() is model
    with pytest.raises(InputError, match=r"loaded for cpu and cannot be moved to cuda.*device='cuda'"):
        model.to("cuda:0")


def test_pipelines_take_it(artifact: Path, reference: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForONNX.from_pretrained(artifact)
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    assert type(model).__name__ == "BertModel"
    made = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    plain = transformers.pipeline("feature-extraction", model=reference, tokenizer=tokenizer)
    np.testing.assert_allclose(made("a text")[0], plain("a text")[0], atol=2e-5)
    assert "is not supported" not in caplog.text


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoModelForONNX, Any]:
    """A model that generates, and the one that it came from."""
    made = Continued("gpt2-causal-lm", tmp_path_factory.mktemp("causal"))
    copy_side_files(made.source, made.graph.parent)
    reference = transformers.AutoModelForCausalLM.from_pretrained(made.source).eval()
    return AutoModelForONNX.from_pretrained(made.graph.parent, threads=1), reference


PROMPTS = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 12, 13, 14], [0, 15, 16, 17, 18]])
HIDDEN = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "penalty": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "scores": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    "no-cache": {"do_sample": False, "use_cache": False},
    "a-cache-of-fixed-size": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in WAYS.items()])
def test_it_generates_what_pytorch_generates(causal: tuple[AutoModelForONNX, Any], options: dict[str, Any]) -> None:
    texts = []
    for model in causal:
        torch.manual_seed(0)
        found = model.generate(PROMPTS, attention_mask=HIDDEN, max_new_tokens=24, pad_token_id=0, **options)
        texts.append(found if isinstance(found, torch.Tensor) else found.sequences)
    assert torch.equal(*texts)
    assert texts[0].shape[1] > PROMPTS.shape[1]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}], ids=["lookup", "assistant"])
def test_tokens_that_are_guessed_ahead_are_taken_back(
    causal: tuple[AutoModelForONNX, Any], options: dict[str, Any]
) -> None:
    texts = []
    for model in causal:
        helped = {"assistant_model": model} if options.get("assistant") else options
        texts.append(model.generate(PROMPTS[:1], max_new_tokens=24, do_sample=False, pad_token_id=0, **helped))
    assert torch.equal(*texts)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two-graphs"])
def test_older_layouts_of_decoders_alone_are_read(
    causal: tuple[AutoModelForONNX, Any], tmp_path: Path, *, merged: bool
) -> None:
    """Optimum once wrote a graph that begins, one that goes on, and one of both; these are made of ours."""
    model, reference = causal
    copy_side_files(model.folder, tmp_path)
    whole = onnx.load(str(model.folder / "model.onnx"))
    if merged:
        whole.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
        save(whole, tmp_path / "decoder_model_merged.onnx")
    else:
        save(whole, tmp_path / "decoder_with_past_model.onnx")
        save(beginning(whole), tmp_path / "decoder_model.onnx")
    loaded = AutoModelForONNX.from_pretrained(tmp_path, threads=1)
    asked = {"attention_mask": HIDDEN, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(loaded.generate(PROMPTS, **asked), reference.generate(PROMPTS, **asked))
    if not merged:
        (tmp_path / "decoder_with_past_model.onnx").unlink()
        with pytest.raises(InputError, match=r"decoder_with_past_model\.onnx, which goes on, is missing"):
            AutoModelForONNX.from_pretrained(tmp_path)


def beginning(whole: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph without its past, which is empty inside."""
    begun = onnx.ModelProto()
    begun.CopyFrom(whole)
    graph = begun.graph
    past = [value for value in graph.input if value.name.startswith("past_key_values")]
    for value in past:
        graph.input.remove(value)
    nodes = list(graph.node)
    del graph.node[:]
    # As many rows as there are texts, and no step of the past.
    rows = helper.make_node("Shape", ["input_ids"], ["rows"], start=0, end=1)
    graph.node.append(rows)
    for value in past:
        _, heads, _, width = (axis.dim_value for axis in value.type.tensor_type.shape.dim)
        graph.initializer.append(helper.make_tensor(f"{value.name}.rest", TensorProto.INT64, [3], [heads, 0, width]))
        graph.node.append(helper.make_node("Concat", ["rows", f"{value.name}.rest"], [f"{value.name}.shape"], axis=0))
        graph.node.append(helper.make_node("ConstantOfShape", [f"{value.name}.shape"], [value.name]))
    graph.node.extend(nodes)
    return begun


def test_what_a_graph_does_not_give_is_refused(causal: tuple[AutoModelForONNX, Any]) -> None:
    model, _ = causal
    with pytest.raises(InputError, match="the graph gives no hidden_states"):
        model(input_ids=PROMPTS, output_hidden_states=True)
    with pytest.raises(InputError, match="the graph gives no attentions"):
        model.generate(PROMPTS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert model(input_ids=PROMPTS, use_cache=False).past_key_values is None


def test_a_call_goes_on_from_what_an_earlier_one_returned(causal: tuple[AutoModelForONNX, Any]) -> None:
    model, reference = causal
    ids = PROMPTS[:1]
    with torch.no_grad():
        want = reference(input_ids=ids).logits
    begun = model(input_ids=ids[:, :3])
    rest = model(input_ids=ids[:, 3:], past_key_values=begun.past_key_values)
    torch.testing.assert_close(torch.cat([begun.logits, rest.logits], dim=1), want, atol=2e-5, rtol=1e-4)


def test_numpy_goes_in_and_comes_out_of_it_too(causal: tuple[AutoModelForONNX, Any]) -> None:
    model, _ = causal
    want, got = (
        model(input_ids=PROMPTS, attention_mask=HIDDEN),
        model(input_ids=PROMPTS.numpy(), attention_mask=HIDDEN.numpy()),
    )
    assert isinstance(got.logits, np.ndarray)
    np.testing.assert_array_equal(got.logits, want.logits.numpy())
    with pytest.raises(InputError, match="'input_ids' is missing"):
        model(attention_mask=HIDDEN)


def test_options_that_are_unknown_and_texts_that_are_too_long_are_refused(causal: tuple[AutoModelForONNX, Any]) -> None:
    model, _ = causal
    with pytest.raises(InputError, match=r"an option that transformers does not know.*'temprature'"):
        model.generate(PROMPTS, temprature=0.5)
    most = model.config.max_position_embeddings
    with pytest.raises(InputError, match=rf"{most + 1} tokens with what came before; the model knows {most} positions"):
        model(input_ids=torch.ones(1, most + 1, dtype=torch.int64))


def test_a_pipeline_generates_with_it(causal: tuple[AutoModelForONNX, Any]) -> None:
    texts = []
    for model in causal:
        tokenizer = transformers.AutoTokenizer.from_pretrained(causal[0].folder)
        made = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts.append(made("the model", max_new_tokens=8, do_sample=False))
    assert texts[0] == texts[1]

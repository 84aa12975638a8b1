"""Folders of sentence-transformers: our modules compute what the library's do, and what is unknown is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_config import UniversalOnnxConfig
from onnx_config.config_file import config_from_dict, read_config_dict
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.hub import resolve
from onnx_config.sentence_modules import (
    POOLING_MODES,
    SentenceModules,
    StageKind,
    config_folder,
    module_files,
    module_folders,
    pooling_modes,
    read_sentence_modules,
)
from tests.onnx_config.sentence_folders import HIDDEN, Module, write_sentence_folder

MEAN: Module = ("Pooling", {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True})
NORMALIZE: Module = ("Normalize", None)


def pooling(mode: str | list[str]) -> Module:
    return ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": mode})


def dense(**settings: Any) -> Module:
    return ("Dense", {"in_features": HIDDEN, "out_features": 8, "bias": True, **settings})


def library() -> Any:
    with warnings.catch_warnings():
        # The library's own dependencies warn of one another while they are imported.
        warnings.simplefilter("ignore")
        return pytest.importorskip("sentence_transformers", reason="no sentence-transformers to compare with")


# Rows: whole, padded on the right, padded on the left, one token, no token at all.
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 3 + [1] * 4, [1] + [0] * 6, [0] * 7], np.int64)
IDS = np.random.default_rng(3).integers(10, 90, MASK.shape)

CASES = [
    *(pytest.param([pooling(mode)], id=mode) for mode in POOLING_MODES),
    pytest.param([("Pooling", {"word_embedding_dimension": HIDDEN})], id="no-mode-means-mean"),
    pytest.param(
        [("Pooling", {"word_embedding_dimension": HIDDEN, **dict.fromkeys(POOLING_MODES.values(), True)})],
        id="all-switches-one-after-the-other",
    ),
    pytest.param([pooling(["mean", "cls"])], id="in-the-order-named"),
    pytest.param([MEAN, NORMALIZE], id="normalize"),
    pytest.param([MEAN, ("Dropout", {"dropout": 0.5}), NORMALIZE], id="dropout-is-off"),
    pytest.param([MEAN, dense()], id="dense-tanh-by-default"),
    pytest.param(
        [MEAN, dense(activation_function="torch.nn.modules.linear.Identity", bias=False), NORMALIZE], id="dense-plain"
    ),
    pytest.param([MEAN, dense(activation_function="torch.nn.modules.activation.GELU")], id="dense-gelu"),
    pytest.param([MEAN, dense(use_residual=True)], id="dense-with-residual"),
    pytest.param([MEAN, dense(out_features=HIDDEN, use_residual=True)], id="dense-with-plain-residual"),
    pytest.param([MEAN, ("LayerNorm", {"dimension": HIDDEN})], id="layer-norm"),
    pytest.param(
        [dense(out_features=HIDDEN, module_input_name="token_embeddings"), MEAN, NORMALIZE], id="dense-over-tokens"
    ),
]


def ours(folder: Path) -> Any:
    config = config_from_dict(read_config_dict(folder))
    universal = UniversalOnnxConfig.from_config_in(folder, config)
    assert universal.source is not None
    return universal.source.load(folder)


@pytest.mark.parametrize("modules", CASES)
def test_the_same_as_the_library(tmp_path: Path, modules: list[Module]) -> None:
    import torch

    st = library()
    folder = write_sentence_folder(tmp_path, modules)
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = st.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()(dict(inputs))
        found = ours(folder)(**inputs)
    for name in ("token_embeddings", "sentence_embedding"):
        torch.testing.assert_close(found[name], theirs[name], rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "inner", "expected"),
    [
        pytest.param("bert-model", "", "BertModel", id="in-the-folder-itself"),
        pytest.param("bert-model", "0_Transformer", "BertModel", id="in-a-folder-of-its-own"),
        pytest.param("bert-masked-lm", "", "BertModel", id="saved-with-another-head"),
        pytest.param("t5-encoder", "", "T5EncoderModel", id="the-encoder-of-an-encoder-decoder"),
        pytest.param("qwen2-causal-lm", "", "Qwen2Model", id="a-decoder"),
    ],
)
def test_what_is_found(tmp_path: Path, name: str, inner: str, expected: str) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN, NORMALIZE], name=name, inner=inner)
    found = UniversalOnnxConfig.from_pretrained(folder)
    assert (found.task, found.architecture) == ("feature-extraction", expected)
    assert found.outputs == {
        "token_embeddings": {0: "batch_size", 1: "sequence_length"},
        "sentence_embedding": {0: "batch_size"},
    }
    assert found.get_input_names()[:2] == ["input_ids", "attention_mask"]
    assert "Transformer, Pooling (mean), Normalize" in found.spec.declared[0]


def test_a_model_too_large_to_try_out_is_settled_by_a_narrower_one() -> None:
    from transformers import BertConfig

    from onnx_config.sentence_encoder import SentenceEncoderSource
    from onnx_config.sentence_modules import Stage

    def stage(number: int, module: Module) -> Stage:
        return Stage(kind=StageKind(module[0]), path=f"{number}", settings=module[1] or {})

    config = BertConfig()
    modules = [
        pooling(["cls", "mean"]),
        ("Dense", {"in_features": 2 * config.hidden_size, "out_features": config.hidden_size}),
        ("Dense", {"in_features": config.hidden_size, "out_features": 96, "use_residual": True}),
        ("LayerNorm", {"dimension": 96}),
        NORMALIZE,
    ]
    stages = tuple(stage(n, module) for n, module in enumerate(modules, start=1))
    source = SentenceEncoderSource(config, SentenceModules(transformer="", stages=stages))
    found = UniversalOnnxConfig._from_source(source, config)
    shapes = {tensor.name: tensor.shape for tensor in found.inference.outputs}
    assert shapes["token_embeddings"] == ("batch_size", "sequence_length", config.hidden_size)
    assert shapes["sentence_embedding"] == ("batch_size", 96)
    narrow = source.build(BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1))
    assert [layer.in_features for layer in narrow.modules() if layer.__class__.__name__ == "Linear"][-3:] == [
        48,
        768,
        768,
    ]


def test_another_task_is_that_of_the_transformer_alone(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN], name="bert-masked-lm")
    assert UniversalOnnxConfig.from_pretrained(folder, task="sentence-similarity").source is not None
    found = UniversalOnnxConfig.from_pretrained(folder, task="fill-mask")
    assert (found.architecture, found.get_output_names()) == ("BertForMaskedLM", ["logits"])


def test_a_transformer_alone_is_a_model_of_transformers(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [])
    assert read_sentence_modules(folder) is None
    assert UniversalOnnxConfig.from_pretrained(folder).get_output_names() == ["last_hidden_state", "pooler_output"]


def test_the_modules_as_read(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN, NORMALIZE], inner="0_Transformer")
    modules = read_sentence_modules(folder)
    assert isinstance(modules, SentenceModules)
    assert modules.transformer == "0_Transformer"
    assert [stage.kind for stage in modules.stages] == [StageKind.POOLING, StageKind.NORMALIZE]
    assert config_folder(folder) == folder / "0_Transformer"
    assert module_folders(folder) == ("0_Transformer", "1_Pooling", "2_Normalize")
    assert {"0_Transformer/model.safetensors", "1_Pooling/config.json"} <= {
        path.relative_to(folder).as_posix() for path in module_files(folder)
    }


@pytest.mark.parametrize("changed", ["1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"])
def test_what_a_module_holds_is_part_of_the_revision(tmp_path: Path, changed: str) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN, dense()])
    before = resolve(str(folder)).revision
    assert resolve(str(folder)).revision == before
    (folder / changed).write_bytes((folder / changed).read_bytes() + b" ")
    assert resolve(str(folder)).revision != before


def entry(kind: str, path: str = "", idx: int = 0) -> dict[str, Any]:
    return {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}


BERT = entry("Transformer")


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        pytest.param([BERT, {**entry("X", "1_X", 1), "type": "custom_st.Pooling"}], ModelError, "own code", id="code"),
        pytest.param([BERT, entry("CNN", "1_CNN", 1)], ModelError, "'CNN', which is unknown", id="unknown"),
        pytest.param([entry("StaticEmbedding")], ModelError, "first module is to be a Transformer", id="static"),
        pytest.param([BERT, entry("Pooling", "../up", 1)], InputError, "outside its own", id="outside"),
        pytest.param([BERT, entry("Pooling", "..", 1)], InputError, "outside its own", id="the-folder-above"),
        pytest.param([BERT, entry("Pooling", "/etc", 1)], InputError, "outside its own", id="absolute"),
        pytest.param({"0": BERT}, InputError, "no list of modules", id="an-object"),
        pytest.param([{"idx": 0}], InputError, "no list of modules", id="no-type"),
        pytest.param("half", InputError, "no list of modules", id="text"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, modules: Any, error: type[Exception], words: str) -> None:
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(error, match=words) as caught:
        read_sentence_modules(tmp_path)
    kind = ErrorKind.UNSUPPORTED if error is ModelError else ErrorKind.BAD_INPUT
    assert caught.value.kind is kind  # type: ignore[attr-defined]  # both are errors of ours


@pytest.mark.parametrize(
    ("modules", "error", "words"),
    [
        pytest.param([pooling("median")], ModelError, "pools by 'median', which is unknown", id="pooling"),
        pytest.param([MEAN, dense(out_features="8")], InputError, "out_features '8', where a whole", id="size"),
        pytest.param(
            [MEAN, dense(activation_function="my.code.Act")], ModelError, "which is no module of torch.nn", id="code"
        ),
        pytest.param(
            [MEAN, dense(activation_function="torch.nn.Conv1d")], ModelError, "which needs arguments", id="arguments"
        ),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, modules: list[Module], error: type[Exception], words: str) -> None:
    folder = tmp_path / "model"
    if words.startswith("out_features"):
        write_sentence_folder(folder, [MEAN, dense()])
        (folder / "2_Dense" / "config.json").write_text(json.dumps(modules[1][1]))
    else:
        write_sentence_folder(folder, modules)
    with pytest.raises(error, match=words):
        ours(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"transformer_task": "fill-mask"}, "transformer_task 'fill-mask'", id="another-task"),
        pytest.param({"modality_config": {"image": {"method": "forward"}}}, r"modalities \['image'\]", id="images"),
        pytest.param({"modality_config": {"text": {"method": "get_text_features"}}}, "last hidden states", id="method"),
    ],
)
def test_another_run_of_the_transformer_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN])
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=words) as caught:
        read_sentence_modules(folder)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_what_the_graph_leaves_out_is_said(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [("Pooling", {"embedding_dimension": HIDDEN, "include_prompt": False})])
    (folder / "sentence_bert_config.json").write_text(json.dumps({"config_args": {"hidden_act": "relu"}}))
    modules = read_sentence_modules(folder)
    assert modules is not None
    assert ["config_args" in modules.notes[0], "a prompt is pooled" in modules.notes[1]] == [True, True]
    assert set(modules.notes) <= set(UniversalOnnxConfig.from_pretrained(folder).spec.notes)


def test_weights_of_a_module_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [MEAN, dense()])
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": HIDDEN, "out_features": 9}))
    with pytest.raises(InputError, match=r"do not fit their config\.json"):
        ours(folder)
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        ours(folder)


def test_the_modes_of_a_stage_without_settings(tmp_path: Path) -> None:
    folder = write_sentence_folder(tmp_path, [("Pooling", None)])
    modules = read_sentence_modules(folder)
    assert modules is not None
    assert pooling_modes(modules.stages[0]) == ("mean",)

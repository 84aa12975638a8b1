"""Code that comes with a model: which classes it names, that only what was allowed runs, and that it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnx_config import UniversalOnnxConfig
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export import steps
from onnx_config.export.loaded import loaded_model
from onnx_config.remote_code import RemoteCode, code_sha256, names_code
from onnx_config.spec import ModelSpec
from tests.own_code import AUTO_MAP, write_own_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_code(tmp_path_factory.mktemp("own") / "ripple")


@pytest.mark.parametrize(
    ("auto_map", "named"),
    [
        pytest.param(AUTO_MAP, True, id="all"),
        pytest.param({"AutoConfig": "configuration_x.X"}, True, id="config-alone"),
        pytest.param({"AutoTokenizer": ["tokenization_x.X", None]}, False, id="tokenizer-alone"),
        pytest.param(None, False, id="nothing"),
        pytest.param("modeling_x.X", False, id="no-mapping"),
    ],
)
def test_a_config_names_code_where_it_names_a_class(auto_map: Any, named: bool) -> None:
    assert names_code({"auto_map": auto_map}) is named


@pytest.mark.parametrize(
    ("architectures", "task", "expected"),
    [
        pytest.param(("RippleForCausalLM",), None, ("text-generation", "RippleForCausalLM"), id="causal"),
        pytest.param(("RippleModel",), None, ("feature-extraction", "RippleModel"), id="bare"),
        pytest.param(("Nonesuch",), None, ("feature-extraction", "RippleModel"), id="unknown"),
        pytest.param(
            ("RippleModel",),
            "text-classification",
            ("text-classification", "RippleForSequenceClassification"),
            id="asked-for",
        ),
    ],
)
def test_the_task_is_that_of_the_auto_class(
    folder: Path, architectures: tuple[str, ...], task: str | None, expected: tuple[str, str]
) -> None:
    found = RemoteCode(folder, {"auto_map": AUTO_MAP}).detect(architectures, task)
    assert (found.task, found.class_name) == expected


def test_below_a_head_for_pretraining_lies_what_is_deployed(tmp_path: Path) -> None:
    code = RemoteCode(tmp_path, {"auto_map": {"AutoModel": "m.Base", "AutoModelForMaskedLM": "m.Head"}})
    assert code.detect(("Head",), None).class_name == "Base"
    assert code.detect(("Head",), "fill-mask").class_name == "Head"
    alone = RemoteCode(tmp_path, {"auto_map": {"AutoModelForMaskedLM": "m.Head"}})
    assert (alone.detect(("Head",), None).task, alone.detect(("Head",), None).class_name) == ("fill-mask", "Head")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        pytest.param("other/model--modeling_x.X", "code of another repository", id="elsewhere"),
        pytest.param("../../modeling_x.X", "no module and class of this folder", id="a-path"),
        pytest.param("modeling/x.X", "no module and class of this folder", id="a-folder"),
        pytest.param(["modeling_x.X"], "no module and class of this folder", id="a-list"),
    ],
)
def test_code_from_elsewhere_is_refused_before_it_runs(tmp_path: Path, reference: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RemoteCode(tmp_path, {"auto_map": {"AutoModel": reference}})


def test_code_that_cannot_be_imported_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "modeling_x.py").write_text("import a_library_that_nobody_has\n")
    with pytest.raises(ModelError, match=r"modeling_x.X, cannot be imported.*a_library_that_nobody_has") as raised:
        RemoteCode(tmp_path, {"auto_map": {"AutoModel": "modeling_x.X"}}).model_class("X")
    assert raised.value.kind is ErrorKind.UNSUPPORTED


def test_nothing_runs_unless_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    bold = write_own_code(tmp_path / "bold", weights=False)
    mark = tmp_path / "it-ran"
    (bold / "configuration_ripple.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for trust in ({}, {"trust_remote_code": False}):
        with pytest.raises(ModelError, match="needs trust_remote_code"):
            steps.detect({"folder": str(bold), **trust})
    with pytest.raises(ModelError, match="needs trust_remote_code"):
        UniversalOnnxConfig.from_pretrained(bold)
    assert not mark.exists()


def test_two_models_may_bring_different_code_under_one_name(folder: Path, tmp_path: Path) -> None:
    other = write_own_code(tmp_path / folder.name, weights=False)
    path = other / "modeling_ripple.py"
    path.write_text(path.read_text().replace("self.classifier = nn.Linear", "self.renamed = nn.Linear"))
    classes = [
        RemoteCode(f, {"auto_map": AUTO_MAP}).model_class("RippleForSequenceClassification") for f in (folder, other)
    ]
    configs = [RemoteCode(f, {"auto_map": AUTO_MAP}).config_of({"num_labels": 3}) for f in (folder, other)]
    assert [hasattr(cls(c), "renamed") for cls, c in zip(classes, configs, strict=True)] == [False, True]


def test_the_spec_says_which_code_ran_and_no_other_runs_later(tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "ripple")
    request = {"folder": str(folder)}
    spec = ModelSpec.from_json(steps.detect({**request, "trust_remote_code": True}))
    assert (spec.architecture, spec.task, spec.code_sha256) == (
        "RippleForSequenceClassification",
        "text-classification",
        code_sha256(folder),
    )
    assert [tensor.name for tensor in spec.inputs] == ["input_ids", "attention_mask"]
    assert any(code_sha256(folder) in note for note in spec.notes)
    assert type(loaded_model(request, spec)[1]).__name__ == "RippleForSequenceClassification"
    path = folder / "modeling_ripple.py"
    path.write_text(path.read_text() + "\n# changed\n")
    with pytest.raises(InputError, match="have changed"):
        loaded_model(request, spec)


def test_a_tokenizer_beside_the_code_says_what_it_makes(tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "ripple", "RippleModel", weights=False)
    path = folder / "modeling_ripple.py"
    path.write_text(
        path.read_text().replace(
            "attention_mask=None, return_dict", "attention_mask=None, token_type_ids=None, return_dict"
        )
    )
    names = []
    for settings in (
        None,
        {"tokenizer_class": "BertTokenizer"},
        {"tokenizer_class": "X", "model_input_names": ["input_ids"]},
    ):
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found = UniversalOnnxConfig.from_pretrained(folder, trust_remote_code=True)
        names.append(found.get_input_names())
    assert names == [
        ["input_ids", "attention_mask"],
        ["input_ids", "attention_mask", "token_type_ids"],
        ["input_ids", "attention_mask"],
    ]


def test_python_users_may_allow_it(folder: Path) -> None:
    found = UniversalOnnxConfig.from_pretrained(folder, trust_remote_code=True, task="text-generation")
    assert found.model_class.__name__ == "RippleForCausalLM"
    assert json.loads((folder / "config.json").read_text())["model_type"] == found.model_type == "ripple"


def test_a_sentence_encoder_may_stand_on_code_of_its_own(tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "ripple", "RippleModel")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    spec = ModelSpec.from_json(steps.detect({"folder": str(folder), "trust_remote_code": True}))
    assert (spec.architecture, [t.name for t in spec.outputs]) == (
        "RippleModel",
        ["token_embeddings", "sentence_embedding"],
    )
    _, model = loaded_model({"folder": str(folder)}, spec)
    assert sum(p.numel() for p in model.parameters()) > 0

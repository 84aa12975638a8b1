"""Which configs share one detection: fine-tunes do, and whatever could change an answer does not."""

from __future__ import annotations

import pytest
import tiny_models
import transformers

from onnx_config import UniversalOnnxConfig
from tasks.structure import structural_part

BASE = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 32,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "id2label": {"0": "bad", "1": "good"},
    "label2id": {"bad": 0, "good": 1},
    "transformers_version": "4.30.0",
    "text_config": {"dropout": 0.1, "hidden_size": 8},
}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"_name_or_path": "somebody/bert", "finetuning_task": "sst-2"}, id="where-it-came-from"),
        pytest.param({"transformers_version": "4.12.1"}, id="an-older-release"),
        pytest.param({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}, id="names-of-labels"),
        pytest.param({"torch_dtype": "float32"}, id="the-usual-type"),
        pytest.param({"initializer_range": 0.5}, id="how-weights-are-drawn"),
        pytest.param({"hidden_dropout_prob": 0.3}, id="what-training-drops"),
        pytest.param({"text_config": {"dropout": 0.2, "hidden_size": 8}}, id="within"),
    ],
)
def test_fine_tunes_share_a_detection(change):
    assert structural_part({**BASE, **change}) == structural_part(BASE)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hidden_size": 64}, id="a-width"),
        pytest.param({"architectures": ["BertForMaskedLM"]}, id="the-class"),
        pytest.param({"id2label": {"0": "a", "1": "b", "2": "c"}}, id="another-label"),
        pytest.param({"id2label": {"0": "bad", "one": "good"}}, id="a-label-under-no-number"),
        pytest.param({"id2label": {"0": "bad", "1": None}}, id="a-label-without-a-name"),
        pytest.param({"label2id": {"bad": "0", "good": "1"}}, id="labels-of-another-type"),
        pytest.param({"torch_dtype": "bfloat16"}, id="another-type"),
        pytest.param({"hidden_dropout_prob": 0.0}, id="nothing-is-dropped"),
        pytest.param({"hidden_dropout_prob": 1.5}, id="more-than-all-is-dropped"),
        pytest.param({"token_dropout": True}, id="a-switch-that-only-sounds-like-it"),
        pytest.param({"initializer_range": "0.02"}, id="a-text-for-a-number"),
        pytest.param({"_name_or_path": 7}, id="a-number-for-a-text"),
        pytest.param({"problem_type": "regression"}, id="what-a-config-class-checks"),
        pytest.param({"transformers_version": "99.0.0"}, id="a-release-to-come"),
        pytest.param({"text_config": {"dropout": 0.1, "hidden_size": 16}}, id="within"),
    ],
)
def test_what_could_change_an_answer_counts(change):
    assert structural_part({**BASE, **change}) != structural_part(BASE)


@pytest.mark.parametrize("name", ["bert-sequence-classification", "vit-model", "t5-conditional-generation"])
def test_configs_of_one_structure_are_detected_alike(name):
    config = tiny_models.config(name).to_dict()
    labels = config.get("id2label") or {}
    other = {
        **{key: 0.37 if "drop" in key and isinstance(v, float) and 0 < v < 1 else v for key, v in config.items()},
        "_name_or_path": "somebody/else",
        "initializer_range": 0.31,
        "initializer_factor": 0.5,
        "id2label": {key: f"label {key}" for key in labels},
        "label2id": {f"label {key}": int(key) for key in labels},
    }
    if "initializer_factor" not in config:
        del other["initializer_factor"]
    if "initializer_range" not in config:
        del other["initializer_range"]
    assert other != config
    assert structural_part(other) == structural_part(config)
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    specs = [UniversalOnnxConfig(kind.from_dict(value)).spec for value in (config, other)]
    assert specs[0] == specs[1]

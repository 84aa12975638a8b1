"""From a config to its task and class: the head decides, two rules of thumb, and what is refused."""

from __future__ import annotations

import re

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.task_detector import (
    TASK_SYNONYMS,
    TASKS,
    detect_task,
    known_tasks,
    newer_release,
    normalize_task,
    task_of_class,
)

# Auto mappings that TASKS names and the installed transformers lacks: other releases have them.
ONLY_IN_OTHER_RELEASES = {"FOR_VISION_2_SEQ"}


def config_of(model_type: str, *architectures: str, **settings: object) -> PreTrainedConfig:
    made = AutoConfig.for_model(model_type, **settings)
    made.architectures = list(architectures) or None
    return made


@pytest.mark.parametrize(
    ("model_type", "architecture", "task", "class_name"),
    [
        pytest.param("t5", "T5ForConditionalGeneration", "text2text-generation", None, id="t5"),
        pytest.param("t5", "T5Model", "text2text-generation", "T5ForConditionalGeneration", id="t5-backbone"),
        pytest.param("t5", "T5EncoderModel", "feature-extraction", None, id="t5-encoder"),
        pytest.param("prophetnet", "ProphetNetEncoder", "feature-extraction", None, id="a-part-that-nothing-lists"),
        pytest.param("bart", "BartModel", "text2text-generation", "BartForConditionalGeneration", id="bart-backbone"),
        pytest.param("bart", "BartForSequenceClassification", "text-classification", None, id="bart-head"),
        pytest.param("gpt2", "GPT2LMHeadModel", "text-generation", None, id="gpt2"),
        pytest.param("gpt2", "GPT2Model", "feature-extraction", None, id="gpt2-backbone"),
        pytest.param(
            "whisper", "WhisperForConditionalGeneration", "automatic-speech-recognition", None, id="whisper"
        ),
        pytest.param(
            "whisper", "WhisperModel", "automatic-speech-recognition", "WhisperForConditionalGeneration",
            id="whisper-backbone",
        ),
        pytest.param("distilbert", "DistilBertForSequenceClassification", "text-classification", None, id="sst2"),
        pytest.param("vit", "ViTForImageClassification", "image-classification", None, id="vit"),
        pytest.param("bert", "BertForPreTraining", "feature-extraction", "BertModel", id="pretraining"),
        pytest.param("bert", "BertForMaskedLM", "feature-extraction", "BertModel", id="masked-lm"),
        pytest.param("bert", "BertModel", "feature-extraction", "BertModel", id="backbone"),
        pytest.param("wav2vec2", "Wav2Vec2ForPreTraining", "feature-extraction", "Wav2Vec2Model", id="speech"),
        pytest.param("layoutlmv3", "LayoutLMv3ForQuestionAnswering", "document-question-answering", None, id="page"),
        pytest.param("clip", "CLIPModel", "zero-shot-image-classification", None, id="clip"),
        pytest.param("detr", "DetrForObjectDetection", "object-detection", None, id="detr"),
        pytest.param("sam", "SamModel", "mask-generation", None, id="sam"),
        pytest.param("time_series_transformer", "TimeSeriesTransformerForPrediction", "time-series-forecasting", None,
                     id="head-by-its-name"),
    ],
)  # fmt: skip
def test_the_architecture_decides(model_type, architecture, task, class_name):
    found = detect_task(config_of(model_type, architecture))
    assert (found.task, found.class_name) == (task, class_name or architecture)
    assert found.family == TASKS[found.task].family
    assert found.reason


@pytest.mark.parametrize(
    ("model_type", "task", "class_name"),
    [
        pytest.param("bert", "feature-extraction", "BertModel", id="encoder"),
        pytest.param("llama", "text-generation", "LlamaForCausalLM", id="decoder"),
        pytest.param("t5", "text2text-generation", "T5ForConditionalGeneration", id="encoder-decoder"),
        pytest.param("whisper", "automatic-speech-recognition", "WhisperForConditionalGeneration", id="speech"),
        pytest.param("clip", "zero-shot-image-classification", "CLIPModel", id="the-backbone-is-the-head"),
        pytest.param("vit", "feature-extraction", "ViTModel", id="images"),
        pytest.param("vitmatte", "image-matting", "VitMatteForImageMatting", id="only-one-head"),
    ],
)
def test_without_architectures_the_model_type_decides(model_type, task, class_name):
    found = detect_task(config_of(model_type))
    assert (found.task, found.class_name) == (task, class_name)


@pytest.mark.parametrize(
    ("architecture", "asked", "class_name"),
    [
        pytest.param("BertForMaskedLM", "fill-mask", "BertForMaskedLM", id="the-pretraining-head-itself"),
        pytest.param("BertForPreTraining", "fill-mask", "BertForMaskedLM", id="another-head"),
        pytest.param("BertForSequenceClassification", "feature-extraction", "BertModel", id="below-the-head"),
        pytest.param("BertForMaskedLM", "sentence-similarity", "BertModel", id="by-synonym"),
        pytest.param("BertForMaskedLM", "ner", "BertForTokenClassification", id="by-short-name"),
    ],
)
def test_a_task_that_is_asked_for_wins(architecture, asked, class_name):
    found = detect_task(config_of("bert", architecture), asked)
    assert (found.task, found.class_name) == (normalize_task(asked)[0], class_name)


# Every auto mapping of this release, by its name without MODEL_ and _MAPPING_NAMES; "" is that of the bare models.
MAPPINGS = {
    name.removeprefix("MODEL_").removesuffix("MAPPING_NAMES").rstrip("_"): vars(modeling_auto)[name]
    for name in sorted(vars(modeling_auto))
    if re.fullmatch(r"MODEL_(\w+_)?MAPPING_NAMES", name)
}

WITHOUT_A_TASK = {"FOR_PRETRAINING": "a pretraining head is deployed as what lies below it"}

HEADS = sorted(
    {
        (model_type, class_name, mapping)
        for mapping, classes in MAPPINGS.items()
        for model_type, entry in classes.items()
        for class_name in ([entry] if isinstance(entry, str) else entry)
    }
)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_auto_mapping_of_this_release_has_a_task_or_a_reason_to_have_none(mapping):
    named = [name for task in TASKS.values() for name in task.mappings]
    assert named.count(mapping) == (0 if mapping in WITHOUT_A_TASK else 1)


def test_a_mapping_without_a_task_is_one_of_this_release():
    assert WITHOUT_A_TASK.keys() <= MAPPINGS.keys()
    assert all(WITHOUT_A_TASK.values())


def test_there_is_a_task_for_every_head_class_of_this_release():
    """The walk covers more than a thousand classes in more than forty tasks, each in a family."""
    assert len(TASKS) > 40
    assert len(HEADS) > 1000
    tasks = {task_of_class(class_name).task for _, class_name, mapping in HEADS if mapping not in WITHOUT_A_TASK}
    assert len(tasks) > 40
    assert tasks <= TASKS.keys()
    assert {task.family for task in TASKS.values()} == {TASKS[task].family for task in tasks}


def test_every_class_can_be_asked_for_by_a_task_that_lists_it():
    by_mapping = {mapping: task for task, entry in TASKS.items() for mapping in entry.mappings}
    wrong = []
    for model_type, class_name, mapping in HEADS:
        if mapping in WITHOUT_A_TASK or not hasattr(transformers, class_name):
            continue
        task = by_mapping[mapping]
        config = PreTrainedConfig(architectures=[class_name])
        config.model_type = model_type
        found = detect_task(config, task)
        if (found.task, found.class_name, found.family) != (task, class_name, TASKS[task].family):
            wrong.append((model_type, class_name, mapping, found))
    assert wrong == []


def test_every_class_is_detected_from_its_architecture():
    """What a saved model names is what is found, but for pretraining heads and backbones of encoder-decoders."""
    lost = []
    for model_type, class_name, mapping in HEADS:
        if not hasattr(transformers, class_name):
            continue
        config = PreTrainedConfig(architectures=[class_name])
        config.model_type = model_type
        found = detect_task(config)
        assert found.family == TASKS[found.task].family
        if found.class_name != class_name and mapping not in {"FOR_PRETRAINING", "FOR_MASKED_LM"}:
            lost.append((model_type, class_name, mapping, found))
    assert lost == []


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_an_auto_mapping_of_this_release(task):
    for mapping in set(TASKS[task].mappings) - ONLY_IN_OTHER_RELEASES:
        name = f"MODEL_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES"
        assert getattr(modeling_auto, name), name


def test_mappings_of_other_releases_are_not_in_this_one():
    here = {name for name in ONLY_IN_OTHER_RELEASES if hasattr(modeling_auto, f"MODEL_{name}_MAPPING_NAMES")}
    assert not here, "now in this release: drop them from the set"


def test_synonyms_lead_to_tasks_and_hide_none():
    assert set(TASK_SYNONYMS.values()) <= set(TASKS)
    assert not set(TASK_SYNONYMS) & set(TASKS)
    assert known_tasks() == tuple(TASKS)


spellings = st.sampled_from([*TASKS, *TASK_SYNONYMS])


@given(spellings, st.booleans(), st.booleans(), st.sampled_from(["", " ", "\n"]))
def test_spelling_does_not_matter(name, upper, past, space):
    written = (name.upper() if upper else name.replace("-", "_")) + ("-with-past" if past else "") + space
    assert normalize_task(written) == (TASK_SYNONYMS.get(name, name), past)


@given(spellings)
def test_a_task_is_its_own_name(name):
    task, _ = normalize_task(name)
    assert normalize_task(task) == (task, False)


@given(st.text(max_size=30).filter(lambda name: name.strip().lower() not in {*TASKS, *TASK_SYNONYMS}))
def test_any_other_text_is_refused_with_the_list(name):
    with pytest.raises(InputError, match=r"The tasks are: .*feature-extraction"):
        normalize_task(name)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        pytest.param("text-clasification", "text-classification", id="typo"),
        pytest.param("fill_masks", "fill-mask", id="plural"),
        pytest.param("summarisation", "summarization", id="a-synonym"),
    ],
)
def test_an_unknown_task_suggests_the_nearest(asked, nearest):
    with pytest.raises(InputError, match=f"There is no task '{asked}'. The nearest name is '{nearest}'"):
        normalize_task(asked)


def test_a_task_without_a_class_lists_those_that_there_are():
    with pytest.raises(InputError, match=r"no class of model type 'vit' for it\. It has classes for: .*image-classifi"):
        detect_task(config_of("vit", "ViTModel"), "text-generation")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        pytest.param("99.0.0", r"written by transformers 99\.0\.0 and asks for .*Upgrade", id="newer"),
        pytest.param("4.30.0", "trust_remote_code; else check config.json", id="older"),
        pytest.param(None, "trust_remote_code", id="unknown"),
    ],
)
def test_an_architecture_that_transformers_lacks(version, words):
    config = config_of("bert", "BertForTimeTravel")
    config.transformers_version = version
    with pytest.raises(ModelError, match=words) as caught:
        detect_task(config)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert "BertForTimeTravel" in caught.value.message


@pytest.mark.parametrize(
    ("version", "expected"),
    [("99.0", "99.0"), (transformers.__version__, None), ("1.0", None), ("soon", None), (None, None), (7, None)],
)
def test_only_a_newer_release_is_newer(version, expected):
    assert newer_release({"transformers_version": version}) == expected


def test_the_first_architecture_that_exists_is_taken():
    found = detect_task(config_of("bert", "BertForTimeTravel", "BertForTokenClassification"))
    assert found.class_name == "BertForTokenClassification"

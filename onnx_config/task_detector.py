"""Which task a config is for, and which transformers class does it.

The head in ``config.architectures`` decides, by the auto mapping that lists it. Two rules of thumb
are added, since they are what people deploy: a pretraining head means the features below it, and an
encoder-decoder means generation, also where only its backbone was saved.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "TASKS",
    "TASK_SYNONYMS",
    "DetectedTask",
    "Task",
    "detect_task",
    "known_tasks",
    "named_task",
    "newer_release",
    "normalize_task",
    "task_of_auto_class",
    "task_of_class",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: its family and the auto mappings whose classes do it."""

    family: str
    """Tasks of one family share inputs, outputs and checks."""

    mappings: tuple[str, ...]
    """Names of transformers' auto mappings, without ``MODEL_`` and ``_MAPPING_NAMES``; the first is the default."""


def _task(family: str, *mappings: str) -> Task:
    return Task(family=family, mappings=mappings)


# Names as in `transformers.pipeline`; where it has none, as in optimum.
TASKS: Mapping[str, Task] = {
    "feature-extraction": _task("feature-extraction", "", "FOR_TEXT_ENCODING", "FOR_IMAGE", "FOR_RETRIEVAL"),
    "fill-mask": _task("fill-mask", "FOR_MASKED_LM"),
    "text-classification": _task("text-classification", "FOR_SEQUENCE_CLASSIFICATION"),
    "token-classification": _task("token-classification", "FOR_TOKEN_CLASSIFICATION"),
    "question-answering": _task("question-answering", "FOR_QUESTION_ANSWERING"),
    "multiple-choice": _task("multiple-choice", "FOR_MULTIPLE_CHOICE"),
    "next-sentence-prediction": _task("text-classification", "FOR_NEXT_SENTENCE_PREDICTION"),
    "table-question-answering": _task("question-answering", "FOR_TABLE_QUESTION_ANSWERING"),
    "document-question-answering": _task("question-answering", "FOR_DOCUMENT_QUESTION_ANSWERING"),
    "visual-question-answering": _task("question-answering", "FOR_VISUAL_QUESTION_ANSWERING"),
    "text-generation": _task("text-generation", "FOR_CAUSAL_LM"),
    "text2text-generation": _task("text2text-generation", "FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    "image-classification": _task("image-classification", "FOR_IMAGE_CLASSIFICATION"),
    "object-detection": _task("object-detection", "FOR_OBJECT_DETECTION"),
    "zero-shot-object-detection": _task("object-detection", "FOR_ZERO_SHOT_OBJECT_DETECTION"),
    "semantic-segmentation": _task("image-segmentation", "FOR_SEMANTIC_SEGMENTATION"),
    "image-segmentation": _task(
        "image-segmentation", "FOR_IMAGE_SEGMENTATION", "FOR_UNIVERSAL_SEGMENTATION", "FOR_INSTANCE_SEGMENTATION"
    ),
    "image-matting": _task("image-to-image", "FOR_IMAGE_MATTING"),
    "mask-generation": _task("mask-generation", "FOR_MASK_GENERATION"),
    "depth-estimation": _task("depth-estimation", "FOR_DEPTH_ESTIMATION"),
    "normal-estimation": _task("depth-estimation", "FOR_NORMAL_ESTIMATION"),
    "pointmap-estimation": _task("depth-estimation", "FOR_POINTMAP_ESTIMATION"),
    "keypoint-detection": _task("keypoint-detection", "FOR_KEYPOINT_DETECTION"),
    "pose-estimation": _task("keypoint-detection", "FOR_POSE_ESTIMATION"),
    "keypoint-matching": _task("keypoint-detection", "FOR_KEYPOINT_MATCHING"),
    "image-to-image": _task("image-to-image", "FOR_IMAGE_TO_IMAGE"),
    "masked-im": _task("masked-im", "FOR_MASKED_IMAGE_MODELING"),
    "image-generation": _task("text-generation", "FOR_CAUSAL_IMAGE_MODELING"),
    "video-classification": _task("video-classification", "FOR_VIDEO_CLASSIFICATION"),
    "backbone": _task("backbone", "FOR_BACKBONE"),
    "zero-shot-image-classification": _task("zero-shot-image-classification", "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION"),
    "image-text-to-text": _task("image-text-to-text", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_VISION_2_SEQ"),
    "any-to-any": _task("image-text-to-text", "FOR_MULTIMODAL_LM"),
    "text-recognition": _task("image-to-text", "FOR_TEXT_RECOGNITION"),
    "table-recognition": _task("image-to-text", "FOR_TABLE_RECOGNITION"),
    "automatic-speech-recognition": _task(
        "automatic-speech-recognition", "FOR_SPEECH_SEQ_2_SEQ", "FOR_CTC", "FOR_RNNT", "FOR_TDT"
    ),
    "audio-classification": _task("audio-classification", "FOR_AUDIO_CLASSIFICATION"),
    "audio-frame-classification": _task("audio-classification", "FOR_AUDIO_FRAME_CLASSIFICATION"),
    "audio-xvector": _task("audio-classification", "FOR_AUDIO_XVECTOR"),
    "text-to-audio": _task("text-to-audio", "FOR_TEXT_TO_WAVEFORM", "FOR_TEXT_TO_SPECTROGRAM"),
    "time-series-forecasting": _task("time-series", "FOR_TIME_SERIES_PREDICTION"),
    "time-series-classification": _task("time-series", "FOR_TIME_SERIES_CLASSIFICATION"),
    "time-series-regression": _task("time-series", "FOR_TIME_SERIES_REGRESSION"),
    "reinforcement-learning": _task("reinforcement-learning", "FOR_DECISION"),
}

TASK_SYNONYMS: Mapping[str, str] = {
    "default": "feature-extraction",
    "sentence-similarity": "feature-extraction",
    "image-feature-extraction": "feature-extraction",
    "features": "feature-extraction",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "sentiment-analysis": "text-classification",
    "zero-shot-classification": "text-classification",
    "text-ranking": "text-classification",
    "ner": "token-classification",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "conversational": "text-generation",
    "speech2seq-lm": "automatic-speech-recognition",
    "audio-ctc": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
    "asr": "automatic-speech-recognition",
    "vision2seq-lm": "image-text-to-text",
    "image-to-text": "image-text-to-text",
    "vqa": "visual-question-answering",
    "text-to-speech": "text-to-audio",
    "instance-segmentation": "image-segmentation",
    "universal-segmentation": "image-segmentation",
    "panoptic-segmentation": "image-segmentation",
    "image-mask-generation": "mask-generation",
    "time-series-prediction": "time-series-forecasting",
    "masked-image-modeling": "masked-im",
}

# A head made for pretraining: people deploy what lies below it.
_PRETRAINING_MAPPINGS = ("FOR_PRETRAINING", "FOR_MASKED_LM")

# Where a class stands in several mappings, the more telling one first.
_ORDER = (
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_CTC",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_DOCUMENT_QUESTION_ANSWERING",
    "FOR_IMAGE_CLASSIFICATION",
    "FOR_OBJECT_DETECTION",
    "FOR_SEMANTIC_SEGMENTATION",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "FOR_CAUSAL_LM",
    "FOR_MASKED_LM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedTask:
    """What a config is for."""

    task: str
    """A key of `TASKS`."""

    family: str
    """Its family."""

    class_name: str
    """The transformers class that does it, e.g. ``"BertForSequenceClassification"``."""

    reason: str
    """How it was found, for people."""


def known_tasks() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(TASKS)


def normalize_task(name: str) -> tuple[str, bool]:
    """Return the task that ``name`` means, and whether it asks for a cache (``-with-past``).

    >>> normalize_task("sequence-classification")
    ('text-classification', False)
    >>> normalize_task("text-generation-with-past")
    ('text-generation', True)

    Raises:
        InputError: If it is no task's name and no synonym.
    """
    plain = name.strip().lower().replace("_", "-")
    with_past = plain.endswith("-with-past")
    plain = plain.removesuffix("-with-past")
    plain = TASK_SYNONYMS.get(plain, plain)
    if plain not in TASKS:
        near = difflib.get_close_matches(plain, [*TASKS, *TASK_SYNONYMS], n=1)
        hint = f"The nearest name is {near[0]!r}. " if near else ""
        raise InputError(f"There is no task {name!r}. {hint}The tasks are: {', '.join(sorted(TASKS))}.")
    return plain, with_past


@cache
def _mapping(name: str) -> Mapping[str, tuple[str, ...]]:
    """Return model type -> class names of one auto mapping; empty where this release has no such mapping."""
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    found = getattr(module, f"MODEL_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES", {})
    return {k: (v,) if isinstance(v, str) else tuple(v) for k, v in found.items()}


@cache
def _tasks_by_mapping() -> Mapping[str, str]:
    return {mapping: task for task, entry in TASKS.items() for mapping in entry.mappings}


def _mappings_of(class_name: str) -> list[str]:
    """Return the mappings that list ``class_name``, the more telling first."""
    names = [*_tasks_by_mapping(), "FOR_PRETRAINING"]
    found = [name for name in names if any(class_name in classes for classes in _mapping(name).values())]
    return sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name == ""))


def detect_task(config: PreTrainedConfig, task: str | None = None) -> DetectedTask:
    """Return the task of ``config`` and the class that does it.

    Args:
        config: Any transformers config.
        task: The task asked for, by name or synonym; ``None``: what the config declares.

    Raises:
        InputError: If ``task`` is no task, or not one that this model type has a class for.
        ModelError: If neither the architectures nor the model type lead to a class.
    """
    model_type = str(getattr(config, "model_type", "") or "")
    architectures = tuple(a for a in (getattr(config, "architectures", None) or ()) if isinstance(a, str))
    if task is not None:
        wanted, _ = normalize_task(task)
        return _asked_for(config, wanted, model_type, architectures)
    for name in architectures:
        if (found := _declared(config, name, model_type)) is not None:
            return found
    return _default(config, model_type, architectures)


def task_of_auto_class(name: str) -> str | None:
    """Return the task of an auto class of transformers; ``None`` for one that it does not have, or of no task here.

    >>> task_of_auto_class("AutoModelForSequenceClassification"), task_of_auto_class("AutoModelForLuck")
    ('text-classification', None)
    """
    module = importlib.import_module("transformers.models.auto.modeling_auto")
    mapping = getattr(getattr(module, name, None), "_model_mapping", None)
    if mapping is None:
        return None
    found = next(key for key, value in vars(module).items() if value is mapping)
    plain = found.removeprefix("MODEL_").removesuffix("MAPPING").removesuffix("_")
    return "feature-extraction" if plain == "FOR_PRETRAINING" else _tasks_by_mapping().get(plain)


def named_task(task: str, class_name: str, reason: str) -> DetectedTask:
    """Return the class ``class_name`` for ``task``, found by ``reason``.

    Raises:
        KeyError: If ``task`` is no key of `TASKS`.
    """
    return DetectedTask(task=task, family=TASKS[task].family, class_name=class_name, reason=reason)


def _has_class(class_name: str) -> bool:
    import transformers

    return hasattr(transformers, class_name)


def _generation_class(model_type: str) -> tuple[str, str] | None:
    """Return (task, class) of generation for an encoder-decoder model type."""
    for mapping in ("FOR_SPEECH_SEQ_2_SEQ", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT"):
        for class_name in _mapping(mapping).get(model_type, ()):
            return _tasks_by_mapping()[mapping], class_name
    return None


def _ties_its_head(class_name: str) -> bool:
    """Return whether a generation class can take the weights of its head from the backbone's embedding."""
    import transformers

    keys = getattr(getattr(transformers, class_name, None), "_tied_weights_keys", None) or ()
    return any(key.partition(".")[0] not in ("encoder", "decoder", "model") for key in keys)


def _is_encoder_decoder(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _declared(config: PreTrainedConfig, name: str, model_type: str) -> DetectedTask | None:
    """Return the task that the architecture ``name`` stands for; ``None`` if transformers has no such class."""
    if not _has_class(name):
        return None
    mappings = _mappings_of(name)
    heads = [m for m in mappings if m in _tasks_by_mapping() and m not in ("", *_PRETRAINING_MAPPINGS)]
    if heads:
        return named_task(_tasks_by_mapping()[heads[0]], name, f"{name} is listed for {_tasks_by_mapping()[heads[0]]}")
    # Without its tied embedding the head of a saved backbone would be random. What no auto mapping lists is a part of
    # one, such as its encoder, whatever the config says of the whole.
    tied = bool(mappings) and _is_encoder_decoder(config) and getattr(config, "tie_word_embeddings", True)
    if tied and (generation := _generation_class(model_type)) is not None and _ties_its_head(generation[1]):
        return named_task(*generation, f"{name} is an encoder-decoder, which means generation")
    pretraining = any(m in _PRETRAINING_MAPPINGS for m in mappings) or "ForPreTraining" in name
    base = _base_class(model_type)
    if pretraining and base is not None:
        return named_task("feature-extraction", base, f"{name} is a pretraining head: the features below it")
    if guessed := _by_class_name(name):
        return named_task(guessed, name, f"{name} is in no auto mapping; its name says {guessed}")
    return named_task("feature-extraction", name, f"{name} is a bare backbone")


# Heads that no auto mapping lists tell their task by their name's ending.
_NAME_ENDINGS: Mapping[str, str] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "semantic-segmentation",
    "ForImageSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
    "ForVideoClassification": "video-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForImageTextRetrieval": "zero-shot-image-classification",
    "ForPrediction": "time-series-forecasting",
    "ForTimeSeriesClassification": "time-series-classification",
    "ForClassification": "time-series-classification",
    "ForRegression": "time-series-regression",
    "Backbone": "backbone",
}


def _by_class_name(name: str) -> str | None:
    return next((task for ending, task in _NAME_ENDINGS.items() if name.endswith(ending)), None)


def task_of_class(class_name: str, task: str | None = None) -> DetectedTask:
    """Return the task that a class of transformers does; the class stays, other than with a config's architectures.

    >>> task_of_class("BertForMaskedLM").task, task_of_class("BertModel").task
    ('fill-mask', 'feature-extraction')

    Args:
        class_name: The class; one that is not from transformers gives features unless its name ends like a head's.
        task: What it is to be called instead; ``None``: what the class is for.

    Raises:
        InputError: If ``task`` is no task.
    """
    if task is not None:
        return named_task(normalize_task(task)[0], class_name, f"{class_name} was given for the task asked for")
    heads = [m for m in _mappings_of(class_name) if m in _tasks_by_mapping() and m != ""]
    found = _tasks_by_mapping()[heads[0]] if heads else _by_class_name(class_name)
    return named_task(found or "feature-extraction", class_name, f"{class_name} was given")


def _base_class(model_type: str) -> str | None:
    return next(iter(_mapping("").get(model_type, ())), None)


def _classes_for(task: str, model_type: str) -> list[str]:
    return [c for mapping in TASKS[task].mappings for c in _mapping(mapping).get(model_type, ())]


def _asked_for(config: PreTrainedConfig, task: str, model_type: str, architectures: tuple[str, ...]) -> DetectedTask:
    classes = _classes_for(task, model_type)
    for name in architectures:
        declared = _declared(config, name, model_type)
        if name in classes or (declared is not None and declared.task == task):
            class_name = name if name in classes else declared.class_name if declared else name
            return named_task(task, class_name, f"{class_name} does the task asked for")
    if classes:
        return named_task(task, classes[0], f"{classes[0]} does the task asked for")
    known_type = model_type in _mapping("CONFIG") or any(_classes_for(t, model_type) for t in TASKS)
    possible = sorted(t for t in TASKS if _classes_for(t, model_type))
    raise InputError(
        f"The task {task!r} was asked for, but transformers has no class of model type {model_type!r} for it. "
        + (f"It has classes for: {', '.join(possible)}." if known_type and possible else ""),
        kind=ErrorKind.BAD_INPUT,
    )


def _default(config: PreTrainedConfig, model_type: str, architectures: tuple[str, ...]) -> DetectedTask:
    """Return the task of a config that names no class which transformers has."""
    if not architectures:
        if _is_encoder_decoder(config) and (generation := _generation_class(model_type)) is not None:
            return named_task(*generation, f"{model_type} is an encoder-decoder and names no architecture")
        for mapping in ("FOR_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_CTC"):
            classes = _mapping(mapping).get(model_type, ())
            if classes and not _mapping("FOR_MASKED_LM").get(model_type):
                return named_task(_tasks_by_mapping()[mapping], classes[0], f"the default head of {model_type}")
        base = _base_class(model_type)
        if base is not None and (found := _declared(config, base, model_type)) is not None:
            return replace(found, reason=f"{model_type} names no architecture: {found.reason}")
        for task in TASKS:
            if classes := tuple(_classes_for(task, model_type)):
                return named_task(task, classes[0], f"{model_type} names no architecture: its only head")
    raise ModelError(_no_class_message(config, model_type, architectures))


def _no_class_message(config: PreTrainedConfig, model_type: str, architectures: tuple[str, ...]) -> str:
    import transformers

    asked = f"architectures {list(architectures)}" if architectures else f"model type {model_type!r}"
    newer = newer_release(config)
    if newer:
        return (
            f"The config was written by transformers {newer} and asks for {asked}, which the installed "
            f"{transformers.__version__} does not have. Upgrade transformers."
        )
    return (
        f"The config asks for {asked}, which transformers {transformers.__version__} does not have. "
        "If the model brings its own code, allow it with trust_remote_code; else check config.json."
    )


def newer_release(config: PreTrainedConfig | Mapping[str, Any]) -> str | None:
    """Return the transformers release that wrote the config, where it is newer than the installed one."""
    import transformers
    from packaging.version import InvalidVersion, Version

    value = config.get("transformers_version") if isinstance(config, Mapping) else config.transformers_version
    if not isinstance(value, str):
        return None
    try:
        return value if Version(value) > Version(transformers.__version__) else None
    except InvalidVersion:
        return None

"""``config.json``: what a folder's says, and the config that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.sentence_modules import config_folder
from onnx_config.timm_models import as_wrapper_config, is_timm_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from onnx_config.remote_code import RemoteCode

__all__ = ["config_from_dict", "read_config_dict"]

_SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config_dict(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder; that of its transformer where sentence-transformers wrote the folder.

    Raises:
        InputError: If it is not there, no JSON, or no object.
    """
    path = config_folder(folder) / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{str(path)!r} does not exist, so {str(folder)!r} is no transformers model.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}. Restore the file from its source.") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} holds a {type(value).__name__}, not an object of settings.")
    return value


def config_from_dict(
    value: Mapping[str, Any], *, origin: str = "The config", code: RemoteCode | None = None
) -> PreTrainedConfig:
    """Return the config that the dict describes, by its ``model_type``, its architecture, or the model's own ``code``.

    ``{"__float__": "Infinity"}``, as transformers writes a number that JSON has no word for, is read as that number.

    Raises:
        InputError: If it names no model type, or its values are contradictory.
        ModelError: If the installed transformers has no such model type.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from onnx_config.task_detector import newer_release

    if code is not None and (own := code.config_of(_with_special_floats(dict(value)))) is not None:
        return own
    if is_timm_config(value):
        value = as_wrapper_config(value, origin=origin)
    model_type = value.get("model_type")
    own_class = _config_class_of_architecture(value)
    if own_class is None and (not isinstance(model_type, str) or not model_type):
        raise InputError(f"{origin} names no model_type, so transformers cannot tell what it configures.")
    if own_class is None and model_type not in CONFIG_MAPPING:
        newer = newer_release(value)
        advice = (
            f"It was written by transformers {newer}: upgrade transformers."
            if newer
            else "If the model brings its own code, it needs trust_remote_code."
            if "auto_map" in value
            else "Check config.json, or upgrade transformers."
        )
        raise ModelError(
            f"{origin} has the model_type {model_type!r}, which transformers {transformers.__version__} does not "
            f"know. {advice}",
            kind=ErrorKind.UNSUPPORTED,
        )
    config_class = own_class or CONFIG_MAPPING[str(model_type)]
    try:
        return config_class.from_dict(_with_special_floats(dict(value)))
    # A config class checks its values in its own way and raises what it likes.
    except Exception as error:
        raise InputError(
            f"{origin} is not valid for {model_type or config_class.__name__!r}: {type(error).__name__}: {error}"
        ) from error


def _config_class_of_architecture(value: Mapping[str, Any]) -> type[PreTrainedConfig] | None:
    """Return the config class of the class that a config is for, unless it says that it is of another type.

    A part of a model has a class and a config of its own, and a type that the auto mappings list for none, or for
    another model. Some configs, old ones among them, have no type.
    """
    import transformers

    named = value.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    found = getattr(getattr(transformers, name, None), "config_class", None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedConfig):
        return None
    return found if value.get("model_type") in (None, "", found.model_type) else None


def _with_special_floats(value: Any) -> Any:
    """Return JSON values with transformers' objects for infinities and NaN as the floats that they stand for."""
    if isinstance(value, Mapping):
        tag = value.get("__float__") if len(value) == 1 else None
        if isinstance(tag, str) and tag in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[tag]
        return {key: _with_special_floats(item) for key, item in value.items()}
    return [_with_special_floats(item) for item in value] if isinstance(value, list) else value

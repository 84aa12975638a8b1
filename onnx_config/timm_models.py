"""Models of timm: their own ``config.json`` as transformers' wrapper of timm understands it.

transformers runs any model of timm through ``TimmWrapperModel`` and ``TimmWrapperForImageClassification``, which take
``pixel_values`` and return ``last_hidden_state``, ``pooler_output`` or ``logits``. The library itself is an extra of
this package: a config is read without it, a class is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from onnx_config.errors import ErrorKind, InputError, ModelError

__all__ = ["EXTRA", "MODEL_TYPE", "as_wrapper_config", "is_timm_config", "require_timm"]

MODEL_TYPE = "timm_wrapper"
"""transformers' name for all models of timm."""

EXTRA = "timm"
"""The extra of this package that installs timm."""


def is_timm_config(value: Mapping[str, Any]) -> bool:
    """Return whether ``value`` is a ``config.json`` that timm wrote, or one of transformers' wrapper.

    >>> is_timm_config({"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {}})
    True
    >>> is_timm_config({"model_type": "bert", "architectures": ["BertModel"]})
    False
    """
    if "model_type" in value:
        return bool(value["model_type"] == MODEL_TYPE)
    return isinstance(value.get("architecture"), str) and ("pretrained_cfg" in value or "num_classes" in value)


def as_wrapper_config(value: Mapping[str, Any], *, origin: str = "The config") -> dict[str, Any]:
    """Return the config of transformers' wrapper for one that `is_timm_config` knows.

    The head decides the class: with classes it classifies images, without it gives features. The size of an image is
    written where it is looked for in any config.

    Raises:
        InputError: If the number of classes, the size of an image or the model's arguments are none.
    """
    made = dict(value)
    classes = value.get("num_classes")
    if classes is None:
        labels = value.get("label_names") or value.get("id2label") or ()
        classes = value.get("num_labels") or len(labels)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise InputError(f"{origin} has num_classes {classes!r}, where a whole number from 0 is needed.")
    if not isinstance(value.get("model_args") or {}, Mapping):
        raise InputError(f"{origin} has model_args {value['model_args']!r}, where an object is needed.")
    made["num_classes"] = classes
    made["model_type"] = MODEL_TYPE
    head = "TimmWrapperForImageClassification" if classes else "TimmWrapperModel"
    made["architectures"] = value.get("architectures") or [head]
    # Names of classes are looked up in timm where there are none; a config is read without it.
    made.setdefault("label_names", [f"LABEL_{i}" for i in range(classes)])
    # The wrapper sets the number of classes itself, and stops where timm wrote it among the arguments too.
    if value.get("model_args") is not None:
        made["model_args"] = {name: given for name, given in value["model_args"].items() if name != "num_classes"}
    # transformers takes the number of classes out of it.
    made["pretrained_cfg"] = pretrained = dict(value.get("pretrained_cfg") or {})
    size = pretrained.get("input_size")
    if size is not None:
        if not (isinstance(size, (list, tuple)) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
            raise InputError(f"{origin} has input_size {size!r}, where channels, height and width are needed.")
        made.setdefault("num_channels", size[0])
        made.setdefault("image_size", list(size[1:]))
    return made


def require_timm(what: str) -> None:
    """Refuse to go on without timm.

    Raises:
        ModelError: If timm, or a library that it needs, cannot be imported.
    """
    if (problem := _problem()) is not None:
        raise ModelError(
            f"{what} is a model of timm, which cannot be used here: {problem}. "
            f"Install it with: pip install 'onnx-ferry[{EXTRA}]'",
            kind=ErrorKind.UNSUPPORTED,
        )


@cache
def _problem() -> str | None:
    try:
        found = importlib.import_module("timm")
    # A torchvision that was built for another torch raises what it likes.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    # Any folder of that name on the way of imports can be imported, a folder of models say.
    return None if hasattr(found, "create_model") else "there is no library of that name"

"""What of a config detection can depend on: fine-tunes of one model share it, and with it the answer.

Left out is only what neither transformers' classes nor our own code read for a shape, a module or an input: where a
config came from, what its labels are called, how weights would be drawn, and how much is dropped in training. A value
that is not of the usual type stays, since a config class may refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from tasks.versions import package_versions

__all__ = ["structural_part"]

_ORIGINS = frozenset({"_commit_hash", "_name_or_path", "finetuning_task", "license", "name_or_path", "tokenizer_class"})
"""Texts about where a config came from and what goes with it."""

_DRAWN = re.compile(r"^(initializer_(range|factor|std)|init(_xavier)?_std)$")
"""How large random weights are drawn; the model's own are others anyway."""

_DROPPED = re.compile(r"drop")
"""What share is dropped in training. Whether it is none may decide on a module, so that nothing stays nothing."""

_SOME = "some"


def structural_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, as `config.json` holds it, without what detection cannot depend on.

    >>> structural_part({"model_type": "bert", "_name_or_path": "a/b", "id2label": {"0": "good"}, "dropout": 0.1})
    {'model_type': 'bert', 'id2label': {'0': ''}, 'dropout': 'some'}
    """
    found = _part(config)
    # The message about a model type that is not known yet names the release that knows it.
    if not _is_newer(found.get("transformers_version")):
        found.pop("transformers_version", None)
    return found


def _is_newer(release: Any) -> bool:
    """Return whether a release of transformers may be newer than the installed one."""
    try:
        return release is not None and Version(release) > Version(package_versions()["transformers"])
    except (InvalidVersion, KeyError, TypeError):
        return True


def _part(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _ORIGINS and isinstance(value, str):
            continue
        if name in ("dtype", "torch_dtype") and value in (None, "float32"):
            # What torch makes a model in where nothing is said.
            continue
        found[name] = _value(name, value)
    return found


def _value(name: str, value: Any) -> Any:
    match value:
        case dict() if name == "id2label" and all(isinstance(label, str) for label in value.values()):
            return dict.fromkeys(value, "")
        case dict() if name == "label2id" and all(type(number) is int for number in value.values()):
            return len(value)
        case dict():
            return _part(value)
        case float() if _DRAWN.search(name) and 0 < value < 10:
            return _SOME
        case float() if _DROPPED.search(name) and 0 < value < 1:
            return _SOME
        case _:
            return value

"""In which class of transformers a graph's outputs are returned."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

__all__ = ["output_class"]


@lru_cache(maxsize=64)
def output_class(class_name: str | None, names: Sequence[str]) -> type[Any]:
    """Return what ``forward`` of a class returns, where it has all ``names`` as fields; else a plain ``ModelOutput``.

    >>> output_class("BertForSequenceClassification", ("logits",)).__name__
    'SequenceClassifierOutput'
    >>> output_class("BertForSequenceClassification", ("logits", "sentence_embedding")).__name__
    'ModelOutput'
    """
    import transformers
    from transformers.utils.generic import ModelOutput

    cls = getattr(transformers, class_name, None) if class_name else None
    forward = getattr(cls, "forward", None)
    if forward is None:
        return ModelOutput
    try:
        returned = typing.get_type_hints(inspect.unwrap(forward)).get("return")
    except (NameError, TypeError, AttributeError):
        return ModelOutput
    for found in (returned, *typing.get_args(returned)):
        if isinstance(found, type) and issubclass(found, ModelOutput) and is_dataclass(found):
            known = {field.name for field in fields(found)}
            return found if known.issuperset(names) else ModelOutput
    return ModelOutput

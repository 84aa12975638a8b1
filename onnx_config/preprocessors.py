"""Which preprocessors transformers pairs with a model type, and the inputs that they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

__all__ = ["Preprocessor", "declared_preprocessors", "given_preprocessors"]

_MAPPINGS = (
    ("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING_NAMES"),
    ("transformers.models.auto.image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
    ("transformers.models.auto.feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES"),
    ("transformers.models.auto.video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
)
_PROCESSORS = ("transformers.models.auto.processing_auto", "PROCESSOR_MAPPING_NAMES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """A tokenizer, image processor or feature extractor."""

    class_name: str
    """Its class."""

    input_names: tuple[str, ...]
    """What it makes, its main output first (``model_input_names``)."""


@lru_cache(maxsize=1024)
def declared_preprocessors(model_type: str) -> tuple[str | None, tuple[Preprocessor, ...]]:
    """Return the class that users load for ``model_type`` (``None`` if none is declared), and its parts.

    A part whose class cannot be imported, since a library is missing, is left out.
    """
    parts: list[Preprocessor] = []
    for module, mapping in _MAPPINGS:
        for name in _class_names(_read(module, mapping).get(model_type)):
            if (found := _describe(_import_class(name), name)) is not None:
                parts.append(found)
                break
    processors = _class_names(_read(*_PROCESSORS).get(model_type))
    main = processors[0] if processors else parts[0].class_name if parts else None
    return main, tuple(parts)


def given_preprocessors(preprocessors: Iterable[Any]) -> tuple[Preprocessor, ...]:
    """Describe preprocessor objects that a caller holds, the parts of a processor each on its own."""
    parts: list[Preprocessor] = []
    for one in preprocessors:
        inner = [getattr(one, name, None) for name in getattr(one, "attributes", ())]
        for part in [p for p in inner if p is not None] or [one]:
            if (found := _describe(part, type(part).__name__)) is not None:
                parts.append(found)
    return tuple(parts)


def _read(module: str, mapping: str) -> dict[str, Any]:
    import importlib

    try:
        return dict(getattr(importlib.import_module(module), mapping))
    except (ImportError, AttributeError):
        return {}


def _class_names(entry: Any) -> list[str]:
    """Return the class names in an entry of a mapping, the pure-Python ones first."""
    if entry is None:
        return []
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, dict):
        names = [str(v) for v in entry.values() if v]
        return sorted(names, key=lambda n: not n.endswith("Pil"))
    return [str(v) for v in entry if v]


def _import_class(name: str) -> Any:
    import transformers

    try:
        return getattr(transformers, name, None)
    except (ImportError, RuntimeError):
        return None


def _describe(part: Any, name: str) -> Preprocessor | None:
    try:
        names = getattr(part, "model_input_names", None)
    except ImportError:
        # transformers' stand-in for a class whose library is missing raises at any attribute.
        return None
    if not isinstance(names, (list, tuple)) or not names:
        return None
    return Preprocessor(class_name=name, input_names=tuple(str(n) for n in names))

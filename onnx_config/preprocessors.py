"""Which preprocessors transformers pairs with a model type, and the inputs that they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = [
    "TOKENIZER_FILE",
    "Habits",
    "Preprocessor",
    "declared_preprocessors",
    "given_preprocessors",
    "habits_of",
    "image_size_in",
    "tokenizer_in",
]

_MAPPINGS = (
    ("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING_NAMES"),
    ("transformers.models.auto.image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
    ("transformers.models.auto.feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES"),
    ("transformers.models.auto.video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
)
_NO_LIMIT = 10**6
"""A tokenizer without a limit says so with a number beyond all texts."""

_FRAMES_PER_SECOND = 100
"""Of features of sound, where the extractor names no hop: 10 ms each, as is the custom."""

TOKENIZER_FILE = "tokenizer_config.json"
"""Settings of a tokenizer, in the folder of its model."""

_ANY = "PreTrainedTokenizerBase"

_PROCESSORS = ("transformers.models.auto.processing_auto", "PROCESSOR_MAPPING_NAMES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """A tokenizer, image processor or feature extractor."""

    class_name: str
    """Its class."""

    input_names: tuple[str, ...]
    """What it makes, its main output first (``model_input_names``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """The sizes of what a preprocessor makes, and how it pads."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """``height`` and ``width`` of images in pixels, ``samples`` and ``frames`` of a sound; one that the settings
    leave open is not in it."""

    longest_text: int | None = None
    """Tokens at which a tokenizer cuts a text; ``None``: no limit."""

    pad_token_id: int | None = None
    """Token that fills short texts; ``None``: the model's own."""

    padding_side: str | None = None
    """``"left"`` or ``"right"``; ``None``: there is no tokenizer."""


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


def tokenizer_in(folder: Path) -> Preprocessor | None:
    """Return what the tokenizer in a model's folder makes, by its settings or its class; ``None``: there is none.

    A file that cannot be read says nothing. Nobody's code runs: of a class that transformers does not have, it is what
    all tokenizers make.
    """
    try:
        value = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict):
        return None
    name = str(value.get("tokenizer_class"))
    own = SimpleNamespace(model_input_names=value.get("model_input_names"))
    return _describe(own, name) or _describe(_import_class(name), name) or _describe(_import_class(_ANY), name)


def given_preprocessors(preprocessors: Iterable[Any]) -> tuple[Preprocessor, ...]:
    """Describe preprocessor objects that a caller holds, the parts of a processor each on its own."""
    parts: list[Preprocessor] = []
    for one in preprocessors:
        for part in _parts_of(one):
            if (found := _describe(part, type(part).__name__)) is not None:
                parts.append(found)
    return tuple(parts)


def habits_of(preprocessor: Any) -> Habits:
    """Return what a tokenizer, image processor, feature extractor or processor makes by its settings."""
    sizes: dict[str, int] = {}
    longest = pad = side = None
    for part in _parts_of(preprocessor):
        sizes |= _image_sizes(part) | _sound_sizes(part)
        limit = getattr(part, "model_max_length", None)
        longest = limit if isinstance(limit, int) and 0 < limit < _NO_LIMIT else longest
        if getattr(part, "padding_side", None) in ("left", "right") and hasattr(part, "pad_token_id"):
            pad, side = part.pad_token_id, part.padding_side
    return Habits(sizes=sizes, longest_text=longest, pad_token_id=pad, padding_side=side)


def _parts_of(preprocessor: Any) -> list[Any]:
    inner = [getattr(preprocessor, name, None) for name in _attribute_names(preprocessor)]
    return [part for part in inner if part is not None] or [preprocessor]


def _attribute_names(preprocessor: Any) -> list[str]:
    if callable(listed := getattr(preprocessor, "get_attributes", None)):
        return [str(name) for name in listed()]
    names = getattr(preprocessor, "attributes", ())
    return [name for name in names if isinstance(name, str)] if isinstance(names, (list, tuple)) else []


def _image_sizes(part: Any) -> dict[str, int]:
    """Return height and width: what was cropped to, else padded to, else resized to."""
    given = (
        ("crop_size", getattr(part, "do_center_crop", None)),
        ("pad_size", getattr(part, "do_pad", None)),
        ("size", getattr(part, "do_resize", None)),
    )
    for name, done in given:
        found = _height_and_width(getattr(part, name, None)) if done else None
        if found is not None:
            return {"height": found[0], "width": found[1]}
    return {}


def image_size_in(folder: Path) -> tuple[int, int] | None:
    """Return (height, width) in pixels that the image processor of a model folder makes, where it says so.

    A file that cannot be read says nothing.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for part in (value, value.get("image_processor")) if isinstance(value, dict) else ():
            if isinstance(part, dict) and (found := _image_sizes(SimpleNamespace(**part))):
                return found["height"], found["width"]
    return None


def _height_and_width(size: Any) -> tuple[int, int] | None:
    """Return (height, width); an image of which one edge is said is taken as square."""
    if isinstance(size, int):
        return size, size

    def read(name: str) -> int | None:
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        return value if isinstance(value, int) else None

    height, width = read("height"), read("width")
    if height and width:
        return height, width
    edge = read("shortest_edge") or read("longest_edge")
    return (edge, edge) if edge else None


def _sound_sizes(part: Any) -> dict[str, int]:
    """Return samples and frames of one chunk; of a second, where the extractor cuts nothing."""
    rate = getattr(part, "sampling_rate", None)
    if not isinstance(rate, int) or rate <= 0:
        return {}
    seconds = getattr(part, "chunk_length", None) or getattr(part, "chunk_length_s", None) or 1
    hop = getattr(part, "hop_length", None) or rate // _FRAMES_PER_SECOND
    frames = getattr(part, "nb_max_frames", None) or seconds * rate // hop
    return {"samples": int(seconds * rate), "frames": int(frames)}


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

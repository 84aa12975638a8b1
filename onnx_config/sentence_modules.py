"""What a folder of sentence-transformers says of itself: a transformer, and what is done with its tokens.

Read with plain code, since the files are few and simple: the library itself is not needed to convert or to run a
model. ``modules.json`` lists the modules in their order; each has a folder with its own ``config.json``, and the
transformer may be the model's folder itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, InputError, ModelError

__all__ = [
    "MODULES_FILE",
    "POOLING_MODES",
    "SentenceModules",
    "Stage",
    "StageKind",
    "config_folder",
    "module_files",
    "module_folders",
    "pooling_modes",
    "read_sentence_modules",
    "transformer_settings",
]

MODULES_FILE = "modules.json"
"""Lists the modules; a folder that has it is one of sentence-transformers."""

POOLING_MODES: Mapping[str, str] = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""How tokens become one vector -> the switch in files written before release 5. Several modes give their vectors one
after the other, in this order where the switches chose them, else in the order in which they are named."""

_TRANSFORMER = "Transformer"
_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors")
# Older releases named the file after the model.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of the transformer that change what it computes, by release.
_PASSED_ON = ("config_args", "config_kwargs", "model_args", "model_kwargs")


class StageKind(StrEnum):
    """What can follow the transformer, by the name of its class in sentence-transformers."""

    POOLING = "Pooling"
    NORMALIZE = "Normalize"
    DENSE = "Dense"
    LAYER_NORM = "LayerNorm"
    DROPOUT = "Dropout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One module after the transformer."""

    kind: StageKind
    """What it does."""

    path: str
    """Its folder, relative to the model's; it need not exist where the module has nothing to say."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its ``config.json``; empty where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceModules:
    """A transformer and the modules after it."""

    transformer: str
    """Folder of the transformer, relative to the model's; ``""``: the model's folder itself."""

    stages: tuple[Stage, ...]
    """What follows, in this order."""

    notes: tuple[str, ...] = ()
    """What the library does when asked to and the graph does not, a phrase each."""

    def __str__(self) -> str:
        words = [
            f"{s.kind.value} ({', '.join(pooling_modes(s))})" if s.kind == "Pooling" else s.kind for s in self.stages
        ]
        return ", ".join([_TRANSFORMER, *words])


def pooling_modes(stage: Stage) -> tuple[str, ...]:
    """Return how a pooling stage makes one vector of a text's tokens.

    Raises:
        ModelError: If it names a way that is unknown here.
    """
    value = stage.settings.get("pooling_mode")
    if value is None:
        found = tuple(mode for mode, switch in POOLING_MODES.items() if stage.settings.get(switch))
        return found or ("mean",)
    modes = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else (str(value),)
    if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
        raise ModelError(
            f"The module {stage.path!r} pools by {unknown[0]!r}, which is unknown here; the known ways are "
            f"{', '.join(POOLING_MODES)}.",
            kind=ErrorKind.UNSUPPORTED,
        )
    return modes


def read_sentence_modules(folder: Path) -> SentenceModules | None:
    """Return the modules of a folder of sentence-transformers.

    ``None`` where it is no such folder, or one whose only module is the transformer: then it is a model of transformers
    like any other.

    Raises:
        InputError: If ``modules.json``, or a module's own file, cannot be read or names a folder outside.
        ModelError: If there is a module that is unknown here, or that comes with the model's own code.
    """
    entries = _entries(folder)
    if not entries:
        return None
    (first, transformer), *rest = entries
    if not rest and first == _TRANSFORMER:
        return None
    if first != _TRANSFORMER:
        raise _unsupported(folder, first, f"the first module is to be a {_TRANSFORMER}")
    kinds = {kind.value: kind for kind in StageKind}
    stages = []
    for name, path in rest:
        if name not in kinds:
            raise _unsupported(folder, name, f"after the {_TRANSFORMER}, {', '.join(kinds)} are known")
        stages.append(Stage(kind=kinds[name], path=path, settings=_read_object(folder / path / "config.json")))
    notes = [*_check_transformer(folder, transformer)]
    for stage in stages:
        if stage.kind is StageKind.POOLING:
            pooling_modes(stage)
            if stage.settings.get("include_prompt", True) is False:
                notes.append(
                    "a prompt is pooled like the rest of the text: sentence-transformers would leave its tokens out"
                )
    return SentenceModules(transformer=transformer, stages=tuple(stages), notes=tuple(notes))


def config_folder(folder: Path) -> Path:
    """Return where a model's ``config.json`` is: in its folder, or in that of its transformer.

    Raises:
        InputError: If there is a ``modules.json`` that cannot be read or names a folder outside.
    """
    if not (folder / "config.json").is_file():
        for name, path in _entries(folder):
            if name == _TRANSFORMER and (folder / path / "config.json").is_file():
                return folder / path
    return folder


def transformer_settings(folder: Path) -> tuple[str, ...]:
    """Return the paths, relative to the folder, at which the transformer's own settings may be.

    Raises:
        InputError: If there is a ``modules.json`` that cannot be read or names a folder outside.
    """
    inner = next((path for name, path in _entries(folder) if name == _TRANSFORMER), None)
    return () if inner is None else tuple(f"{inner}/{name}" if inner else name for name in _SETTINGS)


def module_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders of the modules, whether they exist or not; empty for any other model.

    Raises:
        InputError: If there is a ``modules.json`` that cannot be read or names a folder outside.
    """
    return tuple(dict.fromkeys(path for _, path in _entries(folder) if path))


def module_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the modules that have folders of their own, by name."""
    for name in module_folders(folder):
        if (folder / name).is_dir():
            found = {path for pattern in _FILES for path in (folder / name).glob(pattern) if path.is_file()}
            yield from sorted(found)


def _entries(folder: Path) -> list[tuple[str, str]]:
    """Return the modules in their order: name of the class, and folder."""
    path = folder / MODULES_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        listed = sorted(value, key=lambda entry: int(entry["idx"]))
        found = [(str(entry["type"]), str(entry["path"])) for entry in listed]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is no list of modules ({type(error).__name__}: {error}). Restore it from its source."
        ) from error
    for _, inner in found:
        if inner not in ("", ".") and (Path(inner).name != inner or inner == ".."):
            raise InputError(f"{str(path)!r} names a folder outside its own: {inner!r}. This is not accepted.")
    named = []
    for kind, inner in found:
        package, _, name = kind.rpartition(".")
        # A class from elsewhere may do anything under a known name.
        ours = package.split(".", maxsplit=1)[0] == "sentence_transformers"
        named.append((name if ours else kind, "" if inner == "." else inner))
    return named


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}. Restore the file from its source.") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} holds a {type(value).__name__}, not an object of settings.")
    return value


def _check_transformer(folder: Path, transformer: str) -> Iterator[str]:
    """Refuse what is not a plain run of the transformer over a text; yield what is left out."""
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        settings = settings or _read_object(folder / transformer / name)
    task = settings.get("transformer_task", "feature-extraction")
    text = (settings.get("modality_config") or {"text": {}}).get("text")
    plain = text is not None and (
        text.get("method", "forward") == "forward"
        and text.get("method_output_name", "last_hidden_state") in ("last_hidden_state", ["last_hidden_state"])
    )
    if task != "feature-extraction" or not plain:
        raise ModelError(
            f"The model in {str(folder)!r} does not take the last hidden states of a text from its {_TRANSFORMER} "
            f"(transformer_task {task!r}, modalities {list(settings.get('modality_config') or ['text'])}). "
            "Only such models are converted with their modules.",
            kind=ErrorKind.UNSUPPORTED,
        )
    if passed := [name for name in _PASSED_ON if settings.get(name)]:
        yield f"{', '.join(passed)} of the {_TRANSFORMER} are not applied: config.json alone counts"


def _unsupported(folder: Path, name: str, known: str) -> ModelError:
    own = "." in name
    what = (
        f"brings its own code for a module ({name}). The code of modules never runs"
        if own
        else f"has a module {name!r}, which is unknown here: {known}"
    )
    return ModelError(f"The model in {str(folder)!r} {what}.", kind=ErrorKind.UNSUPPORTED)

"""Code that comes with a model, where its user allows it to run: the classes that ``auto_map`` of config.json names.

It runs in the children that detect, trace and compare, which reach no network; of the files that they may read and
write nothing keeps it. Only what lies beside config.json is taken: code of another repository is code at no commit that
anybody agreed to. What ran is told by one SHA-256 over all of it, which goes into the spec and whatever is made of it.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.task_detector import DetectedTask, named_task, normalize_task, task_of_auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["RemoteCode", "code_sha256", "names_code"]

_REFERENCE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
_PACKAGE = "transformers_modules"
_CONFIG = "AutoConfig"
_BASE = "AutoModel"
_PRETRAINING = ("AutoModelForPreTraining", "AutoModelForMaskedLM")


def names_code(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json asks for code of the model's own, be it the class of its config or of a model."""
    return bool(_model_references(config))


def code_sha256(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the Python files of a model's folder.

    Raises:
        OSError: If one cannot be read.
    """
    digest = hashlib.sha256()
    for path in _code_files(folder):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _code_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*.py")) if path.is_file())


def _model_references(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return auto class -> reference, for configs and models; tokenizers and processors are nobody's here."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return {}
    return {name: ref for name, ref in auto_map.items() if name == _CONFIG or str(name).startswith(_BASE)}


class RemoteCode:
    """The code of one model's folder, allowed to run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Read which classes ``config``, the content of config.json, asks for; nothing runs yet.

        Raises:
            InputError: If they are not named as transformers does, or not in this folder (``bad_input``).
        """
        self.folder = folder
        """Where config.json and the code are."""
        self._references = _model_references(config)
        for name, reference in self._references.items():
            if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
                elsewhere = isinstance(reference, str) and "--" in reference
                raise InputError(
                    f"config.json names {reference!r} as its {name}, "
                    + (
                        "which is code of another repository, at no commit that was agreed to. Copy its files beside "
                        "config.json, and name the class without the repository."
                        if elsewhere
                        else "which is no module and class of this folder, as in modeling_mine.MyModel."
                    )
                )

    @cached_property
    def sha256(self) -> str:
        """What ran, as `code_sha256` tells it."""
        return code_sha256(self.folder)

    def config_of(self, value: Mapping[str, Any]) -> PreTrainedConfig | None:
        """Return the config that the code's own class makes of ``value``; ``None``: it has none.

        Raises:
            InputError: If the class refuses the values.
            ModelError: If the code cannot be imported (``unsupported``).
        """
        if _CONFIG not in self._references:
            return None
        cls: Any = self._class(_CONFIG)
        try:
            made: PreTrainedConfig = cls.from_dict(dict(value))
        # A config class checks its values in its own way and raises what it likes.
        except Exception as error:
            raise InputError(f"{cls.__name__} refuses config.json: {type(error).__name__}: {error}") from error
        return made

    @property
    def has_models(self) -> bool:
        """Whether a model's class is among the code, and not a config's alone."""
        return any(name != _CONFIG for name in self._references)

    def detect(self, architectures: tuple[str, ...], task: str | None) -> DetectedTask:
        """Return the task and the class of the code that does it.

        Args:
            architectures: The classes that the config names.
            task: The task asked for, by name or synonym; ``None``: that of the architectures.

        Raises:
            InputError: If ``task`` is no task, or there is no class for it.
        """
        tasks = {name: task_of_auto_class(name) for name in self._references if name != _CONFIG}
        if task is not None:
            wanted = normalize_task(task)[0]
            for name, found in tasks.items():
                if found == wanted:
                    return self._named(name, wanted, "does the task asked for")
            possible = ", ".join(sorted({found for found in tasks.values() if found is not None}))
            raise InputError(
                f"The task {wanted!r} was asked for, and the model's own code has no class for it. It has classes for: "
                f"{possible}."
            )
        for architecture in architectures:
            for name, found in tasks.items():
                if self._references[name].partition(".")[2] == architecture and found is not None:
                    # As of any model: of a head made for pretraining, people deploy what lies below it.
                    if name in _PRETRAINING and _BASE in tasks:
                        return self._named(_BASE, "feature-extraction", f"lies below {architecture}")
                    return self._named(name, found, f"is the model's own {name}")
        first = _BASE if _BASE in tasks else next((name for name, found in tasks.items() if found is not None), None)
        if first is None:
            raise InputError(f"The model's own code has classes for {', '.join(tasks)}, which stand for no task here.")
        return self._named(first, tasks[first] or "feature-extraction", f"is the model's own {first}")

    def _named(self, name: str, task: str, why: str) -> DetectedTask:
        class_name = self._references[name].partition(".")[2]
        return named_task(task, class_name, f"{class_name} {why}, by auto_map")

    def model_class(self, class_name: str) -> type[PreTrainedModel]:
        """Return the class of a model by its name.

        Raises:
            ModelError: If the code cannot be imported (``unsupported``).
        """
        names = [name for name, ref in self._references.items() if ref.partition(".")[2] == class_name]
        found: type[PreTrainedModel] = self._class(names[0])
        return found

    def _class(self, name: str) -> Any:
        from transformers import dynamic_module_utils

        try:
            # A copy of its own, since two models may bring different code under one name.
            with patch.object(dynamic_module_utils, "HF_MODULES_CACHE", _modules_folder()):
                return dynamic_module_utils.get_class_from_dynamic_module(
                    self._references[name], str(self.folder), local_files_only=True
                )
        # What is imported is anybody's code.
        except Exception as error:
            said = " ".join(str(error).split())
            raise ModelError(
                f"The model's own code, {self._references[name]}, cannot be imported: {type(error).__name__}: {said}. "
                "Install what it asks for, or use the release of transformers that it was written for.",
                kind=ErrorKind.UNSUPPORTED,
            ) from error


@cache
def _modules_folder() -> str:
    """Return where this process keeps copies of such code; they stay to its end, since a trace reads their source.

    Python knows one package of them. Where somebody has imported it here already, copies go beside theirs.
    """
    loaded = sys.modules.get(_PACKAGE)
    for place in getattr(loaded, "__path__", ()):
        return str(Path(place).parent)
    folder = tempfile.mkdtemp(prefix="onnx-ferry-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Ahead of the folder of a process that this one has its paths from.
    sys.path.insert(0, folder)
    return folder

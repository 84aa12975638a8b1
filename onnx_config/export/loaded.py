"""The model of a checkpoint, as a spec that was made of it wants it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_config.errors import InputError
from onnx_config.remote_code import code_sha256
from onnx_config.spec import ModelSpec

__all__ = ["loaded_model"]


def loaded_model(request: Mapping[str, Any], spec: ModelSpec, *, check_values: bool = True) -> tuple[Any, Any]:
    """Return (config object, model) for a spec that detection made of the model in ``folder``.

    Raises:
        InputError: If the weights are not there, not whole, or not finite and ``check_values`` is true; or if the
            model's own code is not the one that detection ran.
        ModelError: If the class cannot be loaded.
    """
    from onnx_config.export.checkpoint import load_model
    from onnx_config.part_models import part_model
    from onnx_config.universal_config import UniversalOnnxConfig

    folder = Path(request["folder"])
    if spec.code_sha256 is not None and code_sha256(folder) != spec.code_sha256:
        raise InputError(
            f"The Python files in {str(folder)!r} have changed since the model was looked at. Convert it again."
        )
    universal = UniversalOnnxConfig.from_folder(
        folder, trust=spec.code_sha256 is not None, task=spec.task, use_past=spec.continues
    )
    if universal.source is not None:
        return universal, universal.source.load(folder)
    model = load_model(universal.model_class, universal.config, folder, check_values=check_values)
    return universal, part_model(model, spec)

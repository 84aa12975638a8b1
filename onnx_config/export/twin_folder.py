"""A twin as a model's folder: what a conversion of the small model of the same structure starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, ModelError

__all__ = ["write_twin"]

Json = dict[str, Any]


def write_twin(request: Json) -> Json:
    """Write the twin of the model in ``folder`` to the new folder ``output``: ``config.json`` and seeded weights.

    Its config names the architectures of the model's, so that detection for the same ``task`` takes the same way. What
    sentence-transformers does after the transformer is left out. Returns the twin's ``parameters`` and ``notes``.

    Raises:
        InputError: If the config cannot be read or the task is not possible.
        ModelError: If there is no twin that can be built.
    """
    import torch

    from onnx_config.config_file import read_config_dict
    from onnx_config.remote_code import names_code
    from onnx_config.twin import shrink
    from onnx_config.universal_config import UniversalOnnxConfig

    folder, output = Path(request["folder"]), Path(request["output"])
    if request.get("trust_remote_code") and names_code(read_config_dict(folder)):
        raise ModelError(
            "A model with code of its own is not rehearsed. Convert it to see whether it works.",
            kind=ErrorKind.UNSUPPORTED,
        )
    found = UniversalOnnxConfig.from_folder(folder, task=request["task"])
    config, cls = found.config, found.model_class
    twin = shrink(config, cls)
    torch.manual_seed(0)
    try:
        cls(twin.config).save_pretrained(output)
    # What the class raises on a small config is its own choice.
    except Exception as error:
        raise ModelError(
            f"The twin of {cls.__name__} cannot be made with real weights: {type(error).__name__}: {error}. "
            "Convert the model itself to see whether it works.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    path = output / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    # Saving names the class saved, which for a pretraining head is not the one that the model names.
    written["architectures"] = config.architectures
    path.write_text(json.dumps(written), encoding="utf-8")
    return {"parameters": twin.parameters, "notes": list(twin.notes)}

"""onnx-ferry's library: what a model's graph looks like, and how it is made and checked.

Importing it is quick; torch and transformers are loaded when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_config.errors import FerryError as FerryError
    from onnx_config.runtime.auto import AutoModelForONNX as AutoModelForONNX
    from onnx_config.spec import ModelSpec as ModelSpec
    from onnx_config.spec import TensorSpec as TensorSpec
    from onnx_config.universal_config import UniversalOnnxConfig as UniversalOnnxConfig

__all__ = ["AutoModelForONNX", "FerryError", "ModelSpec", "TensorSpec", "UniversalOnnxConfig"]

_HOMES = {
    "AutoModelForONNX": "onnx_config.runtime.auto",
    "FerryError": "onnx_config.errors",
    "ModelSpec": "onnx_config.spec",
    "TensorSpec": "onnx_config.spec",
    "UniversalOnnxConfig": "onnx_config.universal_config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

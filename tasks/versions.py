"""The versions that a conversion depends on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["CODE_EPOCH", "package_versions"]

CODE_EPOCH = 1
"""Raised when this code makes other graphs of the same model: earlier results are not reused then."""

_PACKAGES = (
    "onnx-ferry",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxsim",
)


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def package_versions() -> dict[str, str]:
    """Return the versions installed, by package name; imports none of them."""
    return dict(_installed())

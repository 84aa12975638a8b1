"""The versions that a conversion depends on."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import onnx_config

__all__ = ["CODE_EPOCH", "detection_versions", "package_versions"]

CODE_EPOCH = 14
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
    "timm",
)

# Packages that transformers' classes use where they are there, or cannot be built without.
_SEEN_BY_CLASSES = (
    "accelerate",
    "causal-conv1d",
    "detectron2",
    "einops",
    "flash-attn",
    "flash-linear-attention",
    "kernels",
    "mamba-ssm",
    "natten",
    "scipy",
    "sentencepiece",
    "timm",
    "tokenizers",
    "torchaudio",
    "torchvision",
    "xlstm",
)


@cache
def _installed(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for name in names:
        try:
            found.append((name, _version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def _version(name: str) -> str:
    # `importlib.metadata.version` reads the whole description as an e-mail, which takes milliseconds for each.
    written = re.search(r"^Version: (.+)$", distribution(name).read_text("METADATA") or "", re.MULTILINE)
    return written[1].strip() if written else version(name)


def package_versions() -> dict[str, str]:
    """Return the versions installed, by package name; imports none of them."""
    return dict(_installed(_PACKAGES))


def detection_versions() -> dict[str, str]:
    """Return the versions that a detection depends on, by package name; imports none of them.

    Beside torch and transformers these are the packages without which some classes cannot be built, so that a failure
    ends when the missing one is installed, and the text of our own code: its rules change more often than its version.
    """
    found = dict(_installed(("onnx-ferry", "torch", "transformers", *_SEEN_BY_CLASSES)))
    return {**found, "onnx_config": _code_sha256()}


@cache
def _code_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(onnx_config.__path__[0]).rglob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()

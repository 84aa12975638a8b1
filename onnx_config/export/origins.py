"""Loads a model without its weights, and knows which tensor of the checkpoint each parameter is.

While `weightless` lasts, the safetensors library hands out tensors of zeros in the place of those of floating-point
numbers. They take address space and no memory as long as nobody writes to them. transformers does with them what it
does with any checkpoint (renames, ties, merges, fills in), and where a parameter ends up at the address of such a
tensor, it is that tensor; where it does not, it was computed of some. Whole numbers are read, since they are part of
the structure: positions, indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from onnx_config.export.safetensors_file import FLOATS, StoredTensor, read_header

__all__ = ["Origin", "Origins", "weightless"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A tensor of a checkpoint."""

    file: Path
    key: str


class Origins:
    """Which tensor of the checkpoint a tensor is."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Origin, torch.Tensor]] = {}

    def stand_in(self, origin: Origin, shape: tuple[int, ...]) -> torch.Tensor:
        """Return zeros (float32) in the place of a tensor of the checkpoint."""
        # numpy asks the system for zeros, which come as pages that are not there until they are written to.
        tensor = torch.from_numpy(np.zeros(shape, dtype=np.float32))
        self._known[tensor.data_ptr()] = origin, tensor
        return tensor

    def of(self, tensor: torch.Tensor) -> Origin | None:
        """Return what a tensor is, unchanged and whole; ``None``: nothing of the checkpoint, or computed of it."""
        origin, known = self._known.get(tensor.data_ptr(), (None, None))
        if known is None or tensor.shape != known.shape or tensor.stride() != known.stride():
            return None
        return origin if tensor.numel() and tensor.dtype is known.dtype else None


class _Slice:
    """What `safetensors.safe_open(…).get_slice` returns, for a tensor that is taken whole."""

    def __init__(self, file: _File, key: str, stored: StoredTensor) -> None:
        self._file, self._key, self._stored = file, key, stored

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        return self._stored.dtype

    def __getitem__(self, part: Any) -> torch.Tensor:
        whole = self._file.get_tensor(self._key)
        return whole if part is Ellipsis else whole[part]


class _File:
    """What `safetensors.safe_open` returns."""

    def __init__(self, origins: Origins, real: Any, path: Path, **options: Any) -> None:
        self._origins, self._real, self._path, self._options = origins, real, path, options
        self._stored = read_header(path)
        self._made: dict[str, torch.Tensor] = {}

    def keys(self) -> list[str]:
        return list(self._stored)

    def metadata(self) -> dict[str, str]:
        with self._real(self._path, **self._options) as file:
            return dict(file.metadata() or {})

    def get_slice(self, key: str) -> _Slice:
        return _Slice(self, key, self._stored[key])

    def get_tensor(self, key: str) -> torch.Tensor:
        stored = self._stored[key]
        if stored.dtype not in FLOATS:
            with self._real(self._path, **self._options) as file:
                tensor: torch.Tensor = file.get_tensor(key)
                return tensor
        if key not in self._made:
            self._made[key] = self._origins.stand_in(Origin(file=self._path, key=key), stored.shape)
        return self._made[key]

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def weightless() -> Iterator[Origins]:
    """Let checkpoints be loaded without their weights until the exit.

    Tensors of floating-point numbers come out as zeros of type float32, whatever type they are stored as.
    """
    import safetensors.torch
    import transformers.modeling_utils

    origins = Origins()
    real = safetensors.safe_open

    def open_file(filename: Any, framework: str = "pt", **options: Any) -> _File:
        return _File(origins, real, Path(filename), framework=framework, **options)

    def load_file(filename: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
        file = open_file(filename)
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict

    with (
        patch.object(transformers.modeling_utils, "safe_open", open_file),
        patch.object(safetensors.torch, "load_file", load_file),
    ):
        yield origins

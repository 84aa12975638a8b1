"""Where in a safetensors file each tensor lies, read from its header; the tensors themselves are not touched."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx_config.errors import InputError

__all__ = ["FLOATS", "StoredTensor", "read_header"]

FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
"""Element types, in the format's own names, whose values are no part of a model's structure."""

# What the safetensors library reads at most.
_LARGEST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file."""

    dtype: str
    """The format's own name: ``F32``, ``BF16``, ``I64``, …"""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file by name, once it is as long as they need.

    Raises:
        InputError: If the file is truncated, or no safetensors file.
    """
    size = path.stat().st_size
    broken = f"{str(path)!r} is no whole safetensors file: "
    advice = " Fetch the file again."
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise InputError(f"{broken}it has {size} bytes.{advice}")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise InputError(f"{broken}its header of {length:,} bytes does not fit into {size:,}.{advice}")
        if length > _LARGEST_HEADER_BYTES:
            raise InputError(f"{broken}its header of {length:,} bytes is longer than the format allows.{advice}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(entry, 8 + length) for name, entry in header.items()}
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise InputError(f"{broken}its header cannot be read ({type(error).__name__}).{advice}") from error
    wanted = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size != wanted:
        raise InputError(f"{broken}it has {size:,} bytes where its header asks for {wanted:,}.{advice}")
    return tensors


def _stored(entry: Mapping[str, object], start: int) -> StoredTensor:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets are lists")
    begin, end = (int(place) for place in offsets)
    return StoredTensor(
        dtype=str(entry["dtype"]), shape=tuple(int(s) for s in shape), offset=start + begin, nbytes=end - begin
    )

"""The float32 tensors of an ``.onnx`` file where they lie: as pages of it, or of the file that it points to.

Whoever parses the message has each weight in memory twice before the first is read. Here those fields that hold numbers
are passed over by their length; what remains of a tensor is parsed as usual.

The wire format: https://protobuf.dev/programming-guides/encoding; the fields: ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from onnx_config.errors import ErrorKind, ModelError

__all__ = ["stored_floats"]

Array = npt.NDArray[Any]

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_FLOAT = np.dtype("<f4")
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def stored_floats(path: Path) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Yield name, shape and numbers, in one row, of each float32 initializer of a file's graph.

    Those of its subgraphs are left out. The numbers are read when they are looked at, and cannot be changed.

    Raises:
        OSError: If the file, or one that it points to, cannot be read.
        ModelError: If it is no ONNX graph (``runtime_failed``).
    """
    try:
        pages = np.memmap(path, np.uint8, mode="r")
        for place in _initializers(pages.data):
            tensor, raw = _tensor(pages.data, place)
            if tensor.data_type == onnx.TensorProto.FLOAT:
                numbers = _outside(tensor, path.parent) if raw is None else pages[raw.begin : raw.end].view(_FLOAT)
                yield tensor.name, tuple(tensor.dims), numbers
    except (ValueError, IndexError) as error:
        raise ModelError(f"{str(path)!r} is no ONNX graph: {error}", kind=ErrorKind.RUNTIME_FAILED) from error


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message; positions are bytes from the start of the file."""

    number: int
    start: int
    """Of its tag."""
    begin: int
    """Of its value."""
    end: int


def _initializers(data: memoryview) -> Iterator[_Field]:
    for field in _fields(data, 0, len(data)):
        if field.number == _GRAPH:
            yield from (inner for inner in _fields(data, field.begin, field.end) if inner.number == _INITIALIZER)


def _tensor(data: memoryview, place: _Field) -> tuple[onnx.TensorProto, _Field | None]:
    """Return a tensor without its raw numbers, and where these are; ``None``: it has them elsewhere."""
    head, raw = bytearray(), None
    for field in _fields(data, place.begin, place.end):
        if field.number == _RAW_DATA:
            raw = field
        else:
            head += data[field.start : field.end]
    try:
        return onnx.TensorProto.FromString(bytes(head)), raw
    # protobuf raises its own.
    except Exception as error:
        raise ValueError(f"the tensor at byte {place.begin:,} cannot be read: {error}") from error


def _outside(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Return numbers that are no raw bytes of the graph; those beside it as pages of their file.

    The onnx library refuses a file that has further links to it, as one that the checkpoint shares has.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).reshape(-1)
    info = ExternalDataInfo(tensor)
    size = int(np.prod(tensor.dims, dtype=np.int64))
    if not size:
        return np.empty(0, _FLOAT)
    return np.memmap(folder / info.location, _FLOAT, mode="r", offset=info.offset or 0, shape=(size,))


def _fields(data: memoryview, at: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message that lies between two positions."""
    while at < end:
        start = at
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            begin, (_, at) = at, _varint(data, at)
        elif kind == _LENGTH_DELIMITED:
            length, begin = _varint(data, at)
            at = begin + length
        elif kind in _FIXED_BYTES:
            begin, at = at, at + _FIXED_BYTES[kind]
        else:
            raise ValueError(f"there is a field of the wire type {kind} at byte {start:,}")
        if at > end:
            raise ValueError(f"the field at byte {start:,} ends beyond what it is in")
        yield _Field(tag >> 3, start, begin, at)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at a position, and the position behind it."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at

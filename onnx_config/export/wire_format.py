"""An ``.onnx`` file as bytes: a protobuf message, whose parts each carry their number and their length.

Weights lie in it as they are, at offsets that can be found without reading them; and since all lengths are known before
the first byte is written, a file can be written without the message ever being in memory. The numbers of the parts are
those of `onnx.proto <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>`_, the rest is the `encoding
<https://protobuf.dev/programming-guides/encoding/>`_ of all such messages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import onnx

__all__ = ["GRAPH", "INITIALIZER", "LENGTH_DELIMITED", "RAW_DATA", "begun", "fields", "point", "tag"]

GRAPH = 7
INITIALIZER = 5
RAW_DATA = 9
"""Numbers of a model's graph, of a graph's weights, and of a weight's values."""

LENGTH_DELIMITED = 2
"""Kind of a part that says its length."""


def begun(model: onnx.ModelProto, weights: Sequence[tuple[onnx.TensorProto, int]]) -> tuple[bytes, list[bytes]]:
    """Return what a file begins with, and what comes in it before the values of each weight.

    Args:
        model: The model without these weights; its graph is taken out of it.
        weights: Each without its values, with their size in bytes.
    """
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = []
    for header, nbytes in weights:
        head = header.SerializeToString() + tag(RAW_DATA, nbytes)
        heads.append(tag(INITIALIZER, len(head) + nbytes) + head)
    length = len(graph) + sum(len(head) + nbytes for head, (_, nbytes) in zip(heads, weights, strict=True))
    return model.SerializeToString() + tag(GRAPH, length) + graph, heads


def fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield where each part starts, its number and kind, and where its content begins and ends.

    Raises:
        ValueError: If the bytes between ``begin`` and ``end`` are no parts of a message.
    """
    at = begin
    while at < end:
        start = at
        key, at = _read_varint(data, at)
        kind = key & 7
        match kind:
            case 0:
                first = at
                _, at = _read_varint(data, at)
            case 1:
                first, at = at, at + 8
            case 2:
                length, first = _read_varint(data, at)
                at = first + length
            case 5:
                first, at = at, at + 4
            case _:
                raise ValueError(f"a field of the unknown kind {kind} at byte {start}")
        if at > end:
            raise ValueError(f"the field at byte {start} goes beyond the end")
        yield start, key >> 3, kind, first, at


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def tag(field: int, length: int) -> bytes:
    """Return how a part of so many bytes begins."""
    return _varint(field << 3 | LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def point(tensor: onnx.TensorProto, location: str, offset: int, nbytes: int) -> None:
    """Let a tensor's values be those at a place in a file beside the graph."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": location, "offset": offset, "length": nbytes}
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())

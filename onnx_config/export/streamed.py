"""Graphs whose weights stay on the disk: read without them, and written with others, one block at a time.

An ``.onnx`` file is a protobuf message; weights inside of it lie there as they are, at an offset that can be found
without reading them. A graph read here therefore names its own file as that of its weights, as if they lay beside it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import onnx

from onnx_config.export.graph_file import EMBED_LIMIT_BYTES
from onnx_config.export.wire_format import GRAPH, INITIALIZER, LENGTH_DELIMITED, RAW_DATA, begun, fields, point, tag

__all__ = ["StreamedTensor", "read_without_weights", "stamp", "write_streamed"]

_SMALLEST_BYTES = 1024
_PAGE_BYTES = 4096
_BLOCK_BYTES = 16 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedTensor:
    """A weight that is made while it is written."""

    name: str

    data_type: int
    """Number of the element type in ONNX."""

    shape: tuple[int, ...]

    nbytes: int
    """Of all blocks together."""

    blocks: Callable[[], Iterable[bytes]]
    """Returns the values as they lie in a file."""

    def header(self) -> onnx.TensorProto:
        """Return the tensor without its values."""
        return onnx.TensorProto(name=self.name, dims=self.shape, data_type=self.data_type)


def read_without_weights(path: Path) -> onnx.ModelProto:
    """Return the graph of a file; its larger weights are named as data beside it, in ``path`` itself.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no protobuf message.
    """
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kept = bytearray()
        weights: list[onnx.TensorProto] = []
        for start, field, kind, begin, end in fields(data, 0, len(data)):
            if field != GRAPH or kind != LENGTH_DELIMITED:
                kept += data[start:end]
                continue
            graph = bytearray()
            for inner, name, how, first, last in fields(data, begin, end):
                if name != INITIALIZER or how != LENGTH_DELIMITED or last - first < _SMALLEST_BYTES:
                    graph += data[inner:last]
                else:
                    weights.append(_pointer(data, first, last, path.name))
            kept += tag(GRAPH, len(graph)) + graph
        model: onnx.ModelProto = onnx.ModelProto.FromString(bytes(kept))
        model.graph.initializer.extend(weights)
        return model


def _pointer(data: mmap.mmap, begin: int, end: int, location: str) -> onnx.TensorProto:
    """Return a weight whose values, where they are many, are where they are in the file."""
    head = bytearray()
    place: tuple[int, int] | None = None
    for start, field, kind, first, last in fields(data, begin, end):
        if field == RAW_DATA and kind == LENGTH_DELIMITED and last - first >= _SMALLEST_BYTES:
            place = first, last - first
        else:
            head += data[start:last]
    tensor: onnx.TensorProto = onnx.TensorProto.FromString(bytes(head))
    if place is not None:
        point(tensor, location, *place)
    return tensor


def write_streamed(
    model: onnx.ModelProto,
    tensors: Iterable[StreamedTensor],
    output: Path,
    *,
    embed_limit_bytes: int = EMBED_LIMIT_BYTES,
) -> tuple[Path, ...]:
    """Write a graph with further weights, inside or in ``<output>_data``; return the files written.

    Args:
        model: The graph with its small weights; taken apart.
        tensors: The others.
        output: The ``.onnx`` file.
        embed_limit_bytes: Weights of so many bytes at most go inside.
    """
    weights = tuple(tensors)
    if sum(weight.nbytes for weight in weights) + model.ByteSize() > embed_limit_bytes:
        data = output.with_name(f"{output.name}_data")
        with data.open("wb") as file:
            for weight in weights:
                file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
                header = weight.header()
                point(header, data.name, file.tell(), weight.nbytes)
                model.graph.initializer.append(header)
                _write_blocks(file, weight)
        output.write_bytes(model.SerializeToString())
        return (output, data)
    before, heads = begun(model, [(weight.header(), weight.nbytes) for weight in weights])
    with output.open("wb") as file:
        file.write(before)
        for head, weight in zip(heads, weights, strict=True):
            file.write(head)
            _write_blocks(file, weight)
    return (output,)


def _write_blocks(file: IO[bytes], weight: StreamedTensor) -> None:
    before = file.tell()
    for block in weight.blocks():
        file.write(block)
    if (written := file.tell() - before) != weight.nbytes:
        raise ValueError(f"{weight.name} has {written} bytes where {weight.nbytes} were announced")


def stamp(path: Path, metadata: Mapping[str, str]) -> None:
    """Write further entries into a file's birth certificate; its weights are copied block by block.

    A failure leaves the file as it was.
    """
    model = read_without_weights(path)
    weights = []
    for tensor in list(model.graph.initializer):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == path.name:
            model.graph.initializer.remove(tensor)
            weights.append(_copied(tensor, path, int(place["offset"]), int(place["length"])))
    before = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**before, **metadata})
    aside = path.with_name(f".{path.name}.stamped")
    write_streamed(model, weights, aside, embed_limit_bytes=EMBED_LIMIT_BYTES * 2)
    aside.replace(path)


def _copied(tensor: onnx.TensorProto, path: Path, offset: int, nbytes: int) -> StreamedTensor:
    def blocks() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(offset)
            for first in range(0, nbytes, _BLOCK_BYTES):
                yield file.read(min(_BLOCK_BYTES, nbytes - first))

    return StreamedTensor(
        name=tensor.name, data_type=tensor.data_type, shape=tuple(tensor.dims), nbytes=nbytes, blocks=blocks
    )

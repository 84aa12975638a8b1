"""A template graph with the weights of a checkpoint: written tensor by tensor, at the speed of the disk.

An ``.onnx`` file is a protobuf message, whose parts each carry their length. All lengths are known before the first
byte is written, so the weights go from the checkpoint into the file without the message ever being in memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx

from onnx_config.errors import InputError
from onnx_config.export.checkpoint import not_finite_text, weight_files
from onnx_config.export.graph_file import EMBED_LIMIT_BYTES
from onnx_config.export.safetensors_file import StoredTensor, read_header
from onnx_config.export.template import TemplateGraph, Weight
from onnx_config.export.wire_format import begun, point

__all__ = ["bind"]

# Runtimes map weights beside a graph into memory by pages.
_PAGE_BYTES = 4096
_BLOCK_BYTES = 64 * 1024**2
_TYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}
_FLOAT = np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A weight and where its values come from."""

    weight: Weight
    nbytes: int
    write: Callable[[IO[bytes]], None]
    array: Callable[[], np.ndarray[Any, Any]]
    """Returns the values as stored, or computed."""
    stored: tuple[Path, StoredTensor] | None = None
    """Where the very values lie in a file; ``None`` where they are computed."""

    def finite(self) -> bool:
        """Return whether no value is NaN, nor infinite where a parameter is."""
        array = self.array().reshape(-1)
        step = _BLOCK_BYTES // max(1, array.itemsize)
        for first in range(0, array.size, step):
            part = _as_float(array[first : first + step])
            # Extremes are NaN where a value is.
            extremes = np.array([part.min(), part.max()])
            if np.isnan(extremes).any() or (np.isinf(extremes).any() and not self.weight.buffer):
                return False
        return True


def bind(
    graph: TemplateGraph,
    source: Path,
    output: Path,
    *,
    metadata: Mapping[str, str],
    loaded: Callable[[], Mapping[str, Any]],
    link: bool = False,
    embed_limit_bytes: int = EMBED_LIMIT_BYTES,
) -> tuple[Path, ...]:
    """Write ``graph`` with the weights of the model in ``source``; return the files written.

    Args:
        graph: The template graph.
        source: The model's folder.
        output: The ``.onnx`` file; larger weights go to ``<output>_data`` beside it.
        metadata: The birth certificate.
        loaded: Returns the loaded module's tensors by name, for weights that are no tensor of the checkpoint.
        link: Whether the graph points into the checkpoint's own files, hard-linked beside it, where they hold the
            weights as float32; a file system that knows no such links gets copies.
        embed_limit_bytes: Weights of so many bytes at most go inside.

    Raises:
        InputError: If the checkpoint lacks a tensor, or one has another shape or is not finite.
    """
    tensors = list(_tensors(graph.weights, source, loaded))
    if wrong := [tensor.weight.key for tensor in tensors if not tensor.finite()]:
        raise InputError(not_finite_text(source, wrong))
    linked: list[Path] = []
    model = onnx.load(str(graph.path))
    named = {weight.name for weight in graph.weights}
    kept = [value for value in model.graph.input if value.name not in named]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    # As `onnx_config.export.graph_file.forget_shapes` does.
    del model.graph.value_info[:]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    if link:
        linked, tensors = _link(model, tensors, source, output.parent)
    inside = sum(tensor.nbytes for tensor in tensors) + model.ByteSize() <= embed_limit_bytes
    if inside:
        with output.open("wb", buffering=0) as file:
            _write_message(file, model, tensors)
        return (output, *linked)
    data = output.with_name(f"{output.name}_data")
    with data.open("wb", buffering=0) as file:
        for tensor in tensors:
            _write(file, b"\0" * (-file.tell() % _PAGE_BYTES))
            proto = _header(tensor.weight.name, tensor.weight.bound_shape)
            point(proto, data.name, file.tell(), tensor.nbytes)
            model.graph.initializer.append(proto)
            tensor.write(file)
    output.write_bytes(model.SerializeToString())
    return (output, data, *linked)


def _tensors(weights: Sequence[Weight], source: Path, loaded: Callable[[], Mapping[str, Any]]) -> Iterator[_Tensor]:
    stored: dict[str, dict[str, tuple[Path, StoredTensor]]] = {}
    module: Mapping[str, Any] | None = None
    for weight in weights:
        if weight.folder is None:
            module = loaded() if module is None else module
            yield _of_module(weight, module[weight.key].detach().numpy())
            continue
        if weight.folder not in stored:
            stored[weight.folder] = _stored_in(source / weight.folder)
        path, tensor = stored[weight.folder].get(weight.key, (None, None))
        if path is None or tensor is None or tensor.dtype not in _TYPES or tensor.shape != weight.shape:
            what = "is not there" if tensor is None else f"is {tensor.dtype} of the shape {list(tensor.shape)}"
            raise InputError(
                f"The checkpoint in {str(source)!r} does not fit its config.json: {weight.key} {what}, where the "
                f"model has floating-point numbers of the shape {list(weight.shape)}."
            )
        yield _of_file(weight, path, tensor)


def _stored_in(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    return {key: (path, tensor) for path in weight_files(folder) for key, tensor in read_header(path).items()}


def _of_module(weight: Weight, array: np.ndarray[Any, Any]) -> _Tensor:
    if array.shape != weight.shape:
        raise InputError(
            f"{weight.key} has the shape {list(array.shape)} where its config.json asks for {list(weight.shape)}."
        )
    whole = array if weight.permutation is None else array.transpose(weight.permutation)
    return _Tensor(
        weight=weight,
        nbytes=whole.size * _FLOAT.itemsize,
        write=lambda file: _write_array(file, whole),
        array=lambda: array,
    )


def _of_file(weight: Weight, path: Path, stored: StoredTensor) -> _Tensor:
    nbytes = stored.size * _FLOAT.itemsize

    def array() -> np.ndarray[Any, Any]:
        dtype = _TYPES[stored.dtype]
        if not stored.size:
            return np.empty(stored.shape, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=stored.offset, shape=stored.shape)

    def write(file: IO[bytes]) -> None:
        if stored.dtype == "F32" and weight.permutation is None:
            _copy(path, stored, file)
        else:
            _write_array(file, array() if weight.permutation is None else array().transpose(weight.permutation))

    return _Tensor(weight=weight, nbytes=nbytes, write=write, array=array, stored=(path, stored))


def _copy(path: Path, stored: StoredTensor, file: IO[bytes]) -> None:
    """Copy a tensor as it is, in the kernel where the file systems allow it; ``file`` has no buffer."""
    left, offset = stored.nbytes, stored.offset
    with path.open("rb", buffering=0) as source:
        with suppress(OSError):
            while left and (done := os.copy_file_range(source.fileno(), file.fileno(), left, offset)):
                left, offset = left - done, offset + done
        source.seek(offset)
        while left:
            block = source.read(min(left, _BLOCK_BYTES))
            if not block:
                raise InputError(f"{str(path)!r} became shorter while it was read. Fetch the file again.")
            _write(file, block)
            left -= len(block)


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _write_array(file: IO[bytes], array: np.ndarray[Any, Any]) -> None:
    """Write an array as float32 in the order of its axes, block by block."""
    if array.ndim == 0 or not array.size:
        _write(file, _as_float(array).tobytes())
        return
    rows = max(1, _BLOCK_BYTES // max(1, array[0].size * _FLOAT.itemsize))
    for first in range(0, len(array), rows):
        _write(file, np.ascontiguousarray(_as_float(array[first : first + rows])).data)


def _as_float(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype == _TYPES["BF16"]:
        # The upper half of a float32 is a bfloat16.
        return (array.astype("<u4") << 16).view(_FLOAT)
    return array.astype(_FLOAT, copy=False)


def _header(name: str, shape: Sequence[int]) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)


def _link(
    model: onnx.ModelProto, tensors: Sequence[_Tensor], source: Path, folder: Path
) -> tuple[list[Path], list[_Tensor]]:
    """Let the graph point to those tensors that the checkpoint holds as they are; return its files, and the others."""
    files: dict[Path, Path] = {}
    left, transposes = [], []
    for tensor in tensors:
        if tensor.stored is None or tensor.stored[1].dtype != "F32" or not tensor.nbytes:
            left.append(tensor)
            continue
        path, stored = tensor.stored
        if path not in files:
            files[path] = folder / path.relative_to(source)
            files[path].parent.mkdir(parents=True, exist_ok=True)
            files[path].unlink(missing_ok=True)
            try:
                # A repository's file in the cache of the Hub is a link to where it is.
                os.link(path.resolve(), files[path])
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                shutil.copyfile(path, files[path])
        weight = tensor.weight
        name = weight.name if weight.permutation is None else f"{weight.name}.stored"
        proto = _header(name, weight.shape)
        point(proto, files[path].relative_to(folder).as_posix(), stored.offset, stored.nbytes)
        model.graph.initializer.append(proto)
        if weight.permutation is not None:
            # Runtimes do this once, when they load the graph.
            transposes.append(onnx.helper.make_node("Transpose", [name], [weight.name], perm=weight.permutation))
    nodes = [*transposes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return list(files.values()), left


def _write_message(file: IO[bytes], model: onnx.ModelProto, tensors: Sequence[_Tensor]) -> None:
    before, heads = begun(model, [(_header(t.weight.name, t.weight.bound_shape), t.nbytes) for t in tensors])
    _write(file, before)
    for head, tensor in zip(heads, tensors, strict=True):
        _write(file, head)
        tensor.write(file)

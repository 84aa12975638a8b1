"""The float32 tensors of an ``.onnx`` file where they lie: as pages of it, or of the file that it points to.

Whoever parses the whole message has each weight in memory twice before the first is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export.streamed import read_without_weights

__all__ = ["stored_floats"]

Array = npt.NDArray[Any]

_FLOAT = np.dtype("<f4")


def stored_floats(path: Path) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Yield name, shape and numbers, in one row, of each float32 initializer of a file's graph.

    Those of its subgraphs are left out. The numbers are read when they are looked at, and cannot be changed.

    Raises:
        OSError: If the file, or one that it points to, cannot be read.
        ModelError: If it is no ONNX graph, or one that it points to is too short (``runtime_failed``).
    """
    try:
        for tensor in read_without_weights(path).graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                yield tensor.name, tuple(tensor.dims), _numbers(tensor, path.parent)
    except OSError:
        raise
    # protobuf raises its own.
    except Exception as error:
        raise ModelError(f"{str(path)!r} is no ONNX graph: {error}", kind=ErrorKind.RUNTIME_FAILED) from error


def _numbers(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Return a tensor's numbers; those in a file as its pages.

    The onnx library refuses a file that has further links to it, as one that the checkpoint shares has.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).reshape(-1)
    info, size = ExternalDataInfo(tensor), math.prod(tensor.dims)
    if not size:
        return np.empty(0, _FLOAT)
    return np.memmap(folder / info.location, _FLOAT, mode="r", offset=info.offset or 0, shape=(size,))

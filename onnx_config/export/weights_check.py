"""Whether a graph holds the numbers of its model, also those that no comparison of outputs happens to reach.

An embedding has a row for each token and a comparison reads a few hundred of them; of a hundred experts, it asks some.
Where a tensor of the graph is, number by number, a parameter of the model but for a few, those few are wrong. One that
is no parameter as it stands (transposed, scaled, folded into another) says nothing here: what is computed with it does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from onnx_config.export.stored_floats import stored_floats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["weight_difference"]

Array = npt.NDArray[Any]

_FEWEST_NUMBERS = 64
_PROBED = 4096
_PIECE = 2**22
_MOSTLY = 0.5


def weight_difference(path: Path, model: PreTrainedModel) -> str | None:
    """Return which tensor of the graph is a parameter of the model but for some numbers; ``None``: none is.

    Args:
        path: The graph; only read.
        model: Its model, in float32 or in the float64 that float32 became.

    Raises:
        OSError: If the graph or its weights cannot be read.
        ModelError: If it is no ONNX graph (``runtime_failed``).
    """
    of_shape: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() >= _FEWEST_NUMBERS:
            of_shape[tuple(tensor.shape)].append((name, tensor.detach()))
    for name, shape, held in stored_floats(path):
        alike = of_shape.get(shape)
        if alike and (difference := _difference(name, held, alike)):
            return difference
    return None


def _difference(name: str, held: Array, alike: list[tuple[str, torch.Tensor]]) -> str | None:
    step = max(1, held.size // _PROBED)
    found: str | None = None
    for parameter, tensor in alike:
        want = tensor.reshape(-1).cpu().numpy()
        # A look at some numbers spares one at all of those parameters that only have the same shape.
        if (held[::step] == want[::step]).mean() < _MOSTLY:
            continue
        wrong = sum(int((one != other).sum()) for one, other in _pieces(held, want))
        if not wrong:
            return None
        if wrong < _MOSTLY * held.size:
            found = f"{name} is the model's {parameter} but for {wrong} of {held.size} numbers"
    return found


def _pieces(held: Array, want: Array) -> Iterator[tuple[Array, Array]]:
    """Yield both piece by piece, since what is compared with float64 becomes that."""
    for at in range(0, held.size, _PIECE):
        yield held[at : at + _PIECE], want[at : at + _PIECE]

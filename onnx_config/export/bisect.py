"""Which node is the first to go wrong: where a graph stops to say what another run of it, or PyTorch, says.

Two questions. A graph that computes one thing as it stands and another once ONNX Runtime has rewritten it, or on
another device, is asked for one number inside after the other, by halves; one at a time, since what is an output can
no longer be fused away. A graph that is wrong as it stands is laid beside the modules of the model: the first module
whose output appears nowhere in it is where they part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from onnx_config.export.graph_file import read_graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Divergence", "first_module_apart", "first_node_apart"]

Array = npt.NDArray[Any]

_SHARE = 1e-3
"""Share of a tensor's largest magnitude by which two runs of one graph are apart, and not only rounded otherwise."""

_SMALLEST = 1e-6
_MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where two computations part."""

    node: str
    """Name of the first node whose output differs; ``""`` where it has none."""
    operator: str
    """What it computes."""
    value: str
    """The output that differs."""
    max_abs_diff: float | None
    """By how much; ``None`` where nothing was found that is alike."""
    module: str | None = None
    """The module of the model that it stands for; ``None`` where the graph was compared with itself."""

    def __str__(self) -> str:
        apart = "" if self.max_abs_diff is None else f", which differs by {self.max_abs_diff:.3g}"
        place = f"the {self.operator} {self.node!r}, output {self.value!r}{apart}"
        return place if self.module is None else f"the module {self.module}, nearest to it {place}"


def first_node_apart(
    path: Path, inputs: Mapping[str, Array], *, usual: Mapping[str, Any], other: Mapping[str, Any]
) -> Divergence | None:
    """Return the first node whose output is another one when the graph is run as in ``other``; ``None``: none is.

    Args:
        path: The graph.
        inputs: What it is run on.
        usual: Arguments of `onnx_config.export.session.open_session` for the run that is taken to be right.
        other: The same for the run that is not.

    Raises:
        InputError: If a device is not there.
        ModelError: If ONNX Runtime refuses the graph.
    """
    values = _floats(read_graph(path))
    low, high = 0, len(values)
    found: Divergence | None = None
    while low < high:
        middle = (low + high) // 2
        apart = _apart(path, middle, inputs, usual, other)
        if apart is None:
            low = middle + 1
        else:
            found, high = apart, middle
    return found


def _floats(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Return what the nodes of a graph compute, in their order; numbers only, where the graph says of which type."""
    return [value for node in model.graph for value in node.outputs if value.name and value.uses()] + [
        value for value in model.graph.outputs if not value.uses()
    ]


def _apart(
    path: Path, number: int, inputs: Mapping[str, Array], usual: Mapping[str, Any], other: Mapping[str, Any]
) -> Divergence | None:
    one, two = (_value_of(path, number, inputs, how) for how in (usual, other))
    value = _floats(read_graph(path))[number]
    difference = _difference(one, two)
    if difference is None:
        return None
    node = value.producer()
    return Divergence(
        node=(node.name or "") if node is not None else "",
        operator=node.op_type if node is not None else "input",
        value=value.name or "",
        max_abs_diff=difference,
    )


def _value_of(path: Path, number: int, inputs: Mapping[str, Array], how: Mapping[str, Any]) -> Array | None:
    from onnx_config.export.session import open_session

    model = read_graph(path)
    value = _floats(model)[number]
    if not value.is_graph_output():
        model.graph.outputs.append(value)
    session = open_session(path, graph=onnx_ir.to_proto(model).SerializeToString(), **how)
    wanted = {i.name for i in session.get_inputs()}
    (found,) = session.run([value.name], {name: array for name, array in inputs.items() if name in wanted})
    return found if isinstance(found, np.ndarray) else None


def _difference(one: Array | None, two: Array | None) -> float | None:
    """Return by how much two runs are apart; ``None`` where they are not, or where nobody can say."""
    if one is None or two is None:
        return None
    if one.shape != two.shape:
        return float("inf")
    if not one.size or one.dtype.kind not in "fiub":
        return None
    a, b = one.astype(np.float64), two.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b) & (np.abs(a) < 1e30)
    if not finite.any():
        return None
    largest = float(np.abs(a[finite] - b[finite]).max())
    scale = max(float(np.abs(a[finite]).max()), _SMALLEST)
    return largest if largest > _SHARE * scale else None


def first_module_apart(
    path: Path,
    model: PreTrainedModel,
    inputs: Mapping[str, Array],
    *,
    flags: Mapping[str, Any],
    threads: int = 1,
) -> Divergence | None:
    """Return the first module of the model whose output appears nowhere in the graph; ``None``: all do.

    Modules that the exporter folds into others (a dropout, what only hands on) have an output of their own in PyTorch
    and are found all the same, since their output is that of another. Only tensors of floating-point numbers count.

    Args:
        path: The graph.
        model: The model on the CPU, unchanged.
        inputs: Where both are run.
        flags: Further keyword arguments of ``forward``.
        threads: Of ONNX Runtime.

    Raises:
        ModelError: If ONNX Runtime refuses the graph.
    """
    inside = _inside(path, inputs, threads)
    if inside is None:
        return None
    for name, want in _module_outputs(model, inputs, flags):
        alike = [(value, got) for value, got in inside if got.size == want.size]
        apart = [(float(np.abs(got.reshape(want.shape) - want).max()), value) for value, got in alike]
        scale = max(float(np.abs(want).max()), _SMALLEST)
        nearest = min(apart, key=lambda pair: pair[0], default=None)
        if nearest is not None and nearest[0] <= _SHARE * scale:
            continue
        value = None if nearest is None else nearest[1]
        node = None if value is None else value.producer()
        if nearest is not None and nearest[0] > scale:
            # Nothing there is even near: what the module returns is laid out otherwise in the graph, or left out.
            continue
        return Divergence(
            node="" if node is None else node.name or "",
            operator="nothing" if node is None else node.op_type,
            value="" if value is None else value.name or "",
            max_abs_diff=None if nearest is None else nearest[0],
            module=name or type(model).__name__,
        )
    return None


def _inside(path: Path, inputs: Mapping[str, Array], threads: int) -> list[tuple[onnx_ir.Value, Array]] | None:
    """Return what the nodes of a graph compute; ``None`` where that is too much to be held."""
    from onnx_config.export.session import open_session

    model = read_graph(path)
    values = _floats(model)
    for value in values:
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    session = open_session(
        path, device="cpu", threads=threads, level="disable", graph=onnx_ir.to_proto(model).SerializeToString()
    )
    wanted = {i.name for i in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in wanted}
    found: list[tuple[onnx_ir.Value, Array]] = []
    held = 0
    for some in _chunks(values):
        for value, got in zip(some, session.run([value.name for value in some], feed), strict=True):
            if isinstance(got, np.ndarray) and got.dtype.kind == "f" and got.size and np.isfinite(got).all():
                found.append((value, got))
                held += got.nbytes
        if held > _MOST_BYTES:
            return None
    return found


def _chunks(values: Sequence[onnx_ir.Value], size: int = 64) -> list[Sequence[onnx_ir.Value]]:
    return [values[at : at + size] for at in range(0, len(values), size)]


def _module_outputs(
    model: PreTrainedModel, inputs: Mapping[str, Array], flags: Mapping[str, Any]
) -> list[tuple[str, Array]]:
    """Return the first tensor that each module returned, in the order in which they ended."""
    import torch

    found: list[tuple[str, Array]] = []

    def keep(name: str, returned: Any) -> None:
        first = returned[0] if isinstance(returned, tuple) and returned else returned
        if isinstance(first, torch.Tensor) and first.is_floating_point() and first.numel():
            array = first.detach().float().cpu().numpy()
            if np.isfinite(array).all():
                found.append((name, array.copy()))

    hooks = [
        module.register_forward_hook(lambda _module, _args, returned, name=name: keep(name, returned))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, **flags)
    finally:
        for hook in hooks:
            hook.remove()
    return found

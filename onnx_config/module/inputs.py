"""A module's inputs while they are being found out: types, axes and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from onnx_config.declarations import Declaration, OutputField, Role
from onnx_config.shape_inference import Inference
from onnx_config.spec import TensorSpec

__all__ = ["DTYPES", "ModuleInputs", "conventional_name"]

DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32, "bool": torch.bool}
"""Element types that inputs may have, by NumPy's name."""

_LARGEST = 1 << 12
# One axis each, so that a size in a message says which one is meant; none is the size of a kernel or a common layer.
_FREE_SIZES = (6, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
_BATCH = 2


@dataclass(slots=True)
class ModuleInputs:
    """Inputs while they are being found out."""

    shapes: dict[str, list[int | str]]
    """Input -> its axes: a size that is fixed, or a name."""
    dtypes: dict[str, str]
    """Input -> NumPy's name of its elements' type; the inputs are those that have one."""
    sizes: dict[str, int]
    """Name of an axis -> its size."""
    fixed_rank: set[str]
    """Inputs whose number of axes is declared."""
    fixed_dtype: set[str]
    """Inputs whose element type is declared."""
    limits: dict[str, int] = field(default_factory=dict)
    """Input -> exclusive upper bound of its whole numbers."""
    outputs: tuple[TensorSpec, ...] = ()
    """What the module returns, once its axes were varied."""
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Name of an axis -> smallest and largest size."""
    notes: list[str] = field(default_factory=list)
    """What runs showed."""

    def resolved(self, name: str, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Return the shape of an input, at ``sizes`` or at its own."""
        at = self.sizes if sizes is None else sizes
        return tuple(axis if isinstance(axis, int) else at[axis] for axis in self.shapes[name])

    def tensors(self, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
        """Return values for all inputs, always the same ones for the same shapes."""
        generator = torch.Generator().manual_seed(0)
        made = {}
        for name, dtype in self.dtypes.items():
            shape = self.resolved(name, sizes)
            if dtype == "float32":
                made[name] = torch.randn(shape, generator=generator)
            elif dtype == "bool" or name.endswith("mask"):
                made[name] = torch.ones(shape, dtype=DTYPES[dtype])
            else:
                limit = self.limits.get(name, 2)
                made[name] = torch.randint(0, limit, shape, generator=generator, dtype=DTYPES[dtype])
        return made

    def used(self) -> set[str]:
        """Return the axes that have names."""
        return {axis for shape in self.shapes.values() for axis in shape if isinstance(axis, str)}

    def inference(self) -> Inference:
        """Return what was found out as it is known of any model."""
        specs = [TensorSpec(name=n, dtype=d, shape=tuple(self.shapes[n])) for n, d in self.dtypes.items()]
        axes = sorted(self.used())
        return Inference(
            inputs=tuple(specs),
            outputs=self.outputs,
            axis_ranges={axis: self.ranges[axis] for axis in axes},
            sizes={axis: self.sizes[axis] for axis in axes},
            values={},
            learned=tuple(dict.fromkeys(self.notes)),
        )

    def declared(self, declaration: Declaration) -> Declaration:
        """Return the declaration with what was found out in the place of what is not declared."""
        arguments = tuple(
            replace(
                a,
                role=Role.DATA,
                dtype=self.dtypes[a.name],
                shape=tuple(self.shapes[a.name]),
                index_limit=self.limits.get(a.name, a.index_limit),
            )
            if a.name in self.dtypes
            else a
            for a in declaration.arguments
        )
        outputs = tuple(OutputField(name=o.name, shape=o.shape, tensor=True, flag=None) for o in self.outputs)
        return replace(declaration, arguments=arguments, outputs=outputs, unread=())

    def fix(self, name: str, position: int, size: int) -> None:
        """Give one axis of one input a fixed size."""
        axis = self.shapes[name][position]
        self.shapes[name][position] = size
        if isinstance(axis, str) and axis not in self.used():
            self.sizes.pop(axis, None)

    def fix_everywhere(self, axis: str, size: int) -> None:
        """Give an axis a fixed size in all inputs."""
        for shape in self.shapes.values():
            shape[:] = [size if a == axis else a for a in shape]
        self.sizes.pop(axis, None)

    def grow(self) -> bool:
        """Double all axes but the rows; return whether there was room."""
        axes = [axis for axis in self.used() if not axis.endswith("batch_size")]
        if not axes or max(self.sizes[axis] for axis in axes) * 2 > _LARGEST:
            return False
        for axis in axes:
            self.sizes[axis] *= 2
        return True

    def set_rank(self, name: str, rank: int, *, names: Mapping[int, str] = MappingProxyType({})) -> None:
        """Give an input ``rank`` axes with their usual names, or those of ``names`` (position -> name)."""
        others = {axis for other, shape in self.shapes.items() if other != name for axis in shape}
        axes: list[int | str] = ["batch_size"]
        for position in range(1, rank):
            axis = names.get(position) or conventional_name(position, rank, whole=self.dtypes[name] != "float32")
            axes.append(f"{name}_{axis}" if axis.startswith("dim_") or axis in others else axis)
        self.shapes[name] = axes
        self.give_sizes(name)

    def give_sizes(self, name: str) -> None:
        """Give the axes of an input that have no size yet one that no other axis has."""
        for axis in self.shapes[name]:
            if isinstance(axis, str) and axis not in self.sizes:
                self.sizes[axis] = self._free_size(axis)

    def _free_size(self, axis: str) -> int:
        if axis.endswith("batch_size"):
            return _BATCH if _BATCH not in self.sizes.values() else _BATCH + 1
        taken = set(self.sizes.values()) | {a for shape in self.shapes.values() for a in shape if isinstance(a, int)}
        free: int = next(size for size in (*_FREE_SIZES, *range(48, _LARGEST)) if size not in taken)
        return free


def conventional_name(position: int, rank: int, *, whole: bool) -> str:
    """Return what an axis is mostly called."""
    if position == 0:
        return "batch_size"
    if rank == 4 and not whole:
        return ("num_channels", "height", "width")[position - 1]
    if position == 1 and (rank == 3 or whole):
        return "sequence_length"
    return f"dim_{position}"

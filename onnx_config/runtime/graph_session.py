"""A graph in ONNX Runtime that takes torch tensors and returns such, without copies where they lie on its device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto

from onnx_config.errors import InputError

__all__ = ["GraphInput", "GraphSession"]

# ONNX Runtime's name of a tensor's type -> torch's, and the number that stands for it in ONNX.
_TYPES: Mapping[str, tuple[torch.dtype, int]] = {
    "tensor(float)": (torch.float32, TensorProto.FLOAT),
    "tensor(float16)": (torch.float16, TensorProto.FLOAT16),
    "tensor(bfloat16)": (torch.bfloat16, TensorProto.BFLOAT16),
    "tensor(double)": (torch.float64, TensorProto.DOUBLE),
    "tensor(int64)": (torch.int64, TensorProto.INT64),
    "tensor(int32)": (torch.int32, TensorProto.INT32),
    "tensor(int16)": (torch.int16, TensorProto.INT16),
    "tensor(int8)": (torch.int8, TensorProto.INT8),
    "tensor(uint8)": (torch.uint8, TensorProto.UINT8),
    "tensor(bool)": (torch.bool, TensorProto.BOOL),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One input of a graph."""

    name: str

    dtype: torch.dtype
    """Type of its elements."""

    shape: tuple[int | str | None, ...]
    """Axis sizes; a name, or nothing, where any will do."""


class GraphSession:
    """An ONNX Runtime session behind tensors of torch."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session = session
        """The session, as ONNX Runtime has it."""
        self.device = device
        """Where tensors are handed over: the CPU, or the GPU that the session runs on."""
        self.inputs: Mapping[str, GraphInput] = {
            value.name: GraphInput(name=value.name, dtype=_TYPES[value.type][0], shape=tuple(value.shape))
            for value in session.get_inputs()
            if value.type in _TYPES
        }
        """By name, in the graph's order."""
        self.output_names = tuple(value.name for value in session.get_outputs())
        """In the graph's order."""
        self.output_types = {v.name: _TYPES[v.type][0] for v in session.get_outputs() if v.type in _TYPES}
        """The types of their elements."""
        self._numbers = {value.name: _TYPES[value.type][1] for value in session.get_inputs() if value.type in _TYPES}

    def run(self, feed: Mapping[str, torch.Tensor], outputs: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Return ``outputs`` by name, all of them where there are none named.

        What is fed is moved to the device and given the type that the graph takes; what is there already and
        contiguous is read where it lies. What is returned is the runtime's own memory.

        Raises:
            InputError: If ONNX Runtime cannot run the graph on that.
        """
        wanted = self.output_names if outputs is None else tuple(outputs)
        given = {
            name: tensor.detach().to(self.device, self.inputs[name].dtype).contiguous() for name, tensor in feed.items()
        }
        where = self.device.type, self.device.index or 0
        binding = self.session.io_binding()
        # An empty tensor has no address, which ONNX Runtime takes for a missing one.
        stand_in = torch.empty(8, dtype=torch.uint8, device=self.device)
        for name, tensor in given.items():
            address = tensor.data_ptr() or stand_in.data_ptr()
            binding.bind_input(name, *where, self._numbers[name], list(tensor.shape), address)
        for name in wanted:
            binding.bind_output(name, *where)
        if self.device.type == "cuda":
            # The runtime has a stream of its own, which does not wait for torch's.
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        # ONNX Runtime's exceptions share no base class of their own.
        except Exception as error:
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in given.items() if not n.startswith("past_key_values"))
            takes = ", ".join(
                f"{value.name} {list(value.shape)}"
                for value in self.inputs.values()
                if not value.name.startswith("past_key_values")
            )
            said = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"ONNX Runtime cannot run the graph on {shapes}: {said}. It takes {takes}.") from error
        values = binding.get_outputs_as_ortvaluevector()
        return {name: self._tensor(name, value) for name, value in zip(wanted, values, strict=True)}

    def _tensor(self, name: str, value: Any) -> torch.Tensor:
        tensor = torch.utils.dlpack.from_dlpack(value.to_dlpack())
        # Older exchanges between libraries have no truth values, only bytes.
        return tensor.bool() if self.output_types.get(name) == torch.bool else tensor

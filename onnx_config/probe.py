"""Runs a model class on shapes alone: no weights, no numbers, next to no memory.

The class is built on the meta device and called with fake tensors, so that a model of any size
answers in about a second what it returns for given input shapes, or why it refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from onnx_config.meta_build import built_on_meta
from onnx_config.module_state import forgotten_caches, preserved_state

if TYPE_CHECKING:
    from onnx_config.trial import Frame

__all__ = ["Probe", "ProbeResult", "flat_outputs"]

_TORCH_DTYPES = {
    "int64": torch.int64,
    "int32": torch.int32,
    "float32": torch.float32,
    "bool": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a model said to some shapes."""

    outputs: Mapping[str, tuple[tuple[int, ...], str]] | None
    """Output name -> (shape, NumPy dtype); ``None`` where it did not return."""

    refusal: str | None
    """What it said when it refused; ``None`` where it did not."""

    undecidable: bool = False
    """Whether the answer depends on values, which fake tensors do not have."""

    frames: tuple[Frame, ...] = ()
    """The calls on the way to a refusal, outermost first; empty for a run on shapes alone."""

    progress: int = 0
    """How many modules had returned when it ended."""

    draws: bool = False
    """Whether it drew random numbers on the way; never, for a run on shapes alone."""


class Probe:
    """A model class built without weights, to be called with shapes.

    Raises:
        Exception: Whatever the class raises when it cannot be built from the config.
    """

    def __init__(self, cls: type, config: Any) -> None:
        model = built_on_meta(cls, config)
        _choose_experts(model)
        self.parameters = sum(p.numel() for p in dict.fromkeys(model.parameters()))
        """Number of parameters, shared ones counted once."""
        self.offset_position_tables = _offset_position_tables(model)
        """Tables of learned positions that begin after the padding token's id: rows -> rows never used."""
        self.model = model.eval()
        """The model; its parameters are on the meta device until it is run, then fake tensors on the CPU."""
        self._mode: FakeTensorMode | None = None

    def run(
        self, shapes: Mapping[str, tuple[tuple[int, ...], str]], *, method: str = "forward", **flags: Any
    ) -> ProbeResult:
        """Call the model, or a ``method`` of it, with inputs of ``shapes`` (name -> shape and NumPy dtype)."""
        # A refusal is an answer here, not an event to log with a traceback.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        mode = self._faked()
        with mode, torch.no_grad(), preserved_state(self.model), forgotten_caches(self.model):
            inputs = {name: torch.ones(shape, dtype=_TORCH_DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}
            try:
                returned = (self.model if method == "forward" else getattr(self.model, method))(**inputs, **flags)
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
                return ProbeResult(outputs=None, refusal=str(error), undecidable=True)
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split()) or type(error).__name__
                return ProbeResult(outputs=None, refusal=text, undecidable="data-dependent" in text.lower())
            outputs = {
                name: (tuple(int(size) for size in value.shape), str(value.dtype).removeprefix("torch."))
                for name, value in flat_outputs(returned)
            }
        return ProbeResult(outputs=outputs, refusal=None)

    def _faked(self) -> FakeTensorMode:
        # Many a model is only counted, and never run.
        if self._mode is None:
            self._mode = FakeTensorMode(allow_non_fake_inputs=True)
            _make_fake(self.model, self._mode)
        return self._mode


def flat_outputs(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model's output under dotted names, caches left out.

    The names are those that ``transformers.exporters`` gives to graph outputs: fields of output
    classes by name, members of tuples by position.
    """
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from flat_outputs(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flat_outputs(item, f"{prefix}.{index}" if prefix else str(index))


def _choose_experts(model: torch.nn.Module) -> None:
    """Let a mixture of experts run as a batch of products: grouped ones exist for bfloat16 only on the meta device."""
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # transformers' models have it


def _offset_position_tables(model: torch.nn.Module) -> dict[int, int]:
    # Such a model numbers its tokens from the padding id on, and says so by the table's padding row.
    return {
        module.num_embeddings: module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None
    }


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Swap a model's meta parameters and buffers for fake ones on the CPU; shared ones stay shared."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for store, trained in ((module._parameters, True), (module._buffers, False)):
            for name, value in store.items():
                if value is None or not value.is_meta:
                    continue
                if id(value) not in fakes:
                    fakes[id(value)] = _fake(value, mode, trained=trained)
                store[name] = fakes[id(value)]


def _fake(value: torch.Tensor, mode: FakeTensorMode, *, trained: bool) -> torch.Tensor:
    """Return a fake tensor on the CPU in the place of a meta one."""
    plain = value.detach() if value.is_contiguous() else torch.empty(value.shape, dtype=value.dtype, device="meta")
    # Made directly, since a factory function under the mode takes ten times as long, and there are thousands.
    return FakeTensor(mode, plain, "cpu", _is_param=trained)

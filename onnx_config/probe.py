"""Runs a model class on shapes alone: no weights, no numbers, next to no memory.

The class is built on the meta device and called there, so that a model of any size answers in about a second what it
returns for given input shapes. Where it refuses, fake tensors say why: they pass for tensors on the CPU, know a few
values, and tell what depends on the others; each of their operations takes ten times as long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from onnx_config.frames import Frame, counted_modules, frames_of
from onnx_config.meta_build import built_on_meta
from onnx_config.module_state import forgotten_caches, preserved_state

__all__ = ["Probe", "ProbeResult", "flat_outputs"]

_ASKED = "is_fake_tensor"
_PLACES = "aten.nonzero.default"

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

    drew: bool = False
    """Whether it drew random numbers on the way; always false for a run on shapes alone."""

    foretold: bool = False
    """Whether no run was made, since shapes alone end where a real one was refused before."""


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
        """The model; whatever its parameters are, a run takes only their shapes and types."""
        self._mode: FakeTensorMode | None = None
        self._fakes: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, model: torch.nn.Module) -> Probe:
        """Return a probe of a model that is built already, with weights or without; its experts run as a batch then."""
        built: Any = lambda _: model  # noqa: E731  # a class as good as any other
        return cls(built, None)

    def run(
        self, shapes: Mapping[str, tuple[tuple[int, ...], str]], *, method: str = "forward", **flags: Any
    ) -> ProbeResult:
        """Call the model, or a ``method`` of it, with inputs of ``shapes`` (name -> shape and NumPy dtype)."""
        return self._run_on_meta(shapes, method, flags) or self._run_faked(shapes, method, flags)

    def _run_on_meta(
        self, shapes: Mapping[str, tuple[tuple[int, ...], str]], method: str, flags: Mapping[str, Any]
    ) -> ProbeResult | None:
        """Return the answer; ``None`` where the model refuses, or wants a value that fake tensors may know."""
        try:
            with self._all_on_meta():
                return ProbeResult(outputs=_described(self._call(shapes, method, flags)), refusal=None)
        except _PlacesWantedError as error:
            return ProbeResult(outputs=None, refusal=str(error), undecidable=True)
        # The model's own code decides what it raises; which of it is an answer, fake tensors tell.
        except Exception:  # noqa: BLE001
            return None

    def refused(self, shapes: Mapping[str, tuple[tuple[int, ...], str]], **flags: Any) -> ProbeResult | None:
        """Return how the model refuses ``shapes`` whatever the values are, with the calls on the way.

        ``None`` where it accepts them, or where that is not certain: it asked for a value, or for what the meta device
        lacks.
        """
        with counted_modules() as counter:
            try:
                with self._all_on_meta():
                    self._call(shapes, "forward", flags)
            except (NotImplementedError, _PlacesWantedError):
                return None
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split()) or type(error).__name__
                frames = tuple(frames_of(error.__traceback__, {}))
                if "meta" in text:
                    return None
                return ProbeResult(outputs=None, refusal=text, frames=frames, progress=counter[0])
        return None

    @contextmanager
    def _all_on_meta(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            preserved_state(self.model),
            forgotten_caches(self.model),
            _known_to_hold_nothing(),
        ):
            _replace_tensors(self.model, _on_meta)
            with _OnMeta():
                yield

    def _run_faked(
        self, shapes: Mapping[str, tuple[tuple[int, ...], str]], method: str, flags: Mapping[str, Any]
    ) -> ProbeResult:
        # A refusal is an answer here, not an event to log with a traceback.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        mode = self._mode = self._mode or FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad(), preserved_state(self.model), forgotten_caches(self.model):
            # Not under the mode, where each would take a hundred times as long.
            _replace_tensors(self.model, self._faked)
            try:
                with mode:
                    returned = self._call(shapes, method, flags)
                return ProbeResult(outputs=_described(returned), refusal=None)
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
                return ProbeResult(outputs=None, refusal=str(error), undecidable=True)
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split()) or type(error).__name__
                return ProbeResult(outputs=None, refusal=text, undecidable="data-dependent" in text.lower())

    def _call(self, shapes: Mapping[str, tuple[tuple[int, ...], str]], method: str, flags: Mapping[str, Any]) -> Any:
        inputs = {name: torch.ones(shape, dtype=_TORCH_DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}
        return (self.model if method == "forward" else getattr(self.model, method))(**inputs, **flags)

    def _faked(self, value: torch.Tensor, trained: bool) -> torch.Tensor:
        """Return a fake tensor on the CPU in the place of a meta one, the same at every run."""
        if not value.is_meta:
            return value
        if id(value) not in self._fakes:
            assert self._mode is not None
            plain = (
                value.detach() if value.is_contiguous() else torch.empty(value.shape, dtype=value.dtype, device="meta")
            )
            # Made directly, since a factory function under the mode takes ten times as long, and there are thousands.
            self._fakes[id(value)] = FakeTensor(self._mode, plain, "cpu", _is_param=trained)
        return self._fakes[id(value)]


def _described(returned: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and NumPy types of what a model returned."""
    return {
        name: (tuple(int(size) for size in value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in flat_outputs(returned)
    }


class _PlacesWantedError(Exception):
    """A model asked where a tensor of several elements is not zero, which fake tensors do not know either."""

    def __str__(self) -> str:
        return _PLACES


class _OnMeta(DeviceContext):
    """Makes tensors on the meta device, and tells whether it was asked for places that no shape tells."""

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's own
        except NotImplementedError as error:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            # What is in a tensor of one element they may remember.
            if "torch.nonzero()" in str(error) and all(tensor.numel() > 1 for tensor in tensors):
                raise _PlacesWantedError from error
            raise


@contextmanager
def _known_to_hold_nothing() -> Iterator[None]:
    """Let transformers know of meta tensors what it knows of fake ones: that there are no values to look at.

    It asks before it looks whether a mask hides anything, say.
    """
    from transformers.utils import import_utils

    known = getattr(import_utils, _ASKED, None)
    if known is None:
        yield
        return

    def holds_nothing(value: Any) -> bool:
        return known(value) or (isinstance(value, torch.Tensor) and value.is_meta)

    with patch.object(import_utils, _ASKED, holds_nothing):
        yield


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


def _replace_tensors(model: torch.nn.Module, replaced: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
    """Replace a model's parameters and buffers by what ``replaced`` makes of each, told whether it is a parameter."""
    for module in model.modules():
        for store, trained in ((module._parameters, True), (module._buffers, False)):
            for name, value in store.items():
                if value is not None:
                    store[name] = replaced(value, trained)  # type: ignore[assignment]  # fakes pass for parameters


def _on_meta(value: torch.Tensor, trained: bool) -> torch.Tensor:
    if value.is_meta:
        return value
    plain = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.nn.Parameter(plain, requires_grad=False) if trained else plain

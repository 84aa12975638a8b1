"""Runs a small model on real values and listens to what it says when it refuses them.

Fake tensors have shapes but no values. Whether a text holds as many image tokens as there are image features, or
whether an index lies in a table, shows only in a real run; the source line that refused and the tensors around it
tell more than the message does.
"""

from __future__ import annotations

import linecache
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.module_state import forgotten_caches, preserved_state
from onnx_config.probe import ProbeResult, flat_outputs

if TYPE_CHECKING:
    from onnx_config.input_generator import Array

__all__ = ["Frame", "TensorView", "Trial"]

_SEED = 0
_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorView:
    """A tensor that a frame of a refusal held."""

    shape: tuple[int, ...]
    """Its sizes."""

    dtype: str
    """NumPy name of its elements' type."""

    input: str | None
    """The input that it is, unchanged; ``None``: it was computed."""

    largest: int | None = None
    """Its largest value where it holds whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One call on the way to a refusal."""

    function: str
    """Name of the function."""

    place: tuple[str, int]
    """File and line."""

    source: str
    """The statement that was running, on one line; empty where there is no source."""

    tensors: Mapping[str, TensorView]
    """Local variables that were tensors."""

    nones: frozenset[str]
    """Local variables that were ``None``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The identifiers in `source`, in their order."""
        return tuple(dict.fromkeys(_IDENTIFIER.findall(self.source)))


class Trial:
    """A model with random weights, to be called with real inputs on the CPU.

    Raises:
        Exception: Whatever the class raises when it cannot be built from the config.
    """

    def __init__(self, cls: type, config: Any) -> None:
        import copy

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self.model = cls(copy.deepcopy(config)).eval()
        """The model."""

    def run(self, arrays: Mapping[str, Array], **flags: Any) -> ProbeResult:
        """Call the model with ``arrays`` and ``flags``."""
        inputs = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        with _left_as_it_was(self.model), _counted_modules() as counter:
            chance = torch.get_rng_state()
            try:
                returned = self.model(**inputs, **flags)
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split()) or type(error).__name__
                frames = tuple(_frames(error.__traceback__, inputs))
                return ProbeResult(outputs=None, refusal=text, frames=frames, progress=counter[0])
            outputs = {
                name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
                for name, value in flat_outputs(returned)
            }
            drew = not torch.equal(chance, torch.get_rng_state())
        return ProbeResult(outputs=outputs, refusal=None, progress=counter[0], drew=drew)

    def features(self, arrays: Mapping[str, Array]) -> list[Array]:
        """Return the features (count, width) that it makes of images, for each image or row; none where it refuses."""
        from onnx_config.tile_models import features_in, features_method

        inputs = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        with _left_as_it_was(self.model):
            try:
                parts = features_in(features_method(self.model)(**inputs, return_dict=True))
                return [part.float().numpy() for part in parts]
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception:  # noqa: BLE001
                return []


@contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Call a model without a word, a gradient or further threads, and leave nothing in it."""
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        preserved_state(model),
        forgotten_caches(model),
        _one_thread(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _counted_modules() -> Iterator[list[int]]:
    """Count the modules that return: how far a run came."""
    counter = [0]

    def count(*_: Any) -> None:
        counter[0] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield counter
    finally:
        handle.remove()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: a small model gains nothing from more, and threads that wait for a busy core lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _frames(trace: TracebackType | None, inputs: Mapping[str, torch.Tensor]) -> Iterator[Frame]:
    """Yield the frames of a traceback, outermost first, without our own."""
    by_id = {id(value): name for name, value in inputs.items()}
    pairs = list(traceback.walk_tb(trace))[1:]
    summaries = traceback.extract_tb(trace)[1:]
    for (frame, _), summary in zip(pairs, summaries, strict=True):
        yield Frame(
            function=summary.name,
            place=(summary.filename, summary.lineno or 0),
            source=_statement(summary),
            tensors=_tensors(frame, by_id),
            nones=frozenset(name for name, value in frame.f_locals.items() if value is None),
        )


def _statement(summary: traceback.FrameSummary) -> str:
    first, last = summary.lineno, getattr(summary, "end_lineno", None) or summary.lineno
    if first is None or last is None:
        return ""
    lines = [linecache.getline(summary.filename, number).strip() for number in range(first, last + 1)]
    return " ".join(line for line in lines if line)


def _tensors(frame: FrameType, by_id: Mapping[int, str]) -> dict[str, TensorView]:
    return {
        name: TensorView(
            shape=tuple(value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            input=by_id.get(id(value)),
            largest=int(value.max()) if value.dtype in (torch.int64, torch.int32) and value.numel() else None,
        )
        for name, value in frame.f_locals.items()
        if isinstance(value, torch.Tensor)
    }

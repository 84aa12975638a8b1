"""Runs a small model on real values and listens to what it says when it refuses them.

Fake tensors have shapes but no values. Whether a text holds as many image tokens as there are image features, or
whether an index lies in a table, shows only in a real run; the source line that refused and the tensors around it
tell more than the message does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.frames import counted_modules, frames_of
from onnx_config.module_state import forgotten_caches, preserved_state
from onnx_config.probe import ProbeResult, flat_outputs

if TYPE_CHECKING:
    from onnx_config.input_generator import Array

__all__ = ["Trial"]

_SEED = 0


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
        with _left_as_it_was(self.model), counted_modules() as counter:
            chance = torch.get_rng_state()
            try:
                returned = self.model(**inputs, **flags)
            # The model's own code decides what it raises; whatever it is, it is an answer.
            except Exception as error:  # noqa: BLE001
                text = " ".join(str(error).split()) or type(error).__name__
                frames = tuple(frames_of(error.__traceback__, inputs))
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
def _one_thread() -> Iterator[None]:
    """Run on one thread: a small model gains nothing from more, and threads that wait for a busy core lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

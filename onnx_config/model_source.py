"""A model that is not simply one class of transformers, made from its config: what else has to be said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from onnx_config.declarations import Declaration
    from onnx_config.shape_inference import Inference
    from onnx_config.task_detector import DetectedTask

__all__ = ["ModelSource"]


class ModelSource(ABC):
    """Takes the place of a class of transformers in `UniversalOnnxConfig`."""

    detected: DetectedTask
    """Task and class."""

    notes: tuple[str, ...] = ()
    """What its user should know, a phrase each."""

    inference: Inference | None = None
    """Inputs, outputs and axes, where they are settled already; ``None``: they are settled as for any class."""

    @property
    @abstractmethod
    def model_class(self) -> type:
        """The class whose ``forward`` takes the inputs."""

    @abstractmethod
    def declare(self) -> Declaration:
        """Return what is declared of the inputs and outputs."""

    @abstractmethod
    def build(self, config: Any) -> torch.nn.Module:
        """Return the module without its weights: built on the device that is torch's default at the time."""

    @abstractmethod
    def load(self, folder: Path) -> torch.nn.Module:
        """Return the module with its weights, in evaluation mode on the CPU.

        Raises:
            InputError: If weights are missing, truncated, of other shapes, or not finite.
            ModelError: If it cannot be loaded.
        """

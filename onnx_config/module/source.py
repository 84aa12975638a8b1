"""A module given directly, in the place of a class of transformers.

What it does not declare is found out by running it on small inputs; what it accepts is then varied, one axis at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.declarations import Declaration, declare
from onnx_config.errors import InputError, InternalError
from onnx_config.model_source import ModelSource
from onnx_config.module.inputs import ModuleInputs
from onnx_config.module.lessons import learn
from onnx_config.module.proposal import from_declaration, from_examples, name_axes_of_examples
from onnx_config.module.variation import find_limits, vary
from onnx_config.shape_inference import Inference
from onnx_config.task_detector import DetectedTask, normalize_task, task_of_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["CUSTOM", "ModuleSource", "source_of"]

CUSTOM = "custom"
"""Task, family and model type of a module that is from no library we know."""


class ModuleSource(ModelSource):
    """A module that is there, weights and all."""

    def __init__(
        self, module: torch.nn.Module, detected: DetectedTask, declaration: Declaration, inference: Inference | None
    ) -> None:
        self.module = module
        """The module as it was given."""
        self.detected = detected
        self.inference = inference
        self._declaration = declaration

    @property
    def model_class(self) -> type:
        """The module's class."""
        return type(self.module)

    def declare(self) -> Declaration:
        """Return what the class declares, completed by what runs of the module showed."""
        return self._declaration

    def build(self, config: Any) -> torch.nn.Module:
        """Return a copy of the module: its weights where torch's default device is, and no others in memory."""
        import copy

        device = torch.get_default_device()
        kept: dict[int, Any] = {}
        for part in self.module.modules():
            for name, value in (*part._parameters.items(), *part._buffers.items()):
                if value is not None and device.type == "meta":
                    made = torch.empty_like(value, device=device)
                    kept[id(value)] = (
                        torch.nn.Parameter(made, requires_grad=False) if name in part._parameters else made
                    )
        return copy.deepcopy(self.module, kept).eval()

    def load(self, folder: Path) -> torch.nn.Module:
        """Not for a module that is there already.

        Raises:
            InternalError: Always.
        """
        raise InternalError(f"{type(self.module).__name__} was given as a module; it is not read from {str(folder)!r}.")


def source_of(
    module: torch.nn.Module,
    *,
    task: str | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
) -> tuple[ModuleSource, PreTrainedConfig]:
    """Return what is known of ``module``, and a config for it: its own, or an empty one.

    A dataclass that the module returns is registered with ``torch.export``, which would not take it otherwise.

    Raises:
        InputError: If ``module`` is none, no parameter is annotated as a tensor, or ``example_inputs`` do not fit.
        ModelError: If it accepts none of the inputs that were tried.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"A torch.nn.Module was expected; got {type(module).__name__}.")
    declaration = declare(type(module))  # type: ignore[arg-type]  # a class is hashable whatever its instances are
    if isinstance(module, PreTrainedModel):
        if example_inputs is not None:
            raise InputError("example_inputs are for modules that are not from transformers; leave them unset.")
        return ModuleSource(module, task_of_class(type(module).__name__, task), declaration, None), module.config
    name = CUSTOM if task is None else normalize_task(task)[0]
    detected = DetectedTask(task=name, family=name, class_name=type(module).__name__, reason="a module given directly")
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        found = _settle(module, declaration, example_inputs)
    finally:
        for part, training in was_training.items():
            part.training = training
    config = PreTrainedConfig()
    # Declared as one of the class, which is another one for every config of a known model.
    setattr(config, "model_type", CUSTOM)  # noqa: B010
    ids = found.limits.get("input_ids")
    if ids is not None:
        config.vocab_size = ids
    return ModuleSource(module, detected, found.declared(declaration), found.inference()), config


def _settle(
    module: torch.nn.Module, declaration: Declaration, example_inputs: Mapping[str, torch.Tensor] | None
) -> ModuleInputs:
    if example_inputs is not None:
        found = from_examples(module, declaration, example_inputs)
        name_axes_of_examples(module, found)
    else:
        found = from_declaration(module, declaration)
        learn(module, found)
    find_limits(module, found, example_inputs or {})
    vary(module, found)
    return found

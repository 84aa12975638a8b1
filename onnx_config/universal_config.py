"""`UniversalOnnxConfig`: one class that configures the export of any transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnx_config.config_sizes import modality_of
from onnx_config.declarations import Declaration, declare
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.input_generator import generate_inputs
from onnx_config.patterns import ALWAYS_GIVEN
from onnx_config.preprocessors import Preprocessor, declared_preprocessors, given_preprocessors
from onnx_config.shape_inference import Inference, infer
from onnx_config.spec import ModelSpec
from onnx_config.task_detector import DetectedTask, detect_task, normalize_task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from onnx_config.probe import Probe

__all__ = ["UniversalOnnxConfig"]


class UniversalOnnxConfig:
    """Finds task, inputs, outputs and axes of a model from its config alone.

    Nothing is downloaded and no weights are read: the model's class is read for what it declares
    and run once on shapes without numbers. That happens when it is first needed and takes about a
    second for a large model.

    >>> from transformers import BertConfig
    >>> onnx_config = UniversalOnnxConfig(BertConfig(architectures=["BertForSequenceClassification"]))
    >>> onnx_config.task
    'text-classification'
    >>> onnx_config.inputs["input_ids"]
    {0: 'batch_size', 1: 'sequence_length'}
    """

    DEFAULT_ONNX_OPSET: int = 20
    """The opset that the exporter targets and that ONNX Runtime has run since 1.17."""

    ATOL_FOR_VALIDATION: float = 1e-5
    """Absolute tolerance below which an output of unit scale counts as equal; parity widens it by the
    model's own spread between float32 and float64."""

    def __init__(
        self,
        config: PreTrainedConfig | Mapping[str, Any],
        task: str | None = None,
        use_past: bool | None = None,
        use_past_in_inputs: bool | None = None,
        preprocessors: Sequence[Any] | None = None,
    ) -> None:
        """Detect the task of ``config``.

        Args:
            config: A transformers config, or its dict.
            task: Task by name or synonym; ``None``: what the config declares.
            use_past: Whether the graph keeps a cache of keys and values. Not supported by this
                version: ``True`` raises.
            use_past_in_inputs: Whether the cache is an input too; follows ``use_past``.
            preprocessors: Tokenizers, processors, … that the model is used with. ``None``: those
                that transformers declares for the model type.

        Raises:
            InputError: If ``task`` is unknown or the model type has no class for it, or the dict names
                no known model type.
            ModelError: If no class can be found for the config.
        """
        self.config = _as_config(config)
        if task is not None and normalize_task(task)[1]:
            use_past = True
        if use_past or use_past_in_inputs:
            raise ModelError(
                "A cache of keys and values was asked for (use_past, or a task that ends in -with-past). This version "
                "exports the forward pass without one: leave use_past unset.",
                kind=ErrorKind.UNSUPPORTED,
            )
        self.use_past = False
        """Whether the graph keeps a cache."""
        self.detected: DetectedTask = detect_task(self.config, task)
        """Task, class and how they were found."""
        self._given = None if preprocessors is None else given_preprocessors(preprocessors)

    @classmethod
    def from_pretrained(cls, model: str | Path, *, revision: str | None = None, **kwargs: Any) -> UniversalOnnxConfig:
        """Read the config of a Hub id or a folder; ``kwargs`` go to the constructor.

        Raises:
            InputError: If there is no such model, or its ``config.json`` cannot be read.
            TransientError: If the Hub does not answer.
        """
        from onnx_config.hub import read_config

        return cls(read_config(str(model), revision=revision), **kwargs)

    @classmethod
    def from_model_path(cls, path: str | Path, **kwargs: Any) -> UniversalOnnxConfig:
        """Read ``config.json`` of a folder; ``kwargs`` go to the constructor.

        Raises:
            InputError: If the folder has no readable ``config.json``.
        """
        return cls.from_pretrained(Path(path), **kwargs)

    @property
    def task(self) -> str:
        """The task, e.g. ``"text-classification"``."""
        return self.detected.task

    @property
    def task_family(self) -> str:
        """The group of tasks with the same inputs and checks."""
        return self.detected.family

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return str(self.config.model_type)

    @property
    def architecture(self) -> str:
        """Name of the class that is exported."""
        return self.detected.class_name

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:
        """The class that is exported.

        Raises:
            ModelError: If the installed transformers lacks it, or it needs a library that is not there.
        """
        import transformers

        try:
            found: type[PreTrainedModel] = getattr(transformers, self.architecture)
            found.main_input_name  # noqa: B018  (a stand-in for a missing library raises at any attribute)
        except (AttributeError, ImportError, RuntimeError) as error:
            raise ModelError(
                f"The class {self.architecture} cannot be imported from transformers "
                f"{transformers.__version__}: {error}. Install what it asks for.",
                kind=ErrorKind.UNSUPPORTED,
            ) from error
        return found

    @cached_property
    def declaration(self) -> Declaration:
        """What the class declares."""
        return declare(self.model_class)  # type: ignore[arg-type]  # a class is hashable whatever its instances are

    @cached_property
    def probe(self) -> Probe:
        """The class built without weights.

        Raises:
            ModelError: If it cannot be built from the config.
        """
        from onnx_config.probe import Probe

        try:
            return Probe(self.model_class, self.config)
        # What the class raises on a contradictory config is its own choice.
        except Exception as error:
            raise ModelError(
                f"{self.architecture} cannot be built from the config: {type(error).__name__}: {error}. "
                "Check config.json, or whether it was written for another release of transformers.",
                kind=ErrorKind.UNSUPPORTED,
            ) from error

    @cached_property
    def preprocessors(self) -> tuple[Preprocessor, ...]:
        """The preprocessors given, else those that transformers declares."""
        if self._given is not None:
            return self._given
        return declared_preprocessors(self.model_type)[1]

    @cached_property
    def inference(self) -> Inference:
        """Inputs, outputs and axes as settled with the class."""
        return infer(
            self.declaration,
            self.config,
            self.preprocessors,
            self.probe,
            task_family=self.task_family,
            flags=self.forward_flags,
        )

    @property
    def forward_flags(self) -> dict[str, Any]:
        """Keyword arguments of ``forward`` beside the inputs."""
        accepted = {a.name for a in self.declaration.arguments}
        return {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input name -> its dynamic axes (position -> name)."""
        return {spec.name: spec.axes for spec in self.inference.inputs}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output name -> its dynamic axes (position -> name)."""
        return {spec.name: spec.axes for spec in self.inference.outputs}

    def get_input_names(self) -> list[str]:
        """Return the inputs in the order of ``forward``."""
        return list(self.inputs)

    def get_output_names(self) -> list[str]:
        """Return the outputs in the order of the output class."""
        return list(self.outputs)

    def get_dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of inputs and outputs, as ``torch.onnx.export`` takes them."""
        return {**self.inputs, **self.outputs}

    @property
    def sizes(self) -> dict[str, int]:
        """Dynamic axis -> the size that dummy inputs have unless told otherwise."""
        return dict(self.inference.sizes)

    def generate_dummy_inputs(
        self,
        preprocessor: Any = None,
        batch_size: int | None = None,
        seq_length: int | None = None,
        framework: Literal["pt", "np"] = "pt",
        *,
        seed: int = 0,
        padding: bool = False,
        **sizes: int,
    ) -> dict[str, Any]:
        """Return seeded inputs that the model accepts, in the order of `get_input_names`.

        Args:
            preprocessor: A tokenizer or processor. Of the kind of data that it makes, only the inputs
                that it names are returned, and those that the model cannot do without. ``None``: all inputs.
            batch_size: Rows, of texts and of images alike; ``None``: two, and three where a model scores
                images against texts, so that the two are told apart.
            seq_length: Tokens of a text, or samples of a sound; ``None``: a size that the model accepts.
            framework: ``"pt"`` for torch tensors, ``"np"`` for NumPy arrays.
            seed: Equal seeds give equal values.
            padding: Whether later rows are shorter and padded.
            **sizes: Further axes by name, e.g. ``height=224``.

        Raises:
            InputError: If an axis in ``sizes`` is not one of this model's, a size is below what the model
                takes, or there is no such framework.
        """
        if framework not in ("pt", "np"):
            raise InputError(f"The framework {framework!r} was asked for; there are 'pt' and 'np'.")
        wanted = self._resolve_sizes(batch_size, seq_length, sizes)
        specs = self.inference.inputs
        if preprocessor is not None:
            parts = given_preprocessors([preprocessor])
            kinds = {modality_of(part.input_names[0]) for part in parts}
            kept = {name for part in parts for name in part.input_names} | ALWAYS_GIVEN.keys()
            kept |= {a.name for a in self.declaration.arguments if a.required}
            specs = tuple(
                s for s in specs if s.name in kept or s.name.startswith("decoder_") or modality_of(s.name) not in kinds
            )
        arrays = generate_inputs(specs, self.config, self.declaration, wanted, seed=seed, padding=padding)
        if framework == "np":
            return dict(arrays)
        import torch

        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _resolve_sizes(
        self, batch_size: int | None, seq_length: int | None, sizes: Mapping[str, int]
    ) -> dict[str, int]:
        resolved = self.sizes
        for axis in resolved:
            if axis.endswith("batch_size") and batch_size is not None:
                resolved[axis] = batch_size
            elif axis == "sequence_length" and seq_length is not None:
                resolved[axis] = seq_length
        for axis, size in sizes.items():
            if axis not in resolved:
                raise InputError(f"{axis!r} is no dynamic axis of this model; it has {sorted(resolved)}.")
            resolved[axis] = size
        for axis, size in resolved.items():
            least = self.inference.axis_ranges[axis][0]
            if not isinstance(size, int) or size < least:
                raise InputError(
                    f"The size {size!r} was asked for {axis}; this model takes whole numbers from {least}."
                )
        return resolved

    @cached_property
    def spec(self) -> ModelSpec:
        """All that was found, as one value."""
        return ModelSpec(
            model_type=self.model_type,
            task=self.task,
            task_family=self.task_family,
            architecture=self.architecture,
            inputs=self.inference.inputs,
            outputs=self.inference.outputs,
            axis_ranges=self.inference.axis_ranges,
            sizes=self.inference.sizes,
            preprocessor=declared_preprocessors(self.model_type)[0],
            parameters=self.probe.parameters,
            declared=(self.detected.reason, *self.declaration.unread),
            proven=self.inference.learned,
            assumed=self.inference.assumed,
        )

    def __repr__(self) -> str:
        return f"UniversalOnnxConfig({self.model_type!r}, task={self.task!r}, architecture={self.architecture!r})"


def _as_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, Mapping):
        raise InputError(f"A config is a PreTrainedConfig or its dict; got {type(config).__name__}.")
    from onnx_config.hub import config_from_dict

    return config_from_dict(config)

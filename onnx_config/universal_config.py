"""`UniversalOnnxConfig`: one class that configures the export of any transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnx_config.cache_layout import CacheLayout, read_cache_layout
from onnx_config.config_sizes import embedding_size, modality_of
from onnx_config.declarations import Declaration, declare
from onnx_config.decoder_call import decoder_call
from onnx_config.dummy_sizes import DummySizes
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.image_embeddings import box_prompts, image_embeddings
from onnx_config.image_reader import FoundImages, find_images, with_images
from onnx_config.input_generator import generate_inputs, with_room
from onnx_config.patterns import ALWAYS_GIVEN
from onnx_config.preprocessors import (
    Habits,
    Preprocessor,
    declared_preprocessors,
    given_preprocessors,
    habits_of,
    tokenizer_in,
)
from onnx_config.shape_inference import Inference
from onnx_config.spec import DecoderCall, ModelSpec, TensorSpec
from onnx_config.task_detector import DetectedTask, detect_task, normalize_task
from onnx_config.timm_models import MODEL_TYPE as TIMM
from onnx_config.timm_models import require_timm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from onnx_config.model_source import ModelSource
    from onnx_config.probe import Probe
    from onnx_config.remote_code import RemoteCode
    from onnx_config.settlement import Settled

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

    source: ModelSource | None = None
    """What takes the place of a class of transformers made from the config: a module given directly, or the modules
    of sentence-transformers; ``None``: nothing does."""

    code: RemoteCode | None = None
    """The model's own code that runs; ``None``: none does."""

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
            use_past: Whether the graph gives back its cache of keys, values and states (``present.*``). ``None``:
                where ``task`` ends in ``-with-past``.
            use_past_in_inputs: Whether the graph also takes the cache (``past_key_values.*``) and continues from it;
                ``None``: as ``use_past``.
            preprocessors: Tokenizers, processors, … that the model is used with. ``None``: those
                that transformers declares for the model type.

        Raises:
            InputError: If ``task`` is unknown or the model type has no class for it, the dict names no known
                model type, or a cache is to be an input of a graph that keeps none.
            ModelError: If no class can be found for the config.
        """
        self.config = _as_config(config)
        if use_past is None:
            use_past = bool(use_past_in_inputs) or (task is not None and normalize_task(task)[1])
        if use_past_in_inputs and not use_past:
            raise InputError(
                "use_past_in_inputs=True was asked for with use_past=False: a cache that goes in also comes out. "
                "Leave use_past unset."
            )
        self.use_past = use_past
        """Whether the graph gives back its cache."""
        self.use_past_in_inputs = use_past if use_past_in_inputs is None else use_past_in_inputs
        """Whether the graph takes its cache and continues from it."""
        self.detected: DetectedTask = self._detected(task)
        """Task, class and how they were found."""
        self._given = None if preprocessors is None else given_preprocessors(preprocessors)

    def _detected(self, task: str | None) -> DetectedTask:
        if self.source is not None:
            return self.source.detected
        if self.code is None or not self.code.has_models:
            return detect_task(self.config, task)
        return self.code.detect(tuple(getattr(self.config, "architectures", None) or ()), task)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
    ) -> UniversalOnnxConfig:
        """Read the config of a Hub id or a folder; ``kwargs`` go to the constructor.

        Where ``trust_remote_code`` is true, code that the model brings runs, in this process; that of a repository only
        where ``revision`` is a whole commit.

        Raises:
            InputError: If there is no such model, or its ``config.json`` cannot be read.
            TransientError: If the Hub does not answer.
        """
        from onnx_config.hub import fetch_config

        folder = fetch_config(str(model), revision=revision, code=trust_remote_code)
        return cls.from_folder(folder, origin=f"The config of {str(model)!r}", trust=trust_remote_code, **kwargs)

    @classmethod
    def from_folder(
        cls, folder: Path, *, origin: str | None = None, trust: bool = False, **kwargs: Any
    ) -> UniversalOnnxConfig:
        """Read the config of the model in ``folder``; ``kwargs`` go to the constructor.

        Args:
            folder: Where ``config.json`` is.
            origin: What messages call the config; ``None``: its path.
            trust: Whether code that the model brings may run, in this process.

        Raises:
            InputError: If the config cannot be read.
            ModelError: If its model type is unknown.
        """
        from onnx_config.config_file import config_from_dict, read_config_dict
        from onnx_config.remote_code import RemoteCode, names_code

        value = read_config_dict(folder)
        code = RemoteCode(folder, value) if trust and names_code(value) else None
        config = config_from_dict(value, origin=origin or f"{folder}/config.json", code=code)
        return cls.from_config_in(folder, config, code=code, **kwargs)

    @classmethod
    def from_config_in(
        cls, folder: Path, config: PreTrainedConfig, *, code: RemoteCode | None = None, **kwargs: Any
    ) -> UniversalOnnxConfig:
        """Configure the model in ``folder``, whose config was read; ``kwargs`` go to the constructor.

        ``code`` is the model's own that may run, and has its class where it has any model's.

        Where sentence-transformers wrote the folder, its modules belong to the model, unless another task than
        ``feature-extraction`` is asked for.

        Raises:
            InputError: If its list of modules cannot be read.
            ModelError: If there is a module that is unknown here, or no class for the config.
        """
        from onnx_config.sentence_modules import read_sentence_modules

        task = kwargs.get("task")
        if task is None or normalize_task(task)[0] == "feature-extraction":
            modules = read_sentence_modules(folder)
            if modules is not None:
                from onnx_config.sentence_encoder import SentenceEncoderSource

                source = SentenceEncoderSource(config, modules, code=code)
                return cls._from_source(source, config, code=code, **kwargs)
        return cls._from_source(None, config, code=code, **kwargs)

    @classmethod
    def _from_source(
        cls, source: ModelSource | None, config: PreTrainedConfig, *, code: RemoteCode | None = None, **kwargs: Any
    ) -> UniversalOnnxConfig:
        made = cls.__new__(cls)
        made.source = source
        made.code = code
        made.__init__(config, **kwargs)  # type: ignore[misc]  # the constructor asks the source
        return made

    @classmethod
    def from_model(
        cls,
        module: torch.nn.Module,
        task: str | None = None,
        *,
        example_inputs: Mapping[str, torch.Tensor] | None = None,
        preprocessors: Sequence[Any] | None = None,
    ) -> UniversalOnnxConfig:
        """Configure the export of a module that is loaded already: of transformers, or any other.

        Of a module that is not from transformers, the parameters of ``forward`` that are annotated as tensors and have
        no default are the inputs. Their shapes are read from its docstring where it tells them, and found out by
        running the module on small inputs where not.

        Args:
            module: A loaded module; it is run, and is the same afterwards.
            task: Task by name; ``None``: what the class of a transformers model is for, ``"custom"`` for any other.
            example_inputs: Parameter name -> a tensor that the module accepts. Only these are inputs then, with the
                element types and ranks of the examples; which axes are dynamic is found out by changing their sizes.
            preprocessors: Tokenizers, processors, … that the model is used with.

        Raises:
            InputError: If no parameter is annotated as a tensor, or ``example_inputs`` names one that there is not.
            ModelError: If the module accepts none of the inputs that were tried; the message says what to give.
        """
        from onnx_config.module.source import source_of

        source, config = source_of(module, task=task, example_inputs=example_inputs)
        return cls._from_source(source, config, preprocessors=preprocessors)

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

        if self.source is not None:
            return self.source.model_class
        if self.code is not None and self.code.has_models:
            return self.code.model_class(self.architecture)
        if self.model_type == TIMM:
            require_timm(f"{getattr(self.config, 'architecture', self.architecture)}")
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
        if self.source is not None:
            return self.source.declare()
        return declare(self.model_class)  # type: ignore[arg-type]  # a class is hashable whatever its instances are

    @property
    def _builder(self) -> Any:
        """What makes the module of the config, without weights."""
        return self.model_class if self.source is None else self.source.build

    @cached_property
    def probe(self) -> Probe:
        """The class built without weights.

        Raises:
            ModelError: If it cannot be built from the config.
        """
        from onnx_config.probe import Probe

        try:
            return Probe(self._builder, self.config)
        # What the class raises on a contradictory config is its own choice.
        except Exception as error:
            raise ModelError(
                f"{self.architecture} cannot be built from the config: {type(error).__name__}: {error}. "
                "Check config.json, or whether it was written for another release of transformers.",
                kind=ErrorKind.UNSUPPORTED,
            ) from error

    @cached_property
    def preprocessors(self) -> tuple[Preprocessor, ...]:
        """The preprocessors given, else those that transformers declares, else what lies beside code of its own."""
        if self._given is not None:
            return self._given
        declared = declared_preprocessors(self.model_type)[1]
        if declared or self.code is None or (beside := tokenizer_in(self.code.folder)) is None:
            return declared
        return (beside,)

    @cached_property
    def inference(self) -> Inference:
        """Inputs, outputs and axes as settled with the class.

        Raises:
            ModelError: ``unsupported``, if the class cannot be built, or accepts none of the inputs that were tried.
        """
        if self.source is not None and self.source.inference is not None:
            return self.source.inference
        found = self._settled.inference
        if found.refusal is not None:
            raise _no_inputs_found(self.model_class, found)
        return found

    @cached_property
    def _settled(self) -> Settled:
        from onnx_config.settlement import Subject, settle

        return settle(
            Subject(
                build=self._builder,
                config=self.config,
                declaration=self.declaration,
                preprocessors=self.preprocessors,
                task_family=self.task_family,
                flags=self._flags(use_cache=False),
                probe=self.probe,
            )
        )

    @property
    def forward_flags(self) -> dict[str, Any]:
        """Keyword arguments of ``forward`` beside the inputs."""
        return self._flags(use_cache=self.use_past)

    def _flags(self, *, use_cache: bool) -> dict[str, Any]:
        accepted = {a.name for a in self.declaration.arguments}
        return {"use_cache": use_cache} if "use_cache" in accepted else {}

    @cached_property
    def cache_layout(self) -> CacheLayout:
        """What the model keeps from step to step, whether or not ``use_past`` was asked for; empty: nothing."""
        if self.source is not None:
            return CacheLayout()
        layout = read_cache_layout(self.declaration, self.probe, self._settled)
        _ = self._decoder_call
        _ = self._images
        # The small models were kept for this.
        self._settled = replace(self._settled, twin=None, trial=None, shallow=None)
        return layout

    @cached_property
    def _decoder_call(self) -> DecoderCall:
        """How the decoder is called, of a text with images whose grids are told."""
        settled = self._settled
        found, twin, trial = settled.inference, settled.twin, settled.trial
        text = found.values.get("input_ids")
        if self.source is not None or text is None or text.places is None or twin is None or trial is None:
            return DecoderCall()
        arrays = generate_inputs(found.inputs, twin.config, self.declaration, found.sizes, rules=found.values)
        return decoder_call(trial, arrays, self._flags(use_cache=False), stand_ins=text.stand_ins)

    @cached_property
    def _images(self) -> FoundImages | None:
        """What features of images are made of, where the inputs are text only; to be asked while the twin is there."""
        if self.source is not None:
            return None
        return find_images(self.declaration, self.config, self._settled, self._flags(use_cache=False))

    @property
    def _kept(self) -> CacheLayout:
        """The layout of a cache that was asked for."""
        layout = self.cache_layout
        if not layout.past:
            why = f" ({'; '.join(layout.notes)})" if layout.notes else ""
            raise ModelError(
                f"A cache was asked for (use_past, or a task that ends in -with-past), and {self.architecture} keeps "
                f"nothing from step to step{why}. Leave use_past unset.",
                kind=ErrorKind.UNSUPPORTED,
            )
        return layout

    @property
    def _input_specs(self) -> tuple[TensorSpec, ...]:
        if not self.use_past_in_inputs:
            return self.inference.inputs
        return self._kept.extended(self.inference.inputs, positions=self._takes_positions)

    @property
    def _takes_positions(self) -> bool:
        return any(argument.name == "position_ids" for argument in self.declaration.arguments)

    @property
    def _output_specs(self) -> tuple[TensorSpec, ...]:
        if not self.use_past:
            return self.inference.outputs
        return (*self.inference.outputs, *self._kept.present(continued=self.use_past_in_inputs))

    @property
    def _dummy_sizes(self) -> DummySizes:
        return DummySizes(inference=self.inference, cache=self._kept if self.use_past_in_inputs else None)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input name -> its dynamic axes (position -> name).

        Raises:
            ModelError: If a cache was asked for and the model keeps none.
        """
        return {spec.name: spec.axes for spec in self._input_specs}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output name -> its dynamic axes (position -> name).

        Raises:
            ModelError: If a cache was asked for and the model keeps none.
        """
        return {spec.name: spec.axes for spec in self._output_specs}

    def get_input_names(self) -> list[str]:
        """Return the inputs in the order of ``forward``; the cache, where it is an input, comes last."""
        return list(self.inputs)

    def get_output_names(self) -> list[str]:
        """Return the outputs in the order of the output class; the cache, where it is asked for, comes last."""
        return list(self.outputs)

    def get_dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of inputs and outputs, as ``torch.onnx.export`` takes them."""
        return {**self.inputs, **self.outputs}

    @property
    def sizes(self) -> dict[str, int]:
        """Dynamic axis -> the size that dummy inputs have unless told otherwise."""
        return self._dummy_sizes.defaults

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
            preprocessor: A tokenizer, image processor, feature extractor or processor. Of the kind of data that
                it makes, only the inputs that it names are returned, and those that the model cannot do without.
                Dynamic axes that no size was asked for are as long as its settings make them, texts are at most
                as long as it leaves them, and are padded as it pads. ``None``: all inputs.
            batch_size: Rows, of texts and of images alike; ``None``: two, and three where a model scores
                images against texts, so that the two are told apart.
            seq_length: Tokens of a text, or samples of a sound; ``None``: a size that the model accepts.
            framework: ``"pt"`` for torch tensors, ``"np"`` for NumPy arrays.
            seed: Equal seeds give equal values.
            padding: Whether later rows are shorter and padded, on the preprocessor's side with its token.
            **sizes: Further axes by name, e.g. ``height=224``.

        Raises:
            InputError: If an axis in ``sizes`` is not one of this model's, a size is below what the model
                takes, or there is no such framework.
        """
        if framework not in ("pt", "np"):
            raise InputError(f"The framework {framework!r} was asked for; there are 'pt' and 'np'.")
        habits = Habits() if preprocessor is None else habits_of(preprocessor)
        wanted = self._dummy_sizes.asked_for(batch_size, seq_length, sizes, habits=habits)
        specs = self._input_specs
        if preprocessor is not None:
            parts = given_preprocessors([preprocessor])
            kinds = {modality_of(part.input_names[0]) for part in parts}
            kept = {name for part in parts for name in part.input_names} | ALWAYS_GIVEN.keys()
            kept |= {a.name for a in self.declaration.arguments if a.required}
            specs = tuple(
                s for s in specs if s.name in kept or s.name.startswith("decoder_") or modality_of(s.name) not in kinds
            )
        arrays = generate_inputs(
            specs,
            self.config,
            self.declaration,
            with_room(specs, self.inference.values, wanted),
            rules=self.inference.values,
            seed=seed,
            padding=padding,
            padding_side=habits.padding_side or "right",
            pad_token_id=habits.pad_token_id,
        )
        if framework == "np":
            return dict(arrays)
        import torch

        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    @cached_property
    def spec(self) -> ModelSpec:
        """All that was found, as one value."""
        layout = self.cache_layout
        told = (self.declaration, self.inference, self.probe)
        embeddings = () if self.source is not None else image_embeddings(*told)
        spec = ModelSpec(
            model_type=self.model_type,
            task=self.task,
            task_family=self.task_family,
            architecture=self.architecture,
            inputs=self._input_specs,
            outputs=self._output_specs,
            axis_ranges=self._dummy_sizes.axis_ranges,
            sizes=self.sizes,
            cache=layout.past,
            step_axis=layout.step_axis,
            takes_positions=self._takes_positions,
            decoder_call=self._decoder_call,
            embedding_size=embedding_size(self.config) if self.source is None else None,
            embeddings=embeddings,
            boxes=box_prompts(*told, embeddings) if embeddings else (),
            axis_steps=self.inference.axis_steps,
            values=self.inference.values,
            code_sha256=None if self.code is None else self.code.sha256,
            preprocessor=declared_preprocessors(self.model_type)[0],
            parameters=self.probe.parameters,
            declared=(self.detected.reason, *self.declaration.unread),
            proven=self.inference.learned,
            assumed=(
                *self.inference.assumed,
                *layout.notes,
                *(self.source.notes if self.source is not None else ()),
            ),
        )
        return with_images(spec, self._images)

    def __repr__(self) -> str:
        return f"UniversalOnnxConfig({self.model_type!r}, task={self.task!r}, architecture={self.architecture!r})"


def _no_inputs_found(cls: type, last: Inference) -> ModelError:
    """Return the error for a class that accepts none of the inputs that were tried, with the last ones."""
    tried = ", ".join(f"{spec.name} {list(spec.resolve(last.sizes))} {spec.dtype}" for spec in last.inputs)
    changed = f" after these changes: {'; '.join(last.learned)}" if last.learned else ""
    return ModelError(
        f"{cls.__name__} refuses all inputs that were tried ({last.runs} runs of a model made small). The last were "
        f"{tried}{changed}. It said: {(last.refusal or '').rstrip('.')}. If sizes in config.json contradict one "
        "another, correct them; else this class takes inputs that cannot be found out from its declarations.",
        kind=ErrorKind.UNSUPPORTED,
    )


def _as_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, Mapping):
        raise InputError(f"A config is a PreTrainedConfig or its dict; got {type(config).__name__}.")
    from onnx_config.config_file import config_from_dict

    return config_from_dict(config)

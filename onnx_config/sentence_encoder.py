"""A sentence encoder as one module: the transformer, the pooling of its tokens, and what is done with the vector.

Computes what the modules of sentence-transformers compute on the same files, in operators that ONNX Runtime has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onnx_config.declarations import Declaration, OutputField, declare
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.model_source import ModelSource
from onnx_config.sentence_modules import SentenceModules, Stage, StageKind, pooling_modes
from onnx_config.task_detector import DetectedTask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from onnx_config.remote_code import RemoteCode

__all__ = ["SentenceEncoder", "SentenceEncoderSource"]

_TOKENS = "token_embeddings"
_SENTENCE = "sentence_embedding"
_OUTPUTS = (_TOKENS, _SENTENCE)
"""Names and order that optimum gives to the outputs of such a graph."""

_TASK = "feature-extraction"
_SMALLEST = 1e-9


class SentenceEncoder(torch.nn.Module):
    """A transformer and the modules after it; returns ``token_embeddings`` and ``sentence_embedding``."""

    def __init__(self, transformer: torch.nn.Module, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.transformer = transformer
        """Returns ``last_hidden_state`` of shape (batch_size, sequence_length, hidden_size)."""
        self.stages = torch.nn.ModuleList(_build_stage(stage) for stage in stages)
        """What follows, each from named tensors to named tensors."""

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.transformer.config

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """Return the tokens' vectors (batch_size, sequence_length, hidden_size) and the texts' (batch_size, size)."""
        tokens = self.transformer(**inputs).last_hidden_state
        mask = inputs.get("attention_mask")
        features = {_TOKENS: tokens}
        features["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64) if mask is None else mask
        for stage in self.stages:
            features = stage(features)
        return {name: features[name] for name in _OUTPUTS if name in features}


class _Pooling(torch.nn.Module):
    """One vector per text, or several one after the other."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        vectors = [_pooled(mode, features[_TOKENS], features["attention_mask"]) for mode in self.modes]
        return {**features, _SENTENCE: torch.cat(vectors, dim=-1)}


def _pooled(mode: str, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return (batch_size, hidden_size) of tokens (batch_size, sequence_length, hidden_size) that the mask keeps."""
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    match mode:
        case "cls":
            return _at(tokens, _first(attention_mask))
        case "lasttoken":
            numbers = _numbers(attention_mask, torch.int32)
            return _at(tokens * mask, (attention_mask.to(torch.int32) * numbers).argmax(dim=1))
        case "max":
            return tokens.masked_fill(mask == 0, float("-inf")).max(dim=1).values
        case "weightedmean":
            # Positions count from the first token that is no padding.
            numbers = _numbers(attention_mask, tokens.dtype) - _first(attention_mask).unsqueeze(-1)
            mask = mask * numbers.unsqueeze(-1)
    total = (tokens * mask).sum(dim=1)
    length = mask.sum(dim=1).clamp(min=_SMALLEST)
    return total / (torch.sqrt(length) if mode == "mean_sqrt_len_tokens" else length)


def _numbers(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 1, 2, 3, … for each row."""
    return torch.ones_like(attention_mask, dtype=torch.int64).cumsum(dim=1).to(dtype)


def _first(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each row's first token that is no padding."""
    # Not int64, for which ONNX Runtime had no ArgMax on every device.
    return attention_mask.to(torch.int32).argmax(dim=1)


def _at(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    index = positions[:, None, None].expand(-1, 1, tokens.shape[-1])
    return torch.gather(tokens, 1, index).squeeze(1)


class _Named(torch.nn.Module):
    """Changes one named tensor, or writes it under another name."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.source = str(settings.get("module_input_name") or _SENTENCE)
        self.target = str(settings.get("module_output_name") or self.source)

    def forward(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, self.target: self.changed(features[self.source])}

    def changed(self, value: torch.Tensor) -> torch.Tensor:
        return value


class _Normalize(_Named):
    def changed(self, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(value, p=2.0, dim=-1)


class _Dense(_Named):
    def __init__(self, stage: Stage) -> None:
        settings = stage.settings
        super().__init__(settings)
        sizes = _size(stage, "in_features"), _size(stage, "out_features")
        self.linear = torch.nn.Linear(*sizes, bias=bool(settings.get("bias", True)))
        self.activation = _activation(stage)
        self.residual: torch.nn.Module | None = None
        if settings.get("use_residual"):
            self.residual = torch.nn.Identity() if sizes[0] == sizes[1] else torch.nn.Linear(*sizes, bias=False)

    def changed(self, value: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.activation(self.linear(value))
        return made if self.residual is None else made + self.residual(value)


class _LayerNorm(_Named):
    def __init__(self, stage: Stage) -> None:
        super().__init__({})
        self.norm = torch.nn.LayerNorm(_size(stage, "dimension"))

    def changed(self, value: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(value)
        return normed


def _build_stage(stage: Stage) -> torch.nn.Module:
    match stage.kind:
        case StageKind.POOLING:
            return _Pooling(pooling_modes(stage))
        case StageKind.NORMALIZE:
            return _Normalize(stage.settings)
        case StageKind.DENSE:
            return _Dense(stage)
        case StageKind.LAYER_NORM:
            return _LayerNorm(stage)
        case StageKind.DROPOUT:
            # Off where nothing is trained.
            return _Named({})


def _size(stage: Stage, name: str) -> int:
    value = stage.settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"The config.json of the module {stage.path!r} has {name} {value!r}, where a whole number from 1 is "
            "needed. Restore the file from its source."
        )
    return value


def _activation(stage: Stage) -> torch.nn.Module:
    """Return the activation that a dense module names: a class of ``torch.nn`` without arguments."""
    name = stage.settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    if name is None:
        return torch.nn.Identity()
    package, _, last = str(name).rpartition(".")
    found = getattr(torch.nn, last, None)
    if package.split(".")[:2] != ["torch", "nn"] or not (
        isinstance(found, type) and issubclass(found, torch.nn.Module)
    ):
        raise ModelError(
            f"The module {stage.path!r} names the activation {name!r}, which is no module of torch.nn. "
            "No code of models runs.",
            kind=ErrorKind.UNSUPPORTED,
        )
    try:
        made: torch.nn.Module = found()
    except TypeError as error:
        raise ModelError(
            f"The module {stage.path!r} names the activation {name!r}, which needs arguments: {error}.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    return made


class SentenceEncoderSource(ModelSource):
    """A sentence encoder by the files of its folder."""

    def __init__(self, config: PreTrainedConfig, modules: SentenceModules, *, code: RemoteCode | None = None) -> None:
        """Describe the encoder, whose transformer is the model's own ``code`` where that has a class of models.

        Raises:
            ModelError: If transformers has no class for the transformer.
        """
        self.config = config
        self.modules = modules
        self.notes = modules.notes
        self._code = code if code is not None and code.has_models else None
        self.detected = DetectedTask(
            task=_TASK,
            family=_TASK,
            class_name=_transformer_class(config) if self._code is None else self._code.detect((), None).class_name,
            reason=f"modules.json of sentence-transformers lists {modules}",
        )

    @property
    def model_class(self) -> type:
        """The transformer's class.

        Raises:
            ModelError: If the installed transformers lacks it.
        """
        import transformers

        if self._code is not None:
            return self._code.model_class(self.detected.class_name)
        try:
            found: type = getattr(transformers, self.detected.class_name)
        except (AttributeError, ImportError, RuntimeError) as error:
            raise ModelError(
                f"The class {self.detected.class_name} cannot be imported from transformers: {error}.",
                kind=ErrorKind.UNSUPPORTED,
            ) from error
        return found

    def declare(self) -> Declaration:
        """Return what the transformer declares of its inputs, with the encoder's own outputs."""
        hidden = next((f.shape for f in declare(self.model_class).outputs if f.name == "last_hidden_state"), None)
        shapes = {
            _TOKENS: hidden or ("batch_size", "sequence_length", "hidden_size"),
            _SENTENCE: ("batch_size", "size"),
        }
        outputs = tuple(OutputField(name=n, shape=s, tensor=True, flag=None) for n, s in shapes.items())
        return replace(declare(self.model_class), outputs=outputs)

    def build(self, config: Any) -> torch.nn.Module:
        """Return the encoder without its weights; of a config with narrower tokens, one that takes those.

        Raises:
            InputError: If a module's settings are wrong.
            ModelError: If a module's activation is unknown.
            Exception: Whatever the transformer's class raises.
        """
        stages = self.modules.stages
        wide, narrow = (getattr(c, "hidden_size", None) for c in (self.config, config))
        if isinstance(wide, int) and isinstance(narrow, int) and wide != narrow:
            stages = _at_width(stages, narrow)
        return SentenceEncoder(self.model_class(config), stages)

    def load(self, folder: Path) -> torch.nn.Module:
        """Return the encoder with the weights of ``folder`` and of its modules' folders."""
        from onnx_config.export.checkpoint import load_model, load_state

        transformer = load_model(self.model_class, self.config, folder / self.modules.transformer)
        encoder = SentenceEncoder(transformer, self.modules.stages)
        for stage, module in zip(self.modules.stages, encoder.stages, strict=True):
            if list(module.parameters()):
                load_state(module, folder / stage.path)
        return encoder.eval()


def _at_width(stages: tuple[Stage, ...], hidden_size: int) -> tuple[Stage, ...]:
    """Return the stages for tokens of another width: what a layer takes follows, what it gives stays."""
    widths = {_TOKENS: hidden_size}
    changed = []
    for stage in stages:
        settings = dict(stage.settings)
        source = str(settings.get("module_input_name") or _SENTENCE)
        match stage.kind:
            case StageKind.POOLING:
                widths[_SENTENCE] = widths[_TOKENS] * len(pooling_modes(stage))
            case StageKind.DENSE:
                settings["in_features"] = widths.get(source, settings.get("in_features"))
                widths[str(settings.get("module_output_name") or source)] = _size(stage, "out_features")
            case StageKind.LAYER_NORM:
                settings["dimension"] = widths.get(source, settings.get("dimension"))
            case StageKind.NORMALIZE | StageKind.DROPOUT:
                pass
        changed.append(replace(stage, settings=settings))
    return tuple(changed)


def _transformer_class(config: PreTrainedConfig) -> str:
    """Return the class that sentence-transformers loads: the bare model, of an encoder-decoder its encoder."""
    from transformers.models.auto import modeling_auto

    encoder = getattr(modeling_auto, "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", {}).get(config.model_type)
    # The mapping also lists bare models; only those of T5's kind are cut out of a larger one.
    if isinstance(encoder, str) and encoder.endswith("EncoderModel"):
        return encoder
    if found := modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type):
        return found if isinstance(found, str) else str(found[0])
    raise ModelError(
        f"transformers has no bare model of type {config.model_type!r}, which modules.json asks for.",
        kind=ErrorKind.UNSUPPORTED,
    )

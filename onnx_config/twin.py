"""The twin of a model: the same class from the same config, made small enough to really run.

A class's declarations tell what it says about its inputs; running it tells what it does with them. A 70B model
cannot be run to ask, its twin can: few layers, narrow, a small vocabulary, and the same structure. Nothing here
knows a model type. What a value of the config means is read from its key in the field's own words (`_WIDTH` and the
other patterns below) and from equal values; whether the guess held is read from the class, which is built on the
meta device, counted, and its stacks of layers compared with those of the full model.

Everything that is tied to a width is divided by one number over the whole config, so that what was equal, a product
or a sum of widths stays so: ``hidden_size = heads * head_dim``, the text's width given again in the vision config.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from onnx_config.config_sizes import config_size, image_size
from onnx_config.errors import ErrorKind, ModelError
from onnx_config.module_state import forgotten_caches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["PARAMETER_BUDGET", "Twin", "default_config", "shrink", "twins"]

PARAMETER_BUDGET = 5_000_000
"""Parameters of a twin, at most; 20 MB of float32."""

_Values = dict[str, Any]

_MOST_PREFIX = 10
"""Layers kept from the front so that every kind remains; where more are needed, layers are picked instead."""

_SMALL_VOCABULARY = 320
"""Rows of the smallest of the tables that were cut; the next larger one gets 8 more, so that sizes tell them apart."""

_SMALLEST_CUT_VOCABULARY = 4096
"""Smaller tables stay: those of codecs are counted in by the ids of other parts of the model."""

_SMALL_POSITIONS = 512
_SMALLEST_WIDTH = 16
_SMALLEST_TIED_WIDTH = 64
"""A value whose key tells nothing is a width where it is at least this, and equal to one."""

_MOST_SPECIAL_IDS = 16
"""Longer lists of ids are no special tokens but what generation suppresses."""

_MOST_KINDS = 8
"""More kinds of layers in one stack are no kinds but something that grows from layer to layer."""

_MOST_MODELS_ASKED = 8
_MOST_ATTEMPTS = 30
_FEWEST_ATTEMPTS = 8
_MOST_MODULES_BUILT = 40_000
"""Over all attempts, if each were as large as the full model; a count, not a time, gives the same twin everywhere."""

_MOST_STEPS_BACK = 2
_TOLERATED = 8
"""A twin of up to so many budgets is preferred to one that fits and is not like the full model."""

_STEPS = (
    *((factor, False) for factor in (1, 2, 4, 8, 16, 32)),
    *((32, True), (64, False), (64, True)),
)
"""What widths are divided by, and whether tables of positions are cut too; the mildest first."""

_NO_SCOPE = re.compile(r"id2label|label2id|^rope_|quantization|task_specific|vocabulary_map|pruned_heads")
_DEPTH = re.compile(r"(^|_)(layers?|depth|blocks)(_per_stack)?$|^n_layers?$")
_NO_DEPTH = re.compile(
    r"conv|feat|adapter|iou|head_depth|kv_|_with|freq|share|window|every|interval|nextn|mtp|predict|group|per_|drop|"
    r"temporal_depth|pos|dense|hash|hidden_layers_to|norm|resnet|res_|residual|subsampl|image_depth|color"
)
_DEPTHS = re.compile(
    r"(^|_)depths?$|^(num_|n_)?(layers|blocks)$|blocks_per_stage|block_repeats$|stage_num\w*_(blocks|of_layers)$|"
    r"^(encoder|decoder|num_hidden)_layers$|^block_sizes$"
)
_INDEXES = re.compile(r"(index|indexes|indices|idx|idxs|layer_ids?|layer_idx|layers|_blocks|_at|hook_ids|return_idx)$")
_INDEXES_ONLY = re.compile(r"global|cross|indexes|attention_layers|moe_layers")
_DEPTH_FACTOR = re.compile(r"^depth_(coefficient|multiplier)$")
_NO_INDEXES = re.compile(r"token|^_?out_features$|expert|select|^num_|^n_")
_FEATURES = re.compile(r"out_|feature|deepstack|return|hook|extract|intermediate|target|proj|visual")
_LAYER_INDEX = re.compile(r"layer_(id|idx|index)$|feature_layers?$|layer_(start|end)_index$|_vision_layer$")
_LAYER_COUNT = re.compile(r"layers$|first_k_dense|(^|_)n_dense|dense_replace$|max_window_layers")
_LAST_LAYERS = re.compile(r"shared|last")
_VOCABULARY = re.compile(r"vocab|^n_words$|codebook_size|num_embeddings|num_(bpe|wordpiece)_labels|hash_buckets")
_TOKEN_ID = re.compile(r"(token_?(ids?|index|idx)|(start|end|bos|eos|pad|sep|unk|mask|patch|newline)_(id|index))$")
_POSITIONS = re.compile(r"position_embeddings$|n_positions$|max_(text_)?(seq_len|sequence_length|positions)$|n_ctx$")
_EXPERTS = re.compile(r"(^|_)(num|n)(_(local|routed|moe|sparse))?_experts$|^moe_num_experts$|^expert_num$")
_EXPERT_GROUPS = re.compile(r"^n_group$|^(num|n)_expert_groups?$")
_CHOSEN = re.compile(
    r"experts_per_tok(en)?$|experts_per_topk$|moe_top_?k$|^top_?k_experts$|moe_k$|^num_selected_experts$"
)
_HEADS = re.compile(r"(^|_)heads?(_kv|_per_(stage|layer))?$")
_HEAD_DIM = re.compile(r"head_?dims?$|dim_head$|^d_kv$|d_head$|head_size$|kv_channels$|size_per_head$|heads_dim$")
_GROUPS = re.compile(r"n_groups?$|ngroups$|mamba_num_groups$")
_WIDTH = re.compile(
    r"hidden|(^|_)dims?(_|$)|size|channel|rank|width|filter|planes|embd|units|inner|^d_|_d_ssm|dff|ffn|feedforward|"
    r"feats$|lowrank|d_latents|d_model"
)
_PROTECTED = re.compile(
    r"(image|img|^input|clip|video|query|beam|key_?frame)_?(size|shape|h|w|feat|height|width)s?$|patch(?!_embed)|"
    r"kernel|stride|window|mel(_|s$)|pool(_|ing|$)|roi|grid|crop|tile|position|vocab|codebook_size|batch|chunk|block_size|"
    r"context|state|seq|length|(^|_)(num|audio|image|img|input)_channels$|in_chans$|feature_size|sampling|sampl\w*_(rate|factor|size)|frame|hop|"
    r"fft|conv$|cache|merge|group_size|n_groups?$|shard|bucket|threshold|^(max|min)_|depth|label|time_|tempor|temper|period|scale(?!d)|factor|"
    r"ratio|eps|drop|bias|loss|cost|coefficient|prob|seed|token(?!_embed)|interval|top_?k|act_dim|feat_(dim|size)|"
    r"feature_sizes|visual_pos|levels|dilat|capacity|divis|rate|rope|num_hidden|hidden_act|posemb|multiplier|"
    r"num_hidden_layers|hidden_groups|layers|expan|local|overlap|fpn_(k|s|p)|d_conv|axes|reduction"
)
_TIED = re.compile(r"_(input|in)_(size|dim)$")
_COUNTED = re.compile(r"^(num|n|max|min|top)_(?!pos_feats)")
_ROPE_SECTIONS = re.compile(r"section|axes_dims?$")
_ROPE_FACTORS = re.compile(r"(short|long)_factor$")
_LAYER_NUMBER = re.compile(r"idx|index|layer_id|layer_number|name|block_id|^_|training|num_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A config of the same class as the one it was made from, and what differs between the two.

    >>> Twin(config=None, parameters=9, full_parameters=90, changes={"hidden_size": (4096, 128)}).to_full(128)
    4096
    """

    config: PreTrainedConfig
    """What to build: ``cls(twin.config)``. Nobody else holds it; building may write into it."""

    parameters: int
    """Parameters of the class built from `config`, shared ones counted once."""

    full_parameters: int | None
    """Parameters of the full model; ``None`` where the class cannot be counted without real tensors."""

    changes: Mapping[str, tuple[Any, Any]]
    """Dotted path in the config -> (value in the full config, value in the twin's); empty: the config was small."""

    alike: bool = True
    """Whether every kind of layer remains, and the simplest inputs are taken, or refused, at the same place as by the
    full model. Where not, `notes` say what is amiss, and `twins` had nothing better."""

    shallow: PreTrainedConfig | None = None
    """The full config with the twin's layers: as wide as the full model, and as soon run as it is shallow. ``None``
    where nothing was cut, or where the class takes no such config."""

    notes: tuple[str, ...] = ()
    """What was done, and what could not be kept, in sentences."""

    @property
    def is_full(self) -> bool:
        """Whether the twin is the model itself, since that is small already."""
        return not self.changes

    def to_full(self, size: int) -> int | None:
        """Return the size in the full model of a dimension that has ``size`` in the twin.

        ``None`` where no changed value of the config, or more than one, explains it. A size that did not change is
        explained by no change either: ask this only for a dimension that is neither an input's nor a label's.
        """
        if self.is_full:
            return size
        found = {
            old
            for path, change in self.changes.items()
            if not _TOKEN_ID.search(path)
            for old, new in _pairs(*change)
            if new == size
        }
        return found.pop() if len(found) == 1 else None


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default config of a model type of transformers, e.g. ``"bert"``.

    Raises:
        ModelError: ``unsupported``, where the type is unknown, or has no default that its own config class accepts;
            the message says which, in that class's words.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        raise ModelError(
            f"The default config of {model_type!r} was asked for; the installed transformers has no such model type. "
            "Upgrade transformers, or check the spelling.",
            kind=ErrorKind.UNSUPPORTED,
        ) from None
    try:
        config: PreTrainedConfig = config_class()
    # The config class's own code decides what it raises; whatever it is, it is the reason.
    except Exception as error:
        raise ModelError(
            f"The model type {model_type!r} has no default config: {config_class.__name__}() refuses with "
            f"{_words(error)}. Pass the config of a real model.",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    return config


def shrink(config: PreTrainedConfig, cls: type, *, budget: int = PARAMETER_BUDGET) -> Twin:
    """Return the twin of ``cls`` built from ``config``, with at most ``budget`` parameters where that can be had.

    Where it cannot, the twin is the smallest that the class can be built from, and `Twin.notes` says so. ``config``
    stays as it is. The same arguments give the same twin.

    Raises:
        ModelError: ``unsupported``, where the class cannot even be built from ``config``.
    """
    return next(twins(config, cls, budget=budget))


def twins(
    config: PreTrainedConfig,
    cls: type,
    *,
    budget: int = PARAMETER_BUDGET,
    model: torch.nn.Module | None = None,
    asked: bool = True,
) -> Iterator[Twin]:
    """Yield twins of ``cls`` built from ``config``: the one of `shrink` first, then ones that were cut otherwise.

    For a caller whose first twin can be built and refuses to run: what follows keeps more of the config, or cuts
    elsewhere. Each is found only when asked for, and has been built on the meta device.

    Args:
        config: The full config.
        cls: What is built from it.
        budget: Parameters that a twin may have.
        model: ``cls`` built from ``config``, where the caller has it already, without real weights.
        asked: Whether the full model and each twin are run on shapes alone, to see whether they answer alike. A
            caller that runs the twins anyway need not.

    Raises:
        ModelError: as `shrink`.
    """
    full = _build(config, cls, asked=_nobody) if model is None else _seen(model, asked=_nobody)
    if isinstance(full, Exception) and not _wants_real_tensors(full):
        raise _unbuildable(cls, full) from full
    if isinstance(full, _Built) and full.parameters <= budget:
        count = full.parameters
        yield Twin(config=copy.deepcopy(config), parameters=count, full_parameters=count, changes={})
        return
    rest: list[Twin] = []
    found = False
    known = full if isinstance(full, _Built) else None
    ladder = _Ladder(config, cls, full=known, budget=budget, asked=asked)
    for twin in ladder.twins():
        if twin.alike and twin.parameters <= budget:
            found = True
            yield twin
        else:
            rest.append(twin)
    if not found and not rest:
        error = full if isinstance(full, Exception) else RuntimeError("no smaller config of this class can be built")
        raise _unbuildable(cls, error) from error
    yield from sorted(rest, key=lambda twin: _rank(twin, budget))


def _nobody(_: int) -> bool:
    return False


def _everybody(_: int) -> bool:
    return True


def _unbuildable(cls: type, error: Exception) -> ModelError:
    return ModelError(
        f"{cls.__name__} was to be built from its config to learn its inputs; the class refuses with {_words(error)}. "
        "Correct the config, or install what the class asks for.",
        kind=ErrorKind.UNSUPPORTED,
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------------------------------------------------------
# Building and looking


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """What a class built on the meta device shows."""

    parameters: int
    empty: int
    """Parameters without a single number: a width was divided away."""

    modules: int
    stacks: Mapping[str, tuple[int, ...]]
    """Name of a list of layers -> kind of each, numbered by first appearance."""

    answers: Mapping[str, str]
    """Name of a model or of a model in it -> where in its code it refuses the simplest inputs; empty: it runs."""


def _build(config: PreTrainedConfig, cls: type, *, asked: Callable[[int], bool]) -> _Built | Exception:
    """Build a class on the meta device; return what it shows, or why it cannot be built.

    A model is asked for its answers where ``asked`` says so of its number of parameters.
    """
    import torch

    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = cls(config)
    # The class's own code decides what it raises; whatever it is, it is an answer.
    except Exception as error:  # noqa: BLE001
        return error
    return _seen(model, asked=asked)


def _seen(model: torch.nn.Module, *, asked: Callable[[int], bool]) -> _Built:
    """Return what a model that was built without real weights shows."""
    import torch

    parameters = sum(p.numel() for p in dict.fromkeys(model.parameters()))
    stacks = {
        name: _kinds(list(module.children()))
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1
    }
    answers = _answers(model) if asked(parameters) else {}
    return _Built(
        empty=sum(p.numel() == 0 for p in model.parameters()),
        parameters=parameters,
        modules=sum(1 for _ in model.modules()),
        stacks=stacks,
        answers=answers,
    )


def _answers(model: torch.nn.Module) -> dict[str, str]:
    """Return what a model says to the simplest inputs, on shapes alone; where it refuses, also the models in it.

    Most composite models want more than that, and refuse at the same place in the full size and in the twin's.
    """
    import torch

    answers: dict[str, str] = {}
    model.eval()
    with torch.no_grad(), torch.device("meta"), forgotten_caches(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ask(model, "", answers)
    return answers


def _ask(module: torch.nn.Module, name: str, answers: dict[str, str]) -> None:
    """Ask a module, where it is a model; where it is none, or refuses, ask those in it."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        if len(answers) >= _MOST_MODELS_ASKED:
            return
        answers[name] = _answer(module)
        if not answers[name]:
            return
    for child_name, child in module.named_children():
        _ask(child, f"{name}.{child_name}" if name else child_name, answers)


def _answer(model: Any) -> str:
    try:
        model(**_simple_inputs(model))
    # The class's own code decides what it raises; where it does is the answer.
    except Exception as error:  # noqa: BLE001
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}transformers{os.sep}" in f.filename]
        return (
            f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__
        )
    return ""


def _simple_inputs(model: Any) -> dict[str, torch.Tensor]:
    import torch

    size = image_size(model.config) or (224, 224)
    channels = config_size(model.config, "num_channels", "image") or 3
    bins = config_size(model.config, "feature_size", "audio") or 80
    known = {
        "input_ids": lambda: torch.ones(1, 16, dtype=torch.int64),
        "decoder_input_ids": lambda: torch.ones(1, 16, dtype=torch.int64),
        "pixel_values": lambda: torch.ones(1, channels, *size),
        "input_values": lambda: torch.ones(1, 16000),
        "input_features": lambda: torch.ones(1, bins, 3000),
    }
    wanted = inspect.signature(model.forward).parameters
    given = [name for name in known if name in wanted and name in (model.main_input_name, "decoder_input_ids")]
    return {name: known[name]() for name in given}


def _answers_alike(full: Mapping[str, str], small: Mapping[str, str]) -> bool:
    return all(small.get(name, answer) == answer for name, answer in full.items())


def _wants_real_tensors(error: Exception) -> bool:
    return "meta" in str(error).lower()


def _kinds(layers: list[torch.nn.Module]) -> tuple[int, ...]:
    """Return the kind of each layer, numbered by first appearance: what it is made of, shapes and settings."""
    kinds = _numbered([_fingerprint(layer, settings=(bool, int, str)) for layer in layers])
    if max(kinds) + 1 > max(_MOST_KINDS // 2, len(layers) // 2):
        # A number that grows from layer to layer (a dilation, say) tells no kinds apart.
        kinds = _numbered([_fingerprint(layer, settings=(bool, str)) for layer in layers])
    return kinds


def _numbered(values: Iterable[object]) -> tuple[int, ...]:
    seen: dict[object, int] = {}
    return tuple(seen.setdefault(value, len(seen)) for value in values)


def _fingerprint(layer: torch.nn.Module, *, settings: tuple[type, ...]) -> tuple[object, ...]:
    return tuple(
        (
            type(module).__name__,
            tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None),
            tuple(
                (name, value)
                for name, value in sorted(module.__dict__.items())
                if (value is None or isinstance(value, settings)) and not _LAYER_NUMBER.search(name)
            ),
        )
        for module in layer.modules()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The ladder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rung:
    """One way of making a config smaller."""

    depth: str
    """``prefix``: the first layers; ``picked``: some of them; ``full``: all."""

    vocabulary: bool = True
    experts: bool = True
    heads: str = "fewer"
    """``fewer``: their number is divided, as far as it goes, before their width; ``kept``: only their width is;
    ``wide``: only their number is, and what is left of the factor is not applied to them."""

    positions: bool = False
    factor: int = 1
    """What widths are divided by."""

    def __str__(self) -> str:
        said = {"prefix": "first layers", "picked": "picked layers", "full": "all layers"}[self.depth]
        parts = [said]
        parts += ["small vocabulary"] if self.vocabulary else []
        parts += ["few experts"] if self.experts else []
        parts += ["few positions"] if self.positions else []
        parts += [f"widths divided by {self.factor}"] if self.factor > 1 else []
        return ", ".join(parts)


_FAMILIES: tuple[Mapping[str, Any], ...] = (
    {},
    {"heads": "kept"},
    {"heads": "wide"},
    {"experts": False},
    {"vocabulary": False},
    {"vocabulary": False, "experts": False, "heads": "kept"},
)
"""Ways of cutting, the preferred one first; each is tried with every depth and factor."""


def _rank(twin: Twin, budget: int) -> tuple[int, int]:
    """Sort twins: those like the model first, also where they are somewhat large; then small ones; then by size."""
    if twin.alike and twin.parameters <= _TOLERATED * budget:
        return 0, twin.parameters
    return (1 if twin.parameters <= budget else 2), twin.parameters


class _Ladder:
    """Tries rungs, each once, until there were too many."""

    def __init__(self, config: PreTrainedConfig, cls: type, *, full: _Built | None, budget: int, asked: bool) -> None:
        self._config = config
        self._asked = asked
        if full is not None and asked:
            # As wide as the full model, and much sooner run; where the class takes no such config, the full one is.
            shallow = self._shallow(_Rung(depth=_depths_to_try(full)[0]), full)
            built = None if shallow is None else _build(shallow, cls, asked=_everybody)
            if not isinstance(built, _Built):
                built = _build(config, cls, asked=_everybody)
            full = replace(full, answers=built.answers) if isinstance(built, _Built) else full
        self._cls = cls
        self._full = full
        self._budget = budget
        self._tried: dict[str, Twin | None] = {}
        affordable = _MOST_MODULES_BUILT // full.modules if full else _MOST_ATTEMPTS
        self._most = min(_MOST_ATTEMPTS, max(_FEWEST_ATTEMPTS, affordable))

    def twins(self) -> Iterator[Twin]:
        """Yield what can be built, the preferred ways of cutting first; nothing twice."""
        seen: set[int] = set()
        for depth in _depths_to_try(self._full):
            for choice in _FAMILIES:
                for twin in self._of_family(_Rung(depth=depth, **choice)):
                    if id(twin) not in seen:
                        seen.add(id(twin))
                        yield twin

    def _of_family(self, family: _Rung) -> Iterator[Twin]:
        skipped: list[_Rung] = []
        best: Twin | None = None
        least: float = 1
        for factor, positions in _STEPS:
            rung = replace(family, factor=factor, positions=positions)
            # Parameters fall with the square of the factor at most, so that smaller factors need no try.
            if factor < least:
                skipped.append(rung)
                continue
            twin = self._try(rung)
            if twin is not None:
                yield twin
                best = twin
                if twin.parameters <= self._budget:
                    break
                least = math.sqrt(twin.parameters / self._budget) * factor / 2
            elif factor == 1:
                return
        if best is None or (best.alike and best.parameters <= self._budget):
            return
        # Where the larger factors cannot be built, or are unlike the model, a somewhat large twin is better.
        for rung in skipped[: -_MOST_STEPS_BACK - 1 : -1]:
            if (twin := self._try(rung)) is not None:
                yield twin
                if twin.alike:
                    return

    def _try(self, rung: _Rung) -> Twin | None:
        values = self._config.to_dict()
        _Cutter(values, self._full.stacks if self._full else {}, rung).cut()
        key = repr(values)
        if key not in self._tried and len(self._tried) < self._most:
            self._tried[key] = self._built(values, rung)
        return self._tried.get(key)

    def _built(self, values: _Values, rung: _Rung) -> Twin | None:
        config, full = self._config, self._full
        try:
            small = type(config).from_dict(values)
        # A validator of the config class refuses the combination: the next rung is tried.
        except Exception:  # noqa: BLE001
            return None
        for name in ("_attn_implementation", "_experts_implementation"):
            if (chosen := getattr(config, name, None)) is not None:
                setattr(small, name, chosen)
        built = _build(
            small, self._cls, asked=lambda parameters: self._asked and parameters <= _TOLERATED * self._budget
        )
        if isinstance(built, Exception) or built.empty > (full.empty if full else 0):
            return None
        notes = [f"Cut to {rung}."]
        if full:
            lost = [name for name, kinds in full.stacks.items() if _kinds_lost(kinds, built.stacks.get(name))]
            notes += [f"Not all kinds of layers of {name} remain." for name in lost]
            if self._asked and not _answers_alike(full.answers, built.answers):
                notes.append("The full model and this one do not say the same to the simplest inputs.")
        return Twin(
            config=small,
            parameters=built.parameters,
            full_parameters=full.parameters if full else None,
            changes=MappingProxyType(dict(_differences(config.to_dict(), small.to_dict()))),
            shallow=self._shallow(rung, self._full),
            alike=len(notes) == 1,
            notes=tuple(notes),
        )

    def _shallow(self, rung: _Rung, full: _Built | None) -> PreTrainedConfig | None:
        values = self._config.to_dict()
        rung = _Rung(depth=rung.depth, vocabulary=False, experts=False)
        _Cutter(values, full.stacks if full else {}, rung).cut()
        try:
            return type(self._config).from_dict(values)
        # A validator of the config class refuses it: the full model tells as well, only later.
        except Exception:  # noqa: BLE001
            return None


def _depths_to_try(full: _Built | None) -> tuple[str, ...]:
    needed = max((_prefix(kinds) for kinds in full.stacks.values()), default=2) if full else 2
    return ("picked", "prefix", "full") if needed > _MOST_PREFIX else ("prefix", "picked", "full")


def _kinds_lost(full: tuple[int, ...], small: tuple[int, ...] | None) -> bool:
    kinds = max(full) + 1
    return small is not None and 1 < kinds <= _MOST_KINDS and max(small) + 1 < kinds <= len(full) // 2


def _prefix(kinds: tuple[int, ...]) -> int:
    """Return how many of the first layers hold every kind."""
    return kinds.index(max(kinds)) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Cutting values


@dataclass(slots=True)
class _Scope:
    """One config of a composite one: its values, and how its layers were cut."""

    path: tuple[str, ...]
    values: _Values
    layers: int | None = None
    """Layers of the full model; ``None`` where this config has no stack of its own."""
    kept: tuple[int, ...] = ()
    """Layers that remain, by their number in the full model."""
    cut: set[str] = field(default_factory=set)
    """Keys of the numbers of layers that were cut."""


class _Cutter:
    """Makes the values of a config smaller in place, by one rung."""

    def __init__(self, values: _Values, stacks: Mapping[str, tuple[int, ...]], rung: _Rung) -> None:
        self._scopes = list(_scopes(values))
        self._stacks = stacks
        self._rung = rung

    def cut(self) -> None:
        if self._rung.depth != "full":
            for scope in self._scopes:
                self._cut_layers(scope)
            for scope in self._scopes:
                self._cut_indexes(scope)
        if self._rung.vocabulary:
            _cut_vocabulary(self._scopes)
        if self._rung.experts:
            for scope in self._scopes:
                _cut_experts(scope.values)
        if self._rung.positions:
            for scope in self._scopes:
                _cap(scope.values, _POSITIONS, _SMALL_POSITIONS)
        if self._rung.factor > 1:
            _cut_widths([scope.values for scope in self._scopes], self._rung)

    # Depth

    def _cut_layers(self, scope: _Scope) -> None:
        values = scope.values
        stages = {len(v) for k, v in values.items() if _DEPTHS.search(k) and _is_ints(v)}
        for key, value in values.items():
            if _is_ints(value) and _DEPTHS.search(key) and not _INDEXES_ONLY.search(key):
                scope.layers = scope.layers or sum(value)
                values[key] = [min(v, 2) for v in value]
            elif isinstance(value, float) and _DEPTH_FACTOR.search(key):
                values[key] = min(value, 1.0)
        if stages:
            scope.kept = tuple(range(sum(min(v, 2) for v in _first_depths(values))))
        for key in [k for k, v in values.items() if _is_count(v) and _DEPTH.search(k) and not _NO_DEPTH.search(k)]:
            layers = values[key]
            if layers in stages or layers < 3:
                continue
            kept = self._kept(scope, layers)
            values[key] = len(kept)
            scope.cut.add(key)
            if scope.layers is None or layers > scope.layers or key == "num_hidden_layers":
                scope.layers, scope.kept = layers, kept
            self._cut_lists(values, layers, kept)

    def _cut_lists(self, values: _Values, layers: int, kept: tuple[int, ...]) -> None:
        for key, value in values.items():
            if not isinstance(value, list) or len(value) != layers or re.search(r"conv|kernel|stride|stage", key):
                continue
            if _is_indexes(value, key) and value != list(range(layers)):
                continue
            chosen = [value[i] for i in kept]
            values[key] = list(range(len(kept))) if value == list(range(layers)) else chosen

    def _kept(self, scope: _Scope, layers: int) -> tuple[int, ...]:
        """Return which of ``layers`` layers remain, by number."""
        lists = [
            _numbered([repr(v) for v in value])
            for key, value in scope.values.items()
            if isinstance(value, list) and len(value) == layers and not _is_indexes(value, key)
        ]
        lists += [kinds for kinds in self._stacks.values() if len(kinds) == layers]
        lists = [kinds for kinds in lists if max(kinds) < _MOST_KINDS]
        needed = max([2, *map(_prefix, lists), *_features_wanted(scope.values, layers)])
        if self._rung.depth == "prefix":
            return tuple(range(min(needed, layers)))
        firsts = {kinds.index(kind) for kinds in lists for kind in set(kinds)}
        lasts = {layers - 1 - kinds[::-1].index(kind) for kinds in lists for kind in set(kinds)}
        chosen = firsts | {0, layers - 1} | (lasts if len(firsts | lasts) <= _MOST_PREFIX else set())
        for number in range(layers):
            if len(chosen) >= min(layers, max(4, *_features_wanted(scope.values, layers), 4)):
                break
            chosen.add(number)
        return tuple(sorted(chosen))

    def _cut_indexes(self, scope: _Scope) -> None:
        """Move the numbers of layers that a config names to layers that remain."""
        layers, kept = scope.layers, scope.kept
        if layers is None:
            inner = [s for s in self._scopes if s.layers and s.path[: len(scope.path)] == scope.path and s.path]
            inner.sort(key=lambda s: not any("vision" in name or "backbone" in name for name in s.path))
            if not inner:
                return
            layers, kept = inner[0].layers, inner[0].kept
        assert layers is not None
        if len(kept) >= layers:
            return
        values = scope.values
        for key, value in list(values.items()):
            if _is_indexes(value, key) and value and max(value) <= layers and value != list(range(len(kept))):
                values[key] = _moved(key, value, layers, kept)
            elif _is_int(value) and _LAYER_INDEX.search(key):
                values[key] = _moved_one(value, layers, kept)
            elif key not in scope.cut and _is_count(value) and _LAYER_COUNT.search(key) and value <= layers:
                first = layers - value if _LAST_LAYERS.search(key) else 0
                values[key] = max(1, sum(first <= number < first + value for number in kept))
        if "stage_names" in values and values.get("out_indices", values.get("_out_indices")):
            _rename_stages(values)


def _first_depths(values: _Values) -> list[int]:
    return next(v for k, v in values.items() if _DEPTHS.search(k) and _is_ints(v))


def _features_wanted(values: _Values, layers: int) -> list[int]:
    """Return how many layers hold as many features as are taken out of them."""
    return [
        min(layers, len(value) + 1)
        for key, value in values.items()
        if _is_indexes(value, key) and _FEATURES.search(key) and value and max(value) <= layers
    ]


def _is_indexes(value: object, key: str) -> TypeGuard[list[int]]:
    if not _INDEXES.search(key) or _NO_INDEXES.search(key) or not isinstance(value, list):
        return False
    return all(_is_int(v) for v in value) and value == sorted(set(value))


def _moved(key: str, indexes: list[int], layers: int, kept: tuple[int, ...]) -> list[int]:
    if not _FEATURES.search(key):
        return [new for new, old in enumerate(kept) if old in indexes]
    # As many features as before, from layers spread as before; one past the last is the last one's output.
    moved: list[int] = []
    for position, index in enumerate(indexes):
        if index < 0:
            moved.append(max(index, -len(kept)))
            continue
        highest = len(kept) - (0 if indexes[-1] == layers else 1) - (len(indexes) - 1 - position)
        lowest = moved[-1] + 1 if moved else 0
        moved.append(max(lowest, min(highest, index * len(kept) // layers)))
    return moved


def _moved_one(index: int, layers: int, kept: tuple[int, ...]) -> int:
    if index < 0:
        return max(index, -len(kept))
    if index < len(kept):
        return index
    return len(kept) if index >= layers else len(kept) - 1


def _rename_stages(values: _Values) -> None:
    """Drop the names of stages: the config class makes them again, from the depth and the indexes."""
    for key in ("stage_names", "out_features", "_out_features"):
        values.pop(key, None)
    if "_out_indices" in values:
        values["out_indices"] = values.pop("_out_indices")


# Vocabulary


def _cut_vocabulary(scopes: list[_Scope]) -> None:
    """Make big tables small, each size another one, and move the ids of special tokens into the smallest of them."""
    sizes = sorted(
        {
            v
            for scope in scopes
            for k, v in scope.values.items()
            if _VOCABULARY.search(k) and _is_count(v) and v > _SMALLEST_CUT_VOCABULARY
        }
    )
    if not sizes or any(isinstance(s.values.get("vocabulary_map"), dict) for s in scopes):
        return
    shared = [scope for scope in scopes if not _has_own_small_vocabulary(scope)]
    ids = {i for scope in shared for _, _, found in _token_ids(scope) for i in found}
    smallest = _SMALL_VOCABULARY
    while len(high := sorted(i for i in ids if i >= smallest - len(ids))) > smallest // 2:
        smallest *= 2
    moved = {old: smallest - len(high) + rank for rank, old in enumerate(high)}
    small = {old: smallest + 8 * rank for rank, old in enumerate(sizes)}
    for scope in scopes:
        if not _has_own_small_vocabulary(scope):
            for key, value, found in list(_token_ids(scope)):
                new = [moved.get(i, i) for i in found]
                scope.values[key] = new if isinstance(value, list) else new[0]
        for key, value in scope.values.items():
            if _VOCABULARY.search(key) and _is_count(value) and value in small:
                scope.values[key] = small[value]


def _has_own_small_vocabulary(scope: _Scope) -> bool:
    size = scope.values.get("vocab_size")
    return _is_count(size) and size <= _SMALLEST_CUT_VOCABULARY


def _token_ids(scope: _Scope) -> Iterator[tuple[str, object, list[int]]]:
    for key, value in scope.values.items():
        if not _TOKEN_ID.search(key):
            continue
        if _is_int(value) and value >= 0:
            yield key, value, [value]
        elif _is_ints(value) and 0 < len(value) <= _MOST_SPECIAL_IDS:
            yield key, value, list(value)


def _cap(values: _Values, pattern: re.Pattern[str], most: int) -> None:
    for key, value in values.items():
        if pattern.search(key) and _is_count(value):
            values[key] = min(value, most)


# Experts


def _cut_experts(values: _Values) -> None:
    """Keep enough experts for a choice among them, and for every group of them."""
    counts = {k: v for k, v in values.items() if _EXPERTS.search(k) and _is_count(v) and v > 4}
    if not counts:
        return
    groups = max((v for k, v in values.items() if _EXPERT_GROUPS.search(k) and _is_count(v)), default=1)
    chosen_keys = [k for k, v in values.items() if _CHOSEN.search(k) and (_is_count(v) or _is_ints(v))]
    for key in chosen_keys:
        value = values[key]
        values[key] = [min(v, 2) for v in value] if isinstance(value, list) else min(value, 2)
    for key, count in counts.items():
        values[key] = min(count, max(4, 2 * groups))


# Widths


def _cut_widths(scopes: list[_Values], rung: _Rung) -> None:
    """Divide everything that is as wide as something else by one number over all scopes."""
    factor = rung.factor
    strong = {v for values in scopes for k, value in values.items() if _is_width(k) for v in _numbers(value)}
    strong = {v for v in strong if v >= _SMALLEST_TIED_WIDTH}
    for values in scopes:
        fewer = 1 if rung.heads == "kept" else _head_factor(values, factor, least=1 if rung.heads == "wide" else 2)
        narrower = 1 if rung.heads == "wide" else factor // fewer
        for key, value in values.items():
            if _HEAD_DIM.search(key):
                values[key] = _mapped(value, partial(_divided, factor=narrower))
            elif _HEADS.search(key):
                values[key] = _mapped(value, partial(_divided_exactly, factor=fewer))
            elif _is_width(key):
                values[key] = _mapped(value, partial(_divided, factor=factor))
            elif key.startswith("rope_") and isinstance(value, dict):
                values[key] = _narrow_rope(value, narrower)
            elif not _PROTECTED.search(key) and not _COUNTED.search(key):
                values[key] = _mapped(value, partial(_divided, factor=factor, among=frozenset(strong)))


def _is_width(key: str) -> bool:
    others = (_PROTECTED, _HEADS, _HEAD_DIM, _TIED)
    return bool(_WIDTH.search(key)) and not any(other.search(key) for other in others)


def _is_heads(key: str) -> bool:
    return bool(_HEADS.search(key)) and not _HEAD_DIM.search(key)


def _head_factor(values: _Values, most: int, *, least: int) -> int:
    """Return what all numbers of heads of a config can be divided by: the ratios stay, and ``least`` heads of each."""
    counts = [v for key, value in values.items() if _is_heads(key) for v in _numbers(value) if v > 0]
    if not counts or min(counts) == 1:
        return 1
    groups = [values[k] for k in values if _GROUPS.search(k) and _is_count(values[k])]
    factor = 1
    while (
        factor * 2 <= most
        and all(count % (factor * 2) == 0 for count in counts)
        and min(counts) // (factor * 2) >= least
        and all(count // (factor * 2) % group == 0 for group in groups for count in counts if count % group == 0)
    ):
        factor *= 2
    return factor


def _divided_exactly(value: int, *, factor: int) -> int:
    return value if value % factor else value // factor


def _divided(value: int, *, factor: int, among: frozenset[int] | None = None) -> int:
    if value < _SMALLEST_WIDTH or factor == 1 or (among is not None and value not in among):
        return value
    if value % factor == 0:
        return value // factor
    # Not tied to anything that divides: as even as it was, for what is split in halves.
    step = math.gcd(value, 8)
    return -(-value // (factor * step)) * step


def _narrow_rope(rope: _Values, narrower: int) -> _Values:
    """Return rotary settings for heads ``narrower`` times as narrow: only what is counted in pairs of channels."""
    narrowed: _Values = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            narrowed[key] = _narrow_rope(value, narrower)
        elif _ROPE_SECTIONS.search(key) and _is_ints(value):
            narrowed[key] = _narrow_sections(value, narrower)
        elif _ROPE_FACTORS.search(key) and isinstance(value, list):
            narrowed[key] = value[: max(1, len(value) // narrower)]
        else:
            narrowed[key] = value
    return narrowed


def _narrow_sections(sections: list[int], narrower: int) -> list[int]:
    """Return sections with a ``narrower``-th of the sum; what does not divide goes to the one that has no equal."""
    narrowed = [v // narrower for v in sections]
    alone = next((i for i, v in enumerate(sections) if sections.count(v) == 1), 0)
    narrowed[alone] += sum(sections) // narrower - sum(narrowed)
    return narrowed


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _scopes(values: _Values, path: tuple[str, ...] = ()) -> Iterator[_Scope]:
    """Yield a config and the configs in it; dictionaries that are no configs (labels, rotary settings) left out."""
    yield _Scope(path, values)
    for key, value in values.items():
        if isinstance(value, dict) and not _NO_SCOPE.search(key) and all(isinstance(name, str) for name in value):
            yield from _scopes(value, (*path, key))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> TypeGuard[int]:
    return _is_int(value) and value > 0


def _is_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(_is_int(v) for v in value)


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif _is_int(value):
        yield value


def _mapped(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if _is_int(value):
        return change(value)
    return value


def _differences(full: Any, small: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(full, dict) and isinstance(small, dict):
        for key in sorted(full.keys() | small.keys(), key=str):
            yield from _differences(full.get(key), small.get(key), f"{path}.{key}" if path else str(key))
    elif full != small:
        yield path, (full, small)


def _pairs(full: object, small: object) -> Iterator[tuple[int, int]]:
    """Yield the changed integers of one value, item by item where it is a list that kept its length."""
    if isinstance(full, list) and isinstance(small, list) and len(full) == len(small):
        for old, new in zip(full, small, strict=True):
            yield from _pairs(old, new)
    elif isinstance(full, int) and isinstance(small, int) and full != small:
        yield full, small

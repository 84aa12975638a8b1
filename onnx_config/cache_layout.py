"""What a model keeps from step to step: its cache of keys, values and states, as graph inputs and outputs.

The layout is read from the cache object that a run with ``use_cache=True`` returns, by the names of what its layers
hold. Which axis is the past's shows when the inputs' sizes change; the sizes of the full model come from a run on
shapes alone. Keys and values carry the names that the ecosystem's loaders read, ``past_key_values.0.key`` and
``present.0.key``; the states of other layers are called as their layers call them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onnx_config.config_sizes import modality_of
from onnx_config.errors import ErrorKind, ModelError
from onnx_config.spec import ModelSpec, TensorSpec, base_axis

if TYPE_CHECKING:
    from onnx_config.declarations import Declaration
    from onnx_config.probe import Probe, ProbeResult
    from onnx_config.settlement import Settled
    from onnx_config.shape_inference import Inference
    from onnx_config.trial import Trial
    from onnx_config.twin import Twin

__all__ = [
    "DEFAULT_PAST_LENGTH",
    "KEY_OR_VALUE",
    "PAST_AXIS",
    "CacheLayout",
    "kept_part",
    "layer_number",
    "read_cache_layout",
    "with_past",
]

PAST_AXIS = "past_sequence_length"
"""Axis of the steps that are in the cache already."""

DEFAULT_PAST_LENGTH = 8
"""Steps in the cache of dummy inputs."""

KEY_OR_VALUE = re.compile(r"past_key_values\.(\d+)\.(key|value)")
"""Names of the inputs that hold what one layer attends to: number of the layer, and which."""

_KEPT = re.compile(r"past_key_values\.(\d+)\.(?!encoder\b|decoder\b)(\w+)(?:\.(\d+))?")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_PREFIX = "past_key_values"
_POSITIONS = "position_ids"
_TEXTS = ("input_ids", "inputs_embeds")
_PRESENT = "present"
_NAMES = {"keys": "key", "values": "value"}
_LAYERS = re.compile(r"layers?$|blocks?$|depth$")
_TELLING_SIZE = 8
"""Smaller numbers coincide in the config of a shrunken model, and are taken as they are."""


def kept_part(name: str) -> tuple[int, str, int | None] | None:
    """Return the layer that an input is kept by, what it is, and which of several such states.

    >>> kept_part("past_key_values.3.conv_states"), kept_part("past_key_values.3.conv_states.1")
    ((3, 'conv_states', None), (3, 'conv_states', 1))
    >>> kept_part("past_key_values.3.encoder.key")
    """
    found = _KEPT.fullmatch(name)
    return None if found is None else (int(found[1]), found[2], None if found[3] is None else int(found[3]))


def layer_number(path: str) -> int | None:
    """Return the first number in the path of a module.

    >>> layer_number("model.layers.3.mixer"), layer_number("model.norm")
    (3, None)
    """
    found = _NUMBER.search(f"{path}.")
    return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """What a model keeps from step to step.

    >>> key = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=("batch_size", 2, PAST_AXIS, 8))
    >>> CacheLayout(past=(key,), step_axis="sequence_length").present()[0].shape
    ('batch_size', 2, 'past_sequence_length + sequence_length', 8)
    """

    past: tuple[TensorSpec, ...] = ()
    """As inputs of a graph that continues, in the order of the layers; empty: the model keeps nothing."""

    step_axis: str | None = None
    """Axis of the inputs by which the past grows with each call; ``None``: none is seen to."""

    argument: str | None = None
    """Argument of ``forward`` that takes the cache."""

    notes: tuple[str, ...] = ()
    """What could not be read."""

    @property
    def sizes(self) -> dict[str, int]:
        """The cache's own axes -> their sizes in dummy inputs."""
        return self.sizes_at(DEFAULT_PAST_LENGTH)

    @property
    def axis_ranges(self) -> dict[str, tuple[int, int | None]]:
        """The cache's own axes -> smallest and largest size."""
        return dict.fromkeys(self.sizes, (0, None))

    def sizes_at(self, past_length: int) -> dict[str, int]:
        """Return the sizes of the cache's own axes after ``past_length`` steps."""
        return {PAST_AXIS: past_length} if any(PAST_AXIS in tensor.shape for tensor in self.past) else {}

    @property
    def is_carried(self) -> bool:
        """Whether a graph can take it and give it back: what grows with every step, and states of a fixed size."""
        # The other half of an encoder-decoder's cache is computed once, and is named otherwise.
        return bool(self.past) and all(self._is_carried(tensor) for tensor in self.past)

    def _is_carried(self, tensor: TensorSpec) -> bool:
        if kept_part(tensor.name) is None or not str(tensor.shape[0]).endswith("batch_size"):
            return False
        if PAST_AXIS in tensor.shape:
            return self.step_axis is not None
        fixed = all(isinstance(size, int) for size in tensor.shape[1:])
        return fixed and not KEY_OR_VALUE.fullmatch(tensor.name)

    def present(self, *, continued: bool = True) -> tuple[TensorSpec, ...]:
        """Return the cache after the call, as outputs.

        Args:
            continued: Whether the cache before the call is an input; ``False``: the call begins a sequence.
        """
        return tuple(
            replace(
                tensor,
                name=_PRESENT + tensor.name.removeprefix(_PREFIX),
                shape=tuple(self._present_axis(axis, continued=continued) for axis in tensor.shape),
            )
            for tensor in self.past
        )

    def _present_axis(self, axis: int | str, *, continued: bool) -> int | str:
        if axis != PAST_AXIS:
            return axis
        if self.step_axis is None:
            return PAST_AXIS.replace("past", _PRESENT, 1)
        return f"{PAST_AXIS} + {self.step_axis}" if continued else self.step_axis

    def extended(
        self, inputs: tuple[TensorSpec, ...], *, positions: bool = False, rows: int | None = None
    ) -> tuple[TensorSpec, ...]:
        """Return ``inputs`` as a call takes them that continues: masks cover the past too, and the past follows.

        With ``positions``, where a text's tokens stand is an input as well: what the mask hides of the past has taken
        none. Each token has as many as there are ``rows``; ``None``: one.
        """
        if not self.sizes or self.step_axis is None:
            return (*inputs, *self.past)
        longer = f"{PAST_AXIS} + {self.step_axis}"
        longest = [
            replace(t, shape=(*t.shape[:-1], longer))
            if t.name.endswith("attention_mask") and t.shape[-1:] == (self.step_axis,)
            else t
            for t in inputs
        ]
        names = [t.name for t in inputs]
        texts = [name for name in names if name in _TEXTS]
        if positions and _POSITIONS not in names and texts:
            text = longest[names.index(texts[0])]
            after = names.index("attention_mask") + 1 if "attention_mask" in names else len(names)
            shape = text.shape[:2] if rows is None else (rows, *text.shape[:2])
            longest.insert(after, TensorSpec(name=_POSITIONS, dtype="int64", shape=shape))
        return (*longest, *self.past)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One tensor of a cache."""

    part: str
    """``""``, or the half of an encoder-decoder's cache: ``"decoder"``, ``"encoder"``."""

    layer: int
    """Number of the layer."""

    attribute: str
    """What the layer calls it."""

    shape: tuple[int, ...]
    """Its sizes."""

    dtype: str
    """NumPy name of its elements' type."""

    window: int | None
    """Steps that its layer attends to at most; ``None``: all."""

    by_module: bool = False
    """Whether it is no part of a cache, but an attribute of a module of the model."""

    @property
    def name(self) -> str:
        """Name of the graph input."""
        return ".".join(p for p in (_PREFIX, str(self.layer), self.part, self.attribute) if p)

    @property
    def kind(self) -> tuple[str, str, int, bool]:
        """What tensors of other layers have in common with it."""
        return self.part, self.attribute, len(self.shape), self.window is not None


def with_past(spec: ModelSpec) -> ModelSpec:
    """Return the spec of the graph that takes the model's cache, continues from it and gives it back.

    Raises:
        ModelError: If the model keeps nothing, or states that no input carries (``unsupported``).
    """
    layout = CacheLayout(past=spec.cache, step_axis=spec.step_axis)
    if not layout.is_carried:
        what = f"keeps {', '.join(t.name for t in spec.cache[:3])}, …" if spec.cache else "keeps nothing"
        raise ModelError(
            f"A graph with a cache was asked for, and {spec.architecture} {what} from step to step. This version "
            "exports caches of keys and values and states of a fixed size only: leave -with-past out.",
            kind=ErrorKind.UNSUPPORTED,
        )
    return replace(
        spec,
        inputs=layout.extended(spec.inputs, positions=spec.takes_positions),
        outputs=(*spec.outputs, *layout.present()),
        axis_ranges={**spec.axis_ranges, **layout.axis_ranges},
        sizes={**spec.sizes, **layout.sizes},
    )


def read_cache_layout(declaration: Declaration, probe: Probe, settled: Settled) -> CacheLayout:
    """Return the layout of the cache of a class.

    Args:
        declaration: What the class declares.
        probe: The full model, to be run on shapes alone.
        settled: Its inputs, and the small models that accepted them.

    A class without a cache has an empty layout; what a run refuses is in the notes.
    """
    if not {"use_cache", _PREFIX} & {argument.name for argument in declaration.arguments}:
        return CacheLayout()
    found = settled.inference
    full = _Asked(declaration, found, probe)
    twin, trial = settled.twin, settled.trial
    asked = full if twin is None or trial is None else _Asked(declaration, found, trial, twin.config)
    sizes, other = dict(found.sizes), _other_sizes(found)
    here = asked.ask(sizes)
    if not here:
        return CacheLayout(notes=tuple(asked.notes))
    there = {held.name: held.shape for held in asked.ask(other)}
    # What a module holds and is no state was computed once for all rows.
    other_than_states = {h.attribute for h in here if h.by_module and there.get(h.name, h.shape)[0] == h.shape[0]}
    here = [held for held in here if held.attribute not in other_than_states or not held.by_module]
    moves = _Moves(sizes, other)
    seen: dict[tuple[str, str, int, bool], dict[int, str]] = {}
    for held in here:
        seen.setdefault(held.kind, moves.name_axes(held, there.get(held.name, held.shape)))
    at_full_size, notes = here, list(asked.notes)
    if twin is not None and not twin.is_full:
        at_full_size = _by_shallow_model(here, twin, settled.shallow, declaration, found) or full.ask(sizes)
        if not at_full_size:
            at_full_size = _translated(here, twin)
            notes += [*full.notes, "cache sizes are those of a shrunken model, translated"]
    past = []
    for held in at_full_size:
        if held.by_module and held.attribute in other_than_states:
            continue
        named = seen.get(held.kind, {})
        shape = [named.get(position, size) for position, size in enumerate(held.shape)]
        if held.window is not None:
            # What it has forgotten, its mask hides as well, so that it takes the whole past like the others. One that
            # was full at both sizes did not move.
            full_at = len(shape) - 2 if held.attribute in _NAMES.values() else None
            steps = [i for i, n in enumerate(shape) if n == PAST_AXIS or (i == full_at and n == held.window - 1)]
            if steps:
                moves.step_axis = moves.step_axis or moves.main_steps(held)
                shape = [PAST_AXIS if position in steps else size for position, size in enumerate(shape)]
        past.append(TensorSpec(name=held.name, dtype=held.dtype, shape=tuple(shape)))
    return CacheLayout(past=tuple(past), step_axis=moves.step_axis, argument=asked.argument, notes=tuple(notes))


def _other_sizes(found: Inference) -> dict[str, int]:
    """Return sizes at which what counts rows or steps is another size, each by another amount."""
    other, step = dict(found.sizes), 2
    for axis, size in found.sizes.items():
        largest = found.axis_ranges.get(axis, (1, None))[1]
        if axis.endswith("batch_size"):
            other[axis] = size + 1
        elif axis.endswith("sequence_length"):
            step += 1
            other[axis] = size + step if largest is None or size + step <= largest else max(1, size - step)
    return other


class _Moves:
    """Which axis of a cache moves with which axis of the inputs."""

    def __init__(self, sizes: Mapping[str, int], other: Mapping[str, int]) -> None:
        self._moved = {axis: (size, other[axis]) for axis, size in sizes.items() if other[axis] != size}
        self.step_axis: str | None = None

    def name_axes(self, held: _Held, there: tuple[int, ...]) -> dict[int, str]:
        """Return position -> axis of what moved; ``there`` is the shape at the other sizes."""
        named: dict[int, str] = {}
        for position, pair in enumerate(zip(held.shape, there, strict=False)):
            if pair[0] == pair[1]:
                continue
            axis = next((a for a, moved in self._moved.items() if moved == pair), None)
            rows = self._multiple_of_rows(pair) if axis is None else axis if axis.endswith("batch_size") else None
            if rows is not None:
                named[position] = rows
            elif held.part == "encoder":
                named[position] = axis or "encoder_sequence_length"
            else:
                named[position] = PAST_AXIS
                self.step_axis = self.step_axis or axis or self.main_steps(held)
        return named

    def _multiple_of_rows(self, pair: tuple[int, int]) -> str | None:
        for axis, (size, other) in self._moved.items():
            factor, rest = divmod(pair[0], size)
            if axis.endswith("batch_size") and not rest and factor > 1 and factor * other == pair[1]:
                return f"{factor}*{base_axis(axis)}"
        return None

    def main_steps(self, held: _Held) -> str | None:
        steps = [axis for axis in self._moved if axis.endswith("sequence_length")]
        wanted = "decoder_sequence_length" if held.part == "decoder" else "sequence_length"
        return wanted if wanted in steps else None


class _Asked:
    """A model that is run with its cache on."""

    def __init__(self, declaration: Declaration, found: Inference, runner: Probe | Trial, config: Any = None) -> None:
        """Ask ``runner``, built from ``config``, which only real values are made with."""
        self._declaration, self._found, self._runner, self._config = declaration, found, runner, config
        self.argument: str | None = None
        self.notes: list[str] = []
        self._hidden = False

    def ask(self, sizes: Mapping[str, int]) -> list[_Held]:
        """Return what the cache holds after one call at ``sizes``; empty where it holds nothing."""
        held: list[_Held] = []
        given: list[Any] = []
        arguments = {argument.name for argument in self._declaration.arguments}

        def look(_: Any, __: Any, returned: Any) -> None:
            for name, value in returned.items() if hasattr(returned, "items") else ():
                if name in arguments and not held and (found := list(_held(value, name))):
                    held.extend(found)
                    self.argument = name
            by_modules = list(_held_by_modules(self._runner.model))
            if not held and by_modules and given:
                # Filled, and not among what is returned.
                held.extend(_held(given[0], _PREFIX))
                self.argument = _PREFIX
            if held:
                held.extend(by_modules)
                held.sort(key=lambda tensor: tensor.layer)
            self._hidden = bool(by_modules)

        def give(_: Any, arguments_given: Any, options: dict[str, Any]) -> Any:
            given.append(_new_cache(self._runner.model))
            return arguments_given, {**options, _PREFIX: given[0]}

        answer = self._run(sizes, held, look)
        if answer.outputs is not None and not held and self._hidden and _PREFIX in arguments:
            with self._runner.model.register_forward_pre_hook(give, with_kwargs=True):
                answer = self._run(sizes, held, look)
        if answer.outputs is None:
            self.notes.append(f"a run with the cache on was refused: {answer.refusal}"[:300])
            return []
        return held

    def _run(self, sizes: Mapping[str, int], held: list[_Held], look: Callable[[Any, Any, Any], None]) -> ProbeResult:
        from onnx_config.probe import Probe

        with self._runner.model.register_forward_hook(look):
            if isinstance(self._runner, Probe):
                shapes = {t.name: (t.resolve(sizes), t.dtype) for t in self._found.inputs}
                answer = self._runner.run(shapes, use_cache=True)
                if answer.undecidable and self._found.values:
                    # Where images go into a text shows in values only; texts alone leave the same cache.
                    held.clear()
                    texts = {name: s for name, s in shapes.items() if modality_of(name) == "text"}
                    answer = self._runner.run(texts, use_cache=True)
            else:
                answer = self._runner.run(self._arrays(sizes), use_cache=True)
        return answer

    def _arrays(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        from onnx_config.input_generator import generate_inputs

        return generate_inputs(self._found.inputs, self._config, self._declaration, sizes, rules=self._found.values)


def _held(cache: Any, argument: str) -> Iterator[_Held]:
    """Yield what a cache holds, layer by layer; nothing where it is no cache.

    Args:
        cache: What came back under the name of an argument that was not given.
        argument: That name; what a cache that is a plain list of tensors is called.
    """
    if isinstance(cache, (list, tuple)):
        for number, value in enumerate(cache):
            yield from _described({argument: value}, "", number)
        return
    halves = getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)
    if halves[0] is None:
        yield from _layers(cache, "")
        return
    crossed = list(_layers(halves[1], "encoder"))
    own = list(_layers(halves[0], "decoder" if crossed else ""))
    # One layer after the other, what the decoder keeps of itself first: the order of the ecosystem's loaders.
    yield from sorted([*own, *crossed], key=lambda held: (held.layer, held.part))


def _held_by_modules(model: Any) -> Iterator[_Held]:
    """Yield what the modules of numbered layers hold themselves, in attributes that are neither weights nor buffers.

    A model without such states has none but for what it computed once and for all, which no batch is an axis of.
    """
    for path, module in model.named_modules():
        if (number := layer_number(path)) is not None:
            yield from (replace(held, by_module=True) for held in _described(vars(module), "", number))


def _new_cache(model: Any) -> Any:
    """Return the cache that transformers' own ``generate`` begins with."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _layers(cache: Any, part: str) -> Iterator[_Held]:
    layers = getattr(cache, "layers", None)
    if layers is not None:
        for number, layer in enumerate(layers):
            yield from _described(vars(layer), part, number)
        return
    # A cache of a model's own: one dictionary per kind of state, by the number of the layer.
    for name, value in vars(cache).items() if hasattr(cache, "__dict__") else ():
        if isinstance(value, dict):
            for number, states in value.items():
                if isinstance(number, int):
                    yield from _described({name: states}, part, number)


def _described(attributes: Mapping[str, Any], part: str, number: int) -> Iterator[_Held]:
    window = attributes.get("sliding_window")
    for attribute, value in _tensors(attributes):
        yield _Held(
            part=part,
            layer=number,
            attribute=attribute,
            shape=tuple(int(size) for size in value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            window=window if isinstance(window, int) and window > 1 else None,
        )


def _tensors(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a layer holds under the layer's own names: keys and values first, then its states."""
    import torch

    for name, value in sorted(attributes.items(), key=lambda item: item[0] not in _NAMES):
        if name.startswith("_"):
            continue
        many = value if isinstance(value, dict) else dict(enumerate(value if isinstance(value, tuple) else [value]))
        filled = {k: v for k, v in many.items() if isinstance(v, torch.Tensor) and v.ndim > 1}
        for key, tensor in filled.items():
            called = _NAMES.get(name, name)
            yield (called if len(filled) == 1 else f"{called}.{key}"), tensor


def _by_shallow_model(
    here: list[_Held], twin: Twin, shallow: Callable[[], Probe] | None, declaration: Declaration, found: Inference
) -> list[_Held]:
    """Return the cache of the full model by one of its width and the twin's depth; empty where layers differ."""
    count = _full_count(here, twin)
    if count is None or shallow is None or twin.shallow is None:
        return []
    try:
        asked = _Asked(declaration, found, shallow())
    # What the class raises when it cannot be built shallow is its own choice; the full model was built.
    except Exception:  # noqa: BLE001
        return []
    wide = asked.ask(found.sizes)
    if [(held.name, len(held.shape)) for held in wide] != [(held.name, len(held.shape)) for held in here]:
        return []
    first = wide[: sum(held.layer == wide[0].layer for held in wide)]
    if len({(held.kind, held.shape, held.window) for held in wide}) != len(first):
        return []
    return [replace(held, layer=number) for number in range(count) for held in first]


def _full_count(here: list[_Held], twin: Twin) -> int | None:
    """Return how many layers of the full model have a cache; ``None`` where layers differ, or the config is unclear."""
    layers = len({held.layer for held in here})
    alike = {(held.kind, held.shape, held.window) for held in here}
    if len(here) != layers * len(alike):
        return None
    counts = {old for path, (old, new) in twin.changes.items() if _LAYERS.search(path) and new == layers}
    if len(counts) != 1 or _unchanged_counts(twin.config.to_dict(), "", twin, layers):
        return None
    count = counts.pop()
    return count if isinstance(count, int) else None


def _unchanged_counts(values: Mapping[str, Any], path: str, twin: Twin, layers: int) -> bool:
    """Return whether a config also holds a number of layers that equals the twin's and was not cut."""
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            if _unchanged_counts(value, here, twin, layers):
                return True
        elif value == layers and _LAYERS.search(here) and here not in twin.changes:
            return True
    return False


def _translated(here: list[_Held], twin: Twin) -> list[_Held]:
    """Return the cache of the full model by what was shrunk, where the full model cannot be asked."""

    def full(size: int) -> int:
        return size if size < _TELLING_SIZE else twin.to_full(size) or size

    count = _full_count(here, twin)
    if count is not None:
        first = [held for held in here if held.layer == here[0].layer]
        here = [replace(held, layer=number) for number in range(count) for held in first]
    return [replace(held, shape=tuple(full(size) for size in held.shape)) for held in here]

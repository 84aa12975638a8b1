"""From declared shapes to graph inputs and outputs with fixed sizes and named, tied axes.

Sizes that the config fixes become numbers; the rest become axis names. The proposal is then put to
a probe: where the model refuses, its own words say what to change; where it accepts, one axis at a
time is varied, and an output size that moves with an axis is tied to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onnx_config.config_sizes import config_size, image_size, longest, modality_of
from onnx_config.declarations import Argument, Declaration
from onnx_config.preprocessors import Preprocessor
from onnx_config.proposal import propose_inputs
from onnx_config.refusals import asked_for, is_one_row_only, is_too_small, wrong_sizes
from onnx_config.spec import TensorSpec

if TYPE_CHECKING:
    from onnx_config.probe import Probe, ProbeResult

__all__ = ["DEFAULT_SIZES", "Inference", "infer"]

DEFAULT_SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "text_batch_size": 2,
    "image_batch_size": 3,
    "audio_batch_size": 3,
    "sequence_length": 16,
    "decoder_sequence_length": 12,
    "num_choices": 4,
    "height": 96,
    "width": 128,
}
"""Sizes at which dummy inputs are made and graphs are traced, in elements. No two axes of one model share
a size that a trace could confuse, and none is 1."""

_OTHER_SIZE = 6
_RAW_AUDIO_LENGTH = 4000
_MAX_ATTEMPTS = 12
_MAX_GROWTH = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What is known about a model's graph after asking."""

    inputs: tuple[TensorSpec, ...]
    """In the order of ``forward``."""

    outputs: tuple[TensorSpec, ...]
    """In the order of the output class."""

    axis_ranges: Mapping[str, tuple[int, int | None]]
    """Dynamic axis -> smallest and largest size."""

    sizes: Mapping[str, int]
    """Dynamic axis -> the size at which the model accepts its inputs."""

    learned: tuple[str, ...] = ()
    """What the class said when it was run."""

    assumed: tuple[str, ...] = ()
    """What could not be settled by running it."""


def infer(
    declaration: Declaration,
    config: Any,
    preprocessors: Sequence[Preprocessor],
    probe: Probe | None,
    *,
    task_family: str,
    flags: Mapping[str, Any],
) -> Inference:
    """Return inputs, outputs and axes of the class behind ``declaration``.

    Args:
        declaration: What the class declares.
        config: Its config.
        preprocessors: What its users feed it with.
        probe: The class without weights; ``None``: nothing is run, and shapes are as documented.
        task_family: The family of the task.
        flags: Further keyword arguments of ``forward``, such as ``use_cache=False``.
    """
    names = list(propose_inputs(declaration, config, preprocessors, task_family=task_family))
    draft = _Draft(declaration, config, names, probe)
    if probe is None:
        return draft.finish(_documented_outputs(declaration, config, names), ("nothing was run: shapes as documented",))
    result = draft.settle(probe, flags)
    if result.undecidable:
        result = draft.without_masks(probe, flags) or result
    if result.outputs is None:
        why = "depends on values" if result.undecidable else "was refused"
        note = f"a run on shapes alone {why}: {result.refusal}"[:400]
        return draft.finish(_documented_outputs(declaration, config, names), (note,))
    return draft.vary(probe, result, flags)


class _Draft:
    """Input shapes while they are being settled."""

    def __init__(self, declaration: Declaration, config: Any, names: Iterable[str], probe: Probe | None) -> None:
        self.declaration = declaration
        self.config = config
        self.unused_positions = probe.offset_position_tables if probe is not None else {}
        self.specs: dict[str, TensorSpec] = {}
        self.sizes: dict[str, int] = {}
        self.smallest: dict[str, int] = {}
        self.notes: list[str] = []
        self.split_batch = any("image_batch_size" in (f.shape or ()) for f in declaration.outputs)
        self.text_shape, self.text_axis = _text_shape(declaration)
        for name in names:
            self.add(name)
        self._place_images()

    def add(self, name: str) -> None:
        argument = self.declaration.argument(name)
        if argument is None:
            raise KeyError(name)
        shape = tuple(self._axis(name, axis) for axis in self._documented_shape(argument))
        self.specs[name] = TensorSpec(name=name, dtype=_dtype_of(argument), shape=shape)
        order = [a.name for a in self.declaration.arguments]
        self.specs = dict(sorted(self.specs.items(), key=lambda item: order.index(item[0])))
        for axis in self.specs[name].axes.values():
            largest = self._largest(axis, name)
            start = self._start_size(name, axis)
            self.sizes.setdefault(axis, start if largest is None else max(1, min(start, largest)))

    def _documented_shape(self, argument: Argument) -> tuple[int | str, ...]:
        plain = ("batch_size", "sequence_length")
        # The tokenizer makes its outputs in one shape; the common docstring of masks knows only two axes.
        text = modality_of(argument.name) == "text" and not argument.name.startswith("decoder_")
        if text and self.text_shape and (argument.name == "input_ids" or argument.shape in (None, plain)):
            return self.text_shape
        if argument.shape is not None:
            return tuple("sequence_length" if text and axis == self.text_axis else axis for axis in argument.shape)
        if argument.name.startswith("decoder_"):
            return ("batch_size", "decoder_sequence_length")
        match modality_of(argument.name):
            case "image":
                return ("batch_size", "num_channels", "height", "width")
            case _:
                return plain

    def _axis(self, name: str, axis: int | str) -> int | str:
        if isinstance(axis, int):
            return axis
        if axis == "batch_size" and self.split_batch:
            return f"{modality_of(name)}_batch_size"
        modality = modality_of(name)
        if axis.endswith("batch_size") or axis in ("sequence_length", "decoder_sequence_length", "num_choices"):
            if modality == "time" and axis == "sequence_length":
                return config_size(self.config, "context_length", modality) or axis
            return axis
        if axis in ("image_size", "height", "width", "patch_size"):
            return axis
        return config_size(self.config, axis, modality) or axis

    def _start_size(self, name: str, axis: str) -> int:
        if axis == "sequence_length" and name == "input_values" and len(self.specs[name].shape) == 2:
            return _RAW_AUDIO_LENGTH
        return DEFAULT_SIZES.get(axis, _OTHER_SIZE)

    def shapes(self, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
        sizes = self.sizes if sizes is None else sizes
        return {name: (spec.resolve(sizes), spec.dtype) for name, spec in self.specs.items()}

    def settle(self, probe: Probe, flags: Mapping[str, Any]) -> ProbeResult:
        """Propose, and change what the model says is wrong, until it accepts or says nothing new."""
        result = probe.run(self.shapes(), **flags)
        for _ in range(_MAX_ATTEMPTS):
            if result.outputs is not None or result.undecidable or result.refusal is None:
                break
            if not self._learn(result.refusal):
                break
            result = probe.run(self.shapes(), **flags)
        return result

    def without_masks(self, probe: Probe, flags: Mapping[str, Any]) -> ProbeResult | None:
        """Leave out the optional masks if sizes depend on values only through them; ``None``: they do not."""
        optional = {a.name for a in self.declaration.arguments if not a.required} - {self.declaration.main_input}
        masks = [name for name in self.specs if name.endswith("mask") and name in optional]
        specs = self.specs
        self.specs = {name: spec for name, spec in specs.items() if name not in masks}
        result = self.settle(probe, flags) if masks else None
        if result is None or result.outputs is None:
            self.specs = specs
            return None
        self.notes += [f"{name} was left out since sizes would depend on its values" for name in masks]
        return result

    def _place_images(self) -> None:
        """Give image axes their names, and the size that the config declares."""
        for name, spec in list(self.specs.items()):
            sides = [i for i, axis in enumerate(spec.shape) if axis in ("image_size", "height", "width", "patch_size")]
            if len(sides) != 2:
                continue
            shape = list(spec.shape)
            shape[sides[0]], shape[sides[1]] = "height", "width"
            self.specs[name] = replace(spec, shape=tuple(shape))
            declared = image_size(self.config)
            self.sizes["height"], self.sizes["width"] = declared or (DEFAULT_SIZES["height"], DEFAULT_SIZES["width"])

    def _learn(self, refusal: str) -> bool:
        """Change the draft by what ``refusal`` says; return whether anything was changed."""
        if any(self._fix_size(got, want) for got, want in wrong_sizes(refusal)):
            return True
        for name in asked_for(refusal, self.declaration):
            if name not in self.specs:
                self.add(name)
                self.notes.append(f"{name} was added since the model asks for it")
                return True
        if is_one_row_only(refusal) and (batches := [a for a in self.sizes if a.endswith("batch_size")]):
            for axis in batches:
                self.sizes[axis] = 1
                self._freeze(axis)
                del self.sizes[axis]
            self.notes.append(f"the batch is fixed at one row: {refusal}"[:300])
            return True
        if is_too_small(refusal):
            return self._grow()
        return False

    def _fix_size(self, got: int, want: int) -> bool:
        """Fix the one axis that has size ``got`` to ``want``."""
        if got == want:
            return False
        for name, spec in self.specs.items():
            for position, axis in enumerate(spec.shape):
                size = axis if isinstance(axis, int) else self.sizes[axis]
                if size == got and position > 0:
                    shape = list(spec.shape)
                    shape[position] = want
                    self.specs[name] = replace(spec, shape=tuple(shape))
                    return True
        return False

    def _grow(self) -> bool:
        main = self.specs.get(self.declaration.main_input)
        if main is None:
            return False
        axes = [a for a in main.axes.values() if not a.endswith("batch_size")]
        if not axes or max(self.sizes[a] for a in axes) * 4 > _MAX_GROWTH:
            return False
        for axis in axes:
            self.sizes[axis] *= 4 if len(axes) == 1 else 2
        return True

    def vary(self, probe: Probe, base: ProbeResult, flags: Mapping[str, Any]) -> Inference:
        """Vary one axis at a time: which inputs may move, and which outputs move with them."""
        moved: dict[str, tuple[int, Mapping[str, tuple[tuple[int, ...], str]]]] = {}
        ranges = self.ranges()
        if base.outputs is None:
            raise ValueError("vary needs a run that returned")
        for axis in sorted({a for spec in self.specs.values() for a in spec.axes.values()}):
            size = _another_size(axis, self.sizes[axis], ranges[axis][1])
            result = probe.run(self.shapes({**self.sizes, axis: size}), **flags) if size else None
            if result is not None and result.outputs is not None:
                moved[axis] = (size or 0, result.outputs)
                continue
            self._freeze(axis)
            if result is not None and not result.undecidable:
                self.notes.append(f"{axis} is fixed at {self.sizes[axis]}: {result.refusal}"[:300])
        self._find_smallest(probe, list(moved), flags)
        taken: dict[str, tuple[int, ...]] = {}
        outputs = tuple(
            TensorSpec(
                name=name, dtype=dtype, shape=_tie(name, shape, moved, self.sizes, self._symbols(name), taken=taken)
            )
            for name, (shape, dtype) in base.outputs.items()
            if _is_kept(name, self.declaration, self.config, self.specs)
        )
        return self.finish(outputs, ())

    def _find_smallest(self, probe: Probe, axes: Sequence[str], flags: Mapping[str, Any]) -> None:
        """Find the smallest size of each axis at which the model accepts its inputs."""

        def accepts(**sizes: int) -> bool:
            result = probe.run(self.shapes({**self.sizes, **sizes}), **flags)
            return result.outputs is not None or result.undecidable

        if not axes or accepts(**dict.fromkeys(axes, 1)):
            self.smallest.update(dict.fromkeys(axes, 1))
            return
        guess = 1
        for axis in axes:
            # Height and width, say, mostly have one limit.
            if guess > 1 and accepts(**{axis: guess}) and not accepts(**{axis: guess - 1}):
                self.smallest[axis] = guess
                continue
            self.smallest[axis] = guess = self._bisect(axis, accepts)

    def _bisect(self, axis: str, accepts: Callable[..., bool]) -> int:
        if accepts(**{axis: 1}):
            return 1
        refused, accepted = 1, self.sizes[axis]
        while accepted - refused > 1:
            middle = (refused + accepted) // 2
            refused, accepted = (refused, middle) if accepts(**{axis: middle}) else (middle, accepted)
        return accepted

    def _symbols(self, name: str) -> tuple[int | str, ...] | None:
        return next((f.shape for f in self.declaration.outputs if f.name == name), None)

    def _freeze(self, axis: str) -> None:
        for name, spec in self.specs.items():
            shape = tuple(self.sizes[axis] if a == axis else a for a in spec.shape)
            self.specs[name] = replace(spec, shape=shape)

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        return {
            axis: (self.smallest.get(axis, 1), self._largest(axis, spec.name))
            for spec in self.specs.values()
            for axis in spec.axes.values()
        }

    def _largest(self, axis: str, name: str) -> int | None:
        declared = longest(self.config, axis, name)
        return None if declared is None else declared - self.unused_positions.get(declared, 0)

    def finish(self, outputs: tuple[TensorSpec, ...], assumed: tuple[str, ...]) -> Inference:
        used = {a for spec in self.specs.values() for a in spec.axes.values()}
        return Inference(
            inputs=tuple(self.specs.values()),
            outputs=outputs,
            axis_ranges={a: r for a, r in self.ranges().items() if a in used},
            sizes={a: s for a, s in self.sizes.items() if a in used},
            learned=tuple(self.notes),
            assumed=assumed,
        )


def _text_shape(declaration: Declaration) -> tuple[tuple[int | str, ...] | None, str | None]:
    """Return the shape of a tokenizer's outputs, and the name that ``input_ids`` documents for its last axis."""
    main = declaration.argument("input_ids")
    if main is None or not main.shape or not isinstance(main.shape[-1], str):
        return (main.shape if main is not None else None), None
    shape = (*main.shape[:-1], "sequence_length")
    # Some multiple-choice heads document their choices in the output only.
    if len(shape) == 2 and any("num_choices" in (f.shape or ()) for f in declaration.outputs):
        shape = (shape[0], "num_choices", shape[1])
    return shape, main.shape[-1]


def _dtype_of(argument: Argument) -> str:
    name = argument.name
    # The annotations of some vision models say LongTensor for pixels.
    if re.search(r"^pixel_values|^input_(features|values)$|_values$|embeds$", name):
        return "float32"
    if argument.dtype is not None:
        return argument.dtype
    if re.search(r"_ids$|mask$|^bbox$|_positions?$", name):
        return "int64"
    return "float32"


def _another_size(axis: str, size: int, largest: int | None) -> int | None:
    """Return a second size for an axis, by which an output's dependence shows; ``None`` if there is no room."""
    other = size * 3 // 2 if axis in ("height", "width") or size > 1000 else size + 5 if size > 5 else size + 1
    if axis in ("height", "width"):
        # A multiple of 32, the usual product of a vision model's strides.
        other = max(32, other // 32 * 32)
        other = other + 32 if other == size else other
    if largest is not None and other > largest:
        other = size - 1
    return other if other >= 1 else None


def _tie(
    name: str,
    shape: tuple[int, ...],
    moved: Mapping[str, tuple[int, Mapping[str, tuple[tuple[int, ...], str]]]],
    sizes: Mapping[str, int],
    symbols: tuple[int | str, ...] | None,
    *,
    taken: dict[str, tuple[int, ...]],
) -> tuple[int | str, ...]:
    """Return ``shape`` with each size that moves named after what it moves with.

    ``taken`` holds the sizes that a documented name stood for in other outputs, and is added to: one name is
    one size throughout.
    """
    tied: list[int | str] = []
    for position, size in enumerate(shape):
        causes = []
        for axis, (other, outputs) in moved.items():
            there = outputs.get(name, (shape, ""))[0]
            if len(there) == len(shape) and there[position] != size:
                causes.append((axis, other, there[position]))
        if not causes:
            tied.append(size)
        elif len(causes) == 1 and size == sizes[causes[0][0]] and causes[0][2] == causes[0][1]:
            tied.append(causes[0][0])
        else:
            symbol = symbols[position] if symbols and len(symbols) == len(shape) else None
            here = (size, *(o.get(name, (shape, ""))[0][position] for _, o in moved.values()))
            if not isinstance(symbol, str) or symbol in sizes or taken.setdefault(symbol, here) != here:
                symbol = f"{name}_dim_{position}".replace(".", "_")
            tied.append(symbol)
    return tuple(tied)


def _is_kept(name: str, declaration: Declaration, config: Any, inputs: Mapping[str, Any]) -> bool:
    """Return whether an output that the model returned belongs into the graph."""
    field = next((f for f in declaration.outputs if f.name == name.split(".", maxsplit=1)[0]), None)
    if field is None:
        return True
    if field.flag is not None and field.flag not in inputs:
        return bool(getattr(config, field.flag, False)) or field.flag.startswith("add_")
    # The outputs of inner models repeat what their own graphs would give.
    return field.tensor or "." not in name or name.split(".")[1].isdigit()


def _documented_outputs(declaration: Declaration, config: Any, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    inputs = dict.fromkeys(names)
    # Samples of sound and patches of an image are not the steps of an output that documents the same name.
    is_text = modality_of(declaration.main_input) == "text"
    outputs = []
    for field in declaration.outputs:
        if not field.tensor or not _is_kept(field.name, declaration, config, inputs):
            continue
        shape: list[int | str] = []
        for position, axis in enumerate(field.shape or ()):
            if isinstance(axis, int) or axis.endswith("batch_size") or ("sequence_length" in axis and is_text):
                shape.append(axis)
            else:
                shape.append(config_size(config, axis, "text") or f"{field.name}_dim_{position}")
        outputs.append(TensorSpec(name=field.name, dtype="float32", shape=tuple(shape)))
    return tuple(outputs)

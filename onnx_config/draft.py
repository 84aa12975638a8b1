"""A proposal of a model's inputs while it is being settled: shapes, axes, sizes and rules for values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from onnx_config.config_sizes import config_size, image_size, longest, modality_of
from onnx_config.declarations import Argument, Declaration
from onnx_config.input_generator import Array, generate_inputs
from onnx_config.spec import TensorSpec, ValueRule, base_axis, size_of

__all__ = ["DEFAULT_SIZES", "GEOMETRY", "IMAGE_AXES", "MASK_ENDING", "Draft", "is_batch"]

DEFAULT_SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "text_batch_size": 2,
    "image_batch_size": 3,
    "audio_batch_size": 3,
    "sequence_length": 16,
    "decoder_sequence_length": 12,
    "audio_sequence_length": 64,
    "num_choices": 4,
    "height": 96,
    "width": 128,
}
"""Sizes at which dummy inputs are made and graphs are traced, in elements. No two axes of one model share
a size that a trace could confuse, and none is 1."""

IMAGE_AXES = ("height", "width")
_SIDES = re.compile(r"_(t?hw)$")
GEOMETRY = re.compile(r"(^|_)(grid_\w+|sizes|shapes)$")
"""Arguments that say how large each image is: in patches, or in pixels."""
MASK_ENDING = re.compile(r"_(attention_)?mask$")
"""What the name of a mask adds to that of what it hides parts of."""
_STREAM = re.compile(r"^(\w+)_(?:input_ids|attention_mask|token_type_ids)$")
_OTHER_SIZE = 6
_COLOURS = 3
_RAW_AUDIO_LENGTH = 4000
_CODED_AUDIO_LENGTH = 4001
"""Of sounds with channels, which codecs fill up to whole strides and cut again; a prime, since of a multiple nothing is
to be cut."""


def is_batch(axis: int | str) -> bool:
    """Return whether an axis counts rows."""
    return isinstance(axis, str) and base_axis(axis).endswith("batch_size")


class Draft:
    """Inputs as proposed so far; changed in place, copied to try something."""

    def __init__(
        self,
        declaration: Declaration,
        config: Any,
        names: Iterable[str] = (),
        *,
        limits: Any = None,
        unused_positions: Mapping[int, int] | None = None,
    ) -> None:
        self.declaration = declaration
        self.config = config
        self.limits = config if limits is None else limits
        self.unused_positions = dict(unused_positions or {})
        self.specs: dict[str, TensorSpec] = {}
        """In the order of ``forward``."""
        self.sizes: dict[str, int] = {}
        """Axis -> size at which to run."""
        self.rules: dict[str, ValueRule] = {}
        """Input -> what its values must be."""
        self.smallest: dict[str, int] = {}
        """Axis -> smallest size that the model takes, where known."""
        self.most: dict[str, int] = {}
        """Axis -> largest size that the model was seen to take, where it refused larger ones."""
        self.steps: dict[str, int] = {}
        """Axis -> what its size must be a multiple of, where that is more than one."""
        self.learned: list[str] = []
        """What was changed, and why."""
        self.assumed: list[str] = []
        """What was left out or guessed."""
        self._split_batch = any("image_batch_size" in (f.shape or ()) for f in declaration.outputs)
        self._reads_text = declaration.argument("input_ids") is not None
        self._text_shape, self._text_axis = _text_shape(declaration)
        for name in names:
            self.add(name)

    def copy(self) -> Draft:
        """Return a draft that can be changed without changing this one."""
        other = Draft.__new__(Draft)
        other.__dict__.update(self.__dict__)
        for name in ("specs", "sizes", "rules", "smallest", "most", "steps", "learned", "assumed"):
            setattr(other, name, getattr(self, name).copy())
        return other

    @property
    def signature(self) -> tuple[Any, ...]:
        """What makes two drafts the same proposal."""
        shapes = tuple((name, spec.dtype, spec.resolve(self.sizes)) for name, spec in self.specs.items())
        return shapes, tuple(sorted((name, str(rule)) for name, rule in self.rules.items()))

    def add(self, name: str) -> None:
        """Add the argument ``name`` as it is declared.

        Raises:
            KeyError: If ``forward`` has no such argument.
        """
        argument = self.declaration.argument(name)
        if argument is None:
            raise KeyError(name)
        self.specs[name] = TensorSpec(name=name, dtype=_dtype_of(argument), shape=())
        order = [a.name for a in self.declaration.arguments]
        self.specs = dict(sorted(self.specs.items(), key=lambda item: order.index(item[0])))
        self.reshape(name, self._documented_shape(argument))
        self.place_image(name)

    def remove(self, name: str) -> None:
        """Take an input out."""
        del self.specs[name]
        self.rules.pop(name, None)

    def reshape(self, name: str, shape: Iterable[int | str]) -> None:
        """Give an input another shape; axes that the config fixes become numbers, new ones get a size."""
        axes = tuple(self._axis(name, axis) for axis in shape)
        self.specs[name] = replace(self.specs[name], shape=axes)
        for axis in self.specs[name].axis_names:
            largest = self.largest(axis, name)
            start = self._start_size(name, axis)
            self.sizes.setdefault(axis, start if largest is None else max(1, min(start, largest)))

    def set_size(self, name: str, position: int, size: int) -> None:
        """Let one axis of an input have another size; a named axis changes wherever it stands."""
        axis = self.specs[name].shape[position]
        if isinstance(axis, str) and axis == base_axis(axis):
            self.sizes[axis] = size
            return
        shape = list(self.specs[name].shape)
        shape[position] = size
        self.specs[name] = replace(self.specs[name], shape=tuple(shape))

    def freeze(self, axis: str) -> None:
        """Fix an axis at its size, and every multiple of it."""
        self._substitute(axis, lambda whole: size_of(whole, self.sizes))

    def tie(self, axis: str, to: str) -> None:
        """Let ``axis`` be ``to``, which may be a multiple such as ``"4*batch_size"``."""
        self._substitute(axis, lambda whole: to if whole == axis else size_of(whole, self.sizes))
        self.sizes.pop(axis, None)
        self.smallest.pop(axis, None)

    def _substitute(self, axis: str, new: Any) -> None:
        for name, spec in self.specs.items():
            shape = tuple(new(a) if isinstance(a, str) and base_axis(a) == axis else a for a in spec.shape)
            self.specs[name] = replace(spec, shape=shape)
        for name, rule in self.rules.items():
            sizes = tuple(new(a) if isinstance(a, str) and base_axis(a) == axis else a for a in rule.sizes)
            tokens = tuple((t, n * self.sizes[axis], None) if a == axis else (t, n, a) for t, n, a in rule.tokens)
            self.rules[name] = replace(rule, sizes=sizes, tokens=tokens)
            if rule.grid is not None and rule.grid.patches == axis:
                self.rules[name] = replace(self.rules[name], grid=replace(rule.grid, patches=new(axis)))

    def axes(self) -> list[str]:
        """Return the dynamic axes."""
        return sorted({axis for spec in self.specs.values() for axis in spec.axis_names})

    def shapes(self, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return input name -> shape and NumPy dtype."""
        sizes = self.sizes if sizes is None else sizes
        return {name: (spec.resolve(sizes), spec.dtype) for name, spec in self.specs.items()}

    def arrays(self, sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Return input name -> values."""
        sizes = self.sizes if sizes is None else sizes
        return generate_inputs(tuple(self.specs.values()), self.config, self.declaration, sizes, rules=self.rules)

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Return axis -> smallest and largest size."""
        return {
            axis: (self.smallest.get(axis, 1), self.largest(axis, spec.name))
            for spec in self.specs.values()
            for axis in spec.axis_names
        }

    def largest(self, axis: str, name: str) -> int | None:
        """Return the largest size that the config allows for an axis of an input; ``None``: none declared."""
        declared = longest(self.limits, axis, name)
        usable = None if declared is None else declared - self.unused_positions.get(declared, 0)
        seen = self.most.get(axis)
        return usable if seen is None else seen if usable is None else min(seen, usable)

    def _documented_shape(self, argument: Argument) -> tuple[int | str, ...]:
        plain = ("batch_size", "sequence_length")
        # The tokenizer makes its outputs in one shape; the common docstring of masks knows only two axes.
        text = modality_of(argument.name) == "text" and not argument.name.startswith("decoder_")
        # Rows of one text's codebooks are only the ids'; rows of several texts are their mask's too.
        rows = str((self._text_shape or ("",))[0])
        several = "*" in rows and not (
            argument.name == "attention_mask" and "*" not in str(self._axis("input_ids", rows))
        )
        # So are the codebooks of one token, which come after the tokens.
        several = several or (self._text_shape or plain)[-1] != plain[-1]
        alike = argument.shape in (None, plain) and not several
        if text and self._text_shape and (argument.name == "input_ids" or alike):
            return self._text_shape
        if argument.shape is not None:
            return tuple("sequence_length" if text and axis == self._text_axis else axis for axis in argument.shape)
        if GEOMETRY.search(argument.name):
            # By the letters for time, height and width, where the name ends in them.
            sides = _SIDES.search(argument.name)
            return ("num_images", 2 if sides is None else len(sides[1]))
        if argument.name.startswith("decoder_"):
            return ("batch_size", "decoder_sequence_length")
        if modality_of(argument.name) == "image" and _dtype_of(argument).startswith("float"):
            return ("batch_size", "num_channels", "height", "width")
        return plain

    def _axis(self, name: str, axis: int | str) -> int | str:
        if isinstance(axis, int) or base_axis(axis) != axis:
            return axis
        modality = modality_of(name)
        if "*" in axis:
            return self._product(name, axis)
        if axis == "batch_size" and self._split_batch:
            return f"{modality}_batch_size"
        if axis.endswith("batch_size") or axis in ("sequence_length", "decoder_sequence_length", "num_choices"):
            if modality == "audio" and axis == "sequence_length" and self._reads_text:
                # The docstrings call the steps of a sound and the tokens of a text by one name.
                return "audio_sequence_length"
            if (
                axis == "sequence_length"
                and (stream := _STREAM.match(name))
                and stream[1] not in ("decoder", "encoder")
            ):
                # A second tokenizer's texts have a length of their own, until a run shows otherwise.
                return f"{stream[1]}_sequence_length"
            return axis
        if axis in ("image_size", "height", "width", "patch_size"):
            return axis
        size = config_size(self.config, axis, modality)
        if size is None and axis == "num_channels" and modality == "image":
            return _COLOURS
        return size or axis

    def _product(self, name: str, axis: str) -> int | str:
        """Return ``rows * something`` as a multiple of the rows, where the config says what something is."""
        rows, fixed = [], 1
        for factor in axis.split("*"):
            found = self._axis(name, factor)
            if isinstance(found, int):
                fixed *= found
            else:
                rows.append(found)
        if len(rows) == 1:
            return f"{fixed}*{rows[0]}" if fixed > 1 else rows[0]
        return re.sub(r"\W+", "_", axis)

    def _start_size(self, name: str, axis: str) -> int:
        if axis == "sequence_length" and modality_of(name) == "time":
            return config_size(self.config, "context_length", "time") or DEFAULT_SIZES[axis]
        if axis == "sequence_length" and name == "input_values" and self.specs[name].shape[-1] == axis:
            return _RAW_AUDIO_LENGTH if len(self.specs[name].shape) == len(("rows", "samples")) else _CODED_AUDIO_LENGTH
        return DEFAULT_SIZES.get(axis, _OTHER_SIZE)

    def place_image(self, name: str) -> None:
        """Give image axes their names, and the size that the config declares."""
        spec = self.specs[name]
        sides = [i for i, axis in enumerate(spec.shape) if axis in ("image_size", "height", "width", "patch_size")]
        if len(sides) != 2:
            return
        main = next((n for n in (self.declaration.main_input, *self.specs) if modality_of(n) == "image"), name)
        # A second image (a prompt, a depth map) has a size of its own, until a run shows otherwise.
        axes = IMAGE_AXES if name == main or spec.dtype != "float32" else tuple(f"{name}_{axis}" for axis in IMAGE_AXES)
        shape = list(spec.shape)
        shape[sides[0]], shape[sides[1]] = axes
        self.specs[name] = replace(spec, shape=tuple(shape))
        declared = image_size(self.config) or (DEFAULT_SIZES["height"], DEFAULT_SIZES["width"])
        self.sizes.update(zip(axes, declared, strict=True))


def _text_shape(declaration: Declaration) -> tuple[tuple[int | str, ...] | None, str | None]:
    """Return the shape of a tokenizer's outputs, and the name that ``input_ids`` documents for its tokens."""
    main = declaration.argument("input_ids")
    if main is None or not main.shape or not isinstance(main.shape[-1], str):
        return (main.shape if main is not None else None), None
    if "sequence_length" in main.shape[:-1]:
        # What comes after the tokens is what each of them is made of.
        return main.shape, "sequence_length"
    shape = (*main.shape[:-1], "sequence_length")
    # Some multiple-choice heads document their choices in the output only; where an argument's documentation knows of
    # choices, a text that has none in its own is one text.
    unsaid = not any("num_choices" in (a.shape or ()) for a in declaration.arguments)
    if len(shape) == 2 and unsaid and any("num_choices" in (f.shape or ()) for f in declaration.outputs):
        shape = (shape[0], "num_choices", shape[1])
    return shape, main.shape[-1]


def _dtype_of(argument: Argument) -> str:
    name = argument.name
    # The annotations of some vision models say LongTensor for pixels.
    if re.search(r"^pixel_values|^input_(features|values)$|_values$|embeds$", name):
        return "float32"
    if argument.dtype is not None:
        return argument.dtype
    if re.search(r"_ids$|mask$|^bbox$|_positions?$", name) or GEOMETRY.search(name):
        return "int64"
    return "float32"

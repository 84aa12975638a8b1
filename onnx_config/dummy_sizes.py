"""The sizes that dummy inputs have: what was found out, a preprocessor's habits, and what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_config.cache_layout import PAST_AXIS, CacheLayout
from onnx_config.config_sizes import modality_of
from onnx_config.errors import InputError
from onnx_config.preprocessors import Habits
from onnx_config.shape_inference import Inference

__all__ = ["DummySizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DummySizes:
    """The sizes that a model's dummy inputs may have."""

    inference: Inference
    """Its inputs and axes."""

    cache: CacheLayout | None
    """What it continues from; ``None``: its cache is no input."""

    @property
    def defaults(self) -> dict[str, int]:
        """Dynamic axis -> the size that dummy inputs have unless told otherwise."""
        return {**self.inference.sizes, **({} if self.cache is None else self.cache.sizes)}

    @property
    def axis_ranges(self) -> dict[str, tuple[int, int | None]]:
        """Dynamic axis -> smallest and largest size; ``None``: no limit known."""
        return {**self.inference.axis_ranges, **({} if self.cache is None else self.cache.axis_ranges)}

    def asked_for(
        self, batch_size: int | None, seq_length: int | None, sizes: Mapping[str, int], *, habits: Habits
    ) -> dict[str, int]:
        """Return the size of each dynamic axis where these were asked for, of inputs made with these habits.

        Raises:
            InputError: If an axis in ``sizes`` is not one of this model's, or a size is below what the model takes.
        """
        resolved = self.defaults | self._habitual(habits)
        for axis in resolved:
            if axis.endswith("batch_size") and batch_size is not None:
                resolved[axis] = batch_size
            elif axis == "sequence_length" and seq_length is not None:
                resolved[axis] = seq_length
        for axis, size in sizes.items():
            if axis not in resolved:
                raise InputError(f"{axis!r} is no dynamic axis of this model; it has {sorted(resolved)}.")
            resolved[axis] = size
        text = next((s.axis_names[-1] for s in self.inference.inputs if s.name == "input_ids" and s.axis_names), None)
        if text is not None and habits.longest_text is not None and isinstance(resolved[text], int):
            resolved[text] = min(resolved[text], habits.longest_text)
        past = resolved.get(PAST_AXIS)
        if self.cache is not None and isinstance(past, int):
            # What a layer keeps of the past follows from its length, unless it was asked for.
            resolved |= {axis: size for axis, size in self.cache.sizes_at(past).items() if axis not in sizes}
        ranges = self.axis_ranges
        for axis, size in resolved.items():
            least = ranges[axis][0]
            if not isinstance(size, int) or size < least:
                raise InputError(
                    f"The size {size!r} was asked for {axis}; this model takes whole numbers from {least}."
                )
        return resolved

    def _habitual(self, habits: Habits) -> dict[str, int]:
        """Return the dynamic axes that a preprocessor's settings give a size which the model takes."""
        found = {axis: habits.sizes[axis] for axis in ("height", "width") if axis in habits.sizes}
        for spec in self.inference.inputs:
            if modality_of(spec.name) == "audio" and spec.dtype.startswith("float") and spec.axis_names:
                # Features have a row per frame or a frame per column; what is not features is samples.
                kind = "frames" if "features" in spec.name else "samples"
                steps = [axis for axis in spec.axis_names if axis.endswith("sequence_length")]
                found |= {axis: habits.sizes[kind] for axis in steps[-1:] if kind in habits.sizes}
        kept = {}
        for axis, wanted in found.items():
            least, most = self.inference.axis_ranges.get(axis, (wanted + 1, None))
            size = wanted if most is None else min(wanted, most)
            if size >= least and size % self.inference.axis_steps.get(axis, 1) == 0:
                kept[axis] = size
        return kept

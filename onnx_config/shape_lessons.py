"""Lessons about the axes of inputs: how many there are, in which order, and what they are called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from onnx_config.candidate import Ask, Candidate, candidate_of_shape
from onnx_config.config_sizes import config_for, modality_of, sub_configs
from onnx_config.declarations import read_shape
from onnx_config.draft import DEFAULT_SIZES, MASK_ENDING, Draft
from onnx_config.patterns import AXIS_SYNONYMS, CONFIG_SIZES
from onnx_config.probe import ProbeResult
from onnx_config.refusals import token_counts, unpacked, wrong_sizes
from onnx_config.shared_axes import shapes_with_shared_axes

__all__ = [
    "columns",
    "convolved",
    "documented_elsewhere",
    "documented_rank",
    "mask_as_long",
    "more_axes",
    "transposed",
    "unpacked_axes",
]


def unpacked_axes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Read the axes from the statement that takes a shape apart: ``batch, frames, c, h, w = pixels.shape``."""
    if not answer.frames or unpacked(answer.refusal or "") is None:
        return
    frame = answer.frames[-1]
    found = _shape_statement(frame.source)
    if found is None:
        return
    variable, names, rest = found
    view = frame.tensors.get(variable)
    for name, spec in draft.specs.items():
        same = view is not None and (view.input == name or view.shape == spec.resolve(draft.sizes))
        if not (same or (view is None and name == variable)):
            continue
        shape: list[int | str] = [_axis_name(n, f"{name}_dim_{i}") for i, n in enumerate(names)]
        # Of the axes that the statement leaves alone fixed sizes stay: features are last, also where a step lacks.
        kept = spec.shape[len(spec.shape) - rest :] if rest <= len(spec.shape) else ()
        shape += [
            kept[i] if i < len(kept) and isinstance(kept[i], int) else f"{name}_dim_{len(names) + i}"
            for i in range(rest)
        ]
        yield candidate_of_shape(draft, name, shape, f"{name} has the axes of: {frame.source}")


_CONVOLVED = {
    3: ("sequence_length",),
    4: ("height", "width"),
    5: ("num_frames", "height", "width"),
}
"""How many axes a convolution's weight has -> the axes of its input behind the channels."""
_LETTERS = {"b": "batch_size", "c": "num_channels", "t": "num_frames", "h": "height", "w": "width"}
"""What torch's documentation calls axes."""
_FEATURE_MAP = {"height": 24, "width": 32}


def _shape_statement(source: str) -> tuple[str, list[str], int] | None:
    """Return (variable, targets, axes beyond them) of ``a, b = x.shape``, ``x.size()`` or ``x.shape[:-1]``."""
    try:
        statement = ast.parse(source).body[0]
    except (SyntaxError, ValueError, IndexError):
        return None
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Tuple):
        return None
    names = [t.id if isinstance(t, ast.Name) else "_" for t in statement.targets[0].elts]
    value: ast.AST = statement.value
    rest = 0
    if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and value.slice.lower is None:
        upper = value.slice.upper
        if isinstance(upper, ast.UnaryOp) and isinstance(upper.operand, ast.Constant):
            rest = int(upper.operand.value)  # type: ignore[arg-type]  # an index is a whole number
        value = value.value
    if isinstance(value, ast.Call):
        value = value.func
    if isinstance(value, ast.Attribute) and value.attr in ("shape", "size") and isinstance(value.value, ast.Name):
        return value.value.id, names, rest
    return None


def _axis_name(name: str, fallback: str) -> str:
    """Return the name of an axis that the library's code calls ``name``."""
    plain = re.sub(r"\W+", "_", name.lower()).strip("_")
    plain = _LETTERS.get(plain, plain)
    known = set(AXIS_SYNONYMS.values()) | set(CONFIG_SIZES)
    for variant in (plain, f"{plain}s", f"num_{plain}", f"num_{plain}s"):
        axis = AXIS_SYNONYMS.get(variant, variant)
        if axis in known:
            return axis
    return plain or fallback


def documented_rank(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Take the shape that the message spells out."""
    refusal = answer.refusal or ""
    # Some messages quote each axis for itself.
    listed = re.sub(r"shape ((?:`\w+`(?:, ?)?){2,})", lambda m: f"shape ({m[1].replace('`', '')})", refusal)
    shape = read_shape(re.sub(r"shape \(([^)]*)\)", r"shape `(\1)`", listed))
    if not shape or not any(isinstance(axis, str) for axis in shape):
        return
    kind = "image" if {"height", "width"} & set(shape) else None
    named = {name: spec for name, spec in draft.specs.items() if re.search(rf"\b{name}\b", refusal)}
    for name, spec in (named or draft.specs).items():
        if len(spec.shape) != len(shape) and (kind is None or modality_of(name) == kind):
            yield candidate_of_shape(draft, name, shape, f"{name} has the shape of: {answer.refusal}")


def documented_elsewhere(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Take the shape of another number of axes that another method of the class documents for the same argument."""
    for name, spec in draft.specs.items():
        argument = draft.declaration.argument(name)
        shape = None if argument is None else argument.elsewhere
        if shape is not None and len(shape) != len(spec.shape):
            why = f"{name} has the shape that another method documents: {answer.refusal}"
            yield candidate_of_shape(draft, name, shape, why, sure=False)


def convolved(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give an input that goes into a convolution as it is the axes that the weight beside it has."""
    if not answer.frames or not re.search(r"input to conv\dd|weight of size .* channels", answer.refusal or ""):
        return
    held = answer.frames[-1].tensors
    weight, given = held.get("weight"), held.get("input")
    inner = None if weight is None else _CONVOLVED.get(len(weight.shape))
    if weight is None or given is None or inner is None:
        return
    groups = re.search(r"groups=(\d+)", answer.refusal or "")
    channels = weight.shape[1] * (int(groups[1]) if groups else 1)
    for name, spec in draft.specs.items():
        argument = draft.declaration.argument(name)
        documented = argument is not None and argument.shape is not None
        if documented or spec.dtype != "float32" or spec.resolve(draft.sizes) != given.shape:
            continue
        shape = (spec.shape[0], channels, *inner)
        if spec.shape == shape:
            continue
        candidate = candidate_of_shape(draft, name, shape, f"{name} has the axes of a convolution: {answer.refusal}")
        # Features lie less densely than the pixels that they were made of.
        candidate.draft.sizes.update({axis: size for axis, size in _FEATURE_MAP.items() if axis not in draft.sizes})
        yield candidate


def mask_as_long(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let the mask of a sound be as long as the sound, where its values say how many features there are."""
    if token_counts(answer.refusal or "") is None:
        return
    for name, spec in draft.specs.items():
        data = draft.specs.get(MASK_ENDING.sub("", name))
        if data is None or data is spec or modality_of(name) != "audio" or len(spec.shape) != 2:
            continue
        # A sound has more steps than each of them has numbers.
        length = max(data.shape[1:], key=lambda axis: axis if isinstance(axis, int) else draft.sizes[axis])
        if spec.shape[-1] != length:
            why = f"{name} is as long as {data.name}: {answer.refusal}"
            yield candidate_of_shape(draft, name, (spec.shape[0], length), why)


def transposed(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Swap the axes of steps and features where the features are looked for in the other place."""
    wanted = {want for _, want in wrong_sizes(answer.refusal or "")} if "channels" in (answer.refusal or "") else ()
    for name, spec in draft.specs.items():
        if len(spec.shape) == 3 and isinstance(spec.shape[1], str) and spec.shape[2] in wanted:
            shape = (spec.shape[0], spec.shape[2], spec.shape[1])
            why = f"{name} has its features before its steps: {answer.refusal}"[:200]
            yield candidate_of_shape(draft, name, shape, why)


def columns(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give whole numbers a last axis where they met a row of offsets, one for each of its columns."""
    if not answer.frames or "must match the size of tensor" not in (answer.refusal or ""):
        return
    views = answer.frames[-1].tensors.values()
    for name, spec in draft.specs.items():
        shape = spec.resolve(draft.sizes)
        if spec.dtype == "int64" and any(v.input == name or v.shape == shape for v in views):
            for _, want in wrong_sizes(answer.refusal or ""):
                why = f"{name} has {want} columns: {answer.refusal}"
                yield candidate_of_shape(draft, name, (*spec.shape, want), why, sure=False)


def more_axes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give inputs an axis more: one that an input beside them has, one that the config names, or one of size 1."""
    for name, shared, beside in shapes_with_shared_axes(draft):
        why = f"{name} has the axes of {beside}: {answer.refusal}"
        yield candidate_of_shape(draft, name, shared, why, sure=False)
    text = answer.refusal or ""
    numbers = [int(n) for n in re.findall(r"\b\d{1,4}\b", text) if int(n) > 1]
    for name, spec in draft.specs.items():
        argument = draft.declaration.argument(name)
        if argument is None or argument.shape is not None or spec.dtype != "float32" or len(spec.shape) != 2:
            continue
        size = spec.resolve(draft.sizes)[-1]
        why = f"{name} has steps, of {size} numbers each: {answer.refusal}"[:200]
        stepwise = candidate_of_shape(draft, name, (spec.shape[0], "sequence_length", size), why, sure=False)
        stepwise.draft.sizes["sequence_length"] = DEFAULT_SIZES["sequence_length"]
        yield stepwise
    for name, spec in draft.specs.items():
        if name.endswith("mask") and name != draft.declaration.main_input:
            continue
        declared = [
            value
            for part in sub_configs(config_for(draft.config, modality_of(name)))
            for key, value in vars(part).items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 0
            and re.search(r"channels|codebooks|mel|feat|frames|bins|patches|d_model|state_dim", key)
        ]  # fmt: skip
        argument = draft.declaration.argument(name)
        # One more axis of a text whose axes are documented hides what is wrong rather than mends it.
        documented = modality_of(name) == "text" and argument is not None and argument.shape is not None
        for size in dict.fromkeys((*(() if documented else (1,)), *declared[:6], *numbers[:4])):
            for position in (1, len(spec.shape)):
                shape = (*spec.shape[:position], size, *spec.shape[position:])
                why = f"{name} has a further axis of size {size} at position {position}"
                yield candidate_of_shape(draft, name, shape, why, sure=False)

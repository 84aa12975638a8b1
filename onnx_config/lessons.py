"""What to try next when a model refuses its inputs.

Each lesson reads a refusal, the message and the source lines on the way to it, and yields changed drafts. None
knows a model: they know how Python, torch and the library word what is wrong.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx_config.config_sizes import config_for, modality_of, sub_configs
from onnx_config.declarations import Role, read_shape
from onnx_config.draft import GEOMETRY, IMAGE_AXES, Draft, is_batch
from onnx_config.grid_texts import generates_from_grids, marked_drafts, placed_drafts
from onnx_config.patch_inputs import patch_drafts
from onnx_config.patterns import AXIS_SYNONYMS, CONFIG_SIZES
from onnx_config.probe import ProbeResult
from onnx_config.refusals import (
    asked_for,
    beyond_table,
    exclusive,
    is_one_row_only,
    is_too_small,
    reshaped,
    token_counts,
    unpacked,
    wrong_sizes,
)
from onnx_config.spec import ValueRule

__all__ = ["TEXT_ONLY", "Ask", "Candidate", "candidates", "placeholder_ids", "text_only"]

TEXT_ONLY = "the graph takes text only"
"""What the note of a draft without images and sounds begins with."""

Ask = Callable[[Draft], ProbeResult]

_MAX_GROWTH = 1 << 17
_IMAGE_SIZES = (32, 64, 224, 16, 30)
_MAX_POSITIONS = 12
_NO_RULE = ValueRule()
_MASK = re.compile(r"_(attention_)?mask$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A changed draft to try."""

    draft: Draft
    """The draft."""

    why: str
    """What was changed, for people."""

    sure: bool
    """Whether the refusal said so: then a new refusal is progress too. Else only getting further counts."""

    leaves_out: bool = False
    """Whether something optional was given up, which only a run that returns justifies."""


def candidates(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Yield what to try after ``answer``, the surest first."""
    for lesson in _LESSONS:
        yield from lesson(draft, answer, ask)


def _reshaped(draft: Draft, name: str, shape: Sequence[int | str], why: str, *, sure: bool = True) -> Candidate:
    other = draft.copy()
    other.reshape(name, shape)
    other.place_image(name)
    return Candidate(draft=other, why=why[:300], sure=sure)


def _resized(draft: Draft, at: tuple[str, int], size: int, why: str, *, sure: bool = True) -> Candidate:
    name, position = at
    other = draft.copy()
    other.set_size(name, position, size)
    return Candidate(draft=other, why=f"axis {position} of {name} has size {size}: {why}"[:300], sure=sure)


def _missing_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Add what the message asks for, or what was ``None`` where the statement needed it."""
    names = asked_for(answer.refusal or "", draft.declaration)
    for frame in reversed(answer.frames if "None" in (answer.refusal or "") else ()):
        names += [name for name in frame.names if name in frame.nones]
    for name in dict.fromkeys(names):
        argument = draft.declaration.argument(name)
        if argument is not None and argument.role is Role.DATA and name not in draft.specs:
            if GEOMETRY.search(name) and not generates_from_grids(draft, name):
                yield from text_only(draft, f"sizes would depend on the values of {name}")
            other = draft.copy()
            other.add(name)
            for marked, why in marked_drafts(other, name):
                yield Candidate(draft=marked, why=why, sure=True)
            yield Candidate(draft=other, why=f"{name} was added since the model asks for it", sure=True)


def _not_both(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give one of the inputs that cannot be given together, the main one last: all models have one, made or not."""
    names = [name for name in exclusive(answer.refusal or "") if name in draft.specs]
    if len(names) < 2:
        return
    required = {a.name for a in draft.declaration.arguments if a.required}
    for kept in sorted(names, key=lambda name: name == draft.declaration.main_input):
        others = [name for name in names if name != kept]
        if not required & set(others):
            other = draft.copy()
            for name in others:
                other.remove(name)
            yield Candidate(draft=other, why=f"{', '.join(others)} was left out: {answer.refusal}"[:300], sure=True)


def _patches(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give patches in the place of images to what is told how they lie in each image."""
    for other, why in patch_drafts(draft):
        yield Candidate(draft=other, why=f"{why}: {answer.refusal}"[:300], sure=True)


def _unpacked_axes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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
        yield _reshaped(draft, name, shape, f"{name} has the axes of: {frame.source}")


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
    known = set(AXIS_SYNONYMS.values()) | set(CONFIG_SIZES)
    for variant in (plain, f"{plain}s", f"num_{plain}", f"num_{plain}s"):
        axis = AXIS_SYNONYMS.get(variant, variant)
        if axis in known:
            return axis
    return plain or fallback


def _documented_rank(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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
            yield _reshaped(draft, name, shape, f"{name} has the shape of: {answer.refusal}")


def _documented_elsewhere(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Take the shape of another number of axes that another method of the class documents for the same argument."""
    for name, spec in draft.specs.items():
        argument = draft.declaration.argument(name)
        shape = None if argument is None else argument.elsewhere
        if shape is not None and len(shape) != len(spec.shape):
            why = f"{name} has the shape that another method documents: {answer.refusal}"
            yield _reshaped(draft, name, shape, why, sure=False)


def _mask_as_long(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let the mask of a sound be as long as the sound, where its values say how many features there are."""
    if token_counts(answer.refusal or "") is None:
        return
    for name, spec in draft.specs.items():
        data = draft.specs.get(_MASK.sub("", name))
        if data is None or data is spec or modality_of(name) != "audio" or len(spec.shape) != 2:
            continue
        # A sound has more steps than each of them has numbers.
        length = max(data.shape[1:], key=lambda axis: axis if isinstance(axis, int) else draft.sizes[axis])
        if spec.shape[-1] != length:
            why = f"{name} is as long as {data.name}: {answer.refusal}"
            yield _reshaped(draft, name, (spec.shape[0], length), why)


def _placeholders(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Write as many placeholder tokens into each text as there are features for it."""
    counts = token_counts(answer.refusal or "")
    ids = draft.specs.get("input_ids")
    if counts is None or ids is None:
        return
    modality, tokens, features = counts
    for other, why in placed_drafts(draft, placeholder_ids(draft.config, modality)):
        yield Candidate(draft=other, why=why, sure=True)
    rows = ids.resolve(draft.sizes)[0]
    present = draft.rules.get("input_ids", _NO_RULE)
    if present.places is not None:
        return
    text = config_for(draft.config, "text")
    width = next((w for n in ("hidden_size", "d_model", "n_embd") if isinstance(w := getattr(text, n, None), int)), 0)
    for token in placeholder_ids(draft.config, modality):
        already = next((n for t, n in present.placeholders(draft.sizes) if t == token), 0)
        if tokens and already:
            # Rows that have some already may each stand for several features.
            yield from _with_tokens(draft, token, already * features // tokens, modality, sure=True)
            continue
        if width and features % (rows * width) == 0:
            # Some messages count the features' numbers rather than the features.
            yield from _with_tokens(draft, token, features // rows // width, modality, sure=False)
        yield from _with_tokens(draft, token, features // rows, modality, sure=True)


def _with_tokens(draft: Draft, token: int, wanted: int, modality: str, *, sure: bool) -> Iterator[Candidate]:
    """Put ``wanted`` placeholders into each row, or make the images smaller where no text is that long."""
    if wanted < 1:
        return
    present = draft.rules.get("input_ids", _NO_RULE)
    others = [(t, n, a) for t, n, a in present.tokens if t != token]
    rule = replace(present, tokens=(*others, (token, wanted, None)))
    needed = sum(n for _, n in rule.placeholders(draft.sizes)) + 2
    ids = draft.specs["input_ids"]
    axis = ids.shape[-1]
    longest = draft.largest(axis, "input_ids") if isinstance(axis, str) else ids.resolve(draft.sizes)[-1]
    other = draft.copy()
    if longest is not None and needed + 3 > longest and min(draft.sizes.get(a, 0) for a in IMAGE_AXES) > 1:
        other.sizes.update({side: draft.sizes[side] // 2 for side in IMAGE_AXES})
        why = f"smaller images, since a text of {longest} tokens does not hold {wanted} features"
        yield Candidate(draft=other, why=why, sure=sure)
        return
    other.rules["input_ids"] = rule
    if isinstance(axis, str):
        other.sizes[axis] = max(other.sizes[axis], needed + 3)
        other.smallest[axis] = max(needed, other.smallest.get(axis, 1))
    why = f"each text holds {wanted} tokens {token}, one for each of its {modality} features"
    yield Candidate(draft=other, why=why, sure=sure)


def placeholder_ids(config: Any, modality: str) -> list[int]:
    """Return the ids that may stand for an image, a video or a sound, the likeliest first."""
    found: dict[int, int] = {}
    for part in sub_configs(config):
        for key, value in vars(part).items():
            name = key.lower()
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                continue
            if modality in name and "token" in name and re.search(r"(_id|_index|_idx)$", name):
                framed = bool(re.search(r"start|end|begin|bos|eos|boi|eoi|newline|row|col", name))
                found.setdefault(value, len(name) + 100 * framed)
    return sorted(found, key=lambda token: found[token])


def _index_limits(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Keep indices inside the table that was too small for them."""
    limit = beyond_table(answer.refusal or "")
    if limit is None and answer.frames and "index out of range" in (answer.refusal or ""):
        table = answer.frames[-1].tensors.get("weight")
        limit = table.shape[0] if table is not None and table.shape else None
    if limit is None:
        return
    largest = {view.largest for frame in answer.frames[-3:] for view in frame.tensors.values()}
    for name, values in draft.arrays().items():
        whole = values.dtype.kind == "i"
        if not values.size or not (whole or values.dtype.kind == "f") or (whole and int(values.max()) not in largest):
            continue
        below = min(limit, int(values.max()) + (not whole))
        if below < 1:
            continue
        other = draft.copy()
        other.rules[name] = replace(draft.rules.get(name, _NO_RULE), below=below)
        # Whole numbers among fractions, such as the row and the column of a patch before its pixels, are cut off.
        why = f"the values of {name} stay below {below}" + ("" if whole else " and are not negative")
        yield Candidate(draft=other, why=why, sure=whole)


def _one_row(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    if not is_one_row_only(answer.refusal or ""):
        return
    other = draft.copy()
    for axis in [a for a in other.axes() if is_batch(a)]:
        other.sizes[axis] = 1
        other.freeze(axis)
    yield Candidate(draft=other, why=f"the batch is fixed at one row: {answer.refusal}"[:300], sure=True)


def _solved_sizes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Find the axis that a refused size depends on by moving each, and solve for the size that is wanted."""
    for index, (got, want) in enumerate(wrong_sizes(answer.refusal or "")):
        if got == want:
            continue
        # How many rows there are is never what is wrong with one size.
        single = [[item] for item in _positions(draft) if not is_batch(draft.specs[item[0]].shape[item[1]])]
        for group in (*single, *_sides(draft)):
            size = group[0][2]
            step = size if size > 1000 else 1
            moved = _with_size(draft, group, size + step)
            there = wrong_sizes(ask(moved).refusal or "")
            if index >= len(there):
                continue
            slope = ((there[index][0] - there[index][1]) - (got - want)) / step
            if not slope:
                continue
            solution = size - (got - want) / slope
            if solution != int(solution) or solution < 1 or solution > _MAX_GROWTH:
                continue
            where = ", ".join(f"axis {position} of {name}" for name, position, _ in group)
            why = f"{where} has size {int(solution)}: {answer.refusal}"[:300]
            yield Candidate(draft=_with_size(draft, group, int(solution)), why=why, sure=True)


def _with_size(draft: Draft, group: list[tuple[str, int, int]], size: int) -> Draft:
    other = draft.copy()
    for name, position, _ in group:
        other.set_size(name, position, size)
    return other


def _sides(draft: Draft) -> list[list[tuple[str, int, int]]]:
    """Return the heights, and the widths, of several images, which may have to be one."""
    groups = []
    for side in IMAGE_AXES:
        found = [
            (name, position, draft.sizes[axis])
            for name, spec in draft.specs.items()
            for position, axis in spec.axes.items()
            if axis.endswith(side) and axis in draft.sizes
        ]
        if len(found) > 1:
            groups.append(found)
    return groups


def _positions(draft: Draft) -> list[tuple[str, int, int]]:
    """Return (input, axis, size) of all that may have another size, each named axis once; rows come last."""
    found: dict[Any, tuple[str, int, int]] = {}
    for name, spec in draft.specs.items():
        for position, (axis, size) in enumerate(zip(spec.shape, spec.resolve(draft.sizes), strict=True)):
            found.setdefault(axis if isinstance(axis, str) else (name, position), (name, position, size))
    return sorted(found.values(), key=lambda item: item[1] == 0)[:_MAX_POSITIONS]


def _multiples(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let an axis be a multiple of what the model cuts it into."""
    step = reshaped(answer.refusal or "")
    if step is None:
        return
    for name, position, size in _positions(draft):
        if position:
            whole = -(-max(size, 2 * step) // step) * step
            candidate = _resized(draft, (name, position), whole, f"a multiple of {step}", sure=False)
            axis = draft.specs[name].shape[position]
            if isinstance(axis, str):
                candidate.draft.steps[axis] = step
            yield candidate


def _growth(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Make inputs larger, the main one first."""
    if not is_too_small(answer.refusal or ""):
        return
    main = draft.declaration.main_input
    for name in sorted(draft.specs, key=lambda n: (n != main, modality_of(n) == "text")):
        axes = [a for a in draft.specs[name].axis_names if not is_batch(a)]
        if not axes or max(draft.sizes[a] for a in axes) * 4 > _MAX_GROWTH:
            continue
        other = draft.copy()
        for axis in axes:
            other.sizes[axis] *= 4 if len(axes) == 1 else 2
        why = f"{', '.join(axes)} was made larger: {answer.refusal}"[:200]
        yield Candidate(draft=other, why=why, sure=name == main and modality_of(name) != "text")


def _transposed(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Swap the axes of steps and features where the features are looked for in the other place."""
    wanted = {want for _, want in wrong_sizes(answer.refusal or "")} if "channels" in (answer.refusal or "") else ()
    for name, spec in draft.specs.items():
        if len(spec.shape) == 3 and isinstance(spec.shape[1], str) and spec.shape[2] in wanted:
            shape = (spec.shape[0], spec.shape[2], spec.shape[1])
            why = f"{name} has its features before its steps: {answer.refusal}"[:200]
            yield _reshaped(draft, name, shape, why)


def _more_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give something optional of the main input's kind, which the config may have made the model count on."""
    kind = modality_of(draft.declaration.main_input)
    for argument in draft.declaration.arguments:
        name = argument.name
        if kind == "text" or name in draft.specs or argument.role is not Role.DATA or GEOMETRY.search(name):
            continue
        if modality_of(name) == kind and not name.endswith("mask"):
            other = draft.copy()
            other.add(name)
            yield Candidate(draft=other, why=f"{name} was added: {answer.refusal}"[:300], sure=False)


def _masked_data(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give what a mask among the inputs is the mask of, where that is optional and was left out."""
    for mask in draft.specs:
        stem = _MASK.sub("", mask)
        if stem in ("", mask) or any(name != mask and name.startswith(f"{stem}_") for name in draft.specs):
            continue
        for argument in draft.declaration.arguments:
            name = argument.name
            if (
                argument.role is Role.DATA
                and name.startswith(f"{stem}_")
                and re.search(r"_(embeds|values|feats)$", name)
            ):
                other = draft.copy()
                other.add(name)
                why = f"{name} was added, which {mask} is the mask of: {answer.refusal}"
                yield Candidate(draft=other, why=why[:300], sure=True)


def _columns(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give whole numbers a last axis where they met a row of offsets, one for each of its columns."""
    if not answer.frames or "must match the size of tensor" not in (answer.refusal or ""):
        return
    views = answer.frames[-1].tensors.values()
    for name, spec in draft.specs.items():
        shape = spec.resolve(draft.sizes)
        if spec.dtype == "int64" and any(v.input == name or v.shape == shape for v in views):
            for _, want in wrong_sizes(answer.refusal or ""):
                why = f"{name} has {want} columns: {answer.refusal}"
                yield _reshaped(draft, name, (*spec.shape, want), why, sure=False)


def _marked_positions(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Let a mask mark as many positions as there are values for."""
    found = re.search(r"value tensor of shape \[(\d+).*indexing result of shape \[(\d+)", answer.refusal or "")
    if found is None:
        return
    values, marked = int(found[1]), int(found[2])
    for name, array in draft.arrays().items():
        rows = array.shape[0] if array.ndim else 1
        if name.endswith("mask") and int(array.sum()) == marked and not values % rows:
            other = draft.copy()
            other.rules[name] = replace(draft.rules.get(name, _NO_RULE), ones=values // rows)
            axis = draft.specs[name].shape[-1]
            if isinstance(axis, str):
                other.smallest[axis] = max(values // rows + 2, other.smallest.get(axis, 1))
                other.sizes[axis] = max(other.sizes[axis], other.smallest[axis] + 3)
            yield Candidate(draft=other, why=f"{name} marks {values // rows} positions of each row", sure=True)


def _whole_numbers(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Make an input whole numbers where it is used to look something up."""
    if not re.search(r"scalar types: Long|must be long|tensors used as indices", answer.refusal or ""):
        return
    used = {view.input for frame in answer.frames[-3:] for view in frame.tensors.values()}
    floats = [name for name, spec in draft.specs.items() if spec.dtype == "float32"]
    for names in ([n for n in floats if n in used], [n for n in floats if n != draft.declaration.main_input], floats):
        if names:
            other = draft.copy()
            other.specs.update({name: replace(draft.specs[name], dtype="int64") for name in names})
            why = f"{', '.join(names)} holds whole numbers: {answer.refusal}"
            yield Candidate(draft=other, why=why[:200], sure=True)


def _named_numbers(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Try the numbers of the message as sizes, and added to sizes."""
    numbers = [int(n) for n in dict.fromkeys(re.findall(r"\b\d{1,4}\b", answer.refusal or "")) if int(n) > 0][:6]
    for name, position, size in _positions(draft):
        for number in numbers:
            for other in (size + number, number) if position else (number,):
                if other != size:
                    yield _resized(draft, (name, position), other, answer.refusal or "", sure=False)


def _more_axes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give inputs an axis more: one that the config names, or one of size 1."""
    text = answer.refusal or ""
    numbers = [int(n) for n in re.findall(r"\b\d{1,4}\b", text) if int(n) > 1]
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
                yield _reshaped(draft, name, shape, why, sure=False)


def _image_sizes(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Try other image sizes."""
    if not set(IMAGE_AXES) <= set(draft.axes()):
        return
    for size in _IMAGE_SIZES:
        if draft.sizes["height"] == draft.sizes["width"] == size:
            continue
        other = draft.copy()
        other.sizes.update(dict.fromkeys(IMAGE_AXES, size))
        yield Candidate(draft=other, why=f"images of {size} pixels a side: {answer.refusal}"[:200], sure=False)


def _fewer_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give up an optional input, masks first; then all of a kind of data that text comes without."""
    optional = {a.name for a in draft.declaration.arguments if not a.required} - {draft.declaration.main_input}
    for name in [n for n in draft.specs if n in optional and n.endswith("mask")]:
        other = draft.copy()
        other.remove(name)
        yield Candidate(draft=other, why=f"{name} was left out: {answer.refusal}"[:300], sure=False, leaves_out=True)
    yield from text_only(draft, answer.refusal or "")


def text_only(draft: Draft, why: str) -> Iterator[Candidate]:
    """Leave out all that a text comes without, where the class takes texts alone."""
    optional = {a.name for a in draft.declaration.arguments if not a.required} - {draft.declaration.main_input}
    if "input_ids" not in draft.specs:
        return
    others = [name for name in draft.specs if modality_of(name) != "text" or draft.rules.get(name, _NO_RULE).sizes]
    others += [name for name in draft.specs if name not in ("input_ids", "attention_mask") and name not in others
               and not name.startswith("decoder_")]  # fmt: skip
    if others and set(others) <= optional | {draft.declaration.main_input}:
        other = draft.copy()
        for name in others:
            other.remove(name)
        other.rules.clear()
        why = f"{TEXT_ONLY}; {', '.join(others)} was left out: {why}"[:400]
        yield Candidate(draft=other, why=why, sure=False, leaves_out=True)


_LESSONS: tuple[Callable[[Draft, ProbeResult, Ask], Iterator[Candidate]], ...] = (
    _not_both,
    _patches,
    _missing_inputs,
    _unpacked_axes,
    _documented_rank,
    _documented_elsewhere,
    _mask_as_long,
    _placeholders,
    _index_limits,
    _one_row,
    _whole_numbers,
    _marked_positions,
    _transposed,
    _columns,
    _more_inputs,
    _masked_data,
    _solved_sizes,
    _growth,
    _image_sizes,
    _multiples,
    _more_axes,
    _named_numbers,
    _fewer_inputs,
)

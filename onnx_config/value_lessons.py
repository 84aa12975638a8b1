"""Lessons about the values of inputs: tokens that stand for images or sounds, indices, masks, whole numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from onnx_config.candidate import Ask, Candidate
from onnx_config.config_sizes import config_for, sub_configs
from onnx_config.draft import IMAGE_AXES, Draft
from onnx_config.grid_texts import placed_drafts
from onnx_config.probe import ProbeResult
from onnx_config.refusals import beyond_table, token_counts
from onnx_config.spec import ValueRule

__all__ = ["index_limits", "marked_positions", "placeholder_ids", "placeholders", "whole_numbers"]

_NO_RULE = ValueRule()


def placeholders(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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


def index_limits(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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


def marked_positions(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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


def whole_numbers(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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

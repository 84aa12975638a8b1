"""Lessons about which inputs there are: those that a refusal asks for, and those that are given up."""

from __future__ import annotations

import re
from collections.abc import Iterator

from onnx_config.candidate import Ask, Candidate
from onnx_config.config_sizes import modality_of
from onnx_config.declarations import Role
from onnx_config.draft import GEOMETRY, MASK_ENDING, Draft, is_batch
from onnx_config.grid_texts import generates_from_grids, marked_drafts
from onnx_config.patch_inputs import patch_drafts
from onnx_config.probe import ProbeResult
from onnx_config.refusals import asked_for, exclusive, unwanted
from onnx_config.spec import ValueRule

__all__ = [
    "TEXT_ONLY",
    "fewer_inputs",
    "masked_data",
    "missing_group",
    "missing_inputs",
    "more_inputs",
    "not_both",
    "patches",
    "text_only",
    "unexpected",
]

TEXT_ONLY = "the graph takes text only"
"""What the note of a draft without images and sounds begins with."""

_NO_RULE = ValueRule()


def missing_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Add what the message asks for, or what was ``None`` where the statement needed it."""
    named = asked_for(answer.refusal or "", draft.declaration)
    names = list(named)
    for frame in reversed(answer.frames if "None" in (answer.refusal or "") else ()):
        names += [name for name in frame.names if name in frame.nones]
    for name in dict.fromkeys(names):
        argument = draft.declaration.argument(name)
        if argument is None or name in draft.specs:
            continue
        if argument.role is Role.STATE and name in named:
            yield Candidate(
                draft=_with_states(draft, name), why=f"{name} was added since the model asks for it", sure=True
            )
        if argument.role is Role.DATA:
            if GEOMETRY.search(name) and not generates_from_grids(draft, name):
                yield from text_only(draft, f"sizes would depend on the values of {name}")
            other = draft.copy()
            other.add(name)
            _cover(other, name)
            for marked, why in marked_drafts(other, name):
                yield Candidate(draft=marked, why=why, sure=True)
            yield Candidate(draft=other, why=f"{name} was added since the model asks for it", sure=True)


def _with_states(draft: Draft, name: str) -> Draft:
    """Return the draft with the states of another model, which has a length of its own."""
    other = draft.copy()
    other.add(name)
    stem = name.partition("_")[0]
    own = [f"{stem}_{axis}" if axis == "sequence_length" else axis for axis in other.specs[name].shape]
    other.reshape(name, own)
    return other


def _cover(draft: Draft, mask: str) -> None:
    """Let a mask that was added have the steps of what it hides parts of, where its own are no other input's."""
    data, spec = draft.specs.get(MASK_ENDING.sub("", mask)), draft.specs[mask]
    if data is None or data is spec or len(spec.shape) != len(("rows", "steps")):
        return
    steps = [axis for axis in data.axis_names if not is_batch(axis)]
    others = {axis for other in draft.specs.values() if other is not spec for axis in other.axis_names}
    if len(steps) == 1 and spec.shape[1] not in others:
        draft.reshape(mask, (data.shape[0], steps[0]))


def missing_group(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Add all arguments whose names begin as that of a result does that a statement needed and was ``None``."""
    if "None" not in (answer.refusal or "") or not answer.frames:
        return
    left_out = [
        argument.name
        for argument in draft.declaration.arguments
        if argument.role is Role.DATA and argument.shape and argument.name not in draft.specs
    ]
    for stem in dict.fromkeys(name.partition("_")[0] for name in answer.frames[-1].names if "_" in name):
        group = [name for name in left_out if name.startswith(f"{stem}_") and not GEOMETRY.search(name)]
        if len(group) > 1:
            other = draft.copy()
            for name in group:
                other.add(name)
            why = f"{', '.join(group)} were added, of which a result was missing: {answer.frames[-1].source}"
            yield Candidate(draft=other, why=why[:300], sure=True)


def unexpected(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give what takes the place of an input that the class has in its signature and does not take."""
    for name in [name for name in unwanted(answer.refusal or "") if name in draft.specs]:
        for argument in draft.declaration.arguments:
            if argument.role is Role.ALTERNATIVE and argument.name not in draft.specs:
                other = draft.copy()
                other.remove(name)
                other.add(argument.name)
                why = f"{argument.name} is given in the place of {name}: {answer.refusal}"
                yield Candidate(draft=other, why=why[:300], sure=True)


def not_both(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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


def patches(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give patches in the place of images to what is told how they lie in each image."""
    for other, why in patch_drafts(draft):
        yield Candidate(draft=other, why=f"{why}: {answer.refusal}"[:300], sure=True)


def more_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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


def masked_data(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
    """Give what a mask among the inputs is the mask of, where that is optional and was left out."""
    for mask in draft.specs:
        stem = MASK_ENDING.sub("", mask)
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


def fewer_inputs(draft: Draft, answer: ProbeResult, ask: Ask) -> Iterator[Candidate]:
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

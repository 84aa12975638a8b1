"""Variants: the verified graphs in fewer bits, each with a verdict of its own; one that does not hold is left out.

A variant is a set of further files in the artifact's folder, one for each graph of the model, since that is where the
ecosystem's loaders look. Its verdict is its own too: the float32 graphs stay converted whatever becomes of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onnx_config.errors import FerryError, InputError, ModelError, ResourceError
from onnx_config.export.artifact import read_ferry_file
from onnx_config.parts import GRAPH_FILES, Role
from onnx_config.variants import Variant, variant_file
from tasks.job import Job, StepCost, run_child
from tasks.report import (
    GraphEntry,
    OutputDifference,
    ParityEntry,
    Step,
    VariantEntry,
    Verdict,
)
from tasks.simplify import graph_entry
from tasks.variant_verdicts import VARIANT_STEPS, VerifiedGraph, asked_of, both_decoders, judged

__all__ = ["DTYPES", "Varied", "known_variants", "moved", "parity_of", "vary"]


DTYPES: Mapping[str, Variant] = {"float16": Variant.FP16, "bfloat16": Variant.BF16}
"""Element type that the graphs themselves may be asked for in -> the variant that they then are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Varied:
    """What became of the variants."""

    entries: tuple[VariantEntry, ...]
    """In the order in which they were asked for."""

    folders: dict[str, Path]
    """Variant -> where the files are, of those whose entry lists graphs."""

    cost: StepCost
    """What the children used."""


def vary(
    job: Job,
    parts: Sequence[VerifiedGraph],
    merged: GraphEntry | None,
    variants: Sequence[Variant],
    *,
    suffixed: bool = True,
) -> Varied:
    """Write the variants of verified graphs, and judge each; nothing in the job's ``artifact`` folder changes.

    The files of one that does not hold are removed, unless they are to stand in for the float32 ones: those go to the
    quarantine.

    Args:
        job: The model.
        parts: Its graphs.
        merged: The decoder made of two of them, if there is one.
        variants: Which to make.
        suffixed: Whether the files' names tell the variant; else they are those of the float32 graphs, whose place
            they take.

    Raises:
        FerryError: If a child was interrupted, or failed in a way that another try may mend.
    """
    scratch = job.scratch / ("variants" if suffixed else "halves")
    shutil.rmtree(scratch, ignore_errors=True)
    folders = {variant: scratch / variant for variant in variants}
    for folder in folders.values():
        folder.mkdir(parents=True)
    files = {
        variant: {role: folder / variant_file(GRAPH_FILES[role], variant if suffixed else None) for role in Role}
        for variant, folder in folders.items()
    }
    cost = StepCost(seconds=0.0, peak_rss_bytes=0)
    found: dict[Variant, list[tuple[VerifiedGraph, dict[str, Any]]]] = {variant: [] for variant in variants}
    for part in parts:
        wanted = [v for v in variants if all(answer["refusal"] is None for _, answer in found[v])]
        if not wanted:
            break
        outputs = {variant.value: str(files[variant][Role(part.spec.part)]) for variant in wanted}
        answers, more = _of_part(job, part, outputs, optional=len(parts) > 1)
        cost = _sum(cost, more)
        for variant in wanted:
            found[variant].append((part, answers[variant.value]))
    entries = []
    for variant in variants:
        entry = judged(variant, found[variant], parts, suffixed=suffixed)
        if merged is not None and _holds(entry):
            entry, more = _with_merged(job, entry, files[variant], parts)
            cost = _sum(cost, more)
        if suffixed and not _holds(entry):
            shutil.rmtree(folders[variant])
            entry = entry.model_copy(update={"graphs": ()})
        else:
            size = sum(path.stat().st_size for path in folders[variant].iterdir())
            entry = entry.model_copy(update={"size_bytes": size})
        entries.append(entry)
    there = {entry.variant: folders[Variant(entry.variant)] for entry in entries if entry.graphs}
    return Varied(entries=tuple(entries), folders=there, cost=cost)


def _of_part(
    job: Job, part: VerifiedGraph, outputs: dict[str, str], *, optional: bool
) -> tuple[dict[str, dict[str, Any]], StepCost]:
    request = {**asked_of(job, part), "outputs": outputs, "metadata": {}, "optional": optional}
    try:
        answer, cost = run_child(
            job, Step.PARITY, f"{VARIANT_STEPS}:variants", request, architecture=part.spec.architecture
        )
    # The graphs hold without their variants, whatever these need too much of.
    except (ModelError, ResourceError, InputError) as error:
        refused: dict[str, Any] = {"refusal": _short(error), "notes": [], "graph": None, "result": None, "seconds": 0.0}
        return dict.fromkeys(outputs, refused), StepCost(seconds=0.0, peak_rss_bytes=0)
    return answer["variants"], cost


def _holds(entry: VariantEntry) -> bool:
    return entry.parity is not None and entry.parity.verdict is Verdict.VERIFIED


def _with_merged(
    job: Job, entry: VariantEntry, files: dict[Role, Path], parts: Sequence[VerifiedGraph]
) -> tuple[VariantEntry, StepCost]:
    """Return a variant with the decoder merged of its two; without it where that cannot be had."""
    output = files[Role.DECODER_MERGED]
    request = both_decoders(job, files, output, parts)
    try:
        answer, cost = run_child(job, Step.PARITY, f"{VARIANT_STEPS}:merge", request)
        difference = answer["difference"]
    except (ModelError, ResourceError, InputError) as error:
        difference, cost = _short(error), StepCost(seconds=0.0, peak_rss_bytes=0)
    if difference is not None:
        for left in (output, output.with_name(f"{output.name}_data")):
            left.unlink(missing_ok=True)
        note = f"there is no merged decoder: {difference}"
        return entry.model_copy(update={"notes": (*entry.notes, note)}), cost
    nodes = answer["graph"]["nodes"]
    graph = graph_entry(output, answer["graph"], nodes, role=Role.DECODER_MERGED)
    return entry.model_copy(update={"graphs": (*entry.graphs, graph)}), cost


def _sum(one: StepCost, other: StepCost) -> StepCost:
    return StepCost(seconds=one.seconds + other.seconds, peak_rss_bytes=max(one.peak_rss_bytes, other.peak_rss_bytes))


def _short(error: FerryError) -> str:
    return error.message[:300]


def parity_of(entry: VariantEntry, before: ParityEntry) -> ParityEntry:
    """Return the verdict on graphs whose element type is a variant's, as that of a model; ``before`` is float32's."""
    found = entry.parity
    if found is None:
        detail = "; ".join(entry.notes) or "it could not be made"
        return before.model_copy(update={"verdict": Verdict.NOT_RUN, "detail": detail})
    outputs = tuple(
        OutputDifference(name=o.name, max_abs_diff=o.relative_error * o.largest, tolerance=o.tolerance * o.largest)
        for o in found.outputs
    )
    closest = max(outputs, key=lambda o: o.max_abs_diff / o.tolerance if o.tolerance else 0.0, default=None)
    return ParityEntry(
        verdict=found.verdict,
        device=found.device,
        provider=found.provider,
        shapes=found.shapes,
        max_abs_diff=max((output.max_abs_diff for output in outputs), default=None),
        tolerance=None if closest is None else closest.tolerance,
        # The same axes at the same sizes.
        axes_proven=before.axes_proven,
        outputs=outputs,
        detail=found.detail,
    )


def moved(entries: Iterable[VariantEntry], place: str) -> tuple[VariantEntry, ...]:
    """Return the entries with their files in ``place``, a folder or a URL."""
    return tuple(
        entry.model_copy(
            update={
                "graphs": tuple(
                    graph.model_copy(update={"path": f"{place}/{Path(graph.path).name}"}) for graph in entry.graphs
                )
            }
        )
        for entry in entries
    )


def known_variants(folder: Path, place: str) -> tuple[VariantEntry, ...]:
    """Return the variants of the artifact in ``place``, by the ``ferry.json`` in ``folder``; none where it has none."""
    try:
        known = read_ferry_file(folder) or {}
        entries = [VariantEntry(**entry) for entry in known.get("model", {}).get("variants") or ()]
    except (InputError, ValidationError, TypeError):
        return ()
    return moved(entries, place)

"""Which graphs a model becomes: one or several, with or without a cache, simplified or plain, by what holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx_config import hub
from onnx_config.cache_layout import with_past
from onnx_config.errors import ErrorKind, FerryError, InputError, ModelError, ResourceError
from onnx_config.one_image import of_one_image
from onnx_config.parts import (
    GRAPH_ENTRY,
    Role,
    dual_encoder_parts,
    encoder_decoder_parts,
    fusion_parts,
    prompt_parts,
    text_alone,
    without_images,
)
from onnx_config.spec import ModelSpec, base_axis
from onnx_config.task_detector import normalize_task
from tasks.export import Exported
from tasks.job import Job
from tasks.parity import Checked
from tasks.progress import Progress
from tasks.report import GraphEntry, OutputDifference, ParityEntry, Step, Verdict
from tasks.simplify import Simplified, clear_artifact
from tasks.steps import Steps
from tasks.versions import package_versions

__all__ = ["Graphs", "Part", "best_graphs", "narrow_axes", "verdict_on_all"]

_IMAGE_SIDES = frozenset({"height", "width"})
_READERS = (Role.VISION_ENCODER, Role.AUDIO_ENCODER)


class _NotReadError(ModelError):
    """What reads images or sounds for a text ran out of time or memory; the cause is the error that says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One graph in the job's ``artifact`` folder."""

    spec: ModelSpec
    exported: Exported
    stored: Simplified
    checked: Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """The graphs of a model, in the job's ``artifact`` folder, and what they are worth."""

    spec: ModelSpec
    """What the whole model takes and gives."""

    parts: tuple[Part, ...]

    parity: ParityEntry
    """The verdict on all of them."""

    merged: GraphEntry | None = None
    """A graph made of two others."""

    @property
    def entries(self) -> tuple[GraphEntry, ...]:
        """The graphs, for the report."""
        return (*(part.stored.graph for part in self.parts), *(() if self.merged is None else (self.merged,)))

    @property
    def template(self) -> str:
        """Where they came from: ``direct`` or ``traced`` where one of them did, else ``reused``."""
        uses = {part.exported.use for part in self.parts}
        return next(use for use in ("direct", "traced", "reused") if use in uses)

    @property
    def templates(self) -> tuple[Exported, ...]:
        """Those of a template."""
        return tuple(part.exported for part in self.parts if part.exported.template is not None)

    @property
    def simplified(self) -> bool:
        """Whether all are onnxsim's."""
        return all(part.stored.simplified for part in self.parts)


def best_graphs(progress: Progress, job: Job, spec: ModelSpec, steps: Steps) -> Graphs:
    """Return the graphs of a model with their verdict; what was noted on the way is in ``progress``.

    One that generates text carries its cache, unless its task was asked for without, and an encoder-decoder becomes
    several graphs; where that cannot be had, and was not asked for, the graph of the bare forward pass takes its place.
    Of a model that reads images or sounds in a text, the text alone is had where what reads them runs out of time or
    memory, also with the machine to itself.

    Raises:
        FerryError: If there is no graph that could be compared.
    """
    asked = job.request.options.task
    wanted = _wanted_specs(spec, asked)
    if Role.VISION_ENCODER.value not in {part.part for part in wanted}:
        spec = _without_reader(progress, spec)
        wanted = tuple(replace(part, images=None) for part in wanted)
    insists = asked is not None and normalize_task(asked)[1]
    if not wanted:
        return _whole(progress, job, spec, steps)
    try:
        found = _several(progress, job, spec, wanted, steps, insists=insists)
    except ModelError as error:
        if insists:
            raise
        failure, is_read = error.message, not isinstance(error, _NotReadError)
    else:
        is_read = True
        if insists or found.parity.verdict is Verdict.VERIFIED:
            return found
        failure = found.parity.detail or found.parity.verdict.value
    if spec.boxes:
        progress.notes.append(f"the graphs are asked about points only, since with boxes they do not hold: {failure}")
        clear_artifact(job)
        return best_graphs(progress, job, replace(spec, boxes=()), steps)
    what = "without its cache, since with it the graph" if len(wanted) == 1 else "as one graph, since its parts"
    if spec.images is not None:
        what = "without a graph of its images, since its parts"
    progress.notes.append(f"{what} {'does' if len(wanted) == 1 else 'do'} not hold: {failure}")
    clear_artifact(job)
    if spec.images is not None:
        return best_graphs(progress, job, _without_reader(progress, spec), steps)
    return _whole(progress, job, spec, steps, reads=is_read)


def _without_reader(progress: Progress, spec: ModelSpec) -> ModelSpec:
    """Return the spec of what a model is without the graph that would have made features of its images apart."""
    if spec.images is None:
        return spec
    alone = without_images(spec)
    progress.notes.append(alone.assumed[-1])
    return alone


def _wanted_specs(spec: ModelSpec, asked: str | None) -> tuple[ModelSpec, ...]:
    """Return the specs of what a model should rather become than its bare forward pass; empty: nothing.

    Raises:
        ModelError: If a cache was asked for and the model keeps none that could be carried (``unsupported``).
    """
    past = asked is None or normalize_task(asked)[1]
    if parts := encoder_decoder_parts(spec, with_past=past):
        return parts
    if past and (parts := fusion_parts(spec)):
        return parts
    if parts := dual_encoder_parts(spec) or prompt_parts(spec):
        return parts
    continued = _continued(text_alone(spec), asked)
    return () if continued is None else (continued,)


def _whole(progress: Progress, job: Job, spec: ModelSpec, steps: Steps, *, reads: bool = True) -> Graphs:
    """Return the one graph of the forward pass; of a text alone, where images have grids or nothing ``reads`` them."""
    alone = text_alone(spec, always=not reads)
    progress.notes += alone.assumed[len(spec.assumed) :]
    spec = alone
    progress.spec = spec
    part = Part(spec=spec, **_named(_verified_graph(progress, job, spec, steps)))
    progress.notes += part.exported.notes
    progress.notes += part.checked.notes
    return Graphs(spec=spec, parts=(part,), parity=part.checked.entry)


def _named(made: tuple[Exported, Simplified, Checked]) -> dict[str, Any]:
    return dict(zip(("exported", "stored", "checked"), made, strict=True))


def _several(
    progress: Progress, job: Job, spec: ModelSpec, wanted: tuple[ModelSpec, ...], steps: Steps, *, insists: bool
) -> Graphs:
    """Return a graph for each of ``wanted``; the first that does not hold ends it.

    Raises:
        _NotReadError: If what reads images or sounds for a text ran out, and nothing ``insists`` on it.
        FerryError: If there is no graph that could be compared.
    """
    alone = len(wanted) == 1
    if alone:
        progress.notes += wanted[0].assumed[len(spec.assumed) :]
        spec = wanted[0]
    progress.spec = spec
    parts: list[Part] = []
    for part_spec in wanted:
        try:
            part = _part(progress, job, part_spec, steps)
        except ResourceError as error:
            # What ran out beside others is tried once more, with the machine to itself.
            spares = error.kind.retried_alone and progress.attempts > 1 and not insists
            if not spares or not _reads_for_a_text(part_spec, wanted):
                raise
            what = f"the graph of the {part_spec.part} could not be had: {error.message}"
            raise _NotReadError(what, kind=ErrorKind.EXPORT_FAILED) from error
        parts.append(part)
        if part.checked.entry.verdict is not Verdict.VERIFIED:
            break
        if not alone and (narrow := narrow_axes(part.spec, part.stored)):
            raise ModelError(
                f"The graph of the {part_spec.part} takes the traced size of {', '.join(narrow)} only.",
                kind=ErrorKind.EXPORT_FAILED,
            )
    parity = verdict_on_all([(part.spec.part, part.checked.entry) for part in parts])
    merged = None
    if not alone and parity.verdict is Verdict.VERIFIED:
        with progress.during(Step.PARITY):
            specs = tuple(part.spec for part in parts)
            joined = steps.join(job, spec, specs, {part.spec.part: part.stored for part in parts})
        progress.saw(joined.cost)
        progress.notes += joined.notes
        merged = joined.merged
        if joined.difference is not None:
            parity = parity.model_copy(update={"verdict": Verdict.MISMATCH, "detail": joined.difference})
    for part in parts:
        progress.notes += part.exported.notes
        progress.notes += part.checked.notes
    return Graphs(spec=spec, parts=tuple(parts), parity=parity, merged=merged)


def _reads_for_a_text(spec: ModelSpec, wanted: Sequence[ModelSpec]) -> bool:
    """Return whether a part makes features of images or sounds that a text can do without."""
    return spec.part in _READERS and any(part.part == Role.EMBED_TOKENS for part in wanted)


def _part(progress: Progress, job: Job, spec: ModelSpec, steps: Steps) -> Part:
    """Return a graph of several; an encoder that holds for no other number of images gives way to one of one image.

    Raises:
        ModelError: If there is no graph that could be compared.
    """
    single = of_one_image(spec)
    try:
        part = Part(spec=spec, **_named(_verified_graph(progress, job, spec, steps)))
    except ModelError as error:
        if single is None:
            raise
        why = error.message
    else:
        narrow = narrow_axes(spec, part.stored)
        if single is None or (part.checked.entry.verdict is Verdict.VERIFIED and not narrow):
            return part
        why = part.checked.entry.detail or f"with more it takes the traced size of {', '.join(narrow)} only"
    part = Part(spec=single, **_named(_verified_graph(progress, job, single, steps)))
    progress.notes.append(f"the graph of the {spec.part} takes one image at a time: {why}"[:300])
    return part


def verdict_on_all(verdicts: Sequence[tuple[str, ParityEntry]]) -> ParityEntry:
    """Return what the verdicts on all graphs, each with its role, say of the model."""
    entries = [entry for _, entry in verdicts]
    if len(entries) == 1:
        return entries[0]
    worst = next((entry for entry in entries if entry.verdict is not Verdict.VERIFIED), entries[0])
    detail = None
    if worst.verdict is not Verdict.VERIFIED:
        detail = f"{verdicts[entries.index(worst)][0]}: {worst.detail}"
    outputs = tuple(
        output.model_copy(update={"name": f"{role}.{output.name}"})
        for role, entry in verdicts
        for output in entry.outputs
    )
    closest = max(outputs, key=_closeness, default=None)
    return ParityEntry(
        verdict=worst.verdict,
        device=worst.device,
        provider=worst.provider,
        shapes=min(entry.shapes for entry in entries),
        max_abs_diff=max((output.max_abs_diff for output in outputs), default=None),
        tolerance=None if closest is None else closest.tolerance,
        axes_proven=tuple(sorted({axis for entry in entries for axis in entry.axes_proven})),
        outputs=outputs,
        detail=detail,
        cells=tuple(cell for entry in entries for cell in entry.cells),
        session=entries[0].session,
        device_memory_bytes=max((e.device_memory_bytes or 0 for e in entries), default=0) or None,
    )


def _closeness(output: OutputDifference) -> float:
    return output.max_abs_diff / output.tolerance if output.tolerance else output.max_abs_diff


def _continued(spec: ModelSpec, asked: str | None) -> ModelSpec | None:
    """Return the spec of the graph with a cache where there is to be one.

    Raises:
        ModelError: If one was asked for and the model keeps none that could be carried (``unsupported``).
    """
    if asked is not None:
        return with_past(spec) if normalize_task(asked)[1] else None
    if spec.task_family != "text-generation":
        return None
    try:
        return with_past(spec)
    except ModelError:
        return None


def _verified_graph(
    progress: Progress, job: Job, spec: ModelSpec, steps: Steps
) -> tuple[Exported, Simplified, Checked]:
    """Return a graph and its verdict; one that was bound to a template and does not hold gives way to one that was not.

    What is unstable is so by itself.
    """
    exported, stored, checked = _graph_of(progress, job, spec, steps)
    if checked.entry.verdict is Verdict.MISMATCH and exported.template is not None:
        why = checked.entry.detail or checked.entry.verdict.value
        progress.notes.append(f"traced with its weights, since what was bound to the template does not hold: {why}")
        exported, stored, checked = _graph_of(progress, job, spec, steps, direct=True)
    return exported, stored, checked


def _graph_of(
    progress: Progress, job: Job, spec: ModelSpec, steps: Steps, *, direct: bool = False
) -> tuple[Exported, Simplified, Checked]:
    """Return a graph and its verdict; one whose axes are in doubt gives way to one that has them fixed."""
    with progress.during(Step.EXPORT):
        exported = steps.export(job, spec, direct=direct)
    progress.saw(exported.cost)
    stored, checked = _simplify_and_check(progress, job, spec, exported, steps)
    if doubtful := _doubtful_axes(spec, stored, checked.entry):
        with progress.during(Step.EXPORT):
            exported = steps.export(job, spec, fixed=doubtful, direct=direct)
        progress.saw(exported.cost)
        progress.notes.append(
            f"{', '.join(doubtful)} is fixed, since as a dynamic axis it did not hold: "
            f"{checked.entry.detail or 'the model takes no second size to compare at'}"
        )
        stored, checked = _simplify_and_check(progress, job, spec, exported, steps)
    return exported, stored, checked


def _doubtful_axes(spec: ModelSpec, stored: Simplified, parity: ParityEntry) -> list[str]:
    """Return the dynamic axes that the graph should rather not have.

    Of a verified graph, those that were not compared at two sizes. Of any other, the size of an image: the one axis
    that a model may take and yet bake into its graph.
    """
    dynamic = {axis for tensor in stored.graph.inputs for axis in tensor.shape if isinstance(axis, str)}
    dynamic &= spec.axis_ranges.keys()
    doubtful = dynamic - set(parity.axes_proven) if parity.verdict is Verdict.VERIFIED else dynamic & _IMAGE_SIDES
    # An image with one free side is of no use.
    return sorted(doubtful | (dynamic & _IMAGE_SIDES if doubtful & _IMAGE_SIDES else set()))


def narrow_axes(spec: ModelSpec, stored: Simplified) -> list[str]:
    """Return the axes at which the model takes many sizes and the graph one that nobody declared.

    The sides of an image are none of them: a preprocessor makes every image the size that was traced.
    """
    fixed = {tensor.name: tensor.shape for tensor in stored.graph.inputs}
    narrow = set()
    for tensor in spec.inputs:
        for here, there in zip(tensor.shape, fixed.get(tensor.name, ()), strict=False):
            if isinstance(here, str) and isinstance(there, int):
                low, high = spec.axis_ranges.get(base_axis(here), (there, there))
                if base_axis(here) not in _IMAGE_SIDES and low != high:
                    narrow.add(base_axis(here))
    return sorted(narrow)


def _simplify_and_check(
    progress: Progress, job: Job, spec: ModelSpec, exported: Exported, steps: Steps
) -> tuple[Simplified, Checked]:
    """Return the graph to store and its verdict; a simplified graph that fails gives way to a plain one that holds."""
    metadata = _birth_certificate(job, spec)
    with progress.during(Step.SIMPLIFY):
        try:
            stored = steps.simplify(job, spec, exported, metadata, enabled=job.request.options.simplify)
        except InputError:
            # A checkpoint that cannot be bound is one that cannot be exported.
            progress.step = Step.EXPORT
            raise
    progress.saw(stored.cost)
    if stored.reason is not None:
        progress.notes.append(f"the plain graph is kept: {stored.reason}")
    failure: FerryError | None = None
    checked: Checked | None = None
    template = exported.template
    proven = template is not None and template.is_proven(simplified=stored.simplified)
    with progress.during(Step.PARITY):
        try:
            checked = steps.parity(job, spec, stored, reused=exported.use == "reused", proven=proven)
        except FerryError as error:
            if not stored.simplified or error.kind is not ErrorKind.RUNTIME_FAILED:
                raise
            failure = error
    if checked is not None:
        progress.saw(checked.cost)
        if checked.entry.verdict is Verdict.VERIFIED and template is not None and not proven:
            template.note_proven(simplified=stored.simplified)
        # What is unstable is so by itself, whatever the graph is.
        if checked.entry.verdict is not Verdict.MISMATCH or not stored.simplified:
            return stored, checked
    with progress.during(Step.SIMPLIFY):
        plain = steps.simplify(job, spec, exported, metadata, enabled=False)
    with progress.during(Step.PARITY):
        again = steps.parity(job, spec, plain)
    progress.saw(again.cost)
    if again.entry.verdict is not Verdict.VERIFIED:
        return plain, again
    why = failure.message if failure is not None else checked.entry.detail if checked is not None else None
    progress.notes.append(f"the plain graph is kept: the simplified one does not hold ({why})")
    return plain, again


def _birth_certificate(job: Job, spec: ModelSpec) -> dict[str, str]:
    """Return what a graph says of its origin in ``metadata_props``.

    The verdict stands there as ``verified`` while the file is still in the scratch folder, so that the file compared
    is the file stored; one that fails is stamped anew on its way to the quarantine.
    """
    certificate = {
        "onnx_ferry.source": job.request.model_id if not hub.is_folder(job.request.model_id) else "local folder",
        "onnx_ferry.revision": job.revision,
        "onnx_ferry.task": spec.task,
        "onnx_ferry.architecture": spec.architecture,
        GRAPH_ENTRY: spec.part,
        "onnx_ferry.key": job.key,
        "onnx_ferry.verdict": Verdict.VERIFIED.value,
        **({} if spec.code_sha256 is None else {"onnx_ferry.code_sha256": spec.code_sha256}),
    }
    return certificate | {f"onnx_ferry.version.{name}": text for name, text in package_versions().items()}

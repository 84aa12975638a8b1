"""The verdict on a variant: what a child process said of each of its graphs, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from onnx_config.parts import Role
from onnx_config.spec import ModelSpec
from onnx_config.variants import Variant, variant_file
from tasks.job import Job, run_child
from tasks.report import AgreementEntry, Step, VariantEntry, VariantOutputEntry, VariantParityEntry, Verdict
from tasks.simplify import Simplified, graph_entry

__all__ = ["VARIANT_STEPS", "VerifiedGraph", "asked_of", "both_decoders", "judge_again", "judged"]

VARIANT_STEPS = "onnx_config.export.variant_steps"
"""Where the steps are that a child runs."""


class VerifiedGraph(Protocol):
    """A graph that variants are of."""

    @property
    def spec(self) -> ModelSpec:
        """What it takes and gives."""

    @property
    def stored(self) -> Simplified:
        """Its file."""


def asked_of(job: Job, part: VerifiedGraph) -> dict[str, Any]:
    """Return what a child needs to know to compare variants of a graph with its model."""
    return {
        "folder": str(job.source),
        "spec": part.spec.to_json(),
        "graph": str(part.stored.path),
        "inputs": [tensor.model_dump() for tensor in part.stored.graph.inputs],
        "limits": list(part.stored.limits),
        "device": job.request.options.device.value,
        "threads": job.workspace.threads,
    }


def both_decoders(job: Job, files: Mapping[Role, Path], output: Path, parts: Sequence[VerifiedGraph]) -> dict[str, Any]:
    """Return what a child is asked of the decoder merged of a variant's two."""
    two = {part.spec.part: part for part in parts if part.spec.part in (Role.DECODER, Role.DECODER_WITH_PAST)}
    return {
        **{role: str(files[Role(role)]) for role in two},
        "output": str(output),
        "inputs": {role: [t.model_dump() for t in part.stored.graph.inputs] for role, part in two.items()},
        "sizes": {axis: size for part in two.values() for axis, size in part.spec.sizes.items()},
        "device": job.request.options.device.value,
        "threads": job.workspace.threads,
    }


def judged(
    variant: Variant,
    found: Sequence[tuple[VerifiedGraph, dict[str, Any]]],
    parts: Sequence[VerifiedGraph],
    *,
    suffixed: bool,
) -> VariantEntry:
    """Return what the answers for all parts say of a variant."""
    alone = len(parts) == 1
    seconds = round(sum(answer["seconds"] for _, answer in found), 3)
    refused = next((answer["refusal"] for _, answer in found if answer["refusal"] is not None), None)
    if refused is not None:
        return VariantEntry(variant=variant.value, seconds=seconds, notes=(refused,))
    notes = [f"{part.spec.part}: {n}" if not alone else n for part, answer in found for n in answer["notes"]]
    results = [(part, answer["result"]) for part, answer in found]
    outputs = tuple(
        VariantOutputEntry(**{**output, "name": output["name"] if alone else f"{part.spec.part}.{output['name']}"})
        for part, result in results
        for output in result["outputs"]
    )
    worst = next(((p, r) for p, r in results if r["outcome"] != Verdict.VERIFIED.value), results[0])
    detail = worst[1]["detail"]
    closest = max(
        outputs, key=lambda o: o.relative_error / o.tolerance if o.tolerance else o.relative_error, default=None
    )
    return VariantEntry(
        variant=variant.value,
        graphs=tuple(
            graph_entry(
                Path(variant_file(part.stored.graph.path, variant if suffixed else None)),
                answer["graph"],
                part.stored.graph.nodes,
                role=part.spec.part,
            )
            for part, answer in found
        ),
        parity=VariantParityEntry(
            verdict=Verdict(worst[1]["outcome"]),
            device=worst[1]["device"],
            provider=worst[1]["provider"],
            shapes=min(result["shapes"] for _, result in results),
            max_abs_diff=max((output.max_abs_diff for output in outputs), default=None),
            relative_error=None if closest is None else closest.relative_error,
            tolerance=None if closest is None else closest.tolerance,
            cosine=min((output.cosine for output in outputs), default=None),
            agreement=_agreement([result["agreement"] for _, result in results if result["agreement"] is not None]),
            outputs=outputs,
            detail=detail if alone or detail is None else f"{worst[0].spec.part}: {detail}",
        ),
        seconds=seconds,
        notes=tuple(notes),
    )


def _agreement(found: Sequence[dict[str, Any]]) -> AgreementEntry | None:
    if not found:
        return None
    choices = sum(one["choices"] for one in found)
    rate = sum(one["rate"] * one["choices"] for one in found) / choices
    return AgreementEntry(rate=rate, choices=choices, over=found[0]["over"])


def judge_again(
    job: Job, parts: Sequence[VerifiedGraph], entries: Sequence[VariantEntry], folder: Path, *, suffixed: bool = True
) -> tuple[VariantEntry, ...]:
    """Compare variants that are there with PyTorch once more; return their entries with the verdicts of now.

    Args:
        job: The model.
        parts: The float32 graphs; where a variant stands in their place, that one's.
        entries: The variants, each with the files that it has in ``folder``.
        folder: The artifact.
        suffixed: Whether the files' names tell the variant.

    Raises:
        FerryError: If they could not be compared; that ONNX Runtime refuses one is a verdict on it.
    """
    files = {e.variant: {graph.role: str(folder / graph.path) for graph in e.graphs} for e in entries}
    found: dict[str, list[tuple[VerifiedGraph, dict[str, Any]]]] = {entry.variant: [] for entry in entries}
    for part in parts:
        request = {**asked_of(job, part), "files": {v: paths[part.spec.part] for v, paths in files.items()}}
        answer, _ = run_child(job, Step.PARITY, f"{VARIANT_STEPS}:judge", request, architecture=part.spec.architecture)
        for variant, one in answer["variants"].items():
            found[variant].append((part, one))
    found_now = []
    for entry in entries:
        now = judged(Variant(entry.variant), found[entry.variant], parts, suffixed=suffixed).parity
        merged = files[entry.variant].get(Role.DECODER_MERGED)
        if now is None:
            refused = next(answer["refusal"] for _, answer in found[entry.variant] if answer["refusal"] is not None)
            now = _refused(refused, entry, device=job.request.options.device.value)
        elif merged is not None and now.verdict is Verdict.VERIFIED:
            paths = {Role(role): Path(path) for role, path in files[entry.variant].items()}
            request = both_decoders(job, paths, Path(merged), parts)
            difference = run_child(job, Step.PARITY, f"{VARIANT_STEPS}:compare_merged", request)[0]["difference"]
            if difference is not None:
                now = now.model_copy(update={"verdict": Verdict.MISMATCH, "detail": difference})
        found_now.append(entry.model_copy(update={"parity": now}))
    return tuple(found_now)


def _refused(message: str, entry: VariantEntry, *, device: str) -> VariantParityEntry:
    """Return the verdict on a variant that cannot be run at all."""
    before = entry.parity
    return VariantParityEntry(
        verdict=Verdict.MISMATCH,
        device=device if before is None else before.device,
        provider="CPUExecutionProvider" if before is None else before.provider,
        shapes=0,
        max_abs_diff=None,
        relative_error=None,
        tolerance=None,
        cosine=None,
        agreement=None,
        outputs=(),
        detail=message[:300],
    )

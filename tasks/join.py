"""Join: what makes of several graphs one model: a decoder merged of two, and a look at what all generate together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_config.errors import ModelError
from onnx_config.parts import GRAPH_FILES, Role
from onnx_config.spec import ModelSpec
from tasks.job import Job, StepCost, run_child
from tasks.memory import estimate_bytes
from tasks.report import GraphEntry, Step
from tasks.simplify import Simplified, graph_entry

__all__ = ["Joined", "compare_together", "join"]

_STEPS = "onnx_config.export.part_steps"
_TELLING = {Role.DECODER_WITH_PAST, Role.DECODER_MERGED, Role.PROMPT_DECODER}
"""Roles of graphs that are of use with others only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What came of it."""

    merged: GraphEntry | None
    """The decoder that begins and goes on; ``None``: there is none."""

    difference: str | None
    """What the graphs generate otherwise than PyTorch; ``None``: nothing."""

    notes: tuple[str, ...]
    """What was compared, or why not."""

    cost: StepCost
    """What it used."""


def join(job: Job, spec: ModelSpec, parts: Sequence[ModelSpec], stored: Mapping[str, Simplified]) -> Joined:
    """Merge the decoders in the job's ``artifact`` folder, and compare what its graphs generate with PyTorch.

    Args:
        job: The model.
        spec: The whole model.
        parts: What its graphs take and give.
        stored: Role -> the graph of that part.

    Raises:
        ModelError: If ONNX Runtime refuses the merged decoder.
        ResourceError: If a child ran out of time or memory, or died.
    """
    graphs = {role: str(graph.path) for role, graph in stored.items()}
    notes: list[str] = []
    merged, cost = None, StepCost(seconds=0.0, peak_rss_bytes=0)
    if Role.DECODER_WITH_PAST in stored:
        merged, cost, notes = _merged(job, graphs, stored[Role.DECODER])
    if merged is not None:
        graphs[Role.DECODER_MERGED] = str(stored[Role.DECODER].path.with_name(merged.path))
    together = compare_together(job, spec, parts, graphs)
    return Joined(
        merged=merged if _TELLING & graphs.keys() else None,
        difference=together.difference,
        notes=(*notes, *together.notes),
        cost=StepCost(
            seconds=cost.seconds + together.cost.seconds,
            peak_rss_bytes=max(cost.peak_rss_bytes, together.cost.peak_rss_bytes),
        ),
    )


def compare_together(job: Job, spec: ModelSpec, parts: Sequence[ModelSpec], graphs: Mapping[str, str]) -> Joined:
    """Compare what graphs (role -> path) say together with what the model says.

    Raises:
        ModelError: If ONNX Runtime refuses a graph.
        ResourceError: If the child ran out of time or memory, or died.
    """
    nothing = StepCost(seconds=0.0, peak_rss_bytes=0)
    if not _TELLING & graphs.keys():
        return Joined(merged=None, difference=None, notes=(), cost=nothing)
    if estimate_bytes(job.weight_bytes) > job.memory_bytes:
        note = "greedy generation was not compared, since the model needs more than its share of the memory"
        return Joined(merged=None, difference=None, notes=(note,), cost=nothing)
    answer, cost = run_child(
        job,
        Step.PARITY,
        f"{_STEPS}:generation",
        {
            "folder": str(job.source),
            "spec": spec.to_json(),
            "parts": [part.to_json() for part in parts],
            "graphs": dict(graphs),
            "device": job.request.options.device.value,
            "threads": job.workspace.threads,
        },
    )
    notes = (answer["note"],) if answer["note"] else ()
    return Joined(merged=None, difference=answer["difference"], notes=notes, cost=cost)


def _merged(job: Job, graphs: Mapping[str, str], decoder: Simplified) -> tuple[GraphEntry | None, StepCost, list[str]]:
    """Return the decoder merged of the two, what that cost, and why there is none."""
    output = decoder.path.with_name(GRAPH_FILES[Role.DECODER_MERGED])
    try:
        answer, cost = run_child(job, Step.SIMPLIFY, f"{_STEPS}:merge", {**graphs, "output": str(output)})
    except ModelError as error:
        # Loaders that know no merged decoder take the two.
        output.unlink(missing_ok=True)
        none = StepCost(seconds=0.0, peak_rss_bytes=0)
        return None, none, [f"there is no merged decoder: {error.message[:300]}"]
    return graph_entry(output, answer["graph"], answer["graph"]["nodes"], role=Role.DECODER_MERGED), cost, []

"""The other ways to run a graph that is right in one: each provider at each optimisation level, at the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from onnx_config.cuda import CUDA_PROVIDER
from onnx_config.errors import ModelError
from onnx_config.export.bisect import Divergence, first_module_apart, first_node_apart
from onnx_config.export.failure_case import write_case
from onnx_config.export.graph_choices import choices_of_graph
from onnx_config.export.parity import Cell, Outcome, ParityResult, check_parity
from onnx_config.export.reference import Reference
from onnx_config.export.session import open_session

__all__ = ["Way", "keep_failure", "more_ways", "where_they_part"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a graph is run."""

    device: str
    """``cpu`` or ``cuda``."""
    level: str
    """One of `onnx_config.export.session.LEVELS`."""

    def session(self, threads: int) -> dict[str, Any]:
        """Return the arguments of `onnx_config.export.session.open_session`."""
        return {"device": self.device, "level": self.level, "threads": threads}


def more_ways(
    result: ParityResult,
    path: Path,
    references: Sequence[Reference],
    ways: Sequence[Way],
    *,
    threads: int,
    dtype: str = "float32",
) -> ParityResult:
    """Return the result with what the graph computes in other ways; the first that does not hold decides.

    A way in which ONNX Runtime refuses the graph is a cell of its own, and does not hold.

    Raises:
        InputError: If a device is not there.
    """
    for way in ways:
        where = f"with {'CUDA' if way.device == 'cuda' else 'the CPU'} at optimisation level {way.level}"
        try:
            session = open_session(path, **way.session(threads))
        except ModelError as error:
            cell = _refused(way, references[0], error.message, dtype)
            result = _with(result, (cell,), Outcome.MISMATCH, f"{where}: {error.message}")
            continue
        choices = partial(choices_of_graph, path, device=way.device, threads=threads)
        found = check_parity(session, references, choices=choices, level=way.level, dtype=dtype)
        result = _with(result, found.cells, found.outcome, f"{where}: {found.detail}")
    return result


def _with(result: ParityResult, cells: tuple[Cell, ...], outcome: Outcome, detail: str) -> ParityResult:
    result = replace(result, cells=(*result.cells, *cells))
    if outcome is Outcome.VERIFIED or result.outcome is not Outcome.VERIFIED:
        return result
    return replace(result, outcome=outcome, detail=detail)


def _refused(way: Way, reference: Reference, why: str, dtype: str) -> Cell:
    return Cell(
        provider=CUDA_PROVIDER if way.device == "cuda" else "CPUExecutionProvider",
        optimization=way.level,
        dtype=dtype,
        shape=reference.shape.label,
        sizes=dict(reference.shape.sizes),
        verdict=Outcome.MISMATCH,
        output=None,
        max_abs_diff=None,
        tolerance=None,
        detail=why,
    )


def keep_failure(result: ParityResult, path: Path, references: Sequence[Reference], folder: Path) -> Cell | None:
    """Write the first shape that does not hold into ``folder``; return its cell, or ``None`` where all hold.

    Raises:
        OSError: If it cannot be written.
    """
    at = result.first_failure
    if at is None:
        return None
    cell = result.cells[at]
    # Every way is a row of the same shapes.
    reference = next((r for r in references if r.shape.label == cell.shape), references[0])
    tolerances = {output.name: output.tolerance for output in result.outputs}
    write_case(folder, path, reference, cell, tolerances=tolerances)
    return cell


def where_they_part(
    result: ParityResult,
    path: Path,
    references: Sequence[Reference],
    *,
    load: Callable[[], Any],
    flags: Mapping[str, Any],
    threads: int,
) -> Divergence | None:
    """Return the first node that goes wrong at the first shape that does not hold; ``None``: none could be found.

    Args:
        result: What was found.
        path: The graph.
        references: What PyTorch computed at all shapes.
        load: Returns the model anew.
        flags: Further keyword arguments of ``forward``.
        threads: Of ONNX Runtime.

    Raises:
        ModelError: If ONNX Runtime refuses the graph.
    """
    at = result.first_failure
    if at is None:
        return None
    cell = result.cells[at]
    inputs = next((r for r in references if r.shape.label == cell.shape), references[0]).inputs
    way = Way("cuda" if cell.provider.startswith("CUDA") else "cpu", cell.optimization)
    plain = Way("cpu", "disable")
    if way != plain:
        found = first_node_apart(path, inputs, usual=plain.session(threads), other=way.session(threads))
        if found is not None:
            return found
    return first_module_apart(path, load(), inputs, flags=flags, threads=threads)

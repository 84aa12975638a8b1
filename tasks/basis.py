"""The basis of a verdict: what it takes, beside the files, to compare an artifact with its model once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_config.errors import InputError
from onnx_config.export.artifact import FERRY_FILE, read_ferry_file
from onnx_config.spec import ModelSpec
from onnx_config.variants import Variant
from tasks.graphs import Graphs
from tasks.report import ModelEntry
from tasks.request import ConversionOptions, ConversionRequest, Device

__all__ = ["Basis", "Graph", "basis_of", "read_basis"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What is known of one graph."""

    role: str
    spec: ModelSpec
    """What it takes and gives."""

    limits: tuple[dict[str, Any], ...]
    """The sizes beyond which it refuses, each an `onnx_config.export.limits.AxisLimit` as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What an artifact's ``ferry.json`` says of how it came about."""

    entry: ModelEntry
    """The report's entry of its conversion; paths are relative to the folder."""

    request: ConversionRequest
    """How the model was asked for."""

    spec: ModelSpec
    """The whole model."""

    graphs: tuple[Graph, ...]
    """Those that are compared one by one."""


def basis_of(request: ConversionRequest, graphs: Graphs) -> dict[str, Any]:
    """Return the basis of a verdict on these graphs, as JSON."""
    return {
        "revision": request.revision,
        "options": request.options.to_json(),
        "spec": graphs.spec.to_json(),
        "graphs": [
            {"role": part.spec.part, "spec": part.spec.to_json(), "limits": list(part.stored.limits)}
            for part in graphs.parts
        ],
    }


def read_basis(folder: Path) -> Basis:
    """Return the basis of the artifact in a folder.

    Raises:
        InputError: If there is none, or its ``ferry.json`` cannot be read.
    """
    value = read_ferry_file(folder)
    if value is None:
        raise InputError(
            f"{str(folder)!r} holds no {FERRY_FILE}, so that nobody knows what its graphs were made of. Give the "
            "folder of an artifact, or what `ferry catalog list` shows."
        )
    basis = value.get("basis")
    if not isinstance(basis, Mapping):
        raise InputError(
            f"The {FERRY_FILE} in {str(folder)!r} does not say what each graph takes, as it was written by an earlier "
            "version. Convert the model again."
        )
    try:
        entry = ModelEntry.model_validate(value["model"])
        options = {
            **basis["options"],
            "device": Device(basis["options"]["device"]),
            "variants": tuple(map(Variant, basis["options"].get("variants", ()))),
        }
        return Basis(
            entry=entry,
            request=ConversionRequest(
                model_id=entry.id, revision=basis["revision"], options=ConversionOptions(**options)
            ),
            spec=ModelSpec.from_json(basis["spec"]),
            graphs=tuple(
                Graph(role=graph["role"], spec=ModelSpec.from_json(graph["spec"]), limits=tuple(graph["limits"]))
                for graph in basis["graphs"]
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The {FERRY_FILE} in {str(folder)!r} cannot be understood: {type(error).__name__}: {error}. "
            "Convert the model again."
        ) from error

"""A tiny model taken through the steps of a conversion, and copies of its graph with something changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import tiny_models

from onnx_config.spec import ModelSpec

CERTIFICATE = {"onnx_ferry.source": "tiny", "onnx_ferry.verdict": "verified"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model folder, its plain graph, and its stored one with what the steps answered."""

    source: Path
    spec: ModelSpec
    traced: Path
    stored: Path
    exported: dict[str, Any]
    simplified: dict[str, Any]

    def parity(self, graph: Path | None = None, **options: Any) -> dict[str, Any]:
        """Run the step on a graph, the stored one by default."""
        from onnx_config.export import steps

        return steps.parity({**self.check_request(graph), **options})

    def check_request(self, graph: Path | None = None) -> dict[str, Any]:
        """Return what the step is asked."""
        return {"folder": str(self.source), "spec": self.spec.to_json(), **check_request(graph or self.stored)}


def check_request(graph: Path) -> dict[str, Any]:
    """Return what the step that compares ``graph`` is asked, but for the model."""
    from onnx_config.export.graph_file import read_graph, summarize

    summary = asdict(summarize(read_graph(graph)))
    return {
        "graph": str(graph),
        "inputs": list(summary["inputs"]),
        "limits": list(summary["limits"]),
        "device": "cpu",
        "threads": 1,
        "float64": "half",
        "mapped": False,
    }


def convert(name: str, folder: Path) -> Converted:
    """Build the tiny model ``name`` and take it through the steps, in this process."""
    from onnx_config.export import steps

    source = tiny_models.build(name, folder / "source")
    traced, stored = folder / "traced.onnx", folder / "stored" / "model.onnx"
    stored.parent.mkdir()
    # torch and the exporter warn of their own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = steps.detect({"folder": str(source)})
        # Through JSON, as it goes to the child and back.
        request = {"folder": str(source), "spec": json.loads(json.dumps(spec)), "dtype": "float32", "opset": None}
        exported = steps.export({**request, "output": str(traced)})
        simplified = steps.simplify(
            {"graph": str(traced), "output": str(stored), "metadata": CERTIFICATE, "simplify": True}
        )
    return Converted(
        source=source,
        spec=ModelSpec.from_json(spec),
        traced=traced,
        stored=stored,
        exported=exported,
        simplified=simplified,
    )


def edited(graph: Path, change: Callable[[onnx.ModelProto], object], to: Path) -> Path:
    """Write a copy of ``graph`` with ``change`` applied to ``to`` and return it."""
    model = onnx.load(str(graph))
    change(model)
    onnx.save(model, str(to))
    return to

"""How a converted model is loaded, in the languages that people load it from; text to copy, never run here."""

from __future__ import annotations

import json
from pathlib import PurePath

from db.records import ConversionRecord

__all__ = ["snippets"]

# What stands for an axis of an input made up for a first run.
_SMALL = 2


def snippets(record: ConversionRecord) -> list[tuple[str, str]]:
    """Return title and code for each way to load the artifact; empty where there is none, or only one in quarantine."""
    artifact = record.artifact
    if artifact is None or artifact.quarantined or not artifact.graphs:
        return []
    graph = artifact.graphs[0]
    # JSON's string is Python's and JavaScript's too, whatever the model's name has in it.
    folder, file = json.dumps(artifact.path), json.dumps(str(PurePath(artifact.path) / graph.path))
    feed = "\n".join(
        f"    {json.dumps(tensor.name)}: np.ones({_sizes(tensor.shape)}, dtype={json.dumps(tensor.dtype)}),"
        for tensor in graph.inputs
    )
    found = [
        (
            "onnx-ferry",
            (
                "from onnx_config import AutoModelForONNX\n\n"
                f"model = AutoModelForONNX.from_pretrained({folder})\n"
                "outputs = model(**inputs)"
            ),
        ),
        (
            "ONNX Runtime",
            (
                "import numpy as np\nimport onnxruntime\n\n"
                f"session = onnxruntime.InferenceSession({file})\n"
                f"outputs = session.run(None, {{\n{feed}\n}})"
            ),
        ),
    ]
    if record.task:
        found.append(
            (
                "transformers.js",
                (
                    'import { env, pipeline } from "@huggingface/transformers";\n\n'
                    "env.allowRemoteModels = false;\n"
                    f"env.localModelPath = {json.dumps(str(PurePath(artifact.path).parent))};\n"
                    f"const run = await pipeline({json.dumps(record.task)}, {json.dumps(PurePath(artifact.path).name)},"
                    ' { dtype: "fp32", subfolder: "" });'
                ),
            )
        )
    return found


def _sizes(shape: tuple[int | str, ...]) -> str:
    sizes = ", ".join(str(size) if isinstance(size, int) else str(_SMALL) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"

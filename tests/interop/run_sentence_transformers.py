"""Load a folder with sentence-transformers' ONNX backend and print its vectors; runs in optimum's environment alone.

Reads one JSON document from standard input: ``folder`` and ``texts``. Prints one JSON document: ``embeddings``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sentence_transformers import SentenceTransformer


def answer(request: dict[str, Any]) -> dict[str, Any]:
    options = {"export": False, "provider": "CPUExecutionProvider"}
    model = SentenceTransformer(
        request["folder"], backend="onnx", device="cpu", local_files_only=True, model_kwargs=options
    )
    return {"embeddings": model.encode(request["texts"], convert_to_numpy=True).tolist()}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)

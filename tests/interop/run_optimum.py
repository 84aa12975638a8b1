"""Load a folder with optimum's ONNX Runtime classes and print what it answers; runs in optimum's environment alone.

Reads one JSON document from standard input: ``folder``, ``loader`` (a class of ``optimum.onnxruntime``), ``inputs``
(name -> nested lists; integers become int64, the rest float32), and ``generate`` (arguments of ``generate``, or null:
one forward pass). Prints one JSON document on standard output: output name -> nested lists.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import optimum.onnxruntime
import torch


def answer(request: dict[str, Any]) -> dict[str, Any]:
    loader = getattr(optimum.onnxruntime, request["loader"])
    model = loader.from_pretrained(request["folder"], export=False, local_files_only=True, **request.get("options", {}))
    inputs = {name: torch.tensor(values) for name, values in request["inputs"].items()}
    if request["generate"] is not None:
        return {"sequences": model.generate(**inputs, **request["generate"]).tolist()}
    outputs = model(**inputs)
    return {name: value.tolist() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)

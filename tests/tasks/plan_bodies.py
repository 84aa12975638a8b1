"""What the children of `test_plan` do instead of detecting: what the config of each model says."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.export import steps
from onnx_config.spec import ModelSpec, TensorSpec

JSON = dict[str, Any]
SPEC = ModelSpec(
    model_type="made",
    task="feature-extraction",
    task_family="feature-extraction",
    architecture="MadeModel",
    inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length")),),
    outputs=(TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch_size", "sequence_length", 8)),),
    axis_ranges={"batch_size": (1, None), "sequence_length": (1, 512)},
    sizes={"batch_size": 2, "sequence_length": 16},
    preprocessor=None,
    parameters=1_000_000,
)

_seen: list[str] = []


def install() -> None:
    """Take the place of detection; called in a fork server, whose children have it then."""
    steps.detect = detect


def detect(request: JSON) -> JSON:
    """Do what ``config.json`` says, and tell in a file which process did it."""
    folder = Path(request["folder"])
    config = json.loads((folder / "config.json").read_text())
    with (folder / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    first = not _seen
    _seen.append(str(folder))
    match config["do"]:
        case "refuse":
            raise ModelError(f"{folder} is not supported", kind=ErrorKind.UNSUPPORTED)
        case "stumble":
            raise ZeroDivisionError("nobody foresaw this")
        case "be-shy" if not first:
            raise RuntimeError("others were here before")
        case "lack-memory":
            raise ModelError("It said: can't allocate memory", kind=ErrorKind.UNSUPPORTED)
        case "crash":
            ctypes.string_at(0)
        case "leave":
            os._exit(7)
        case "hang-once" if len((folder / "pids").read_text().split()) == 1:
            time.sleep(600)
        case "hang":
            time.sleep(600)
        case "spin":
            # In C all the while, where no handler of Python's would run.
            ctypes.CDLL(None).usleep(600_000_000)
        case "eat":
            held = [b"x" * (16 * 1024**2) for _ in range(128)]
            time.sleep(30)
            del held
    return SPEC.to_json()

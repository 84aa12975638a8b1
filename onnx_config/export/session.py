"""Sessions of ONNX Runtime: on which device, with what options, and what they are told beside a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from onnx_config.cuda import CUDA_PROVIDER, cuda_problem, load_cuda_libraries
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.child import names_memory

__all__ = [
    "LEVELS",
    "choose_device",
    "free_device_bytes",
    "known_inputs",
    "open_session",
    "refuses",
    "session_facts",
    "session_options",
]

LEVELS = ("disable", "basic", "extended", "all")
"""How far ONNX Runtime rewrites a graph before it runs it; ``all`` is what it does unless told otherwise."""


def choose_device(asked: str) -> str:
    """Return ``"cpu"`` or ``"cuda"`` for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: If ``cuda`` is asked for and PyTorch or ONNX Runtime cannot use it, or the name is another one.
    """
    problem = cuda_problem() if asked in ("auto", "cuda") else None
    if asked == "cuda" and problem is not None:
        raise InputError(
            f"The device 'cuda' was asked for, but {problem} Install the GPU builds, or ask for the device 'auto' or "
            "'cpu'."
        )
    if asked == "auto":
        return "cpu" if problem else "cuda"
    if asked not in ("cpu", "cuda"):
        raise InputError(f"The device {asked!r} was asked for; the devices are 'auto', 'cpu' and 'cuda'.")
    return asked


def open_session(
    path: Path,
    *,
    device: str,
    threads: int = 1,
    mapped: bool = False,
    providers: Sequence[Any] | None = None,
    options: Any = None,
    graph: bytes | None = None,
    level: str = "all",
) -> Any:
    """Return an ONNX Runtime session, at the optimisation level of production unless told otherwise.

    A ``mapped`` one does not rearrange weights into a faster layout, so that those beside the graph are pages of their
    file: the system reads them when they are needed and drops them when memory is. ``providers`` and ``options``, as
    ONNX Runtime takes them, stand in for those of the device and of all else. A ``graph`` takes the place of the one
    in the file, beside which its weights may lie.

    Raises:
        InputError: If the device is ``cuda`` and ONNX Runtime falls back to the CPU.
        ModelError: If ONNX Runtime refuses the graph (``runtime_failed``).
    """
    import onnxruntime

    if options is None:
        options = session_options(threads=threads, level=level)
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if device == "cuda":
        load_cuda_libraries()
    if providers is None:
        providers = ["CPUExecutionProvider"]
        if device == "cuda":
            providers = [(CUDA_PROVIDER, {"use_tf32": 0}), *providers]
    try:
        session = onnxruntime.InferenceSession(
            str(path) if graph is None else graph, options, providers=list(providers)
        )
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        if names_memory(str(error)):
            raise
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the graph {path.name}: {error}",
            kind=ErrorKind.RUNTIME_FAILED,
        ) from error
    # Where CUDA cannot start, ONNX Runtime warns and goes on with the CPU.
    if device == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise InputError(
            f"The device 'cuda' was asked for, but ONNX Runtime {onnxruntime.__version__} could not start its "
            "CUDAExecutionProvider and fell back to the CPU. Install the CUDA libraries that it names in its log, "
            "or ask for the device 'cpu'."
        )
    return session


def session_options(*, threads: int = 1, level: str = "all") -> Any:
    """Return the options of a session at one of `LEVELS`."""
    import onnxruntime

    name = "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, name)
    return options


def session_facts(device: str, *, level: str, threads: int, mapped: bool) -> dict[str, Any]:
    """Return how `open_session` asks ONNX Runtime to run, for the record."""
    facts: dict[str, Any] = {"graph_optimization_level": level, "intra_op_num_threads": threads}
    if mapped:
        facts["session.disable_prepacking"] = "1"
    if device == "cuda":
        facts["use_tf32"] = 0
    return facts


def free_device_bytes(device: str) -> int | None:
    """Return how much memory of the GPU nobody holds; ``None`` on the CPU."""
    if device != "cuda":
        return None
    import torch

    free: int = torch.cuda.mem_get_info()[0]
    return free


def refuses(session: Any, inputs: Mapping[str, npt.NDArray[Any]], *, by: str) -> bool:
    """Return whether a session stops at these inputs, and at the node named ``by``."""
    try:
        session.run(None, known_inputs(session, inputs))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:  # noqa: BLE001
        return f"'{by}'" in str(error)
    return False


def known_inputs(session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return those of the inputs that the graph takes."""
    names = {i.name for i in session.get_inputs()}
    return {name: value for name, value in inputs.items() if name in names}

"""Whether a GPU can be used here, by PyTorch and by ONNX Runtime."""

from __future__ import annotations

from functools import cache

__all__ = ["CUDA_PROVIDER", "cuda_problem", "load_cuda_libraries"]

CUDA_PROVIDER = "CUDAExecutionProvider"


@cache
def load_cuda_libraries() -> None:
    """Have ONNX Runtime find CUDA's and cuDNN's libraries among those that came with PyTorch.

    Its GPU build brings none and looks in the system's folders only, unless they are loaded already
    (``onnxruntime.preload_dlls``, since 1.21). Does nothing in a build for the CPU.
    """
    import onnxruntime

    if CUDA_PROVIDER in onnxruntime.get_available_providers() and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


def cuda_problem() -> str | None:
    """Return why no GPU can be used here, in whole sentences, or ``None`` where one can."""
    import onnxruntime
    import torch

    problems = []
    if not torch.cuda.is_available():
        problems.append("PyTorch sees no CUDA device.")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        problems.append(f"ONNX Runtime has no {CUDA_PROVIDER} here.")
    return " ".join(problems) or None

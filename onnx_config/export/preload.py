"""What the fork server imports once, so that no child pays for it."""

from __future__ import annotations

import importlib
import logging
import warnings

__all__ = ["import_quietly"]

_MODULES = (
    "torch",
    "torch.onnx",
    "transformers",
    "transformers.exporters.exporter_onnx",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_ORT_ERRORS = 3


def import_quietly() -> None:
    """Import the libraries of every step; turn their warnings, advice and progress bars off for the whole process.

    What a library prints ends up in a child's log, whose last lines explain a crash; hundreds of lines of advice
    would hide them. Meant for a fork server, where nothing else lives.
    """
    warnings.simplefilter("ignore")
    for module in _MODULES:
        importlib.import_module(module)

    import onnxruntime
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Its warnings tell of every constant that it could not fold.
    onnxruntime.set_default_logger_severity(_ORT_ERRORS)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)

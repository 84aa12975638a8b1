"""What the fork server imports once, so that no child pays for it."""

from __future__ import annotations

import importlib
import logging
import warnings
from contextlib import suppress

__all__ = ["import_for_detection", "import_quietly"]

_MODULES = (
    "torch",
    "torch.onnx",
    "transformers",
    "transformers.exporters.exporter_onnx",
    "onnx",
    "onnxscript",
    "onnxruntime",
)

# What an export, or a comparison, imports only while it runs: two seconds of every child. Private names, so any that
# a release no longer has is passed over.
_IMPORTED_LATE = (
    "networkx",
    "onnx_config.export.bind",
    "onnx_config.export.comparison",
    "onnx_config.export.matrix",
    "onnx_config.export.parity",
    "onnx_config.export.simplify",
    "onnx_config.export.steps",
    "onnx_config.export.template_steps",
    "onnx_config.export.trace",
    "onnx_config.export.weights_check",
    "onnx_config.settlement",
    "onnx_config.universal_config",
    "onnxsim",
    "onnxscript.evaluator",
    "onnxscript.rewriter.onnx_fusions",
    "sympy.tensor.tensor",
    "torch._export.serde.serialize",
    "torch._functorch.aot_autograd",
    "torch._inductor.output_code",
    "torch.export._trace",
    "torch.export.pt2_archive._package",
    "torch.fx.passes._tensorify_python_scalars",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._compat",
    "torch.onnx._internal.exporter._torchlib.ops",
    "torch.onnx._internal.fx.passes",
    "torch.utils.flop_counter",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
)
# What reading a config and running a class on shapes needs: no exporter, no ONNX, no ONNX Runtime.
_FOR_DETECTION = (
    "torch",
    "transformers",
    "onnx_config.export.steps",
    "onnx_config.probe",
    "onnx_config.universal_config",
    "transformers.generation.utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
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

    for module in _IMPORTED_LATE:
        with suppress(ImportError):
            importlib.import_module(module)

    with suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        # Builds, once per process, the rules for all architectures, with a thousand regular expressions.
        get_checkpoint_conversion_mapping("")

    import onnxruntime
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Its warnings tell of every constant that it could not fold.
    onnxruntime.set_default_logger_severity(_ORT_ERRORS)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_for_detection() -> None:
    """Import what detection needs, as quietly as `import_quietly`, in half its time."""
    warnings.simplefilter("ignore")
    for module in _FOR_DETECTION:
        with suppress(ImportError):
            importlib.import_module(module)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

"""Spares a trace the work whose result nobody reads.

Each is a library's own doing; where a release is built otherwise, it goes on doing it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["no_idle_work"]

_MODELS = "transformers.models."


@contextmanager
def no_idle_work() -> Iterator[None]:
    """Trace and translate without it, until the exit."""
    with ExitStack() as stack:
        for spare in (_no_strangers, _no_origins, _no_parsing, _no_second_run, _no_moves, _no_modes, _no_layouts):
            with suppress(ImportError, AttributeError):
                stack.enter_context(spare())
        yield


def _no_strangers() -> Any:
    """Do not import the modelling files of other models for the sake of patching them: a second of each process."""
    from transformers.exporters import utils

    resolve: Callable[..., Any] = utils.import_dotted_path

    def resolve_imported(path: str, missing_ok: bool = False) -> Any:  # as it is there
        stranger = path.startswith(_MODELS) and ".".join(path.split(".")[:4]) not in sys.modules
        return None if stranger and missing_ok else resolve(path, missing_ok=missing_ok)

    return patch.object(utils, "import_dotted_path", resolve_imported)


def _no_origins() -> Any:
    """Do not note for each node of a program which lines of the model's code it comes from."""
    return patch.object(torch.fx.config, "do_not_emit_stack_traces", True)


def _no_parsing() -> Any:
    """Tell the domain of a function without parsing its source; torch asks some 500 for theirs at each export."""
    from onnxscript._internal.values import TracedOnnxFunction

    domain = property(lambda self: SimpleNamespace(domain=self.opset.domain))
    return patch.object(TracedOnnxFunction, "function_ir", domain)


def _no_second_run() -> Any:
    """Cast operands of mixed types without running the program on shapes once more.

    A cast changes no shape and no type that a later node sees, so that what was traced holds.
    """
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter = type_promotion._TypePromotionInterpreter
    original: Callable[..., Any] = interpreter.run_node

    def run_node(self: Any, node: torch.fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return original(self, node)
        if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    return patch.object(interpreter, "run_node", run_node)


def _no_moves() -> Any:
    """Leave a module that is to be brought to an element type or a device where it is, if it is there already.

    Some models do so whenever they are called, and the parameters of a model that is traced cannot be exchanged.
    """
    original: Callable[..., Any] = torch.nn.Module.to

    def to(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        device, dtype, _, layout = torch._C._nn._parse_to(*arguments, **options)
        tensors = (*module.parameters(), *module.buffers())
        there = layout is None and all(
            (device is None or device == tensor.device)
            and (dtype is None or dtype == tensor.dtype or not (tensor.is_floating_point() or tensor.is_complex()))
            for tensor in tensors
        )
        return module if there else original(module, *arguments, **options)

    return patch.object(torch.nn.Module, "to", to)


def _no_modes() -> Any:
    """Do not note where a model's code turns gradients off: a program that computes none is the same without.

    torch cuts the program apart at each such place and puts it together again, writing all of its code anew each time.
    """
    from torch.fx.experimental import proxy_tensor

    name = "_side_effectful_need_to_be_preserved_pre_dispatch"
    noted = [function for function in getattr(proxy_tensor, name) if function is not torch._C._set_grad_enabled]
    return patch.object(proxy_tensor, name, noted)


def _no_layouts() -> Any:
    """Do not find out for each value of a program how it lies in memory: of symbolic sizes, a fifth of a trace."""
    from torch.fx.experimental import proxy_tensor

    name = "_extract_tensor_metadata"
    return patch.object(proxy_tensor, name, partial(getattr(proxy_tensor, name), include_contiguity=False))

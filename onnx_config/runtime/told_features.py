"""How a class of transformers hands on the features of images or sounds: as one tensor, or one for each.

The class tells itself: its method is called on the meta device, where there are shapes and no numbers. Where it looks
at values of a mask there, it is told that nothing is hidden, and that there are as many features as the graph made.
Where images have grids, how many features each has follows from the grids' values, which the meta device does not have.
What the modules of the class return is then found on shapes alone at first, and the method is called again with the
grids as they are and with that in the place of its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils.generic import ModelOutput

from onnx_config.draft import GEOMETRY
from onnx_config.errors import InputError
from onnx_config.export.grids import grids_in_tensors

__all__ = ["handed_on", "told_features"]

_FLAT = len(("count", "hidden size"))
_THREE = len(("frames", "rows", "columns"))


def told_features(
    base: torch.nn.Module, method: Callable[..., Any], feed: Mapping[str, torch.Tensor], *, count: int
) -> Any:
    """Return what ``method`` of ``base`` returns for ``feed``, with tensors without numbers.

    Args:
        base: A model on the meta device.
        method: Makes features, as ``get_image_features`` does.
        feed: What it is given, by name.
        count: How many features the graph made of it, where they come one after the other.
    """
    shapes = {name: tensor.to("meta") for name, tensor in feed.items()}
    grids = {name: tensor.cpu() for name, tensor in feed.items() if _tells_of_images(name, tensor)}
    if not any(tensor.shape[1:] == (_THREE,) for tensor in grids.values()):
        return _on_shapes(method, shapes, count)
    patches = next(tensor for tensor in feed.values() if tensor.is_floating_point())
    with grids_in_tensors(base, exported=False) as held, _returned(base) as calls:
        held.counts.append(patches.shape[0])
        held.blocks = count
        method(**shapes, return_dict=True)
    with _played_back(calls):
        return method(**{**shapes, **grids}, return_dict=True)


def _on_shapes(method: Callable[..., Any], shapes: Mapping[str, torch.Tensor], count: int) -> Any:
    """Return what a method returns for tensors without numbers, also where it looks at some."""
    try:
        return method(**shapes, return_dict=True)
    # What torch says of a value that is not there has no class of its own.
    except RuntimeError:
        with _NothingHidden(count):
            return method(**shapes, return_dict=True)


class _NothingHidden(TorchDispatchMode):
    """Answers for tensors without numbers that all is true, and true at ``count`` places."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._count = count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operators = torch.ops.aten
        if func is operators._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is operators.nonzero.default and args[0].is_meta:
            return self._places(args[0])
        if func is operators.index.Tensor and args[0].is_meta:
            places = [self._places(i).unbind(1) if i is not None and i.dtype == torch.bool else (i,) for i in args[1]]
            args = (args[0], [axis for axes in places for axis in axes], *args[2:])
        return func(*args, **(kwargs or {}))

    def _places(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.empty(self._count, mask.ndim, dtype=torch.int64, device="meta")


def handed_on(made: torch.Tensor, told: Any) -> Any:
    """Return features as a class hands them on: as they are, or as a list.

    Args:
        made: One after the other (count, hidden size), or those of an image in each row.
        told: What the class hands on, as a tensor or a list of tensors without numbers.

    Raises:
        InputError: If there are more of them, or fewer.
    """
    if not isinstance(told, (list, tuple)):
        return made
    if made.ndim != _FLAT:
        return list(made)
    counts = [part.shape[0] for part in told]
    if len(counts) == 1:
        return [made]
    if sum(counts) != len(made):
        raise InputError(f"The graph gives {len(made)} features of images that have {' + '.join(map(str, counts))}.")
    return list(made.split(counts))


def _tells_of_images(name: str, tensor: torch.Tensor) -> bool:
    """Return whether whole numbers say how the patches lie in each image, or how many become one."""
    return GEOMETRY.search(name) is not None and not tensor.is_floating_point()


@contextmanager
def _returned(base: torch.nn.Module) -> Iterator[list[tuple[torch.nn.Module, Any]]]:
    """Note what each module returns that is not called by another one of ``base``, until the exit."""
    depth = 0
    calls: list[tuple[torch.nn.Module, Any]] = []

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: torch.nn.Module, _: Any, returned: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            # Whoever called it may write into it.
            calls.append((module, type(returned)(**returned) if isinstance(returned, ModelOutput) else returned))

    modules = [module for module in base.modules() if module is not base]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _played_back(calls: Sequence[tuple[torch.nn.Module, Any]]) -> Iterator[None]:
    """Let modules return what they returned before, in the same order, until the exit."""
    answers: dict[torch.nn.Module, list[Any]] = {}
    for module, returned in calls:
        answers.setdefault(module, []).append(returned)
    with ExitStack() as stack:
        for module, returned in answers.items():
            stack.enter_context(patch.object(module, "forward", _in_turn(returned)))
        yield


def _in_turn(answers: Sequence[Any]) -> Callable[..., Any]:
    left = list(answers)
    return lambda *_, **__: left.pop(0)

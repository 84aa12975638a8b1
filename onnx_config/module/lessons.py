"""What a module's refusals teach about its inputs.

The innermost layer that refuses says what it wants: a linear layer a last axis, a convolution a number of axes and
channels, an embedding whole numbers. Where no layer is the one that refuses, the message's own numbers are read; each
axis has a size of its own, so that a number names the axis.
"""

from __future__ import annotations

import re

import torch

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.module.inputs import ModuleInputs
from onnx_config.module.run import Answer, run_module
from onnx_config.module.wishes import wish_of
from onnx_config.refusals import is_too_small, wrong_sizes

__all__ = ["learn"]

_MAX_RUNS = 60
_ORDER = (2, 4, 3, 1, 5)
_IMAGE_SIDES = (28, 32, 64, 96, 128, 224, 227, 256, 299, 384)
_TIED = re.compile(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
_CONCATENATED = re.compile(r"Expected size (\d+) but got size (\d+)")
_WHOLE = re.compile(r"scalar types?:? Long|must be (?:long|int)|tensors used as indices|IntTensor|index tensor")


def learn(module: torch.nn.Module, found: ModuleInputs) -> Answer:
    """Change the inputs by what the module says until it accepts them."""
    seen: set[str] = set()
    answer = run_module(module, found.tensors())
    for _ in range(_MAX_RUNS):
        if answer.outputs is not None:
            return answer
        if not (
            _heed_layer(found, answer)
            or _heed_message(found, answer)
            or _try_image(found, seen)
            or _try_rank(found, seen)
        ):
            break
        answer = run_module(module, found.tensors())
    if answer.outputs is not None:
        return answer
    tried = ", ".join(f"{n} {list(found.resolved(n))}" for n in found.dtypes)
    raise ModelError(
        f"{type(module).__name__} refuses every input that was tried; the last ones were {tried}: {answer.refusal}. "
        "Document the shapes in the docstring of forward, as in 'x (`torch.Tensor` of shape `(batch_size, 3)`):', "
        "or give example_inputs.",
        kind=ErrorKind.UNSUPPORTED,
    )


def _heed_layer(found: ModuleInputs, answer: Answer) -> bool:
    """Give the layer that refused what it takes; only if what it was given is an input as it is."""
    name, layer = answer.input, answer.layer
    if name is None or layer is None:
        return False
    wish = wish_of(layer)
    if wish is None:
        return False
    before = (list(found.shapes[name]), found.dtypes[name], found.limits.get(name))
    if wish.whole:
        if found.dtypes[name] not in ("int64", "int32") and name not in found.fixed_dtype:
            found.dtypes[name] = "int64"
        found.limits[name] = min(found.limits.get(name, wish.limit), wish.limit)
    elif found.dtypes[name] != "float32" and name not in found.fixed_dtype:
        found.dtypes[name] = "float32"
    if wish.rank and len(found.shapes[name]) not in wish.rank and name not in found.fixed_rank:
        found.set_rank(name, wish.rank[0], names=wish.names)
    for position, size in wish.sizes.items():
        if -len(found.shapes[name]) <= position < len(found.shapes[name]):
            found.fix(name, position, size)
    return before != (found.shapes[name], found.dtypes[name], found.limits.get(name))


def _heed_message(found: ModuleInputs, answer: Answer) -> bool:
    """Read the numbers of a refusal: an axis that is to be as large as another one, or of one size."""
    text = answer.refusal
    for pattern in (_TIED, _CONCATENATED):
        if (match := pattern.search(text)) and _tie_axes(found, int(match[1]), int(match[2])):
            return True
    for got, want in wrong_sizes(text):
        axes = [axis for axis in found.used() if found.sizes[axis] == got and "batch" not in axis]
        if len(axes) == 1 and got != want:
            found.fix_everywhere(axes[0], want)
            return True
    if is_too_small(text):
        return found.grow()
    if _WHOLE.search(text):
        for name, dtype in found.dtypes.items():
            if dtype == "float32" and name not in found.fixed_dtype and (answer.input in (None, name)):
                found.dtypes[name] = "int64"
                return True
    return False


def _tie_axes(found: ModuleInputs, first: int, second: int) -> bool:
    """Make one axis of two that are to have one size; fix the one that meets a number of the module's own."""
    by_size = {found.sizes[axis]: axis for axis in found.used()}
    one, other = by_size.get(first), by_size.get(second)
    if one is not None and other is not None and one != other:
        kept, gone = (other, one) if "batch" in other else (one, other)
        for shape in found.shapes.values():
            shape[:] = [kept if axis == gone else axis for axis in shape]
        found.sizes.pop(gone)
        return True
    axis, size = (one, second) if one is not None else (other, first)
    if axis is None or "batch" in axis:
        return False
    found.fix_everywhere(axis, size)
    return True


def _try_image(found: ModuleInputs, seen: set[str]) -> bool:
    """Give images the sizes that classifiers with a fixed one mostly have, one after the other."""
    if not {"height", "width"} <= found.used():
        return False
    for side in _IMAGE_SIDES:
        if f"image:{side}" not in seen:
            seen.add(f"image:{side}")
            found.sizes.update(height=side, width=side)
            return True
    return False


def _try_rank(found: ModuleInputs, seen: set[str]) -> bool:
    """Give the inputs whose rank nothing declares another one, one combination after the other."""
    free = [name for name in found.dtypes if name not in found.fixed_rank]
    for name in free:
        for rank in _ORDER:
            key = f"{name}:{rank}"
            if key not in seen and rank != len(found.shapes[name]):
                seen.add(key)
                found.set_rank(name, rank)
                return True
            seen.add(key)
    return False

"""What a module's inputs are to begin with: by its docstring and annotations, or by examples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from onnx_config.declarations import Declaration, Role, read_shape
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.module.inputs import DTYPES, ModuleInputs, conventional_name
from onnx_config.module.run import run_module

__all__ = ["FIRST_RANK", "from_declaration", "from_examples", "name_axes_of_examples"]

FIRST_RANK = 2
"""Number of axes that is tried first where nothing declares one."""

_LOOSE_SHAPE = r"^\W*{name}\b[^\n]*(?:\n(?!\W*\w+ ?[:(])[^\n]*)*?shape:?\s*[`*]*[\[(](?P<shape>[^\])]*)[\])]"


def from_declaration(module: torch.nn.Module, declaration: Declaration) -> ModuleInputs:
    """Propose shapes by what the docstring and the annotations tell."""
    text = inspect.cleandoc(type(module).forward.__doc__ or "") + "\n" + inspect.cleandoc(type(module).__doc__ or "")
    found = ModuleInputs(shapes={}, dtypes={}, sizes={}, fixed_rank=set(), fixed_dtype=set())
    data = [a for a in declaration.arguments if a.role is Role.DATA and a.required]
    if not data:
        names = ", ".join(a.name for a in declaration.arguments) or "nothing"
        raise InputError(
            f"forward of {declaration.class_name} takes {names}, and no parameter without a default is annotated as a "
            "torch.Tensor. Annotate them, or give example_inputs."
        )
    for argument in data:
        name = argument.name
        shape = argument.shape if argument.shape is not None else _loose_shape(name, text)
        found.dtypes[name] = argument.dtype or _dtype_by_name(name)
        if argument.dtype is not None:
            found.fixed_dtype.add(name)
        if shape is not None:
            found.fixed_rank.add(name)
            found.shapes[name] = list(shape)
        else:
            found.shapes[name] = []
            found.set_rank(name, FIRST_RANK)
        found.give_sizes(name)
        if isinstance(argument.index_limit, int):
            found.limits[name] = argument.index_limit
    return found


def _loose_shape(name: str, text: str) -> tuple[int | str, ...] | None:
    """Return the shape that any docstring tells of an argument: ``x: a tensor of shape (batch, 3)``."""
    match = re.search(_LOOSE_SHAPE.format(name=re.escape(name)), text, re.MULTILINE)
    return read_shape(f"of shape `({match['shape']})`") if match else None


def _dtype_by_name(name: str) -> str:
    return "int64" if re.search(r"_ids$|^ids$|^tokens?$|mask$|_positions?$|_index(es)?$|_indices$", name) else "float32"


def from_examples(
    module: torch.nn.Module, declaration: Declaration, example_inputs: Mapping[str, torch.Tensor]
) -> ModuleInputs:
    known = [a.name for a in declaration.arguments]
    if unknown := [name for name in example_inputs if name not in known]:
        raise InputError(f"example_inputs names {unknown[0]!r}; forward of {declaration.class_name} takes {known}.")
    found = ModuleInputs(shapes={}, dtypes={}, sizes={}, fixed_rank=set(), fixed_dtype=set())
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name in (n for n in known if n in example_inputs):
        value = example_inputs[name]
        if not isinstance(value, torch.Tensor) or value.dtype not in names:
            what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"The example of {name!r} is a {what}; tensors of {list(DTYPES)} are taken.")
        found.dtypes[name] = names[value.dtype]
        found.shapes[name] = list(value.shape)
    answer = run_module(module, {name: example_inputs[name] for name in found.dtypes})
    if answer.outputs is None:
        raise ModelError(
            f"{declaration.class_name} refuses the example inputs: {answer.refusal}", kind=ErrorKind.UNSUPPORTED
        )
    for name, value in example_inputs.items():
        if not value.is_floating_point() and value.dtype is not torch.bool and value.numel():
            found.limits[name] = max(2, int(value.max()) + 1)
    return found


def name_axes_of_examples(module: torch.nn.Module, found: ModuleInputs) -> None:
    """Name the axes of the examples that the module takes at another size: alone, or with those of the same size."""
    places = [(name, position) for name, shape in found.shapes.items() for position in range(len(shape))]
    sizes = {place: int(found.shapes[place[0]][place[1]]) for place in places}
    # Rows are mostly rows of everything; other axes of one size may be so by chance.
    groups = [[p for p in places if p[1] == 0 and sizes[p] == size] for size in {sizes[p] for p in places if p[1] == 0}]
    groups += [[p] for p in places if p[1] > 0]
    groups += [[p for p in places if sizes[p] == size] for size in dict.fromkeys(sizes.values())]
    done: set[tuple[str, int]] = set()
    for group in groups:
        if done & set(group) or not group:
            continue
        if _accepts_other(module, found, group, sizes[group[0]]):
            axis = _axis_name(found, group)
            found.sizes[axis] = sizes[group[0]]
            for name, position in group:
                found.shapes[name][position] = axis
            done |= set(group)


def _accepts_other(module: torch.nn.Module, found: ModuleInputs, group: Sequence[tuple[str, int]], size: int) -> bool:
    for other in (size + 1, size * 2, size + 32, max(1, size - 1)):
        trial = replace(found, shapes={name: list(shape) for name, shape in found.shapes.items()})
        for name, position in group:
            trial.shapes[name][position] = other
        if other != size and run_module(module, trial.tensors()).outputs is not None:
            return True
    return False


def _axis_name(found: ModuleInputs, group: Sequence[tuple[str, int]]) -> str:
    name, position = group[0]
    rank = len(found.shapes[name])
    wanted = conventional_name(position, rank, whole=found.dtypes[name] != "float32")
    return wanted if wanted not in found.sizes else f"{name}_dim_{position}"

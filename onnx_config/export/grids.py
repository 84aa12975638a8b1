"""Keeps what a vision encoder computes of the grids of its images in the graph, for every grid.

transformers works out positions, windows and the ends of images in a few functions of its own, with loops over the
values of the grids. While an encoder is traced, those names are bound to ones that compute the same with tensors. What
it then takes apart by lengths, to attend within each part, stays whole, and attention is masked instead. A grid that
names other patches than there are is refused by the graph, as the model refuses it.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from onnx_config.draft import GEOMETRY
from onnx_config.export.patch_grids import Patches, boundaries, quotient, resampled_table, same_part

__all__ = ["Grids", "grids_in_tensors"]

_MODELS = "transformers.models."
_PACKED_RANKS = (2, 4)
_GRID_RANK = 2
_THREE = 3
_FITS = "the grid of the images is taken to name the patches that there are"


class _Lengths:
    """A tensor of lengths in the place of the list of its values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Grids:
    """What is known of the patches of the encoder that is being called."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.blocks: int | None = None
        """How many blocks the patches make, where there are no values to count them by; ``None``: not known."""
        self.granted: dict[str, list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        """What is taken for granted -> what was computed, and what it is taken to be."""
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def counts(self) -> list[Any]:
        """Of the encoders that this thread is calling, the innermost last: how many patches each was given."""
        # A server may call a model of PyTorch in another thread meanwhile.
        counts: list[Any] = self._of_thread.__dict__.setdefault("counts", [])
        return counts

    def patches(self, grid: torch.Tensor, merge: Any = 1) -> Patches:
        """Return the patches of the encoder that is being called, and grant that they are those of ``grid``."""
        found = Patches(grid.long(), self.counts[-1], merge.long() if isinstance(merge, torch.Tensor) else merge)
        self.granted[_FITS].append((found.fits, True))
        return found

    def keep_parts(self, tensor: torch.Tensor, lengths: torch.Tensor) -> None:
        """Remember that a tensor that stayed whole has parts."""
        self._parts[id(tensor)] = (tensor, lengths)

    def parts_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the lengths of the parts of a tensor that stayed whole; ``None``: it has none."""
        return self._parts.get(id(tensor), (None, None))[1]


def _cu_seqlens(grids: Grids, original: Any) -> Any:
    def get_vision_cu_seqlens(grid_thw: Any, merge_temporal: bool = False, kwargs: Any = None) -> Any:
        if _is_given(kwargs, "cu_seqlens") or not grids.counts:
            return original(grid_thw, merge_temporal=merge_temporal, kwargs=kwargs)
        patches = grids.patches(grid_thw)
        return boundaries(patches.image if merge_temporal else patches.frame_number).to(torch.int32)

    return get_vision_cu_seqlens


def _position_ids(grids: Grids, original: Any) -> Any:
    def get_vision_position_ids(
        grid_thw: Any, spatial_merge_size: Any, include_temporal: bool = False, kwargs: Any = None
    ) -> Any:
        if _is_given(kwargs, "position_ids") or not grids.counts:
            return original(grid_thw, spatial_merge_size, include_temporal=include_temporal, kwargs=kwargs)
        patches = grids.patches(grid_thw, spatial_merge_size)
        axes = [patches.row, patches.column]
        return torch.stack([patches.frame, *axes] if include_temporal else axes, dim=-1)

    return get_vision_position_ids


def _window_index(grids: Grids, original: Any) -> Any:
    def get_vision_window_index(
        grid_thw: Any, spatial_merge_size: int, window_size: int, patch_size: int, kwargs: Any = None
    ) -> Any:
        if (_is_given(kwargs, "window_index") and _is_given(kwargs, "cu_window_seqlens")) or not grids.counts:
            return original(grid_thw, spatial_merge_size, window_size, patch_size, kwargs=kwargs)
        edge, unit = window_size // spatial_merge_size // patch_size, spatial_merge_size**2
        grids.patches(grid_thw, spatial_merge_size)
        whole = torch.tensor([[1, spatial_merge_size, spatial_merge_size]], device=grid_thw.device)
        blocks = Patches(grid_thw.long() // whole, grids.counts[-1] // unit)
        row, column, height, width = blocks.row, blocks.column, blocks.height, blocks.width
        top, left = quotient(row, edge) * edge, quotient(column, edge) * edge
        # Windows come row by row, and are smaller at the lower and the right end.
        high, wide = torch.clamp(height - top, max=edge), torch.clamp(width - left, max=edge)
        before = top * width + high * left + (row - top) * wide + (column - left)
        place = blocks.index - blocks.within_frame + before
        order = torch.argsort(place)
        begins = ((row == top) & (column == left)).long()[order]
        return order, (boundaries(begins.cumsum(0) - 1) * unit).to(torch.int32)

    return get_vision_window_index


def _interpolation(grids: Grids, original: Any) -> Any:
    taps = inspect.getmodule(original).__dict__["_interpolation_axis_taps_weights"]

    signature = inspect.signature(original)

    def get_vision_interpolation_indices_and_weights(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        known = given["kwargs"]
        if (_is_given(known, "interp_indices") and _is_given(known, "interp_weights")) or not grids.counts:
            return original(*args, **options)
        side = given["num_grid_per_side"]
        patches = grids.patches(given["grid_thw"], given["spatial_merge_size"])
        ends = ((patches.row, patches.height), (patches.column, patches.width))
        (down, by_row), (along, by_column) = (
            taps(place, size, side, given["mode"], given["align_corners"], given["padding"]) for place, size in ends
        )
        indices = down[:, :, None] * side + along[:, None, :]
        weights = by_row[:, :, None] * by_column[:, None, :]
        return indices.flatten(1), weights.flatten(1)

    return get_vision_interpolation_indices_and_weights


_FUNCTIONS: Mapping[str, Callable[[Grids, Any], Any]] = {
    "get_vision_cu_seqlens": _cu_seqlens,
    "get_vision_position_ids": _position_ids,
    "get_vision_window_index": _window_index,
    "get_vision_interpolation_indices_and_weights": _interpolation,
}
"""Functions of ``transformers.vision_utils`` -> what makes the ones that take their places."""


def _is_given(kwargs: Any, name: str) -> bool:
    return kwargs is not None and kwargs.get(name) is not None


def _resized_table(grids: Grids, _: Any) -> Any:
    def resize_positional_embeddings(
        positional_embeddings: torch.Tensor, spatial_shapes: torch.Tensor, max_length: Any
    ) -> torch.Tensor:
        sizes = spatial_shapes.long()
        place = torch.arange(max_length, device=sizes.device)[None, :]
        width, count = sizes[:, 1:2], sizes.prod(dim=-1, keepdim=True)
        grids.granted["the grid of an image is taken to have no more patches than there is room for"].append(
            (((count > 0) & (count <= max_length)).all(), True)
        )
        # What fills an image up is like its first patch.
        place = torch.where(place < count, place, torch.zeros_like(place))
        both = sizes[:, None, :].expand(-1, max_length, -1)
        made = resampled_table(positional_embeddings.float(), quotient(place, width), place % width, both)
        return made.to(positional_embeddings.dtype)

    return resize_positional_embeddings


def _averaged_blocks(grids: Grids, __: Any) -> Any:
    def pixel_unshuffle(hidden_states: torch.Tensor, grid_thw: torch.Tensor, merge_sizes: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_meta and grids.blocks is not None:
            return hidden_states.new_empty(grids.blocks, hidden_states.shape[-1])
        edge = Patches(grid_thw.long(), hidden_states.shape[0]).of_image(merge_sizes.long())
        patches = Patches(grid_thw.long(), hidden_states.shape[0], merge_sizes.long())
        # Brought to one number for each block without antialiasing: the middle one, or the middle two of each axis.
        shares = [
            torch.where((2 * (at % edge) + 1 - edge).abs() <= 1, 1.0 / (2.0 - (edge % 2)), 0.0)
            for at in (patches.row, patches.column)
        ]
        begins = patches.within_frame % (edge * edge) == 0
        block = begins.long().cumsum(0) - 1
        weighted = hidden_states * (shares[0] * shares[1])[:, None].to(hidden_states.dtype)
        summed = torch.zeros_like(hidden_states).index_add(0, block, weighted)
        return summed[block[begins.nonzero().squeeze(1)]]

    return pixel_unshuffle


def _added_everywhere(_: Grids, original: Any) -> Any:
    def deepstack_process(
        hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
    ) -> torch.Tensor:
        # Where a decoder is traced, each token is given some.
        everywhere = torch.compiler.is_exporting()
        added: torch.Tensor = (
            hidden_states + visual_embeds.unflatten(0, hidden_states.shape[:2])
            if everywhere
            else original(hidden_states, visual_pos_masks, visual_embeds)
        )
        return added

    return deepstack_process


_METHODS: Mapping[tuple[str, tuple[str, ...]], Callable[[Grids, Any], Any]] = {
    ("resize_positional_embeddings", ("positional_embeddings", "spatial_shapes", "max_length")): _resized_table,
    ("_deepstack_process", ("hidden_states", "visual_pos_masks", "visual_embeds")): _added_everywhere,
    ("pixel_unshuffle", ("hidden_states", "grid_thw", "merge_sizes")): _averaged_blocks,
}
"""Methods of modules, by name and parameters -> what makes the functions that take their places."""


def _counted(original: Any, grids: Grids) -> Any:
    """Return a module's ``forward`` that tells how many patches it is called with."""
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            given = {}
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        patches = [t for t in tensors.values() if t.dim() in _PACKED_RANKS and t.is_floating_point()]
        if not patches or not any(_is_grid(name, tensor) for name, tensor in tensors.items()):
            return original(*args, **kwargs)
        grids.counts.append(patches[0].shape[0])
        try:
            return original(*args, **kwargs)
        finally:
            grids.counts.pop()

    # The exporter reads which arguments there are.
    forward.__signature__ = signature  # type: ignore[attr-defined]  # as functools.wraps does
    return forward


def _is_grid(name: str, tensor: torch.Tensor) -> bool:
    return GEOMETRY.search(name) is not None and tensor.dim() == _GRID_RANK and tensor.shape[-1] == _THREE


def _tolist(original: Any, grids: Grids) -> Any:
    def tolist(tensor: torch.Tensor) -> Any:
        has_values = not (torch.compiler.is_exporting() or tensor.is_meta)
        if not grids.counts or has_values or tensor.is_floating_point():
            return original(tensor)
        if tensor.dim() == 1:
            return _Lengths(tensor)
        # Whoever wants rows of numbers works with each of them.
        return [[number.item() for number in row] for row in tensor] if tensor.dim() == _GRID_RANK else original(tensor)

    return tolist


def _split(original: Any, grids: Grids) -> Any:
    def split(tensor: torch.Tensor, sizes: Any = None, dim: int = 0, **options: Any) -> Any:
        sizes = options.pop("split_size_or_sections", options.pop("split_size", sizes))
        if not isinstance(sizes, _Lengths):
            return original(tensor, sizes, dim)
        # A tensor of its own, since one tensor may be taken apart in several ways.
        whole = tensor.view_as(tensor)
        grids.keep_parts(whole, sizes.tensor)
        return [whole]

    return split


def _interface(original: Any, grids: Grids) -> Any:
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        attend = original(self, *args, **kwargs)

        def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any) -> Any:
            lengths = grids.parts_of(query)
            if lengths is None or attention_mask is not None:
                return attend(module, query, key, value, attention_mask, **options)
            seen = same_part(lengths, query.shape[-2])
            mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
            return attend(module, query, key, value, mask[None, None], **options)

        return attention

    return get_interface


@contextmanager
def _attention_as_written(grids: Grids) -> Iterator[None]:
    """Keep the exporter from attending as if all images were of one size, where their grids are in the graph."""
    from transformers.exporters import exporter_dynamo  # noqa: F401  # registers what is changed here
    from transformers.exporters.utils import _PATCHES

    patches = _PATCHES["dynamo"]
    before = list(patches)
    patches[:] = [(*at, name, _unless(grids, made) if name == "forward" else made) for *at, name, made in before]
    try:
        yield
    finally:
        patches[:] = before


def _unless(grids: Grids, made: Any) -> Any:
    def factory(original: Any) -> Any:
        exporters_own = made(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (original if grids.counts else exporters_own)(*args, **kwargs)

        return forward

    return factory


@contextmanager
def grids_in_tensors(model: torch.nn.Module, *, exported: bool = True) -> Iterator[Grids]:
    """Bind what works with the values of grids to what does the same with tensors, until the exit.

    ``exported`` says whether the model is called by transformers' exporter, whose own ways then stand back.
    """
    from transformers import vision_utils
    from transformers.modeling_utils import AttentionInterface

    grids = Grids()
    modules = [sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()})]
    places = [vision_utils, *(module for module in modules if module.__name__.startswith(_MODELS))]
    with ExitStack() as stack:
        for name, make in _FUNCTIONS.items():
            function = getattr(vision_utils, name, None)
            if function is None:
                continue
            made = make(grids, function)
            stack.callback(_undo_in_what_was_imported, name, made, function)
            for place in [p for p in places if vars(p).get(name) is function]:
                stack.enter_context(patch.object(place, name, made))
        for module in model.modules():
            for (name, parameters), make in _METHODS.items():
                method = getattr(module, name, None)
                if callable(method) and tuple(inspect.signature(method).parameters) == parameters:
                    stack.enter_context(patch.object(module, name, make(grids, method)))
        callers = [m for m in model.modules() if _takes_grid(m)]
        for module in callers:
            stack.enter_context(patch.object(module, "forward", _counted(module.forward, grids)))
        if callers:
            for tensors in (torch.Tensor, FakeTensor, FunctionalTensor):
                stack.enter_context(patch.object(tensors, "tolist", _tolist(tensors.tolist, grids)))
            for owner in (torch, torch.Tensor):
                stack.enter_context(patch.object(owner, "split", _split(owner.split, grids)))
            interface = _interface(AttentionInterface.get_interface, grids)
            stack.enter_context(patch.object(AttentionInterface, "get_interface", interface))
            if exported:
                stack.enter_context(_attention_as_written(grids))
        yield grids


def _undo_in_what_was_imported(name: str, made: Any, function: Any) -> None:
    """Give those modules their function back that were imported while another stood in its place."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(_MODELS) and vars(module).get(name) is made:
            setattr(module, name, function)


def _takes_grid(module: torch.nn.Module) -> bool:
    """Return whether a module is called with grids; one that hands on whatever it is given may be."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(GEOMETRY.search(parameter.name) for parameter in parameters):
        return True
    return any(p.kind is p.VAR_KEYWORD and p.name == "inputs" for p in parameters)

"""A model's weights: whether the files are whole, and loading them without a random remainder.

transformers fills what a checkpoint lacks with random numbers and a warning. Here that is an error:
a graph of random weights would be verified against the same random weights.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.safetensors_file import read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_weights", "load_model", "load_state", "not_finite_text", "weight_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model, all shards of a sharded one.

    Raises:
        InputError: If there are none, or a shard that the index names is missing.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = sorted({str(shard) for shard in named})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{str(index)!r} is no index of shards ({type(error).__name__}: {error}). Restore it from its source."
            ) from error
        if not shards:
            raise InputError(f"{str(index)!r} names no shards. Restore it from its source.")
        wrong = [s for s in shards if Path(s).name != s]
        if wrong:
            raise InputError(f"{str(index)!r} names files outside its folder: {wrong}. This is not accepted.")
        if missing := [s for s in shards if not (folder / s).is_file()]:
            raise InputError(
                f"{str(folder)!r} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])}. "
                "Fetch the missing files."
            )
        return tuple(folder / s for s in shards)
    if any((folder / name).is_file() for name in _PICKLED):
        raise InputError(
            f"{str(folder)!r} has its weights as pickled files only, which can run code when read. "
            "Save the model with safetensors (save_pretrained does)."
        )
    raise InputError(f"{str(folder)!r} has no weights: no {_SINGLE} and no {_INDEX}. Fetch or save them.")


def check_weights(folder: Path) -> int:
    """Check that each safetensors file is as long as its header says; return the bytes of all tensors.

    Only the headers are read.

    Raises:
        InputError: If a file is missing, truncated or no safetensors file.
    """
    return sum(tensor.nbytes for path in weight_files(folder) for tensor in read_header(path).values())


def load_model(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    *,
    dtype: str = "float32",
    check_values: bool = True,
) -> PreTrainedModel:
    """Return the model with the weights of ``folder``, in evaluation mode on the CPU.

    Args:
        cls: The class to load.
        config: Its config.
        folder: Where the weights are.
        dtype: Element type of the loaded weights.
        check_values: Whether weights that are not finite are an error.

    Raises:
        InputError: If weights are missing, truncated, of other shapes than the config's, or not finite.
        ModelError: If the class cannot be loaded.
    """
    import torch

    check_weights(folder)
    model, missing = _load(cls, config, folder, getattr(torch, dtype))
    if missing and all(_is_pooler(key) for key in missing) and _has_pooling_switch(cls):
        # A checkpoint saved from a head without a pooler: the class has a switch for just that.
        model, missing = _load(cls, config, folder, getattr(torch, dtype), add_pooling_layer=False)
    # A buffer of the head itself comes from the code: a backbone's checkpoint lacks it, and nothing of it is random.
    own = {name for name, _ in model.named_buffers(recurse=False)}
    missing = [key for key in missing if key not in own]
    if missing:
        raise InputError(
            f"The checkpoint in {str(folder)!r} has no weights for {_some(missing)}, which {cls.__name__} needs; they "
            "would be random. Ask for the task that it was trained for, or give a complete checkpoint."
        )
    if check_values and (wrong := _not_finite(model)):
        raise InputError(not_finite_text(folder, wrong))
    return model


def load_state(module: torch.nn.Module, folder: Path) -> None:
    """Give a module of plain torch the weights of ``folder``, all of them and no other, as float32.

    Raises:
        InputError: If weights are missing, truncated, too many, of other shapes than the module's, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_weights(folder)
    weights: dict[str, torch.Tensor] = {}
    try:
        for path in weight_files(folder):
            weights.update(load_file(path))
        module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except SafetensorError as error:
        raise InputError(f"The weights in {str(folder)!r} cannot be read: {error}. Fetch them again.") from error
    except RuntimeError as error:
        raise InputError(
            f"The weights in {str(folder)!r} do not fit their config.json: {str(error)[:400]}. "
            "Give the config that the weights were saved with."
        ) from error
    if wrong := _not_finite(module):
        raise InputError(not_finite_text(folder, wrong))


def not_finite_text(folder: Path, wrong: Iterable[str]) -> str:
    """Return what is said of a checkpoint whose weights ``wrong`` are not finite."""
    return (
        f"The checkpoint in {str(folder)!r} holds NaN or infinite weights in {_some(wrong)}. "
        "Nothing that is computed with them has a meaning; fetch or train it again."
    )


def _load(
    cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: Any, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    from safetensors import SafetensorError

    try:
        # With output_loading_info it returns a pair, which its annotation does not say.
        loaded: Any = cls.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, EOFError) as error:
        raise InputError(f"The weights in {str(folder)!r} cannot be read: {error}. Fetch them again.") from error
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "size mismatch" in text or "mismatched" in text or "shape" in text:
            raise InputError(
                f"The weights in {str(folder)!r} do not fit their config.json: {text[:400]}. "
                "Give the config that the weights were saved with."
            ) from error
        raise
    except ImportError as error:
        raise ModelError(
            f"{cls.__name__} needs a library that is not installed: {error}", kind=ErrorKind.UNSUPPORTED
        ) from error
    model, info = loaded
    return model.eval(), sorted(str(k) for k in info.get("missing_keys", ()))


def _is_pooler(key: str) -> bool:
    return "pooler" in key.split(".")


def _has_pooling_switch(cls: type) -> bool:
    return "add_pooling_layer" in inspect.signature(cls).parameters


def _not_finite(model: torch.nn.Module) -> list[str]:
    import torch

    parameters = {name for name, _ in model.named_parameters()}
    wrong = []
    for name, tensor in model.state_dict().items():
        # The sum of squares of finite weights may overflow; that of their extremes does not.
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(torch.aminmax(tensor))
            # A buffer may hold the infinities of a mask.
            if not (torch.isfinite(extremes) if name in parameters else ~torch.isnan(extremes)).all():
                wrong.append(name)
    return wrong


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

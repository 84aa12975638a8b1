"""A class of transformers built without weights, whose work graphs do: all else in it stays the class's own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from onnx_config.errors import ErrorKind, ModelError
from onnx_config.runtime.cache_layers import PlainCache

__all__ = ["generating_class", "named_arguments", "serve", "served_model"]


def generating_class(name: str) -> Any:
    """Return the class of transformers by this name.

    Raises:
        ModelError: If there is none, or it does not generate (``unsupported``).
    """
    import transformers

    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.GenerationMixin):
        raise ModelError(
            f"transformers {transformers.__version__} has no class {name!r} that generates, and several graphs of one "
            "model generate through theirs.",
            kind=ErrorKind.UNSUPPORTED,
        )
    return cls


def served_model(
    cls: type, config: Any, *, forward: Callable[[Any, dict[str, Any]], Any], device: torch.device, dtype: torch.dtype
) -> Any:
    """Return a model of a class derived from ``cls``, on the meta device.

    Args:
        cls: A class of transformers that generates.
        config: Its config.
        forward: What takes the place of its ``forward``: is given the model and the arguments by name. The signature
            stays the class's own, by which transformers knows unknown options.
        device: Where tensors are handed over, which the model says of itself once it is built.
        dtype: Element type of what comes out, likewise.

    Raises:
        ModelError: If the class cannot be built from the config (``unsupported``).
    """
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]  # a model class has it

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(signature, self, *args, **kwargs)
        given.pop(next(iter(signature.parameters)))
        return forward(self, given)

    called.__signature__ = signature  # type: ignore[attr-defined]  # as functools.wraps does
    called.__doc__ = cls.forward.__doc__  # type: ignore[attr-defined]  # a model class has it
    served = type(cls.__name__, (_Served, cls), {"forward": called, "__doc__": cls.__doc__})
    try:
        # Some classes warn of their own deprecations when they are built.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = served(config)
    # The class's own code decides what it raises at a config that does not suit it.
    except Exception as error:
        raise ModelError(
            f"{cls.__name__} cannot be built from its config, to generate by it: {type(error).__name__}: {error}",
            kind=ErrorKind.UNSUPPORTED,
        ) from error
    # Not through the module's own way to set attributes, which looks for modules in them.
    model.__dict__["serves"] = (device, dtype)
    return model.eval()


def serve(model: Any, *, device: torch.device, dtype: torch.dtype) -> None:
    """Have a model within a served one say of itself where and in what it hands tensors over, in place."""
    model.__class__ = type(type(model).__name__, (_Served, type(model)), {"__doc__": type(model).__doc__})
    model.__dict__["serves"] = (device, dtype)


def named_arguments(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, those that no parameter names among them.

    >>> named_arguments(inspect.signature(lambda a, *, b=1, **rest: a), 2, c=3)
    {'a': 2, 'c': 3}
    """
    given = dict(signature.bind(*args, **kwargs).arguments)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return given | (given.pop(rest, {}) if rest is not None else {})


class _Served(PlainCache):
    """What a class of transformers is asked for beside ``forward``, where graphs do its work."""

    serves: tuple[torch.device, torch.dtype] = (torch.device("meta"), torch.float32)
    """Where and in what; while the class is built, there are no graphs yet."""

    @property
    def device(self) -> torch.device:
        return self.serves[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.serves[1]

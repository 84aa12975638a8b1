"""`AutoModelForONNX`: runs an artifact in ONNX Runtime and answers as the transformers model does.

This version runs artifacts of one graph; one that carries its cache generates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.export.artifact import read_ferry_file

if TYPE_CHECKING:
    from onnx_config.runtime.causal import CausalGraph

__all__ = ["AutoModelForONNX"]

# Models published for transformers.js have their graphs in a folder of their own.
_GRAPHS = ("model.onnx", "onnx/model.onnx")


class AutoModelForONNX:
    """A converted model, called like the transformers model that it came from.

    ::

        model = AutoModelForONNX.from_pretrained("path/to/artifact")
        outputs = model(**tokenizer("A sentence.", return_tensors="pt"))
        outputs.last_hidden_state
    """

    def __init__(self, folder: Path, *, device: str = "cpu", threads: int = 0) -> None:
        from onnx_config.export.parity import choose_device, open_session

        self.folder = folder
        """The artifact's folder."""
        self.device = choose_device(device)
        """``cpu`` or ``cuda``."""
        self.session = open_session(_graph_in(folder), device=self.device, threads=threads)
        """The ONNX Runtime session."""
        self.input_names = tuple(value.name for value in self.session.get_inputs())
        self.output_names = tuple(value.name for value in self.session.get_outputs())
        self.main_input_name = self.input_names[0]
        """The input that a model of its kind cannot do without, by transformers' word; the first one."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "cpu",
        threads: int = 0,
        allow_quarantined: bool = False,
    ) -> AutoModelForONNX:
        """Load an artifact.

        Args:
            model: Folder of an artifact, or of another converter's files: ``model.onnx``, there or in ``onnx/``.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: Threads of ONNX Runtime in one operator; 0: as many as there are cores.
            allow_quarantined: Whether to load a graph that failed its comparison with PyTorch.

        Raises:
            InputError: If the folder holds no graph, or the device is not there.
            ModelError: If the artifact is in quarantine, or ONNX Runtime refuses it.
        """
        folder = Path(model).expanduser()
        _graph_in(folder)
        known = read_ferry_file(folder)
        verdict = ((known or {}).get("model", {}).get("parity") or {}).get("verdict")
        if verdict not in (None, "verified") and not allow_quarantined:
            raise ModelError(
                f"{str(folder)!r} is in quarantine: its graph was compared with PyTorch and the verdict is {verdict}. "
                "Pass allow_quarantined=True to load it all the same.",
                kind=ErrorKind.MISMATCH,
            )
        name = (known or {}).get("model", {}).get("architecture") or _architecture_in(folder)
        # Under the name of the model's own class, by which pipelines tell whether it does their task.
        named: type[AutoModelForONNX] = (
            type(name, (cls,), {"__doc__": cls.__doc__}) if isinstance(name, str) and name.isidentifier() else cls
        )
        return named(folder, device=device, threads=threads)

    @cached_property
    def config(self) -> Any:
        """The transformers config, where the artifact has one."""
        from onnx_config.hub import read_config

        return read_config(str(self.folder.absolute()))

    @property
    def generation_config(self) -> Any:
        """What `generate` does unless told otherwise; ``None`` where the graph does not generate."""
        return None if self.causal is None else self.causal.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if self.causal is not None:
            self.causal.generation_config = value

    @property
    def dtype(self) -> Any:
        """``torch.float32``: the element type of what comes out."""
        import torch

        return torch.float32

    def eval(self) -> AutoModelForONNX:
        """Return the model, which never trains; pipelines call this."""
        return self

    def to(self, device: Any) -> AutoModelForONNX:
        """Return the model, if it is on ``device``; pipelines call this.

        Raises:
            InputError: If it is on another one: a session stays where it was made.
        """
        wanted = str(device).partition(":")[0]
        if wanted != self.device:
            raise InputError(
                f"The model was loaded for {self.device} and cannot be moved to {wanted}. "
                f"Load it with AutoModelForONNX.from_pretrained(..., device={wanted!r})."
            )
        return self

    def __call__(self, **inputs: Any) -> Any:
        """Call `forward`."""
        return self.forward(**inputs)

    def forward(self, **inputs: Any) -> Any:
        """Run the graph; returns a ``ModelOutput`` of torch tensors, or of NumPy arrays if given such.

        Keyword arguments that the graph does not take are left out, so that a preprocessor's whole output
        can be passed. A mask or segment ids that are missing are filled in as transformers does.

        Raises:
            InputError: If an input that cannot be filled in is missing, or one has a shape that the graph
                does not take.
        """
        from transformers.utils.generic import ModelOutput

        as_torch = any(_is_tensor(value) for value in inputs.values())
        if self.causal is not None:
            return self._continue(inputs, as_torch=as_torch)
        feed = {name: _as_array(value) for name, value in inputs.items() if name in self.input_names}
        self._fill(feed)
        try:
            values = self.session.run(self.output_names, feed)
        # ONNX Runtime's exceptions share no base class of their own.
        except Exception as error:
            raise InputError(
                f"ONNX Runtime cannot run the graph on {', '.join(f'{n} {list(a.shape)}' for n, a in feed.items())}: "
                f"{error}. Its inputs are {', '.join(f'{v.name} {v.shape}' for v in self.session.get_inputs())}."
            ) from error
        if as_torch:
            import torch

            values = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
        return ModelOutput(zip(self.output_names, values, strict=True))

    def _continue(self, inputs: Mapping[str, Any], *, as_torch: bool) -> Any:
        """Call the graph that carries its cache, which is transformers' own object and of torch."""
        import torch

        past = {name: value for name, value in inputs.items() if name == "past_key_values"}
        given = {name: torch.from_numpy(_as_array(v)) for name, v in inputs.items() if name in self.input_names}
        if "input_ids" not in given:
            raise InputError(f"The graph takes {list(self.input_names)}; 'input_ids' is missing.")
        returned = self.causal(**given, **past)  # type: ignore[misc]  # asked before
        if not as_torch:
            returned["logits"] = returned["logits"].numpy()
        return returned

    def _fill(self, feed: dict[str, Any]) -> None:
        for value in self.session.get_inputs():
            if value.name in feed:
                wanted = _DTYPES.get(value.type)
                if wanted is not None and feed[value.name].dtype != wanted:
                    feed[value.name] = feed[value.name].astype(wanted)
                continue
            filled = _filled(value.name, feed, _DTYPES.get(value.type, np.int64))
            if filled is None:
                raise InputError(f"The graph takes {list(self.input_names)}; {value.name!r} is missing.")
            feed[value.name] = filled

    @cached_property
    def causal(self) -> CausalGraph | None:
        """What generates; ``None`` where the graph carries no cache."""
        if not any(name.startswith("past_key_values.") for name in self.input_names):
            return None
        from onnx_config.runtime.causal import CausalGraph

        return CausalGraph(self.session, self.config, self.folder)

    def can_generate(self) -> bool:
        """Return whether `generate` can be called."""
        return self.causal is not None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the transformers model does: ``GenerationMixin.generate``, with all its options.

        Raises:
            InputError: If an option is unknown, or a text becomes longer than the model takes.
            ModelError: If the graph carries no cache, so that every token would be computed anew (``unsupported``).
        """
        if self.causal is None:
            raise ModelError(
                f"The graph in {str(self.folder)!r} carries no cache, so generate() would compute every token anew; it "
                "is not offered. Convert the model with the task text-generation-with-past, or call it for logits.",
                kind=ErrorKind.UNSUPPORTED,
            )
        try:
            return self.causal.generate(*args, **kwargs)  # type: ignore[misc]  # no PreTrainedModel, and like one
        except ValueError as error:
            if "model_kwargs" not in str(error):
                raise
            raise InputError(f"generate() was given an option that transformers does not know: {error}") from error


_DTYPES: Mapping[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
}


def _graph_in(folder: Path) -> Path:
    for name in _GRAPHS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{str(folder)!r} holds no {_GRAPHS[0]}. Give the folder of a converted model; "
        "`ferry catalog list` shows where they are.",
        kind=ErrorKind.NOT_FOUND,
    )


def _architecture_in(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _filled(name: str, feed: Mapping[str, Any], dtype: Any) -> Any | None:
    """Return what transformers takes for a missing input; ``None`` where it would refuse."""
    match name:
        case "attention_mask" if "input_ids" in feed:
            return np.ones(feed["input_ids"].shape, dtype)
        case "attention_mask" if "input_values" in feed and feed["input_values"].ndim == 2:
            return np.ones(feed["input_values"].shape, dtype)
        case "decoder_attention_mask" if "decoder_input_ids" in feed:
            return np.ones(feed["decoder_input_ids"].shape, dtype)
        case "token_type_ids" if "input_ids" in feed:
            return np.zeros(feed["input_ids"].shape, dtype)
        case "pixel_mask" if "pixel_values" in feed and feed["pixel_values"].ndim == 4:
            pixels = feed["pixel_values"].shape
            return np.ones((pixels[0], *pixels[2:]), dtype)
        case _:
            return None


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch"


def _as_array(value: Any) -> Any:
    if not _is_tensor(value):
        return np.asarray(value)
    tensor = value.detach().cpu()
    # NumPy has no bfloat16.
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()

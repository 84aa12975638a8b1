"""`AutoModelForONNX`: runs an artifact in ONNX Runtime and answers as the transformers model does."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_config.cache_layout import KEY_OR_VALUE
from onnx_config.errors import ErrorKind, InputError, ModelError
from onnx_config.parts import ENCODER_STATES, GRAPH_FILES, Role
from onnx_config.runtime.asked import ASKED_OUTPUTS, refuse_outputs
from onnx_config.runtime.layout import Choice
from onnx_config.runtime.locate import Located, locate

if TYPE_CHECKING:
    import torch

    from onnx_config.runtime.graph_session import GraphSession

__all__ = ["AutoModelForONNX"]

_EMBEDDING = {Role.EMBED_TOKENS, Role.VISION_ENCODER, Role.AUDIO_ENCODER}
_CACHE = "past_key_values"


class AutoModelForONNX:
    """A converted model, called like the transformers model that it came from.

    ::

        model = AutoModelForONNX.from_pretrained("path/to/artifact")
        outputs = model(**tokenizer("A sentence.", return_tensors="pt"))
        outputs.last_hidden_state

    One of several graphs, and one that carries its cache, generates. One that reads images in a text is given what its
    processor makes: images as they are, tiles with a mask of what is shown, tiles with the sizes that pictures had, or
    images of several sizes in the corner of the largest. Load it with `from_pretrained`.
    """

    def __init__(self, located: Located, graphs: Mapping[Role, GraphSession], class_name: str | None) -> None:
        self.folder = located.folder
        """The artifact's folder."""
        self.graphs = graphs
        """What runs, by what it computes."""
        sessions = tuple(graphs.values())
        first, last = sessions[0], sessions[-1]
        self.device: torch.device = first.device
        """Where its outputs are."""
        self.session = first.session
        """The ONNX Runtime session; of several graphs, the first one's."""
        self.input_names = tuple(first.inputs)
        """What the first graph takes."""
        self.output_names = last.output_names
        """What the last graph gives."""
        self._class_name = class_name

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        threads: int = 0,
        file_name: str | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        merged: bool | None = None,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        check_hashes: bool = True,
        allow_quarantined: bool = False,
    ) -> AutoModelForONNX:
        """Load an artifact, or graphs that others have made under the names that optimum and transformers.js use.

        Args:
            model: A folder; an id of the catalog, for its newest verified artifact; or a Hub id, whose graphs are
                downloaded. Ids may end in ``@`` and a revision.
            revision: The same revision, for an id without one.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: Threads of ONNX Runtime in one operator; 0: as many as there are cores.
            file_name: The one graph to load, such as ``model_quantized.onnx``; ``None``: by the names in use.
            subfolder: Where the graphs lie; ``None``: at the top, or in ``onnx``.
            variant: What the names of all graphs end in before ``.onnx``: ``quantized``, ``fp16``; ``None``: nothing.
            merged: Whether to generate with the merged decoder, which holds the weights once, or with the two that it
                was made of; ``None``: with the merged one where it is there.
            providers: ONNX Runtime's execution providers, as it takes them; ``None``: those of the device.
            session_options: Its ``SessionOptions``, in place of ``threads``.
            check_hashes: Whether the graphs are compared with the SHA-256 in ``ferry.json``, which reads them once
                more; their sizes always are.
            allow_quarantined: Whether to load a graph that failed its comparison with PyTorch.

        Raises:
            InputError: If nothing is called so, a graph is missing or not the one that was verified, or the device is
                not there.
            ModelError: If the artifact is in quarantine, ONNX Runtime refuses it, or this version cannot run it.
            TransientError: If the catalog or the Hub does not answer.
        """
        choice = Choice(file_name=file_name, subfolder=subfolder, variant=variant, merged=merged)
        located = locate(model, revision=revision, choice=choice)
        _refuse_quarantined(located, variant, allowed=allow_quarantined)
        if located.known is not None:
            from onnx_config.runtime.integrity import check_files

            check_files(located.folder, located.known, tuple(located.graphs.values()), hashes=check_hashes)
        graphs = _open(located, device=device, threads=threads, providers=providers, options=session_options)
        name = (located.known or {}).get("model", {}).get("architecture") or _architecture_in(located.folder)
        name = name if isinstance(name, str) and name.isidentifier() else None
        # Under the name of the model's own class, by which pipelines tell whether it does their task.
        named: type[AutoModelForONNX] = cls if name is None else type(name, (cls,), {"__doc__": cls.__doc__})
        loaded = named(located, graphs, name)
        # What cannot generate although it should is said now, not at the first token.
        _ = loaded.generator
        return loaded

    @cached_property
    def config(self) -> Any:
        """The transformers config, where the artifact has one."""
        from transformers import PreTrainedConfig

        from onnx_config.config_file import read_config_dict
        from onnx_config.hub import read_config
        from onnx_config.remote_code import names_code

        try:
            return read_config(str(self.folder.absolute()))
        except ModelError:
            # A graph needs none of the code that it came from: what config.json says is enough.
            if not names_code(value := read_config_dict(self.folder)):
                raise
            return PreTrainedConfig.from_dict(value)

    @property
    def generation_config(self) -> Any:
        """What `generate` does unless told otherwise; ``None`` where the graph does not generate."""
        return None if self.generator is None else self.generator.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if self.generator is not None:
            self.generator.generation_config = value

    @property
    def dtype(self) -> torch.dtype:
        """The element type of what comes out."""
        import torch

        last = list(self.graphs.values())[-1]
        return next((last.output_types[n] for n in last.output_names if n in last.output_types), torch.float32)

    @property
    def main_input_name(self) -> str:
        """The input that a model of its kind cannot do without, by transformers' word; else the first one."""
        declared = getattr(self._class, "main_input_name", None)
        return declared if declared in self.input_names else self.input_names[0]

    @property
    def input_modalities(self) -> Any:
        """What its class takes: text, images, sounds; as transformers says it."""
        return getattr(self._class, "input_modalities", "text")

    @property
    def output_modalities(self) -> Any:
        """What its class generates, as transformers says it."""
        return getattr(self._class, "output_modalities", "text")

    @property
    def _class(self) -> Any:
        import transformers

        return getattr(transformers, self._class_name, None) if self._class_name else None

    def eval(self) -> AutoModelForONNX:
        """Return the model, which never trains; pipelines call this."""
        return self

    def to(self, device: Any) -> AutoModelForONNX:
        """Return the model, if it is on ``device``; pipelines call this.

        Raises:
            InputError: If it is on another one: a session stays where it was made.
        """
        wanted = str(device).partition(":")[0]
        if wanted != self.device.type:
            raise InputError(
                f"The model was loaded for {self.device.type} and cannot be moved to {wanted}. "
                f"Load it with AutoModelForONNX.from_pretrained(..., device={wanted!r})."
            )
        return self

    def __call__(self, **inputs: Any) -> Any:
        """Call `forward`."""
        return self.forward(**inputs)

    def forward(self, **inputs: Any) -> Any:
        """Run the model; returns what its class in transformers does, of tensors, or of NumPy arrays if given such.

        Keyword arguments that it does not take are left out, so that a preprocessor's whole output can be passed. A
        mask or segment ids that are missing are filled in as transformers does. A cache is transformers' own and of
        torch, whatever was given.

        Raises:
            InputError: If an input that cannot be filled in is missing, or one has a shape that the graph does not
                take.
        """
        as_torch = any(_is_tensor(one) for value in inputs.values() for one in _leaves(value))
        generator = self.generator
        if self._segmenter is not None:
            answer = self._segmenter({name: _members_as_tensors(value) for name, value in inputs.items()})
        else:
            answer = self._run(inputs) if generator is None else generator(**self._generators_inputs(inputs))
        return answer if as_torch else _as_numpy(answer)

    def get_image_embeddings(self, pixel_values: Any) -> Any:
        """Return what a segmenter makes of images, to be given in their place: as its class in transformers does.

        Raises:
            InputError: If the model is no segmenter, or the images have a shape that the graph does not take.
        """
        if self._segmenter is None:
            raise InputError(
                f"Embeddings of an image were asked for, and {self._class_name or 'the model'} makes none to be asked "
                "about. Call the model itself."
            )
        made = self._segmenter.get_image_embeddings(_as_tensor(pixel_values))
        if _is_tensor(pixel_values):
            return made
        return tuple(map(_as_numpy, made)) if isinstance(made, tuple) else _as_numpy(made)

    @cached_property
    def _segmenter(self) -> Any:
        """What answers prompts about images; ``None`` where nothing here does."""
        if Role.PROMPT_DECODER not in self.graphs:
            return None
        if Role.VISION_ENCODER not in self.graphs:
            raise InputError(
                f"{str(self.folder)!r} lacks {GRAPH_FILES[Role.VISION_ENCODER]}, which embeds the images that its "
                "prompts are about. Copy the whole folder again, or convert the model again.",
                kind=ErrorKind.NOT_FOUND,
            )
        from onnx_config.runtime.prompted import Segmenter

        return Segmenter(self._class_name, self._class, self.graphs)

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        """Run the one graph."""
        from onnx_config.runtime.fill import filled
        from onnx_config.runtime.outputs import output_class

        (graph,) = self.graphs.values()
        refuse_outputs(inputs, graph.output_names)
        feed = {name: _as_tensor(value) for name, value in inputs.items() if name in graph.inputs and value is not None}
        for value in graph.inputs.values():
            if value.name not in feed:
                found = filled(value.name, feed)
                if found is None:
                    raise InputError(f"The graph takes {list(self.input_names)}; {value.name!r} is missing.")
                feed[value.name] = found
        answer = graph.run(feed)
        return output_class(self._class_name, tuple(answer))(**answer)

    def _generators_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the inputs that what generates takes in one call, arrays as tensors."""
        takes = inspect.signature(self.generator.forward).parameters.keys() | ASKED_OUTPUTS.keys()
        given = {name: _as_tensor(value) for name, value in inputs.items() if name in takes and value is not None}
        if Role.ENCODER not in self.graphs and not {"input_ids", "inputs_embeds"} & given.keys():
            raise InputError(f"The graph takes {list(self.input_names)}; 'input_ids' is missing.")
        return given

    @cached_property
    def generator(self) -> Any:
        """What generates: a model of transformers by its methods; ``None`` where nothing here goes on with a text."""
        if Role.ENCODER in self.graphs:
            from onnx_config.runtime.seq2seq import seq2seq_model

            return seq2seq_model(self._generating_class(), self.config, self._read_generation_config(), self.graphs)
        if self._segmenter is not None:
            return None
        if _EMBEDDING & self.graphs.keys():
            from onnx_config.runtime.fusion import fusion_model

            return fusion_model(self._generating_class(), self.config, self._read_generation_config(), self.graphs)
        carries = any(name.startswith(f"{_CACHE}.") for graph in self.graphs.values() for name in graph.inputs)
        if not carries and self.graphs.keys() == {Role.MODEL}:
            return None
        if any(
            f".{Role.ENCODER}." in name or name == ENCODER_STATES for g in self.graphs.values() for name in g.inputs
        ):
            raise InputError(
                f"{str(self.folder)!r} lacks {GRAPH_FILES[Role.ENCODER]}, the encoder of its decoder. Copy the whole "
                "folder again, or convert the model again.",
                kind=ErrorKind.NOT_FOUND,
            )
        from onnx_config.runtime.causal import CausalGraph
        from onnx_config.runtime.state_graph import StateGraph

        whole = self.graphs.get(Role.MODEL)
        past = [] if whole is None else [name for name in whole.inputs if name.startswith(f"{_CACHE}.")]
        if whole is not None and not all(map(KEY_OR_VALUE.fullmatch, past)):
            return StateGraph(whole, self.config, self._read_generation_config())
        return CausalGraph(self.graphs, self.config, self._read_generation_config())

    def _generating_class(self) -> str:
        """Return the class that generates: the one the model came from, or its model type's."""
        from onnx_config.task_detector import detect_task

        if callable(getattr(self._class, "generate", None)) and self._class_name is not None:
            return self._class_name
        # What the config names is gone, or a bare backbone.
        by_type = copy.copy(self.config)
        by_type.architectures = None
        return detect_task(by_type).class_name

    def _read_generation_config(self) -> Any:
        from transformers import GenerationConfig

        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.folder))
        return GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:
        """Return whether `generate` can be called."""
        return self.generator is not None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the transformers model does: its own ``generate``, with all its options.

        Raises:
            InputError: If an option is unknown, or a text becomes longer than the model takes.
            ModelError: If the graph carries no cache, so that every token would be computed anew (``unsupported``).
        """
        if self.generator is None:
            raise ModelError(
                f"The graph in {str(self.folder)!r} carries no cache, so generate() would compute every token anew; it "
                "is not offered. Convert the model with the task text-generation-with-past, or call it for logits.",
                kind=ErrorKind.UNSUPPORTED,
            )
        if kwargs.get("assistant_early_exit") is not None:
            raise InputError("assistant_early_exit was asked for: the model's first layers alone, and a graph has all.")
        from_numpy = any(isinstance(value, np.ndarray) for value in (*args, *kwargs.values()))
        args = tuple(_own(value) for value in args)
        kwargs = {name: _own(value) for name, value in kwargs.items()}
        try:
            found = self.generator.generate(*args, **kwargs)
        except ValueError as error:
            if "model_kwargs" not in str(error):
                raise
            raise InputError(f"generate() was given an option that transformers does not know: {error}") from error
        return _as_numpy(found) if from_numpy else found


def _refuse_quarantined(located: Located, variant: str | None, *, allowed: bool) -> None:
    model = (located.known or {}).get("model", {})
    verdict = (model.get("parity") or {}).get("verdict")
    if verdict not in (None, "verified") and not allowed:
        raise ModelError(
            f"{str(located.folder)!r} is in quarantine: its graph was compared with PyTorch and the verdict is "
            f"{verdict}. Pass allow_quarantined=True to load it all the same.",
            kind=ErrorKind.MISMATCH,
        )
    entries = [entry for entry in model.get("variants") or () if variant is not None and entry["variant"] == variant]
    verdict = ((entries[0].get("parity") or {}) if entries else {}).get("verdict")
    if verdict not in (None, "verified") and not allowed:
        raise ModelError(
            f"The variant {variant!r} in {str(located.folder)!r} was compared with PyTorch once more and the verdict "
            f"is {verdict}. Load another variant, or pass allow_quarantined=True to load it all the same.",
            kind=ErrorKind.MISMATCH,
        )


def _open(
    located: Located, *, device: str, threads: int, providers: Sequence[Any] | None, options: Any
) -> dict[Role, GraphSession]:
    """Return the graphs, loaded.

    Raises:
        InputError: If the device is not there, or weights beside a graph are missing.
        ModelError: If ONNX Runtime refuses a graph.
    """
    import torch

    from onnx_config.export.session import choose_device, open_session
    from onnx_config.runtime.graph_session import GraphSession
    from onnx_config.runtime.integrity import missing_weights

    chosen = choose_device(device)
    place = torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen)
    graphs = {}
    for role, name in located.graphs.items():
        path = located.folder / name
        try:
            session = open_session(path, device=chosen, threads=threads, providers=providers, options=options)
        except ModelError as error:
            if (missing := missing_weights(path)) is None:
                raise
            raise InputError(
                f"{str(located.folder)!r} lacks {missing}, which holds the weights of {name}. Copy the whole folder "
                "again, or convert the model again."
            ) from error
        graphs[role] = GraphSession(session, place)
    return graphs


def _architecture_in(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch"


def _own(value: Any) -> Any:
    """Return an array as a tensor, and a model of this kind as what generates in it; all else as it is."""
    if isinstance(value, AutoModelForONNX):
        return value.generator
    return _as_tensor(value) if isinstance(value, np.ndarray) else value


def _as_tensor(value: Any) -> Any:
    """Return arrays and lists of numbers as tensors; caches, flags and tensors as they are."""
    import torch

    if isinstance(value, np.ndarray):
        # torch takes no array that must not be written to.
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if isinstance(value, list):
        return torch.as_tensor(value)
    return value


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what lists hold, and lists in them."""
    if isinstance(value, (list, tuple)):
        for member in value:
            yield from _leaves(member)
    else:
        yield value


def _members_as_tensors(value: Any) -> Any:
    """Return arrays as tensors, also those that a list holds; a list of numbers as one tensor."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, np.ndarray) or _is_tensor(v) for v in _leaves(value)):
        return type(value)(map(_members_as_tensors, value))
    return _as_tensor(value)


def _as_numpy(value: Any) -> Any:
    """Return tensors, and those that an output of transformers holds, as arrays."""
    import torch
    from transformers.utils.generic import ModelOutput

    def array(held: Any) -> Any:
        if isinstance(held, list):
            return [array(one) for one in held]
        if not isinstance(held, torch.Tensor):
            return held
        # NumPy has no bfloat16.
        return (held.float() if held.dtype == torch.bfloat16 else held).cpu().numpy()

    if not isinstance(value, ModelOutput):
        return array(value)
    for name, held in value.items():
        value[name] = array(held)
    return value

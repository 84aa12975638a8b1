"""Segmenters: an image is embedded once, and asked about as often as one likes, with points or with boxes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from onnx_config.errors import InputError
from onnx_config.image_embeddings import BOXES, IMAGE, POINT_LABELS, POINTS, arguments_of, by_argument, by_name
from onnx_config.parts import Role
from onnx_config.runtime.asked import refuse_outputs
from onnx_config.runtime.graph_session import GraphSession
from onnx_config.runtime.outputs import output_class

__all__ = ["Segmenter"]


class Segmenter:
    """The graphs of a segmenter, called like the class of transformers that they came from.

    Args:
        class_name: That class; ``None``: it is not known.
        model_class: The class itself, where this version of transformers has it.
        graphs: What embeds an image, what answers points, and, where there is one, what answers boxes.
    """

    def __init__(self, class_name: str | None, model_class: Any, graphs: Mapping[Role, GraphSession]) -> None:
        self._class_name = class_name
        self._graphs = graphs
        self._arguments = arguments_of(graphs[Role.VISION_ENCODER].output_names)
        self._defaults: dict[str, Any] = {}
        if model_class is not None:
            parameters = inspect.signature(model_class.forward).parameters.values()
            self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> Any:
        """Return what the class's own method does of images (batch_size, channels, height, width)."""
        made = by_argument(self._graphs[Role.VISION_ENCODER].run({IMAGE: pixel_values}))
        members = tuple(made[argument] for argument in self._arguments)
        return members if len(members) > 1 else members[0]

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Return what the class does of tensors by the names of ``forward``'s arguments.

        Raises:
            InputError: If images are missing, or given twice; or if what is asked is not what the graphs answer.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        graph = self._graph_for(given)
        refuse_outputs(given, graph.output_names)
        self._refuse_others(given, graph)
        feed = {name: value for name, value in given.items() if name in graph.inputs}
        embedded = self._embedded(given)
        feed |= embedded
        if (points := feed.get(POINTS)) is not None:
            feed.setdefault(POINT_LABELS, torch.ones(points.shape[:-1], dtype=torch.int64))
        elif (boxes := feed.get(BOXES)) is not None:
            feed[POINTS] = torch.zeros(*boxes.shape[:-1], 0, 2)
            feed[POINT_LABELS] = torch.zeros(*boxes.shape[:-1], 0, dtype=torch.int64)
        if missing := [name for name in graph.inputs if name not in feed]:
            raise InputError(f"The graph takes {', '.join(graph.inputs)}; {missing[0]!r} is missing.")
        answer = graph.run({name: feed[name] for name in graph.inputs})
        made = output_class(self._class_name, tuple(answer))
        # Some classes give back the embeddings that they were asked about.
        fields = getattr(made, "__dataclass_fields__", {})
        again = {name: value for name, value in by_argument(embedded).items() if name in fields and name not in answer}
        return made(**answer, **again)

    def _graph_for(self, given: Mapping[str, Any]) -> GraphSession:
        """Return the graph that answers such prompts."""
        usual = self._graphs[Role.PROMPT_DECODER]
        # Graphs that others have made may take points and boxes in one.
        if BOXES not in given or BOXES in usual.inputs:
            return usual
        if (boxed := self._graphs.get(Role.PROMPT_DECODER_WITH_BOXES)) is None:
            raise InputError(
                "The segmenter was asked about boxes, and its graphs answer points only. Ask about points, or use the "
                "model in PyTorch."
            )
        return boxed

    def _embedded(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the embeddings by the names of the graphs: those that are given, or of the images that are."""
        graph = self._graphs[Role.VISION_ENCODER]
        named: dict[str, torch.Tensor] = {}
        for argument in self._arguments:
            value = given.get(argument)
            if isinstance(value, tuple) and len(value) == len(self._arguments) > 1:
                # All that `get_image_embeddings` gave, where a class takes its members apart.
                for each, member in zip(self._arguments, value, strict=True):
                    named |= by_name(each, member)
            elif value is not None:
                named |= by_name(argument, value)
        if bool(named) == (IMAGE in given):
            both = "both were" if named else "neither was"
            raise InputError(f"Give {IMAGE}, or {' and '.join(self._arguments)} in its place; {both} given.")
        return named or graph.run({IMAGE: given[IMAGE]})

    def _refuse_others(self, given: Mapping[str, Any], graph: GraphSession) -> None:
        """Refuse what the class would answer otherwise for; what a processor makes for others is left out.

        Raises:
            InputError: If there is something of the kind.
        """
        taken = {IMAGE, BOXES, *graph.inputs, *self._arguments}
        for name, value in given.items():
            if name in self._defaults and name not in taken and not _is_same(value, self._defaults[name]):
                raise InputError(
                    f"The segmenter was given {name}, which its graphs were made without. Leave it out, or use the "
                    "model in PyTorch."
                )


def _is_same(value: Any, default: Any) -> bool:
    return not isinstance(value, torch.Tensor) and value == default

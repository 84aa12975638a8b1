"""Which worker gets which models: those of one structure go to the same, so that it is traced once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx_config import hub
from onnx_config.config_file import read_config_dict
from onnx_config.errors import FerryError
from tasks.crew import Crew
from tasks.key import content_sha256
from tasks.request import ConversionRequest
from tasks.structure import structural_part

__all__ = ["partition", "structures"]

_LOOKUPS = 8


def structures(requests: Sequence[ConversionRequest]) -> dict[ConversionRequest, str]:
    """Return for each model a word for its structure and options: the same for models that share a template.

    Of a repository only its config is fetched. A model whose config cannot be read has a structure of its own:
    whoever converts it says what is wrong with it.
    """
    return dict(Crew(_structure, list(dict.fromkeys(requests)), workers=_LOOKUPS).results())


def _structure(request: ConversionRequest) -> str:
    try:
        folder = hub.fetch_config(request.model_id, revision=request.revision)
        config = structural_part(read_config_dict(folder))
    except (FerryError, OSError, ValueError):
        config = {"model": request.model_id, "revision": request.revision}
    return content_sha256({"config": config, "options": request.options.to_json()})


def partition(structure_of: Mapping[ConversionRequest, str], shards: int) -> list[list[ConversionRequest]]:
    """Return the models in at most so many parts of about the same length; never an empty one.

    Models of one structure stay together unless they are more than a fair share. The same models make the same
    parts, in whatever order they are listed.
    """
    groups: dict[str, list[ConversionRequest]] = {}
    for request, structure in structure_of.items():
        groups.setdefault(structure, []).append(request)
    share = math.ceil(len(structure_of) / shards)
    pieces = [
        (structure, group[start : start + share])
        for structure, members in groups.items()
        for group in [sorted(members, key=_order)]
        for start in range(0, len(group), share)
    ]
    # The largest first, each to whoever has least: the parts differ by one small piece at most.
    pieces.sort(key=lambda piece: (-len(piece[1]), piece[0], _order(piece[1][0])))
    parts: list[list[ConversionRequest]] = [[] for _ in range(shards)]
    for _, members in pieces:
        min(parts, key=len).extend(members)
    return [part for part in parts if part]


def _order(request: ConversionRequest) -> tuple[str, str, str]:
    return request.model_id, request.revision or "", repr(request.options)

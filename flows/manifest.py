"""The manifest: which models to convert, and how.

YAML, JSON (which is YAML) and text with one id per line are read. Everything that is wrong is said at
once, each with its line, so that a list of a thousand models is mended in one go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from flows.manifest_keys import Manifest, ManifestModel, ModelOptions, Query
from flows.manifest_nodes import Problems, is_null, keys_of, kind_of, line_of, validated, value_of
from flows.model_names import is_folder, split_model
from onnx_config.errors import FerryError, InputError, error_of_kind
from tasks.request import ConversionOptions, ConversionRequest, Device

__all__ = [
    "read_manifest",
    "read_model",
    "read_models",
    "select_options",
]

_YAML_SUFFIXES = (".yaml", ".yml", ".json")
_SIGNS_OF_YAML = re.compile(r"[\[{\-'\"&*!|>%?]|[^\s#][^#]*:(\s|$)")


def read_manifest(path: Path, *, ask: bool = True) -> tuple[ConversionRequest, ...]:
    """Return the requests of a manifest, in its order, those that queries find last; never empty.

    Args:
        path: The file.
        ask: Whether the Hub is asked what queries find; without that they are checked and find nothing.

    Raises:
        TransientError: If the Hub does not answer a query; the message has its line.
        InputError: If the file cannot be read, or anything in it is wrong: an unknown key, a key or a
            model given twice, no models, a malformed id, a value outside its set. All of it in one
            message, each with its line, an unknown key or value with the nearest valid one.

    ``.yaml``, ``.yml`` and ``.json`` files are YAML; of others the first line that says something decides.
    """
    text = _read_text(path)
    problems = Problems()
    queries: list[_Found] = []
    if path.suffix.lower() in _YAML_SUFFIXES or _looks_like_yaml(text):
        found = list(_read_yaml(text, problems, queries))
    else:
        found = list(_read_lines(text, problems))
    if not found and not queries and not problems:
        problems.add(0, "it lists no models; write one id per line, or a YAML list under 'models'")
    _check_duplicates(found, problems)
    if problems:
        raise problems.error(path)
    requests = {request: None for _, request in found}
    for query in queries if ask else ():
        requests |= dict.fromkeys(_expand(query, path))
    return tuple(requests)


def _expand(found: _Found, path: Path) -> list[ConversionRequest]:
    from onnx_config.hub import list_models

    where = f"Manifest {str(path)!r}: line {found.line}"
    try:
        names = list_models(found.query.arguments(), limit=found.query.limit)
    except FerryError as error:
        raise error_of_kind(error.kind, f"{where}: {error.message}") from error
    if not names:
        raise InputError(
            f"{where}: the query finds no models with safetensors on the Hub. Ask for less, or check its words."
        )
    return list(read_models(names, defaults=found.defaults))


def read_model(
    model: str, *, revision: str | None = None, options: ConversionOptions | None = None
) -> ConversionRequest:
    """Return the request for a model as typed: ``org/name``, ``org/name@revision``, or a folder.

    What starts with ``./``, ``../``, ``/`` or ``~``, or is there as a folder, is a folder; a relative one
    is looked up from the current folder. ``revision`` is taken besides ``@revision`` if they agree.

    Raises:
        InputError: If the id is malformed, or the revision is, or they do not go together.

    >>> read_model("openai-community/gpt2@main").revision
    'main'
    """
    name, found = split_model(model, revision)
    return ConversionRequest(model_id=name, revision=found, options=options or ConversionOptions())


def read_models(
    models: Sequence[str | ManifestModel], *, defaults: ModelOptions | None = None
) -> tuple[ConversionRequest, ...]:
    """Return the requests for models as a program lists them: ids, or ids with options of their own.

    ``defaults`` are the options of those that set none; ``None``: the usual ones.

    Raises:
        InputError: If an id is malformed, or a model stands there twice with the same options.

    >>> [request.options.opset for request in read_models(["org/a"], defaults=ModelOptions(opset=18))]
    [18]
    """
    usual = {} if defaults is None else defaults.model_dump(exclude_unset=True)
    requests = []
    for model in models:
        own = {"id": model} if isinstance(model, str) else model.model_dump(exclude_unset=True)
        requests.append(_request(ManifestModel(**{**usual, **own})))
    if len(set(requests)) < len(requests):
        twice = next(request.model_id for request in requests if requests.count(request) > 1)
        raise InputError(f"The model {twice!r} is listed twice with the same revision and options. Remove one.")
    return tuple(requests)


def select_options(**values: object) -> ConversionOptions:
    """Return options from what flags say; ``None`` keeps the default.

    >>> select_options(dtype="float16", task=None).dtype
    'float16'
    """
    return replace(ConversionOptions(), **{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"Manifest {str(path)!r}: there is no such file in {str(Path.cwd())!r}. Check the name."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"Manifest {str(path)!r}: cannot be read ({reason}). Give a file that is readable.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"Manifest {str(path)!r}: line {line}: not UTF-8 text. Save the file as UTF-8.") from error


def _looks_like_yaml(text: str) -> bool:
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return _SIGNS_OF_YAML.match(first) is not None


def _read_lines(text: str, problems: Problems) -> Iterator[tuple[int, ConversionRequest]]:
    for number, line in enumerate(text.split("\n"), start=1):
        # A '#' inside a word is left alone: a folder's name may have one.
        model = re.sub(r"(^|\s)#.*", "", line.removesuffix("\r")).strip(" \t")
        if model:
            try:
                yield number, read_model(model)
            except InputError as error:
                problems.add(number, error.message.rstrip("."))


@dataclass(frozen=True, slots=True)
class _Found:
    """A query, where it stands, and the options of what it finds."""

    line: int
    query: Query
    defaults: ModelOptions


def _read_yaml(text: str, problems: Problems, queries: list[_Found]) -> Iterator[tuple[int, ConversionRequest]]:
    try:
        top = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        problems.add(mark.line + 1 if mark else 0, f"not YAML: {said}")
        return
    except YAMLError as error:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 0
        problems.add(line, f"not YAML: {getattr(error, 'reason', error)}")
        return
    except RecursionError:
        problems.add(0, "not a manifest: its YAML is nested too deeply")
        return
    if top is None:
        return
    if not isinstance(top, MappingNode):
        problems.add(line_of(top), f"{kind_of(top)} stands where the keys 'models' and 'defaults' belong")
        return
    keys = keys_of(top, problems, Manifest, "the manifest")
    if "models" not in keys and "query" not in keys:
        problems.add(line_of(top), "the key 'models' is missing; it holds the list of models")
    defaults = _read_defaults(keys.get("defaults"), problems)
    if "query" in keys:
        queries += _read_queries(keys["query"], ModelOptions(**defaults), problems)
    models = keys.get("models")
    if models is None:
        return
    if not isinstance(models, SequenceNode):
        said = "lists no models" if is_null(models) else f"is {kind_of(models)}, not a list"
        problems.add(line_of(models), f"'models' {said}; write one model per line, each after '- '")
        return
    if not models.value:
        problems.add(line_of(models), "'models' lists no models; write one model per line, each after '- '")
    for node in models.value:
        before = len(problems)
        request = _read_model_node(node, defaults, problems)
        if request is not None and len(problems) == before:
            yield line_of(node), request


def _read_defaults(node: Node | None, problems: Problems) -> dict[str, Any]:
    if node is None or is_null(node):
        return {}
    if not isinstance(node, MappingNode):
        problems.add(line_of(node), f"'defaults' is {kind_of(node)}, not keys with values")
        return {}
    keys = keys_of(node, problems, ModelOptions, "'defaults'")
    values = {key: value_of(value, problems, key) for key, value in keys.items()}
    checked = validated(ModelOptions, values, keys, problems)
    return {} if checked is None else checked.model_dump(include=set(values))


def _read_queries(node: Node, defaults: ModelOptions, problems: Problems) -> Iterator[_Found]:
    for item in node.value if isinstance(node, SequenceNode) else [node]:
        if not isinstance(item, MappingNode):
            problems.add(line_of(item), f"'query' is {kind_of(item)}; write keys such as 'author', 'task' and 'limit'")
            continue
        before = len(problems)
        keys = keys_of(item, problems, Query, "'query'")
        values = {key: value_of(value, problems, key) for key, value in keys.items()}
        if "limit" not in keys:
            problems.add(line_of(item), "the key 'limit' of 'query' is missing; it says how many models at most")
        elif (query := validated(Query, values, keys, problems)) is not None and len(problems) == before:
            yield _Found(line_of(item), query, defaults)


def _read_model_node(node: Node, defaults: Mapping[str, Any], problems: Problems) -> ConversionRequest | None:
    if isinstance(node, ScalarNode) and not is_null(node):
        keys: dict[str, Node] = {"id": node}
    elif isinstance(node, MappingNode):
        keys = keys_of(node, problems, ManifestModel, "a model")
    else:
        problems.add(line_of(node), f"{kind_of(node)} stands where a model belongs; write an id, or keys such as 'id'")
        return None
    if "id" not in keys:
        problems.add(line_of(node), "the key 'id' is missing; it names the model, as org/name or as a folder")
        return None
    values = {key: value_of(value, problems, key) for key, value in keys.items()}
    model = validated(ManifestModel, dict(defaults) | values, keys, problems)
    if model is None:
        return None
    try:
        return _request(model)
    except InputError as error:
        problems.add(line_of(keys["id"]), error.message.rstrip("."))
        return None


def _device(model: ManifestModel) -> Device:
    """Return where a model is compared.

    Raises:
        InputError: If a GPU is required and the CPU is asked for.
    """
    if model.require is None:
        return model.device
    if model.device is Device.CPU:
        raise InputError("'require: cuda' and 'device: cpu' contradict each other; leave one of them out.")
    return Device.CUDA


def _request(model: ManifestModel) -> ConversionRequest:
    options = ConversionOptions(
        task=model.task,
        device=_device(model),
        opset=model.opset,
        dtype=model.dtype.value,
        simplify=model.simplify,
        weights=model.weights.value,
        trust_remote_code=model.trust_remote_code,
        variants=model.variants,
    )
    return read_model(model.id, revision=model.revision, options=options)


def _check_duplicates(found: list[tuple[int, ConversionRequest]], problems: Problems) -> None:
    seen: dict[tuple[str, str, ConversionOptions], int] = {}
    for line, request in found:
        identity = request.model_id
        if is_folder(request.model_id):
            # Of a "~" that is nobody's home, or links that lead in a circle, its own model says what is wrong.
            with suppress(OSError, RuntimeError):
                identity = str(Path(request.model_id).expanduser().resolve())
        first = seen.setdefault((identity, request.revision or "main", request.options), line)
        if first != line:
            problems.add(
                line, f"{request.model_id!r} stands on line {first} already, with the same revision and options"
            )

"""The manifest: which models to convert, and how.

YAML, JSON (which is YAML) and text with one id per line are read. Everything that is wrong is said at
once, each with its line, so that a list of a thousand models is mended in one go.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from onnx_config.errors import FerryError, InputError, error_of_kind
from onnx_config.variants import Variant
from tasks.request import ConversionOptions, ConversionRequest, Device

__all__ = [
    "OLDEST_OPSET",
    "Dtype",
    "ManifestModel",
    "ModelOptions",
    "Query",
    "Require",
    "Sort",
    "Weights",
    "read_manifest",
    "read_model",
    "read_models",
    "select_options",
]

OLDEST_OPSET = 7
"""The oldest opset that ONNX Runtime runs, by its compatibility table."""

_SHOWN_PROBLEMS = 20
_YAML_SUFFIXES = (".yaml", ".yml", ".json")
_TAG = "tag:yaml.org,2002:"
_SIGNS_OF_YAML = re.compile(r"[\[{\-'\"&*!|>%?]|[^\s#][^#]*:(\s|$)")


class Dtype(StrEnum):
    """Element type of the weights in the graph."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Weights(StrEnum):
    """Where a graph's weights lie."""

    COPY = "copy"
    LINK = "link"


def _plain_text(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or _hidden(value)):
        raise ValueError("is empty" if not value.strip() else "has a control character")
    return value


def _readable_revision(revision: str) -> str:
    if problem := _revision_problem(revision):
        raise ValueError(problem)
    return revision


def _once(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    if twice := [variant for variant in Variant if variants.count(variant) > 1]:
        raise ValueError(f"names {twice[0].value!r} twice")
    # However they were written, they are the same wish.
    return tuple(variant for variant in Variant if variant in variants)


_Keys = TypeVar("_Keys", bound=BaseModel)
_Task = Annotated[str, BeforeValidator(_plain_text)]
_Revision = Annotated[str, AfterValidator(_readable_revision)]


class Require(StrEnum):
    """What a model is not converted without."""

    CUDA = "cuda"
    """A GPU on which it is compared; without this key, ``device: auto`` is content with a CPU."""


class ModelOptions(BaseModel):
    """The keys that hold for every model unless it says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Device = Device.AUTO
    """Where the graph is compared with PyTorch; ``auto`` is CUDA where there is a GPU."""

    require: Require | None = None
    """``cuda``: a model that cannot be compared on a GPU fails."""

    opset: Annotated[StrictInt, Field(ge=OLDEST_OPSET)] | None = None
    """ONNX opset; without it, the newest that the installed ONNX Runtime runs."""

    dtype: Dtype = Dtype.FLOAT32
    """Element type of the weights in the graph."""

    simplify: StrictBool = True
    """Whether onnxsim runs over the exported graph; its result is taken only where it holds."""

    weights: Weights = Weights.COPY
    """``copy``: the weights lie in the graph's file or beside it; ``link``: the graph points into the checkpoint's own
    file, which is hard-linked beside it."""

    trust_remote_code: StrictBool = False
    """Whether code from the model's own folder may run. No such code runs in this version: with ``true`` a model that
    brings some is refused, and without it is read as transformers knows it."""

    variants: Annotated[tuple[Variant, ...], AfterValidator(_once)] = ()
    """Further files beside the float32 graphs, in fewer bits, each with a verdict of its own."""


class ManifestModel(ModelOptions):
    """The keys of one model."""

    id: str
    """A Hub id (``org/name``, ``org/name@revision``) or a folder; a relative one starts at the current folder."""

    revision: _Revision | None = None
    """Branch, tag or commit of a Hub model; without it, ``main``."""

    task: _Task | None = None
    """Task by name; without it, what the config declares."""


class Sort(StrEnum):
    """The order in which the Hub lists what a query finds, the most or newest first."""

    DOWNLOADS = "downloads"
    LIKES = "likes"
    TRENDING = "trending_score"
    CREATED = "created_at"
    MODIFIED = "last_modified"


class Query(BaseModel):
    """The keys of a query: models of the Hub that have all that is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    author: _Task | None = None
    """The user or organisation whose models they are."""

    search: _Task | None = None
    """Words that their ids have."""

    task: _Task | None = None
    """The task that their pages name."""

    tag: _Task | None = None
    """A tag that they have."""

    library: _Task = "transformers"
    """The library that loads them."""

    sort: Sort = Sort.DOWNLOADS
    """What the most of comes first."""

    limit: Annotated[StrictInt, Field(ge=1, le=10_000)]
    """How many at most."""

    def arguments(self) -> dict[str, Any]:
        """Return what the Hub is asked."""
        said = {"author": self.author, "search": self.search, "pipeline_tag": self.task, "sort": self.sort.value}
        # Files that could not be converted anyway would use up the limit.
        tags = [self.library, "safetensors", *([self.tag] if self.tag else [])]
        return {name: value for name, value in said.items() if value is not None} | {"filter": tags}


class _Manifest(BaseModel):
    """The keys at the top; each part is checked by itself, so that all of its errors are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    defaults: Any = None
    models: Any = None
    query: Any = None


class _Problems(list[tuple[int, str]]):
    """What is wrong, with lines counted from 1; 0 is the file as a whole."""

    def add(self, line: int, text: str) -> None:
        self.append((line, text))

    def error(self, path: Path) -> InputError:
        """Return all of it as one error."""
        ordered = sorted(self, key=lambda problem: problem[0])
        shown = [f"line {line}: {text}" if line else text for line, text in ordered[:_SHOWN_PROBLEMS]]
        if more := len(ordered) - len(shown):
            shown.append(f"and {more} more")
        count = f"{len(ordered)} problems: " if len(ordered) > 1 else ""
        return InputError(f"Manifest {str(path)!r}: {count}{'; '.join(shown)}.")


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
    problems = _Problems()
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
    name, found = _split_model(model, revision)
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


def _read_lines(text: str, problems: _Problems) -> Iterator[tuple[int, ConversionRequest]]:
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


def _read_yaml(text: str, problems: _Problems, queries: list[_Found]) -> Iterator[tuple[int, ConversionRequest]]:
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
        problems.add(_line(top), f"{_kind(top)} stands where the keys 'models' and 'defaults' belong")
        return
    keys = _keys(top, problems, _Manifest, "the manifest")
    if "models" not in keys and "query" not in keys:
        problems.add(_line(top), "the key 'models' is missing; it holds the list of models")
    defaults = _read_defaults(keys.get("defaults"), problems)
    if "query" in keys:
        queries += _read_queries(keys["query"], ModelOptions(**defaults), problems)
    models = keys.get("models")
    if models is None:
        return
    if not isinstance(models, SequenceNode):
        said = "lists no models" if _is_null(models) else f"is {_kind(models)}, not a list"
        problems.add(_line(models), f"'models' {said}; write one model per line, each after '- '")
        return
    if not models.value:
        problems.add(_line(models), "'models' lists no models; write one model per line, each after '- '")
    for node in models.value:
        before = len(problems)
        request = _read_model_node(node, defaults, problems)
        if request is not None and len(problems) == before:
            yield _line(node), request


def _read_defaults(node: Node | None, problems: _Problems) -> dict[str, Any]:
    if node is None or _is_null(node):
        return {}
    if not isinstance(node, MappingNode):
        problems.add(_line(node), f"'defaults' is {_kind(node)}, not keys with values")
        return {}
    keys = _keys(node, problems, ModelOptions, "'defaults'")
    values = {key: _value(value, problems, key) for key, value in keys.items()}
    checked = _validate(ModelOptions, values, keys, problems)
    return {} if checked is None else checked.model_dump(include=set(values))


def _read_queries(node: Node, defaults: ModelOptions, problems: _Problems) -> Iterator[_Found]:
    for item in node.value if isinstance(node, SequenceNode) else [node]:
        if not isinstance(item, MappingNode):
            problems.add(_line(item), f"'query' is {_kind(item)}; write keys such as 'author', 'task' and 'limit'")
            continue
        before = len(problems)
        keys = _keys(item, problems, Query, "'query'")
        values = {key: _value(value, problems, key) for key, value in keys.items()}
        if "limit" not in keys:
            problems.add(_line(item), "the key 'limit' of 'query' is missing; it says how many models at most")
        elif (query := _validate(Query, values, keys, problems)) is not None and len(problems) == before:
            yield _Found(_line(item), query, defaults)


def _read_model_node(node: Node, defaults: Mapping[str, Any], problems: _Problems) -> ConversionRequest | None:
    if isinstance(node, ScalarNode) and not _is_null(node):
        keys: dict[str, Node] = {"id": node}
    elif isinstance(node, MappingNode):
        keys = _keys(node, problems, ManifestModel, "a model")
    else:
        problems.add(_line(node), f"{_kind(node)} stands where a model belongs; write an id, or keys such as 'id'")
        return None
    if "id" not in keys:
        problems.add(_line(node), "the key 'id' is missing; it names the model, as org/name or as a folder")
        return None
    values = {key: _value(value, problems, key) for key, value in keys.items()}
    model = _validate(ManifestModel, dict(defaults) | values, keys, problems)
    if model is None:
        return None
    try:
        return _request(model)
    except InputError as error:
        problems.add(_line(keys["id"]), error.message.rstrip("."))
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


def _keys(node: MappingNode, problems: _Problems, model: type[BaseModel], where: str) -> dict[str, Node]:
    """Return the known keys' values; an unknown or repeated key becomes a problem."""
    known = tuple(model.model_fields)
    lines: dict[str, int] = {}
    values: dict[str, Node] = {}
    for key_node, value in node.value:
        key = key_node.value if isinstance(key_node, ScalarNode) else None
        if key is None:
            problems.add(_line(key_node), f"a key of {where} must be a word, not {_kind(key_node)}")
        elif key in lines:
            problems.add(_line(key_node), f"the key {key!r} is given twice; it stands on line {lines[key]} already")
        else:
            lines[key] = _line(key_node)
            if _is_null(value):
                value.start_mark = key_node.start_mark  # An absent value is marked at the next word of the file.
            if key in known:
                values[key] = value
            else:
                problems.add(_line(key_node), f"unknown key {key!r} of {where}; {_nearest(key, known)}")
    return values


def _value(node: Node, problems: _Problems, key: str) -> Any:
    """Return a scalar as Python has it; of an id and a revision the text as written.

    A commit may consist of digits, or look like ``12e34``; it is a name all the same.
    """
    if key == "variants" and isinstance(node, SequenceNode):
        return [item.value if isinstance(item, ScalarNode) else item for item in node.value]
    if not isinstance(node, ScalarNode):
        return node
    written: str = node.value
    match str(node.tag).removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return written.lower() == "true"
        case "int" | "float" | "timestamp" if key in ("id", "revision"):
            return written
        case "int":
            try:
                return int(written.replace("_", ""), 0)
            except ValueError:
                return written
        case "float":
            try:
                return float(written.replace("_", ""))
            except ValueError:
                return written
        case _:
            return written


def _validate(
    model: type[_Keys], values: Mapping[str, Any], nodes: Mapping[str, Node], problems: _Problems
) -> _Keys | None:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            given = values.get(key)
            place = item["loc"][1] if len(item["loc"]) > 1 else None
            if isinstance(given, list) and isinstance(place, int):
                given = given[place]
            shown = _kind(given) if isinstance(given, Node) else repr(given)
            problems.add(_line(nodes[key]), f"{key!r} is {shown}: {_expected(key, given, item)}")
        return None


def _expected(key: str, given: object, error: Any) -> str:
    """Return what the key takes, in the manifest's words."""
    match key:
        case "device" | "dtype" | "weights":
            allowed = [member.value for member in {"device": Device, "dtype": Dtype, "weights": Weights}[key]]
            close = get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
            return f"it takes {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "require":
            return "it takes cuda, so that a model fails where there is no GPU, or null"
        case "sort":
            close = get_close_matches(str(given).lower(), [order.value for order in Sort], n=1, cutoff=0.5)
            return f"it takes {', '.join(Sort)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "limit":
            return "it takes a whole number from 1 to 10000"
        case "author" | "search" | "tag" | "library" if error["type"] == "string_type":
            return "it takes a word as the Hub has it"
        case "variants" if error["type"] != "value_error":
            allowed = [variant.value for variant in Variant]
            close = get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
            return f"it takes a list of {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")
        case "opset":
            return f"it takes a whole number from {OLDEST_OPSET}, or null for the newest"
        case "simplify" | "trust_remote_code":
            return "it takes true or false"
        case "id":
            return "it takes org/name, org/name@revision or a folder"
        case "task" if error["type"] == "string_type":
            return "it takes a task's name, such as text-classification"
        case "revision" if error["type"] == "string_type":
            return "it takes a branch, a tag or a commit"
        case _:
            message: str = error["msg"]
            return message.removeprefix("Value error, ")


def _nearest(key: str, known: tuple[str, ...]) -> str:
    if close := get_close_matches(key.lower(), known, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return f"the keys are {', '.join(known)}"


def _check_duplicates(found: list[tuple[int, ConversionRequest]], problems: _Problems) -> None:
    seen: dict[tuple[str, str, ConversionOptions], int] = {}
    for line, request in found:
        identity = request.model_id
        if _is_folder(request.model_id):
            # Of a "~" that is nobody's home, or links that lead in a circle, its own model says what is wrong.
            with suppress(OSError, RuntimeError):
                identity = str(Path(request.model_id).expanduser().resolve())
        first = seen.setdefault((identity, request.revision or "main", request.options), line)
        if first != line:
            problems.add(
                line, f"{request.model_id!r} stands on line {first} already, with the same revision and options"
            )


def _split_model(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return id and revision; the id of a folder as typed."""
    if not model.strip() or _hidden(model):
        what = "is empty" if not model.strip() else "has a control character"
        raise InputError(f"The model id {model!r} {what}. Write org/name, org/name@revision or a folder.")
    if _is_folder(model):
        if revision is not None:
            raise InputError(
                f"{model!r} is a folder and has no revisions, but {revision!r} was asked for. Leave it out."
            )
        return model, None
    name, at, suffix = model.partition("@")
    if at and revision is not None and suffix != revision:
        raise InputError(
            f"The model {model!r} names the revision {suffix!r}, but the revision {revision!r} was asked for as well. "
            "Give one of them."
        )
    if problem := _hub_id_problem(name):
        raise InputError(
            f"The model id {name!r} is malformed: {problem}. Write org/name, org/name@revision, or a folder "
            "that starts with ./, ../, / or ~."
        )
    chosen = suffix if at else revision
    if chosen is not None and (problem := _revision_problem(chosen)):
        raise InputError(f"The revision {chosen!r} of {name!r} {problem}. Write a branch, a tag or a commit.")
    return name, chosen


def _is_folder(model: str) -> bool:
    return model.startswith(("./", "../", "/", "~")) or model in (".", "..") or Path(model).is_dir()


def _hub_id_problem(name: str) -> str | None:
    """Return why ``name`` is no id of the Hub, after the rules of ``huggingface_hub.utils.validate_repo_id``."""
    parts = name.split("/")
    if len(parts) > 2:
        return "an id has one '/' at most"
    for part in parts:
        if not part:
            return "a part of it is empty"
        if len(part) > 96:
            return "a part of it has more than 96 characters"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", part):
            return "it has a character other than letters, digits, '-', '_' and '.'"
        if part[0] in "-." or part[-1] in "-.":
            return "a part of it starts or ends with '-' or '.'"
    if "--" in name or ".." in name:
        return "it has '--' or '..'"
    if name.endswith(".git"):
        return "it ends with '.git'"
    return None


def _revision_problem(revision: str) -> str | None:
    """Return why ``revision`` is no name of a Git revision, after the rules of ``git check-ref-format``."""
    if not revision:
        return "is empty"
    if _hidden(revision) or re.search(r"[\s~^:?*\[\\]|\.\.|@\{|//", revision):
        return "has a character that no revision has"
    if revision.startswith(("-", "/", ".")) or revision.endswith(("/", ".", ".lock")):
        return "starts or ends as no revision does"
    return None


def _hidden(text: str) -> bool:
    """Return whether ``text`` has a control or formatting character, or half of a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def _line(node: Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == f"{_TAG}null"


def _kind(node: Node) -> str:
    match node:
        case MappingNode():
            return "a mapping"
        case SequenceNode():
            return "a list"
        case ScalarNode() if _is_null(node):
            return "nothing"
        case _:
            return f"the text {node.value!r}"

"""What a transformers class declares about itself: parameters, shapes, output fields.

Everything here is read, nothing is run: the signature of ``forward``, the docstrings that
transformers generates for it and for its output class, ``main_input_name`` and
``input_modalities``. The shapes stand in the docstrings in the library's own words, e.g.
``of shape `(batch_size, sequence_length)``` .
"""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from onnx_config.patterns import AXIS_SYNONYMS

__all__ = ["Argument", "Declaration", "OutputField", "Role", "declare", "read_shape"]


class Role(StrEnum):
    """What an argument of ``forward`` is for."""

    DATA = "data"
    """A tensor that may come from a preprocessor."""
    LABEL = "label"
    """Only used to compute a loss."""
    STATE = "state"
    """A cache, or what another part of the model computed."""
    ALTERNATIVE = "alternative"
    """Takes the place of another argument, such as embeddings for ids."""
    OPTION = "option"
    """A flag, a number, a container: no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One parameter of ``forward``."""

    name: str
    """Its name."""

    required: bool
    """Whether it has no default."""

    role: Role
    """What it is for."""

    dtype: str | None
    """NumPy name of its elements' type where declared; ``None`` where it says only ``Tensor``."""

    shape: tuple[int | str, ...] | None
    """Documented shape, axis names normalised; ``None`` where none is documented."""

    elsewhere: tuple[int | str, ...] | None = None
    """Another shape that another method of the class documents for an argument of its name; ``None``: none does."""

    preprocessed: bool
    """Whether its documentation says that a preprocessor makes it."""

    documentation: str = ""
    """What its documentation says of it, on one line."""

    index_limit: int | str | None = None
    """Exclusive upper bound of its values where they are documented as indices: a number, or the
    config attribute that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputField:
    """One field of the output class of ``forward``."""

    name: str
    """Its name."""

    shape: tuple[int | str, ...] | None
    """Documented shape, axis names normalised; ``None`` where none is documented."""

    tensor: bool
    """Whether it holds one tensor rather than a cache, a tuple or another output."""

    flag: str | None
    """The config flag that turns it on, ``"labels"`` where only a loss does; ``None``: always there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """All that a class declares about its inputs and outputs."""

    class_name: str
    """Name of the class."""

    main_input: str
    """``main_input_name``, or the first parameter that carries data."""

    modalities: tuple[str, ...]
    """``input_modalities``: of ``text``, ``image``, ``audio``, ``video``, ``time``."""

    arguments: tuple[Argument, ...]
    """Parameters of ``forward`` in their order."""

    outputs: tuple[OutputField, ...]
    """Fields of the output class in their order; empty where ``forward`` names no such class."""

    unread: tuple[str, ...]
    """What could not be read, one phrase each."""

    def argument(self, name: str) -> Argument | None:
        """Return the parameter called ``name``, if there is one."""
        return next((a for a in self.arguments if a.name == name), None)


_ARGUMENT_LINE = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z_]\w*):? \((?P<type>.*`.*)\)?:?\s*$")
_SHAPE = re.compile(r"(?:of shape|shape:?)\s*[`'*]*\(((?: \* |[^`'*])*)")
_RETURNED_WHEN = re.compile(r"returned (?:when|if)\s+(?:either\s+)?`(?:config\.)?(\w+)(?:=True)?`")
_LABEL_TEXT = re.compile(r"^(labels? |future values|mask labels|class labels)", re.IGNORECASE)
_LABEL_NAME = re.compile(r"^(?!input_)(.*_)?labels?$|^(start|end)_positions$|^future_values$|^is_impossible$")
_ALTERNATIVE_TEXT = re.compile(r"instead of (passing|initiali[sz]ing)|you can choose to directly pass", re.IGNORECASE)
_OF_ANYTHING = re.compile(r"\bAny\b")
_TENSOR_HEAD = re.compile(r"`(torch\.)?\w*Tensor` of shape")
_STATE_NAME = re.compile(
    r"past_key_values|(^|_)cache(_|$)|_outputs$|^encoder_(hidden_states|attention_mask)$|^past_buckets_states$"
)
_PREPROCESSED = re.compile(r"obtained using \[|should be used for|can be obtained using|See \[`~?\w*Tokenizer")
_INDEX_RANGE = re.compile(
    r"(?:in|in the range|within) `?\[\s*0,\s*(?:\.\.\.,\s*)?"
    r"(?:config\.(?P<name>\w+)(?:\s*-\s*1)?|(?P<number>\d+))\s*\]`?"
)
_DTYPES = (
    (re.compile(r"Long|int64"), "int64"),
    (re.compile(r"IntTensor|int32"), "int32"),
    (re.compile(r"Bool"), "bool"),
    (re.compile(r"Float|float32"), "float32"),
)


def read_shape(text: str) -> tuple[int | str, ...] | None:
    """Return the first shape that ``text`` documents, with axis names normalised.

    >>> read_shape("`torch.LongTensor` of shape `(batch_size, seq_len, 4)`, *optional*")
    ('batch_size', 'sequence_length', 4)
    >>> read_shape("`torch.LongTensor` of shape `(batch_size * num_codebooks, sequence_length)`")
    ('batch_size*num_codebooks', 'sequence_length')
    >>> read_shape("`bool`, *optional*") is None
    True
    """
    found = _SHAPE.search(text)
    if found is None:
        return None
    axes: list[int | str] = []
    for part in found[1].partition(")")[0].split(","):
        axis = part.strip().strip("`*").removeprefix("config.").replace("self.", "")
        if not axis:
            continue
        if axis.lstrip("-").isdigit() and int(axis) > 0:
            axes.append(int(axis))
        else:
            factors = [re.sub(r"\W+", "_", factor.lower()).strip("_") for factor in axis.split(" * ")]
            axes.append("*".join(AXIS_SYNONYMS.get(name, name) for name in factors))
    return tuple(axes)


@lru_cache(maxsize=512)
def declare(cls: type) -> Declaration:
    """Return what ``cls``, a transformers model class, declares.

    Raises:
        TypeError: If ``cls`` has no ``forward``.
    """
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    documented = _documented_arguments(cls.forward.__doc__ or "")  # type: ignore[attr-defined]
    is_of_library = cls.__module__.partition(".")[0] == "transformers"
    # transformers documents its own classes by these words, where they mean no others.
    usual = _no_words if is_of_library else _usual_words
    others = _documented_by_methods(cls)
    unread: list[str] = []
    arguments: list[Argument] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        head, text = documented.get(parameter.name) or usual(parameter.name)
        annotation = _annotation_text(parameter.annotation)
        role = _role(parameter.name, annotation, head, text)
        unsaid = parameter.default is parameter.empty and not annotation and not head
        if role is Role.OPTION and unsaid and is_of_library:
            # Of what has to be given in the library and of which nothing is said, nearly all are tensors.
            role = Role.DATA
        arguments.append(
            Argument(
                name=parameter.name,
                required=parameter.default is parameter.empty,
                role=role,
                dtype=_dtype(annotation) or _dtype(head),
                shape=(shape := read_shape(head)),
                elsewhere=next((other for other in others.get(parameter.name, ()) if other != shape), None),
                preprocessed=bool(_PREPROCESSED.search(text)),
                documentation=text,
                index_limit=_index_limit(text),
            )
        )
        if parameter.name not in documented:
            unread.append(f"{parameter.name} is not documented")
    outputs = _output_fields(cls)
    if not outputs:
        unread.append("forward names no output class")
    main_input = getattr(cls, "main_input_name", None)
    if not isinstance(main_input, str) or main_input not in {a.name for a in arguments}:
        main_input = next((a.name for a in arguments if a.role is Role.DATA), arguments[0].name if arguments else "")
    modalities = getattr(cls, "input_modalities", ()) or ()
    return Declaration(
        class_name=cls.__name__,
        main_input=main_input,
        modalities=(modalities,) if isinstance(modalities, str) else tuple(modalities),
        arguments=tuple(arguments),
        outputs=outputs,
        unread=tuple(unread),
    )


def _no_words(name: str) -> tuple[str, str]:  # as `_usual_words`
    return "", ""


def _usual_words(name: str) -> tuple[str, str]:
    """Return what transformers says of an argument of that name wherever it stands, as `_documented_arguments` does."""
    from transformers.utils.auto_docstring import ModelArgs

    said = getattr(ModelArgs, name, None)
    if not isinstance(said, dict):
        return "", ""
    return f"`torch.Tensor` {said['shape']}" if said.get("shape") else "", " ".join(said["description"].split())


def _documented_arguments(docstring: str) -> dict[str, tuple[str, str]]:
    """Return, per argument, what stands in its parentheses and the text below."""
    docstring = docstring.split("\n        Returns:", maxsplit=1)[0].split("\n    Returns:", maxsplit=1)[0]
    lines = inspect.cleandoc(docstring).splitlines()
    found: dict[str, tuple[str, str]] = {}
    name, indent, body = "", 0, [""]
    for line in [*lines, ""]:
        match = _ARGUMENT_LINE.match(line)
        if match and (not name or len(match["indent"]) <= indent):
            name, indent, body = match["name"], len(match["indent"]), []
            found.setdefault(name, (match["type"], ""))
        elif name:
            if line.strip() and len(line) - len(line.lstrip()) <= indent:
                name = ""
                continue
            body.append(line.strip())
            found[name] = (found[name][0], " ".join(body).strip())
    return found


def _documented_by_methods(cls: type) -> dict[str, list[tuple[int | str, ...]]]:
    """Return, per argument, the shapes that methods of the class's own beside ``forward`` document for it."""
    found: dict[str, list[tuple[int | str, ...]]] = {}
    for name, method in vars(cls).items():
        if name == "forward" or name.startswith("_") or not inspect.isfunction(method):
            continue
        for argument, (head, _) in _documented_arguments(method.__doc__ or "").items():
            if (shape := read_shape(head)) is not None:
                found.setdefault(argument, []).append(shape)
    return found


def _annotation_text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else str(annotation).replace("<class '", "").replace("'>", "")


def _dtype(text: str) -> str | None:
    return next((dtype for pattern, dtype in _DTYPES if pattern.search(text)), None)


def _index_limit(text: str) -> int | str | None:
    found = _INDEX_RANGE.search(text)
    if found is None:
        return None
    return found["name"] or int(found["number"]) + 1


def _role(name: str, annotation: str, head: str, text: str) -> Role:
    if _LABEL_NAME.search(name) or _LABEL_TEXT.search(text):
        return Role.LABEL
    if re.search(r"\bbool\b", annotation) and "Tensor" not in annotation:
        return Role.OPTION
    if _STATE_NAME.search(name) or "Cache" in annotation or "ModelOutput" in annotation:
        return Role.STATE
    if _ALTERNATIVE_TEXT.search(text) or re.search(r"inputs_embeds$", name):
        return Role.ALTERNATIVE
    if "Tensor" in annotation and not re.match(r"^(tuple|list|dict)\b", annotation, re.IGNORECASE):
        return Role.DATA
    if not annotation and ("Tensor" in head or read_shape(head) is not None):
        return Role.DATA
    # An annotation that anything may hold for says less than a documented tensor.
    if _OF_ANYTHING.search(annotation) and _TENSOR_HEAD.match(head) and read_shape(head) is not None:
        return Role.DATA
    return Role.OPTION


def _output_fields(cls: type) -> tuple[OutputField, ...]:
    from transformers.utils.generic import ModelOutput

    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    try:
        returned = typing.get_type_hints(forward).get("return")
    except (NameError, TypeError, AttributeError):
        returned = None
    candidates = [returned, *typing.get_args(returned)]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, ModelOutput) and is_dataclass(c)]
    if not found:
        return ()
    documented = _documented_arguments(found[0].__doc__ or "")
    hints = {f.name: _annotation_text(f.type) for f in fields(found[0])}
    outputs = []
    for name, annotation in hints.items():
        head, text = documented.get(name, ("", ""))
        outputs.append(
            OutputField(
                name=name,
                shape=read_shape(head),
                tensor=_is_tensor_field(annotation),
                flag=_flag(name, head, text),
            )
        )
    return tuple(outputs)


def _is_tensor_field(annotation: str) -> bool:
    if re.search(r"tuple|list|dict|Cache|Output|Any", annotation, re.IGNORECASE):
        return False
    return "Tensor" in annotation


def _flag(name: str, head: str, text: str) -> str | None:
    match = re.fullmatch(r"(?:\w+_)?(hidden_states|attentions|router_logits)", name)
    if match and "*optional*" in head:
        return f"output_{match[1]}"
    if name in ("loss", "past_key_values") or name.endswith("_loss"):
        return "labels" if name != "past_key_values" else "use_cache"
    found = _RETURNED_WHEN.search(head)
    if found is None:
        return None
    flag = found[1]
    return "labels" if "label" in flag or flag == "return_loss" else flag

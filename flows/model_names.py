"""How models are named: ids of the Hub with their revisions, and folders."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from onnx_config.errors import InputError

__all__ = [
    "hidden",
    "is_folder",
    "revision_problem",
    "split_model",
]


def split_model(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return id and revision; the id of a folder as typed."""
    if not model.strip() or hidden(model):
        what = "is empty" if not model.strip() else "has a control character"
        raise InputError(f"The model id {model!r} {what}. Write org/name, org/name@revision or a folder.")
    if is_folder(model):
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
    if chosen is not None and (problem := revision_problem(chosen)):
        raise InputError(f"The revision {chosen!r} of {name!r} {problem}. Write a branch, a tag or a commit.")
    return name, chosen


def is_folder(model: str) -> bool:
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


def revision_problem(revision: str) -> str | None:
    """Return why ``revision`` is no name of a Git revision, after the rules of ``git check-ref-format``."""
    if not revision:
        return "is empty"
    if hidden(revision) or re.search(r"[\s~^:?*\[\\]|\.\.|@\{|//", revision):
        return "has a character that no revision has"
    if revision.startswith(("-", "/", ".")) or revision.endswith(("/", ".", ".lock")):
        return "starts or ends as no revision does"
    return None


def hidden(text: str) -> bool:
    """Return whether ``text`` has a control or formatting character, or half of a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)

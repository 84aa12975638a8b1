"""Where models come from: folders, and the Hugging Face Hub through ``huggingface_hub``.

With ``hub_errors`` and ``hub_limits`` the only module that knows the Hub. A model is resolved to one revision before
anything is read: the commit of a repository, or the content hash of a folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_config.config_file import config_from_dict, read_config_dict
from onnx_config.errors import ErrorKind, InputError, TransientError
from onnx_config.hub_errors import HubErrors
from onnx_config.hub_limits import within_limits
from onnx_config.sentence_modules import (
    MODULES_FILE,
    config_folder,
    module_files,
    module_folders,
    transformer_settings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Source",
    "download",
    "download_chosen",
    "fetch_config",
    "is_folder",
    "is_pinned",
    "is_repository",
    "list_files",
    "list_models",
    "read_config",
    "refuse_unpinned_code",
    "resolve",
    "upload",
]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_CODE = ("*.py",)
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model at one revision."""

    model_id: str
    """As the user wrote it."""

    revision: str
    """Commit of the Hub, or SHA-256 over a folder's files."""

    folder: Path | None
    """Where its files are; ``None`` for a repository that was not downloaded yet."""


def is_folder(model_id: str) -> bool:
    """Return whether ``model_id`` means a folder rather than a repository.

    >>> is_folder("./models/mine"), is_folder("org/name")
    (True, False)
    """
    return model_id.startswith((".", "/", "~")) or Path(model_id).is_dir() or not _HUB_ID.match(model_id)


def is_pinned(model_id: str, *, revision: str | None = None) -> bool:
    """Return whether a model cannot become another: it is a folder, or a repository at a whole commit.

    >>> is_pinned("org/name@main"), is_pinned("./models/mine"), is_pinned("org/name", revision="a1" * 20)
    (False, True, True)
    """
    name, revision = _split_revision(model_id, revision)
    return is_folder(name) or (revision is not None and _COMMIT.fullmatch(revision) is not None)


def refuse_unpinned_code(model_id: str, *, revision: str | None = None) -> None:
    """Refuse to take code from a repository that is not named by its commit: a branch may hold other code tomorrow.

    Raises:
        InputError: If the model is a repository at a branch or a tag (``bad_input``).
    """
    name, revision = _split_revision(model_id, revision)
    if not is_pinned(name, revision=revision):
        raise InputError(
            f"trust_remote_code was asked for {name!r} at {revision or 'main'!r}, which may be other code tomorrow. "
            "Read the code at one commit, and name that commit as the revision: its 40 hexadecimal digits."
        )


def is_repository(model_id: str) -> bool:
    """Return whether ``model_id`` may be a repository's, with ``@`` and a revision or not.

    >>> is_repository("org/name@main"), is_repository("./models/mine"), is_repository("a/b/c")
    (True, False, False)
    """
    return not is_folder(_split_revision(model_id, None)[0])


def resolve(model_id: str, *, revision: str | None = None) -> Source:
    """Return the model at its present revision; downloads nothing.

    Raises:
        InputError: If there is no such folder or repository (``not_found``), or the folder has no
            ``config.json`` (``bad_input``).
        TransientError: If the Hub does not answer.
    """
    model_id, revision = _split_revision(model_id, revision)
    if not is_folder(model_id):
        return Source(model_id=model_id, revision=_commit(model_id, revision), folder=None)
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"The folder {str(folder)!r} does not exist. Give an existing folder, or a Hub id such as org/name.",
            kind=ErrorKind.NOT_FOUND,
        )
    if not (config_folder(folder) / "config.json").is_file():
        raise InputError(
            f"The folder {str(folder)!r} has no config.json, so it is no transformers model. "
            "Save the model with save_pretrained, or name the folder that holds the file."
        )
    return Source(model_id=model_id, revision=_content_hash(folder), folder=folder.absolute())


def _split_revision(model_id: str, revision: str | None) -> tuple[str, str | None]:
    """Split ``org/name@revision``; a folder keeps every character of its name."""
    name, separator, at = model_id.partition("@")
    if separator and not Path(model_id).is_dir() and _HUB_ID.match(name):
        return name, at
    return model_id, revision


def _model_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path
    yield from module_files(folder)


def _content_hash(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the folder's files, and of its modules' where it has such.

    Files are read once; their hashes are remembered by size, modification time and inode, so that an
    unchanged folder costs no reading of its weights.
    """
    digest = hashlib.sha256()
    try:
        for path in _model_files(folder):
            digest.update(f"{path.relative_to(folder).as_posix()}\0{_file_hash(path)}\n".encode())
    except PermissionError as error:
        raise InputError(f"The folder {str(folder)!r} cannot be read: {error}.") from error
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    from onnx_config.file_hash import sha256_of

    return sha256_of(path)


def _commit(model_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    with HubErrors(model_id, revision):
        # Of a thousand models that have not changed, this is all that is asked: the commit and nothing else.
        found = within_limits(lambda: HfApi().model_info(model_id, revision=revision, timeout=30, expand=["sha"]))
        sha = found.sha
    if sha is None:
        raise TransientError(f"The Hub named no commit for {model_id!r}. Try again.", kind=ErrorKind.NETWORK)
    return sha


def download(source: Source, *, code: bool = False) -> Path:
    """Return a folder with config, weights and preprocessor files of ``source``; a folder stays where it is.

    Files come through the Hub's own cache and are not fetched twice. Only safetensors are taken as weights, and Python
    files only where ``code`` is true.

    Raises:
        InputError: If the repository, revision or safetensors are not there.
        TransientError: If the Hub does not answer, or the disk is full.
    """
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    def fetch(allowed: list[str], ignored: list[str]) -> Path:
        with HubErrors(source.model_id, source.revision):
            found = snapshot_download(
                source.model_id, revision=source.revision, allow_patterns=allowed, ignore_patterns=ignored
            )
        return Path(found)

    patterns = [*_WEIGHTS, *_SIDE_FILES]
    folder = fetch([*patterns, *(_CODE if code else ())], ["*/*"])
    # What a module's folder holds in folders of its own are other formats of the same weights.
    if names := module_folders(folder):
        fetch([f"{name}/{pattern}" for name in names for pattern in patterns], [f"{name}/*/*" for name in names])
    return folder


def download_chosen(model_id: str, choose: Callable[[Collection[str]], Iterable[str]]) -> Path:
    """Return a folder with a repository's small files, and with those that ``choose`` picks from the names of all.

    All are of one commit. Where the Hub is not to be asked (``HF_HUB_OFFLINE``), it is what an earlier call left.

    Raises:
        InputError: If there is no such repository or revision, or it has no ``config.json``.
        TransientError: If the Hub does not answer, or the disk is full.
    """
    from huggingface_hub import constants, hf_hub_download

    name, revision = _split_revision(model_id, None)
    if constants.HF_HUB_OFFLINE:
        with HubErrors(name, revision):
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    commit = _commit(name, revision)
    names = list_files(name, revision=commit)
    small = [file for file in names if "/" not in file and any(fnmatch(file, kind) for kind in _SIDE_FILES)]
    chosen = list(dict.fromkeys((*small, *choose(names.keys()))))
    if "config.json" not in small:
        raise InputError(f"{model_id!r} on the Hub has no config.json, so it is no transformers model.")
    with HubErrors(name, commit):
        paths = {file: Path(hf_hub_download(name, file, revision=commit)) for file in chosen}
    return paths["config.json"].parent


def list_files(model_id: str, *, revision: str | None = None) -> dict[str, int]:
    """Return the files of a model and their bytes, by path relative to its folder; downloads nothing.

    Of a folder, those that belong to its model; of a repository, all.

    Raises:
        InputError: If there is no such repository, or the folder cannot be read.
        TransientError: If the Hub does not answer.
    """
    name, revision = _split_revision(model_id, revision)
    if is_folder(name):
        folder = Path(name).expanduser().absolute()
        try:
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in _model_files(folder)}
        except OSError as error:
            raise InputError(f"The folder {str(folder)!r} cannot be read: {error}.") from error
    from huggingface_hub import HfApi

    with HubErrors(name, revision):
        found = within_limits(
            lambda: HfApi().model_info(name, revision=revision, timeout=30, files_metadata=True).siblings
        )
    return {file.rfilename: file.size or 0 for file in found or ()}


def list_models(query: Mapping[str, Any], *, limit: int) -> list[str]:
    """Return the ids of the Hub's models that a query finds, at most ``limit``, in the order that it asks for.

    Args:
        query: Arguments of `huggingface_hub.HfApi.list_models`.

    Raises:
        InputError: If the Hub refuses the query.
        TransientError: If it does not answer.
    """
    from huggingface_hub import HfApi

    what = ", ".join(f"{name}={value}" for name, value in query.items())
    with HubErrors(what, None):
        return within_limits(lambda: [model.id for model in HfApi().list_models(**query, limit=limit)])


def upload(
    files: Mapping[str, Path], repository: str, *, message: str, private: bool = False, branch: str | None = None
) -> str:
    """Write files into a repository, as one commit; return the commit's address. Files that are there else stay.

    Args:
        files: Path in the repository -> file.
        repository: ``org/name``; made where there is none.
        message: Of the commit, one line.
        private: Whether a repository that is made here is.
        branch: Where to; made where it is not there; ``None``: ``main``.

    Raises:
        InputError: If the id is none, or the Hub refuses it (no ``HF_TOKEN``, or one without the right to write).
        TransientError: If the Hub does not answer; nothing was written then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    with HubErrors(repository, branch):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return str(done.commit_url)


def _fetch_modules(model_id: str, revision: str | None) -> Path | None:
    """Fetch the small files that sentence-transformers keeps of its modules; ``None`` where there are none."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        with HubErrors(model_id, revision):
            try:
                return Path(hf_hub_download(model_id, name, revision=revision))
            except LocalEntryNotFoundError:
                # Offline, what is not in the cache counts as not there; else nobody could be asked.
                if not constants.HF_HUB_OFFLINE:
                    raise
                return None
            except EntryNotFoundError:
                return None
            except HfHubHTTPError as error:
                # A mirror may leave out which of the things that it was asked for is not there.
                if error.response is None or error.response.status_code != 404 or type(error) is not HfHubHTTPError:
                    raise
                return None

    listed = fetch(MODULES_FILE)
    if listed is None:
        return None
    folder = listed.parent
    for name in ("", *module_folders(folder)):
        prefix = f"{name}/" if name else ""
        fetch(f"{prefix}config.json")
    for name in transformer_settings(folder):
        if fetch(name) is not None:
            break
    return folder


def fetch_config(model_id: str, *, revision: str | None = None, code: bool = False) -> Path:
    """Return a folder with the ``config.json`` of a model; of a repository only that and its modules' are fetched.

    Where ``code`` is true, the repository's Python files are fetched too.

    Raises:
        InputError: If there is no such folder or repository, or its code is wanted and it is not named by its commit.
        TransientError: If the Hub does not answer.
    """
    name, revision = _split_revision(model_id, revision)
    if not is_folder(name):
        from huggingface_hub import hf_hub_download, snapshot_download

        if code:
            refuse_unpinned_code(name, revision=revision)
            with HubErrors(name, revision):
                snapshot_download(name, revision=revision, allow_patterns=[*_CODE], ignore_patterns=["*/*"])
        modules = _fetch_modules(name, revision)
        if modules is not None and (config_folder(modules) / "config.json").is_file():
            return modules
        with HubErrors(name, revision):
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(
            f"The folder {str(folder)!r} does not exist. Give an existing folder, or a Hub id such as org/name.",
            kind=ErrorKind.NOT_FOUND,
        )
    return folder


def read_config(model_id: str, *, revision: str | None = None) -> PreTrainedConfig:
    """Return the config of a folder or a Hub id; of a repository only ``config.json`` is fetched.

    Raises:
        InputError: If there is no such model or its config cannot be read.
        ModelError: If transformers does not know its model type.
        TransientError: If the Hub does not answer.
    """
    folder = fetch_config(model_id, revision=revision)
    return config_from_dict(read_config_dict(folder), origin=f"The config of {model_id!r}")

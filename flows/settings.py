"""Where an installation keeps its things and what it may use: flags, environment, ``ferry.toml``, defaults.

A flag beats the environment, which beats the file. Nothing is written and no folder is made here.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from onnx_config.errors import InputError
from tasks.request import Workspace

__all__ = [
    "SETTINGS_FILE",
    "Settings",
    "load_settings",
    "machine_memory_bytes",
    "masked_url",
    "read_seconds",
    "why_not_writable",
]

SETTINGS_FILE = "ferry.toml"
"""Name of the settings file; read from the current folder where it is there."""

_PREFIX = "FERRY_"
_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60}
_SECONDS |= {"h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400}
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SECRET_IN_QUERY = re.compile(r"(?i)([?&;](?:[^=&;]*(?:password|passwd|pwd|secret|token|key))=)[^&;]*")


def machine_memory_bytes() -> int:
    """Return the machine's memory, or the control group's limit where that is lower."""
    total: int = psutil.virtual_memory().total
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # No such hierarchy here, or the word "max": no limit.
    return total


def _three_quarters_of_the_machine() -> ByteSize:
    return ByteSize(machine_memory_bytes() * 3 // 4)


def read_seconds(value: object) -> object:
    """Read ``3600``, ``"3600 s"``, ``"90min"`` or ``"1h"`` as seconds."""
    if isinstance(value, bool):
        raise ValueError("is not a duration; write seconds, or a number with s, min, h or d")
    if isinstance(value, int | float):
        return value
    found = _DURATION.fullmatch(str(value).strip())
    if found is None or found["unit"].lower() not in _SECONDS:
        raise ValueError(f"{str(value)!r} is not a duration; write seconds, or a number with s, min, h or d")
    return float(found["number"]) * _SECONDS[found["unit"].lower()]


def _read_share(value: object) -> object:
    """Read ``0.1`` or ``"10%"`` as a share."""
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no share; write one such as 0.1 or 10%") from error


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("must be between 0 and 1; write one such as 0.1 or 10%")
    return value


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError("must be more than zero")
    return value


def _positive_bytes(value: ByteSize) -> ByteSize:
    if value <= 0:
        raise ValueError("must be more than zero")
    return value


def _text(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("is empty" if not value.strip() else "has a NUL character")
    return value


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"has no home folder to stand for '~': {error}") from error


def _with_scheme(url: str) -> str:
    # The value may hold a password, so the message must not repeat it.
    if not re.match(r"[A-Za-z][\w+.-]*://", url):
        raise ValueError("is not a URL of the form scheme://...; for one file write sqlite:////absolute/path.db")
    return url


class _SettingsFile(PydanticBaseSettingsSource):
    """Reads ``ferry.toml``; its keys are the settings' names, with or without the prefix."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path) -> None:
        super().__init__(settings_cls)
        self._path = path

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all values are read at once")

    def __call__(self) -> dict[str, Any]:
        return _read_settings_file(self._path, tuple(self.settings_cls.model_fields))


class Settings(BaseSettings):
    """The settings of one call; frozen. Read them with `load_settings`.

    An empty environment variable counts as absent.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    home: Annotated[Path, BeforeValidator(_text), AfterValidator(_absolute)] = Field(
        default=Path("ferry-data"), validate_default=True
    )
    """Folder of everything that the embedded defaults write: catalog, artifacts, caches. Absolute."""

    catalog_url: Annotated[str, BeforeValidator(_text), AfterValidator(_with_scheme)] = Field(
        default_factory=lambda data: f"sqlite:///{data['home'] / 'catalog.db'}"
    )
    """SQLAlchemy URL of the catalog; may hold a password, so show it through `masked_url`."""

    store_url: Annotated[str, BeforeValidator(_text)] = Field(
        default_factory=lambda data: f"file://{data['home'] / 'artifacts'}"
    )
    """Artifact store: ``file:///absolute/folder``, read as fsspec does, without ``%`` escapes; a plain path; or the URL
    of a place elsewhere that fsspec reaches, such as ``s3://bucket/prefix``."""

    store_cache: Annotated[ByteSize, AfterValidator(_positive_bytes)] = ByteSize(20 * 1024**3)
    """Bytes that this machine's copies of artifacts in a store elsewhere may take."""

    memory_limit: Annotated[ByteSize, AfterValidator(_positive_bytes)] = Field(
        default_factory=_three_quarters_of_the_machine
    )
    """Bytes that all conversions together may use; sizes such as ``12GiB`` and ``800MB`` are read."""

    timeout: Annotated[float, BeforeValidator(read_seconds), AfterValidator(_positive)] = 3600.0
    """Seconds that one step of one model may take; ``"90min"`` and ``"1h"`` are read."""

    failure_threshold: Annotated[float, BeforeValidator(_read_share), AfterValidator(_share)] = 0.1
    """Share of a batch's models that may fail, 0 to 1, before its event on the Prefect server says ``failing``, which
    notifications wait for; ``"10%"`` is read."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SettingsFile(settings_cls, Path(SETTINGS_FILE))

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        shown = {"catalog_url": masked_url(self.catalog_url), "store_url": masked_url(self.store_url)}
        return [(name, shown.get(name, getattr(self, name))) for name in type(self).model_fields]

    def workspace(self, threads: int = 1) -> Workspace:
        """Return where conversions keep their things; ``threads`` is what one conversion may use.

        Raises:
            InputError: If the store's URL cannot be understood, or holds a password.
        """
        return Workspace(
            home=self.home,
            catalog_url=self.catalog_url,
            store=_store_place(self.store_url),
            store_cache_bytes=int(self.store_cache),
            memory_limit_bytes=int(self.memory_limit),
            timeout_seconds=self.timeout,
            threads=threads,
        )


def load_settings(**flags: object) -> Settings:
    """Return the settings of this call; a flag that is ``None`` counts as absent.

    Raises:
        InputError: If a value cannot be read, or ``ferry.toml`` is not TOML or has an unknown key; the
            message names the place, the key and what to write.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [
            f"{_place_of(str(item['loc'][0]), given)}: {_reason(item)}"
            for item in error.errors(include_url=False, include_input=False)
            if item["type"] != "default_factory_not_called"
        ]
        raise InputError("; ".join(problems) + ".") from error


def masked_url(url: str) -> str:
    """Return ``url`` with its password, and what looks like a secret in its query, replaced by ``***``.

    >>> masked_url("postgresql://ferry:hunter2@db/ferry")
    'postgresql://ferry:***@db/ferry'
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        # Not a URL that SQLAlchemy reads: hide all that stands before the host.
        shown = re.sub(r"://.*@", "://***@", url)
    return _SECRET_IN_QUERY.sub(r"\1***", shown)


def why_not_writable(folder: Path) -> str | None:
    """Return why no file could be written into ``folder``, made first where it is absent; ``None``: it could.

    Nothing is made.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{str(nearest)!r} is not a folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"no permission to write in {str(nearest)!r}"
    return None


def _store_place(url: str) -> Path | str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _absolute(Path(url))
    if scheme.lower() != "file":
        # The catalog notes where artifacts are, and everybody may read that.
        if "@" in rest.partition("/")[0] or _SECRET_IN_QUERY.search(url):
            raise InputError(
                f"The store URL {masked_url(url)!r} names a user or a secret, which the catalog would keep. Give them "
                "in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the URL without."
            )
        if not rest.strip("/"):
            raise InputError(
                f"The store URL {masked_url(url)!r} names no bucket. Write one such as s3://bucket/prefix."
            )
        return f"{scheme.lower()}://{rest.rstrip('/')}"
    rest = rest.removeprefix("localhost")
    if not rest.startswith("/"):
        raise InputError(
            f"The store URL {masked_url(url)!r} names a host, not a folder. Write three slashes and an absolute "
            "path, such as file:///srv/ferry/artifacts, or the path alone."
        )
    return _absolute(Path(rest))


def _read_settings_file(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the file's values by setting; ``{}`` where there is no file.

    Raises:
        InputError: If the file cannot be read, or has an unknown key or one key twice.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Mend its permissions or remove it.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text. Save it as UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f'{path}: is not TOML: {error}. Write lines such as home = "./ferry-data".') from error
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        name = _bare(key)
        if name not in names:
            problems.append(f"{path}: unknown key {key!r}; {_nearest(key, names)}")
        elif name in values:
            problems.append(f"{path}: key {key!r} is given twice, with and without {_PREFIX}; remove one")
        else:
            values[name] = value
    if problems:
        raise InputError("; ".join(problems) + ".")
    return values


def _bare(key: str) -> str:
    """Return a key as the settings' field: ``FERRY_HOME`` and ``home`` are one."""
    return key.lower().removeprefix(_PREFIX.lower())


def _nearest(key: str, names: tuple[str, ...]) -> str:
    if close := get_close_matches(_bare(key), names, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    return f"the keys are {', '.join(names)}"


def _place_of(name: str, flags: Mapping[str, object]) -> str:
    """Return where a bad value of the setting ``name`` came from, in the order in which sources win."""
    if name in flags:
        return f"--{name.replace('_', '-')}"
    if any(variable.upper() == f"{_PREFIX}{name.upper()}" and os.environ[variable] for variable in os.environ):
        return f"environment variable {_PREFIX}{name.upper()}"
    return f"{SETTINGS_FILE}: key {name!r}"


def _reason(error: Any) -> str:
    """Return what is wrong in our words; pydantic's where we have none."""
    match error["type"]:
        case "byte_size" | "byte_size_unit":
            return "is not a size; write bytes, or a number with a unit such as 12GiB or 800MB"
        case "extra_forbidden":
            return f"unknown setting; {_nearest(str(error['loc'][0]), tuple(Settings.model_fields))}"
        case _:
            message: str = error["msg"]
            return message.removeprefix("Value error, ")

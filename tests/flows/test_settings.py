"""Settings: which source wins, what is read, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import settings as module
from flows.settings import Settings, load_settings, masked_url, why_not_writable
from onnx_config.errors import ErrorKind, InputError

NAMES = ("HOME", "CATALOG_URL", "STORE_URL", "MEMORY_LIMIT", "TIMEOUT")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and no settings in the environment."""
    for name in NAMES:
        monkeypatch.delenv(f"FERRY_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_lie_in_the_home_folder(folder: Path) -> None:
    settings = load_settings()
    assert settings.home == folder / "ferry-data"
    assert settings.catalog_url == f"sqlite:///{folder}/ferry-data/catalog.db"
    assert settings.store_url == f"file://{folder}/ferry-data/artifacts"
    assert settings.timeout == 3600
    assert not settings.home.exists()


def test_a_flag_beats_the_environment_which_beats_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ferry.toml").write_text('home = "file"\ntimeout = 1\nmemory_limit = "1GiB"\n')
    monkeypatch.setenv("FERRY_HOME", "environment")
    monkeypatch.setenv("FERRY_TIMEOUT", "2")
    settings = load_settings(home="flag", timeout=None)
    assert (settings.home.name, settings.timeout, settings.memory_limit) == ("flag", 2, 2**30)
    assert settings.catalog_url == f"sqlite:///{folder}/flag/catalog.db"


@pytest.mark.parametrize("key", ["home", "FERRY_HOME", "ferry_home"])
def test_keys_of_the_file_stand_with_or_without_prefix(folder: Path, key: str) -> None:
    (folder / "ferry.toml").write_text(f'{key} = "elsewhere"\n')
    assert load_settings().home == folder / "elsewhere"


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_TIMEOUT", "")
    assert load_settings().timeout == 3600


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600), ("3600 s", 3600), ("1h", 3600), ("90min", 5400), ("1.5 H", 5400), ("0.5", 0.5), ("2d", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert load_settings(timeout=text).timeout == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("800MB", 800_000_000), ("1024", 1024), ("1.5 gib", 3 * 2**29)]
)
def test_sizes(text: str, size: int) -> None:
    assert load_settings(memory_limit=text).workspace().memory_limit_bytes == size


@pytest.mark.parametrize(
    ("cgroup", "limit"),
    [
        pytest.param("400", 300, id="a-lower-limit-of-the-control-group-counts"),
        pytest.param("9999999999999999", 750, id="a-higher-one-does-not"),
        pytest.param("max", 750, id="no-limit"),
        pytest.param(None, 750, id="no-control-group"),
    ],
)
def test_memory_is_three_quarters_of_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str | None, limit: int
) -> None:
    class Memory:
        total = 1000

    monkeypatch.setattr(module.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(module, "_CGROUP_LIMITS", (str(folder / "memory.max"),))
    if cgroup is not None:
        (folder / "memory.max").write_text(f"{cgroup}\n")
    assert load_settings().memory_limit == limit


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param({"timeout": "soon"}, "--timeout: 'soon' is not a duration", id="no-duration"),
        pytest.param({"failure_threshold": "often"}, "--failure-threshold: 'often' is no share", id="no-share"),
        pytest.param({"failure_threshold": "ten %"}, "is no share; write one such as 0.1 or 10%", id="no-percent"),
        pytest.param({"failure_threshold": "110%"}, "--failure-threshold: must be between 0 and 1", id="more-than-all"),
        pytest.param({"timeout": "0"}, "--timeout: must be more than zero", id="zero-seconds"),
        pytest.param({"timeout": "3 parsecs"}, "'3 parsecs' is not a duration", id="no-unit-of-time"),
        pytest.param({"memory_limit": "much"}, "--memory-limit: is not a size; .* 12GiB", id="no-size"),
        pytest.param({"memory_limit": "0"}, "--memory-limit: must be more than zero", id="zero-bytes"),
        pytest.param({"catalog_url": "catalog.db"}, "--catalog-url: is not a URL", id="no-url"),
        pytest.param({"home": " "}, "--home: is empty", id="empty-home"),
        pytest.param({"home": "a\0b"}, "--home: has a NUL", id="nul"),
        pytest.param({"timeout": "x", "memory_limit": "y"}, "--memory-limit: .*; --timeout: ", id="both-are-told"),
        pytest.param({"tiemout": "3"}, "did you mean 'timeout'", id="unknown-flag"),
    ],
)
def test_a_bad_flag_is_named(flags: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_settings(**flags)
    assert caught.value.kind is ErrorKind.BAD_INPUT


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERRY_TIMEOUT", "soon")
    with pytest.raises(InputError, match="environment variable FERRY_TIMEOUT: 'soon' is not a duration"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("tiemout = 3", "ferry.toml: unknown key 'tiemout'; did you mean 'timeout'", id="near-miss"),
        pytest.param("xyzzy = 3", "unknown key 'xyzzy'; the keys are home, catalog_url", id="far-miss"),
        pytest.param("[ferry]\nhome = 'x'", "unknown key 'ferry'", id="table"),
        pytest.param("home = 'a'\nFERRY_HOME = 'b'", "'FERRY_HOME' is given twice", id="twice"),
        pytest.param("timeout = 'soon'", "ferry.toml: key 'timeout': 'soon' is not a duration", id="bad-value"),
        pytest.param("timeout = true", "ferry.toml: key 'timeout': is not a duration", id="bool"),
        pytest.param("home = 3", "ferry.toml: key 'home': ", id="bad-type"),
        pytest.param("a = 1\nhome = \n", "ferry.toml: is not TOML: .*line 2", id="not-toml"),
        pytest.param(b"\xff\xfe", "ferry.toml: is not UTF-8", id="not-text"),
    ],
)
def test_a_bad_file_is_told(folder: Path, content: str | bytes, words: str) -> None:
    (folder / "ferry.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        load_settings()


def test_a_folder_named_as_the_file_is_told(folder: Path) -> None:
    (folder / "ferry.toml").mkdir()
    with pytest.raises(InputError, match=r"ferry.toml: cannot be read"):
        load_settings()


@pytest.mark.parametrize(
    ("url", "store"),
    [
        pytest.param("file:///srv/a b/100%25", "/srv/a b/100%25", id="read-as-fsspec-does"),
        pytest.param("file://localhost/srv", "/srv", id="localhost"),
        pytest.param("/srv/x", "/srv/x", id="a-path"),
    ],
)
def test_the_store_is_a_folder(url: str, store: str) -> None:
    assert load_settings(store_url=url).workspace(threads=3).store == Path(store)
    assert load_settings(store_url=url).workspace(threads=3).threads == 3


def test_a_store_elsewhere_is_a_url() -> None:
    workspace = load_settings(store_url="S3://bucket/prefix/", store_cache="3GiB").workspace()
    assert (workspace.store, workspace.store_cache_bytes) == ("s3://bucket/prefix", 3 * 1024**3)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        pytest.param("s3://key:hunter2@bucket/x", "names a user or a secret", id="secret"),
        pytest.param("s3://", "names no bucket", id="no-bucket"),
        pytest.param("file://srv/x", "three slashes", id="host"),
    ],
)
def test_other_stores_are_refused(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_settings(store_url=url).workspace()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ferry:hunter2@db/ferry",
        "postgresql+psycopg://db/ferry?password=hunter2&x=1",
        "s3://key:hunter2@bucket/x",
        "not a url://a:hunter2@b",
    ],
)
def test_secrets_are_never_shown(url: str) -> None:
    settings = Settings(catalog_url=f"sqlite://x:hunter2@{url}", store_url=url)
    for shown in (masked_url(url), repr(settings), str(settings)):
        assert "hunter2" not in shown
        assert "***" in shown


def test_a_rejected_url_is_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        load_settings(catalog_url="ferry:hunter2@db")
    assert "hunter2" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().timeout = 3


def test_a_folder_that_could_be_made_is_writable(folder: Path) -> None:
    assert why_not_writable(folder / "a" / "b") is None
    assert not (folder / "a").exists()
    (folder / "file").touch()
    assert "is not a folder" in str(why_not_writable(folder / "file" / "b"))

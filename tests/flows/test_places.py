"""What the catalog knows of a model by its id, for the loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from db import ConversionRecord
from flows.places import find_in_catalog
from onnx_config.errors import ErrorKind, InputError, TransientError
from tests.flows.test_catalog_commands import catalog, converted, failed

__all__ = ["catalog"]

Fill = Callable[..., None]


def kept(number: int, folder: Path, *, quarantined: bool = False, **changes: Any) -> ConversionRecord:
    """Return a conversion of ``org/model`` whose artifact lies in ``folder``."""
    (folder / str(number)).mkdir()
    (folder / str(number) / "ferry.json").write_text("{}")
    record = converted(number, **{"model_id": "org/model", "revision": f"{number:040x}", **changes})
    assert record.artifact is not None
    artifact = replace(record.artifact, path=str(folder / str(number)), quarantined=quarantined)
    return replace(record, artifact=artifact)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("org/model", "2", id="the-newest-verified"),
        pytest.param("org/model@v1", "1", id="at-a-branch"),
        pytest.param(f"org/model@{2:040x}", "2", id="at-a-commit"),
        pytest.param(f"org/model@{3:040x}", "3", id="in-quarantine-where-there-is-no-other"),
        pytest.param(f"ab{1:062x}", "1", id="by-its-hash"),
        pytest.param("org/other", None, id="unknown"),
        pytest.param("org/model@v9", None, id="at-no-revision"),
    ],
)
def test_an_id_means_its_newest_verified_artifact(catalog: Fill, tmp_path: Path, name: str, found: str | None) -> None:
    catalog(
        kept(1, tmp_path, requested_revision="v1"),
        kept(2, tmp_path),
        kept(3, tmp_path, quarantined=True, status="mismatch"),
        failed(4, model_id="org/model"),
    )
    assert find_in_catalog(name) == (None if found is None else tmp_path / found)


def test_what_was_cleared_away_is_passed_over(catalog: Fill, tmp_path: Path) -> None:
    catalog(kept(1, tmp_path), kept(2, tmp_path))
    (tmp_path / "2" / "ferry.json").unlink()
    assert find_in_catalog("org/model") == tmp_path / "1"
    (tmp_path / "1" / "ferry.json").unlink()
    assert find_in_catalog("org/model") is None


def test_where_there_is_no_catalog_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERRY_HOME", str(tmp_path / "home"))
    assert find_in_catalog("org/model") is None
    assert not (tmp_path / "home").exists()


def test_a_catalog_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalog.db").write_text("no database, but a page of text that is long enough to be looked at " * 40)
    monkeypatch.setenv("FERRY_CATALOG_URL", f"sqlite:///{tmp_path}/catalog.db")
    with pytest.raises(TransientError) as caught:
        find_in_catalog("org/model")
    assert caught.value.kind is ErrorKind.CATALOG
    monkeypatch.setenv("FERRY_CATALOG_URL", "no url")
    with pytest.raises(InputError, match="FERRY_CATALOG_URL"):
        find_in_catalog("org/model")

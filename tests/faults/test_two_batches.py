"""Two batches at once over the same models and the same home: each model is converted once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.faults.harness import (
    artifact_folders,
    assert_nothing_half_done,
    catalog_rows,
    killed_at_the_end,
    read_report,
    start,
    tiny,
    write_manifest,
)


def test_two_batches_at_once_convert_each_model_once(tmp_path: Path) -> None:
    tiny(tmp_path / "one")
    tiny(tmp_path / "two", seed=1)
    # Of the same content as the first, under another name: the same work within one batch, too.
    tiny(tmp_path / "twin" / "one")
    write_manifest(tmp_path / "models.json", ["./one", "./two", "./twin/one"])
    home = tmp_path / "home"
    names = ("first", "second")
    words = ["batch", "models.json", "--engine", "local", "--workers", "2"]
    first, second = (
        start(*words, "--output", name, "--report", f"{name}.json", home=home, cwd=tmp_path) for name in names
    )
    with killed_at_the_end(first), killed_at_the_end(second):
        for process in (first, second):
            _, err = process.communicate(timeout=280)
            assert (process.returncode, err) == (0, "")
    found: Counter[str] = Counter()
    for name in names:
        models = read_report(tmp_path / f"{name}.json")
        assert models.keys() == {"one", "two", "twin/one"}
        found.update(entry["status"] for entry in models.values())
        assert models["one"]["revision"] == models["twin/one"]["revision"] != models["two"]["revision"]
    assert found == {"converted": 2, "reused": 4}
    rows = catalog_rows(home)
    assert [row.status for row in rows] == ["converted"] * 2
    assert len({row.key for row in rows}) == 2
    assert len(artifact_folders(home / "artifacts")) == 2
    assert_nothing_half_done(home, *(tmp_path / name for name in names))
    for name in names:
        assert {path.name for path in (tmp_path / name).iterdir()} == {"one", "two", "one-2"}

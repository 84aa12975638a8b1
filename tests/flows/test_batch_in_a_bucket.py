"""The main job with all that a site has: two machines at once, a catalog on a server, artifacts in a bucket."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from onnx_config import AutoModelForONNX
from tests.bucket import artifacts_in, assert_bucket_whole
from tests.faults.harness import assert_whole, ferry, killed_at_the_end, read_report, start, tiny, write_manifest
from tests.s3_server import S3Server

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is built on Linux's process control")


@pytest.mark.slow
def test_two_machines_convert_a_list_once_into_a_bucket(
    tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("one", "two", "three")
    for seed, name in enumerate(names):
        tiny(tmp_path / name, seed=seed)
    write_manifest(tmp_path / "models.json", [f"./{name}" for name in names])
    with S3Server() as server:
        server.make_bucket("ferry")
        variables = server.variables(FERRY_CATALOG_URL=postgres.create(), FERRY_STORE_URL="s3://ferry/onnx")
        homes = [tmp_path / "machines" / name for name in ("first", "second")]
        words = ["batch", "models.json", "--engine", "local", "--workers", "1"]
        first, second = (
            start(*words, "--report", f"{home.name}.json", home=home, cwd=tmp_path, variables=variables)
            for home in homes
        )
        with killed_at_the_end(first), killed_at_the_end(second):
            for process in (first, second):
                _, err = process.communicate(timeout=280)
                assert (process.returncode, err) == (0, "")
        reports = [read_report(tmp_path / f"{home.name}.json") for home in homes]
        found = Counter(model["status"] for report in reports for model in report.values())
        assert found == {"converted": 3, "reused": 3}
        places = [{name: model["artifact"] for name, model in report.items()} for report in reports]
        assert places[0] == places[1]
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        assert artifacts_in("s3://ferry/onnx") == set(places[0].values())
        assert_bucket_whole("s3://ferry/onnx")

        # A third machine, which has converted nothing, places, loads and compares what is there.
        third = tmp_path / "machines" / "third"
        again = ferry(
            *words, "--output", "out", "--report", "third.json", home=third, cwd=tmp_path, variables=variables
        )
        assert (again.returncode, again.stderr) == (0, "")
        assert {model["status"] for model in read_report(tmp_path / "third.json").values()} == {"reused"}
        for name in names:
            assert_whole(tmp_path / "out" / name)
        verified = ferry("verify", "all", "--json", home=third, cwd=tmp_path, variables=variables)
        assert verified.returncode == 0, verified.stderr
        assert len(json.loads(verified.stdout)["models"]) == 3
        monkeypatch.setenv("FERRY_HOME", str(tmp_path / "machines" / "fourth"))
        model = AutoModelForONNX.from_pretrained(str(tmp_path / "one"))
        assert model.folder.name == Path(places[0]["one"]).name

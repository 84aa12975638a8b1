"""The artifact store in a bucket: whole or not there, whatever is cut, killed, damaged or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from onnx_config.errors import ErrorKind, InputError, TransientError
from onnx_config.export.artifact import FERRY_FILE
from tasks import remote_store, retry
from tasks.artifact_cache import ArtifactCache
from tasks.collect import collect
from tasks.remote_store import RemoteStore
from tasks.store import is_remote, store_of
from tests.faults.harness import ROOT, assert_whole, hashes, workspace
from tests.s3_server import KEY, SECRET, S3Server
from tests.tasks.store_loop import FILES, artifact

BUCKET = "models"
FILE_COUNT = len(FILES) + 1


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as started:
        started.make_bucket(BUCKET)
        yield started


@pytest.fixture(autouse=True)
def surroundings(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.before = lambda _method, _path: "pass"
    server.asked.clear()
    for name, value in server.variables(AWS_EC2_METADATA_DISABLED="true").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "RETRY_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(retry, "FIRST_PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 1.5)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{abs(hash(request.node.name)):x}/artifacts"


@pytest.fixture(scope="module")
def opened(server: S3Server) -> RemoteStore:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables().items():
            patch.setenv(name, value)
        return RemoteStore(f"s3://{BUCKET}/first", ArtifactCache(Path("/nowhere"), limit_bytes=1))


@pytest.fixture
def store(opened: RemoteStore, url: str, tmp_path: Path) -> RemoteStore:
    # Reading what the library knows of all of AWS takes a second, each time that a store is opened.
    changed = copy(opened)
    changed.url, changed._root = url, url.removeprefix("s3://")
    changed.cache = ArtifactCache(tmp_path / "cache", limit_bytes=1 << 30)
    return changed


def forget_copies(store: RemoteStore) -> None:
    shutil.rmtree(store.cache.root, ignore_errors=True)


def published(store: RemoteStore, folder: Path, content: str = "", **files: str) -> str:
    return store.publish(folder, artifact(folder, content, **files))


def put(server: S3Server, place: str, name: str, content: bytes) -> None:
    assert server.call("PUT", f"/{place.removeprefix('s3://')}/{name}", content) == 200


def delete(server: S3Server, place: str, name: str) -> None:
    assert server.call("DELETE", f"/{place.removeprefix('s3://')}/{name}") == 204


# Writing


def test_an_artifact_lies_under_its_content_with_ferry_json_last(store, server, tmp_path):
    written: list[str] = []
    server.before = lambda method, path: written.append(path) or "pass" if method == "PUT" else "pass"
    address = artifact(tmp_path / "new")
    before = hashes(tmp_path / "new")
    place = store.publish(tmp_path / "new", address)
    assert place == store.path_of(address) == f"{store.url}/{address[:2]}/{address}"
    assert written[-1].endswith(f"{address}/{FERRY_FILE}")
    assert len(written) == FILE_COUNT
    assert not (tmp_path / "new").exists()
    forget_copies(store)
    assert hashes(store.folder(place)) == before
    assert_whole(store.folder(place))
    assert store.path_of(address, quarantined=True) == f"{store.url}/quarantine/{address}"


def test_what_is_said_of_an_artifact_can_be_amended_where_it_lies(store, tmp_path):
    place = published(store, tmp_path / "new")
    record = json.loads((store.folder(place) / FERRY_FILE).read_text())
    store.amend(place, {**record, "note": "another"})
    assert json.loads((store.folder(place) / FERRY_FILE).read_text())["note"] == "another"
    assert_whole(store.folder(place))


def test_what_was_just_written_is_not_fetched(store, server, tmp_path):
    place = published(store, tmp_path / "new")
    server.asked.clear()
    assert_whole(store.folder(place))
    assert store.has(place)
    assert not server.asked


def test_the_same_content_again_is_not_uploaded_again(store, server, tmp_path):
    place = published(store, tmp_path / "new")
    server.asked.clear()
    assert published(store, tmp_path / "again") == place
    assert server.asked["PUT"] == 0
    assert not (tmp_path / "again").exists()


def test_a_large_file_goes_up_in_parts(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_store, "_PIECE_BYTES", 5 * 1024**2)
    place = published(store, tmp_path / "new", weights="w" * (11 * 1024**2))
    assert server.asked["PUT part"] == 3
    forget_copies(store)
    assert (store.folder(place) / "weights").stat().st_size == 11 * 1024**2


@pytest.mark.parametrize("how", ["cut", "half", "refuse"])
def test_an_upload_that_is_cut_leaves_nothing_to_see_and_is_completed_by_the_next(store, server, tmp_path, how):
    address = artifact(tmp_path / "new")
    before = hashes(tmp_path / "new")
    server.before = lambda method, path: how if method == "PUT" and "model.onnx" in path else "pass"
    with pytest.raises(TransientError, match=r"does not answer as it should: .* Nothing was registered\.") as caught:
        store.publish(tmp_path / "new", address)
    assert caught.value.kind is ErrorKind.STORE
    place = store.path_of(address)
    assert not store.has(place)
    assert not store.is_whole(place, [])
    assert hashes(tmp_path / "new") == before
    server.before = lambda _method, _path: "pass"
    server.asked.clear()
    assert store.publish(tmp_path / "new", address) == place
    # What was there whole by then is left alone: the two small files come before the graph.
    assert server.asked["PUT"] == FILE_COUNT - 2
    assert store.is_whole(place, [("model.onnx", 5)])


def test_a_store_that_refuses_for_a_while_is_waited_for(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 20.0)
    store.check()
    back = time.monotonic() + 2
    server.before = lambda _method, _path: "pass" if time.monotonic() > back else "refuse"
    place = published(store, tmp_path / "new")
    assert time.monotonic() > back
    assert store.is_whole(place, [(name, len(text)) for name, text in FILES.items()])


def test_a_store_that_is_slow_is_waited_for(store, server, tmp_path):
    def slow(_method: str, _path: str) -> str:
        time.sleep(0.15)
        return "pass"

    server.before = slow
    started = time.monotonic()
    place = published(store, tmp_path / "new")
    forget_copies(store)
    assert_whole(store.folder(place))
    assert time.monotonic() - started > 1


def test_a_server_killed_in_the_middle_of_an_upload_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 30.0)
    monkeypatch.setattr(remote_store, "_PIECE_BYTES", 5 * 1024**2)
    with S3Server() as own:
        own.make_bucket(BUCKET)
        for name, value in own.variables().items():
            monkeypatch.setenv(name, value)
        store = RemoteStore(f"s3://{BUCKET}/killed", ArtifactCache(tmp_path / "cache", limit_bytes=1 << 30))
        store.check()
        killed, back = threading.Event(), threading.Event()

        def kill_once(_method: str, path: str) -> str:
            if "partNumber=2" in path and not killed.is_set():
                killed.set()
                own.kill()
                threading.Thread(target=restart).start()
            return "refuse" if killed.is_set() and not back.is_set() else "pass"

        def restart() -> None:
            own.start()
            own.make_bucket(BUCKET)
            back.set()

        own.before = kill_once
        # The first by its name, since this server forgets with its death what it had.
        place = published(store, tmp_path / "new", **{"a.weights": "w" * (11 * 1024**2)})
        assert killed.is_set()
        forget_copies(store)
        assert_whole(store.folder(place))


def test_a_worker_killed_in_the_middle_of_an_upload_is_followed_by_another(store, server, tmp_path):
    address = artifact(tmp_path / "new")
    place = store.path_of(address)
    reached = threading.Event()

    def hold(method: str, path: str) -> str:
        if method == "PUT" and "model.onnx" in path:
            reached.set()
            time.sleep(1)
            return "cut"
        return "pass"

    server.before = hold
    code = (
        "import sys; from pathlib import Path; from tasks.remote_store import RemoteStore\n"
        "from tasks.artifact_cache import ArtifactCache\n"
        "store = RemoteStore(sys.argv[1], ArtifactCache(Path(sys.argv[2]), limit_bytes=1 << 30))\n"
        "store.publish(Path(sys.argv[3]), sys.argv[4])\n"
    )
    words = [store.url, str(tmp_path / "theirs"), str(tmp_path / "new"), address]
    with subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, env=dict(os.environ)) as worker:
        assert reached.wait(60)
        worker.send_signal(signal.SIGKILL)
    server.before = lambda _method, _path: "pass"
    assert not store.has(place)
    server.asked.clear()
    assert store.publish(tmp_path / "new", address) == place
    assert server.asked["PUT"] == FILE_COUNT - 2
    forget_copies(store)
    assert_whole(store.folder(place))


# What is wrong in the store


def spoil(server: S3Server, place: str) -> None:
    put(server, place, "model.onnx", b"GRAPH")


def test_publishing_again_heals_a_damaged_artifact(store, server, tmp_path):
    place = published(store, tmp_path / "new")
    spoil(server, place)
    server.asked.clear()
    assert published(store, tmp_path / "again") == place
    assert server.asked["PUT"] == 1
    forget_copies(store)
    assert_whole(store.folder(place))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(spoil, "model.onnx is not what was stored", id="same-size-other-bytes"),
        pytest.param(lambda server, place: delete(server, place, "model.onnx"), "model.onnx is missing", id="gone"),
        pytest.param(
            lambda server, place: put(server, place, FERRY_FILE, b"{"), "ferry.json cannot be read", id="no-json"
        ),
        pytest.param(
            lambda server, place: put(server, place, FERRY_FILE, json.dumps({"files": {"../../x": {}}}).encode()),
            "lists a file outside the artifact",
            id="a-way-out",
        ),
        pytest.param(
            lambda server, place: put(server, place, FERRY_FILE, b'{"files": {}}'), "not what was stored", id="emptied"
        ),
    ],
)
def test_a_damaged_artifact_is_never_given_out_and_withdrawn(store, server, tmp_path, damage, words):
    place = published(store, tmp_path / "new")
    forget_copies(store)
    damage(server, place)
    with pytest.raises(TransientError, match=rf"is damaged: .*{words}.* withdrawn from the store\. Convert") as caught:
        store.folder(place)
    assert caught.value.kind is ErrorKind.STORE
    assert not store.has(place)
    assert not store.is_whole(place, [])
    with pytest.raises(TransientError, match=r"is not in the store any more\. Convert"):
        store.folder(place)
    assert list(store.cache.copies()) == []


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        pytest.param([("model.onnx", 5), ("1_Pooling/config.json", 2)], True, id="all-there"),
        pytest.param([("model.onnx", 4)], False, id="other-size"),
        pytest.param([("model.onnx", 5), ("vocab.txt", 1)], False, id="one-missing"),
    ],
)
def test_whole_means_every_file_at_its_size_in_one_call(store, server, tmp_path, files, whole):
    place = published(store, tmp_path / "new")
    server.asked.clear()
    assert store.is_whole(place, files) is whole
    assert sum(server.asked.values()) <= 2
    assert not store.is_whole(store.path_of("ab" * 32), [])


# A store that cannot be used


def test_a_bucket_that_is_not_there_is_bad_input_at_once(tmp_path):
    store = RemoteStore("s3://no-such-bucket/x", ArtifactCache(tmp_path / "cache", limit_bytes=1))
    started = time.monotonic()
    address = artifact(tmp_path / "new")
    for call in (store.check, lambda: store.publish(tmp_path / "new", address)):
        with pytest.raises(InputError, match=r"'s3://no-such-bucket/x' cannot be used: .*Check FERRY_STORE_URL"):
            call()
    assert time.monotonic() - started < 5
    assert_whole(tmp_path / "new")


def test_an_empty_prefix_is_no_trouble(store, url):
    store.check()
    RemoteStore(url.partition("/artifacts")[0], store.cache).check()
    RemoteStore(f"s3://{BUCKET}", store.cache).check()


def test_wrong_credentials_are_bad_input_and_never_shown(tmp_path, monkeypatch):
    with S3Server(checks_keys=True) as strict:
        strict.call("PUT", f"/{BUCKET}")
        for name, value in strict.variables(AWS_EC2_METADATA_DISABLED="true").items():
            monkeypatch.setenv(name, value)
        store = RemoteStore(f"s3://{BUCKET}/strict", ArtifactCache(tmp_path / "cache", limit_bytes=1))
        address = artifact(tmp_path / "new")
        for call in (store.check, lambda: store.publish(tmp_path / "new", address)):
            with pytest.raises(InputError, match=r"cannot be used: PermissionError.*credentials in the env") as caught:
                call()
            assert KEY not in str(caught.value)
            assert SECRET not in str(caught.value)


def test_no_credentials_are_bad_input(url, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"NoCredentialsError.* Check FERRY_STORE_URL"):
        RemoteStore(url, ArtifactCache(tmp_path / "cache", limit_bytes=1)).check()


def test_a_store_that_is_down_is_a_passing_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = RemoteStore(f"s3://{BUCKET}/down", ArtifactCache(tmp_path / "cache", limit_bytes=1))
    with pytest.raises(TransientError, match="does not answer as it should: EndpointConnectionError") as caught:
        store.check()
    assert caught.value.kind is ErrorKind.STORE


def test_a_kind_of_store_that_nothing_reaches(tmp_path):
    with pytest.raises(InputError, match=r"'odd://x/y' cannot be used: .* needs a package of its own"):
        RemoteStore("odd://x/y", ArtifactCache(tmp_path, limit_bytes=1))


def test_any_file_system_of_fsspec_serves(tmp_path):
    store = RemoteStore("memory://ferry/artifacts", ArtifactCache(tmp_path / "cache", limit_bytes=1 << 30))
    store.check()
    place = published(store, tmp_path / "new")
    forget_copies(store)
    assert_whole(store.folder(place))
    assert store.is_whole(place, [("model.onnx", 5)])


# Which store


def test_the_place_of_an_artifact_says_which_store_has_it(tmp_path, url):
    local = workspace(tmp_path / "home")
    remote = workspace(tmp_path / "home", store=url)
    assert store_of(local).path_of("ab" * 32) == str(tmp_path / "home" / "artifacts" / "ab" / ("ab" * 32))
    place = store_of(remote).path_of("ab" * 32)
    assert is_remote(place)
    # An artifact stays where it was made when the setting changes.
    assert store_of(local, place).path_of("ab" * 32) == place
    assert store_of(remote, "/srv/artifacts/ab/abcd").folder("/srv/artifacts/ab/abcd") == Path("/srv/artifacts/ab/abcd")
    assert store_of(remote) is store_of(remote)


# Clearing up


def test_gc_removes_uploads_and_copies_that_nobody_needs(store, server, tmp_path, url):
    places: Any = workspace(tmp_path / "home", store=url)
    kept = published(store_of(places), tmp_path / "new")
    begun = store.path_of("cd" * 32)
    put(server, begun, "model.onnx", b"cut")
    assert [item.what for item in collect(places, unused_days=1)] == []
    found = collect(places, unused_days=-1, dry_run=True)
    assert [(item.what, item.size_bytes) for item in found if item.what == "upload"] == [("upload", 3)]
    removed = collect(places, unused_days=-1)
    assert sorted(item.what for item in removed) == ["copy", "upload"]
    assert {str(item.path) for item in removed} == {begun, str(places.home / "store-cache" / kept.rpartition("/")[2])}
    assert [place for place, _ in store.unfinished(before=datetime.now(UTC) + timedelta(days=1))] == []
    assert store.has(kept)
    assert collect(places, unused_days=-1) == []

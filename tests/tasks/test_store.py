"""The artifact store and output folders: whole or not there, whatever is killed, full or in the way."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnx_config.errors import ErrorKind, FerryError, InputError, TransientError
from onnx_config.export.artifact import FERRY_FILE
from tasks.disk import disk_errors
from tasks.local_store import LocalStore
from tasks.place import place, safe_name
from tests.faults.harness import LEFTOVERS, ROOT, artifact_folders, assert_whole, hashes, tmpfs, wait_until
from tests.tasks.store_loop import FILES, artifact


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "artifacts")


def published(store: LocalStore, folder: Path, content: str = "", **files: str) -> Path:
    return Path(store.publish(folder, artifact(folder, content, **files)))


def assert_clean(root: Path) -> None:
    assert [path for path in root.rglob("*") if path.name.endswith(LEFTOVERS)] == []


# The store


def test_an_artifact_lies_under_its_content(store, tmp_path):
    address = artifact(tmp_path / "new")
    place_ = store.publish(tmp_path / "new", address)
    assert place_ == store.path_of(address) == str(store.root / address[:2] / address)
    assert_whole(store.folder(place_))
    assert not (tmp_path / "new").exists()


def test_a_mismatch_lies_in_quarantine(store, tmp_path):
    address = artifact(tmp_path / "new")
    assert store.publish(tmp_path / "new", address, quarantined=True) == str(store.root / "quarantine" / address)
    assert not store.has(store.path_of(address))


def test_what_is_said_of_an_artifact_can_be_amended_where_it_lies(store, tmp_path):
    place_ = str(published(store, tmp_path / "new"))
    record = json.loads((Path(place_) / FERRY_FILE).read_text())
    store.amend(place_, {**record, "note": "another"})
    assert json.loads((store.folder(place_) / FERRY_FILE).read_text())["note"] == "another"
    assert_whole(store.folder(place_))
    assert_clean(tmp_path)


def test_the_same_content_again_leaves_a_whole_artifact_in_its_place(store, tmp_path):
    there = published(store, tmp_path / "new")
    before = (there / "model.onnx").stat().st_ino
    assert published(store, tmp_path / "again") == there
    assert (there / "model.onnx").stat().st_ino == before
    assert_whole(there)
    assert not (tmp_path / "again").exists()
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "model.onnx").unlink(), id="file-gone"),
        pytest.param(lambda folder: (folder / "model.onnx").write_text("gr"), id="file-truncated"),
        pytest.param(lambda folder: (folder / "model.onnx").write_text("GRAPH"), id="same-size-other-bytes"),
        pytest.param(lambda folder: (folder / FERRY_FILE).unlink(), id="ferry-json-gone"),
        pytest.param(lambda folder: [path.unlink() for path in folder.rglob("*.*")], id="empty"),
    ],
)
def test_the_same_content_again_heals_a_damaged_artifact(store, tmp_path, damage):
    there = published(store, tmp_path / "new")
    damage(there)
    assert published(store, tmp_path / "again") == there
    assert_whole(there)
    assert (there / "model.onnx").read_text() == "graph"
    assert_clean(tmp_path)


def test_healing_replaces_a_file_and_never_writes_into_it(store, tmp_path):
    """Whoever reads the old one meanwhile, or has it as a link in an output folder, sees no half of the new."""
    there = published(store, tmp_path / "new")
    (there / "model.onnx").write_text("GRAPH")
    (tmp_path / "link").hardlink_to(there / "model.onnx")
    published(store, tmp_path / "again")
    assert (tmp_path / "link").read_text() == "GRAPH"
    assert (there / "model.onnx").read_text() == "graph"


def test_the_temporary_folder_may_be_on_another_disk(store, tmp_path):
    with tmpfs(tmp_path / "elsewhere", "1m") as elsewhere:
        there = published(store, elsewhere / "new")
        assert not (elsewhere / "new").exists()
        assert_whole(there)
        (there / "model.onnx").unlink()
        assert published(store, elsewhere / "again") == there
    assert_whole(there)
    assert list((store.root / "tmp").iterdir()) == []
    assert_clean(tmp_path)


def test_a_full_disk_leaves_the_store_and_the_new_folder_as_they_were(tmp_path):
    with tmpfs(tmp_path / "small", "300k") as small:
        store = LocalStore(small / "artifacts")
        first = published(store, tmp_path / "fits", content="x" * 10_000)
        address = artifact(tmp_path / "large", content="y" * 200_000)
        before = hashes(tmp_path / "large")
        with pytest.raises(TransientError, match=r"The disk is full while writing to the artifact store .* Free some"):
            store.publish(tmp_path / "large", address)
        assert artifact_folders(store.root) == {first}
        assert_whole(first)
        assert list((store.root / "tmp").iterdir()) == []
        assert hashes(tmp_path / "large") == before
        assert published(store, tmp_path / "small-too", content="z").is_dir()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_store_below_a_regular_file_is_bad_input(tmp_path, below):
    (tmp_path / "file").write_text("")
    store = LocalStore(tmp_path / "file" / below)
    with pytest.raises(InputError, match=r"The artifact store .* cannot be written: .* Choose another folder\."):
        published(store, tmp_path / "new")
    assert_whole(tmp_path / "new")


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        pytest.param([("model.onnx", 5)], True, id="all-there"),
        pytest.param([], True, id="nothing-asked"),
        pytest.param([("model.onnx", 4)], False, id="other-size"),
        pytest.param([("model.onnx", 5), ("vocab.txt", 1)], False, id="one-missing"),
        pytest.param([("model.onnx/x", 5)], False, id="file-for-a-folder"),
    ],
)
def test_whole_means_every_file_at_its_size(store, tmp_path, files, whole):
    there = published(store, tmp_path / "new")
    assert store.is_whole(str(there), files) is whole
    assert not store.is_whole(str(tmp_path / "absent"), files)
    (there / FERRY_FILE).unlink()
    assert not store.is_whole(str(there), files)


# Killed in the middle


def kill_in_the_middle(work: Path, what: str, *, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.store_loop", str(work), what],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_publisher_leaves_no_torn_artifact(tmp_path):
    for round_ in range(4):
        kill_in_the_middle(tmp_path, "different", seconds=0.2 + random.random() * 0.1)
        folders = artifact_folders(tmp_path / "artifacts")
        assert len(folders) > round_
        for folder in folders:
            assert_whole(folder)
    assert_clean(tmp_path / "artifacts")


def test_a_publisher_killed_over_a_damaged_artifact_has_harmed_no_other_file(tmp_path):
    address = artifact(tmp_path / "reference", "always")
    for _ in range(4):
        kill_in_the_middle(tmp_path, "same", seconds=0.2 + random.random() * 0.1)
        (folder,) = artifact_folders(tmp_path / "artifacts")
        found, wanted = hashes(folder), hashes(tmp_path / "reference")
        # Only the file that the loop itself takes away may be missing; none is ever another or half a file.
        assert found.items() <= wanted.items()
        assert wanted.keys() - found.keys() <= {"config.json"}
    store = LocalStore(tmp_path / "artifacts")
    assert_whole(Path(store.publish(tmp_path / "reference", address)))
    assert_clean(tmp_path / "artifacts")


def test_an_output_folder_that_a_killed_process_left_is_completed_by_the_next(tmp_path, store):
    there = published(store, tmp_path / "new", **{"vocab.txt": "words"})
    names = [*FILES, "vocab.txt"]
    for _ in range(6):
        kill_in_the_middle(tmp_path, "place", seconds=0.1 + random.random() * 0.2)
        for name in "abc":
            target = tmp_path / "out" / name
            if (target / FERRY_FILE).exists() and not (target / ".ferry.json.replacing").exists():
                assert_whole(target)
            place(there, target, names)
            assert_whole(target)
    assert_clean(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]


# Output folders


@pytest.fixture
def stored(store: LocalStore, tmp_path: Path) -> Path:
    return published(store, tmp_path / "new")


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_folder_gets_all_files(stored, tmp_path, exists):
    target = tmp_path / "out" / "model"
    if exists:
        target.mkdir(parents=True)
    assert place(stored, target, list(FILES)) == target
    assert hashes(target) == hashes(stored)
    assert_clean(tmp_path)


def test_graphs_are_shared_and_what_people_edit_is_not(stored, tmp_path):
    target = place(stored, tmp_path / "out", list(FILES))
    assert (target / "model.onnx").samefile(stored / "model.onnx")
    assert not (target / "config.json").samefile(stored / "config.json")


def test_a_folder_on_another_disk_gets_copies(stored, tmp_path):
    with tmpfs(tmp_path / "elsewhere", "1m") as elsewhere:
        assert hashes(place(stored, elsewhere / "out", list(FILES))) == hashes(stored)


def test_the_same_artifact_again_touches_nothing(stored, tmp_path):
    target = place(stored, tmp_path / "out", list(FILES))
    (target / "mine.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    place(stored, target, list(FILES))
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_an_older_artifact_is_replaced_and_the_users_own_files_stay(store, tmp_path):
    old = published(store, tmp_path / "old", "old", **{"vocab.txt": "words", "2_Dense/config.json": "dense"})
    new = published(store, tmp_path / "new", "new", **{"merges.txt": "merges"})
    target = place(old, tmp_path / "out", [*FILES, "vocab.txt", "2_Dense/config.json"])
    (target / "mine.txt").write_text("mine")
    place(new, target, [*FILES, "merges.txt"])
    assert hashes(target) == {**hashes(new), "mine.txt": hashes(target)["mine.txt"]}
    assert not (target / "2_Dense").exists()
    assert_whole(old)
    assert_clean(tmp_path)


def test_a_truncated_file_of_the_same_artifact_is_placed_again(stored, tmp_path):
    target = place(stored, tmp_path / "out", list(FILES))
    (target / "config.json").write_text("")
    place(stored, target, list(FILES))
    assert_whole(target)


def put_file(target: Path) -> None:
    target.write_text("a file")


def put_foreign(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    (target / "config.json").write_text("mine")


def put_unreadable(target: Path) -> None:
    target.mkdir()
    (target / FERRY_FILE).write_text('{"schema":')


def put_newer(target: Path) -> None:
    target.mkdir()
    (target / FERRY_FILE).write_text('{"schema": 99}')


@pytest.mark.parametrize(
    ("put", "words"),
    [
        pytest.param(put_file, "is a file, and no artifact of onnx-ferry", id="a-file"),
        pytest.param(put_foreign, "holds files that are no artifact of onnx-ferry", id="foreign-files"),
        pytest.param(put_unreadable, "cannot be read", id="unreadable-ferry-json"),
        pytest.param(put_newer, "not of schema 1", id="newer-ferry-json"),
    ],
)
def test_what_is_not_ours_is_not_touched(stored, tmp_path, put, words):
    target = tmp_path / "out"
    put(target)
    before = target.read_text() if target.is_file() else hashes(target)
    with pytest.raises(InputError, match=words) as caught:
        place(stored, target, list(FILES))
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert (target.read_text() if target.is_file() else hashes(target)) == before
    assert_clean(tmp_path)


def test_a_users_file_that_a_newer_artifact_would_overwrite_is_not(store, tmp_path):
    target = place(published(store, tmp_path / "old", "old"), tmp_path / "out", list(FILES))
    (target / "vocab.txt").write_text("mine")
    before = hashes(target)
    new = published(store, tmp_path / "new", "new", **{"vocab.txt": "theirs"})
    with pytest.raises(InputError, match=r"holds 'vocab\.txt', which is no file of the artifact"):
        place(new, target, [*FILES, "vocab.txt"])
    assert hashes(target) == before


def test_a_ferry_json_cannot_lead_out_of_its_folder(stored, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    victim = tmp_path / "victim.txt"
    victim.write_text("alive")
    names = ["../victim.txt", str(victim), "x/../../victim.txt", ""]
    (target / FERRY_FILE).write_text(json.dumps({"schema": 1, "model": {}, "files": {name: {} for name in names}}))
    place(stored, target, list(FILES))
    assert victim.read_text() == "alive"
    assert_whole(target)


def test_a_leftover_in_use_by_a_living_process_is_left_alone(stored, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tasks.place import _aside\n"
        "with _aside(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('')\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            (part,) = tmp_path.glob(".out.*.part")
            place(stored, tmp_path / "out", list(FILES))
            assert (part / "half").exists()
        finally:
            process.kill()
    wait_until(lambda: process.poll() is not None)
    place(stored, tmp_path / "out2", list(FILES))
    assert part.exists(), "another folder's leftover is not this one's business"
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            path.unlink()
    (tmp_path / "out" / "1_Pooling").rmdir()
    place(stored, tmp_path / "out", list(FILES))
    assert not part.exists()


@pytest.mark.parametrize("below", ["model", "deeper/model"])
def test_an_output_below_a_regular_file_is_bad_input(stored, tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The output folder .* cannot be written") as caught:
        place(stored, tmp_path / "file" / below, list(FILES))
    assert caught.value.kind is ErrorKind.BAD_INPUT


def test_a_full_disk_leaves_no_half_output(store, tmp_path):
    stored = published(store, tmp_path / "new", "x" * 200_000)
    with tmpfs(tmp_path / "small", "100k") as small:
        with pytest.raises(TransientError, match="The disk is full while writing to the output folder") as caught:
            place(stored, small / "out", list(FILES))
        assert caught.value.kind is ErrorKind.STORE
        assert list(small.iterdir()) == []


# What the file system says


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        pytest.param(errno.ENOSPC, ErrorKind.STORE, id="disk-full"),
        pytest.param(errno.EDQUOT, ErrorKind.STORE, id="quota"),
        pytest.param(errno.EIO, ErrorKind.STORE, id="broken-disk"),
        pytest.param(errno.EACCES, ErrorKind.BAD_INPUT, id="no-permission"),
        pytest.param(errno.EROFS, ErrorKind.BAD_INPUT, id="read-only"),
        pytest.param(errno.ENOTDIR, ErrorKind.BAD_INPUT, id="below-a-file"),
        pytest.param(errno.EEXIST, ErrorKind.BAD_INPUT, id="a-file-is-there"),
        pytest.param(errno.ENAMETOOLONG, ErrorKind.BAD_INPUT, id="name-too-long"),
    ],
)
def test_every_error_of_the_file_system_has_a_kind(number, kind):
    with pytest.raises(FerryError, match=r"(?i)the thing") as caught, disk_errors("the thing"):
        raise OSError(number, os.strerror(number))
    assert caught.value.kind is kind
    assert isinstance(caught.value.__cause__, OSError)


def test_our_own_errors_pass_through():
    error = InputError("said already")
    with pytest.raises(InputError) as caught, disk_errors("the thing"):
        raise error
    assert caught.value is error


# Names


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2"),
        ("org/name", "org__name"),
        ("./models/mine", "mine"),
        ("/srv/models/mine/", "mine"),
        ("models/deep/mine", "mine"),
        ("~/mine", "mine"),
        ("./.hidden", "hidden"),
        ("./a b:c", "a-b-c"),
        ("./données", "données"),
        ("/", "model"),
        ("..", "model"),
        ("~", "model"),
        ("./---", "model"),
        ("./" + "x" * 200, "x" * 120),
        ("./" + "深" * 80, "深" * 40),
    ],
)
def test_the_name_of_an_output_folder(model, name):
    assert safe_name(model) == name


@given(st.text(max_size=300))
@example("../../etc/passwd")
@example("a/../..")
@example("\0")
@example("~nobody-by-this-name/x")
@example("\udc80")
def test_a_name_never_escapes(model):
    name = safe_name(model)
    assert name == Path(name).name
    assert name not in ("", ".", "..")
    assert not name.startswith((".", "-", "~"))
    assert "\0" not in name
    assert len(name.encode()) <= 120


@pytest.fixture(autouse=True)
def no_umask_of_the_user() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)

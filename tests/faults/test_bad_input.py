"""What bad input gets: each model its error kind and one readable paragraph, the others their conversion.

One batch holds every bad folder and bad id beside one good model. Its report, its store and its catalog are what most
tests here look at; a second batch over the same models shows what is remembered.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.faults.harness import (
    assert_nothing_half_done,
    assert_whole,
    catalog_rows,
    ferry,
    hashes,
    read_report,
    tiny,
    tmpfs,
    write_manifest,
)

GOOD = "good"


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A model that cannot be converted, and what its user is told."""

    kind: str
    step: str
    words: tuple[str, ...]
    """Parts of the message."""
    build: Callable[[Path], object] | None = None
    """Makes the folder; ``None``: a Hub id, or a folder that is not there."""
    id: str | None = None
    """As in the manifest, where it is not the folder of this case's name."""
    options: tuple[tuple[str, str], ...] = ()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_config(text: str | bytes) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        path = tiny(folder) / "config.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return build


def change_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = tiny(folder) / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return build


def put_not_finite(value: float) -> Callable[[Path], object]:
    def change(weights: dict[str, Any]) -> None:
        name = min(name for name, tensor in weights.items() if tensor.ndim == 2)
        weights[name][0, 0] = value

    return change_weights(change)


def cut_weights(size: int | None) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        path = tiny(folder) / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2 if size is None else size)

    return build


def put_other_file(folder: Path) -> None:
    (tiny(folder) / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>502 Bad Gateway</html>")


def take_weights(folder: Path) -> None:
    (tiny(folder) / "model.safetensors").unlink()


def keep_pickle_only(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(tiny(folder) / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def forget_a_tensor(weights: dict[str, Any]) -> None:
    del weights[max(name for name, tensor in weights.items() if tensor.ndim == 2)]


BAD = {
    "nowhere": Bad(kind="not_found", step="fetch", words=("'nowhere' does not exist", "Hub id such as org/name")),
    "no-config": Bad(
        kind="bad_input",
        step="fetch",
        words=("has no config.json", "save_pretrained"),
        build=lambda folder: (tiny(folder) / "config.json").unlink(),
    ),
    "config-not-json": Bad(
        kind="bad_input",
        step="detect",
        words=("config.json' is not JSON", "Restore"),
        build=write_config('{"model_type": '),
    ),
    "config-not-text": Bad(
        kind="bad_input", step="detect", words=("config.json' is not JSON",), build=write_config(b"\xff\xfe\x00{")
    ),
    "config-a-list": Bad(
        kind="bad_input", step="detect", words=("holds a list, not an object of settings",), build=write_config("[]")
    ),
    "config-without-type": Bad(
        kind="bad_input", step="detect", words=("names no model_type",), build=write_config("{}")
    ),
    "unknown-type": Bad(
        kind="unsupported",
        step="detect",
        words=("model_type 'quux-9000'", "upgrade transformers"),
        build=lambda folder: edit_config(tiny(folder), model_type="quux-9000"),
    ),
    "unknown-task": Bad(
        kind="bad_input",
        step="detect",
        words=("'text-clasification'", "text-classification"),
        build=lambda folder: tiny(folder, "bert-model"),
        options=(("task", "text-clasification"),),
    ),
    "impossible-task": Bad(
        kind="bad_input",
        step="detect",
        words=("image-classification", "bert"),
        build=lambda folder: tiny(folder, "bert-model", seed=1),
        options=(("task", "image-classification"),),
    ),
    "no-head": Bad(
        kind="bad_input",
        step="export",
        words=("has no weights for classifier", "they would be random", "task"),
        build=lambda folder: tiny(folder, "bert-model", seed=2),
        options=(("task", "text-classification"),),
    ),
    "truncated": Bad(
        kind="bad_input",
        step="export",
        words=("is no whole safetensors file", "where its header asks for", "Fetch the file again"),
        build=cut_weights(None),
    ),
    "empty-weights": Bad(
        kind="bad_input", step="export", words=("is no whole safetensors file", "0 bytes"), build=cut_weights(0)
    ),
    "web-page-for-weights": Bad(
        kind="bad_input", step="export", words=("is no whole safetensors file",), build=put_other_file
    ),
    "no-weights": Bad(
        kind="bad_input", step="export", words=("has no weights", "no model.safetensors"), build=take_weights
    ),
    "pickle-only": Bad(
        kind="bad_input", step="export", words=("pickled files only", "can run code"), build=keep_pickle_only
    ),
    "shard-missing": Bad(
        kind="bad_input",
        step="export",
        words=("lacks 1 of 2 shards: model-00002-of-00002.safetensors",),
        build=lose_a_shard,
    ),
    "tensor-missing": Bad(
        kind="bad_input",
        step="export",
        words=("has no weights for", "complete checkpoint"),
        build=change_weights(forget_a_tensor),
    ),
    "nan": Bad(
        kind="bad_input", step="export", words=("NaN or infinite weights in",), build=put_not_finite(float("nan"))
    ),
    "infinite": Bad(
        kind="bad_input", step="export", words=("NaN or infinite weights in",), build=put_not_finite(float("-inf"))
    ),
    "other-shape": Bad(
        kind="bad_input",
        step="export",
        words=("do not fit their config.json", "the config that the weights were saved with"),
        build=lambda folder: edit_config(tiny(folder), ffn_dim=48),
    ),
    "no-gpu": Bad(
        kind="bad_input",
        step="parity",
        words=("'cuda' was asked for", "PyTorch sees no CUDA device", "'auto' or 'cpu'"),
        build=lambda folder: tiny(folder, seed=1),
        options=(("device", "cuda"),),
    ),
    "hub-missing": Bad(
        kind="not_found",
        step="fetch",
        id="org/missing",
        words=("no public model 'org/missing'", "Check the spelling", "HF_TOKEN"),
    ),
    "hub-no-revision": Bad(
        kind="not_found", step="fetch", id="org/no-revision", words=("'org/no-revision'", "Check the branch")
    ),
    "hub-gated": Bad(kind="not_found", step="fetch", id="org/gated", words=("gated", "HF_TOKEN")),
    "hub-down": Bad(kind="network", step="fetch", id="org/down", words=("HTTP 503", "'org/down'", "again later")),
}
REMEMBERED = [name for name, bad in BAD.items() if bad.step in ("detect", "export")]


class Hub:
    """A hub on the loopback that has no model, and counts who asks."""

    ANSWERS: ClassVar = {
        "missing": (404, "RepoNotFound"),
        "no-revision": (404, "RevisionNotFound"),
        "gated": (403, "GatedRepo"),
        "down": (503, ""),
    }

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("/api/models/org/")[2].partition("/")[0].partition("?")[0]
                hub.asked[name] += 1
                status, code = hub.ANSWERS.get(name, (404, ""))
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def variables(hub: Hub) -> dict[str, str]:
    # The second hides the devices of a machine that has some.
    return {"HF_ENDPOINT": hub.url, "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch of all bad models, after its first run."""

    folder: Path
    home: Path
    output: Path
    hub: Hub
    asked: Counter[str]
    code: int
    text: str
    models: dict[str, dict[str, Any]]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return ferry(*words, home=self.home, cwd=self.folder, variables=variables(self.hub))

    def entry(self, name: str) -> dict[str, Any]:
        return self.models[BAD[name].id or name]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batch]:
    folder = tmp_path_factory.mktemp("bad")
    models: list[dict[str, str] | str] = []
    for name, bad in BAD.items():
        if bad.build is not None:
            bad.build(folder / name)
        models.append({"id": bad.id or f"./{name}", **dict(bad.options)})
    # In the middle, so that failures come before it and after it.
    tiny(folder / GOOD)
    models.insert(len(models) // 2, f"./{GOOD}")
    write_manifest(folder / "models.json", models)
    hub = Hub()
    home, output = folder / "home", folder / "out"
    words = ["batch", "models.json", "--engine", "local", "--output", "out", "--report", "report.json"]
    try:
        done = ferry(*words, home=home, cwd=folder, variables=variables(hub))
        assert (folder / "report.json").exists(), done.stderr
        yield Batch(
            folder=folder,
            home=home,
            output=output,
            hub=hub,
            asked=Counter(hub.asked),
            code=done.returncode,
            text=done.stdout,
            models=read_report(folder / "report.json"),
        )
        assert done.stderr == ""
    finally:
        hub.close()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_gets_its_kind_and_a_readable_paragraph(batch, name):
    bad, entry = BAD[name], batch.entry(name)
    error = entry["error"]
    assert (entry["status"], error["kind"], error["step"]) == ("failed", bad.kind, bad.step), error["message"]
    message = error["message"]
    assert [words for words in bad.words if words not in message] == [], message
    assert "\n" not in message
    assert "Traceback" not in message
    assert message.endswith((".", ")", '"')), message
    assert 40 < len(message) < 1200, message
    assert entry["artifact"] is None
    assert entry["attempts"] == 1
    assert message in batch.text


@pytest.mark.parametrize("name", BAD)
def test_the_command_to_see_it_again_asks_for_the_same(batch, name):
    words = shlex.split(batch.entry(name)["error"]["reproduce"])
    expected = ["ferry", "convert", BAD[name].id or f"./{name}"]
    for option, value in BAD[name].options:
        expected += [f"--{option}", value]
    assert words == expected


def test_the_command_to_see_it_again_shows_it_again(batch):
    error = batch.entry("no-head")["error"]
    done = batch.run(*shlex.split(error["reproduce"])[1:], "--json")
    assert done.returncode == 1
    (again,) = json.loads(done.stdout)["models"]
    assert again["error"] == error
    assert done.stderr.endswith(f"Error: {error['message']}\n")


def test_the_good_model_among_them_is_converted(batch):
    entry = batch.models[GOOD]
    assert (entry["status"], entry["error"]) == ("converted", None)
    assert entry["parity"]["verdict"] == "verified"
    assert entry["artifact"] == str(batch.output / GOOD)
    assert_whole(batch.output / GOOD)


def test_the_exit_code_says_that_something_was_not_converted(batch):
    assert batch.code == 1
    assert f"{len(BAD)} failed" in batch.text


def test_nothing_half_done_is_left(batch):
    assert_nothing_half_done(batch.home, batch.output)
    assert [path.name for path in batch.output.iterdir()] == [GOOD]


def test_the_catalog_has_each_failure_once(batch):
    rows = [row for row in catalog_rows(batch.home) if row.batch_id == 1]
    assert Counter(row.status for row in rows) == {"failed": len(BAD), "converted": 1}
    assert Counter(row.error.kind for row in rows if row.error) == Counter(bad.kind for bad in BAD.values())
    # What could not be looked up has no key, so that nothing is remembered of it.
    assert {row.error.step for row in rows if row.error and row.key is None} == {"fetch"}


def test_only_a_network_that_fails_is_asked_again(batch):
    assert batch.asked == {"missing": 1, "no-revision": 1, "gated": 1, "down": 3}


@pytest.fixture(scope="module")
def again(batch: Batch) -> tuple[dict[str, dict[str, Any]], int, int]:
    """The same batch again, with one kind of failure to be tried again: report, rows before, rows after."""
    before = len(catalog_rows(batch.home))
    # Without the one that has to be traced again before its device is missed.
    models = [m for m in json.loads((batch.folder / "models.json").read_text())["models"] if m["id"] != "./no-gpu"]
    write_manifest(batch.folder / "again-models.json", models)
    words = [
        "batch",
        "again-models.json",
        "--engine",
        "local",
        "--report",
        "again.json",
        "--retry-failed",
        "unsupported",
    ]
    done = batch.run(*words)
    assert done.returncode == 1, done.stderr
    return read_report(batch.folder / "again.json"), before, len(catalog_rows(batch.home))


@pytest.mark.parametrize("name", REMEMBERED)
def test_a_failure_is_reported_again(batch, again, name):
    entry, first = again[0][name], batch.entry(name)
    assert entry["error"] == first["error"]
    is_tried_again = BAD[name].kind == "unsupported"
    assert any("known from an earlier run" in note for note in entry["notes"]) is not is_tried_again


def test_only_what_was_asked_for_is_tried_again(batch, again):
    models, before, after = again
    assert models[GOOD]["status"] == "reused"
    kinds = Counter(bad.kind for bad in BAD.values())
    unsupported = [name for name in REMEMBERED if BAD[name].kind == "unsupported"]
    # Besides those, what was never found is looked for each time; the one without a device was left out.
    assert after - before == len(unsupported) + len(BAD) - 1 - len(REMEMBERED)
    assert len(unsupported) == kinds["unsupported"]
    assert_nothing_half_done(batch.home, batch.output)


# Before anything starts


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_an_unreachable_network_is_tried_again_and_then_told(tmp_path):
    write_manifest(tmp_path / "models.json", ["org/one", "org/two"])
    done = ferry(
        "batch", "models.json", "--engine", "local", "--report", "report.json",
        home=tmp_path / "home", cwd=tmp_path, variables={"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"},
    )  # fmt: skip
    assert done.returncode == 1
    for name, entry in read_report(tmp_path / "report.json").items():
        assert entry["error"]["kind"] == "network"
        assert entry["error"]["step"] == "fetch"
        assert f"'{name}'" in entry["error"]["message"]
        assert entry["error"]["reproduce"] == f"ferry convert {name}"
    assert_nothing_half_done(tmp_path / "home")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(None, "there is no such file", id="absent"),
        pytest.param(b"\xff\xfe\x00", "not UTF-8", id="not-text"),
        pytest.param(b"models: [", "not YAML", id="not-yaml"),
        pytest.param(b"models: []\n", "lists no models", id="empty"),
        pytest.param(b"modles:\n  - id: ./x\n", "did you mean 'models'?", id="unknown-key"),
        pytest.param(b"models:\n  - id: ./x\n  - id: ./x\n", "line 3: './x' stands on line 2 already", id="duplicate"),
        pytest.param(b"models:\n  - id: a/b/c\n", "line 2", id="malformed-id"),
    ],
)
def test_a_manifest_that_is_wrong_starts_nothing(tmp_path, text, words):
    if text is not None:
        (tmp_path / "models.yaml").write_bytes(text)
    done = ferry("batch", "models.yaml", "--report", "report.json", home=tmp_path / "home", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "models.yaml" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"models.yaml"}


@pytest.mark.parametrize("flag", ["--output", "--home", "--report"])
def test_a_place_that_cannot_be_written_starts_nothing(tmp_path, flag):
    (tmp_path / "file").write_text("")
    tiny(tmp_path / "model")
    write_manifest(tmp_path / "models.json", ["./model"])
    done = ferry(
        "batch", "models.json", "--engine", "local", flag, tmp_path / "file" / "below" / "x",
        home=tmp_path / "home", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert flag in done.stderr
    assert "is not a folder" in done.stderr
    assert not (tmp_path / "home").exists()


# Places that turn out to be wrong later


def test_an_output_folder_that_is_taken_costs_neither_the_model_nor_the_owner(batch):
    """The model stays known as converted, and the next call with another folder has only to place it."""
    output = batch.folder / "taken"
    (output / GOOD).mkdir(parents=True)
    (output / GOOD / "thesis.tex").write_text("years of work")
    before = hashes(output)
    rows = len(catalog_rows(batch.home))
    write_manifest(batch.folder / "good.json", [f"./{GOOD}"])
    words = ["batch", "good.json", "--engine", "local", "--report", "taken.json", "--output"]

    done = batch.run(*words, "taken")
    assert done.returncode == 1
    (entry,) = read_report(batch.folder / "taken.json").values()
    error = entry["error"]
    assert (entry["status"], error["kind"], error["step"]) == ("failed", "bad_input", "register")
    assert "holds files that are no artifact of onnx-ferry" in error["message"]
    assert shlex.split(error["reproduce"]) == ["ferry", "convert", f"./{GOOD}", "--output", str(output / GOOD)]
    assert any(entry["artifact"] in note for note in entry["notes"])
    assert_whole(Path(entry["artifact"]))
    assert hashes(output) == before
    assert len(catalog_rows(batch.home)) == rows

    done = batch.run(*words, "free")
    assert done.returncode == 0
    (entry,) = read_report(batch.folder / "taken.json").values()
    assert (entry["status"], entry["error"]) == ("reused", None)
    assert_whole(batch.folder / "free" / GOOD)


def test_a_disk_that_is_full_costs_only_the_models_that_do_not_fit(tmp_path):
    tiny(tmp_path / "large", "bert-model")
    tiny(tmp_path / "small")
    write_manifest(tmp_path / "models.json", ["./large", "./small"])
    home = tmp_path / "home"
    with tmpfs(tmp_path / "disk", "150k") as disk:
        store = disk / "artifacts"
        done = ferry(
            "batch", "models.json", "--engine", "local", "--report", "report.json", "--store-url", store,
            home=home, cwd=tmp_path,
        )  # fmt: skip
        models = read_report(tmp_path / "report.json")
        error = models["large"]["error"]
        assert (error["kind"], error["step"]) == ("store", "register"), error["message"]
        assert "The disk is full while writing to the artifact store" in error["message"]
        assert "Free some space" in error["message"]
        assert models["small"]["status"] == "converted"
        assert done.returncode == 1
        assert_nothing_half_done(home, store=store)
        assert {row.key is None for row in catalog_rows(home)} == {False}
    shutil.rmtree(home)

"""Where a model comes from: every answer of the Hub and every state of a folder has its error kind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub.errors import HFValidationError

from onnx_config.config_file import config_from_dict, read_config_dict
from onnx_config.errors import ErrorKind, FerryError, InputError, ModelError, TransientError
from onnx_config.hub import download, fetch_config, is_folder, read_config, resolve
from onnx_config.hub_errors import translate_hub_error

# Repository -> status of every answer and the Hub's own code for it.
ANSWERS = {
    "missing": (404, "RepoNotFound"),
    "no-such-branch": (404, "RevisionNotFound"),
    "mirror-without-codes": (404, None),
    "anonymous": (401, "RepoNotFound"),
    "unauthorized": (401, None),
    "forbidden": (403, None),
    "gated": (403, "GatedRepo"),
    "broken": (500, None),
    "busy": (429, None),
}
SHA = "0123456789abcdef0123456789abcdef01234567"

# Runs where the Hub's address is read, which is at import, and without the Hub client's pauses between its retries.
CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None
from onnx_config import hub, hub_limits
hub_limits._WAIT_SECONDS = 0.0
from onnx_config.errors import FerryError
found = {}
for name in sys.argv[1:]:
    for call in (hub.resolve, hub.fetch_config, hub.list_files):
        try:
            answer = call(f"org/{name}")
            said = answer if isinstance(answer, dict) else getattr(answer, "revision", None) or answer.name
            found[f"{call.__name__}:{name}"] = ["ok", said]
        except FerryError as error:
            found[f"{call.__name__}:{name}"] = [error.kind.value, error.message]
print(json.dumps(found))
"""


class FakeHub(BaseHTTPRequestHandler):
    """Answers each repository with its status, and ``org/there`` with a commit and a config."""

    def do_GET(self):
        repository = re.search(r"org/([\w-]+)", self.path)[1]
        if repository == "there":
            if self.path.endswith("modules.json"):
                self.answer(404, "{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
                return
            files = [{"rfilename": "config.json", "size": 9}, {"rfilename": "model.safetensors", "size": 70}]
            about = {"id": "org/there", "sha": SHA, "siblings": files}
            body = json.dumps(about if "/api/" in self.path else {"model_type": "bert"})
            self.answer(200, body, ETag='"abc"', **{"X-Repo-Commit": SHA})
        else:
            status, code = ANSWERS[repository]
            self.answer(status, "{}", **({"X-Error-Code": code} if code else {}))

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


def ask(endpoint, cache, *names, **environment):
    """Return what `resolve` and `fetch_config` said of each name, in an interpreter of their own."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *names],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cache = tmp_path_factory.mktemp("huggingface")
    try:
        yield ask(f"http://127.0.0.1:{server.server_port}", cache, *ANSWERS, "there")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("call", ["resolve", "fetch_config", "list_files"])
@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        pytest.param("missing", "not_found", "no public model 'org/missing'", id="404"),
        pytest.param("no-such-branch", "not_found", "Check the branch, tag or commit", id="404-revision"),
        pytest.param("mirror-without-codes", "not_found", "HTTP 404", id="404-of-a-mirror"),
        pytest.param("anonymous", "not_found", "set HF_TOKEN", id="401-as-the-hub-says-it"),
        pytest.param("unauthorized", "not_found", "HTTP 401\\). Set HF_TOKEN", id="401"),
        pytest.param("forbidden", "not_found", "HTTP 403\\). Set HF_TOKEN", id="403"),
        pytest.param("gated", "not_found", "gated.*HF_TOKEN", id="403-gated"),
        pytest.param("broken", "network", "HTTP 500", id="500"),
        pytest.param("busy", "network", "HTTP 429", id="429"),
    ],
)
def test_an_answer_of_the_hub_has_its_kind(answers, call, name, kind, words):
    found, message = answers[f"{call}:{name}"]
    assert found == kind
    assert re.search(words, message)
    assert f"org/{name}" in message


def test_a_repository_resolves_to_its_commit_and_gives_its_config_alone(answers):
    assert answers["resolve:there"] == ["ok", SHA]
    assert answers["fetch_config:there"] == ["ok", SHA]
    assert answers["list_files:there"] == ["ok", {"config.json": 9, "model.safetensors": 70}]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param({}, "could not be reached.*Check the network", id="connection-refused"),
        pytest.param({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE", id="offline-mode"),
    ],
)
def test_a_hub_that_is_not_there_is_a_network_error(tmp_path, environment, words):
    for kind, message in ask("http://127.0.0.1:9", tmp_path, "name", **environment).values():
        assert kind == "network"
        assert re.search(words, message)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(HFValidationError("too long"), ErrorKind.BAD_INPUT, id="malformed-id"),
        pytest.param(OSError(28, "No space left on device"), ErrorKind.STORE, id="disk-full"),
        pytest.param(ConnectionResetError("reset"), ErrorKind.NETWORK, id="reset"),
        pytest.param(TimeoutError("slow"), ErrorKind.NETWORK, id="timeout"),
        pytest.param(KeyError("id"), ErrorKind.NETWORK, id="an-answer-of-another-form"),
        pytest.param(InputError("ours"), ErrorKind.BAD_INPUT, id="ours-stays"),
    ],
)
def test_no_foreign_error_escapes(error, kind):
    translated = translate_hub_error(error, "org/name", "main")
    assert isinstance(translated, FerryError)
    assert translated.kind is kind


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        pytest.param("org/name", False, id="id"),
        pytest.param("gpt2", False, id="id-without-owner"),
        pytest.param("./gpt2", True, id="relative"),
        pytest.param("~/gpt2", True, id="home"),
        pytest.param("/models/gpt2", True, id="absolute"),
        pytest.param("models/of/mine", True, id="three-parts"),
    ],
)
def test_what_means_a_folder(model_id, expected):
    assert is_folder(model_id) is expected


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def test_a_folder_resolves_to_the_hash_of_what_it_holds(folder):
    first = resolve(str(folder))
    assert (first.folder, resolve(str(folder)).revision) == (folder, first.revision)
    assert download(first) == folder
    (folder / "vocab.txt").write_text("a")
    assert resolve(str(folder)).revision != first.revision


@pytest.mark.parametrize("call", [resolve, fetch_config, read_config])
def test_a_missing_folder_is_not_found(call, tmp_path):
    with pytest.raises(InputError, match=r"does not exist\. Give an existing folder, or a Hub id") as caught:
        call(str(tmp_path / "nothing"))
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json") as caught:
        resolve(str(tmp_path))
    assert caught.value.kind is ErrorKind.BAD_INPUT
    with pytest.raises(InputError, match=r"config\.json' does not exist"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"{", "is not JSON.*Restore the file", id="truncated"),
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b"\xff\xfe\x00", "is not JSON", id="binary"),
        pytest.param(b"[1, 2]", "holds a list, not an object", id="list"),
        pytest.param(b"null", "holds a NoneType, not an object", id="null"),
    ],
)
def test_a_config_that_cannot_be_read(folder, content, words):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_config_dict(folder)
    assert caught.value.kind is ErrorKind.BAD_INPUT


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        pytest.param({}, InputError, "names no model_type", id="no-model-type"),
        pytest.param({"model_type": 3}, InputError, "names no model_type", id="model-type-of-another-kind"),
        pytest.param({"model_type": "nonesuch"}, ModelError, "'nonesuch'.*Check config.json", id="unknown"),
        pytest.param(
            {"model_type": "nonesuch", "transformers_version": "99.1.0"},
            ModelError,
            "written by transformers 99.1.0: upgrade",
            id="from-a-newer-release",
        ),
        pytest.param({"model_type": "nonesuch", "auto_map": {}}, ModelError, "needs trust_remote_code", id="own-code"),
        pytest.param({"model_type": "bert", "vocab_size": "many"}, InputError, "not valid for 'bert'", id="bad-value"),
    ],
)
def test_a_dict_that_configures_nothing(value, error, words):
    with pytest.raises(error, match=words) as caught:
        config_from_dict(value)
    assert caught.value.kind is (ErrorKind.UNSUPPORTED if error is ModelError else ErrorKind.BAD_INPUT)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("value", "config_class"),
    [
        pytest.param({"model_type": "coarse_acoustics", "architectures": ["BarkCoarseModel"]}, "BarkCoarseConfig",
                     id="a-part-whose-type-nothing-lists"),
        pytest.param({"architectures": ["BertModel"]}, "BertConfig", id="no-type"),
        pytest.param({"model_type": "bert", "architectures": ["GPT2Model"]}, "BertConfig", id="the-type-of-another"),
        pytest.param({"model_type": "bert", "architectures": ["Nonesuch"]}, "BertConfig", id="no-such-class"),
        pytest.param({"model_type": "bert", "architectures": ["BertTokenizer"]}, "BertConfig", id="no-model"),
    ],
)  # fmt: skip
def test_a_type_that_is_missing_or_unlisted_is_that_of_the_architecture(value, config_class):
    assert type(config_from_dict(value)).__name__ == config_class


def test_reading_a_config_changes_nothing_of_the_dict():
    value = {"model_type": "bert", "hidden_size": 48, "architectures": ["BertModel"]}
    assert config_from_dict(value).hidden_size == 48
    assert value == {"model_type": "bert", "hidden_size": 48, "architectures": ["BertModel"]}


def test_numbers_that_json_has_no_word_for_are_read_as_transformers_writes_them(tmp_path):
    from transformers import BertConfig

    BertConfig(limits=[0.0, float("inf")], lowest={"a": float("-inf")}, tag={"__float__": "one"}).save_pretrained(
        tmp_path
    )
    assert '"Infinity"' in (tmp_path / "config.json").read_text()
    config = config_from_dict(read_config_dict(tmp_path))
    assert config.limits == [0.0, float("inf")]
    assert config.lowest == {"a": float("-inf")}
    assert config.tag == {"__float__": "one"}


def test_transient_errors_are_the_ones_that_are_tried_again():
    assert isinstance(translate_hub_error(TimeoutError(), "org/name"), TransientError)


CHOOSE = """
import json, sys, time
time.sleep = lambda seconds: None
from onnx_config import hub
from onnx_config.errors import FerryError
try:
    folder = hub.download_chosen(sys.argv[1], lambda names: [n for n in names if n.startswith("onnx/wanted")])
    files = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    print(json.dumps([folder.name, files]))
except FerryError as error:
    print(json.dumps([error.kind.value, error.message]))
"""


class GraphHub(BaseHTTPRequestHandler):
    """Has one repository, and notes what is asked of it."""

    files = (
        "config.json",
        "pytorch_model.bin",
        "onnx/wanted.onnx",
        "onnx/wanted[1].onnx_data",
        "onnx/other.onnx",
        "x/a.json",
    )
    asked: list[str] = []  # noqa: RUF012 - of the one test that uses it

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/api/" in path:
            siblings = [{"rfilename": file, "size": len(file)} for file in self.files]
            self.answer(json.dumps({"id": "org/graphs", "sha": SHA, "siblings": siblings}))
            return
        file = unquote(path.partition(f"/resolve/{SHA}/")[2])
        self.asked.append(file)
        self.answer(file, ETag=f'"{file.encode().hex()}"', **{"X-Repo-Commit": SHA})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


def test_only_what_is_chosen_is_downloaded_beside_the_small_files(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), GraphHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def call(name, **environment):
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), **environment}
        command = [sys.executable, "-c", CHOOSE, name]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=True
        )
        return json.loads(done.stdout)

    wanted = ["config.json", "onnx/wanted.onnx", "onnx/wanted[1].onnx_data"]
    try:
        assert call("org/graphs", HF_HUB_OFFLINE="0") == [SHA, {name: name for name in wanted}]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert set(GraphHub.asked) == set(wanted)
    # What is there is found without the Hub, where it is not to be asked.
    assert call("org/graphs@" + SHA, HF_HUB_OFFLINE="1") == [SHA, {name: name for name in wanted}]
    assert call("org/never-seen", HF_HUB_OFFLINE="1")[0] == "network"

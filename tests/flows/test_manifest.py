"""The manifest: what is read, and what a mistake says."""

from __future__ import annotations

import contextlib
import json
import random
import string
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.manifest import read_manifest, read_model, select_options
from onnx_config.errors import ErrorKind, InputError
from onnx_config.variants import Variant
from tasks.request import ConversionOptions, ConversionRequest, Device

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CONTRACT = """
defaults:                    # every key can also stand on a model
  device: auto
  opset: null                # null: the newest that the installed ONNX Runtime runs
  dtype: float32             # float16, bfloat16
  simplify: true
  trust_remote_code: false
models:
  - id: sentence-transformers/all-MiniLM-L6-v2
    revision: main
  - id: ./models/my-classifier
    task: text-classification
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str | bytes, name: str = "models.yaml") -> tuple[ConversionRequest, ...]:
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(path)


def request(model_id: str, revision: str | None = None, **options: object) -> ConversionRequest:
    return ConversionRequest(model_id=model_id, revision=revision, options=select_options(**options))


def test_the_documented_manifest() -> None:
    assert read(CONTRACT) == (
        request(MINILM, "main"),
        request("./models/my-classifier", task="text-classification"),
    )


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        pytest.param("models: [org/a, gpt2]", "m.yaml", [request("org/a"), request("gpt2")], id="plain-strings"),
        pytest.param('{"models": [{"id": "org/a", "opset": 18}]}', "m.json", [request("org/a", opset=18)], id="json"),
        pytest.param('{\n\t"models": [\n\t\t"org/a"\n\t]\n}', "m.json", [request("org/a")], id="json-with-tabs"),
        pytest.param('{"models": ["org/a"]}', "m", [request("org/a")], id="json-without-suffix"),
        pytest.param("models:\n- org/a\n", "m.txt", [request("org/a")], id="yaml-with-another-suffix"),
        pytest.param("org/a\n\n# no\r\norg/b@v1 # yes\r\n", "m.txt",
            [request("org/a"), request("org/b", "v1")], id="text"),
        pytest.param("\ufefforg/a", "m.txt", [request("org/a")], id="text-with-byte-order-mark"),
        pytest.param("./a b#c", "m.txt", [request("./a b#c")], id="folder-with-blank-and-hash"),
        pytest.param("models: [org/a@refs/pr/3]", "m.yaml", [request("org/a", "refs/pr/3")], id="revision-in-the-id"),
        pytest.param("models: [{id: org/a@v1, revision: v1}]", "m.yaml",
            [request("org/a", "v1")], id="revisions-agree"),
        pytest.param("models: [{id: org/a, revision: 12e34}]", "m.yaml",
            [request("org/a", "12e34")], id="commit-like-float"),
        pytest.param("models: [{id: org/a, revision: 0123456}]", "m.yaml",
            [request("org/a", "0123456")], id="commit-like-int"),
        pytest.param("models: [{id: org/a, revision: no}]", "m.yaml", [request("org/a", "no")], id="branch-named-no"),
        pytest.param("models: [~/x, ., /y]", "m.yaml", [request("~/x"), request("."), request("/y")], id="folders"),
        pytest.param("models: [org/a, {id: org/a, task: fill-mask}]", "m.yaml",
            [request("org/a"), request("org/a", task="fill-mask")], id="same-model-with-another-task"),
        pytest.param("models: [org/a, org/a@v1]", "m.yaml", [request("org/a"), request("org/a", "v1")], id="revisions"),
        pytest.param("defaults:\nmodels: [org/a]", "m.yaml", [request("org/a")], id="empty-defaults"),
        pytest.param("defaults: {require: cuda}\nmodels: [a, {id: b, device: cuda}, {id: c, require: null}]", "m.yaml",
            [request("a", device=Device.CUDA), request("b", device=Device.CUDA), request("c")], id="gpu-required"),
    ],
)  # fmt: skip
def test_what_is_read(text: str, name: str, expected: list[ConversionRequest]) -> None:
    assert list(read(text, name)) == expected


def test_a_model_overrides_the_defaults() -> None:
    text = """
defaults: {device: cpu, opset: 18, dtype: float16, simplify: false, trust_remote_code: true}
models:
  - org/a
  - {id: org/b, device: cuda, opset: null, dtype: bfloat16, simplify: true, trust_remote_code: false}
"""
    first, second = (found.options for found in read(text))
    assert first == ConversionOptions(
        device=Device.CPU, opset=18, dtype="float16", simplify=False, trust_remote_code=True
    )
    assert second == ConversionOptions(device=Device.CUDA, dtype="bfloat16")


def test_variants_stand_on_all_models_or_on_one_in_one_order() -> None:
    text = """
defaults:
  variants: [q4, fp16]
models:
  - org/a
  - {id: org/b, variants: []}
  - id: org/c
    variants:
      - quantized
"""
    first, second, third = (found.options.variants for found in read(text))
    assert first == (Variant.FP16, Variant.Q4)
    assert second == ()
    assert third == (Variant.QUANTIZED,)


def test_a_folder_that_is_there_is_a_folder(folder: Path) -> None:
    (folder / "org" / "a@v1").mkdir(parents=True)
    assert read("models: [org/a@v1, org/b@v1]") == (request("org/a@v1"), request("org/b", "v1"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("modles: [org/a]", "line 1: unknown key 'modles' .* did you mean 'models'", id="unknown-top-key"),
        pytest.param("models:\n- id: org/a\n  revison: x", "line 3: .*'revison' .* 'revision'", id="model-key"),
        pytest.param("defaults:\n  devise: cpu\nmodels: [a]", "line 2: .*'devise' .* 'device'", id="default-key"),
        pytest.param("defaults:\n  task: x\nmodels: [a]", "line 2: unknown key 'task'", id="task-is-no-default"),
        pytest.param("models:\n- id: a\n  zzz: 1", "line 3: .*the keys are .*trust_remote_code", id="far-miss"),
        pytest.param("models: [a]\n\nmodels: [b]", "line 3: the key 'models' is given twice.* line 1", id="double-key"),
        pytest.param("models:\n- id: a\n  id: b", "line 3: the key 'id' is given twice", id="double-key-of-a-model"),
        pytest.param("models:\n- a\n- b\n- a", "line 4: 'a' stands on line 2 already", id="duplicate"),
        pytest.param("models:\n- a\n- a@main", "line 3: 'a' stands on line 2 already", id="duplicate-main"),
        pytest.param("models:\n- ./a\n- ./b/../a", "line 3: './b/../a' stands on line 2", id="duplicate-folder"),
        pytest.param("models:\n- {id: a, opset: 18}\n- a\ndefaults: {opset: 18}", "line 3: 'a' stands on line 2",
            id="duplicate-by-defaults"),
        pytest.param("models: []", "line 1: 'models' lists no models", id="empty-list"),
        pytest.param("defaults: {require: gpu}\nmodels: [a]", "line 1: 'require' is 'gpu': it takes cuda",
            id="require"),
        pytest.param("models:\n- {id: a, device: cpu, require: cuda}", "line 2: .* contradict", id="gpu-and-no-gpu"),
        pytest.param("x: 1", "the key 'models' is missing", id="no-models"),
        pytest.param("\nmodels:\n\n", "line 2: 'models' lists no models", id="models-null"),
        pytest.param("models: org/a", "line 1: 'models' is the text 'org/a', not a list", id="models-text"),
        pytest.param("", "lists no models", id="empty-file"),
        pytest.param("# nothing", "lists no models", id="only-a-comment"),
        pytest.param("- org/a", "line 1: a list stands where the keys 'models'", id="top-list"),
        pytest.param("models: [a\nb: 1", "line 2: not YAML: while parsing a flow sequence", id="not-yaml"),
        pytest.param("models: [a]\n---\nmodels: [b]", "line 2: not YAML: .*another document", id="two-documents"),
        pytest.param("models:\n- \x01", "line 2: not YAML: special characters", id="control-character"),
        pytest.param("[" * 600, "nested too deeply", id="deep"),
        pytest.param('models:\n- "a\\0b"', "line 2: .* has a control character", id="nul"),
        pytest.param('models:\n- "a\\u202Eb"', "line 2: .* has a control character", id="turned-text"),
        pytest.param('models:\n- "\\uD800"', "line 2: .* has a control character", id="half-a-pair"),
        pytest.param("models:\n- a b", "line 2: The model id 'a b' is malformed", id="blank"),
        pytest.param("models:\n- a/b/c", "line 2: .*one '/' at most", id="two-slashes"),
        pytest.param("models:\n- ''", "line 2: The model id '' is empty", id="empty-id"),
        pytest.param("models:\n-", "line 2: nothing stands where a model belongs", id="null-model"),
        pytest.param("models:\n- [a]", "line 2: a list stands where a model belongs", id="list-model"),
        pytest.param("models:\n- task: x", "line 2: the key 'id' is missing", id="no-id"),
        pytest.param("models:\n- id:\n- b", "line 2: 'id' is None: it takes org/name", id="null-id"),
        pytest.param("models:\n- id: a\n  device: gpu", "line 3: 'device' is 'gpu': .*auto, cpu, cuda", id="device"),
        pytest.param("models:\n- id: a\n  dtype: float61", "line 3: .*did you mean 'float16'", id="dtype"),
        pytest.param("models:\n- id: a\n  opset: '18'", "line 3: 'opset' is '18': it takes a whole", id="opset-text"),
        pytest.param("models:\n- id: a\n  opset: 18.5", "line 3: 'opset' is 18.5", id="opset-fraction"),
        pytest.param("models:\n- id: a\n  opset: true", "line 3: 'opset' is True", id="opset-bool"),
        pytest.param("models:\n- id: a\n  opset: 3", "line 3: 'opset' is 3: .* from 7", id="opset-old"),
        pytest.param("models:\n- id: a\n  simplify: yes", "line 3: 'simplify' is 'yes'", id="yaml-1.1-bool"),
        pytest.param("models:\n- id: a\n  trust_remote_code: 1", "line 3: .*takes true or false", id="number-for-bool"),
        pytest.param("models:\n- id: a\n  variants: [fp61]", "line 3: 'variants' is 'fp61': it takes a list of fp16, "
            "bf16, int8, quantized, q4, q4f16; did you mean 'fp16'", id="variant"),
        pytest.param("models:\n- id: a\n  variants: q4", "line 3: 'variants' is 'q4': it takes a list", id="no-list"),
        pytest.param("models:\n- id: a\n  variants: [q4, [q4]]", "line 3: 'variants' is a list: it takes a list of",
            id="list-in-variants"),
        pytest.param("models:\n- id: a\n  variants: [q4, q4]", "line 3: .* names 'q4' twice", id="variant-twice"),
        pytest.param("models:\n- id: a\n  task: 5", "line 3: 'task' is 5: it takes a task's name", id="task"),
        pytest.param("models:\n- id: a\n  task: ''", "line 3: 'task' is '': is empty", id="task-empty"),
        pytest.param("models:\n- id: a\n  revision: [x]", "line 3: 'revision' is a list", id="revision-list"),
        pytest.param("models:\n- id: a\n  revision: ../x", "line 3: 'revision' is '../x'", id="revision-path"),
        pytest.param("models:\n- id: a@v1\n  revision: v2", "line 2: .*'v1', but .*'v2'", id="two-revisions"),
        pytest.param("models:\n- a@", "line 2: The revision '' of 'a' is empty", id="empty-revision"),
        pytest.param("models:\n- id: ./a\n  revision: v2", "line 2: './a' is a folder", id="folder"),
        pytest.param("models: [*x]", "line 1: not YAML: found undefined alias", id="alias"),
        pytest.param("defaults: 3\nmodels: [a]", "line 1: 'defaults' is the text '3'", id="defaults-number"),
        pytest.param("defaults:\n  dtype: x\nmodels: [a]", "line 2: 'dtype' is 'x'", id="bad-default"),
        pytest.param("models: [a]\n? [b]\n: 1", "line 2: a key of the manifest must be a word", id="complex-key"),
        pytest.param(b"models:\n- \xff", "line 2: not UTF-8", id="not-utf-8"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(text: str | bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(text)
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert caught.value.message.startswith("Manifest 'models.yaml': ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("org/a\nx y\n", "line 2: .*'x y' is malformed", id="malformed"),
        pytest.param("org/a\n\norg/a\n", "line 3: 'org/a' stands on line 1 already", id="duplicate"),
        pytest.param("# a\n", "lists no models", id="empty"),
        pytest.param("org/a\0\n", "line 1: .*control character", id="nul"),
    ],
)
def test_a_mistake_in_a_text_list_is_told_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(text, "models.txt")


def test_all_mistakes_are_told_at_once_in_the_order_of_lines() -> None:
    with pytest.raises(InputError) as caught:
        read("models:\n- id: a b\n- id: c\n  opset: x\n  zzz: 1\n- id: c\n- id: c\nfoo: 1\ndefaults: {device: x}")
    message = caught.value.message
    found = [message.index(f"line {line}: ") for line in (2, 4, 5, 7, 8, 9)]
    assert found == sorted(found)
    assert "6 problems" in message


def test_many_mistakes_are_counted() -> None:
    with pytest.raises(InputError, match=r"500 problems: line 2: .*and 480 more") as caught:
        read("models:\n" + "- a b\n" * 500)
    assert len(caught.value.message) < 5000


@pytest.mark.parametrize("suffix", ["", ".txt", ".yaml", ".json"])
@pytest.mark.parametrize(
    "letters",
    [
        pytest.param(string.printable, id="printable"),
        pytest.param(string.ascii_letters + " :-#{}[],&*'\"", id="nearly-yaml"),
        pytest.param("".join(map(chr, range(1, 0x2000))), id="any"),
    ],
)
def test_ten_thousand_lines_of_garbage_are_a_paragraph(letters: str, suffix: str) -> None:
    chance = random.Random(suffix + letters)
    lines = ("".join(chance.choices(letters, k=chance.randint(1, 60))) for _ in range(10_000))
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        read("\n".join(lines), f"models{suffix}")
    assert len(caught.value.message) < 10_000
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", ["absent.yaml", "a\0b"])
def test_a_file_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(InputError, match=r"there is no such file in|cannot be read"):
        read_manifest(Path(name))


def test_a_folder_is_no_manifest(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "model", ["gpt2", "org/a.b-c_d", "0x/1", "a" * 96, "org/" + "a" * 96, "_a/b_"], ids=lambda model: model[:12]
)
def test_ids_of_the_hub(model: str) -> None:
    assert read_model(model) == request(model)


@pytest.mark.parametrize(
    "model",
    ["-a", "a-", "a.", "a--b", "a..b", "a.git", "org/", "/".join("abc"), "café", "a" * 97, "org/a:b", "a\\b", "a\n"],
)
def test_malformed_ids(model: str) -> None:
    with pytest.raises(InputError, match="Write org/name"):
        read_model(model)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab-._/ é\n:", max_size=12))
def test_ids_are_judged_as_the_hub_client_judges_them(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    if name.startswith(("./", "../", "/")) or name in (".", ".."):
        return
    try:
        accepted = read_model(name).model_id == name
    except InputError:
        accepted = False
    assert accepted == valid


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(alphabet="models:[]{}-\n ida/@#'\"&*!|>?%,\t", max_size=60).map(str.encode))
def test_no_content_escapes_as_another_error(content: bytes) -> None:
    with contextlib.suppress(InputError):
        assert read(content)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "opset": st.none() | st.integers(7, 30),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "simplify": st.booleans(),
        "task": st.sampled_from(["fill-mask", "text-classification"]),
        "revision": st.from_regex(r"[0-9a-f]{7,40}", fullmatch=True),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPTIONS, min_size=1, max_size=5))
def test_json_and_yaml_read_the_same(models: list[dict[str, object]]) -> None:
    listed = [{"id": f"org/m{number}", **options} for number, options in enumerate(models)]
    lines = ["models:"]
    for model in listed:
        lines += [f"{'- ' if key == 'id' else '  '}{key}: {json.dumps(value)}" for key, value in model.items()]
    by_json, by_yaml = read(json.dumps({"models": listed}), "m.json"), read("\n".join(lines), "m.yaml")
    assert by_json == by_yaml
    assert [found.revision for found in by_json] == [model.get("revision") for model in listed]

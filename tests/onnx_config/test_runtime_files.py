"""What the loader checks of an artifact's files, and where it looks for one that is called by an id."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError
from onnx_config.export.artifact import copy_side_files, list_files, write_ferry_file
from onnx_config.runtime import locate as locating
from onnx_config.runtime.locate import PLACES, locate
from tests.onnx_config.converted import Converted

IDS = np.array([[7, 8, 9, 10]])


@pytest.fixture
def artifact(bert: Converted, tmp_path: Path) -> Path:
    """BERT with its weights beside the graph, as large models have them."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    model = onnx.load(str(bert.stored))
    onnx.save_model(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx_data")
    copy_side_files(bert.source, folder)
    graph = {"role": "model", "path": "model.onnx"}
    write_ferry_file(folder, {"id": "tiny", "graphs": [graph], "parity": {"verdict": "verified"}}, list_files(folder))
    return folder


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def other(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        pytest.param(longer, r"it has \d+ bytes, and \d+ were verified", id="length"),
        pytest.param(other, r"its SHA-256 begins with [0-9a-f]{12}, not [0-9a-f]{12}", id="content"),
    ],
)
def test_a_file_that_is_another_one_is_named(
    artifact: Path, name: str, harm: Callable[[Path], None], words: str
) -> None:
    harm(artifact / name)
    with pytest.raises(InputError, match=rf"{name} in .* is not the file that was compared with PyTorch: {words}"):
        AutoModelForONNX.from_pretrained(artifact)


def test_hashes_are_compared_unless_told_otherwise(artifact: Path) -> None:
    other(artifact / "model.onnx_data")
    model = AutoModelForONNX.from_pretrained(artifact, check_hashes=False)
    assert model(input_ids=IDS).last_hidden_state.shape == (1, 4, 32)


def test_what_a_user_may_edit_is_not_compared(artifact: Path) -> None:
    longer(artifact / "tokenizer_config.json")
    (artifact / "vocab.txt").unlink()
    AutoModelForONNX.from_pretrained(artifact)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not-listed"])
def test_weights_that_are_missing_are_named(artifact: Path, *, listed: bool) -> None:
    (artifact / "model.onnx_data").unlink()
    if not listed:
        (artifact / "ferry.json").unlink()
    with pytest.raises(InputError, match=r"lacks model\.onnx_data, which"):
        AutoModelForONNX.from_pretrained(artifact)


def test_a_cache_of_links_is_read(artifact: Path, tmp_path: Path) -> None:
    """The Hub's cache holds links to files that have other names."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in artifact.iterdir():
        path.rename(tmp_path / f"blob-{path.name}")
        (linked / path.name).symlink_to(tmp_path / f"blob-{path.name}")
    assert AutoModelForONNX.from_pretrained(linked)(input_ids=IDS).last_hidden_state.shape == (1, 4, 32)


def test_sessions_can_be_told_how_to_run(artifact: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = AutoModelForONNX.from_pretrained(
        artifact, session_options=options, providers=[("CPUExecutionProvider", {})]
    )
    assert model.session.get_session_options().intra_op_num_threads == 1
    assert model.session.get_providers() == ["CPUExecutionProvider"]


def test_outputs_have_the_class_of_the_architecture(artifact: Path) -> None:
    """By the config where there is no better word, and by none where the graph gives something else."""
    output = transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions
    model = AutoModelForONNX.from_pretrained(artifact)
    assert type(model(input_ids=IDS)) is output
    with pytest.raises(InputError, match="the graph gives no hidden_states"):
        model(input_ids=IDS, output_hidden_states=True)


# -------------------------------------------------------------------------------------------------------------- ids


class Place:
    """An entry point, as `importlib.metadata` has it."""

    def __init__(self, **known: Path) -> None:
        self.known, self.asked = known, list[str]()

    def load(self) -> Callable[[str], Path | None]:
        return self.find

    def find(self, name: str) -> Path | None:
        self.asked.append(name)
        return self.known.get(name.replace("/", "_").partition("@")[0])


@pytest.fixture
def place(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(org_name=artifact)

    def points(group: str) -> list[Place]:
        assert group == PLACES
        return [made]

    monkeypatch.setattr(locating, "entry_points", points)
    return made


@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        pytest.param("org/name", {}, "org/name", id="an-id"),
        pytest.param("org/name@v1", {}, "org/name@v1", id="at-a-revision"),
        pytest.param("org/name", {"revision": "v1"}, "org/name@v1", id="its-revision-apart"),
    ],
)
def test_places_are_asked_for_an_id(
    place: Place, artifact: Path, name: str, options: dict[str, Any], asked: str
) -> None:
    found = locate(name, **options)
    assert (found.folder, place.asked) == (artifact, [asked])
    assert AutoModelForONNX.from_pretrained(name, **options).folder == artifact


def test_a_folder_that_is_there_comes_first(place: Place, artifact: Path) -> None:
    assert locate(artifact).folder == artifact
    assert place.asked == []


def test_a_model_that_was_converted_is_found_by_its_own_folder(
    place: Place, artifact: Path, bert: Converted, tmp_path: Path
) -> None:
    """At its present content: what was converted before it changed is another model."""
    source = Path(shutil.copytree(bert.source, tmp_path / "source"))
    place.known[str(source).replace("/", "_")] = artifact
    assert locate(source).folder == artifact
    longer(source / "vocab.txt")
    assert locate(source).folder == artifact
    assert len(place.asked) == len(set(place.asked)) == 2
    assert all(name.startswith(f"{source}@") for name in place.asked)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("./nowhere", r"'\./nowhere' is no folder, nor known to the catalog", id="no-folder"),
        pytest.param("a/b/c", "'a/b/c' is no folder, nor known to the catalog", id="no-id"),
    ],
)
def test_what_nobody_knows_is_not_found(place: Place, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        locate(name)
    assert caught.value.kind is ErrorKind.NOT_FOUND
    assert place.asked == [name]


def test_of_the_hub_only_what_is_meant_is_fetched(
    place: Place, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of transformers.js, with all the variants that there are of it."""
    (artifact / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (artifact / name).rename(artifact / "onnx" / name)
    (artifact / "ferry.json").unlink()
    names = ["config.json", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_fp16.onnx", "model.safetensors"]
    fetched: list[str] = []

    def download(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
        assert name == "org/theirs@v1"
        fetched.extend(choose(names))
        return artifact

    monkeypatch.setattr(locating.hub, "download_chosen", download)
    model = AutoModelForONNX.from_pretrained("org/theirs", revision="v1")
    assert fetched == ["onnx/model.onnx", "onnx/model.onnx_data"]
    assert (place.asked, model.folder) == (["org/theirs@v1"], artifact)
    names.remove("onnx/model.onnx")
    shutil.rmtree(artifact / "onnx")
    with pytest.raises(InputError, match=r"'org/theirs@v1' on the Hub holds no model\.onnx"):
        AutoModelForONNX.from_pretrained("org/theirs@v1")


def test_the_catalog_is_among_the_places() -> None:
    """As pyproject.toml has it, which an installation copies."""
    import importlib
    import tomllib

    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    (target,) = table["project"]["entry-points"][PLACES].values()
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))

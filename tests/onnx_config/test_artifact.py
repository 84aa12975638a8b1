"""The files of an artifact: which travel along, their address, and what ``ferry.json`` keeps."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_config.errors import InputError
from onnx_config.export import artifact
from onnx_config.export.artifact import (
    ArtifactFile,
    content_address,
    copy_side_files,
    list_files,
    read_ferry_file,
    write_ferry_file,
)

TRAVEL = (
    "1_Pooling/config.json",
    "LICENSE",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
STAY = (
    ".gitattributes",
    ".cache/config.json",
    "1_Pooling/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "README.md",
    "ReadMe.MD",
    "checkpoints/deep/config.json",
    "data.pickle",
    "ferry.json",
    "flax_model.msgpack",
    "model.Q4.gguf",
    "model.fp16.safetensors",
    "model.onnx",
    "model.onnx.data",
    "model.onnx_data",
    "model.safetensors",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "scheduler.pt",
    "tf_model.h5",
    "tokenizer.pkl",
    "training_args.bin",
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\r\n", encoding="utf-8")


def test_config_tokenizer_and_processor_travel_as_they_came_and_the_rest_stays(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    write(source, *TRAVEL, *STAY)
    assert sorted(copy_side_files(source, target)) == sorted(TRAVEL)
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert there == set(TRAVEL)
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in TRAVEL)


def test_a_large_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_LARGEST_SIDE_FILE_BYTES", 10)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "vocab.txt").write_bytes(b"x" * 10)
    (source / "tokenizer.json").write_bytes(b"x" * 11)
    assert copy_side_files(source, target) == ("vocab.txt",)


def test_links_are_followed_as_the_hub_cache_needs(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(tmp_path, "blobs/abc")
    source.mkdir()
    target.mkdir()
    (source / "config.json").symlink_to(tmp_path / "blobs/abc")
    copy_side_files(source, target)
    assert not (target / "config.json").is_symlink()
    assert (target / "config.json").read_bytes() == (tmp_path / "blobs/abc").read_bytes()


def address(folder: Path) -> str:
    return content_address(list_files(folder))


def test_the_address_is_that_of_names_and_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, "model.onnx", "config.json", "1_Pooling/config.json")
    write(second, "1_Pooling/config.json", "config.json", "model.onnx")
    for number, path in enumerate(sorted(second.rglob("*"))):
        os.utime(path, (number, number))
    before = address(first)
    assert address(second) == before
    assert len(before) == 64
    (second / "config.json").rename(second / "config2.json")
    assert address(second) != before


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "1_Pooling/ferry.json"])
@pytest.mark.parametrize("position", [0, 5, -1])
def test_every_byte_counts(tmp_path: Path, name: str, position: int) -> None:
    write(tmp_path, "model.onnx", "config.json", "1_Pooling/ferry.json")
    before = address(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[position] ^= 1
    (tmp_path / name).write_bytes(content)
    assert address(tmp_path) != before


def test_a_name_that_is_no_utf_8_is_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"vocab-\xff.txt")
    (tmp_path / name).write_bytes(b"words")
    files = list_files(tmp_path)
    write_ferry_file(tmp_path, {}, files)
    value = read_ferry_file(tmp_path)
    assert value is not None
    assert list(value["files"]) == [name]
    assert len(content_address(files)) == 64


def test_its_own_ferry_file_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, "model.onnx")
    before = address(tmp_path)
    write_ferry_file(tmp_path, {}, list_files(tmp_path))
    assert address(tmp_path) == before
    assert [file.path for file in list_files(tmp_path)] == ["model.onnx"]


FILES = st.lists(
    st.builds(
        ArtifactFile,
        path=st.text(st.characters(exclude_characters="\0"), min_size=1),
        size_bytes=st.integers(0, 2**40),
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    ),
    unique_by=lambda file: file.path,
    min_size=1,
    max_size=5,
)


@given(FILES, st.randoms(use_true_random=False))
def test_the_order_of_files_does_not_matter(files: list[ArtifactFile], random: Any) -> None:
    before = content_address(files)
    random.shuffle(files)
    assert content_address(files) == before
    assert content_address([*files[1:], replace(files[0], path=files[0].path + "\n")]) != before
    assert content_address(files[1:]) != before


def test_a_ferry_file_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "model.onnx", "1_Pooling/config.json")
    files = list_files(tmp_path)
    entry = {"id": "org/näme", "parity": {"verdict": "verified", "max_abs_diff": 1.2e-6}, "error": None}
    path = write_ferry_file(tmp_path, entry, files)
    assert path == tmp_path / "ferry.json"
    value = read_ferry_file(tmp_path)
    assert value is not None
    assert value["model"] == entry
    assert value["files"] == {f.path: {"sha256": f.sha256, "size_bytes": f.size_bytes} for f in files}
    assert {p.name for p in tmp_path.iterdir()} == {"ferry.json", "model.onnx", "1_Pooling"}


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    outputs = ({"max_abs_diff": float("inf"), "tolerance": 0.5}, {"max_abs_diff": float("nan")})
    text = write_ferry_file(tmp_path, {"parity": {"outputs": outputs}}, []).read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    value = read_ferry_file(tmp_path)
    assert value is not None
    assert value["model"] == {"parity": {"outputs": [{"max_abs_diff": None, "tolerance": 0.5}, {"max_abs_diff": None}]}}


def test_no_ferry_file_is_none(tmp_path: Path) -> None:
    assert read_ferry_file(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"{", "cannot be read", id="no-json"),
        pytest.param(b"\xff", "cannot be read", id="no-text"),
        pytest.param(b"[" * 100_000, "cannot be read", id="nested-without-end"),
        pytest.param(b"[]", "is not of schema 1", id="a-list"),
        pytest.param(b'{"model": {}}', "is not of schema 1", id="no-schema"),
        pytest.param(json.dumps({"schema": 2, "model": {}}).encode(), "or upgrade onnx-ferry", id="another-schema"),
        pytest.param(b'{"schema": 1}', "is not of schema 1", id="no-model"),
    ],
)
def test_a_ferry_file_that_is_unreadable_is_an_error(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "ferry.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_ferry_file(tmp_path)


def test_a_ferry_file_that_is_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ferry.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_ferry_file(tmp_path)

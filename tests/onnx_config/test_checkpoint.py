"""Weights are whole and complete, or there is an error that names the file: never a random remainder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from onnx_config.errors import ErrorKind, InputError
from onnx_config.export.checkpoint import check_weights, load_model, weight_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("bert-model", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, cls: str | None = None, **options: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures is not None
    return load_model(getattr(transformers, cls or config.architectures[0]), config, folder, **options)


def rewrite(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))


def with_header(header: bytes) -> Change:
    def change(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return rewrite(change)


def shard(folder: Path) -> list[str]:
    """Save the weights again as two shards with an index, and return the shards' names."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: v for k, v in tensors.items() if places[k] == name}, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def write_index(content: str) -> Change:
    def change(folder: Path) -> None:
        shard(folder)
        (folder / INDEX).write_text(content)

    return change


def lose_a_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def truncate_a_shard(folder: Path) -> None:
    path = folder / shard(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])


def only_pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def on_folder(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return on_folder


def fill(name: str, value: float) -> Change:
    return edit_tensors(lambda tensors: tensors[name].flatten()[3:4].fill_(value))


def drop(part: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return edit_tensors(change)


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))


NESTED = b"[" * 100_000
HUGE = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(rewrite(lambda data: data[:4]), "it has 4 bytes", id="cut-in-the-length"),
        pytest.param(
            rewrite(lambda data: data[:100]), "its header of .* bytes does not fit into 100", id="cut-in-header"
        ),
        pytest.param(rewrite(lambda data: data[:-1000]), "bytes where its header asks for", id="cut-in-the-data"),
        pytest.param(rewrite(lambda data: data[:-1]), "bytes where its header asks for", id="one-byte-short"),
        pytest.param(rewrite(lambda data: data + b"x"), "bytes where its header asks for", id="one-byte-too-many"),
        pytest.param(rewrite(lambda data: b""), "it has 0 bytes", id="empty-file"),
        pytest.param(rewrite(lambda data: b"<html>" + data), "header of .* bytes does not fit", id="not-safetensors"),
        pytest.param(rewrite(lambda data: b"\xff" * 8 + data[8:]), "header of .* does not fit", id="huge-header"),
        pytest.param(with_header(b"{nonsense"), "its header cannot be read", id="header-is-no-json"),
        pytest.param(with_header(b"\xff\xfe"), "its header cannot be read", id="header-is-no-text"),
        pytest.param(with_header(b"[1, 2]"), "its header cannot be read", id="header-is-a-list"),
        pytest.param(with_header(b'{"w": 1}'), "its header cannot be read", id="tensor-without-offsets"),
        pytest.param(with_header(NESTED), "its header cannot be read", id="header-nested-without-end"),
        pytest.param(with_header(HUGE), "its header cannot be read", id="offset-without-end"),
        pytest.param(lose_a_shard, "lacks 1 of 2 shards: model-00002-of-00002.safetensors", id="shard-missing"),
        pytest.param(truncate_a_shard, "model-00002-of-00002.*asks for", id="shard-truncated"),
        pytest.param(write_index("{"), "is no index of shards", id="index-is-no-json"),
        pytest.param(write_index("[]"), "is no index of shards", id="index-is-a-list"),
        pytest.param(write_index("[" * 100_000), "is no index of shards", id="index-nested-without-end"),
        pytest.param(write_index('{"weight_map": {}}'), "names no shards", id="index-is-empty"),
        pytest.param(write_index('{"weight_map": {"w": 5}}'), "lacks 1 of 1 shards", id="index-names-a-number"),
        pytest.param(write_index('{"weight_map": {"w": "../x.safetensors"}}'), "outside its folder", id="index-climbs"),
        pytest.param(write_index('{"weight_map": {"w": "/etc/passwd"}}'), "outside its folder", id="index-is-absolute"),
        pytest.param(write_index('{"weight_map": {"w": ".."}}'), "lacks 1 of 1", id="index-names-a-folder"),
        pytest.param(only_pickled, "pickled files only, which can run code", id="pickled-only"),
        pytest.param(lambda folder: (folder / SINGLE).unlink(), "has no weights", id="none"),
    ],
)
def test_files_that_are_not_whole_are_refused(folder: Path, change: Change, said: str) -> None:
    change(folder)
    with pytest.raises(InputError, match=said) as caught:
        check_weights(folder)
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert str(folder) in str(caught.value)
    with pytest.raises(InputError, match=said):
        load(folder)


def test_a_header_longer_than_the_format_allows_is_not_read(folder: Path) -> None:
    with (folder / SINGLE).open("r+b") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_009)  # a hole, which takes no room on the disk
    with pytest.raises(InputError, match="longer than the format allows"):
        check_weights(folder)


def test_whole_files_are_counted(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert check_weights(folder) == size
    assert weight_files(folder) == (folder / SINGLE,)
    names = shard(folder)
    assert check_weights(folder) == size
    assert weight_files(folder) == tuple(folder / name for name in names)


def test_one_file_and_its_shards_give_the_same_model(folder: Path, whole: Path) -> None:
    shard(folder)
    a, b = load(whole).state_dict(), load(folder).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loaded_model_evaluates_in_the_type_asked_for(whole: Path) -> None:
    model = load(whole, dtype="float16")
    assert (model.training, next(model.parameters()).dtype) == (False, torch.float16)


@pytest.mark.parametrize(
    ("change", "cls", "said"),
    [
        pytest.param(
            fill("encoder.layer.1.output.dense.weight", float("nan")),
            None,
            "holds NaN or infinite weights in encoder.layer.1.output.dense.weight",
            id="nan",
        ),
        pytest.param(fill("pooler.dense.bias", float("-inf")), None, "infinite weights in pooler.dense.bias", id="inf"),
        pytest.param(drop(""), None, "has no weights for .* and .* more, which BertModel needs", id="no-tensors"),
        pytest.param(
            drop("layer.0.output.dense.bias"), None, "no weights for encoder.layer.0.output", id="one-missing"
        ),
        pytest.param(
            lambda folder: None,
            "BertForSequenceClassification",
            r"no weights for classifier\.bias, classifier\.weight, which BertForSequenceClassification needs; they "
            "would be random. Ask for the task that it was trained for",
            id="head-missing",
        ),
        pytest.param(drop("pooler"), "BertForSequenceClassification", "no weights for", id="pooler-and-head-missing"),
        pytest.param(widen, None, "do not fit their config.json", id="other-shapes"),
    ],
)
def test_weights_that_are_no_model_are_refused(folder: Path, change: Change, cls: str | None, said: str) -> None:
    change(folder)
    with pytest.raises(InputError, match=said):
        load(folder, cls)


def test_values_are_not_looked_at_when_told_so(folder: Path) -> None:
    fill("pooler.dense.bias", float("nan"))(folder)
    assert load(folder, check_values=False) is not None


def test_a_statistic_that_is_nan_is_refused_and_an_infinite_mask_is_not(tmp_path: Path) -> None:
    folder = tiny_models.build("resnet-model", tmp_path)
    name = next(key for key in load_file(folder / SINGLE) if key.endswith("running_var"))
    fill(name, float("inf"))(folder)
    load(folder)
    fill(name, float("nan"))(folder)
    with pytest.raises(InputError, match=f"infinite weights in {name}"):
        load(folder)


def test_a_missing_pooler_is_left_out_where_the_class_can_do_without(folder: Path) -> None:
    drop("pooler")(folder)
    assert load(folder).pooler is None


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = tiny_models.build("bert-masked-lm", tmp_path)
    assert "cls.predictions.decoder.weight" not in load_file(folder / SINGLE)
    model = load(folder)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight

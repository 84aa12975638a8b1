"""Models of other libraries through the same commands as any other: detected, converted, registered, loaded back."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_config import AutoModelForONNX, UniversalOnnxConfig
from tests.faults import harness
from tests.onnx_config.sentence_folders import HIDDEN, write_sentence_folder

POOLINGS = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
SENTENCES = ["The ferry leaves at seven.", "Fog.", "Cast off, said the captain, and the ice is thin but sharp."]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with every way of pooling, a dense layer and a norm, after `ferry batch`, and its entry."""
    root = tmp_path_factory.mktemp("libraries")
    modules = [
        ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": POOLINGS}),
        ("Dense", {"in_features": HIDDEN * len(POOLINGS), "out_features": 24}),
        ("Normalize", None),
    ]
    folder = write_sentence_folder(root / "sentences", modules, inner="0_Transformer")
    foreign = write_sentence_folder(root / "foreign", [("custom_st.Pooling", {})])
    timm = root / "timm"
    timm.mkdir()
    (timm / "config.json").write_text(
        json.dumps({"architecture": "no_such_net", "num_classes": 7, "pretrained_cfg": {}})
    )
    manifest = harness.write_manifest(root / "models.yaml", [folder, foreign, timm])
    report = root / "report.json"
    done = harness.ferry(
        "batch", str(manifest), "--engine", "local", "--report", str(report), "--output", str(root / "out"),
        home=root / "home", cwd=root,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return folder, {Path(entry["id"]).name: entry for entry in json.loads(report.read_text())["models"]}


@pytest.mark.slow
def test_a_folder_of_sentence_transformers_becomes_one_graph(converted: tuple[Path, dict[str, Any]]) -> None:
    entry = converted[1]["sentences"]
    assert (entry["status"], entry["task"], entry["architecture"]) == ("converted", "feature-extraction", "BertModel")
    assert entry["parity"]["axes_proven"] == ["batch_size", "sequence_length"]
    assert [o["name"] for o in entry["graphs"][0]["outputs"]] == ["token_embeddings", "sentence_embedding"]
    assert entry["graphs"][0]["outputs"][1]["shape"] == ["batch_size", 24]


@pytest.mark.slow
def test_the_artifact_answers_as_the_library_does(converted: tuple[Path, dict[str, Any]]) -> None:
    folder, entries = converted
    with warnings.catch_warnings():
        # The library's own dependencies warn of one another while they are imported.
        warnings.simplefilter("ignore")
        st = pytest.importorskip("sentence_transformers", reason="no sentence-transformers to compare with")
        library = st.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        expected = library.encode(SENTENCES)
        model = AutoModelForONNX.from_pretrained(entries["sentences"]["artifact"])
        batch = library.tokenizer(SENTENCES, padding=True, return_tensors="pt")
        found = model(**batch).sentence_embedding.numpy()
    assert float(np.abs(expected).max()) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_artifact_has_what_loaders_look_for(converted: tuple[Path, dict[str, Any]]) -> None:
    artifact = Path(converted[1]["sentences"]["artifact"])
    names = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    assert {"model.onnx", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    found = UniversalOnnxConfig.from_pretrained(artifact)
    assert found.get_output_names() == ["token_embeddings", "sentence_embedding"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("foreign", "brings its own code for a module (custom_st.Pooling)", id="own-code"),
        pytest.param("timm", "no_such_net", id="timm"),
    ],
)
def test_what_cannot_be_converted_is_unsupported(converted: tuple[Path, dict[str, Any]], name: str, words: str) -> None:
    entry = converted[1][name]
    assert (entry["status"], entry["error"]["kind"]) == ("failed", "unsupported")
    assert words in entry["error"]["message"]


@pytest.mark.slow
def test_another_pooling_is_another_model(converted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from onnx_config.hub import resolve

    copy = tmp_path / "copy"
    shutil.copytree(converted[0], copy)
    assert resolve(str(copy)).revision == converted[1]["sentences"]["revision"]
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": HIDDEN, "pooling_mode": "cls"}))
    assert resolve(str(copy)).revision != converted[1]["sentences"]["revision"]

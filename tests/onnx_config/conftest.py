"""Models traced once for all tests: a planted fault is an edit of the stored graph and costs nothing."""

from __future__ import annotations

import pytest

from tests.onnx_config.converted import Converted, convert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """BERT's backbone: three inputs, a mask, two outputs, two axes."""
    return convert("bert-model", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """ViT with a head: one float input, one axis."""
    return convert("vit-image-classification", tmp_path_factory.mktemp("vit"))

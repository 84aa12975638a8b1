"""What the exporter is to replace for us is there while it traces, and gone afterwards."""

from __future__ import annotations

import torch

from onnx_config.export.exporter_changes import exporter_changes
from onnx_config.export.fourier import transforms_by_tables
from onnx_config.export.scattered import scattered_if_any


def test_the_exporter_is_left_as_it_was() -> None:
    from transformers.exporters.exporter_onnx import _ONNX_TRANSLATION_TABLE
    from transformers.exporters.utils import _PATCHES

    before, table = list(_PATCHES["onnx"]), dict(_ONNX_TRANSLATION_TABLE)
    change = ("torch", "roll", lambda original: original)
    with exporter_changes(change), scattered_if_any(), transforms_by_tables(torch.nn.Identity()):
        assert _PATCHES["onnx"][len(before)] == change
        assert len(_PATCHES["onnx"]) == len(before) + 8
    assert _PATCHES["onnx"] == before
    assert table == _ONNX_TRANSLATION_TABLE

"""Which arguments of ``forward`` are fed, by what a class and a config declare."""

from __future__ import annotations

import pytest
import transformers

from onnx_config.declarations import declare
from onnx_config.proposal import propose_inputs


@pytest.mark.parametrize(
    ("bidirectional", "segments"),
    [pytest.param(True, True, id="sees-ahead"), pytest.param(False, False, id="causal")],
)
def test_what_tells_where_tokens_see_later_ones_is_fed_where_some_do(bidirectional: bool, segments: bool) -> None:
    text = transformers.GemmaConfig(use_bidirectional_attention=bidirectional)
    config = transformers.PaliGemmaConfig(text_config=text)
    names = propose_inputs(
        declare(transformers.PaliGemmaForConditionalGeneration), config, (), task_family="text-generation"
    )
    assert {"input_ids", "pixel_values", "attention_mask"} <= {*names}
    assert ("token_type_ids" in names) == segments

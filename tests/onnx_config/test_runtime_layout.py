"""Which graphs belong together: by the names in use, by what ``ferry.json`` lists, and what is said if not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from onnx_config.errors import ErrorKind, FerryError, InputError
from onnx_config.parts import Role
from onnx_config.runtime.layout import Choice, companions, find_graphs, graphs_to_load

ENCODER, PAIR, MERGED = (
    "encoder_model.onnx",
    ("decoder_model.onnx", "decoder_with_past_model.onnx"),
    "decoder_model_merged.onnx",
)
ALL = (ENCODER, *PAIR, MERGED)


def inside(*names: str) -> list[str]:
    return [f"onnx/{name}" for name in names]


@pytest.mark.parametrize(
    ("names", "choice", "found"),
    [
        pytest.param(["model.onnx"], {}, {"model": "model.onnx"}, id="one-graph"),
        pytest.param(["onnx/model.onnx"], {}, {"model": "onnx/model.onnx"}, id="transformers.js"),
        pytest.param(["model.onnx", "onnx/model.onnx"], {}, {"model": "model.onnx"}, id="the-top-comes-first"),
        pytest.param(
            ["model.onnx", "onnx/model.onnx"], {"subfolder": "onnx"}, {"model": "onnx/model.onnx"}, id="a-subfolder"
        ),
        pytest.param(ALL, {}, {"encoder": ENCODER, "decoder_merged": MERGED}, id="the-merged-decoder"),
        pytest.param(
            ALL,
            {"merged": False},
            {"encoder": ENCODER, "decoder": PAIR[0], "decoder_with_past": PAIR[1]},
            id="the-two-decoders",
        ),
        pytest.param(
            [ENCODER, *PAIR], {}, {"encoder": ENCODER, "decoder": PAIR[0], "decoder_with_past": PAIR[1]}, id="two"
        ),
        pytest.param([ENCODER, PAIR[0]], {}, {"encoder": ENCODER, "decoder": PAIR[0]}, id="no-cache"),
        pytest.param(
            inside(ENCODER, MERGED),
            {},
            {"encoder": f"onnx/{ENCODER}", "decoder_merged": f"onnx/{MERGED}"},
            id="transformers.js-parts",
        ),
        pytest.param(
            inside(ENCODER, MERGED, "encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"),
            {"variant": "quantized"},
            {
                "encoder": "onnx/encoder_model_quantized.onnx",
                "decoder_merged": "onnx/decoder_model_merged_quantized.onnx",
            },
            id="a-variant",
        ),
        pytest.param(["model.onnx", *PAIR, MERGED], {}, {"model": "model.onnx"}, id="older-files-beside-one-graph"),
        pytest.param([*PAIR], {}, {"decoder": PAIR[0], "decoder_with_past": PAIR[1]}, id="older-optimum"),
        pytest.param(inside(*PAIR, MERGED), {}, {"decoder_merged": f"onnx/{MERGED}"}, id="older-transformers.js"),
        pytest.param(
            ["onnx/text_model.onnx"], {"file_name": "text_model.onnx"}, {"model": "onnx/text_model.onnx"}, id="by-name"
        ),
        pytest.param(
            ["decoder_model_merged_q4.onnx"],
            {"file_name": "decoder_model_merged_q4.onnx"},
            {"decoder_merged": "decoder_model_merged_q4.onnx"},
            id="a-merged-one-by-name",
        ),
        pytest.param(["readme.md"], {}, {}, id="nothing"),
    ],
)
def test_graphs_are_found_by_name(names: list[str], choice: dict[str, Any], found: dict[str, str]) -> None:
    wanted = Choice(**choice)
    graphs = find_graphs(names, origin="it", choice=wanted)
    assert graphs_to_load(graphs, wanted, origin="it") == {Role(role): path for role, path in found.items()}


@pytest.mark.parametrize(
    ("names", "choice", "words"),
    [
        pytest.param([ENCODER], {}, r"lacks decoder_model\.onnx, the decoder of its encoder", id="no-decoder"),
        pytest.param([ENCODER, PAIR[1]], {}, r"lacks decoder_model\.onnx, the decoder that begins", id="no-beginning"),
        pytest.param(inside(ENCODER), {}, r"lacks onnx/decoder_model\.onnx", id="in-its-folder"),
        pytest.param(
            ["model.onnx"], {"file_name": "other.onnx"}, "has no file 'other.onnx' in its top or onnx/", id="name"
        ),
        pytest.param(
            inside("model.onnx", "model_q4.onnx", "model_fp16.onnx_data", "model_fp16.onnx"),
            {"variant": "int8"},
            "no graph of the variant 'int8'; it has float32, which is loaded without one, fp16, q4",
            id="variant",
        ),
        pytest.param(
            [ENCODER, MERGED, PAIR[0]],
            {"variant": "q4"},
            "'q4'; it has float32, which is loaded without one. Convert",
            id="no-variant-at-all",
        ),
        pytest.param([ENCODER, *PAIR], {"merged": True}, "merged=True, and has no decoder_model_merged", id="unmerged"),
        pytest.param(
            [ENCODER, MERGED], {"merged": False}, r"merged=False, and has no decoder_model\.onnx", id="merged"
        ),
    ],
)
def test_what_is_missing_is_named(names: list[str], choice: dict[str, Any], words: str) -> None:
    wanted = Choice(**choice)
    with pytest.raises(InputError, match=words) as caught:
        graphs_to_load(find_graphs(names, origin="it", choice=wanted), wanted, origin="it")
    assert caught.value.kind is ErrorKind.NOT_FOUND


def listing(*graphs: tuple[str, Any]) -> dict[str, Any]:
    return {"model": {"graphs": [{"role": role, "path": path} for role, path in graphs]}}


def test_what_ferry_json_lists_comes_first() -> None:
    listed = listing(("encoder", "a/first.onnx"), ("decoder", "second.onnx"))
    found = find_graphs(["model.onnx", "a/first.onnx", "second.onnx"], origin="it", listed=listed)
    assert found == {Role.ENCODER: "a/first.onnx", Role.DECODER: "second.onnx"}
    assert find_graphs(["model.onnx"], origin="it", listed={"model": {}}) == {Role.MODEL: "model.onnx"}


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        pytest.param(listing(("encoder", ENCODER), ("decoder_with_past", PAIR[1])), f"lacks {PAIR[1]}", id="missing"),
        pytest.param(listing(("model", "../model.onnx")), "is no file of the artifact", id="outside"),
        pytest.param(listing(("model", "/etc/model.onnx")), "is no file of the artifact", id="absolute"),
        pytest.param(listing(("model", None)), "is no file of the artifact", id="no-path"),
        pytest.param(
            listing(("spare_wheel", "model.onnx")), "computes its spare_wheel, which this version", id="unknown"
        ),
    ],
)
def test_a_list_that_cannot_be_followed_is_an_error(listed: dict[str, Any], words: str) -> None:
    with pytest.raises(FerryError, match=re.escape(words).replace(r"\ ", " ")):
        find_graphs(["model.onnx", ENCODER], origin="it", listed=listed)


def test_the_encoder_runs_first_however_graphs_are_listed() -> None:
    listed = listing(("decoder_merged", MERGED), ("encoder", ENCODER))
    found = find_graphs([ENCODER, MERGED], origin="it", listed=listed)
    assert list(graphs_to_load(found, Choice(), origin="it")) == [Role.ENCODER, Role.DECODER_MERGED]


def test_weights_beside_a_graph_go_with_it() -> None:
    beside = ["model.onnx.data", "model.onnx_data", "model.onnx_data_1"]
    others = ["model.onnx", "model.onnx_database", "model_fp16.onnx_data", "other.onnx_data"]
    assert list(companions([*others, *beside], "model.onnx")) == beside

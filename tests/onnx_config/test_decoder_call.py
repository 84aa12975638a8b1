"""What a decoder is handed: several positions for a token, and what else was made of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnx_config.decoder_call import decoder_call, decoder_calls, in_rows, made_of_images
from onnx_config.errors import InputError
from onnx_config.spec import LayeredFeatures
from onnx_config.trial import Trial


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([[[1, 2]], [[3, 4]], [[5, 6]]], [[[1, 2]], [[3, 4]], [[5, 6]]], id="as-many"),
        pytest.param([[[9, 9]], [[1, 2]], [[3, 4]], [[5, 6]]], [[[1, 2]], [[3, 4]], [[5, 6]]], id="one-more"),
        pytest.param([[[1, 2]]], [[[1, 2]]] * 3, id="one-for-all"),
        pytest.param([[1, 2]], [[[1, 2]]] * 3, id="one-for-each-token"),
    ],
)
def test_positions_are_brought_to_as_many_rows(given: Any, expected: Any) -> None:
    assert in_rows(torch.tensor(given), 3, 1, 2).tolist() == expected


def test_one_text_of_positions_holds_for_all() -> None:
    assert in_rows(torch.arange(4)[None], 3, 2, 4).shape == (3, 2, 4)


@pytest.mark.parametrize("shape", [(2, 1, 4), (5, 1, 4), (3, 2, 4), (3, 1, 3), (4,)])
def test_others_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="takes 3 positions for each token"):
        in_rows(torch.zeros(shape), 3, 1, 4)


def test_what_is_made_of_images_is_told_from_what_a_text_comes_with() -> None:
    tensor = torch.zeros(1)
    given = {"inputs_embeds": tensor, "position_ids": tensor, "mask": None, "layers": [[tensor]], "use_cache": True}
    assert made_of_images(given) == ["layers"]


class _Decoder(torch.nn.Module):
    def forward(self, inputs_embeds: torch.Tensor, position_ids: Any = None, **others: Any) -> torch.Tensor:
        return inputs_embeds


class _Reader(torch.nn.Module):
    """Counts positions by an input, in as many rows as its config says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.language_model = _Decoder()

    def get_decoder(self) -> torch.nn.Module:
        return self.language_model

    def forward(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.config["rows"]
        positions = None if rows is None else torch.zeros(rows, 1, 2)
        return {"logits": self.language_model(values, positions, seen=values if self.config["more"] else None)}


@pytest.mark.parametrize(("rows", "more", "handed"), [(3, False, ()), (4, True, ("seen",)), (None, False, ())])
def test_the_call_of_a_decoder_is_seen(rows: int | None, more: bool, handed: tuple[str, ...]) -> None:
    trial = Trial(_Reader, {"rows": rows, "more": more})
    found = decoder_call(trial, {"values": np.zeros((1, 2, 3), np.float32)}, {})
    assert (found.position_rows, found.handed) == (rows, handed)


def test_calls_are_noted_until_the_end() -> None:
    model = _Reader({"rows": None, "more": False})
    with decoder_calls(model) as calls:
        model(torch.zeros(1, 2, 3))
    model(torch.zeros(1, 2, 3))
    assert [call["inputs_embeds"].shape for call in calls] == [(1, 2, 3)]


class _Layered(torch.nn.Module):
    """Hands its decoder a list of features and a mask of the tokens that stand for images."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.language_model = _Decoder()

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def get_decoder(self) -> torch.nn.Module:
        return self.language_model

    def get_image_features(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        layers = [(pixel_values[:1] * scale, pixel_values[1:] * scale) for scale in (2, 3)]
        return {"pooler_output": pixel_values, "deep_features": layers}

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        layers = [torch.cat(layer) for layer in self.get_image_features(pixel_values)["deep_features"]]
        mask = input_ids == self.config["token"]
        return {
            "logits": self.language_model(pixel_values, deep=[layer + self.config["off"] for layer in layers], at=mask)
        }


ARRAYS = {"input_ids": np.array([[1, 7, 7, 7]]), "pixel_values": np.arange(6, dtype=np.float32).reshape(3, 2)}


def test_features_for_layers_are_known_by_their_numbers_and_their_places() -> None:
    found = decoder_call(Trial(_Layered, {"token": 7, "off": 0}), ARRAYS, {}, stand_ins=(7,))
    assert found.layered == LayeredFeatures(field="deep_features", argument="deep", mask="at", count=2)
    assert found.handed == ()
    assert found.layered.made == ("deep_features.0", "deep_features.1")
    assert found.layered.taken == ("deep.0", "deep.1")


@pytest.mark.parametrize(
    "config", [{"token": 7, "off": 1}, {"token": 1, "off": 0}], ids=["other-numbers", "other-places"]
)
def test_what_is_made_of_them_otherwise_is_handed_unknown(config: dict[str, int]) -> None:
    found = decoder_call(Trial(_Layered, config), ARRAYS, {}, stand_ins=(7,))
    assert (found.layered, found.handed) == (None, ("deep", "at"))

"""The features of tiles put together in tensors: as transformers' own loops over pictures do it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
import transformers
from transformers.image_processing_utils import select_best_resolution

from onnx_config.export.packed_tiles import Packing, best_resolutions, packed

_TILE, _PATCH, _WIDTH = 24, 4, 5
_SIDE = _TILE // _PATCH
_GRIDS = [(high * _TILE, wide * _TILE) for high in range(1, 5) for wide in range(1, 5)]


def _sizes(seed: int, count: int) -> list[tuple[int, int]]:
    random = Random(seed)
    # Of those that tiles fit exactly, of squares and of any.
    kinds = [
        lambda: random.choice(_GRIDS),
        lambda: (edge := random.randrange(1, 300), edge),
        lambda: (random.randrange(1, 400), random.randrange(1, 400)),
    ]
    return [random.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_resolution_is_the_one_that_transformers_finds(seed: int) -> None:
    sizes = _sizes(seed, 300)
    found = best_resolutions(torch.tensor(sizes), _GRIDS)
    assert found.tolist() == [list(select_best_resolution(size, _GRIDS)) for size in sizes]


def _model(*, fewer: bool) -> Any:
    """Return a model that puts features together, of so small a size that nothing else of it matters."""
    text: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                            "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 32}  # fmt: skip
    vision: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                              "intermediate_size": 16, "image_size": _TILE, "patch_size": _PATCH}  # fmt: skip
    pinpoints = [list(pair) for pair in _GRIDS]
    if fewer:
        return transformers.LlavaOnevisionModel(
            transformers.LlavaOnevisionConfig(
                vision_config={**vision, "model_type": "siglip_vision_model"},
                text_config={**text, "model_type": "qwen2"},
                image_grid_pinpoints=pinpoints,
            )
        )
    return transformers.LlavaNextModel(
        transformers.LlavaNextConfig(
            vision_config={**vision, "model_type": "clip_vision_model"},
            text_config={**text, "model_type": "llama"},
            image_grid_pinpoints=pinpoints,
        )
    )


@pytest.mark.parametrize("most", [pytest.param(None, id="all"), *(pytest.param(n, id=f"fewer-{n}") for n in (1, 2, 9))])
@pytest.mark.parametrize("has_newline", [True, False])
def test_features_are_put_together_as_transformers_does(most: int | None, has_newline: bool) -> None:
    model = _model(fewer=most is not None)
    packing = Packing(resolutions=tuple(_GRIDS), tile=_TILE, side=_SIDE, most=most)
    generator = torch.Generator().manual_seed(1)
    newline = torch.randn(_WIDTH, generator=generator) if has_newline else None
    sizes = [size for size in _sizes(5, 60) if 0.1 < size[0] / size[1] < 10]
    tiles = 17
    features = torch.randn(len(sizes) * tiles, _SIDE**2, _WIDTH, generator=generator)
    made, fits = packed(features, torch.tensor(sizes), packing, tiles=tiles, newline=newline)
    assert fits
    needed = [1 + best[0] * best[1] // _TILE**2 for best in (select_best_resolution(s, _GRIDS) for s in sizes)]
    own = [part[:count] for part, count in zip(features.unflatten(0, (-1, tiles)), needed, strict=True)]
    options: dict[str, Any] = {"image_newline": newline}
    if most is None:
        want, _ = model.pack_image_features(own, torch.tensor(sizes), "full", **options)
    else:
        ratio = f"anyres_max_{most}"
        want, _ = model.pack_image_features(own, torch.tensor(sizes), vision_aspect_ratio=ratio, **options)
    torch.testing.assert_close(made, torch.cat(want))
    assert not packed(features[: len(sizes) * 3], torch.tensor(sizes), packing, tiles=3, newline=newline)[1]


def test_of_pictures_that_belong_together_the_first_tile_counts() -> None:
    packing = Packing(resolutions=tuple(_GRIDS), tile=_TILE, side=_SIDE)
    features = torch.randn(3 * 17, _SIDE**2, _WIDTH)
    newline = torch.randn(_WIDTH)
    sizes = torch.tensor([(40, 50), (30, 30), (24, 48)])
    made, fits = packed(features, sizes, packing, tiles=17, newline=newline, shares=torch.tensor([2, 1]))
    assert fits
    first = [torch.cat([features[at * 17], newline[None]]) for at in range(2)]
    last, _ = packed(features[34:], sizes[2:], packing, tiles=17, newline=newline)
    torch.testing.assert_close(made, torch.cat([*first, last]))
    assert not packed(features, sizes, packing, tiles=17, newline=newline, shares=torch.tensor([2, 2]))[1]

"""Small modules that refuse inputs as real models do, one way each, and what detection makes of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from onnx_config.declarations import declare
from onnx_config.shape_inference import Inference, infer
from onnx_config.trial import Trial

__all__ = ["Picky", "Settings", "inferred", "shapes"]


class Settings(SimpleNamespace):
    """A config of a module: whatever it is given."""

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, Settings) else v for k, v in copy.copy(vars(self)).items()}


class Picky(nn.Module):
    """A module made from a config, as models are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def inferred(cls: type, *, flags: dict[str, Any] | None = None, **settings: Any) -> Inference:
    """Return what detection finds out about ``cls`` with ``settings`` by running it."""
    config = Settings(**settings)
    return infer(declare(cls), config, (), Trial(cls, config), task_family="feature-extraction", flags=flags or {})


def shapes(found: Inference) -> dict[str, tuple[int | str, ...]]:
    """Return input name -> shape."""
    return {tensor.name: tensor.shape for tensor in found.inputs}


class Frames(Picky):
    """Takes a video apart, which is documented as an image."""

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        batch, frames, channels, height, width = pixel_values.shape
        return pixel_values.reshape(batch, frames, channels * height * width).mean(dim=-1)


class Rows(Picky):
    """Takes all axes but the last apart, behind a name of its own."""

    def forward(self, input_features: torch.FloatTensor):
        """
        input_features (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
            Features.
        """
        hidden = input_features
        batch, steps = hidden.size()[:-1]
        return hidden.reshape(batch, steps, -1).sum(dim=-1)


class Spelled(Picky):
    """Says in words which shape it wants."""

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        if pixel_values.dim() != 5:
            raise ValueError("Expected an input of shape (batch_size, num_frames, num_channels, height, width).")
        return pixel_values.mean(dim=(2, 3, 4))


class Quoted(Picky):
    """Says the axes of an input's shape one by one, where its documentation is wrong."""

    def forward(self, pixel_values: torch.Tensor, input_points: torch.Tensor | None = None):
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The image.
        input_points (`torch.FloatTensor` of shape `(batch_size, num_points, 2)`):
            Where to look.
        """
        if input_points is not None and input_points.ndim != 4:
            raise ValueError(
                "The input_points must be a 4D tensor. Of shape `batch_size`, `point_batch_size`, `num_points`, `2`."
            )
        return pixel_values.mean(dim=(1, 2, 3))


class Labelled(Picky):
    """Has more axes of points than its documentation says, and labels for them."""

    def forward(self, input_points: torch.Tensor, input_labels: torch.Tensor):
        r"""
        input_points (`torch.FloatTensor` of shape `(batch_size, num_points, 2)`):
            Where to look.
        input_labels (`torch.LongTensor` of shape `(batch_size, point_batch_size, num_points)`):
            What is there.
        """
        padded = torch.zeros(input_points.shape[0], input_points.shape[1], 1, input_points.shape[3])
        points = torch.cat([input_points, padded], dim=2)
        return points.sum((2, 3)) * input_labels.sum(-1)


class Looking(Picky):
    """Asks which token looks at which image, and does not tell the shape of that."""

    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        image_attention_mask: torch.LongTensor | None = None,
    ):
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_images, num_channels, height, width)`):
            The images.
        image_attention_mask (`torch.LongTensor`, *optional*):
            The attention mask for the images.
        """
        images = pixel_values.mean(dim=(2, 3, 4))
        mask = image_attention_mask[..., None].expand(-1, -1, -1, 2)
        return input_ids.unsqueeze(-1) + torch.einsum("bi,btik->btk", images, mask.float())


class Named(Picky):
    """Asks for an optional argument by its name."""

    def forward(self, input_ids: torch.LongTensor, positions: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        positions (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions.
        """
        if positions is None:
            raise ValueError("You have to specify positions")
        return input_ids + positions


class Exclusive(Picky):
    """Takes its main input or another one in its place, and not both."""

    main_input_name = "inputs"

    def forward(self, inputs: torch.Tensor | None = None, pixel_values: torch.FloatTensor | None = None):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixel values. They can be obtained using [`AutoImageProcessor`].
        """
        if inputs is not None and pixel_values is not None:
            raise ValueError("You cannot use both `inputs` and `pixel_values`")
        return (pixel_values if inputs is None else inputs).flatten(3) + 1


class Capital(Picky):
    """Asks for an optional argument by its name at the start of a sentence."""

    def forward(self, input_ids: torch.LongTensor, positions: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        positions (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions.
        """
        if positions is not None:
            return input_ids + positions
        raise ValueError("Positions is required for this")


class Unnamed(Picky):
    """Needs an optional argument, and does not say so."""

    def forward(self, input_ids: torch.LongTensor, positions: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        positions (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions.
        """
        return input_ids + (positions + 1)


class Entities(Picky):
    """Answers about entities, whose features are missing where the entities are."""

    def forward(self, input_ids, entity_ids: torch.LongTensor | None = None, entity_spans=None, spans=None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        entity_ids (`torch.LongTensor` of shape `(batch_size, entity_length)`):
            Entities.
        entity_spans (`torch.LongTensor` of shape `(batch_size, entity_length, span_length)`):
            Where each stands.
        spans (`torch.LongTensor` of shape `(batch_size, span_length)`):
            Others.
        """
        entity_states = None if entity_ids is None else (entity_ids + entity_spans.sum(dim=-1)).float()
        return entity_states[:, 0] + input_ids.float().mean(dim=-1)


class Embedded(Picky):
    """Has ids in its signature, and takes nothing but embeddings."""

    def forward(self, input_ids=None, inputs_embeds: torch.FloatTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Embeddings, instead of passing `input_ids`.
        """
        if input_ids is not None:
            raise ValueError("input_ids is not expected")
        return inputs_embeds.mean(dim=-1)


class Convolved(Picky):
    """Convolves what nothing is said of."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = nn.Conv2d(5, 2, 1) if config.axes == 2 else nn.Conv1d(6, 3, 1, groups=3)

    def forward(self, hidden_states: torch.Tensor):
        return self.convolution(hidden_states).sum(dim=1)


class Steps(Picky):
    """Takes features of steps, of which nothing is said."""

    def forward(self, hidden_states: torch.Tensor):
        scaled = nn.functional.linear(hidden_states, torch.ones(4, 9))
        if scaled.dim() != 3:
            raise ValueError("steps are wanted")
        return scaled.sum(dim=-1)


class Letters(Picky):
    """Takes a video of patches apart, by letters."""

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        b, t, h, w, c = pixel_values.shape
        side = self.config.patch_size
        return pixel_values.reshape(b, t, h // side, side, w // side, side, c).sum(dim=(2, 3, 4, 5, 6))


class Covered(Picky):
    """Cannot do without a mask over steps that its documentation calls otherwise."""

    def forward(self, input_features: torch.FloatTensor, input_features_mask: torch.LongTensor | None = None):
        """
        input_features (`torch.FloatTensor` of shape `(batch_size, num_frames, feature_size)`):
            Features.
        input_features_mask (`torch.LongTensor` of shape `(batch_size, feature_sequence_length)`):
            Which of them count.
        """
        lengths = input_features_mask.sum(-1)
        return (input_features * input_features_mask[..., None]).sum(dim=(1, 2)) / lengths


class Captions(Picky):
    """Puts the features of an image where a text holds a place for each."""

    patch = 8

    def forward(self, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError("the text is beyond all positions")
        features = nn.functional.avg_pool2d(pixel_values, self.patch).mean(dim=1).flatten()
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != features.numel():
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(places.sum())}, "
                f"features: {features.numel()}"
            )
        return input_ids.to(torch.float32).masked_scatter(places, features)


class Looked(Picky):
    """Looks ids up in a table that the config does not tell of."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.rows, 4)

    def forward(self, input_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        """
        return self.table(input_ids)


class Placed(Looked):
    """Finds the place of each patch before its pixels, among fractions."""

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_patches, 5)`):
            Row, then pixels.
        """
        return self.table(pixel_values[:, :, 0].long()) + pixel_values[:, :, 1:]


class Indexed(Looked):
    """Looks them up without a module."""

    def forward(self, input_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        """
        return self.table.weight[input_ids]


class Marked(Picky):
    """Replaces the marked positions, of which there must be three in each row."""

    def forward(self, input_features: torch.FloatTensor, token_mask: torch.BoolTensor):
        """
        input_features (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            Features.
        token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Which are replaced.
        """
        hidden = input_features.clone()
        hidden[token_mask.bool()] = torch.zeros(3 * hidden.shape[0])
        return hidden


class Speakers(Picky):
    """Says only ``Tensor`` of what it looks up."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = nn.Embedding(5, 4)

    def forward(self, input_features: torch.FloatTensor, speaker: torch.Tensor):
        """
        input_features (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            Features.
        speaker (`torch.Tensor` of shape `(batch_size, 1)`):
            Who speaks.
        """
        return self.table(speaker) + input_features[..., None]


class Spectrum(Picky):
    """Wants its features before its steps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = nn.Conv1d(config.num_mel_bins, 4, 3, padding=1)

    def forward(self, input_features: torch.FloatTensor):
        """
        input_features (`torch.FloatTensor` of shape `(batch_size, sequence_length, feature_size)`):
            A spectrum.
        """
        return self.convolution(input_features).mean(dim=1)


class Codebooks(Picky):
    """Adds an offset to each of the columns that its ids have."""

    def forward(self, input_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        """
        offsets = torch.arange(3) * 100
        return (input_ids + offsets).reshape(-1, input_ids.shape[1], 3)


class Solved(Picky):
    """Takes a window of one length only, two values of it for each of its weights."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = nn.Linear(20, 4)

    def forward(self, past_values: torch.FloatTensor):
        """
        past_values (`torch.FloatTensor` of shape `(batch_size, window_size)`):
            A series.
        """
        return self.head(torch.cat([past_values, past_values], dim=-1))


class Folded(Picky):
    """Cuts a series into pieces of five."""

    def forward(self, past_values: torch.FloatTensor):
        """
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            A series.
        """
        return past_values.view(past_values.shape[0], -1, 5).sum(dim=-1)


class Photograph(Picky):
    """Takes large images only."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = nn.Conv2d(3, 1, 150, stride=150)

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        return self.convolution(pixel_values).flatten(1).sum(dim=-1)


class Squares(Picky):
    """Takes images of one size, and says nothing of it."""

    def forward(self, pixel_values: torch.FloatTensor):
        """
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Pixels.
        """
        if pixel_values.shape[2:] != (32, 32):
            raise ValueError("this is not what was trained on")
        return pixel_values.mean(dim=(1, 2, 3))


class Recording(Picky):
    """Takes long sounds only."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = nn.Conv1d(1, 1, 6000, stride=100)

    def forward(self, input_values: torch.FloatTensor):
        """
        input_values (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            A sound.
        """
        return self.convolution(input_values[:, None])


class Crops(Picky):
    """Sees each row's image in four crops, one after another."""

    def forward(self, input_ids: torch.LongTensor, crops: torch.FloatTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        crops (`torch.FloatTensor` of shape `(num_crops, feature_size)`):
            Features of the crops.
        """
        if crops.shape[0] != 4 * input_ids.shape[0]:
            raise ValueError(
                f"the number of crops is {crops.shape[0]} and the expected one is {4 * len(input_ids)}, but"
            )
        return crops.reshape(input_ids.shape[0], 4, -1).mean(dim=(1, 2))


class Books(Picky):
    """Takes the ids of all books of all rows under one another."""

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size * num_codebooks, sequence_length)`):
            Ids.
        attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Mask.
        """
        rows = input_ids.reshape(-1, self.config.num_codebooks, input_ids.shape[-1]).sum(dim=1)
        return rows if attention_mask is None else rows * attention_mask


class Album(Picky):
    """Puts the features of all images where the texts hold places for them, however many images there are."""

    def forward(self, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        pixel_values (`torch.FloatTensor` of shape `(num_images, num_channels, height, width)`):
            Pixels.
        """
        if self.config.one_row and input_ids.shape[0] > 1:
            raise ValueError("a batch size > 1 is not supported")
        features = nn.functional.adaptive_avg_pool2d(pixel_values.mean(dim=1), 2).flatten()
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != features.numel():
            raise ValueError(f"image tokens: {int(places.sum())}, features: {features.numel()}")
        return input_ids.to(torch.float32).masked_scatter(places, features)


class Pairs(Picky):
    """Adds two texts, which are documented to have lengths of their own."""

    def forward(self, input_ids: torch.LongTensor, other_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        other_ids (`torch.LongTensor` of shape `(batch_size, other_length)`):
            More ids.
        """
        return input_ids + other_ids


class Single(Picky):
    """Takes one row at a time."""

    def forward(self, input_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        """
        if input_ids.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        return input_ids + 1


class Lagged(Picky):
    """Looks back from every step of its window."""

    def forward(self, past_values: torch.FloatTensor):
        """
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            A series.
        """
        length, lag = past_values.shape[1], 7
        if lag + self.config.context_length > length:
            raise ValueError(
                f"lags cannot go further than history length, found lag {lag} while history length is only {length}"
            )
        return past_values[:, length - lag - self.config.context_length : length - lag]


class Channelled(Picky):
    """Wants one axis more, whose size the config holds."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.num_bins, 4)

    def forward(self, past_values: torch.FloatTensor):
        """
        past_values (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            A series.
        """
        if past_values.dim() < 3:
            raise ValueError("there is something missing")
        return self.head(past_values)


class Maskless(Picky):
    """Stumbles over an optional mask."""

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Mask.
        """
        if attention_mask is not None:
            raise ValueError("masks do not work here")
        return input_ids + 1


class Tiles(Picky):
    """Cuts each image into tiles of its own number, which only values tell; takes texts alone too."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
    ):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
            Pixels, which can be obtained using [`AutoImageProcessor`].
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            Height and width of each image.
        """
        if pixel_values is None:
            return input_ids + 1
        return torch.cat([pixel_values[:, 0, :height, 0].sum(dim=-1) for height, _ in image_sizes.tolist()])


class Halfway(Picky):
    """Is never content."""

    def forward(self, input_ids: torch.LongTensor, positions: torch.LongTensor | None = None):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        positions (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions.
        """
        if positions is None:
            raise ValueError("You have to specify positions")
        raise ValueError("and now something else")


class Stubborn(Picky):
    """Takes nothing at all."""

    def seen(self, input_ids: torch.Tensor) -> None:
        """Is called in each run."""

    def forward(self, input_ids: torch.LongTensor):
        """
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Ids.
        """
        self.seen(input_ids)
        raise ValueError(f"never {', '.join(map(str, input_ids.shape))}")

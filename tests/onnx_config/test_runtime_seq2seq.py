"""Encoder-decoders of several graphs generate what PyTorch generates, by every option, and say what they cannot."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput

from onnx_config import AutoModelForONNX
from onnx_config.errors import ErrorKind, InputError, ModelError
from tests.onnx_config.converted_parts import VISION, convert_parts, register


def texts() -> dict[str, torch.Tensor]:
    ids = torch.arange(30).reshape(3, 10) * 7 % 300 + 5
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 8:] = 0
    return {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}


def sounds() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(3, 16, 100, generator=torch.Generator().manual_seed(0))}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A model as graphs, and the one that they came from."""

    artifact: Path
    source: Path
    graphs: AutoModelForONNX
    reference: Any
    inputs: Mapping[str, torch.Tensor]


def make_pair(name: str, inputs: Callable[[], dict[str, torch.Tensor]], folder: Path) -> Pair:
    source, artifact = convert_parts(name, folder)
    config = json.loads((source / "config.json").read_text())
    reference = getattr(transformers, config["architectures"][0]).from_pretrained(source).eval()
    graphs = AutoModelForONNX.from_pretrained(artifact, threads=1)
    return Pair(artifact=artifact, source=source, graphs=graphs, reference=reference, inputs=inputs())


FAMILIES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "bart-conditional-generation": texts,
    "whisper-conditional-generation": sounds,
    VISION: images,
}
Made = Callable[[str], Pair]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that converts a model, each once."""

    @cache
    def make(name: str) -> Pair:
        return make_pair(name, FAMILIES.get(name, texts), tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module")
def t5(made: Made) -> Pair:
    return made("t5-conditional-generation")


@pytest.fixture(scope="module", params=FAMILIES)
def other(request: pytest.FixtureRequest, made: Made) -> Pair:
    return made(request.param)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "sampled-beams": {"do_sample": True, "num_beams": 3},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "no-cache": {"use_cache": False},
    "a-cache-of-fixed-size": {"cache_implementation": "static"},
    "forced-beginning": {"forced_bos_token_id": 9},
}


def generated(model: Any, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    found = model.generate(**inputs, **{"max_new_tokens": 12, "min_new_tokens": 6, **options})
    return found if isinstance(found, torch.Tensor) else found["sequences"]


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two-decoders"])
@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in WAYS.items()])
def test_it_generates_what_pytorch_generates(t5: Pair, options: dict[str, Any], *, merged: bool) -> None:
    model = AutoModelForONNX.from_pretrained(t5.artifact, threads=1, merged=merged)
    want = generated(t5.reference, t5.inputs, **options)
    got = generated(model, t5.inputs, **options)
    assert torch.equal(got, want)
    assert len({tuple(row) for row in want.tolist()}) > 1, "a model that says the same to all tells nothing"


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in WAYS.items()])
def test_so_do_texts_sounds_and_images(other: Pair, options: dict[str, Any]) -> None:
    if "forced_bos_token_id" in options or "encoder_repetition_penalty" in options:
        # Not of sounds and images, whose encoder has no tokens.
        options = {name: value for name, value in options.items() if "input_ids" in other.inputs or "enc" not in name}
    want = generated(other.reference, other.inputs, **options)
    assert torch.equal(generated(other.graphs, other.inputs, **options), want)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}], ids=["lookup", "assistant"])
def test_tokens_that_are_guessed_ahead_are_taken_back(t5: Pair, options: dict[str, Any]) -> None:
    one = {name: value[:1] for name, value in t5.inputs.items()}
    found = []
    for model in (t5.reference, t5.graphs):
        helped = {"assistant_model": model} if options.get("assistant") else options
        found.append(generated(model, one, do_sample=False, **helped))
    assert torch.equal(*found)
    assert torch.equal(found[0], generated(t5.reference, one, do_sample=False))


def test_it_is_called_as_the_model_is(t5: Pair) -> None:
    given = {**t5.inputs, "decoder_input_ids": torch.tensor([[0, 9, 8], [0, 7, 6], [0, 5, 4]])}
    with torch.no_grad():
        want = t5.reference(**given)
    got = t5.graphs(**given)
    assert type(got) is type(want) is Seq2SeqLMOutput
    assert list(got.keys()) == list(want.keys())
    for name in ("logits", "encoder_last_hidden_state"):
        torch.testing.assert_close(got[name], want[name], atol=2e-5, rtol=1e-4)
    assert type(got.past_key_values) is EncoderDecoderCache
    assert got.past_key_values.get_seq_length() == 3
    assert t5.graphs(**given, use_cache=False).past_key_values is None


def test_it_goes_on_from_what_an_earlier_call_returned(t5: Pair) -> None:
    ids = torch.tensor([[0, 9, 8, 5], [0, 7, 6, 5], [0, 5, 4, 5]])
    with torch.no_grad():
        want = t5.reference(**t5.inputs, decoder_input_ids=ids).logits
    begun = t5.graphs(**t5.inputs, decoder_input_ids=ids[:, :2])
    # Of the input only its mask is needed, since what is kept of the rest is in the cache.
    rest = t5.graphs(
        attention_mask=t5.inputs["attention_mask"],
        decoder_input_ids=ids[:, 2:],
        past_key_values=begun.past_key_values,
    )
    torch.testing.assert_close(torch.cat([begun.logits, rest.logits], dim=1), want, atol=2e-5, rtol=1e-4)


def test_what_the_encoder_gave_can_be_given_again(t5: Pair) -> None:
    ids = torch.zeros(3, 1, dtype=torch.int64)
    first = t5.graphs(**t5.inputs, decoder_input_ids=ids)
    again = t5.graphs(
        encoder_outputs=(first.encoder_last_hidden_state,),
        attention_mask=t5.inputs["attention_mask"],
        decoder_input_ids=ids,
    )
    assert torch.equal(first.logits, again.logits)


def test_numpy_goes_in_and_comes_out(t5: Pair) -> None:
    arrays = {name: value.numpy() for name, value in t5.inputs.items()}
    ids = np.zeros((3, 1), np.int64)
    got = t5.graphs(**arrays, decoder_input_ids=ids)
    assert isinstance(got.logits, np.ndarray)
    assert isinstance(got.encoder_last_hidden_state, np.ndarray)
    np.testing.assert_array_equal(t5.graphs.generate(**arrays, max_new_tokens=5), generated_plainly(t5, 5))


def generated_plainly(pair: Pair, tokens: int) -> Any:
    return pair.graphs.generate(**pair.inputs, max_new_tokens=tokens).numpy()


def test_it_says_what_it_is(t5: Pair) -> None:
    model = t5.graphs
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert (model.main_input_name, model.device, model.dtype) == ("input_ids", torch.device("cpu"), torch.float32)
    assert (model.can_generate(), model.generation_config.decoder_start_token_id) == (True, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two-decoders"])
@pytest.mark.parametrize("name", ["greedy", "beams", "no-cache"])
def test_it_generates_on_the_gpu(t5: Pair, name: str, *, merged: bool) -> None:
    model = AutoModelForONNX.from_pretrained(t5.artifact, device="cuda", merged=merged)
    found = generated(model, {name: value.cuda() for name, value in t5.inputs.items()}, **WAYS[name])
    assert (model.device.type, found.device.type) == ("cuda", "cuda")
    assert torch.equal(found.cpu(), generated(t5.reference, t5.inputs, **WAYS[name]))
    again = generated(model, t5.inputs, **WAYS[name])
    assert torch.equal(again.cpu(), found.cpu()), "what is on the CPU is moved"


# ------------------------------------------------------------------------------------------------- what is refused


IDS = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"decoder_input_ids": None}, r"give decoder_input_ids, which begin with the token 0", id="no-ids"),
        pytest.param({"decoder_attention_mask": torch.tensor([[0, 1]] * 3)}, "hides tokens of the decoder", id="mask"),
        pytest.param({"labels": IDS}, "do not take 'labels', which T5ForConditionalGeneration does", id="labels"),
        pytest.param({"decoder_inputs_embeds": torch.ones(3, 2, 32)}, "'decoder_inputs_embeds'", id="embeddings"),
        pytest.param({"output_attentions": True}, "the graph gives no attentions", id="attentions"),
        pytest.param({"output_hidden_states": True}, "the graph gives no hidden_states", id="hidden-states"),
        pytest.param({"input_ids": None}, "'input_ids' is missing", id="no-input"),
        pytest.param({"input_ids": torch.ones(2, dtype=torch.int64)}, "cannot run the graph on input_ids", id="rank"),
    ],
)
def test_what_the_graphs_cannot_do_is_said(t5: Pair, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        t5.graphs(**{**t5.inputs, "decoder_input_ids": IDS, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"temprature": 0.5}, r"an option that transformers does not know.*'temprature'", id="unknown"),
        pytest.param({"output_attentions": True, "return_dict_in_generate": True}, "no attentions", id="attentions"),
        pytest.param({"assistant_early_exit": 1}, "the model's first layers alone", id="early-exit"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(t5: Pair, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        t5.graphs.generate(**t5.inputs, **options)


def test_a_class_that_can_be_asked_for_some_logits_generates(t5: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = transformers.T5ForConditionalGeneration
    plain = cls.forward

    def forward(self: Any, *given: Any, logits_to_keep: Any = 0, **options: Any) -> Any:
        return plain(self, *given, **options)

    # As that of T5Gemma, which generate asks for the last token's logits only.
    known = inspect.signature(plain)
    added = inspect.Parameter("logits_to_keep", inspect.Parameter.KEYWORD_ONLY, default=0)
    names = sorted((*known.parameters.values(), added), key=lambda parameter: parameter.kind)
    forward.__signature__ = known.replace(parameters=names)  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "forward", forward)
    graphs = AutoModelForONNX.from_pretrained(t5.artifact, threads=1)
    feed = {"input_ids": t5.inputs["input_ids"], "decoder_input_ids": torch.arange(3, 8).expand(3, -1)}
    whole = graphs(**feed).logits
    places = torch.tensor([0, 2])
    for wanted, kept in ((0, whole), (1, whole[:, -1:]), (3, whole[:, -3:]), (places, whole[:, places])):
        torch.testing.assert_close(graphs(**feed, logits_to_keep=wanted).logits, kept)
    assert torch.equal(generated(graphs, t5.inputs), generated(t5.graphs, t5.inputs))


def test_a_mask_of_the_decoder_that_hides_nothing_is_taken(t5: Pair) -> None:
    plain = t5.graphs(**t5.inputs, decoder_input_ids=IDS)
    masked = t5.graphs(**t5.inputs, decoder_input_ids=IDS, decoder_attention_mask=torch.ones_like(IDS))
    assert torch.equal(plain.logits, masked.logits)


@pytest.mark.slow
def test_what_is_longer_than_the_model_is_refused(other: Pair) -> None:
    """BART's table of positions has two rows more than it has positions; Whisper's and GPT-2's end the decoder's."""
    most = {"bart": 128, "whisper": 64, "vision-encoder-decoder": 64}[other.graphs.config.model_type]
    ids = torch.ones(3, most + 1, dtype=torch.int64)
    other.graphs(**other.inputs, decoder_input_ids=ids[:, :most])
    with pytest.raises(InputError, match=rf"The answer has {most + 1} tokens; the model knows {most} positions"):
        other.graphs(**other.inputs, decoder_input_ids=ids)
    if "input_ids" in other.inputs:
        with pytest.raises(InputError, match=rf"The text has {most + 1} tokens; the model knows {most} positions"):
            other.graphs(input_ids=ids, decoder_input_ids=IDS)


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def artifact(t5: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5.artifact, tmp_path / "artifact"))


def move(folder: Path, names: list[str], into: str = "", suffix: str = "") -> None:
    """Make another's layout of the folder: only ``names``, elsewhere, with another end, and without ``ferry.json``."""
    (folder / "ferry.json").unlink()
    (folder / into).mkdir(exist_ok=True)
    for path in list(folder.glob("*.onnx")):
        if path.stem in names:
            path.rename(folder / into / f"{path.stem}{suffix}.onnx")
        else:
            path.unlink()


TWO = ["encoder_model", "decoder_model", "decoder_with_past_model"]
ONE = ["encoder_model", "decoder_model_merged"]


@pytest.mark.parametrize(
    ("names", "into", "suffix", "options"),
    [
        pytest.param(ONE, "", "", {}, id="optimum-merged"),
        pytest.param(TWO, "", "", {}, id="optimum"),
        pytest.param(ONE, "onnx", "", {}, id="transformers.js"),
        pytest.param(ONE, "onnx", "_quantized", {"variant": "quantized"}, id="transformers.js-variant"),
        pytest.param(TWO, "graphs", "", {"subfolder": "graphs"}, id="a-subfolder"),
        pytest.param(["encoder_model", "decoder_model"], "", "", {}, id="no-decoder-with-past"),
    ],
)
def test_layouts_of_others_are_read(
    t5: Pair, artifact: Path, names: list[str], into: str, suffix: str, options: dict[str, Any]
) -> None:
    move(artifact, names, into, suffix)
    model = AutoModelForONNX.from_pretrained(artifact, threads=1, **options)
    assert torch.equal(generated(model, t5.inputs), generated(t5.reference, t5.inputs))


def test_an_architecture_that_does_not_generate_gives_way_to_the_one_that_does(t5: Pair, artifact: Path) -> None:
    """Old configs name classes that are gone, or the bare backbone."""
    move(artifact, ONE)
    config = json.loads((artifact / "config.json").read_text())
    for name in ("T5WithLMHeadModel", "T5Model"):
        (artifact / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        model = AutoModelForONNX.from_pretrained(artifact, threads=1)
        assert torch.equal(generated(model, t5.inputs), generated(t5.reference, t5.inputs))


def test_a_model_without_its_encoder_is_an_error(artifact: Path) -> None:
    move(artifact, ["decoder_model", "decoder_with_past_model"])
    with pytest.raises(InputError, match=r"encoder_model\.onnx"):
        AutoModelForONNX.from_pretrained(artifact)


@pytest.mark.parametrize("name", ["encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged"])
def test_a_graph_that_is_listed_and_missing_is_named(artifact: Path, name: str) -> None:
    (artifact / f"{name}.onnx").unlink()
    with pytest.raises(InputError, match=rf"lacks {name}\.onnx, the .* that its ferry\.json lists") as caught:
        AutoModelForONNX.from_pretrained(artifact)
    assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "renamed", "words"),
    [
        pytest.param("logits", "last_hidden_state", "gives last_hidden_state, .* and no logits", id="no-logits"),
        pytest.param("past_key_values.0.decoder.key", "past_key_values.0.decoder.state", "keeps past_", id="no-keys"),
    ],
)
def test_graphs_that_are_something_else_are_said(artifact: Path, name: str, renamed: str, words: str) -> None:
    move(artifact, ONE)
    path = artifact / "decoder_model_merged.onnx"
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed if value.name == name else value.name
    for node in (*model.graph.node, *(n for g in branches(model) for n in g.node)):
        for names in (node.input, node.output):
            names[:] = [renamed if used == name else used for used in names]
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=words) as caught:
        AutoModelForONNX.from_pretrained(artifact)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def branches(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    return [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def test_a_class_that_transformers_does_not_have_is_said(artifact: Path) -> None:
    move(artifact, ONE)
    (artifact / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match="generate") as caught:
        AutoModelForONNX.from_pretrained(artifact)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.slow
def test_decoders_without_a_cache_generate_too(tmp_path: Path) -> None:
    source, folder = convert_parts("t5-conditional-generation", tmp_path, with_past=False)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(source).eval()
    model = AutoModelForONNX.from_pretrained(folder, threads=1)
    assert torch.equal(generated(model, texts()), generated(reference, texts()))
    with pytest.raises(InputError, match=r"carries no cache.*leave out use_cache=True"):
        model.generate(**texts(), use_cache=True, max_new_tokens=4)


def test_what_is_in_quarantine_is_not_served(artifact: Path) -> None:
    register(artifact, "T5ForConditionalGeneration", verdict="mismatch")
    with pytest.raises(ModelError, match="is in quarantine"):
        AutoModelForONNX.from_pretrained(artifact)
    AutoModelForONNX.from_pretrained(artifact, allow_quarantined=True)


# -------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.slow
def test_pipelines_hear(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long sounds, with the timestamps that Whisper's own way to generate finds."""
    pair = made("whisper-conditional-generation")
    for model in (pair.reference, pair.graphs):
        monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.source)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(pair.source)
    sound = np.random.default_rng(0).standard_normal(16000 * 5 // 2).astype(np.float32)
    said = []
    for model in (pair.reference, pair.graphs):
        model.generation_config.no_timestamps_token_id = 350
        pipe = transformers.pipeline(
            "automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=extractor
        )
        options: dict[str, Any] = {"max_new_tokens": 8}
        said.append([pipe(part.copy(), generate_kwargs=options) for part in (sound[:16000], sound)])
        features = torch.randn(2, 16, 250, generator=torch.Generator().manual_seed(1))
        given = {"input_features": features, "attention_mask": torch.ones(2, 250)}
        long = model.generate(**given, return_timestamps=True, return_segments=True, max_new_tokens=8)
        said[-1].append([[part["tokens"].tolist() for part in row] for row in long["segments"]])
    assert said[0] == said[1]
    pair.graphs.generation_config.alignment_heads = [[0, 0]]
    with pytest.raises(InputError, match="the graph gives no attentions"):
        pair.graphs.generate(**sounds(), return_token_timestamps=True)


@pytest.mark.slow
def test_what_an_image_processor_gives_is_described(made: Made) -> None:
    pair = made(VISION)
    processor = transformers.AutoImageProcessor.from_pretrained(pair.source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.source)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    texts = []
    for model in (pair.reference, pair.graphs):
        pixels = processor(image, return_tensors="pt")
        texts.append(tokenizer.batch_decode(model.generate(**pixels, max_new_tokens=8)))
    assert texts[0] == texts[1]

"""Small model folders with random weights, one for every family and head that conversion is tested on.

A folder holds what a Hub repository of that model holds: ``config.json``, ``model.safetensors``, tokenizer and
preprocessor files. Everything is made here: nothing is downloaded, and tokenizers are trained on a few sentences.
Weights are not only random but disturbed, see `_disturb`, so that a wrong graph gives wrong numbers.

``FAMILIES`` also says what detection must find: the task and the inputs.

>>> FAMILIES["bert-sequence-classification"].inputs
('input_ids', 'attention_mask', 'token_type_ids')
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "TinyModel", "build", "config"]

VOCAB_SIZE = 400
"""Rows of every embedding table; the trained tokenizers stay below it."""

IMAGE_SIZE = 32
"""Height and width of an image in pixels, except for detection."""

LABELS = 5
"""Classes of every classification head; unlike 2, it is no other size in these models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """One model: how to build it, and what detection must say about it."""

    name: str
    """Key in `FAMILIES`: family and head, e.g. ``"bert-masked-lm"``."""

    architecture: str
    """Class in transformers; the one entry of ``architectures`` in ``config.json``."""

    config_class: str
    """Configuration class in transformers."""

    settings: Mapping[str, Any]
    """Arguments of the configuration class."""

    task: str
    """Task that the configuration means, by the name that transformers' pipelines or optimum use."""

    inputs: tuple[str, ...]
    """What a user of this model feeds it, in the order of ``forward``."""

    files: Callable[[Path], None] | None
    """Writes tokenizer and preprocessor files; None where the model comes without any."""

    optional: frozenset[str] = field(default_factory=frozenset)
    """Arguments that some users feed as well; detection may name them or not."""


def config(name: str) -> PreTrainedConfig:
    """Return the configuration of ``name`` with its ``architectures`` set. Builds no weights."""
    import transformers

    model = FAMILIES[name]
    made: PreTrainedConfig = getattr(transformers, model.config_class)(**_plain(model.settings))
    made.architectures = [model.architecture]
    return made


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model folder of ``name`` to ``folder``, which is created where missing, and return it.

    The same name and seed give the same bytes with the same versions of torch and transformers.
    """
    import torch
    import transformers

    model = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(transformers, model.architecture)(config(name)).eval()
        _disturb(module)
        module.save_pretrained(folder)
    if model.files is not None:
        model.files(folder)
    return folder


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose nested values a configuration may change without changing the table."""
    copied: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return copied


def _disturb(module: torch.nn.Module) -> None:
    """Change the values that initialisation makes harmless.

    A bias of zeros, a norm of ones, a layer scale of 1e-6 or a running variance of one can be dropped from a graph, or
    swapped with another, without moving its output; attention over weights of 0.02 is flat whatever the mask says.
    """
    import torch

    def noise_like(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(tensor.shape, dtype=torch.float32).to(tensor.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.numel():
                continue
            largest = float(parameter.abs().max())
            if 0 < largest < 1e-3:
                parameter.copy_(0.3 + noise_like(parameter, 0.1))
            elif parameter.ndim <= 1 or float(parameter.min()) == float(parameter.max()):
                parameter.add_(noise_like(parameter, 0.05))
            elif float(parameter.std()) < 0.05:
                parameter.mul_(4)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise_like(buffer, 0.1))
            elif name.endswith("running_var"):
                buffer.mul_(1 + noise_like(buffer, 0.2).abs())


# ---------------------------------------------------------------------------------------- tokenizers and preprocessors

_SENTENCES = """
The ferry leaves the harbour at seven and carries forty cars across the strait to the island.
A captain reads the weather, the tide and the wind before she gives the order to cast off.
Passengers drink coffee, look at the gulls, and wait for the other side to come out of the fog.
On the bridge a screen shows the course, the speed, and the depth of the water below the keel.
Nothing is lost on the way: what was loaded in one port is counted again in the next.
In winter the ice is thin but sharp, so the crew checks the hull every night after the last trip.
Children ask how something made of steel can float; their teacher draws a boat and a bowl of water.
When two ships meet in a narrow channel, each turns to the right and both sound their horns once.
An old sailor told me that the sea has no memory, yet every map of it is written by those who return.
Please translate, summarise or answer: which of these boxes is heavier, the red one or the blue one?
""".strip()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _wordpiece(
    tokenizer_class: str,
    *,
    marks: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    **extra: Any,
) -> Callable[[Path], None]:
    """BERT's scheme. ``marks`` are padding, unknown, start, end and mask, in the order of their ids.

    The words are listed here: the trainer breaks ties differently from one run to the next.
    """

    def write(folder: Path) -> None:
        from tokenizers import BertWordPieceTokenizer

        pad, unknown, start, end, mask = marks
        text = _SENTENCES.lower()
        letters = sorted({letter for letter in text if letter.isalpha()})
        pieces = [*re.findall(r"\w+|[^\w\s]", text), *letters, *(f"##{letter}" for letter in letters)]
        words = [*marks, *sorted(set(pieces))]
        tokenizer = BertWordPieceTokenizer(
            vocab={word: number for number, word in enumerate(words)},
            lowercase=True,
            unk_token=unknown,
            sep_token=end,
            cls_token=start,
            pad_token=pad,
            mask_token=mask,
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        settings = {
            "tokenizer_class": tokenizer_class,
            "do_lower_case": True,
            "model_max_length": 128,
            "pad_token": pad,
            "unk_token": unknown,
            "cls_token": start,
            "sep_token": end,
            "mask_token": mask,
        }
        _write_json(folder / "tokenizer_config.json", {**settings, **extra})

    return write


def _byte_bpe(
    tokenizer_class: str, *, marks: tuple[str, ...], pair: tuple[str, str] | None = None, **extra: Any
) -> Callable[[Path], None]:
    """GPT-2's scheme. ``marks`` get the first ids; ``pair`` is put around each text, as RoBERTa does."""

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(marks),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(_SENTENCES.splitlines(), trainer)
        if pair is None:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        else:
            start, end = ((mark, marks.index(mark)) for mark in pair)
            tokenizer.post_processor = processors.RobertaProcessing(end, start)
        tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer.model.save(str(folder))
        _write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "model_max_length": 128, **extra}
        )

    return write


def _clip_bpe(folder: Path) -> None:
    """CLIP's scheme: lower case, and a mark at the end of each word. Listed for the reason that `_wordpiece` gives."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    start, end = "<|startoftext|>", "<|endoftext|>"
    text = _SENTENCES.lower()
    letters = sorted(set(text) - {" ", "\n"})
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(set(re.findall(r"[a-z]{2,4}\b", text))):
        joined = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            merges[letter, joined] = None
            joined = letter + joined
    pieces = [start, end, *letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=list(merges),
            unk_token=end,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, 1), (start, 0), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([start, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 32,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "do_lower_case": True,
        "processor_class": "CLIPProcessor",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _unigram(
    tokenizer_class: str, *, marks: tuple[str, ...], single: str, pair: str, **extra: Any
) -> Callable[[Path], None]:
    """SentencePiece's scheme. ``marks`` get the first ids; ``single`` and ``pair`` are templates of one text or two.

    The pieces are listed here, for the reason that `_wordpiece` gives. A longer piece costs less than its letters.
    """

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

        letters = sorted(set(_SENTENCES) - {" ", "\n"})
        words = sorted(f"\u2581{word}" for word in set(re.findall(r"\w+", _SENTENCES)))
        scores = [*((mark, 0.0) for mark in marks), ("\u2581", -6.0), *((piece, -8.0) for piece in letters)]
        scores += [(word, -7.0 - len(word) / 100) for word in words if len(word) > 2]
        tokenizer = Tokenizer(models.Unigram(scores, marks.index("<unk>"), byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        used = [(mark, number) for number, mark in enumerate(marks) if mark in re.split(r"[ :]", pair)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
        tokenizer.add_special_tokens(list(marks))
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": tokenizer_class, "model_max_length": 128, "unk_token": "<unk>"}
        _write_json(folder / "tokenizer_config.json", {**settings, **extra})

    return write


def _characters(folder: Path) -> None:
    """The alphabet that a speech model spells with."""
    marks = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    _write_json(folder / "vocab.json", {mark: number for number, mark in enumerate(marks)})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "word_delimiter_token": "|",
            "do_lower_case": False,
        },
    )


def _preprocessor(**settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _write_json(folder / "preprocessor_config.json", settings)

    return write


def _images(kind: str, *, size: Mapping[str, int] | None = None, **extra: Any) -> Callable[[Path], None]:
    return _preprocessor(
        image_processor_type=kind,
        do_resize=True,
        size=dict(size or _SQUARE),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        resample=2,
        **extra,
    )


def _together(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for writer in writers:
            writer(folder)

    return write


_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_ROBERTA_MARKS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ROBERTA_NAMES: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_LLAMA_FILES = _byte_bpe(
    "PreTrainedTokenizerFast",
    marks=("<pad>", "<s>", "</s>", "<unk>"),
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    unk_token="<unk>",
)
_QWEN_FILES = _byte_bpe(
    "Qwen2Tokenizer",
    marks=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    unk_token=None,
    bos_token=None,
)
_END_OF_TEXT: dict[str, Any] = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
_SPEECH = _preprocessor(
    feature_extractor_type="Wav2Vec2FeatureExtractor",
    feature_size=1,
    sampling_rate=16000,
    padding_value=0.0,
    do_normalize=True,
    return_attention_mask=False,
)

# ------------------------------------------------------------------------------------------------------------ the table
# Rows of a table, not one argument a line.
# fmt: off

FAMILIES: dict[str, TinyModel] = {}
"""Every model by its name, in the order in which the families are listed below."""

# The suffix of a class name, the suffix of our name, the task that such a head means.
_HEADS = (
    ("Model", "model", "feature-extraction"), ("ForPreTraining", "pretraining", "feature-extraction"),
    ("ForMaskedLM", "masked-lm", "feature-extraction"), ("ForCausalLM", "causal-lm", "text-generation"),
    ("ForSequenceClassification", "sequence-classification", "text-classification"),
    ("ForTokenClassification", "token-classification", "token-classification"),
    ("ForQuestionAnswering", "question-answering", "question-answering"),
    ("ForMultipleChoice", "multiple-choice", "multiple-choice"),
)
_ENCODER_HEADS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice",
)
_TEXT = ("input_ids", "attention_mask")
_TYPED_TEXT = ("input_ids", "attention_mask", "token_type_ids")
_TEXT_TO_TEXT = ("input_ids", "attention_mask", "decoder_input_ids")
_WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_ENCODER: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, **_WIDTH}


def _add(
    name: str, architecture: str, task: str, inputs: tuple[str, ...], *, config_class: str, settings: Mapping[str, Any],
    files: Callable[[Path], None] | None = None, optional: tuple[str, ...] = (),
) -> None:
    FAMILIES[name] = TinyModel(
        name=name, architecture=architecture, config_class=config_class, settings=settings, task=task, inputs=inputs,
        files=files, optional=frozenset(optional),
    )


def _add_heads(
    family: str, prefix: str, heads: tuple[str, ...], inputs: tuple[str, ...], *, settings: Mapping[str, Any],
    files: Callable[[Path], None], renamed: Mapping[str, str] | None = None, tasks: Mapping[str, str] | None = None,
    orders: Mapping[str, tuple[str, ...]] | None = None, optional: tuple[str, ...] = (),
) -> None:
    """Add one model per head. The three tables hold what differs by head: class name, task, order of the inputs."""
    for suffix, ours, task in _HEADS:
        if suffix not in heads:
            continue
        extra: dict[str, Any] = {}
        if "Classification" in suffix:
            extra["num_labels"] = LABELS
        if suffix == "ForCausalLM" and "ForMaskedLM" in heads:
            extra["is_decoder"] = True
        _add(
            f"{family}-{ours}", (renamed or {}).get(suffix, prefix + suffix), (tasks or {}).get(suffix, task),
            (orders or {}).get(suffix, inputs), config_class=f"{prefix}Config", settings={**settings, **extra},
            files=files, optional=optional,
        )


_add_heads(
    "bert", "Bert", (*_ENCODER_HEADS, "ForPreTraining", "ForCausalLM"), _TYPED_TEXT, settings=_ENCODER,
    files=_wordpiece("BertTokenizer"), renamed={"ForCausalLM": "BertLMHeadModel"},
)
# Positions of RoBERTa start after the padding id, so the table has two rows more than there are positions.
_ROBERTA: dict[str, Any] = {
    **_ENCODER, "max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}
_add_heads(
    "roberta", "Roberta", (*_ENCODER_HEADS, "ForCausalLM"), _TEXT, settings=_ROBERTA,
    files=_byte_bpe("RobertaTokenizer", marks=_ROBERTA_MARKS, pair=("<s>", "</s>"), **_ROBERTA_NAMES),
)
_add_heads(
    "distilbert", "DistilBert", _ENCODER_HEADS, _TEXT,
    settings={
        "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "dim": 32, "n_layers": 2, "n_heads": 4,
        "hidden_dim": 64,
    },
    files=_wordpiece("DistilBertTokenizer"),
)
_SENTENCEPIECE_BERT: dict[str, Any] = {
    "marks": ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), "single": "[CLS] $A [SEP]",
    "pair": "[CLS] $A [SEP] $B:1 [SEP]:1", "pad_token": "<pad>", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# Its tokenizer no longer makes token_type_ids, and left out they are zeros.
_add_heads(
    "albert", "Albert", (*_ENCODER_HEADS, "ForPreTraining"), _TEXT, optional=("token_type_ids",),
    settings={**_ENCODER, "embedding_size": 16, "bos_token_id": 2, "eos_token_id": 3},
    files=_unigram("AlbertTokenizer", **_SENTENCEPIECE_BERT),
)
_add_heads(
    "electra", "Electra", (*_ENCODER_HEADS, "ForPreTraining", "ForCausalLM"), _TYPED_TEXT,
    settings={**_ENCODER, "embedding_size": 16}, files=_wordpiece("ElectraTokenizer"),
)
# Its tokenizer makes token_type_ids, but a table of no types ignores them.
_add_heads(
    "deberta-v2", "DebertaV2", _ENCODER_HEADS, _TEXT, optional=("token_type_ids",),
    settings={
        **_ENCODER, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False, "max_relative_positions": -1,
    },
    files=_unigram("DebertaV2Tokenizer", **_SENTENCEPIECE_BERT),
)
_add_heads(
    "mpnet", "MPNet", _ENCODER_HEADS, _TEXT,
    settings={**_ENCODER, "max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    files=_wordpiece(
        "MPNetTokenizer", marks=("<pad>", "[UNK]", "<s>", "</s>", "<mask>"), bos_token="<s>", eos_token="</s>",
    ),
)
_add_heads(
    "xlm-roberta", "XLMRoberta", (*_ENCODER_HEADS, "ForCausalLM"), _TEXT, settings=_ROBERTA,
    files=_unigram(
        "XLMRobertaTokenizer", marks=("<s>", "<pad>", "</s>", "<unk>", "<mask>"), single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>", **{k: v for k, v in _ROBERTA_NAMES.items() if k != "unk_token"},
    ),
)

# Decoders.
_DECODER: dict[str, Any] = {
    **_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DECODER_HEADS = ("Model", "ForCausalLM", "ForSequenceClassification")
_add_heads(
    "gpt2", "GPT2", (*_DECODER_HEADS, "ForTokenClassification"), _TEXT, renamed={"ForCausalLM": "GPT2LMHeadModel"},
    settings={
        "vocab_size": VOCAB_SIZE, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    },
    files=_byte_bpe("GPT2Tokenizer", marks=("<|endoftext|>",), **_END_OF_TEXT),
)
_add_heads("llama", "Llama", _DECODER_HEADS, _TEXT, settings=_DECODER, files=_LLAMA_FILES)

# What is kept from token to token is no keys and values, or not only: states of a fixed size.
_STATES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
_HYBRID: dict[str, Any] = {**_STATES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA_2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
for _family, _prefix, _settings in (
    ("mamba", "Mamba", {**_STATES, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}),
    (
        "mamba2", "Mamba2",
        {**_STATES, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2,
         "chunk_size": 8},
    ),
    (
        "jamba", "Jamba",
        {**_HYBRID, "num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
         "expert_layer_period": 2, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
    ),
    (
        "bamba", "Bamba",
        {**_HYBRID, **_MAMBA_2, "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_groups": 1},
    ),
    ("falcon_h1", "FalconH1", {**_HYBRID, **_MAMBA_2, "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_groups": 1}),
    ("lfm2", "Lfm2", {**_HYBRID, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    (
        "recurrent_gemma", "RecurrentGemma",
        {**_HYBRID, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64},
    ),
    # Chunks of 64 tokens, which is nothing that a config can change.
    (
        "qwen3_next", "Qwen3Next",
        {**_HYBRID, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
         "linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
         "num_experts_per_tok": 2, "num_experts": 4},
    ),
):
    _add_heads(_family, _prefix, ("ForCausalLM",), _TEXT, settings=_settings, files=_LLAMA_FILES)
_add_heads("qwen2", "Qwen2", _DECODER_HEADS, _TEXT, settings={**_DECODER, "bos_token_id": None}, files=_QWEN_FILES)
_add_heads(
    "qwen3", "Qwen3", ("Model", "ForCausalLM"), _TEXT, settings={**_DECODER, "bos_token_id": None, "head_dim": 16},
    files=_QWEN_FILES,
)
# A window shorter than the sequences of a test, or it would never be looked through.
_add_heads("mistral", "Mistral", _DECODER_HEADS, _TEXT, settings={**_DECODER, "sliding_window": 8}, files=_LLAMA_FILES)
_add_heads(
    "phi", "Phi", ("Model", "ForCausalLM"), _TEXT,
    settings={**{k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}, "partial_rotary_factor": 0.5},
    files=_byte_bpe("GPT2Tokenizer", marks=("<|endoftext|>", "<|pad|>"), pad_token="<|pad|>", **_END_OF_TEXT),
)
_add_heads(
    "phi3", "Phi3", ("Model", "ForCausalLM"), _TEXT, settings={**_DECODER, "original_max_position_embeddings": 128},
    files=_LLAMA_FILES,
)
_add_heads(
    "gemma", "Gemma", _DECODER_HEADS, _TEXT, settings={**_DECODER, "head_dim": 16, "tie_word_embeddings": True},
    files=_LLAMA_FILES,
)
_add_heads(
    "gemma2", "Gemma2", ("Model", "ForCausalLM"), _TEXT, files=_LLAMA_FILES,
    settings={
        **_DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True,
    },
)

# Encoder-decoders. Also their bare backbone means generation.
_T5_FILES = _unigram(
    "T5Tokenizer", marks=("<pad>", "</s>", "<unk>"), single="$A </s>", pair="$A </s> $B </s>", eos_token="</s>",
    pad_token="<pad>", extra_ids=0,
)
_T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
}
for _suffix, _ours in (("Model", "model"), ("ForConditionalGeneration", "conditional-generation")):
    _add(
        f"t5-{_ours}", f"T5{_suffix}", "text2text-generation", _TEXT_TO_TEXT, config_class="T5Config", settings=_T5,
        files=_T5_FILES,
    )
_add(
    "t5-gated-conditional-generation", "T5ForConditionalGeneration", "text2text-generation", _TEXT_TO_TEXT,
    config_class="T5Config", settings={**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    files=_T5_FILES,
)
_add(
    "t5-encoder", "T5EncoderModel", "feature-extraction", _TEXT, config_class="T5Config", settings=_T5, files=_T5_FILES,
)
_BART: dict[str, Any] = {
    **_SEQ2SEQ, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_BART_FILES = _byte_bpe("BartTokenizer", marks=_ROBERTA_MARKS, pair=("<s>", "</s>"), **_ROBERTA_NAMES)
for _suffix, _ours in (("Model", "model"), ("ForConditionalGeneration", "conditional-generation")):
    _add(
        f"bart-{_ours}", f"Bart{_suffix}", "text2text-generation", _TEXT_TO_TEXT, config_class="BartConfig",
        settings=_BART, files=_BART_FILES,
    )
# Its decoder reads the encoder's text shifted by one, which forward makes from input_ids.
_add(
    "bart-sequence-classification", "BartForSequenceClassification", "text-classification", _TEXT,
    config_class="BartConfig", settings={**_BART, "num_labels": LABELS}, files=_BART_FILES,
)
# MarianTokenizer reads SentencePiece's own binary files only, so these two come without a tokenizer.
_MARIAN: dict[str, Any] = {
    **_SEQ2SEQ, "pad_token_id": VOCAB_SIZE - 1, "eos_token_id": 0, "decoder_start_token_id": VOCAB_SIZE - 1,
    "forced_eos_token_id": 0,
}
_add(
    "marian-model", "MarianModel", "text2text-generation", _TEXT_TO_TEXT, config_class="MarianConfig", settings=_MARIAN,
)
_add("marian-mt", "MarianMTModel", "text2text-generation", _TEXT_TO_TEXT, config_class="MarianConfig", settings=_MARIAN)
_PEGASUS: dict[str, Any] = {
    **_SEQ2SEQ, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1,
}
for _suffix, _ours in (("Model", "model"), ("ForConditionalGeneration", "conditional-generation")):
    _add(
        f"pegasus-{_ours}", f"Pegasus{_suffix}", "text2text-generation", _TEXT_TO_TEXT, config_class="PegasusConfig",
        settings=_PEGASUS,
        files=_unigram(
            "PegasusTokenizer", marks=("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"), single="$A </s>",
            pair="$A $B </s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask_2>", mask_token_sent="<mask_1>",
            offset=0,
        ),
    )

# Images.
_IMAGE = ("pixel_values",)
_PATCHES: dict[str, Any] = {**_WIDTH, "image_size": IMAGE_SIZE, "patch_size": 8}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
for _family, _prefix, _settings, _processor in (
    ("vit", "ViT", _PATCHES, "ViTImageProcessor"),
    (
        "swin", "Swin",
        {
            "image_size": IMAGE_SIZE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
            "window_size": 4,
        },
        "ViTImageProcessor",
    ),
    ("convnext", "ConvNext", _STAGES, "ConvNextImageProcessor"),
    ("resnet", "ResNet", {**_STAGES, "embedding_size": 8}, "ConvNextImageProcessor"),
    ("deit", "DeiT", _PATCHES, "DeiTImageProcessor"),
    (
        "beit", "Beit", {**_PATCHES, "use_relative_position_bias": True, "use_absolute_position_embeddings": False},
        "BeitImageProcessor",
    ),
    (
        "segformer", "Segformer",
        {
            "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        },
        "SegformerImageProcessor",
    ),
):
    for _suffix, _ours, _task in (
        ("Model", "model", "feature-extraction"),
        ("ForImageClassification", "image-classification", "image-classification"),
    ):
        _size = {"shortest_edge": IMAGE_SIZE} if _processor == "ConvNextImageProcessor" else _SQUARE
        _add(
            f"{_family}-{_ours}", f"{_prefix}{_suffix}", _task, _IMAGE, config_class=f"{_prefix}Config",
            settings={**_settings, "num_labels": LABELS}, files=_images(_processor, size=_size),
        )
_add(
    "deit-image-classification-with-teacher", "DeiTForImageClassificationWithTeacher", "image-classification", _IMAGE,
    config_class="DeiTConfig", settings={**_PATCHES, "num_labels": LABELS}, files=_images("DeiTImageProcessor"),
)
# BEiT's segmentation head reads four layers.
for _family, _prefix in (("segformer", "Segformer"), ("beit", "Beit")):
    _base = FAMILIES[f"{_family}-image-classification"]
    _add(
        f"{_family}-semantic-segmentation", f"{_prefix}ForSemanticSegmentation", "semantic-segmentation", _IMAGE,
        config_class=_base.config_class, files=_base.files,
        settings={
            **_base.settings, **({"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]} if _family == "beit" else {}),
        },
    )
_DETR: dict[str, Any] = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_queries": 10, "num_labels": LABELS,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
}
for _suffix, _ours, _task in (
    ("Model", "model", "feature-extraction"), ("ForObjectDetection", "object-detection", "object-detection"),
):
    _add(
        f"detr-{_ours}", f"Detr{_suffix}", _task, ("pixel_values", "pixel_mask"), config_class="DetrConfig",
        settings=_DETR,
        files=_images(
            "DetrImageProcessor", size={"shortest_edge": 64, "longest_edge": 96}, do_pad=True, format="coco_detection",
        ),
    )
    _add(
        f"yolos-{_ours}", f"Yolos{_suffix}", _task, _IMAGE, config_class="YolosConfig",
        settings={**_PATCHES, "image_size": [64, 96], "num_detection_tokens": 10, "num_labels": LABELS},
        files=_images(
            "YolosImageProcessor", size={"shortest_edge": 64, "longest_edge": 96}, do_pad=True, format="coco_detection",
        ),
    )

# Sound.
_SPEECH_ENCODER: dict[str, Any] = {
    **_WIDTH, "vocab_size": 32, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
_SPEECH_HEADS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Model", "model", "feature-extraction", {}), ("ForCTC", "ctc", "automatic-speech-recognition", {}),
    (
        "ForSequenceClassification", "sequence-classification", "audio-classification",
        {"num_labels": LABELS, "classifier_proj_size": 16},
    ),
    ("ForAudioFrameClassification", "audio-frame-classification", "audio-frame-classification", {"num_labels": LABELS}),
    (
        "ForXVector", "xvector", "audio-xvector",
        {"tdnn_dim": [16] * 5, "tdnn_kernel": [3, 2, 2, 1, 1], "tdnn_dilation": [1] * 5, "xvector_output_dim": 16},
    ),
)
for _family, _prefix, _heads in (("wav2vec2", "Wav2Vec2", _SPEECH_HEADS), ("hubert", "Hubert", _SPEECH_HEADS[:3])):
    for _suffix, _ours, _task, _extra in _heads:
        _add(
            f"{_family}-{_ours}", f"{_prefix}{_suffix}", _task, ("input_values",), config_class=f"{_prefix}Config",
            settings={**_SPEECH_ENCODER, **_extra},
            files=_together(_characters, _SPEECH) if _suffix == "ForCTC" else _SPEECH, optional=("attention_mask",),
        )
_WHISPER_MARKS = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)
# One second of sound instead of thirty: 100 frames of 10 ms, halved by the encoder.
_WHISPER: dict[str, Any] = {
    **_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1, "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
del _WHISPER["max_position_embeddings"]
_WHISPER_FILES = _together(
    _byte_bpe(
        "WhisperTokenizer", marks=_WHISPER_MARKS, pad_token="<|endoftext|>", errors="replace",
        processor_class="WhisperProcessor", **_END_OF_TEXT,
    ),
    _preprocessor(
        feature_extractor_type="WhisperFeatureExtractor", processor_class="WhisperProcessor", feature_size=16,
        hop_length=160, n_fft=400, chunk_length=1, n_samples=16000, nb_max_frames=100, sampling_rate=16000,
        padding_side="right", padding_value=0.0, return_attention_mask=False,
    ),
)
for _suffix, _ours in (("Model", "model"), ("ForConditionalGeneration", "conditional-generation")):
    _add(
        f"whisper-{_ours}", f"Whisper{_suffix}", "automatic-speech-recognition",
        ("input_features", "decoder_input_ids"), config_class="WhisperConfig", settings=_WHISPER, files=_WHISPER_FILES,
    )
_add(
    "whisper-audio-classification", "WhisperForAudioClassification", "audio-classification", ("input_features",),
    config_class="WhisperConfig", settings={**_WHISPER, "num_labels": LABELS, "classifier_proj_size": 16},
    files=_WHISPER_FILES,
)
for _suffix, _ours, _task in (
    ("Model", "model", "feature-extraction"),
    ("ForAudioClassification", "audio-classification", "audio-classification"),
):
    _add(
        f"ast-{_ours}", f"AST{_suffix}", _task, ("input_values",), config_class="ASTConfig",
        settings={**_WIDTH, "max_length": 64, "num_mel_bins": 32, "num_labels": LABELS},
        files=_preprocessor(
            feature_extractor_type="ASTFeatureExtractor", feature_size=1, sampling_rate=16000, num_mel_bins=32,
            max_length=64, do_normalize=True, mean=-4.27, std=4.57, padding_value=0.0, padding_side="right",
            return_attention_mask=False,
        ),
    )

# Images with text.
_CLIP: dict[str, Any] = {
    "projection_dim": 24,
    "text_config": {**_ENCODER, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    "vision_config": _PATCHES,
}
_CLIP_INPUTS = ("input_ids", "pixel_values", "attention_mask")
_add(
    "clip-model", "CLIPModel", "zero-shot-image-classification", _CLIP_INPUTS, config_class="CLIPConfig",
    settings=_CLIP,
    files=_together(
        _clip_bpe,
        _images(
            "CLIPImageProcessor", size={"shortest_edge": IMAGE_SIZE}, do_center_crop=True, crop_size=_SQUARE,
            do_convert_rgb=True, processor_class="CLIPProcessor",
        ),
    ),
)
_SIGLIP: dict[str, Any] = {
    "text_config": {
        **_ENCODER, "max_position_embeddings": 32, "projection_size": 32, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 1,
    },
    "vision_config": _PATCHES,
}
_SIGLIP_FILES = _together(
    _unigram(
        "T5Tokenizer", marks=("<pad>", "</s>", "<unk>"), single="$A </s>", pair="$A $B </s>", eos_token="</s>",
        pad_token="</s>", extra_ids=0, model_input_names=["input_ids"], processor_class="SiglipProcessor",
    ),
    _images("SiglipImageProcessor", processor_class="SiglipProcessor"),
)
# SigLIP was trained on padding without a mask, and its processor makes none.
_add(
    "siglip-model", "SiglipModel", "zero-shot-image-classification", ("input_ids", "pixel_values"),
    config_class="SiglipConfig", settings=_SIGLIP, files=_SIGLIP_FILES, optional=("attention_mask",),
)
_add(
    "siglip-image-classification", "SiglipForImageClassification", "image-classification", _IMAGE,
    config_class="SiglipConfig", settings={**_SIGLIP, "num_labels": LABELS}, files=_SIGLIP_FILES,
)
_BLIP: dict[str, Any] = {
    "projection_dim": 24, "image_text_hidden_size": 24,
    "text_config": {
        **_ENCODER, "encoder_hidden_size": 32, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
        "pad_token_id": 0,
    },
    "vision_config": _PATCHES,
}
# BlipForQuestionAnswering is left out: its forward returns an answer only together with labels.
_BLIP_FILES = _together(
    _wordpiece("BertTokenizer", processor_class="BlipProcessor", model_input_names=["input_ids", "attention_mask"]),
    _images("BlipImageProcessor", do_convert_rgb=True, processor_class="BlipProcessor"),
)
# Neither pipelines nor optimum name retrieval; scoring one image against texts is the nearest task.
for _name, _architecture, _task, _inputs in (
    ("blip-model", "BlipModel", "zero-shot-image-classification", _CLIP_INPUTS),
    (
        "blip-conditional-generation", "BlipForConditionalGeneration", "image-text-to-text",
        ("pixel_values", "input_ids", "attention_mask"),
    ),
    ("blip-image-text-retrieval", "BlipForImageTextRetrieval", "zero-shot-image-classification", _CLIP_INPUTS),
):
    _add(_name, _architecture, _task, _inputs, config_class="BlipConfig", settings=_BLIP, files=_BLIP_FILES)

# Documents.
_add_heads(
    "layoutlm", "LayoutLM",
    ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    ("input_ids", "bbox", "attention_mask", "token_type_ids"),
    settings={**_ENCODER, "max_2d_position_embeddings": 1024}, files=_wordpiece("LayoutLMTokenizer"),
    tasks={"ForQuestionAnswering": "document-question-answering"},
)
_PAGE = ("input_ids", "attention_mask", "bbox", "pixel_values")
_PAGE_BBOX_FIRST = ("input_ids", "bbox", "attention_mask", "pixel_values")
_add_heads(
    "layoutlmv3", "LayoutLMv3",
    ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"), _PAGE,
    orders={"Model": _PAGE_BBOX_FIRST, "ForTokenClassification": _PAGE_BBOX_FIRST},
    tasks={"ForQuestionAnswering": "document-question-answering"},
    settings={
        **_ROBERTA, "hidden_size": 48, "coordinate_size": 8, "shape_size": 8, "input_size": IMAGE_SIZE, "patch_size": 8,
        "max_2d_position_embeddings": 1024,
    },
    files=_together(
        _byte_bpe(
            "LayoutLMv3Tokenizer", marks=_ROBERTA_MARKS, pair=("<s>", "</s>"), processor_class="LayoutLMv3Processor",
            **_ROBERTA_NAMES,
        ),
        _images("LayoutLMv3ImageProcessor", apply_ocr=False, processor_class="LayoutLMv3Processor"),
    ),
)

# Time series.
_SERIES: dict[str, Any] = {
    "num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 12,
    "d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64, "do_mask_input": False,
}
for _suffix, _ours, _task in (
    ("Model", "model", "feature-extraction"), ("ForPrediction", "prediction", "time-series-forecasting"),
    ("ForClassification", "classification", "time-series-classification"),
    ("ForRegression", "regression", "time-series-regression"),
):
    _add(
        f"patchtst-{_ours}", f"PatchTST{_suffix}", _task, ("past_values",), config_class="PatchTSTConfig",
        settings={**_SERIES, **({"num_targets": LABELS} if _suffix in ("ForClassification", "ForRegression") else {})},
        optional=("past_observed_mask",),
    )

"""Models of several graphs, of many families: what they become, whether they say what PyTorch says, and how fast.

    python tests/benchmarks/bench_generating.py [--only REGEX] [--tokens 32] [--workdir DIR] [--no-peer]

Makes a small model with random weights of every family below (the class's default config, shrunk), converts all with
one ``ferry batch``, and prints for each: its graphs; whether `AutoModelForONNX` generates the tokens that PyTorch does,
greedily, for a batch whose first row is padded on the left; milliseconds per token of both; and whether optimum loads
the folder and generates the same, in an environment of its own. A segmenter embeds an image once and is asked about it
twice, with points and with boxes: the two say the same where all numbers are within 1e-4, and a prompt takes the place
of a token. Takes about twenty minutes on 2 quiet cores; a second call with the same ``--workdir`` goes on where the
first ended.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import FERRY, peer_environment

# Imported before the tests' folder is looked into, which has folders of the same names as the packages.
import onnx_config  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

FAMILIES = {
    "causal": [
        "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "LlamaForCausalLM",
        "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM", "StableLmForCausalLM",
        "OlmoForCausalLM", "GraniteForCausalLM", "CohereForCausalLM", "MambaForCausalLM", "JambaForCausalLM",
        "BambaForCausalLM", "RecurrentGemmaForCausalLM",
    ],
    "encoder-decoder": [
        "T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BartForConditionalGeneration",
        "MBartForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration",
        "M2M100ForConditionalGeneration", "BlenderbotForConditionalGeneration", "WhisperForConditionalGeneration",
        "VisionEncoderDecoderModel",
    ],
    "vision-language": [
        "LlavaForConditionalGeneration", "VipLlavaForConditionalGeneration", "VideoLlavaForConditionalGeneration",
        "InternVLForConditionalGeneration", "QianfanOCRForConditionalGeneration", "PaliGemmaForConditionalGeneration",
        "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    ],
    "audio-language": ["VoxtralForConditionalGeneration", "Qwen2AudioForConditionalGeneration",
                       "AudioFlamingo3ForConditionalGeneration"],
    "segmenter": ["SamModel", "SamHQModel", "Sam2Model"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression over classes")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--no-peer", action="store_true", help="do not load anything with optimum")
    arguments = parser.parse_args()
    work = arguments.workdir or Path(tempfile.mkdtemp(prefix="generating-"))
    names = [(kind, name) for kind, all_ in FAMILIES.items() for name in all_ if re.search(arguments.only, name)]
    warnings.simplefilter("ignore")
    made = {name: make(name, work / "models" / name) for _, name in names}
    ready = [name for name, problem in made.items() if problem is None]
    entries = convert(ready, work)
    peer = None if arguments.no_peer else peer_environment().with_name("python")
    print(f"{'class':42} {'graphs':7} {'same tokens':12} {'ours ms':>8} {'torch ms':>8} {'ratio':>6}  optimum")
    for kind, name in names:
        if made[name] is not None:
            print(f"{name:42} {kind}: no small model: {made[name]}")
            continue
        print(f"{name:42} {row(name, entries[name], work, arguments.tokens, peer)}", flush=True)
    print(f"in {work}")
    return 0


def make(name: str, folder: Path) -> str | None:
    """Write a small model of a class; return why there is none."""
    import torch
    import transformers
    from tiny_models import _disturb
    from tiny_segmenters import SEGMENTERS, make_telling

    from onnx_config.twin import default_config, shrink

    if (folder / "config.json").is_file():
        return None
    try:
        cls = getattr(transformers, name)
        if name in SEGMENTERS:
            # Of images as large as they are by default, one takes a minute.
            torch.manual_seed(0)
            model = cls(SEGMENTERS[name]()).eval()
            make_telling(model)
            model.save_pretrained(folder)
            return None
        config = (
            vision_encoder_decoder()
            if name == "VisionEncoderDecoderModel"
            else default_config(cls.config_class.model_type)
        )
        config.architectures = [name]
        complete(config)
        torch.manual_seed(0)
        model = cls(shrink(config, cls).config).eval()
        _disturb(model)
        model.save_pretrained(folder)
    # What a class says to a config is its own choice.
    except Exception as error:  # noqa: BLE001
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None


def complete(config: Any) -> None:
    """Give a composite config what its own defaults leave out, and every published one has."""
    for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
        if getattr(config, name, 0) is None:
            setattr(config, name, config.get_text_config().vocab_size - 1)
    if config.model_type == "qwen2_vl":
        config.vision_config.hidden_size = config.get_text_config().hidden_size
    if config.model_type in ("t5", "mt5"):
        config.decoder_start_token_id = config.pad_token_id
    if config.model_type == "bamba":
        config.attn_layer_indices = [1]
    if config.model_type == "gemma3":
        config.vision_config.image_size, config.vision_config.patch_size, config.mm_tokens_per_image = 56, 14, 4


def vision_encoder_decoder() -> Any:
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = t.ViTConfig(**small, image_size=32, patch_size=8)
    decoder = t.TrOCRConfig(
        vocab_size=400, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=128, cross_attention_hidden_size=32,
    )  # fmt: skip
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
    return config


def convert(names: list[str], work: Path) -> Mapping[str, Mapping[str, Any]]:
    manifest = work / "manifest.txt"
    manifest.write_text("".join(f"./models/{name}\n" for name in names), encoding="utf-8")
    command = [FERRY, "batch", manifest.name, "--engine", "local", "--home", "home", "--report", "report.json"]
    with (work / "batch.log").open("w") as log:
        subprocess.run([*command, "--output", "onnx"], cwd=work, stdout=log, stderr=log, check=False)
    report = json.loads((work / "report.json").read_text(encoding="utf-8"))
    return {Path(entry["id"]).name: entry for entry in report["models"]}


def row(name: str, entry: Mapping[str, Any], work: Path, tokens: int, peer: Path | None) -> str:
    if entry["status"] not in ("converted", "reused"):
        return f"{entry['status']}: {(entry['error'] or {}).get('message', '')[:200]}"
    graphs = f"{len(entry['graphs']):^7}"
    if name in FAMILIES["segmenter"]:
        try:
            return f"{graphs} {segmented(name, work)}"
        # Whatever a model says, the table goes on.
        except Exception as error:  # noqa: BLE001
            return f"{graphs} not asked: {' '.join(f'{type(error).__name__}: {error}'.split())[:160]}"
    if not any("past" in tensor["name"] for graph in entry["graphs"] for tensor in graph["inputs"]):
        states = any(re.search(r"state|cache", t["name"]) for g in entry["graphs"] for t in g["inputs"])
        if not states:
            return f"{graphs} without a cache: {'; '.join(entry['notes'])[:160]}"
    try:
        inputs = inputs_of(work / "models" / name)
        ours = generate(load_ours(work / "onnx" / name), inputs, tokens)
        theirs = generate(load_torch(name, work / "models" / name), inputs, tokens)
    # Whatever a model says, the table goes on.
    except Exception as error:  # noqa: BLE001
        return f"{graphs} not generated: {' '.join(f'{type(error).__name__}: {error}'.split())[:160]}"
    same = ours[0] == theirs[0]
    answer = f"{graphs} {same!s:12} {ours[1]:8.2f} {theirs[1]:8.2f} {theirs[1] / ours[1]:6.2f}"
    return f"{answer}  {by_optimum(entry, work / 'onnx' / name, inputs, ours[0], tokens, peer)}"


def segmented(name: str, work: Path) -> str:
    """Return whether a segmenter says what PyTorch's says to two prompts about one image, and how long each takes."""
    import torch

    models = load_ours(work / "onnx" / name), load_torch(name, work / "models" / name)
    inputs = inputs_of(work / "models" / name)
    image = inputs.pop("pixel_values")
    points, side = inputs["input_points"], image.shape[-1]
    corners = (torch.rand(*points.shape[:2], 2, 2) * side).sort(dim=-2).values.flatten(-2)
    prompts = [inputs, {"input_points": points.flip(-1)[:, :, :1]}, {"input_boxes": corners}]
    same, took = [], [0.0, 0.0]
    with torch.no_grad():
        embedded = [one.get_image_embeddings(image) for one in models]
        given = [
            dict(zip(("image_embeddings", "intermediate_embeddings"), all_, strict=False))
            if isinstance(all_, tuple)
            else {"image_embeddings": all_}
            for all_ in embedded
        ]
        for prompt in prompts:
            answers = []
            for number, one in enumerate(models):
                start = time.perf_counter()
                answers.append(one(**given[number], **prompt))
                took[number] += 1000 * (time.perf_counter() - start) / len(prompts)
            ours, theirs = answers
            numbers = [name for name in ours if isinstance(ours[name], torch.Tensor)]
            same.append(all(torch.allclose(ours[k], theirs[k], rtol=1e-4, atol=1e-4) for k in numbers))
    return f"{all(same)!s:12} {took[0]:8.2f} {took[1]:8.2f} {took[1] / took[0]:6.2f}  optimum not asked"


def inputs_of(folder: Path) -> dict[str, Any]:
    """Return inputs for a batch of two, the first row of a causal model's padded on the left."""
    import torch

    from onnx_config import UniversalOnnxConfig

    universal = UniversalOnnxConfig.from_model_path(folder)
    inputs = dict(universal.generate_dummy_inputs(batch_size=2))
    dropped = [name for name in inputs if name.startswith(("decoder_", "past", "labels"))]
    kept = {name: value for name, value in inputs.items() if name not in dropped and name != "position_ids"}
    mask = kept.get("attention_mask")
    if universal.task_family == "text-generation" and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        mask[0, :3] = 0
    return kept


def load_ours(folder: Path) -> Any:
    from onnx_config import AutoModelForONNX

    return AutoModelForONNX.from_pretrained(folder, threads=1)


def load_torch(name: str, folder: Path) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1)
    return getattr(transformers, name).from_pretrained(folder).eval()


def generate(model: Any, inputs: Mapping[str, Any], tokens: int) -> tuple[list[list[int]], float]:
    """Return the tokens, and the milliseconds that each took."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    model.generate(**inputs, **options)
    start = time.perf_counter()
    found = model.generate(**inputs, **options)
    return found.tolist(), 1000 * (time.perf_counter() - start) / tokens


def by_optimum(
    entry: Mapping[str, Any], folder: Path, inputs: Mapping[str, Any], want: object, tokens: int, peer: Path | None
) -> str:
    if peer is None:
        return "not asked"
    roles = {graph["role"] for graph in entry["graphs"]}
    task = entry["task"]
    if "embed_tokens" in roles or "vision_encoder" in roles:
        return "has no class for it"
    loader = "ORTModelForCausalLM"
    if "encoder" in roles:
        loader = {"automatic-speech-recognition": "ORTModelForSpeechSeq2Seq", "image-to-text": "ORTModelForVision2Seq"}
        loader = loader.get(task, "ORTModelForSeq2SeqLM")
    asked = {
        "folder": str(folder),
        "loader": loader,
        "inputs": {name: value.tolist() for name, value in inputs.items()},
        "generate": {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1},
    }
    script = Path(__file__).parents[1] / "interop" / "run_optimum.py"
    run = subprocess.run([peer, script], input=json.dumps(asked), capture_output=True, text=True, check=False)
    if run.returncode:
        return f"refuses: {run.stderr.strip().splitlines()[-1][:120]}"
    return "the same tokens" if json.loads(run.stdout)["sequences"] == want else "OTHER TOKENS"


if __name__ == "__main__":
    sys.exit(main())

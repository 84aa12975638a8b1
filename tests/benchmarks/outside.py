"""Compares a converted model with PyTorch on inputs that conversion itself does not try.

What a graph takes for granted shows where it does not hold: texts padded on the left, masks with holes, flags that are
set, a text of nothing but one kind of token, special tokens in the middle, placeholders of images elsewhere. A graph
with a cache goes on with a text in two steps and has to say what the model says to all of it at once; models of several
graphs generate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from onnx_config.config_sizes import config_for
from onnx_config.declarations import declare
from onnx_config.hub import read_config
from onnx_config.input_generator import generate_inputs, special_token_ids, with_room
from onnx_config.spec import ModelSpec, TensorSpec

__all__ = ["differences"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]


def differences(model: Any, folder: Path, entry: Mapping[str, Any], spec: ModelSpec) -> Iterator[str]:
    """Yield a line for each comparison of ``model``, read from ``folder``: ``ok …`` or what differs."""
    graphs = {graph["role"]: graph for graph in entry["graphs"]}
    if set(graphs) == {"model"}:
        graph = graphs["model"]
        if any(i["name"].startswith("past_key_values.") for i in graph["inputs"]):
            yield from in_two_steps(model, graph)
        else:
            yield from at_once(folder, model, graph, spec)
    else:
        yield from generated(folder, model, entry, spec)


def session_of(graph: Mapping[str, Any]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph["path"], options, providers=["CPUExecutionProvider"])


def at_once(folder: Path, model: Any, graph: Mapping[str, Any], spec: ModelSpec) -> Iterator[str]:
    session = session_of(graph)
    names = [o.name for o in session.get_outputs()]
    fixed = {i["name"]: i["shape"] for i in graph["inputs"]}
    for label, feed in feeds(folder, model, spec, fixed):
        given = {name: value for name, value in feed.items() if name in fixed}
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                answer = model(**{k: torch.from_numpy(v.copy()) for k, v in given.items()}, **flags_of(model))
        except Exception as error:  # noqa: BLE001  # the model takes no such thing
            yield f"ok {label} is refused by the model: {type(error).__name__}"
            continue
        want = dict(leaves(answer))
        try:
            got = dict(zip(names, session.run(None, given), strict=True))
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's own
            yield f"{label}: the graph stops: {' '.join(str(error).split())[:200]}"
            continue
        yield compared(label, got, want)


def flags_of(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if any(a.name == "use_cache" for a in declare(type(model)).arguments) else {}


def feeds(
    folder: Path, model: Any, spec: ModelSpec, shapes: Mapping[str, list[int | str]], seed: int = 11
) -> Iterator[tuple[str, Feed]]:
    """Yield inputs that differ from conversion's own in one way each."""
    config = read_config(str(folder))
    rng = random.Random(seed)
    inputs = tuple(narrowed(tensor, shapes[tensor.name]) for tensor in spec.inputs if tensor.name in shapes)

    def made(number: int, **options: Any) -> Feed:
        sizes = dict(spec.sizes)
        for axis, base in spec.sizes.items():
            low, high = spec.axis_ranges.get(axis, (1, None))
            grain = spec.axis_steps.get(axis, 1)
            size = rng.choice([base + grain, max(low, base - grain), base + 3 * grain])
            sizes[axis] = max(low, size if high is None else min(size, high // grain * grain))
            if axis.endswith("batch_size"):
                sizes[axis] = low * 3
        sizes = with_room(inputs, spec.values, sizes)
        declared = declare(type(model))
        return generate_inputs(inputs, config, declared, sizes, rules=spec.values, seed=seed + number, **options)

    yield "other sizes", made(0)
    masks = [t.name for t in inputs if t.name.endswith("mask")]
    text = config_for(config, "text")
    if masks:
        yield "left padding", made(1, padding=True, padding_side="left")
        feed, chance = made(2), np.random.default_rng(seed)
        for name in masks:
            holes = chance.random(feed[name].shape) < 0.7
            holes[..., :1] = True
            ones = feed[name].astype(bool)
            feed[name] = np.where(ones, holes, chance.random(feed[name].shape) < 0.3).astype(feed[name].dtype)
        yield "holes in masks", feed
    flags = [t.name for t in inputs if t.dtype == "bool" and t.name not in masks]
    if flags:
        feed, chance = made(3), np.random.default_rng(seed)
        for name in flags:
            feed[name] = chance.random(feed[name].shape) < 0.4
        yield "flags", feed
    for name in [t.name for t in inputs if "type" in t.name and t.dtype == "int64"]:
        feed = made(4)
        largest = int(feed[name].max())
        for value in {0, largest}:
            yield f"{name} all {value}", {**feed, name: np.full_like(feed[name], value)}
    if "input_ids" in shapes:
        feed = made(5)
        ids = feed["input_ids"]
        rule = spec.values.get("input_ids")
        placeholders = set() if rule is None else {token for token, _ in rule.placeholders(spec.sizes)}
        if placeholders:
            rolled = np.stack([np.roll(row, shift, -1) for shift, row in enumerate(ids, start=1)])
            yield "placeholders elsewhere", {**feed, "input_ids": rolled}
        size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 0
        special = sorted(i for i in special_token_ids(config) if 0 <= i < size and i not in placeholders)
        if special and ids.shape[-1] > 6 and not placeholders:
            feed = made(6)
            ids = feed["input_ids"].copy()
            for row in ids.reshape(-1, ids.shape[-1]):
                for token in rng.sample(special, min(3, len(special))):
                    row[rng.randrange(1, ids.shape[-1] - 1)] = token
            yield "special tokens inside", {**feed, "input_ids": ids}


def narrowed(tensor: TensorSpec, shape: list[int | str]) -> TensorSpec:
    """Return a tensor with the sizes that its graph has fixed."""
    kept = tuple(b if isinstance(b, int) else a for a, b in zip(tensor.shape, shape, strict=True))
    return TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=kept)


def in_two_steps(model: Any, graph: Mapping[str, Any], seed: int = 5) -> Iterator[str]:
    """Compare what a graph with a cache says of the second part of a text with what the model says of all of it."""
    session = session_of(graph)
    kinds = {"int64": np.int64, "float": np.float32, "bool": np.bool_, "int32": np.int32}
    shapes = {i["name"]: i["shape"] for i in graph["inputs"]}
    types = {i.name: kinds[i.type[7:-1]] for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    if other := [n for n in shapes if n not in known and not n.startswith("past_key_values.")]:
        yield f"ok not compared in steps: {other}"
        return
    chance = np.random.default_rng(seed)
    text = config_for(model.config, "text")
    size = getattr(text, "vocab_size", 50)
    special = {i for i in special_token_ids(model.config) if 0 <= i < size}
    ordinary = np.setdiff1d(np.arange(size), sorted(special))
    for label, rows, first, second, padded in (
        ("a token after a prompt", 1, 9, 1, False),
        ("tokens after a prompt", 3, 11, 4, False),
        ("left padding", 3, 13, 1, True),
    ):
        if padded and "attention_mask" not in shapes:
            continue
        ids = chance.choice(ordinary, (rows, first + second)).astype(np.int64)
        mask = np.ones_like(ids)
        if padded:
            for row in range(1, rows):
                mask[row, : 2 + row] = 0
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        whole["token_type_ids"] = np.zeros_like(ids)
        whole = {name: value for name, value in whole.items() if name in shapes}
        with torch.no_grad():
            torch.manual_seed(0)
            want = model(**{k: torch.from_numpy(v) for k, v in whole.items()}, **flags_of(model)).logits.float().numpy()

        def part(start: int, end: int, past: Feed, whole: Feed = whole) -> Feed:
            # What keeps states has no use for a mask of what it has read.
            begin = {k: 0 if k == "attention_mask" and shapes[k] != shapes["input_ids"] else start for k in whole}
            return {**{k: v[:, begin[k] : end] for k, v in whole.items()}, **past}

        empty = {
            name: np.zeros([rows if s == "batch_size" else 0 if isinstance(s, str) else s for s in shape], types[name])
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }
        try:
            one = dict(zip(names, session.run(None, part(0, first, empty)), strict=True))
            past = {name: one[name.replace("past_key_values.", "present.", 1)] for name in empty}
            two = dict(zip(names, session.run(None, part(first, first + second, past)), strict=True))
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's own
            yield f"{label}: the graph stops: {' '.join(str(error).split())[:200]}"
            continue
        got = np.concatenate([one["logits"], two["logits"]], axis=1)
        want = want[:, -got.shape[1] :]
        seen = mask[..., None].astype(bool)
        yield compared(label, {"logits": np.where(seen, got, 0)}, {"logits": np.where(seen, want, 0)})


def generated(folder: Path, model: Any, entry: Mapping[str, Any], spec: ModelSpec) -> Iterator[str]:
    """Compare what several graphs say together with what the model says."""
    from onnx_config import AutoModelForONNX

    loaded = AutoModelForONNX.from_pretrained(entry["artifact"], threads=1)
    # Of an image that the graphs hold at one size, that is the size.
    held = {i["name"]: i["shape"] for graph in entry["graphs"] for i in graph["inputs"]}
    shapes = {t.name: held.get(t.name, list(t.shape)) for t in spec.inputs}
    for label, feed in feeds(folder, model, spec, shapes):
        given = {k: torch.from_numpy(v.copy()) for k, v in feed.items()}
        try:
            with torch.no_grad():
                want = dict(leaves(model(**given, **flags_of(model))))
        except Exception as error:  # noqa: BLE001  # the model takes no such thing
            yield f"ok {label} is refused by the model: {type(error).__name__}"
            continue
        try:
            got = dict(leaves(loaded(**given, **flags_of(model))))
        except Exception as error:  # noqa: BLE001  # said by the runtime
            yield f"{label}: refused: {type(error).__name__}: {str(error)[:200]}"
            continue
        shared = [name for name in ("logits", "last_hidden_state", "logits_per_image") if name in got]
        shared = shared or [name for name in got if name in want]
        yield compared(label, {n: got[n] for n in shared}, want)
    if not (hasattr(model, "generate") and hasattr(loaded, "generate") and loaded.generator is not None):
        return
    for label, feed in feeds(folder, model, spec, shapes, seed=23):
        if label not in ("other sizes", "left padding"):
            continue
        given = {k: torch.from_numpy(v.copy()) for k, v in feed.items() if not k.startswith("decoder_")}
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        try:
            with torch.no_grad():
                want = np.stack([x.float().numpy() for x in model.generate(**given, **options).logits], 1)
        except Exception as error:  # noqa: BLE001  # the model takes no such thing
            yield f"ok generating, {label}: refused by the model: {type(error).__name__}"
            continue
        try:
            got = np.stack([x.float().numpy() for x in loaded.generate(**given, **options).logits], 1)
        except Exception as error:  # noqa: BLE001  # said by the runtime
            yield f"generating, {label}: refused: {type(error).__name__}: {str(error)[:200]}"
            continue
        yield compared(f"generating, {label}", {"logits": got}, {"logits": want})


def compared(label: str, got: Mapping[str, Array], want: Mapping[str, Array]) -> str:
    shared = [name for name in got if name.removeprefix("output.") in want]
    if not shared:
        return f"{label}: no output in common: {sorted(got)[:4]} and {sorted(want)[:4]}"
    if all(not got[name].size for name in shared):
        return f"{label}: all outputs are empty"
    wrong = [f"{name} {text}" for name in shared if (text := unlike(got[name], want[name.removeprefix("output.")]))]
    return f"{label}: {', '.join(wrong)[:200]}" if wrong else f"ok {label}"


def unlike(got: Array, want: Array) -> str:
    if got.shape != want.shape:
        return f"has shape {got.shape} for {want.shape}"
    if not got.size:
        return ""
    if got.dtype.kind in "iub":
        return "" if np.array_equal(got, want) else f"differs in {int((got != want).sum())} of {got.size} numbers"
    got, want = got.astype(np.float64), want.astype(np.float64)
    if (np.isnan(got) != np.isnan(want)).any():
        return "has NaN elsewhere"
    finite = np.isfinite(want) & (np.abs(want) < 1e30)
    scale = float(np.std(want[finite])) if finite.any() else 0.0
    worst = float(np.max(np.abs(np.where(finite, got - want, 0)))) if finite.any() else 0.0
    return "" if worst <= 1e-4 + 2e-3 * scale else f"differs by {worst:.2e} at a spread of {scale:.2e}"


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Yield the tensors of an output under dotted names, caches left out."""
    if isinstance(value, torch.Tensor):
        yield prefix or "output", (value.detach().float() if value.is_floating_point() else value.detach()).numpy()
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{prefix}.{index}" if prefix else str(index))

"""Detect and convert classes of transformers that nobody chose: all that its auto mappings list.

    python tests/benchmarks/bench_heldout.py --workdir DIR [--only REGEX] [--without CASES.jsonl]
        [--unlisted] [--sample N] [--seed S] [--convert] [--batch 40] [--workers 1] [--again STEP]

Of each class a tiny model is made: the default config of its model type, shrunk as detection shrinks it, with random
weights. Classes that cannot be built so are listed. So are those whose model does not run once in PyTorch, neither on
plain texts, images or sounds nor on what detection proposes, with the words of both: no converter is to blame where a
default config makes no model, yet what detection alone does not find shows there. Each of the others is then detected
in a process of its own, and what detection says is held against what ``forward`` takes. With ``--convert`` they are
converted instead, by ``ferry batch``, and every converted one is compared with PyTorch once more, from outside and with
inputs that conversion does not try: texts padded on the left, masks with holes, placeholders of images elsewhere, other
sizes (``outside.py``).

``--sample N`` takes one class of each model type first; ``--without`` leaves out the classes that the lines of a file
name (``"cls"``); ``--unlisted`` takes the classes that transformers exports and no auto mapping lists, parts of other
models for the most part. All is kept in ``--workdir``, one line of JSON a class, so that a second call goes on where
the first one ended; ``--again detect``, ``convert`` or ``check`` does a step once more. Detecting all takes about an
hour of one core, converting half a minute a class.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers.models.auto import modeling_auto

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

Json = dict[str, Any]

BUDGET = 500_000
MOST_TWINS = 3
BUILD_SECONDS = 300
DETECT_SECONDS = 240
CHECK_SECONDS = 300
MEMORY_BYTES = 8 << 30
DONE = ("converted", "reused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--only", default="", help="regular expression over classes and model types")
    parser.add_argument("--without", type=Path, help="classes to leave out, one JSON object a line")
    parser.add_argument("--unlisted", action="store_true", help="the classes that no auto mapping lists")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert", action="store_true")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--again", choices=("detect", "convert", "check"), action="append", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    work: Path = arguments.workdir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    cases = chosen(arguments)
    made: list[tuple[str, str]] = []
    detected = 0
    for start in range(0, len(cases), 10):
        part = cases[start : start + 10]
        built = step("built", part, work, build, BUILD_SECONDS)
        part = [case for case in part if not built[case[0]].get("error")]
        for name, answer in built.items():
            if answer.get("error"):
                print(f"{answer.get('stage', 'not built'):10} {name}: {answer['error'][:300]}")
        found = {}
        if not arguments.convert or "detect" in arguments.again:
            found = step("detected", part, work, detect, DETECT_SECONDS, again="detect" in arguments.again)
        for name, answer in found.items():
            if answer.get("error"):
                print(f"{'detect':10} {name}: {answer['error'][:400]}")
            detected += not answer.get("error")
        made += part
        print(f"classes {start + len(built)}  built {len(made)}  detected {detected}", flush=True)
    if arguments.convert:
        convert(made, work, arguments)


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (class, model type) of the auto mappings, or of what they do not list, each class once."""
    types: dict[str, str] = {}
    for name in sorted(vars(modeling_auto)):
        if "MODEL" in name and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in getattr(modeling_auto, name).items():
                for cls in (classes,) if isinstance(classes, str) else classes:
                    types.setdefault(cls, model_type)
    if arguments.unlisted:
        types = unlisted(types)
    if arguments.without:
        for line in arguments.without.read_text().splitlines():
            types.pop(json.loads(line)["cls"], None)
    cases = sorted((c, t) for c, t in types.items() if re.search(arguments.only, c) or re.search(arguments.only, t))
    if arguments.sample:
        random.Random(arguments.seed).shuffle(cases)
        seen: Counter[str] = Counter()
        rounds = []
        for case in cases:
            rounds.append(seen[case[1]])
            seen[case[1]] += 1
        order = sorted(range(len(cases)), key=lambda i: rounds[i])
        cases = [cases[i] for i in order[: arguments.sample]]
    return cases


def unlisted(listed: dict[str, str]) -> dict[str, str]:
    """Return class -> model type of what transformers exports beside ``listed``, where it is called as a model is."""
    found = {}
    for name in sorted(set(dir(transformers)) - listed.keys()):
        if not name[0].isupper() or name.endswith("PreTrainedModel"):
            continue
        # Some names need what is not installed, and say so only when they are looked at.
        made = getattr(transformers, name, None)
        if not inspect.isclass(made) or not issubclass(made, transformers.PreTrainedModel):
            continue
        if made.config_class is not None and made.forward is not transformers.PreTrainedModel.forward:
            found[name] = made.config_class.model_type
    return found


def step(
    name: str,
    cases: list[tuple[str, str]],
    work: Path,
    do: Callable[[str, str, Path], Json],
    seconds: int,
    *,
    again: bool = False,
) -> dict[str, Json]:
    """Do one thing for each class, in a process of its own, unless it was done before; return the answers by class."""
    path = work / f"{name}.jsonl"
    known = {a["cls"]: a for a in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    wanted = [case for case in cases if again or case[0] not in known]
    with path.open("a") as file:
        for number, (cls, model_type) in enumerate(wanted, start=1):
            started = time.monotonic()
            answer = {
                "cls": cls,
                "model_type": model_type,
                **forked(lambda c=cls, t=model_type: do(c, t, work), seconds),
            }
            answer["seconds"] = round(time.monotonic() - started, 2)
            known[cls] = answer
            file.write(json.dumps(answer) + "\n")
            file.flush()
            if number % 50 == 0:
                print(f"{name} {number} of {len(wanted)}", file=sys.stderr, flush=True)
    return {cls: known[cls] for cls, _ in cases}


def forked(do: Callable[[], Json], seconds: int) -> Json:
    """Return what ``do`` returns in a child, or what ended it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES * 4, MEMORY_BYTES * 4))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            answer = do()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the answer
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({Path(last.filename).name}:{last.lineno})"
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1500]}{where}"}
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return json.loads(text) if text else {"error": f"ended by {signal.Signals(-code).name if code < 0 else code}"}


def build(cls: str, model_type: str, work: Path) -> Json:
    """Write the tiny model's folder; refuse one whose weights do not survive that, or that cannot be run."""
    from onnx_config.twin import default_config, twins

    folder = work / "models" / cls
    made = getattr(transformers, cls)
    # A part of a model has a config of its own, under a type that no auto mapping may know.
    own = made.config_class.model_type == model_type
    config = made.config_class() if own else default_config(model_type)
    refusals = []
    # What was cut so that the class cannot run may be cut otherwise.
    for twin in islice(twins(config, made, budget=BUDGET, asked=False), MOST_TWINS):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write_model(made, twin.config, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        refusal = refused(made, folder)
        if refusal is None:
            return {"parameters": twin.parameters, "notes": list(twin.notes)}
        refusals.append(refusal)
    shutil.rmtree(folder)
    return {"error": refusals[0], "stage": "not run"}


def write_model(made: Any, config: Any, folder: Path) -> None:
    from tiny_models import _disturb

    torch.manual_seed(0)
    model = made(config).eval()
    _disturb(model)
    model.save_pretrained(folder)
    again = made.from_pretrained(folder).state_dict()
    lost = [k for k, v in model.state_dict().items() if k in again and not torch.equal(v, again[k])]
    if lost:
        raise ValueError(f"weights do not survive saving and loading: {lost[:3]}")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [made.__name__]}, indent=1))


def refused(made: Any, folder: Path) -> str | None:
    """Return what a model says to plain inputs and to those that detection proposes; ``None``: it takes one of them."""
    from onnx_config import UniversalOnnxConfig

    model = made.from_pretrained(folder).eval()
    words = []

    def proposed() -> Json:
        found = UniversalOnnxConfig.from_pretrained(folder)
        return {**found.generate_dummy_inputs(), **found.forward_flags}

    for inputs in (lambda: plain_inputs(model), proposed):
        try:
            with torch.no_grad():
                model(**inputs())
            return None
        except Exception as error:  # noqa: BLE001  # the class's own
            words.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return " | ".join(words)


def plain_inputs(model: Any) -> Json:
    """Return a text, an image, a sound: whatever of them a model's main inputs are."""
    from onnx_config.config_sizes import config_size, image_size

    channels = config_size(model.config, "num_channels", "image") or 3
    bins = config_size(model.config, "feature_size", "audio") or 80
    known: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: torch.arange(5, 21).repeat(2, 1),
        "pixel_values": lambda: torch.rand(2, channels, *(image_size(model.config) or (224, 224))),
        "input_values": lambda: torch.rand(2, 16000),
        "input_features": lambda: torch.rand(2, bins, 3000),
        "decoder_input_ids": lambda: torch.arange(5, 17).repeat(2, 1),
    }
    wanted = inspect.signature(model.forward).parameters
    names = {model.main_input_name, "decoder_input_ids"} & wanted.keys()
    return {name: known[name]() for name in known if name in names}


def detect(cls: str, model_type: str, work: Path) -> Json:
    """Return the inputs, outputs and axes found; an error where they cannot be those of the class."""
    from onnx_config import UniversalOnnxConfig

    found = UniversalOnnxConfig.from_pretrained(work / "models" / cls)
    spec = found.spec
    names = [tensor.name for tensor in spec.inputs]
    accepted = inspect.signature(getattr(transformers, cls).forward).parameters
    answer: Json = {"task": spec.task, "architecture": spec.architecture, "spec": spec.to_json()}
    if not names:
        answer["error"] = "no inputs"
    elif unknown := [name for name in names if name not in accepted]:
        answer["error"] = f"inputs that {cls} does not take: {unknown}"
    model = found.model_class.from_pretrained(work / "models" / cls).eval()
    # Other sizes than the ones that detection tried.
    sizes = next(iter(other_sizes(answer["spec"], random.Random(1))))
    try:
        with torch.no_grad():
            model(**found.generate_dummy_inputs(seed=7, **sizes), **found.forward_flags)
    except Exception as error:  # noqa: BLE001  # the class's own
        answer.setdefault("error", f"refused at {sizes}: {type(error).__name__}: {error}"[:500])
    return answer


def other_sizes(spec: Json, rng: random.Random, count: int = 1) -> Iterator[dict[str, int]]:
    """Yield sizes within an answer's ranges and steps."""
    for _ in range(count):
        sizes = {}
        for axis, base in spec["sizes"].items():
            low, high = spec["axis_ranges"].get(axis, (1, None))
            grain = spec["axis_steps"].get(axis, 1)
            size = rng.choice([max(low, base * 3 // 4), base + grain, base + 3 * grain, max(low, base - grain)])
            size = max(low, size if high is None else min(size, high))
            sizes[axis] = max(-(-low // grain), size // grain) * grain
        yield sizes


def convert(cases: list[tuple[str, str]], work: Path, arguments: argparse.Namespace) -> None:
    path = work / "converted.jsonl"
    known = {a["cls"]: a for a in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    wanted = [case for case in cases if "convert" in arguments.again or case[0] not in known]
    for start in range(0, len(wanted), arguments.batch):
        part = wanted[start : start + arguments.batch]
        manifest, report = work / "manifest.yaml", work / "report.json"
        manifest.write_text("models:\n" + "".join(f"  - id: {work / 'models' / cls}\n" for cls, _ in part))
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "flows.entry", "batch", str(manifest), "--engine", "local", "--output"]
        command += [str(work / "out"), "--report", str(report), "--workers", str(arguments.workers), "--retry-failed"]
        with (work / "batch.log").open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False, env={"FERRY_TIMEOUT": "600", **os.environ})
        entries = {Path(e["id"]).name: e for e in json.loads(report.read_text())["models"]} if report.exists() else {}
        with path.open("a") as file:
            for cls, model_type in part:
                known[cls] = {"cls": cls, "model_type": model_type, **entries.get(cls, {"status": "missing"})}
                file.write(json.dumps(known[cls]) + "\n")
        checks = [case for case in part if known[case[0]]["status"] in DONE]
        step("checked", checks, work, check, CHECK_SECONDS, again=True)
        print(f"converted {start + len(part)} of {len(wanted)}", file=sys.stderr, flush=True)
    converted = [case for case in cases if known[case[0]]["status"] in DONE]
    checked = step("checked", converted, work, check, CHECK_SECONDS, again="check" in arguments.again)
    kinds: Counter[str] = Counter()
    for cls, _ in cases:
        entry, error = known[cls], known[cls].get("error") or {}
        if entry["status"] in DONE:
            verdict = checked[cls].get("error") or checked[cls]["verdict"]
            kinds["exact" if verdict == "exact" else "not exact"] += 1
            if verdict != "exact":
                print(f"{'silent?':10} {cls}: {verdict[:300]}")
        else:
            kinds[error.get("kind", entry["status"])] += 1
            print(f"{'failed':10} {cls}: {error.get('kind')}: {' '.join(str(error.get('message')).split())[:300]}")
    print(f"converted {len(converted)} of {len(cases)} ({len(converted) / max(1, len(cases)):.1%})  {dict(kinds)}")


def check(cls: str, model_type: str, work: Path) -> Json:
    """Compare a converted model with PyTorch on inputs that conversion does not try."""
    from outside import differences

    from onnx_config import UniversalOnnxConfig

    entry = next(
        a
        for a in reversed(list(map(json.loads, (work / "converted.jsonl").read_text().splitlines())))
        if a["cls"] == cls
    )
    folder = work / "models" / cls
    model = getattr(transformers, entry["architecture"]).from_pretrained(folder).eval()
    found = list(differences(model, folder, entry, UniversalOnnxConfig.from_pretrained(folder).spec))
    wrong = [text for text in found if not text.startswith("ok ")]
    return {"verdict": "; ".join(wrong) if wrong else "exact" if found else "nothing compared", "compared": found}


if __name__ == "__main__":
    main()

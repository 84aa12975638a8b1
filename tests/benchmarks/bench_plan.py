"""Plan a list of many configs with ``ferry plan`` and print how long it takes, cold and known.

    python tests/benchmarks/bench_plan.py [--count 1000] [--distinct 0.33 1] [--workers 2] [--only REGEX]
                                          [--workdir DIR]

Each share in ``--distinct`` is a list of its own. ``1``: every config has another structure, the default ones of the
model types that transformers has, each with the classes that the auto mappings list for it: first one class of every
type, then a second. ``0.33``: a third of the list are such, and each has two fine-tunes, which differ in where they
came from, in the names of labels and in what training drops. A list of real models has far fewer structures, since
most are fine-tunes of some dozens of models; and no list has as many rare classes, large images among them, as these.
Prints for each list: seconds and processor seconds, the median and the worst of the detections that were made, what
failed, and what looking up costs once all is known. Takes two to fifteen minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FERRY = Path(sys.executable).with_name("ferry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--distinct", type=float, nargs="+", default=[0.33, 1.0], help="shares of distinct structures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression over model types")
    parser.add_argument("--workdir", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    work = arguments.workdir or Path(tempfile.mkdtemp(prefix="plan-"))
    for share in arguments.distinct:
        structures = max(1, round(arguments.count * share))
        print(f"\n{arguments.count} configs of {structures} structures")
        folder = work / f"{structures}-of-{arguments.count}"
        measure_list(folder, arguments.count, structures, only=arguments.only, workers=arguments.workers)


def measure_list(work: Path, count: int, structures: int, *, only: str, workers: int) -> None:
    """Write a list, plan it twice, and print what that took."""
    names = write_configs(work, count, structures, only=only)
    (work / "manifest.txt").write_text("".join(f"./{name}\n" for name in names), encoding="utf-8")
    cold, seconds, cpu = plan(work, workers=workers)
    print_cold(cold, seconds, cpu, workers=workers)
    again, seconds, cpu = plan(work, workers=workers)
    inside = again["seconds"]
    print(f"rerun: {seconds:.1f} s with the command's start, {inside:.2f} s without it, that is ", end="")
    print(f"{inside / len(names) * 1000:.1f} ms a known model; {cpu:.1f} s CPU; in {work}")
    if [m["error"] for m in cold["models"]] != [m["error"] for m in again["models"]]:
        print("the rerun says something else than the first run")


def write_configs(work: Path, count: int, structures: int, *, only: str) -> list[str]:
    """Write folders with a config each and return their names; those beyond ``structures`` are fine-tunes."""
    bases = list(islice(configs(only), structures))
    if len(bases) < structures:
        sys.exit(
            f"{structures} structures were asked for; there are {len(bases)}. Give a smaller --count or --distinct."
        )
    names: list[str] = []
    for number in range(count):
        name, value = bases[number % structures]
        if version := number // structures:
            name, value = f"{name}-tuned-{version}", fine_tuned(value, version)
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(value), encoding="utf-8")
        names.append(name)
    return names


def fine_tuned(value: dict[str, Any], version: int) -> dict[str, Any]:
    """Return a config as somebody's fine-tune of the model has it."""
    tuned = {**value, "_name_or_path": f"somebody/base-{version}", "transformers_version": f"4.{10 + version % 40}.0"}
    if isinstance(labels := value.get("id2label"), dict):
        tuned["id2label"] = {key: f"label {key} of {version}" for key in labels}
        tuned["label2id"] = {label: int(key) for key, label in tuned["id2label"].items()}
    for key in ("hidden_dropout_prob", "attention_dropout", "classifier_dropout", "dropout"):
        if isinstance(dropped := value.get(key), float) and 0 < dropped < 0.5:
            tuned[key] = dropped + version / 1000
    return tuned


def configs(only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and configs: one class of each model type, then another."""
    classes: dict[str, list[str]] = {}
    for mapping in sorted(name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)):
        for model_type, found in getattr(modeling_auto, mapping).items():
            for class_name in (found,) if isinstance(found, str) else found:
                classes.setdefault(model_type, [])
                if class_name not in classes[model_type]:
                    classes[model_type].append(class_name)
    values: dict[str, dict[str, Any]] = {}
    # In a fixed order of chance, so that few of them stand for all.
    for model_type in random.Random(0).sample(sorted(classes), len(classes)):
        if re.search(only, model_type) and model_type in CONFIG_MAPPING:
            try:
                values[model_type] = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
            except Exception as error:  # noqa: BLE001 - a type without a usable default has no case here
                print(f"no default config of {model_type}: {type(error).__name__}")
    for number in range(max((len(found) for found in classes.values()), default=0)):
        for model_type, value in values.items():
            if number < len(classes[model_type]):
                class_name = classes[model_type][number]
                yield f"{model_type}-{class_name}", {**value, "model_type": model_type, "architectures": [class_name]}


def plan(work: Path, *, workers: int) -> tuple[dict[str, Any], float, float]:
    """Return the plan, and the wall and the processor time of the command with all its children."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [FERRY, "plan", "manifest.txt", "--json", "--workers", str(workers), "--home", "home"],
        cwd=work,
        stdout=subprocess.PIPE,
        check=False,
    )
    if ran.returncode not in (0, 1):
        sys.exit(f"ferry plan ended with {ran.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(ran.stdout), time.monotonic() - started, cpu


def print_cold(plan: dict[str, Any], seconds: float, cpu: float, *, workers: int) -> None:
    models = plan["models"]
    each = sorted((model["detect_seconds"], model["id"]) for model in models if model["detect_seconds"])
    print(f"{len(models)} configs in {seconds:.1f} s wall with {workers} workers, {cpu:.1f} s CPU, ", end="")
    print(f"that is {cpu / len(models):.3f} s CPU per config; load {os.getloadavg()[0]:.1f}")
    if each:
        spent = [seconds for seconds, _ in each]
        print(f"{len(each)} detections, wall in a child: median {statistics.median(spent):.2f} s, mean ", end="")
        print(f"{statistics.mean(spent):.2f} s, {sum(s < 0.5 for s in spent) / len(spent):.0%} under 0.5 s; worst:")
        for longest, name in reversed(each[-8:]):
            print(f"  {longest:.2f} s {name}")
    failed = [model for model in models if model["error"]]
    kinds = Counter(model["error"]["kind"] for model in failed)
    print(f"{plan['totals']['works']} would work; {dict(kinds)}")
    # A fine-tune says what the model that it was made of says.
    for model in (model for model in failed if "-tuned-" not in model["id"]):
        print(f"  {model['id']}: {model['error']['kind']}: {model['error']['message'][:160]}")


if __name__ == "__main__":
    main()

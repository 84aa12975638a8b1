"""Plan a list of many configs with ``ferry plan`` and print how long it takes, cold and known.

    python tests/benchmarks/bench_plan.py [--count 1000] [--workers 2] [--only REGEX] [--workdir DIR]

The configs are the default ones of the model types that transformers has, each with the classes that the auto mappings
list for it: first one class of every type, then a second, and so on until there are enough. Where transformers has
fewer, widths that change nothing of the structure make further ones. Prints: count, seconds, per config the median and
the worst, what failed, and the rerun. Takes two to fifteen minutes.
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
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FERRY = Path(sys.executable).with_name("ferry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression over model types")
    parser.add_argument("--workdir", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    work = arguments.workdir or Path(tempfile.mkdtemp(prefix="plan-"))
    names = write_configs(work, arguments.count, only=arguments.only)
    (work / "manifest.txt").write_text("".join(f"./{name}\n" for name in names), encoding="utf-8")
    cold, seconds, cpu = plan(work, workers=arguments.workers)
    print_cold(cold, seconds, cpu, workers=arguments.workers)
    again, seconds, _ = plan(work, workers=arguments.workers)
    print(f"rerun: {seconds:.1f} s with the command's start, {again['seconds']:.2f} s without it; in {work}")
    if [m["error"] for m in cold["models"]] != [m["error"] for m in again["models"]]:
        print("the rerun says something else than the first run")


def write_configs(work: Path, count: int, *, only: str) -> list[str]:
    """Write folders with a config each and return their names."""
    names: list[str] = []
    for name, value in configs(only):
        if len(names) == count:
            break
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(value), encoding="utf-8")
        names.append(name)
    return names


def configs(only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield names and configs without an end: one class of each model type, then another."""
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
    variation = 0
    while True:
        for number in range(max(len(found) for found in classes.values())):
            for model_type, value in values.items():
                if number < len(classes[model_type]):
                    class_name = classes[model_type][number]
                    changed = {**value, "model_type": model_type, "architectures": [class_name]}
                    if variation:
                        changed["initializer_range"] = 0.02 + variation / 1000
                    yield f"{model_type}-{class_name}-{variation}", changed
        variation += 1


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
        median = statistics.median(spent for spent, _ in each)
        print(f"per config, wall in its child: median {median:.2f} s, worst {each[-1][0]:.2f} s ({each[-1][1]})")
    failed = [model for model in models if model["error"]]
    kinds = Counter(model["error"]["kind"] for model in failed)
    print(f"{plan['totals']['works']} would work; {dict(kinds)}")
    for model in failed:
        print(f"  {model['id']}: {model['error']['kind']}: {model['error']['message'][:160]}")


if __name__ == "__main__":
    main()

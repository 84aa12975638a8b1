"""Convert every family and head of ``tests/tiny_models.py`` through the command line and print what held.

    python tests/benchmarks/bench_families.py [--only REGEX] [--workers 2] [--workdir DIR]

Per family: models, how many detection was right about (task and inputs, from the config alone), how many were exported
and how many verified; then one line per model that was not. Takes about a quarter of an hour for all on 2 quiet cores.
Folders and results stay in ``--workdir``, so that a second call with it goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import transformers

FERRY = Path(sys.executable).with_name("ferry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression over names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--workdir", type=Path)
    arguments = parser.parse_args()
    work = arguments.workdir or Path(tempfile.mkdtemp(prefix="families-"))
    names = [name for name in tiny_models.FAMILIES if re.search(arguments.only, name)]
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for name in names:
        if not (work / "models" / name / "config.json").is_file():
            tiny_models.build(name, work / "models" / name)
    manifest = work / "manifest.txt"
    manifest.write_text("".join(f"./models/{name}\n" for name in names), encoding="utf-8")
    started = time.monotonic()
    command = [FERRY, "batch", manifest.name, "--engine", "local", "--workers", str(arguments.workers)]
    with (work / "batch.log").open("w") as log:
        subprocess.run([*command, "--report", "report.json"], cwd=work, stdout=log, stderr=log, check=False)
    seconds = time.monotonic() - started
    report = json.loads((work / "report.json").read_text(encoding="utf-8"))
    entries = {Path(entry["id"]).name: entry for entry in report["models"]}
    print_table(names, entries)
    print(
        f"\n{len(names)} models in {seconds:.0f} s wall with {arguments.workers} workers; {report['totals']}; in {work}"
    )


def print_table(names: list[str], entries: dict[str, dict[str, Any]]) -> None:
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    wrong = []
    for name in names:
        tiny, entry = tiny_models.FAMILIES[name], entries[name]
        detected = is_detected(tiny, entry)
        exported = bool(entry["graphs"])
        verified = entry["status"] in ("converted", "reused")
        row = rows[tiny.config_class.removesuffix("Config")]
        for column, value in enumerate((True, detected, exported, verified)):
            row[column] += value
        if not (detected and verified):
            error = entry["error"] or {}
            wrong.append(f"{name}: {entry['status']} {error.get('kind', '')} {error.get('message', '')[:200]}")
    print(f"{'family':28} {'models':>7} {'detected':>9} {'exported':>9} {'verified':>9}")
    for family, row in rows.items():
        print(f"{family:28} {row[0]:7} {row[1]:9} {row[2]:9} {row[3]:9}")
    total = [sum(row[column] for row in rows.values()) for column in range(4)]
    print(f"{'all':28} {total[0]:7} {total[1]:9} {total[2]:9} {total[3]:9}")
    for line in wrong:
        print(f"  {line}")


def is_detected(tiny: tiny_models.TinyModel, entry: dict[str, Any]) -> bool:
    if entry["task"] != tiny.task:
        return False
    found = [tensor["name"] for tensor in entry["graphs"][0]["inputs"]] if entry["graphs"] else tiny.inputs
    return [name for name in found if name not in tiny.optional] == list(tiny.inputs)


if __name__ == "__main__":
    main()

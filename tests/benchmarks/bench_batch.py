"""A batch of different models, beside optimum's command for each and optimum in one warm process.

    python tests/benchmarks/bench_batch.py FOLDER [--tasks FILE] [--engine local|prefect] [--workers N] [--ours-only]

``FOLDER`` holds one model folder per model. ``FILE`` is a JSON object with the task that optimum is given for each of
them, by the folder's name; what is not in it is exported with ``--task auto``. Prints wall and CPU seconds of

- one ``ferry batch`` over all in an empty FERRY_HOME, everything verified;
- ``optimum-cli export onnx``, a process per model;
- optimum's ``main_export`` in one process, one model after the other.

The peers are compared over the models that they can convert, and over all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure import FERRY, Run, peer_environment, timed

WARM = """
import contextlib, json, shutil, sys, time, warnings, logging
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
import torch
from optimum.exporters.onnx import main_export
spent = {"import": time.process_time()}
for name, (source, task) in json.loads(sys.argv[2]).items():
    start = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            main_export(source, output=sys.argv[1] + "/" + name, task=task, device="cpu")
            spent[name] = time.process_time() - start
        except Exception as error:
            print(name, repr(error)[:300], file=sys.stderr)
            spent[name] = None
    shutil.rmtree(sys.argv[1] + "/" + name, ignore_errors=True)
print(json.dumps(spent))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="one model folder per model")
    parser.add_argument("--tasks", type=Path, metavar="FILE", help="JSON object: folder's name -> optimum's task")
    parser.add_argument("--engine", choices=["local", "prefect"], default="local", help="of ferry (default: local)")
    parser.add_argument("--workers", type=int, metavar="N", help="of ferry (default: its own)")
    parser.add_argument("--ours-only", action="store_true", help="do not run the peers")
    options = parser.parse_args(arguments)
    models = sorted(path.parent for path in options.folder.glob("*/config.json"))
    tasks = json.loads(options.tasks.read_text()) if options.tasks is not None else {}
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        ours, per_model = convert(models, Path(name), options.engine, options.workers)
        if options.ours_only:
            return 0
        optimum = peer_environment()
        clis = {model.name: export(optimum, model, tasks.get(model.name, "auto"), Path(name)) for model in models}
        warm, spent = export_warm(optimum.with_name("python"), models, tasks, Path(name))
    able = [name for name, run in clis.items() if run.status == 0]
    print(f"\n{'model':14}{'ferry, s':>10}{'optimum-cli, CPU s':>20}{'warm optimum, CPU s':>21}")
    for model in models:
        alone, inside = clis[model.name], spent.get(model.name)
        cli_text = f"{alone.cpu_seconds:.1f}" if alone.status == 0 else "fails"
        warm_text = "fails" if inside is None else f"{inside:.1f}"
        print(f"{model.name:14}{per_model[model.name]:10.1f}{cli_text:>20}{warm_text:>21}")
    cpu = sum(run.cpu_seconds for run in clis.values() if run.status == 0)
    wall = sum(run.wall_seconds for run in clis.values() if run.status == 0)
    print(f"\n{'':44}wall s   CPU s   times ferry's CPU")
    print(f"{f'ferry batch, {len(models)} models':40}{ours.wall_seconds:10.1f}{ours.cpu_seconds:8.1f}")
    print(f"{f'optimum-cli, the {len(able)} that it can':40}{wall:10.1f}{cpu:8.1f}{cpu / ours.cpu_seconds:9.2f}")
    done = sum(seconds is not None for seconds in spent.values()) - 1
    print(f"{f'optimum in one process, {done} models':40}{warm.wall_seconds:10.1f}{warm.cpu_seconds:8.1f}"
          f"{warm.cpu_seconds / ours.cpu_seconds:9.2f}")  # fmt: skip
    return 0


def convert(models: Sequence[Path], folder: Path, engine: str, workers: int | None) -> tuple[Run, Mapping[str, float]]:
    """Convert all with one batch; return its cost, and the wall seconds of each model's steps by its folder's name."""
    manifest, report = folder / "manifest.yaml", folder / "report.json"
    manifest.write_text(json.dumps({"models": [str(model.resolve()) for model in models]}), encoding="utf-8")
    command = [FERRY, "batch", manifest, "--engine", engine, "--report", report]
    command += [] if workers is None else ["--workers", str(workers)]
    run, _ = timed(command, may_fail=True, FERRY_HOME=str(folder / "home"))
    document = json.loads(report.read_text())
    print(f"ferry: {document['totals']}, {run.wall_seconds:.1f} s, {run.cpu_seconds:.1f} CPU s")
    for model in document["models"]:
        if model["status"] != "converted":
            error = model["error"] or {}
            print(
                f"  {Path(model['id']).name}: {model['status']}, {error.get('kind')}: {error.get('message', '')[:300]}"
            )
    return run, {Path(model["id"]).name: sum(model["seconds"].values()) for model in document["models"]}


def export(optimum: Path, model: Path, task: str, folder: Path) -> Run:
    command = [optimum, "export", "onnx", "-m", model.resolve(), "--task", task, folder / "o"]
    run, _ = timed(command, may_fail=True)
    shutil.rmtree(folder / "o", ignore_errors=True)
    print(f"optimum-cli {model.name}: status {run.status}, {run.cpu_seconds:.1f} CPU s", file=sys.stderr)
    return run


def export_warm(
    python: Path, models: Sequence[Path], tasks: Mapping[str, str], folder: Path
) -> tuple[Run, Mapping[str, float | None]]:
    todo = {model.name: (str(model.resolve()), tasks.get(model.name, "auto")) for model in models}
    run, printed = timed([python, "-c", WARM, folder, json.dumps(todo)])
    return run, json.loads(printed.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())

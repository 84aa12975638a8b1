"""The main job, end to end, in one command: build models, convert them, use one, and convert them again.

Everything is written under ``ferry-data/demo``, which is emptied first. Exits 0 only if every model but the broken
one was converted, the broken one failed as bad input, and the second run had nothing left to do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from build_models import BROKEN, REAL, build_models

HOME = Path("ferry-data/demo")
FERRY = Path(sys.executable).with_name("ferry")
SENTENCES = (
    "The ferry leaves the harbour at seven in the morning.",
    "Our boat departs from the port at 7 a.m.",
    "Photosynthesis turns light into sugar.",
)


def main() -> int:
    started = time.monotonic()
    if not FERRY.exists():
        raise SystemExit(f"There is no {FERRY}. Run: make demo, or pip install -e '.[demo]' into this environment")
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)

    title(f"Models, built in {HOME / 'models'}")
    models = build_models(HOME)
    for model in models:
        print(f"  {model.name:18} {model.size_bytes / 1e6:6.2f} MB  {model.kind}")

    title("First run: ferry batch manifest.yaml --output out --report first.json")
    code, seconds, first = run_batch("first.json")
    print(f"\n  Exit code {code} after {seconds:.0f} s; 1 is right here, since {BROKEN!r} is broken on purpose.")

    title("Catalog: ferry catalog list")
    ferry("catalog", "list")

    title(f"Similarity of sentences, by the converted {REAL}")
    problems = check_first(first, [model.name for model in models], code)
    encoder = entry_of(first, REAL)
    if encoder is not None and encoder["status"] == "converted":
        problems += show_similarity(Path(encoder["artifact"]))
    else:
        print("  not shown: the model was not converted")

    title("Second run: the same command")
    code, seconds, second = run_batch("second.json")
    totals = second["totals"]
    print(
        f"\n  {seconds:.1f} s, start included: {totals['converted']} converted, {totals['reused']} reused, "
        f"{totals['failed']} failed (remembered, not tried again)."
    )
    if (totals["converted"], totals["reused"], totals["failed"]) != (0, len(models) - 1, 1) or code != 1:
        problems.append("the second run should have reused every model but the broken one")

    title("Look further")
    print(f"  FERRY_HOME={HOME} {os.path.relpath(FERRY)} catalog show {HOME / 'models' / REAL}")
    print(f"  FERRY_HOME={HOME} {os.path.relpath(FERRY)} dashboard    # shows it all at http://127.0.0.1:4300/")
    print(f"  The converted models are in {HOME / 'out'}, the reports in {HOME / 'first.json'} and second.json.")
    for problem in problems:
        print(f"\n  NOT AS EXPECTED: {problem}", file=sys.stderr)
    outcome = "The demo failed" if problems else "The demo went as it should"
    print(f"\n{outcome}, in {time.monotonic() - started:.0f} s.")
    return 1 if problems else 0


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ferry(*arguments: str) -> int:
    """Run ``ferry`` in the demo's own home, its output going straight to the reader, and return its exit code."""
    environment = {**os.environ, "FERRY_HOME": str(HOME.resolve()), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([FERRY, *arguments], cwd=HOME, env=environment, check=False).returncode


def run_batch(report: str) -> tuple[int, float, dict[str, Any]]:
    """Convert the manifest and return exit code, wall seconds, and the report."""
    started = time.monotonic()
    code = ferry("batch", "manifest.yaml", "--output", "out", "--report", report)
    seconds = time.monotonic() - started
    if not (HOME / report).is_file():
        raise SystemExit(f"ferry batch ended with exit code {code} and wrote no report; its message is above.")
    return code, seconds, json.loads((HOME / report).read_text(encoding="utf-8"))


def entry_of(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((entry for entry in report["models"] if Path(entry["id"]).name == name), None)


def check_first(report: dict[str, Any], names: list[str], code: int) -> list[str]:
    """Return what the first run should have done and did not."""
    problems = [] if code == 1 else [f"the first run should have ended with exit code 1, not {code}"]
    for name in names:
        entry = entry_of(report, name) or {"status": "absent", "error": None}
        got = (entry["status"], (entry["error"] or {}).get("kind"))
        wanted = ("failed", "bad_input") if name == BROKEN else ("converted", None)
        if got != wanted:
            problems.append(f"{name}: {got[0]} ({got[1]}) instead of {wanted[0]} ({wanted[1]})")
    return problems


def show_similarity(artifact: Path) -> list[str]:
    """Print how close the first sentence is to the two others, and return what is implausible about it."""
    first, *others = embed(artifact, SENTENCES)
    scores = [float(first @ other) for other in others]
    print(f"         {SENTENCES[0]}")
    for score, sentence in zip(scores, SENTENCES[1:], strict=True):
        print(f"  {score:5.2f}  {sentence}")
    return [] if scores[0] > 0.5 > scores[1] + 0.2 else [f"implausible similarities: {scores}"]


def embed(artifact: Path, sentences: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return one vector of length 1 per sentence, as the graph gives it: pooled and normalized."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    encoded = tokenizer.encode_batch(list(sentences))
    columns = {
        "input_ids": [row.ids for row in encoded],
        "attention_mask": [row.attention_mask for row in encoded],
        "token_type_ids": [row.type_ids for row in encoded],
    }
    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {node.name: np.asarray(columns[node.name], dtype=np.int64) for node in session.get_inputs()}
    vectors: np.ndarray[Any, np.dtype[np.float32]] = session.run(["sentence_embedding"], feed)[0]
    return vectors


if __name__ == "__main__":
    sys.exit(main())

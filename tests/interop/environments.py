"""Makes the two foreign worlds that artifacts are loaded in: ``python environments.py FOLDER``.

``FOLDER/python`` is a virtual environment with optimum and sentence-transformers, which need another transformers
than we do; ``FOLDER/node`` holds transformers.js. One that is there and complete is left as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
# The last line of sentence-transformers that takes the transformers of optimum-onnx 0.1.0, which is before 5.
PYTHON = ("optimum-onnx[onnxruntime]==0.1.0", "sentence-transformers==5.7.0", TORCH)
TRANSFORMERS_JS = "4.3.2"


def make_python(folder: Path) -> None:
    """Make a virtual environment in ``folder``."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip: list[str | Path] = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    # First and alone: where a CPU build is on offer, pip takes it.
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, *PYTHON], check=True)


def make_node(folder: Path) -> None:
    """Install transformers.js in ``folder``; its packages' scripts, which would download more, do not run."""
    folder.mkdir(parents=True)
    wanted = {"private": True, "dependencies": {"@huggingface/transformers": TRANSFORMERS_JS}}
    (folder / "package.json").write_text(json.dumps(wanted))
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)


def main(cache: Path) -> None:
    """Make what is not complete."""
    for name, make in (("python", make_python), ("node", make_node)):
        folder = cache / name
        if (folder / "complete").exists():
            continue
        sys.stderr.write(f"installing into {folder} (once, a few minutes) ...\n")
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        (folder / "complete").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""Tokens per second with a graph that carries its cache, beside PyTorch and optimum's runtime on optimum's own export.

    python tests/benchmarks/bench_generate.py [--tokens 64] [--layers 12] [--threads 2] [--repetitions 3]

Writes a GPT-2 of the small size (124 million parameters) with random weights, converts it, exports it with optimum,
and generates greedily after one prompt of 32 tokens with each in turn. Prints medians, and whether the tokens agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import FERRY, peer_environment, timed

GENERATE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch
folder, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
{load}
ids = torch.arange(100, 132)[None]
asked = {{"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}}
model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
for line in sys.stdin:
    start = time.perf_counter()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    print(json.dumps([time.perf_counter() - start, found[0].tolist()]), flush=True)
"""

OURS = """
from onnx_config import AutoModelForONNX
model = AutoModelForONNX.from_pretrained(folder, threads=threads)
"""

PYTORCH = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder).eval()
"""

OPTIMUM = """
import onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens (default: 64)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="of the model (default: 12)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each (default: 2)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    options = parser.parse_args(arguments)
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    optimum = peer_environment()
    with tempfile.TemporaryDirectory(prefix="onnx-ferry-bench-") as name:
        folder = Path(name)
        torch.manual_seed(0)
        plain = GPT2LMHeadModel(GPT2Config(n_layer=options.layers)).eval()
        plain.save_pretrained(folder / "model")
        timed([FERRY, "convert", folder / "model", "--output", folder / "ours"], FERRY_HOME=str(folder / "home"))
        task = "text-generation-with-past"
        timed([optimum, "export", "onnx", "-m", folder / "model", "--task", task, folder / "theirs"], may_fail=True)
        theirs, here = optimum.with_name("python"), Path(sys.executable)
        # A process each, since threads that wait for work take a core from whoever has some.
        peers = {
            way: start(python, load, folder / place, options)
            for way, python, load, place in (
                ("AutoModelForONNX", here, OURS, "ours"),
                ("PyTorch, eager", here, PYTORCH, "model"),
                ("ORTModelForCausalLM, optimum's export", theirs, OPTIMUM, "theirs"),
                ("ORTModelForCausalLM, our artifact", theirs, OPTIMUM, "ours"),
            )
        }
        seconds: dict[str, list[float]] = {way: [] for way in peers}
        texts: dict[str, list[int]] = {}
        for _ in range(options.repetitions):
            for way, peer in peers.items():
                spent, texts[way] = ask(peer)
                seconds[way].append(spent)
        for peer in peers.values():
            peer.kill()
    first = statistics.median(seconds["AutoModelForONNX"])
    print(f"{'':40}tokens per second   times ours   same tokens")
    for way, spent in seconds.items():
        median = statistics.median(spent)
        same = texts[way] == texts["AutoModelForONNX"]
        print(f"{way:40}{options.tokens / median:17.1f}{first / median:13.2f}{same!s:>14}")
    return 0


def start(python: Path, load: str, folder: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [python, "-c", GENERATE.format(load=load), folder, str(options.tokens), str(options.threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def ask(peer: subprocess.Popen[str]) -> tuple[float, list[int]]:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write("\n")
    peer.stdin.flush()
    spent, tokens = json.loads(peer.stdout.readline())
    return spent, tokens


if __name__ == "__main__":
    sys.exit(main())

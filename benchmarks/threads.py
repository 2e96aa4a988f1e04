"""How long a training step takes when idle OpenMP threads wait in different ways, on free cores and on busy ones.

A random LLaMA of 3M parameters takes steps of 8 × 256 tokens with as many threads as there are cores, each way in a
process of its own, in turns. For "busy" some other processes compute meanwhile, one thread each.

    python benchmarks/threads.py --busy 2 --rounds 3
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from environment import describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.console import SPIN_COUNT

WAYS = {
    "libgomp's own": {},
    f"GOMP_SPINCOUNT={SPIN_COUNT} (the command line's)": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
STEPS = 8
SPINNING = "import torch; torch.set_num_threads(1); a = torch.rand(256, 256)\nwhile True: a @ a"


def step_here() -> None:
    """In the child: seconds of a step."""
    config = LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=4096,
    )  # fmt: skip
    model, ids_BT = LlamaForCausalLM(config), torch.randint(0, 4096, (8, 256))
    began = time.perf_counter()
    for _ in range(STEPS):
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        model.zero_grad()
    print(json.dumps((time.perf_counter() - began) / STEPS))


def measure(rounds: int, busy: int) -> dict[str, float]:
    """Median seconds of a step, by way."""
    others = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(busy)]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    try:
        for _ in range(rounds):
            for way, settings in WAYS.items():
                command = [sys.executable, __file__, "--child"]
                child = subprocess.run(command, env=clean | settings, stdout=subprocess.PIPE, text=True, check=True)
                found[way].append(json.loads(child.stdout.splitlines()[-1]))
    finally:
        for other in others:
            other.kill()
    return {way: median(seconds) for way, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="processes that compute meanwhile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        step_here()
        return
    free, taken = measure(arguments.rounds, 0), measure(arguments.rounds, arguments.busy)
    print(f"| threads wait | step on free cores, ms | beside {arguments.busy} busy processes, ms |\n|---|---:|---:|")
    for way in WAYS:
        print(f"| {way} | {1e3 * free[way]:,.0f} | {1e3 * taken[way]:,.0f} |")
    if arguments.out:
        results = {"free": free, "busy": taken, "machine": describe_machine(), "arguments": vars(arguments)}
        arguments.out.write_text(json.dumps(results, indent=2, default=str))


if __name__ == "__main__":
    main()

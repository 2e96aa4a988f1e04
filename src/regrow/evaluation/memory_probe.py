"""Serve one checkpoint and print the peak memory as one line of JSON.

A program of its own (see `memory.py`), which needs torch and transformers and nothing else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

NEW_TOKENS = 4


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    found = probe(options.checkpoint, options.device, options.batch, options.length, options.trust_remote_code)
    print(json.dumps(found))


def probe(checkpoint: Path, device: torch.device, batch: int, length: int, trust_remote_code: bool) -> dict[str, Any]:
    """Load, generate the last tokens of `batch` sequences of `length` tokens, and read the peak in bytes."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    # Models without position embeddings of any kind (ALiBi, state spaces) do not state a limit.
    length = min(length, getattr(text_config, "max_position_embeddings", length))
    with torch.device("meta"):  # imports the model's code, which is not the checkpoint's to answer for
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    before = resident()

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=trust_remote_code)
    model: Any = loaded.eval()
    model.to(device)
    prompt = max(1, length - NEW_TOKENS)
    ids = torch.randint(text_config.vocab_size, (batch, prompt), device=device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_length=prompt + NEW_TOKENS,
        max_new_tokens=None,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )

    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else highest() - before
    return {"peak_bytes": peak, "batch": batch, "length": prompt + NEW_TOKENS, "device": device.type}


def resident() -> int:
    """Bytes of this process in memory now (Linux), or the most there ever were (elsewhere)."""
    return _status("VmRSS") if sys.platform == "linux" else highest()


def highest() -> int:
    """The most bytes of this process that were ever in memory.

    Not `ru_maxrss` on Linux: that one starts from the size of the parent process.
    """
    if sys.platform == "linux":
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()

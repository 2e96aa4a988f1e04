"""Runs by itself: load a checkpoint with stock transformers and write its logits.

    python -P reload_probe.py CHECKPOINT IDS.safetensors LOGITS.safetensors DEVICE [--trust-remote-code]

Nothing of regrow is imported here; that it is not is part of what is reported.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(checkpoint: str, ids_file: str, logits_file: str, device: str, *flags: str) -> None:
    """Load, run once, write the logits and one line of JSON."""
    trust = "--trust-remote-code" in flags
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=trust)
    model.to(device).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = model(input_ids=load_file(ids_file)["ids"].to(device), use_cache=False).logits
    save_file({"logits": logits.float().cpu().contiguous()}, logits_file)
    imported = any(name == "regrow" or name.startswith("regrow.") for name in sys.modules)
    report = {
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "regrow_imported": imported,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

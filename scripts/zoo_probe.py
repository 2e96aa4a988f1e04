"""Runs by itself: load checkpoints with stock transformers, write their logits, and let them write text.

    python -P zoo_probe.py IDS.safetensors CHECKPOINT [CHECKPOINT …]

Logits go to `probe.safetensors` in each checkpoint's folder. Nothing of regrow is imported; one process for all of
them, for it spends most of its time on imports.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW_TOKENS = 6


def main(ids_file: str, *checkpoints: str) -> None:
    """Print one line of JSON for each checkpoint."""
    torch.set_num_threads(1)
    ids_BT = load_file(ids_file)["ids"]
    for checkpoint in checkpoints:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
        with torch.inference_mode():
            save_file(
                {"logits": model(input_ids=ids_BT, use_cache=False).logits}, Path(checkpoint, "probe.safetensors")
            )
            ids_1T = ids_BT[:1]
            cached = model.generate(
                ids_1T, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=None
            )
            for _ in range(NEW_TOKENS):
                logits_1TV = model(input_ids=ids_1T, use_cache=False).logits
                ids_1T = torch.cat([ids_1T, logits_1TV[:, -1].argmax(-1, keepdim=True)], 1)
        report = {
            "class": type(model).__name__,
            "generates": torch.equal(cached, ids_1T),
            "regrow_imported": any(name == "regrow" or name.startswith("regrow.") for name in sys.modules),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

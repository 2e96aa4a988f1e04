"""Runs by itself: load a checkpoint with stock transformers and write its logits.

    python -P reload_probe.py CHECKPOINT IDS.safetensors LOGITS.safetensors DEVICE [--trust-remote-code] [--offload=DIR]

With a folder to offload to, what does not fit on the device lies in memory or there: accelerate's own way.

Nothing of regrow is imported here; that it is not is part of what is reported.
"""

import json
import sys
from typing import Any

import accelerate
import torch
import transformers
from safetensors.torch import load_file, save_file


def room(device: str) -> dict[int | str, int]:
    """How many bytes may be taken, on the device and in memory."""
    wanted = torch.device(device)
    places = {"cpu", wanted.index or 0 if wanted.type == "cuda" else wanted.type}
    return {place: size for place, size in accelerate.utils.get_max_memory().items() if place in places}


def load(checkpoint: str, device: str, trust: bool, folder: str | None) -> Any:
    """The model, on the device; given a folder, as much of it as there is room for."""
    ways: dict[str, Any] = (
        {} if folder is None else {"device_map": "auto", "max_memory": room(device), "offload_folder": folder}
    )
    stock = transformers.AutoModelForCausalLM
    model: Any = stock.from_pretrained(checkpoint, dtype="auto", trust_remote_code=trust, **ways).eval()
    return model.to(device) if folder is None else model


def main(checkpoint: str, ids_file: str, logits_file: str, device: str, *flags: str) -> None:
    """Load, run once, write the logits and one line of JSON."""
    folder = next((flag.partition("=")[2] for flag in flags if flag.startswith("--offload=")), None)
    model = load(checkpoint, device, "--trust-remote-code" in flags, folder)
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

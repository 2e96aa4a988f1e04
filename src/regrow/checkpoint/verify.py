"""Prove that stock transformers, in a process of its own and without regrow, computes what we meant to save."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.save import needs_remote_code
from regrow.errors import InputError
from regrow.structure.offload import is_offloaded

PROBE = Path(__file__).with_name("reload_probe.py")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference of logits, as a share of the largest logit (at least 1)."""


@dataclass(frozen=True)
class Verification:
    """What the fresh process saw."""

    model_class: str
    transformers: str
    difference: float
    """Largest absolute difference of the logits."""
    allowed: float
    regrow_imported: bool

    @property
    def passed(self) -> bool:
        """Whether the checkpoint is what was meant."""
        return self.difference <= self.allowed and not self.regrow_imported

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "passed": self.passed}


def verify_checkpoint(model: PreTrainedModel, folder: Path, ids_BT: Tensor) -> Verification:
    """Compare the model in memory with the checkpoint as a fresh process loads it.

    Args:
        model: what was saved, still in memory, in the dtype it was saved in.
        ids_BT: tokens to compare the logits of.

    Raises:
        InputError: if the fresh process cannot load the checkpoint.
    """
    with torch.inference_mode():
        expected = model(input_ids=ids_BT.to(model.device), use_cache=False).logits.float().cpu()
    with tempfile.TemporaryDirectory() as scratch:
        ids_file, logits_file = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"ids": ids_BT.contiguous()}, ids_file)
        command = [sys.executable, "-P", str(PROBE), str(folder), str(ids_file), str(logits_file), str(model.device)]
        if needs_remote_code(folder):
            command.append("--trust-remote-code")
        if is_offloaded(model):
            command.append(f"--offload={scratch}")
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            last = child.stderr.strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"the saved checkpoint {folder} does not load in stock transformers: {last[0]}")
        report = json.loads(child.stdout.strip().splitlines()[-1])
        got = load_file(logits_file)["logits"]
    allowed = TOLERANCE[model.dtype] * max(1.0, float(expected.abs().max()))
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    return Verification(report["class"], report["transformers"], difference, allowed, report["regrow_imported"])

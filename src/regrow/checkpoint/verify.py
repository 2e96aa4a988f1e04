"""Prove that stock transformers, in a process of its own and without regrow, computes what we meant to save.

Logits tell whether the files are what was in memory; the loss, of the same tokens, tells whether all the way from the
trained adapters to those files the model has stayed the one that was trained.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.save import needs_remote_code
from regrow.errors import InputError
from regrow.evaluation.perplexity import inference, summed_loss
from regrow.structure.adapters import merge_lora
from regrow.structure.offload import is_offloaded

PROBE = Path(__file__).with_name("reload_probe.py")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference of logits, as a share of the largest logit (at least 1)."""
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of losses, nats per token: the adapters' product is rounded to the checkpoint's dtype."""


@dataclass(frozen=True)
class Verification:
    """What the fresh process saw."""

    model_class: str
    transformers: str
    difference: float
    """Largest absolute difference of the logits."""
    allowed: float
    regrow_imported: bool
    losses: dict[str, float] = field(default_factory=dict)
    """Nats per token of the tokens compared, of the model at every station on the way that was measured: `trained`
    (adapters live), `merged`, `saved` (in the dtype of the files), `reloaded` (the fresh process)."""
    loss_allowed: float = LOSS_TOLERANCE[torch.float32]
    """Largest difference of any two."""

    def after(self, losses: Mapping[str, float], dtype: torch.dtype) -> "Verification":
        """The same with the losses at earlier stations, of a model that was in `dtype` there."""
        allowed = max(self.loss_allowed, LOSS_TOLERANCE[dtype])
        return replace(self, losses={**losses, **self.losses}, loss_allowed=allowed)

    @property
    def passed(self) -> bool:
        """Whether the checkpoint is what was meant."""
        return self.difference <= self.allowed and not self.regrow_imported and self.losses_agree

    @property
    def losses_agree(self) -> bool:
        """Whether all losses are finite and near each other."""
        losses = list(self.losses.values())
        return all(map(math.isfinite, losses)) and (not losses or max(losses) - min(losses) <= self.loss_allowed)

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint that is not what was meant.

        Raises:
            InputError: saying what differs.
        """
        if not self.losses_agree:
            told = ", ".join(f"{station} {loss:.4f}" for station, loss in self.losses.items())
            raise InputError(
                f"the model in {folder} is not the one that was trained: losses are {told} (nats per token, allowed "
                f"difference {self.loss_allowed:.3g}); if none is far off, set output.dtype=float32"
            )
        if self.regrow_imported:
            raise InputError(
                f"the process that loaded {folder} had imported regrow, so nothing tells that the model loads without "
                "it; take away what imports it as Python starts (a .pth file, sitecustomize)"
            )
        if not self.passed:
            raise InputError(
                f"the saved checkpoint {folder} does not compute what the model in memory does: logits differ by "
                f"{self.difference:.3g}, allowed {self.allowed:.3g}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "passed": self.passed}


def loss_of(model: PreTrainedModel, ids_BT: Tensor) -> float:
    """Mean NLL of tokens 2 to T, as the model is now: nats per token, perhaps not finite."""
    return _mean_loss(_logits(model, ids_BT), ids_BT)


def merge(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, float]:
    """Put the adapters into the weights; the losses before and after, `trained` and `merged`, as `loss_of`."""
    losses = {"trained": loss_of(model, ids_BT)}
    merge_lora(model)
    return losses | {"merged": loss_of(model, ids_BT)}


def _logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    with inference(model):
        logits_BTV: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits.float().cpu()
    return logits_BTV


def _mean_loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    return float(summed_loss(logits_BTV[:, :-1], ids_BT[:, 1:]).sum()) / ids_BT[:, 1:].numel()


def verify_checkpoint(model: PreTrainedModel, folder: Path, ids_BT: Tensor) -> Verification:
    """Compare the model in memory with the checkpoint as a fresh process loads it.

    Args:
        model: what was saved, still in memory, in the dtype it was saved in.
        ids_BT: tokens to compare the logits and the loss of.

    Returns:
        What was found, with the losses `saved` and `reloaded`.

    Raises:
        InputError: if the fresh process cannot load the checkpoint.
    """
    expected = _logits(model, ids_BT)
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
    difference, losses = math.inf, {"saved": _mean_loss(expected, ids_BT)}
    if got.shape == expected.shape:
        difference, losses["reloaded"] = float((got - expected).abs().max()), _mean_loss(got, ids_BT)
    return Verification(
        report["class"], report["transformers"], difference, allowed, report["regrow_imported"],
        losses, LOSS_TOLERANCE[model.dtype],
    )  # fmt: skip

"""What a training leaves in a folder, and reading it back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from regrow.planning.plan import Plan
from regrow.recovery.quantised_base import rebuild
from regrow.recovery.train import History, Trained

FILES = ("scores.safetensors", "plan.json", "history.json", "adapters.safetensors")


def read_trained(folder: Path, model: PreTrainedModel, summary: Mapping[str, Any]) -> Trained:
    """Make true in another model what a training has come to.

    Args:
        folder: with the training's `FILES`.
        model: whole, LoRA-wrapped as the one that was trained.
        summary: the training's.
    """
    plan = Plan.parse((folder / "plan.json").read_text(encoding="utf-8"))
    adapters = load_file(folder / "adapters.safetensors")
    groups = rebuild(model, plan, adapters)
    history = History(**json.loads((folder / "history.json").read_text(encoding="utf-8")))
    return Trained(plan, groups, adapters, history, dict(summary))

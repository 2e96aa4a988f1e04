"""What a training comes to, what it leaves in a folder, and reading it back."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint.state import State
from regrow.planning.plan import Plan
from regrow.recovery.learner import Learner
from regrow.recovery.quantised_base import rebuild
from regrow.structure.groups import Groups

FILES = ("scores.safetensors", "plan.json", "history.json", "adapters.safetensors")


@dataclass
class History:
    """What happened during training, for the report. A loss may not be finite; in the file it is `null` then."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    cuts: list[dict[str, float]] = field(default_factory=list)
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """Per round: step, stage, and by source its weight, loss and degradation; empty with a single source."""


@dataclass
class Best:
    """The adapters with the lowest validation loss since the last cut."""

    loss: float = math.inf
    step: int = 0
    adapters: list[Tensor] = field(default_factory=list)
    waited: int = 0
    """Validations since."""

    def offer(self, loss: float, step: int, learner: Learner) -> None:
        """Take the learner's adapters if their loss is lower."""
        self.waited += 1
        if loss < self.loss:
            self.loss, self.step, self.adapters, self.waited = loss, step, learner.snapshot(), 0

    def state(self) -> State:
        """All of it."""
        values = {"loss": self.loss, "step": self.step, "waited": self.waited}
        return State(values, {str(number): factor for number, factor in enumerate(self.adapters)})

    def go_on(self, state: State) -> None:
        """Be where `state` was taken."""
        vars(self).update(state.values)
        self.adapters = [state.tensors[str(number)] for number in range(len(state.tensors))]


@dataclass(frozen=True)
class Trained:
    """A model that has reached its target and been recovered; adapters still attached."""

    plan: Plan
    groups: Groups
    """As they are now."""
    adapters: dict[str, Tensor]
    """The best ones, by parameter name, and refitted weights; on the CPU. The model holds the same."""
    history: History
    summary: dict[str, Any]


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

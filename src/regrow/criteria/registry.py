"""Criteria by name, and a user's own by file."""

import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regrow.criteria import activation, depth, gate, lhspg, lora, mask, repair, simple, taylor
from regrow.criteria.evidence import Evidence
from regrow.errors import InputError
from regrow.structure.groups import Groups

Need = Literal["lora", "gate", "weight", "squares", "probes", "similarity", "channels", "inputs", "mask"]
"""What must be measured for a criterion: gradients of the LoRA factors (there in any training step), moments
of the gate derivatives, gradients of the frozen weights (as large as the weights), their squares sequence by sequence
(as large again), estimates of them by forward passes (one-shot schedules only), how alike a layer's input and
output are, mean and mean square of every linear's input channels, second moments of the consumers' inputs (as large
as their squared width; one-shot schedules only), or the masks that the learned-mask schedule learns."""

Scored = Literal["width", "depth"]
"""What a criterion scores: units of the groups, whole layers, or both (then in the same measure)."""

Units = Float[Tensor, " units"]

Score = Callable[[Evidence], Units | Mapping[str, Units]]
"""One score per unit, or several named terms, which `combine` weighs against each other."""


@dataclass(frozen=True)
class Criterion:
    """A scoring function, what it needs and what it is for."""

    name: str
    score: Score
    needs: frozenset[Need]
    scores: frozenset[Scored] = frozenset({"width"})

    def check_kinds(self, kinds: Collection[str]) -> None:
        """Refuse to prune what a criterion does not score (layers do without: their units' scores add up).

        Raises:
            InputError: if it is asked to.
        """
        if "width" not in self.scores and set(kinds) != {"layer"}:
            raise InputError(
                f"criterion {self.name} scores whole layers only: set pruning.kinds=[layer], or take another criterion"
            )
        if "hidden" in kinds and "inputs" in self.needs and "gate" not in self.needs:
            raise InputError(
                f"criterion {self.name} looks at the input of one linear, and hidden channels have many: take hidden "
                "out of pruning.kinds, or another criterion"
            )

    def check_widths(self, setting: str) -> None:
        """Refuse what scores no single units, or only reads what a schedule has learned, where just that is asked for.

        Raises:
            InputError: naming the setting.
        """
        if "width" not in self.scores or "mask" in self.needs:
            what = "reads masks that a schedule learns" if "mask" in self.needs else "scores whole layers only"
            raise InputError(f"{setting}={self.name} {what}, an analysis wants units scored: take another criterion")

    def check_experts(self, groups: Groups, kinds: Collection[str], adapted: bool = True) -> None:
        """Refuse to prune experts by a criterion that knows nothing of them: of what is measured at linears only the
        gradients of their weights are taken, and adapters tell of the channels inside, not of whole experts.

        Args:
            adapted: whether the experts have adapters.

        Raises:
            InputError: if it is asked to.
        """
        others = "take another (gate-fisher, taylor, magnitude), or set"
        if not groups.in_experts(kinds):
            return
        from_adapters = "lora" in self.needs and self.needs <= {"lora", "inputs"}
        if self.needs & {"channels", "squares", "probes"} or self.needs == {"inputs"}:
            raise InputError(
                f"criterion {self.name} cannot score experts, which have no linears of their own: {others} "
                "pruning.kinds=[attention]"
            )
        if from_adapters and not adapted:
            raise InputError(
                f"criterion {self.name} cannot score experts, which have no adapters: set lora.expert_rank (and "
                f"lora.targets) so that they do, {others} pruning.kinds=[attention]"
            )
        if from_adapters and "expert" in kinds:
            raise InputError(
                f"criterion {self.name} cannot score whole experts, of which adapters tell nothing: {others} "
                "pruning.kinds=[attention,ffn]"
            )


BOTH: frozenset[Scored] = frozenset({"width", "depth"})

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("lora", lora.lora, frozenset({"lora"})),
        Criterion("lora-squared", lora.lora_squared, frozenset({"lora"})),
        Criterion("taylor", taylor.taylor, frozenset({"weight"})),
        Criterion("taylor-vector", taylor.taylor_vector, frozenset({"weight"})),
        Criterion("taylor-second", taylor.taylor_second, frozenset({"weight", "squares"})),
        Criterion("taylor-mix", taylor.taylor_mix, frozenset({"weight", "squares"})),
        Criterion("mini-llm", activation.mini_llm, frozenset({"channels", "probes"})),
        Criterion("wanda", activation.wanda, frozenset({"channels"})),
        Criterion("wanda-norm", activation.wanda_norm, frozenset({"channels"})),
        Criterion("flap", activation.flap, frozenset({"channels"})),
        Criterion("gate-fisher", gate.gate_fisher, frozenset({"gate"}), BOTH),
        Criterion("gate-second-order", gate.gate_second_order, frozenset({"gate"}), BOTH),
        Criterion("repairable-fisher", repair.repairable_fisher, frozenset({"gate", "inputs"})),
        Criterion("obs", repair.obs, frozenset({"inputs"})),
        Criterion("block-influence", depth.block_influence, frozenset({"similarity"}), frozenset({"depth"})),
        Criterion("lhspg", lhspg.lhspg, frozenset()),
        Criterion("lhspg-cosine-second-order", lhspg.cosine_and_second_order, frozenset()),
        Criterion("lhspg-magnitude", lhspg.magnitude, frozenset()),
        Criterion("lhspg-mean-magnitude", lhspg.mean_magnitude, frozenset()),
        Criterion("lhspg-cosine", lhspg.cosine, frozenset()),
        Criterion("lhspg-first-order", lhspg.first_order, frozenset()),
        Criterion("lhspg-second-order", lhspg.second_order, frozenset()),
        Criterion("learned-mask", mask.learned_mask, frozenset({"mask"})),
        Criterion("magnitude", simple.magnitude, frozenset()),
        Criterion("random", simple.random, frozenset()),
    )
}


def combine(terms: Mapping[str, Mapping[str, Units]]) -> dict[str, Units]:
    """The mean of the terms of a criterion, each divided by its 2-norm over all units of all groups.

    The scale of a term, and of a group within a term, is thereby left to the model as a whole: what LoRAShear
    (weight 0.2 for each of five) does with its saliencies. A term that is zero everywhere adds nothing.

    Args:
        terms: group name -> term -> one value per unit; every group has the same terms.
    """
    names = list(next(iter(terms.values())))
    terms = {group: {name: values.cpu().double() for name, values in each.items()} for group, each in terms.items()}
    norms = {name: torch.cat([group[name] for group in terms.values()]).norm() for name in names}
    return {
        group: torch.stack([values[name] / norms[name] if norms[name] else values[name] for name in names]).mean(0)
        for group, values in terms.items()
    }


def find_criterion(name: str) -> Criterion:
    """The criterion of that name; `my_file.py:my_score` loads the function `my_score` from the user's file.

    A user's function takes an `Evidence` and returns one score per unit, or a mapping of named terms with one
    value per unit each, which `combine` makes a score of. It is given LoRA gradients and gate
    moments; if it also needs gradients of the frozen weights, the file says `NEEDS = {"weight"}` (any subset
    of `Need`). One for whole layers says `SCORES = {"depth"}` (default
    `{"width"}`, or both).

    Raises:
        InputError: if there is no such criterion, file or function.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    path, separator, function = name.rpartition(":")
    if not separator:
        close = get_close_matches(name, CRITERIA, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(CRITERIA)}"
        raise InputError(f"unknown criterion {name!r}; {hint} (your own function: FILE.py:FUNCTION)")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"criterion {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"regrow_criterion_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"criterion {name!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise InputError(f"criterion {name!r}: {path} fails to load: {type(error).__name__}: {error}") from error
    score = vars(module).get(function)
    if not callable(score):
        raise InputError(f"criterion {name!r}: {path} has no function {function!r}")
    needs = frozenset(vars(module).get("NEEDS", {"lora", "gate"}))
    if not needs <= set(get_args(Need)):
        raise InputError(f"criterion {name!r}: NEEDS may hold {', '.join(get_args(Need))}, not {sorted(needs)}")
    scores = frozenset(vars(module).get("SCORES", {"width"}))
    if not scores or not scores <= BOTH:
        raise InputError(f"criterion {name!r}: SCORES may hold width and depth, not {sorted(scores)}")
    return Criterion(name, _telling(name, score), needs, scores)


def _telling(name: str, score: Score) -> Score:
    """A user's function, which says for what group it has failed."""

    def told(evidence: Evidence) -> Units | Mapping[str, Units]:
        try:
            return score(evidence)
        except Exception as error:
            raise InputError(
                f"criterion {name!r} fails for {evidence.name}: {type(error).__name__}: {error} (what NEEDS does not "
                "name is None)"
            ) from error

    return told

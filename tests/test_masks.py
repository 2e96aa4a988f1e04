"""Learned masks: formulas against references, multipliers that push the right way, a phase that learns, the cut."""

import math

import pytest
import torch
from conftest import build, go_through, logits, with_lora
from test_recovery import data

from regrow.errors import InputError
from regrow.planning.constraints import Constraints
from regrow.preflight import check_settings
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.hard_concrete import LARGEST, deterministic, open_probability, sample
from regrow.recovery.learner import Learner
from regrow.recovery.masks import Masks
from regrow.recovery.pruner import Pruner
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates

STEPS = 160


def recipe_for(**settings: object) -> Recipe:
    quiet = {"training.steps": STEPS, "training.learning_rate": 1e-3, "lora.dropout": 0.0, "pruning.cool_down": 0.1}
    return load_recipe("sheared-llama", quiet | settings)


# --- formulas ---------------------------------------------------------------------------------


def test_gates_by_hand() -> None:
    u = torch.tensor([0.5, 0.5, 0.9, 0.01], dtype=torch.float64)
    a = torch.tensor([0.0, 5.0, -1.0, -1.0], dtype=torch.float64)
    third = 1.2 / (1 + math.exp(-(math.log(9) - 1) * 1.5)) - 0.1
    assert sample(a, u).tolist() == pytest.approx([0.5, 1.0, third, 0.0])
    assert open_probability(torch.tensor([0.0], dtype=torch.float64)).item() == pytest.approx(
        11 ** (2 / 3) / (1 + 11 ** (2 / 3))
    )


def test_the_probability_is_how_often_gates_are_open() -> None:
    chance = torch.Generator().manual_seed(0)
    for a in (-3.0, -1.0, 0.5):
        drawn = sample(torch.full((40_000,), a), torch.rand(40_000, generator=chance))
        assert float((drawn > 0).float().mean()) == pytest.approx(float(open_probability(torch.tensor(a))), abs=0.01)


def test_the_deterministic_gate_closes_as_many_as_are_expected_to_be() -> None:
    a = torch.tensor([4.0, -4.0, 2.0, -4.5, 0.0])
    closed = round(5 - sum(1 / (1 + math.exp(-x - 2 / 3 * math.log(11))) for x in a.tolist()))
    assert closed == 2
    gates = deterministic(a)
    assert (gates == 0).tolist() == [False, True, False, True, False]
    assert gates[4] == 0.5
    assert gates[0] == pytest.approx(1 / (1 + math.exp(-4 * 1.2)))


# --- constraints ------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    groups = find_groups(build("llama-gqa"))
    uniform = Constraints.of(groups, recipe_for().pruning)
    half_M = torch.full((sum(uniform.masks.values()),), 0.5)
    assert uniform.removed(half_M).tolist() == pytest.approx([0.5] * len(groups))
    free = Constraints.of(groups, recipe_for(**{"pruning.shape": "free"}).pruning)
    assert free.removed(half_M).tolist() == pytest.approx([0.5])
    assert free.removed_R.item() == pytest.approx(0.5, abs=1e-3)
    kinds = {"pruning.kinds": ["attention", "ffn", "layer"]}
    layers = Constraints.of(groups, recipe_for(**kinds).pruning)
    half_M = torch.full((sum(layers.masks.values()),), 0.5)
    assert layers.removed(half_M).tolist() == pytest.approx([0.75], abs=1e-3)  # a quarter is open with its layer
    alone = Constraints.of(groups, recipe_for(**{"pruning.kinds": ["layer"]}).pruning)
    assert alone.removed(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.5])


def test_too_much_open_raises_the_multipliers_which_lower_the_log_alphas() -> None:
    model = build("llama-gqa")
    recipe = recipe_for()
    groups = with_lora(model)
    with Gates(model, groups.groups) as gates:
        masks = Masks(gates, Constraints.of(groups, recipe.pruning), recipe.pruning, 1, 0)
        gate_M = sample(masks.log_alpha_M, torch.full_like(masks.log_alpha_M, 0.5))
        assert masks._update(gate_M, 1.0)
        assert (masks.multipliers_2K > 0).all()
        gate_M = sample(masks.log_alpha_M, torch.full_like(masks.log_alpha_M, 0.5))
        assert masks._update(gate_M, 1.0)
        assert (masks.log_alpha_M < LARGEST).all()


def test_units_that_do_no_harm_are_the_ones_that_go() -> None:
    """Under a loss `½ Σ h (1 − z)²` in which a third of all units, every third one, has no part."""
    groups = find_groups(model := build("llama-gqa"))
    pruning = recipe_for().pruning
    masks = Masks(Gates(model, groups.groups), Constraints.of(groups, pruning), pruning, 600, 0)
    units, chance = len(masks.log_alpha_M), torch.Generator().manual_seed(0)
    harm_M = 0.2 * (torch.arange(units) % 3 != 1)
    for step in range(600):
        gate_M = sample(masks.log_alpha_M, torch.rand(units, generator=chance))
        masks._derivative_M.copy_(-harm_M * (1 - gate_M.detach()))
        assert masks._update(gate_M, min(1.0, step / 120))
    removed = masks.constraints.removed(open_probability(masks.log_alpha_M.detach()))
    torch.testing.assert_close(removed, masks.constraints.removed_R, atol=0.1, rtol=0)
    for group in groups:
        lowest = masks.present(group).argsort()[: group.units // 3].tolist()
        offset = sum(list(masks.constraints.masks.values())[: list(masks.constraints.masks).index(group.name)])
        assert all(harm_M[offset + unit] == 0 for unit in lowest), group.name


# --- the phase --------------------------------------------------------------------------------


def phase(cut_early: bool = True, **settings: object) -> tuple[object, Pruner, list[float]]:
    """The whole schedule, on a model one of whose heads and some of whose channels do nothing."""
    model = build("llama-gqa")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 20:40] = 0  # the second of three KV heads
            layer.mlp.down_proj.weight[:, :10] = 0
    groups = with_lora(model, fill=False)
    recipe = recipe_for(**settings)
    pruner = Pruner(model, groups, recipe, Learner(model, recipe.training, data()), data(1), cut_early=cut_early)
    with pruner:
        losses = go_through(pruner, STEPS)
        pruner.finish()
    return model, pruner, losses


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_masks_come_to_the_target_and_the_plan_takes_it_exactly(shape: str) -> None:
    model, pruner, losses = phase(**{"pruning.shape": shape, "pruning.sparsity": 0.3})
    open_M = open_probability(pruner.masks.log_alpha_M.detach())
    constraints = pruner.masks.constraints
    found_R = constraints.removed(open_M) - constraints.removed_R
    assert float(found_R.abs().mean()) < 0.1
    assert 0.3 <= pruner.plan.sparsity.block < 0.32
    assert all(math.isfinite(loss) for loss in losses)
    traced = find_groups(model)
    assert {group.name: group.units for group in traced} == {n: len(g.keep) for n, g in pruner.plan.groups.items()}


def test_masked_is_cut() -> None:
    early, early_pruner, early_losses = phase()
    late, late_pruner, late_losses = phase(cut_early=False)
    assert early_pruner.plan == late_pruner.plan
    assert early_losses == pytest.approx(late_losses, abs=1e-4)
    assert (logits(early) - logits(late)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pruning.criterion": "magnitude"}, "set both to learned-mask"),
        ({"pruning.schedule": "one-shot"}, "set both to learned-mask"),
        ({"pruning.kinds": ["ffn", "hidden"]}, "take hidden out"),
        ({"pruning.kinds": ["ffn", "layer"], "pruning.basis": "units"}, "pruning.basis=block"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_settings(recipe_for(**settings))

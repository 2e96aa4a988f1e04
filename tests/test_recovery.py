"""The training loop: cutting early is masking to the end, and what is not finite does no harm."""

import itertools
import math

import pytest
import torch
from conftest import build, go_through, logits, with_lora
from peft.tuners.lora import LoraLayer
from torch import Tensor

from regrow.data.tokens import Batch
from regrow.planning.plan import Plan
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.learner import Diverged, Learner, automatic_learning_rate, learning_rate_factor
from regrow.recovery.pruner import Pruner
from regrow.settings import Training
from regrow.structure.adapters import adapter_parameters, attach_lora
from regrow.structure.finding import find_groups

STEPS = 12


def data(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Batch(torch.randint(0, 64, (3, 10), generator=generator))


def recipe_for(name: str = "loraprune", **settings: object) -> Recipe:
    return load_recipe(
        name,
        {
            "training.steps": STEPS,
            "pruning.interval": 2,
            "pruning.calibration_batches": 2,
            "pruning.sparsity": 0.5,
            "training.learning_rate": 3e-3,
            **settings,
        },
    )


def run(recipe: Recipe, cut_early: bool = True, family: str = "llama-gqa"):
    model = build(family)
    groups = with_lora(model, fill=False)
    learner = Learner(model, recipe.training, data())
    with Pruner(model, groups, recipe, learner, data(1), cut_early=cut_early) as pruner:
        losses = go_through(pruner, STEPS)
        pruner.finish()
    return model, pruner, losses


@pytest.mark.parametrize("criterion", ["lora", "gate-fisher", "taylor", "magnitude"])
@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_cutting_early_is_masking_to_the_end(criterion: str, shape: str) -> None:
    recipe = recipe_for(**{"pruning.criterion": criterion, "pruning.shape": shape, "pruning.protect_last": 0})
    early, early_pruner, early_losses = run(recipe)
    late, late_pruner, late_losses = run(recipe, cut_early=False)
    assert early_pruner.plan == late_pruner.plan
    assert early_losses == pytest.approx(late_losses, abs=1e-4)
    assert (logits(early) - logits(late)).abs().max() < 1e-4
    assert early_losses[0] != pytest.approx(early_losses[-1], abs=1e-3), "training that changes nothing proves nothing"


def test_units_fade_before_they_are_cut() -> None:
    recipe = recipe_for(**{"pruning.decay_steps": 4, "pruning.schedule": "one-shot"})
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    learner = Learner(model, recipe.training, data())
    seen = []
    with Pruner(model, groups, recipe, learner, data(1)) as pruner:
        pruner.calibrate()
        for step in range(6):
            pruner.before_step(step)
            seen.append(sorted(set(pruner.gates.value("layers.0.ffn").tolist())))
            pruner.train_step()
    assert seen[:4] == [[1.0], [0.75, 1.0], [0.5, 1.0], [0.25, 1.0]]
    assert seen[4] == [1.0]
    assert pruner.finished
    assert find_groups(model).by_name("layers.0.ffn").units < 40


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_the_model_and_the_plan_agree_and_the_target_is_reached(shape: str) -> None:
    model, pruner, _ = run(recipe_for(**{"pruning.shape": shape, "pruning.protect_last": 0}))
    traced = find_groups(model)
    for group in traced:
        assert group.units == len(pruner.plan.groups[group.name].keep)
    assert traced.total_parameters == pruner.plan.total_parameters - pruner.plan.removed_parameters
    step = traced.by_name("layers.0.ffn").cost * (2 if shape == "uniform" else 1)
    surplus = pruner.plan.removed_parameters - 0.5 * pruner.plan.block_parameters
    assert 0 <= surplus < step


def test_moments_are_cut_along() -> None:
    model, pruner, _ = run(recipe_for())
    optimizer = pruner.learner.optimizer
    for parameter in adapter_parameters(model):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["exp_avg_sq"].shape == parameter.shape


def test_the_same_seed_gives_the_same_bits() -> None:
    (first, _, losses), (second, _, again) = run(recipe_for()), run(recipe_for())
    assert losses == again
    assert torch.equal(logits(first), logits(second))


# --- the learner ------------------------------------------------------------------------------


def learner_for(model, batches=None, **settings: object) -> Learner:
    return Learner(model, Training(**{"steps": 50, "learning_rate": 1e-3, **settings}), batches or data())


def test_only_adapters_are_trained() -> None:
    model = build("llama-gqa")
    with_lora(model, fill=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = learner_for(model)
    for _ in range(2):
        learner.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize("scored", [None, [9, 7, 1, 2]], ids=["all tokens", "responses only"])
def test_accumulation_is_one_large_batch(scored: list[int] | None) -> None:
    """Also where the halves have unequal numbers of tokens that count."""
    ids = torch.randint(0, 64, (4, 10))
    whole = Batch(ids, scored and torch.arange(10) >= 10 - torch.tensor(scored)[:, None])
    results = []
    for accumulate, batches in ((1, [whole]), (2, [whole.rows(slice(0, 2)), whole.rows(slice(2, 4))])):
        model = build("llama-gqa")
        with_lora(model)
        learner = learner_for(model, itertools.cycle(batches), accumulate=accumulate)
        step = learner.step()
        results.append((step.loss, step.gradient_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    norms = []
    for checkpointing in (False, True):
        model = build("llama-gqa")
        with_lora(model)
        norms.append(learner_for(model, gradient_checkpointing=checkpointing).step().gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_update_that_is_not_finite_is_skipped_and_a_row_of_them_ends_the_run() -> None:
    model = build("llama-gqa")
    with_lora(model, fill=False)
    learner = learner_for(model, max_skipped=3)
    learner.step()
    before = learner.snapshot()
    good = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data[0, 0] = math.inf
    assert learner.step().skipped
    assert all(torch.equal(a, b) for a, b in zip(before, learner.snapshot(), strict=True))
    model.lm_head.weight.data.copy_(good)
    assert not learner.step().skipped
    assert learner.skipped == 1
    model.lm_head.weight.data[0, 0] = math.nan
    learner.step()
    learner.step()
    with pytest.raises(Diverged, match="3 updates in a row were not finite"):
        learner.step()


def test_snapshots_come_back() -> None:
    model = build("llama-gqa")
    with_lora(model, fill=False)
    learner = learner_for(model)
    saved, then = learner.snapshot(), logits(model)
    learner.step()
    assert not torch.equal(then, logits(model))
    learner.restore(saved)
    assert torch.equal(then, logits(model))


def test_learning_rates() -> None:
    training = Training(steps=100, warm_up=0.1)
    factors = [learning_rate_factor(step, 100, training) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert learning_rate_factor(50, 100, Training(steps=100, schedule="linear", warm_up=0.0)) == pytest.approx(0.5)
    assert automatic_learning_rate(4096) == pytest.approx(3e-4)


def test_whole_plan_is_what_a_run_starts_from() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    assert Plan.whole(groups).sparsity.block == 0


def test_linears_with_one_input_keep_one_copy_of_it_under_autocast() -> None:
    def kept(casting: bool) -> int:
        model = build("llama-mha-tied").bfloat16()
        attach_lora(model, find_groups(model).linears, rank=2, alpha=2, dropout=0.0)
        if casting:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module._forward_pre_hooks.clear()  # what leaves the cast to autocast
        held: dict[int, Tensor] = {}
        looking = torch.autograd.graph.saved_tensors_hooks(lambda x: held.setdefault(x.data_ptr(), x), lambda x: x)
        with looking, torch.autocast("cpu", torch.bfloat16):
            model.train()(input_ids=torch.arange(48).view(2, 24))
        return sum(tensor.nbytes for tensor in held.values())

    assert kept(casting=False) < 0.95 * kept(casting=True)

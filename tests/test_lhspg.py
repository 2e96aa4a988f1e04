"""LHSPG: saliencies against references, the gates against the paper's form in place, periods that add up."""

import math

import pytest
import torch
from conftest import build, logits, with_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from test_criteria import backward, scorer_for, two_by_two
from test_planning import groups_of
from test_recovery import data
from torch import Tensor

from regrow.criteria import lhspg
from regrow.criteria.evidence import Evidence
from regrow.criteria.registry import CRITERIA, combine
from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.planning.schedule import cut_events, fade_ends, period_bounds
from regrow.recipe import load_recipe
from regrow.recovery.learner import Learner
from regrow.recovery.lhspg import forget_moments
from regrow.recovery.pruner import Pruner
from regrow.recovery.scoring import copy_factors, gather_evidence
from regrow.settings import Pruning
from regrow.structure.adapters import adapter_parameters, lora_factors
from regrow.structure.finding import find_groups

# --- saliencies -------------------------------------------------------------------------------


# x = [[1, 2], [3, 4]], d = sBA = [[4, 2], [-4, -2]]; rows: <x, d> = 8, -20; ‖x‖² = 5, 25; ‖d‖² = 20, 20
def test_saliencies_by_hand() -> None:
    evidence = Evidence("g", "ffn", 2, (two_by_two(0),))
    expected = {
        "magnitude": [math.sqrt(5), 5.0],
        "mean-magnitude": [math.sqrt(5) / 2, 2.5],
        "cosine": [1 + 8 / 10, 1 - 20 / math.sqrt(500)],
        "first-order": [8.0, 20.0],
        "second-order": [32.0, 200.0],
    }
    for name, values in expected.items():
        assert CRITERIA[f"lhspg-{name}"].score(evidence).tolist() == pytest.approx(values)
    assert {name: term.tolist() for name, term in lhspg.lhspg(evidence).items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
    assert {name: term.tolist() for name, term in lhspg.cosine_and_second_order(evidence).items()} == {
        name: pytest.approx(expected[name]) for name in ("cosine", "second-order")
    }


def test_terms_are_combined_over_the_whole_model_by_hand() -> None:
    terms = {
        "one": {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 0.0]), "c": torch.tensor([1.0, 1.0])},
        "two": {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([0.0, 0.0]), "c": torch.tensor([1.0, -1.0])},
    }
    combined = combine(terms)  # norms 5, 0 and 2
    assert combined["one"].tolist() == pytest.approx([(0.6 + 0.5) / 3, 0.5 / 3])
    assert combined["two"].tolist() == pytest.approx([0.5 / 3, (0.8 - 0.5) / 3])


def reference(x_g: Tensor, d_g: Tensor) -> dict[str, Tensor]:
    return {
        "lhspg-magnitude": x_g.norm(),
        "lhspg-mean-magnitude": x_g.norm() / len(x_g),
        "lhspg-cosine": 1 + torch.cosine_similarity(x_g, d_g, 0),
        "lhspg-first-order": (x_g @ d_g).abs(),
        "lhspg-second-order": 0.5 * (x_g @ d_g) ** 2,
    }


@pytest.mark.parametrize("period", [False, True])
def test_saliencies_are_the_float64_reference(period: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.criteria.evidence.ROWS_AT_ONCE", 7)  # rows in several blocks, the last one short
    model = build("llama-gqa")
    groups = with_lora(model)
    start = copy_factors(model)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, d = {}, {}
    for linear in groups.linears:
        a, b = (factor.detach().double() for factor in lora_factors(model, linear))
        x[linear] = model.get_parameter(f"{linear}.base_layer.weight").detach().double()
        d[linear] = 2 * b @ a
        if period:
            then = 2 * start[linear][1].double() @ start[linear][0].double()
            x[linear], d[linear] = x[linear] + then, d[linear] - then
    for group in groups:
        own = [s for s in group.slices if s.module in x and not s.is_adapter]
        evidence = gather_evidence(model, group, None, torch.Generator(), start if period else {})
        of_unit = [
            reference(*(
                torch.cat([v[s.module].index_select(s.axis, torch.tensor(s.index[unit])).flatten() for s in own])
                for v in (x, d)
            ))
            for unit in range(group.units)
        ]  # fmt: skip
        for name in of_unit[0]:
            expected = torch.stack([values[name] for values in of_unit])
            torch.testing.assert_close(CRITERIA[name].score(evidence).double(), expected, rtol=1e-4, atol=1e-6)


def test_before_any_training_only_magnitudes_tell() -> None:
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)  # B = 0
    terms = lhspg.lhspg(gather_evidence(model, groups[0], None, torch.Generator()))
    assert terms["first-order"].tolist() == terms["second-order"].tolist() == [0.0] * groups[0].units
    assert terms["cosine"].tolist() == [1.0] * groups[0].units
    assert len(terms["magnitude"].unique()) == groups[0].units


def test_a_criterion_of_ones_own_may_have_terms(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('def two(evidence):\n    s = evidence.gate.mean_square\n    return {"big": 1e6 * s, "small": -s}\n')
    model, groups, gates, scorer = scorer_for(f"{file}:two")
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    assert scorer.update(groups, plan, plan)
    for scores in scorer.average.scores.values():
        torch.testing.assert_close(scores, torch.zeros_like(scores), atol=1e-7, rtol=0)  # scales do not matter


@pytest.mark.parametrize("returned", ["{}", "{evidence.name: evidence.gate.mean}"])
def test_terms_that_cannot_be_combined_are_refused(returned: str, tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def odd(evidence):\n    return {returned}\n")
    model, groups, gates, scorer = scorer_for(f"{file}:odd")
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    with pytest.raises(InputError, match="wanted the same terms"):
        scorer.update(groups, plan, plan)


# --- the schedule -----------------------------------------------------------------------------


def test_periods_by_hand() -> None:
    pruning = Pruning(schedule="lhspg", warm_up=0.1, cool_down=0.4, periods=4)
    assert period_bounds(pruning, 100) == [10, 22, 35, 47, 60]
    assert cut_events(pruning, 100) == {10: 0.25, 22: 0.5, 35: 0.75, 47: 1.0}
    assert fade_ends(pruning, 100) == {10: 22, 22: 35, 35: 47, 47: 60}
    assert fade_ends(Pruning(schedule="one-shot", decay_steps=7), 100) == {0: 7}


@given(
    steps=st.integers(0, 300),
    periods=st.integers(1, 12),
    warm_up=st.floats(0, 0.99),
    cool_down=st.floats(0, 0.99),
)
def test_periods_always_reach_the_target_within_the_steps(steps, periods, warm_up, cool_down) -> None:
    pruning = Pruning(schedule="lhspg", periods=periods, warm_up=warm_up, cool_down=cool_down)
    events, ends = cut_events(pruning, steps), fade_ends(pruning, steps)
    assert list(events) == sorted(events)
    assert list(events.values()) == sorted(events.values())
    assert events[max(events)] == 1.0
    assert list(ends) == list(events)
    assert all(start <= end <= steps for start, end in ends.items())
    assert list(ends.values())[:-1] == list(events)[1:]


@settings(max_examples=20)
@given(sparsity=st.floats(0.1, 0.6), periods=st.integers(1, 7), shape=st.sampled_from(["uniform", "free"]))
def test_the_units_of_all_periods_are_those_of_one(sparsity: float, periods: int, shape: str) -> None:
    groups = groups_of("llama-mha-tied")
    pruning = Pruning(sparsity=sparsity, shape=shape, allocation="by-kind", schedule="lhspg", periods=periods)
    scores = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(g.layer)) for g in groups}
    at_once = choose(groups, Plan.whole(groups), scores, pruning)
    plan, taken = Plan.whole(groups), 0
    for fraction in cut_events(pruning, 400).values():
        following = choose(groups, plan, scores, pruning, fraction)
        taken += sum(len(g.keep) - len(following.groups[name].keep) for name, g in plan.groups.items())
        plan = following
    assert plan == at_once
    assert taken == sum(g.units - len(g.keep) for g in at_once.groups.values())


def test_by_kind_takes_the_lowest_of_each_kind_wherever_they_are() -> None:
    groups = groups_of("llama-mha-tied")
    scores = {g.name: torch.arange(g.units) + 1000.0 * (g.layer == 0) for g in groups}
    scores |= {g.name: 1e-6 * scores[g.name] for g in groups if g.kind == "attention"}  # kinds are not compared
    local, by_kind = (
        choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.3, shape="free", allocation=allocation))
        for allocation in ("local", "by-kind")
    )
    for kind in ("attention", "ffn"):
        lost = {g.layer: g.units - len(by_kind.groups[g.name].keep) for g in groups if g.kind == kind}
        assert sum(lost.values()) == sum(g.units - len(local.groups[g.name].keep) for g in groups if g.kind == kind)
        assert lost[0] == 0
    capped = Pruning(sparsity=0.3, shape="free", allocation="by-kind", cap=0.5)
    assert len(choose(groups, Plan.whole(groups), scores, capped).groups["layers.1.ffn"].keep) == 20


# --- gates against the form in place ----------------------------------------------------------


def pruner_for(model, groups, steps: int, cut_early: bool = True, **overrides: object) -> Pruner:
    timing = {"training.steps": steps, "training.learning_rate": 1e-2, "pruning.warm_up": 0.1, "pruning.cool_down": 0.4}
    recipe = load_recipe("lorashear", {**timing, **overrides})
    return Pruner(
        model, groups, recipe, Learner(model, recipe.training, data()), data(1), lambda event: None, cut_early
    )


def computed_weight(model, name: str) -> Tensor:
    """What a linear really does, gate and adapter included: `[out, in]`."""
    linear = model.get_submodule(name)
    with torch.no_grad():
        return linear(torch.eye(linear.in_features, dtype=torch.float64)[None])[0].T.clone()


class InPlace:
    """LHSPG's step on writable columns, float64, as Alg. 4 prints it (λ and its direction as documented)."""

    def __init__(self, columns: Tensor, length: int, epsilon: float) -> None:
        self.x, self.length, self.epsilon, self.fell_at = columns, length, epsilon, length

    def step(self, t: int, absorbed: Tensor) -> None:
        y = self.x + absorbed
        if not y.any():
            return
        trial = y - (y.norm() / (self.length - t)) * y / y.norm()
        if (trial * self.x).sum() < self.epsilon * self.x.square().sum():
            trial, self.fell_at = torch.zeros_like(y), t
        self.x = trial


WARM_UP, LENGTH, STEPS = 4, 8, 16
"""The length is a power of two: gates are float32, and then exact."""


@pytest.mark.parametrize("epsilon", [0.0, 0.8])
def test_gates_do_what_the_form_in_place_does(epsilon: float) -> None:
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    model.double()
    consumers = {group.consumers[0].module: group for group in groups}
    shares = {"pruning.warm_up": WARM_UP / STEPS, "pruning.cool_down": 0.25, "pruning.periods": 1}
    pruner = pruner_for(model, groups, STEPS, cut_early=False, **shares, **{"pruning.epsilon": epsilon})
    units: dict[tuple[str, int], InPlace] = {}

    def columns(name: str, unit: int) -> Tensor:
        return torch.from_numpy(consumers[name].consumers[0].index[unit])

    with pruner:
        for step in range(WARM_UP + LENGTH + 1):
            pruner.before_step(step)
            now = {name: computed_weight(model, name) for name in consumers}
            if step == WARM_UP:
                for name, group in consumers.items():
                    for unit in sorted(set(range(group.units)) - set(pruner.plan.groups[group.name].keep)):
                        units[name, unit] = InPlace(now[name][:, columns(name, unit)], LENGTH, epsilon)
                assert len(units) >= 20
            elif step > WARM_UP:
                for (name, unit), form in units.items():
                    form.step(step - WARM_UP - 1, absorbed[name][:, columns(name, unit)])
                    torch.testing.assert_close(now[name][:, columns(name, unit)], form.x, atol=1e-9, rtol=0)
                if step == WARM_UP + 3:
                    assert_computes_the_same(model, units, columns)
            if step < WARM_UP + LENGTH:
                pruner.train_step()
                absorbed = {name: computed_weight(model, name) - before for name, before in now.items()}
                assert max(float(change.abs().max()) for change in absorbed.values()) > 1e-3
    for name, unit in units:
        assert not now[name][:, columns(name, unit)].any()
    fell_at = {form.fell_at for form in units.values()}
    at_the_end = {LENGTH - 1, LENGTH}
    assert fell_at <= at_the_end if epsilon == 0 else len(fell_at - at_the_end) >= 2


def assert_computes_the_same(model, units: dict[tuple[str, int], InPlace], columns) -> None:
    """The whole model: gates over frozen weights, against plain weights with the units' columns written in."""
    plain = build("llama-gqa").double()
    for name in find_groups(plain).linears:
        a, b = lora_factors(model, name)
        plain.get_parameter(f"{name}.weight").data += 2 * b.detach() @ a.detach()
    ungated = logits(plain)
    for (name, unit), form in units.items():
        plain.get_parameter(f"{name}.weight").data[:, columns(name, unit)] = form.x
    assert (logits(model) - logits(plain)).abs().max() < 1e-6  # the norms compute in float32
    assert (logits(model) - ungated).abs().max() > 1e-2


# --- the run ----------------------------------------------------------------------------------


def run(cut_early: bool = True, **overrides: object):
    model = build("llama-gqa")
    quiet = {"lora.dropout": 0.0, "pruning.allocation": "by-kind"}
    pruner = pruner_for(model, with_lora(model, fill=False), 12, cut_early, **{**quiet, **overrides})
    losses, widths = [], []
    with pruner:
        pruner.calibrate()
        for step in range(12):
            pruner.before_step(step)
            losses.append(pruner.train_step())
            widths.append(len(pruner.plan.groups["layers.0.ffn"].keep))
        pruner.before_step(12)
        pruner.finish()
    return model, pruner, losses, widths


@pytest.mark.parametrize("criterion", ["lhspg", "gate-fisher"])
def test_cutting_at_the_end_of_each_period_is_masking_to_the_end(criterion: str) -> None:
    overrides = {"pruning.criterion": criterion, "pruning.shape": "free", "pruning.periods": 3, "pruning.epsilon": 0.7}
    early, early_pruner, early_losses, widths = run(**overrides)
    late, late_pruner, late_losses, _ = run(False, **overrides)
    assert widths[1] == 40
    assert len(set(widths)) == 4  # whole, and after each of three choices
    assert early_pruner.plan == late_pruner.plan
    assert early_losses == pytest.approx(late_losses, abs=1e-4)
    assert (logits(early) - logits(late)).abs().max() < 1e-4
    assert find_groups(early).by_name("layers.0.ffn").units == widths[-1]


def test_a_saliency_is_taken_once_a_period_and_of_that_period() -> None:
    _, pruner, _, _ = run(**{"pruning.periods": 3})
    assert pruner.scorer.average.count == 3
    start = pruner.scorer._start["model.layers.0.mlp.up_proj"]
    assert start[1].any(), "the last period began with trained adapters, from which displacements count"


def test_moments_of_redundant_units_are_forgotten_and_no_others() -> None:
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    learner = Learner(model, load_recipe("lorashear").training, data())
    for _ in range(2):
        learner.step()
    group = groups.by_name("layers.1.ffn")
    state = learner.optimizer.state
    before = {parameter: {key: moment.clone() for key, moment in state[parameter].items()} for parameter in state}
    forget_moments(model, group.only(torch.tensor([1, 4]).numpy()), learner.optimizer)
    a, _ = lora_factors(model, "model.layers.1.mlp.down_proj")
    _, b = lora_factors(model, "model.layers.1.mlp.up_proj")
    for parameter, axis in ((a, 1), (b, 0)):
        for key in ("exp_avg", "exp_avg_sq"):
            was, now = before[parameter][key], state[parameter][key]
            zero = [unit for unit in range(40) if not now.select(axis, unit).any()]
            assert zero == [1, 4]
            kept = torch.tensor([unit for unit in range(40) if unit not in zero])
            assert torch.equal(was.index_select(axis, kept), now.index_select(axis, kept))
    untouched, _ = lora_factors(model, "model.layers.1.mlp.up_proj")
    for key, was in before[untouched].items():
        assert torch.equal(was, state[untouched][key])


def test_the_free_shape_of_the_paper_reaches_the_target_and_leaves_protected_layers_alone() -> None:
    model, pruner, _, _ = run(**{"pruning.shape": "free", "pruning.protect_last": 1, "pruning.sparsity": 0.3})
    assert 0.3 <= pruner.plan.sparsity.block < 0.31
    traced = find_groups(model)
    assert {group.name: group.units for group in traced} == {n: len(g.keep) for n, g in pruner.plan.groups.items()}
    assert traced.by_name("layers.1.ffn").units == 40
    assert traced.by_name("layers.1.attention").units == 3

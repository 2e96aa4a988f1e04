"""Compensation: closed forms against solved references, and a refitted model that stays the same when cut."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import build, logits, random_keep, with_lora

from regrow.compensation.moments import InputMoments
from regrow.compensation.solve import (
    bias_only,
    cut_errors,
    elimination_order,
    least_squares,
    least_squares_with_bias,
    low_rank,
    output_error,
    repaired_errors,
)
from regrow.progress import Silent
from regrow.recovery.compensate import Compensator
from regrow.settings import Compensation
from regrow.structure.adapters import adapter_parameters
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.prefix import LayerWalk, watching_inputs

KEPT = torch.tensor([0, 2, 3, 6, 7])


def problem(seed: int = 0, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor, InputMoments]:
    """Weights `[4, 9]`, correlated inputs `[tokens, 9]` that are not centred, and their moments."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 9, generator=chance, dtype=torch.float64)
    mixing = torch.randn(9, 9, generator=chance, dtype=torch.float64)
    x = torch.randn(tokens, 9, generator=chance, dtype=torch.float64) @ mixing + 0.7
    moments = InputMoments.zeros(9)
    for batch in x.split(7):
        moments.add(batch)
    return weight, x, moments


def test_streamed_moments_are_those_of_all_tokens() -> None:
    _, x, moments = problem()
    torch.testing.assert_close(moments.second_CC, x.T @ x / len(x))
    some = torch.tensor([5, 0, 3])
    for centred, whole_CC in ((False, moments.second_CC), (True, torch.cov(x.T, correction=0))):
        torch.testing.assert_close(moments.block(some, centred), whole_CC[some][:, some])
        torch.testing.assert_close(moments.times(whole_CC[some], centred), whole_CC[some] @ whole_CC)
        torch.testing.assert_close(moments.energies_C(centred), whole_CC.diagonal())


def test_least_squares_is_the_solution_of_the_overdetermined_system() -> None:
    weight, x, moments = problem()
    expected = torch.linalg.lstsq(x[:, KEPT], x @ weight.T).solution.T
    torch.testing.assert_close(least_squares(weight, moments, KEPT, 1e-14), expected, rtol=1e-6, atol=1e-8)


def test_least_squares_with_a_bias_is_the_solution_with_a_column_of_ones() -> None:
    weight, x, moments = problem()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x[:, KEPT], ones], 1), x @ weight.T).solution.T
    fitted, bias = least_squares_with_bias(weight, moments, KEPT, 1e-14)
    torch.testing.assert_close(fitted, expected[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, expected[:, -1], rtol=1e-6, atol=1e-8)


def test_damping_is_a_ridge_towards_the_weights_as_they_are() -> None:
    weight, x, moments = problem()
    strength = 0.1 * moments.second_CC.diagonal().mean() * len(x)
    ridge = strength.sqrt() * torch.eye(len(KEPT), dtype=torch.float64)
    system = torch.cat([x[:, KEPT], ridge])
    wanted = torch.cat([x @ weight.T, ridge @ weight[:, KEPT].T])
    expected = torch.linalg.lstsq(system, wanted).solution.T
    torch.testing.assert_close(least_squares(weight, moments, KEPT, 0.1), expected, rtol=1e-8, atol=1e-10)


def test_infinite_damping_is_the_plain_cut_and_the_bias_alone() -> None:
    weight, _, moments = problem()
    torch.testing.assert_close(least_squares(weight, moments, KEPT, 1e12), weight[:, KEPT])
    fitted, bias = least_squares_with_bias(weight, moments, KEPT, 1e12)
    torch.testing.assert_close(fitted, weight[:, KEPT])
    torch.testing.assert_close(bias, bias_only(weight, moments, KEPT))


@pytest.mark.parametrize("damping", [1e-9, 1e-2, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_more_freedom_the_less_error(seed: int, damping: float) -> None:
    weight, x, moments = problem(seed)
    plain = output_error(weight, moments, KEPT, weight[:, KEPT])
    bias = output_error(weight, moments, KEPT, weight[:, KEPT], bias_only(weight, moments, KEPT))
    squares = output_error(weight, moments, KEPT, least_squares(weight, moments, KEPT, damping))
    both = output_error(weight, moments, KEPT, *least_squares_with_bias(weight, moments, KEPT, damping))
    assert both < squares < plain
    assert both < bias < plain
    direct = (x @ weight.T - x[:, KEPT] @ weight[:, KEPT].T).square().sum(1).mean()
    assert plain == pytest.approx(float(direct))


def test_repaired_error_of_a_unit_is_what_the_refit_leaves() -> None:
    weight, _, moments = problem()
    units = torch.tensor([[0, 1], [2, 5], [8, 3]])
    found = repaired_errors(weight, moments, units, 1e-13)
    for number, unit in enumerate(units):
        kept = torch.tensor([c for c in range(9) if c not in unit])
        error = output_error(weight, moments, kept, least_squares(weight, moments, kept, 1e-13))
        assert float(found[number]) == pytest.approx(error, rel=1e-5)
        cut_alone = output_error(weight, moments, kept, weight[:, kept])
        assert float(cut_errors(weight, moments, units)[number]) == pytest.approx(cut_alone)


def test_elimination_is_greedy_on_the_refitted_rest() -> None:
    weight, _, moments = problem()
    units = torch.arange(9)[:, None]
    left, expected = list(range(9)), []
    while len(left) > 1:
        errors = []
        for unit in left:
            kept = torch.tensor([c for c in left if c != unit])
            errors.append(output_error(weight, moments, kept, least_squares(weight, moments, kept, 1e-13)))
        expected.append(left.pop(int(np.argmin(errors))))
    assert elimination_order(weight, moments, units, 1e-13, rounds=99).tolist() == expected


def test_elimination_of_independent_inputs_ranks_by_energy() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    moments = InputMoments(torch.diag(torch.tensor([9.0, 1.0, 0.25], dtype=torch.float64)), torch.zeros(3), 1)
    assert elimination_order(weight, moments, torch.arange(3)[:, None], 1e-9, stop=3).tolist() == [2, 1, 0]


def test_low_rank_factors_are_exact_at_full_rank_and_best_in_the_inputs_metric() -> None:
    weight, x, moments = problem()
    change = weight[:, KEPT].flip(0)
    full_b, full_a = low_rank(change, moments, KEPT, 4)
    torch.testing.assert_close(full_b @ full_a, change, rtol=1e-5, atol=1e-7)
    b, a = low_rank(change, moments, KEPT, 2)
    plain_u, plain_s, plain_v = torch.linalg.svd(change, full_matrices=False)
    plain = (plain_u[:, :2] * plain_s[:2]) @ plain_v[:2]

    def error(estimate: torch.Tensor) -> float:
        return float((x[:, KEPT] @ (change - estimate).T).square().sum())

    best = torch.linalg.svdvals(x[:, KEPT] @ change.T)[2:].square().sum()
    assert error(b @ a) == pytest.approx(float(best), rel=1e-4)
    assert error(b @ a) < error(plain)


def test_a_random_subspace_comes_near_the_best_factors() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(400, 60, generator=chance) * torch.logspace(1, -1, 60)
    moments = InputMoments.zeros(60)
    moments.add(x)
    change, kept = torch.randn(50, 60, generator=chance), torch.arange(60)

    def error(*factors: torch.Tensor) -> float:
        return float((x.double() @ (change.double() - factors[0] @ factors[1]).T).square().sum())

    best = error(*low_rank(change, moments, kept, 8))
    swept = [error(*low_rank(change, moments, kept, 8, sweeps)) for sweeps in (0, 2)]
    assert best < swept[1] < 1.01 * best < swept[0]
    state = torch.get_rng_state()
    again = low_rank(change, moments, kept, 8, 2)
    assert error(*again) == swept[1]
    assert torch.equal(torch.get_rng_state(), state)
    full = low_rank(change, moments, kept, 50, 0)
    torch.testing.assert_close(full[0] @ full[1], change.double(), rtol=1e-5, atol=1e-7)


IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(5))


def test_layer_walk_gives_what_a_full_run_gives(family: str) -> None:
    model = build(family)
    groups = find_groups(model)
    walk = LayerWalk(model, list(IDS.split(4)))
    inputs: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
    with Gates(model, groups.groups) as gates, torch.no_grad():
        for number in range(2):
            for group in (g for g in groups if g.layer == number):
                module = model.get_submodule(group.consumers[0].module)
                with watching_inputs(module, inputs[group.name].append):
                    walk.run()
                closed = torch.ones(group.units)
                closed[0] = 0.0
                gates.set(group.name, closed)
            walk.advance()
        expected = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(torch.cat(list(walk.finish())), expected, rtol=1e-5, atol=1e-5)
        again = LayerWalk(model, [IDS])
        again.advance()
        torch.testing.assert_close(torch.cat(list(again.finish())), expected, rtol=1e-5, atol=1e-5)
    assert all(sum(len(x) for x in seen) == len(IDS) for seen in inputs.values())


@pytest.mark.parametrize("selection", ["criterion", "obs"])
def test_a_compensated_model_stays_the_same_when_it_is_cut(family: str, selection: str) -> None:
    model = build(family)
    groups = with_lora(model)
    keep = random_keep(groups, 3)
    settings = Compensation(method="least-squares", selection=selection)
    with Gates(model, groups.groups) as gates:
        done = Compensator(model, gates, settings).run(groups, keep, list(IDS.split(3)), Silent())
        masked = logits(model)
    assert {name: len(units) for name, units in done.keep.items()} == {n: len(u) for n, u in keep.items()}
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in done.repaired.values())
    if selection == "criterion":
        assert all(np.array_equal(done.keep[name], keep[name]) for name in keep)
    cut(model, groups, done.keep)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)


def consumer_outputs(model: torch.nn.Module, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("family", ["llama-biases", "llama-gqa"])
def test_on_the_calibration_tokens_a_refit_is_never_worse(family: str) -> None:
    errors = {}
    methods = ("none", "bias", "least-squares") if family == "llama-biases" else ("none", "least-squares")
    for method in methods:
        model = build(family)
        groups = find_groups(model)
        group = groups.by_name("layers.0.ffn")
        before = consumer_outputs(model, group.consumers[0].module)
        with Gates(model, groups.groups) as gates:
            keep = {group.name: np.arange(0, group.units, 2)}
            if method == "none":
                present = torch.zeros(group.units)
                present[::2] = 1
                gates.set(group.name, present)
            else:
                Compensator(model, gates, Compensation(method=method)).run(groups, keep, [IDS], Silent())
            errors[method] = float((consumer_outputs(model, group.consumers[0].module) - before).square().sum())
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert len(set(errors.values())) == len(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blending_goes_back_to_the_plain_cut_and_forth(dtype: torch.dtype) -> None:
    model = build("llama-biases").to(dtype)
    groups = find_groups(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with Gates(model, groups.groups) as gates:
        compensator = Compensator(model, gates, Compensation(method="least-squares"))
        done = compensator.run(groups, random_keep(groups, 1), [IDS], Silent())
        full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for share in (0.3, 0.7, 0.0):
            compensator.blend(done, share)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        compensator.blend(done, 1.0)
    assert all(torch.equal(parameter, full[name]) for name, parameter in model.named_parameters())
    assert any(not torch.equal(full[name], before[name]) for name in full)


def test_what_is_told_of_a_refit_is_what_the_adapter_could_hold_of_it() -> None:
    """Nothing before the group is pruned: its inputs stay what they were, and the outputs tell what came of it."""
    model = build("llama-gqa")
    groups = with_lora(model, rank=2, fill=False)
    group, linear = groups.by_name("layers.0.ffn"), model.model.layers[0].mlp.down_proj
    keep, outputs = np.arange(group.units // 2, group.units), list[torch.Tensor]()
    linear.register_forward_hook(lambda module, args, output: outputs.append(output.double()))
    settings = Compensation(method="least-squares", carrier="adapter")
    with Gates(model, groups.groups) as gates, torch.no_grad():
        run = partial(model, input_ids=IDS, use_cache=False)
        run()
        gates.keep(group.name, keep.tolist())
        run()
        gates.open()
        done = Compensator(model, gates, settings).run(groups, {group.name: keep}, [IDS], Silent())
        run()
    dense, cut_out, refitted = outputs[0], outputs[1], outputs[-1]
    taken = 1 - float((refitted - dense).square().sum() / (cut_out - dense).square().sum())
    assert 0.05 < taken < 0.95
    assert done.repaired == {group.name: pytest.approx(taken, rel=1e-4)}


def test_an_adapter_of_full_rank_carries_the_whole_refit() -> None:
    results = []
    for carrier in ("base", "adapter"):
        model = build("llama-gqa")
        groups = with_lora(model, rank=48, fill=False)
        for parameter in adapter_parameters(model)[1::2]:
            assert not parameter.any()
        settings = Compensation(method="least-squares", carrier=carrier)
        with Gates(model, groups.groups) as gates:
            Compensator(model, gates, settings).run(groups, random_keep(groups, 2), [IDS], Silent())
            results.append(logits(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)

"""When numbers go wrong: scores and refits stay finite, a bad batch leaves nothing behind, no broken model is left."""

import contextlib
import io
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import regrow
from regrow.checkpoint import reload_probe
from regrow.checkpoint.journal import Journal
from regrow.checkpoint.verify import PROBE, Verification
from regrow.compensation.moments import InputMoments
from regrow.compensation.solve import (
    bias_only,
    cut_errors,
    elimination_order,
    least_squares,
    least_squares_with_bias,
    low_rank,
    repaired_errors,
)
from regrow.criteria.registry import CRITERIA, find_criterion
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.plan import Plan
from regrow.progress import Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery.average import Average, MeanGradients
from regrow.recovery.compensate import Compensator
from regrow.recovery.learner import Diverged, Learner, clip_gradients
from regrow.recovery.losses import hidden_distance, language_loss
from regrow.recovery.pruner import Pruner
from regrow.recovery.scoring import Scorer
from regrow.settings import Compensation, Pruning
from regrow.structure.adapters import adapter_parameters, attach_lora, merge_lora
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups

IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(5))

GROUPS: dict[tuple[str, bool], Groups] = {}


def groups_of(family: str, model: PreTrainedModel, lora: bool = False) -> Groups:
    """Traced once: they are the same for all models of a shape."""
    if (family, lora) not in GROUPS:
        GROUPS[family, lora] = find_groups(model)
    return GROUPS[family, lora]


def wrapped(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Groups]:
    """A model with adapters that compute nothing yet, and its groups."""
    model = build("llama-gqa").to(dtype)
    linears = groups_of("llama-gqa", model).linears
    attach_lora(model, linears, rank=3, alpha=6, dropout=0.0)
    return model, groups_of("llama-gqa", model, lora=True)


# --- scores -------------------------------------------------------------------------------------


def kill(model: PreTrainedModel) -> None:
    """All that the first KV head and the first four channels own of the first layer is zero."""
    layer = model.model.layers[0]
    weight = lambda linear: linear.base_layer.weight  # noqa: E731
    for name, rows in (("q", 20), ("k", 10), ("v", 10)):
        weight(layer.self_attn.get_submodule(f"{name}_proj"))[:rows] = 0
    weight(layer.self_attn.o_proj)[:, :20] = 0
    for name in ("gate_proj", "up_proj"):
        weight(layer.mlp.get_submodule(name))[:4] = 0
    weight(layer.mlp.down_proj)[:, :4] = 0


def silence(model: PreTrainedModel) -> None:
    """Nothing flows into the first layer's consumers."""
    model.model.layers[0].self_attn.v_proj.base_layer.weight.zero_()
    model.model.layers[0].mlp.up_proj.base_layer.weight.zero_()


def scale_head(factor: float) -> Callable[[PreTrainedModel], object]:
    return lambda model: model.lm_head.weight.mul_(factor) is None


ODD: dict[str, tuple[Callable[[PreTrainedModel], object], Tensor]] = {
    "dead units": (kill, IDS),
    "silent layer": (silence, IDS),
    "zero variance": (lambda model: None, torch.full((3, 9), 7)),
    "gradients beyond float16": (scale_head(1e5), IDS),
    "gradients below float16": (scale_head(1e-6), IDS),
}


def scores_of(
    name: str, change: Callable[[PreTrainedModel], object], ids: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Groups, dict[str, Tensor]]:
    model, groups = wrapped(dtype)
    with torch.no_grad():
        change(model)
    gates = Gates(model, groups.groups, groups.layers)
    mask = lambda group: torch.full((group.units,), 0.5)  # noqa: E731
    scorer = Scorer(model, Plan.whole(groups), gates, find_criterion(name), None, seed=0, depth=True, mask=mask)
    scorer.watch(groups)
    model.train()
    with gates:
        scorer.look(Batch(ids))
        with scorer.recording(ids[:, 1:].numel()):
            language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
        assert scorer.update(groups, Plan.whole(groups), Plan.whole(groups))
    return groups, scorer.average.scores


WITHOUT_A_FLOOR = {
    "random",
    "block-influence",
    "gate-second-order",
    "learned-mask",
    "lhspg",
    "lhspg-cosine",
    "lhspg-cosine-second-order",
}
"""What is dead is not what these rank lowest."""


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_scores_are_finite_and_the_target_is_exact(name: str) -> None:
    for told, (change, ids) in ODD.items():
        groups, scores = scores_of(name, change, ids)
        assert all(bool(torch.isfinite(score).all()) for score in scores.values()), told
        if told == "dead units" and name not in WITHOUT_A_FLOOR:
            assert scores["layers.0.attention"].argmin() == 0
            assert scores["layers.0.ffn"][:4].max() <= scores["layers.0.ffn"][4:].min()
        pruning = Pruning(sparsity=0.4, shape="free", allocation="global", criterion=name)
        plan = choose(groups, Plan.whole(groups), scores, pruning)
        surplus = plan.removed_parameters - 0.4 * groups.block_parameters
        assert 0 <= surplus < groups.by_name("layers.0.ffn").cost


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, -3.0])
@pytest.mark.parametrize("allocation", ["local", "global", "pooled", "by-kind"])
def test_equal_scores_are_spread_evenly_and_always_alike(allocation: str, value: float) -> None:
    groups = groups_of("llama-mha-tied", build("llama-mha-tied"))
    scores = {group.name: torch.full((group.units,), value) for group in groups}
    pruning = Pruning(sparsity=0.35, shape="free", allocation=allocation)
    plan = choose(groups, Plan.whole(groups), scores, pruning)
    assert plan == choose(groups, Plan.whole(groups), scores, pruning)
    lost = {name: group.removed for name, group in plan.groups.items()}
    for kind in ("attention", "ffn"):
        first, second = (lost[f"layers.{number}.{kind}"] for number in range(2))
        assert abs(first - second) <= 1
        assert plan.groups[f"layers.0.{kind}"].keep[-1] == groups.by_name(f"layers.0.{kind}").units - 1
    assert 0 <= plan.removed_parameters - 0.35 * groups.block_parameters < groups.by_name("layers.0.ffn").cost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lora", "gate-fisher", "taylor", "wanda", "flap"])
def test_scores_in_half_precision_rank_as_float32_does(name: str, dtype: torch.dtype) -> None:
    _, exact = scores_of(name, lambda model: None, IDS)
    _, rough = scores_of(name, lambda model: None, IDS, dtype)
    for group in ("layers.0.ffn", "layers.1.ffn"):
        ranks = [scores[group].argsort().argsort().double() for scores in (exact, rough)]
        assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.97


def test_a_spike_counts_for_ten_times_the_average_and_no_more() -> None:
    plan = Plan.whole(groups_of("llama-gqa", build("llama-gqa")))
    units = {name: group.units for name, group in plan.groups.items()}
    chance = torch.Generator().manual_seed(0)
    usual = [{name: torch.rand(count, generator=chance) for name, count in units.items()} for _ in range(6)]
    leap = {name: 1e9 * torch.rand(count, generator=chance) for name, count in units.items()}
    for decay in (0.9, None):
        calm, shaken, unguarded = Average(units, decay, 10.0), Average(units, decay, 10.0), Average(units, decay)
        for number, scores in enumerate(usual):
            if number == 3:
                shaken.add(leap, plan)
                unguarded.add(leap, plan)
            for average in (calm, shaken, unguarded):
                average.add(scores, plan)
        sizes = [sum(float(s.sum()) for s in each.scores.values()) for each in (calm, shaken, unguarded)]
        assert sizes[1] < 4 * sizes[0]
        assert sizes[2] > 1e7 * sizes[0]
        again = Average(units, decay, 10.0)
        again.go_on(shaken.state())
        for average in (shaken, again):
            average.add(usual[0], plan)
        assert all(torch.equal(score, again.scores[name]) for name, score in shaken.scores.items())


# --- refits -------------------------------------------------------------------------------------

KEPT = torch.tensor([0, 2, 3, 6, 7])


def inputs(kind: str) -> Tensor:
    """Tokens `[60, 9]` with odd second moments."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(60, 9, generator=chance, dtype=torch.float64)
    match kind:
        case "silent":
            return torch.zeros_like(x)
        case "some silent":
            x[:, [1, 2, 6]] = 0
        case "constant":
            return torch.full_like(x, 1000.0) * torch.arange(1, 10)
        case "nearly constant":
            return 1e6 + 1e-4 * x
        case "one direction":
            return x[:, :1] * torch.arange(1, 10)
        case "twins":
            x[:, 1], x[:, 3] = x[:, 0], x[:, 2]
        case "one token":
            return x[:1]
        case "badly conditioned":
            return (x * 10.0 ** -torch.arange(0.0, 18, 2)) @ torch.ones(9, 9, dtype=torch.float64).tril()
        case "tiny":
            return 1e-30 * x
        case "huge":
            return 1e30 * x
    return x


KINDS = [
    "silent", "some silent", "constant", "nearly constant", "one direction", "twins", "one token",
    "badly conditioned", "tiny", "huge",
]  # fmt: skip


@pytest.mark.parametrize("damping", [1e-30, 1e-12, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_refits_are_finite_and_never_worse_than_the_cut(kind: str, damping: float) -> None:
    x = inputs(kind)
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moments = InputMoments.zeros(9)
    moments.add(x)

    def error(fitted: Tensor, bias: Tensor | float = 0.0) -> float:
        return float((x @ weight.T - x[:, KEPT] @ fitted.T - bias).square().sum(1).mean())

    plain, most = error(weight[:, KEPT]), float((x @ weight.T).square().sum(1).mean())
    fitted = least_squares(weight, moments, KEPT, damping)
    both = least_squares_with_bias(weight, moments, KEPT, damping)
    assert all(bool(torch.isfinite(t).all()) for t in (fitted, *both))
    rounding = 1e-6 * most if kind == "badly conditioned" else 1e-9 * most
    for refitted in (error(fitted), error(*both), error(weight[:, KEPT], bias_only(weight, moments, KEPT))):
        assert refitted <= plain + rounding
    if kind == "silent":
        torch.testing.assert_close(fitted, weight[:, KEPT])  # nothing is known: everything stays as it is
    units = torch.arange(9).view(3, 3)
    errors = cut_errors(weight, moments, units), repaired_errors(weight, moments, units, damping)
    assert all(bool(torch.isfinite(each).all()) for each in errors)
    assert sorted(elimination_order(weight, moments, units, damping, stop=3).tolist()) == [0, 1, 2]
    assert all(bool(torch.isfinite(t).all()) for t in low_rank(fitted - weight[:, KEPT], moments, KEPT, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_is_never_worse_than_the_cut_though_rounded(dtype: torch.dtype) -> None:
    """Two channels say nearly the same: exact least squares plays them off against each other with huge weights."""
    errors, repaired = [], 0.0
    for refits in (False, True):
        model = build("llama-biases").to(dtype)
        mlp = model.model.layers[0].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data[1::2] = linear.weight.data[::2] * (1 + 2**-7)
            linear.bias.data[1::2] = linear.bias.data[::2]
        groups = groups_of("llama-biases", model)
        group = groups.by_name("layers.0.ffn")
        seen: list[Tensor] = []
        mlp.down_proj.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.double()))
        run = lambda model=model: model(input_ids=IDS, use_cache=False)  # noqa: E731
        with Gates(model, groups.groups) as gates, torch.no_grad():
            run()
            keep = {group.name: np.arange(12, group.units)}
            gates.keep(group.name, keep[group.name])
            if refits:
                gates.open()
                settings = Compensation(method="least-squares", damping=1e-30)
                done = Compensator(model, gates, settings).run(groups, keep, [IDS], Silent())
                repaired = done.repaired[group.name]
            run()
        errors.append(float((seen[-1] - seen[0]).square().sum()))
    assert errors[1] <= errors[0] * (1 + 1e-2)
    assert 0 <= repaired <= 1


def test_what_is_not_finite_is_no_calibration() -> None:
    moments = InputMoments.zeros(9)
    good = inputs("plain")
    moments.add(good)
    for bad in (math.nan, math.inf):
        moments.add(torch.full((5, 9), bad))
    assert (moments.tokens, bool(torch.isfinite(moments.gram_CC).all())) == (60, True)
    model = build("llama-gqa")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    groups = groups_of("llama-gqa", model)
    keep = {"layers.0.ffn": np.arange(20)}
    with Gates(model, groups.groups) as gates, pytest.raises(InputError, match="down_proj is not finite in any batch"):
        Compensator(model, gates, Compensation(method="least-squares")).run(groups, keep, [IDS], Silent())


# --- training -----------------------------------------------------------------------------------


def data(seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Batch(torch.randint(0, 64, (3, 10), generator=generator))


BAD = Batch(torch.full((3, 10), 63))
"""Spoils whatever `Spoiler` says."""


class Spoiler:
    """Makes the model answer one particular batch with something that is not finite, or that leaps."""

    def __init__(self, model: PreTrainedModel, how: str) -> None:
        self.how, self.bad = how, False
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        model.lm_head.register_forward_hook(self._answer)

    def _look(self, module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        self.bad = torch.equal(kwargs["input_ids"], BAD.ids_BT)

    def _answer(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        if not self.bad:
            return None
        if self.how == "gradient":
            output.register_hook(lambda grad: torch.full_like(grad, math.inf))
            return None
        return output * {"nan": math.nan, "inf": math.inf, "spike": 1e4}[self.how]


def recipe_for(**settings: object) -> Recipe:
    changes = {
        "training.steps": 20, "training.schedule": "constant", "training.warm_up": 0.0, "training.learning_rate": 3e-3,
        "pruning.calibration_batches": 2, "pruning.schedule": "cubic", **settings,
    }  # fmt: skip
    return load_recipe("loraprune", changes)


def trained(recipe: Recipe, batches: Iterator[Batch], steps: int, how: str = "nan") -> Pruner:
    """Calibrated and trained for some steps, nothing chosen yet."""
    model, groups = wrapped()
    Spoiler(model, how)
    learner = Learner(model, recipe.training, batches)
    with Pruner(model, groups, recipe, learner, data(1)) as pruner:
        pruner.calibrate()
        for _ in range(steps):
            pruner.train_step()
    return pruner


def inserted(batches: Iterator[Batch], at: Sequence[int]) -> Iterator[Batch]:
    for number in range(99):
        yield BAD if number in at else next(batches)


def assert_same_state(first: Pruner, second: Pruner) -> None:
    for one, other in ((first.learner, second.learner), (first.scorer, second.scorer)):
        before, after = one.state().tensors, other.state().tensors
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("criterion", ["lora", "gate-fisher", "taylor", "taylor-second", "wanda"])
@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_bad_batch_leaves_no_trace(criterion: str, how: str) -> None:
    """Adapters, AdamW's moments and averaged scores are, to the bit, those of a run that never saw it."""
    recipe = recipe_for(**{"pruning.criterion": criterion})
    without = trained(recipe, data(), 4)
    with_bad = trained(recipe, inserted(data(), at=(1, 3)), 6, how)
    assert (without.learner.skipped, with_bad.learner.skipped) == (0, 2)
    assert_same_state(without, with_bad)


def test_a_bad_half_of_a_step_takes_the_other_half_with_it() -> None:
    recipe = recipe_for(**{"pruning.criterion": "taylor", "training.accumulate": 2})
    without = trained(recipe, data(), 3)
    good = data()
    first = [next(good), next(good)]
    with_bad = trained(recipe, iter([*first, first[0], BAD, *(next(good) for _ in range(4))]), 4)
    assert with_bad.learner.skipped == 1
    assert_same_state(without, with_bad)


def test_a_spike_is_trained_on_and_does_not_outweigh_the_others() -> None:
    recipe = recipe_for(**{"pruning.criterion": "gate-fisher"})
    calm = trained(recipe, data(), 8)
    shaken, again = (trained(recipe, inserted(data(), at=(3,)), 9, "spike") for _ in range(2))
    assert_same_state(shaken, again)
    assert shaken.learner.skipped == 0
    parts = [torch.cat(list(each.scorer.average.scores.values())) for each in (calm, shaken)]
    assert float(parts[1].sum()) < 20 * float(parts[0].sum())
    norms = [sum(float(p.detach().norm()) for p in each.learner.parameters) for each in (calm, shaken)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


CALIBRATED_AT_ONCE = ["wanda", "obs", "repairable-fisher", "mini-llm"]


@pytest.mark.parametrize("criterion", [*CALIBRATED_AT_ONCE, "gate-fisher", "lora"])
@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 2)])
def test_calibration_does_without_a_bad_batch_but_not_without_all(criterion: str, bad: tuple[int, ...]) -> None:
    changes = {"pruning.criterion": criterion, "pruning.calibration_batches": 3, "pruning.schedule": "one-shot"}
    recipe = recipe_for(**changes)
    model, groups = wrapped()
    model.model.layers[0].register_forward_pre_hook(  # all that comes after is NaN, too
        lambda module, args: (torch.full_like(args[0], math.nan), *args[1:]) if spoiler.bad else None
    )
    spoiler = Spoiler(model, "nan")
    learner = Learner(model, recipe.training, data())
    with Pruner(model, groups, recipe, learner, inserted(data(1), bad)) as pruner:
        if len(bad) == 3:
            with pytest.raises(InputError, match=f"criterion {criterion}: none of 3 calibration batches gave scores"):
                pruner.calibrate()
            return
        pruner.calibrate()
        pruner.before_step(0)
    assert learner.skipped == 1
    scores = pruner.scorer.average.scores
    assert all(bool(torch.isfinite(score).all()) and score.unique().numel() > 1 for score in scores.values())


def test_what_is_scored_once_has_gradients_of_adapters_too(tmp_path: Path) -> None:
    """A criterion of one's own that reads the LoRA factors' gradients beside sums over all batches."""
    found = []
    for needs in ({"lora"}, {"lora", "channels"}):
        file = tmp_path / f"of_{len(needs)}.py"
        file.write_text(f"from regrow.criteria.lora import lora\nNEEDS = {needs}\ndef score(e): return lora(e)\n")
        changes = {"pruning.criterion": f"{file}:score", "pruning.schedule": "one-shot", "training.clip": 1e9}
        recipe = recipe_for(**changes)
        model, groups = wrapped()
        Spoiler(model, "nan")
        learner = Learner(model, recipe.training, data())
        with Pruner(model, groups, recipe, learner, inserted(data(1), (1,))) as pruner:
            pruner.calibrate()
        assert all(parameter.grad is None for parameter in learner.parameters)
        found.append(pruner.scorer.average.scores)
    once, both = found
    assert all(torch.equal(score, both[name]) and score.sum() > 0 for name, score in once.items())


def test_gradients_are_averaged_over_batches() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    mean = MeanGradients(parameters)
    for gradient in ([1.0, 2.0], [3.0, 6.0]):
        parameters[0].grad = torch.tensor(gradient)
        mean.add()
    mean.put()
    assert parameters[0].grad.tolist() == [2.0, 4.0]
    assert parameters[1].grad is None


def test_nothing_is_chosen_by_scores_that_nobody_measured() -> None:
    recipe = recipe_for(**{"pruning.calibration_batches": 0, "training.max_skipped": 99, "pruning.interval": 1})
    model, groups = wrapped()
    Spoiler(model, "nan")
    learner = Learner(model, recipe.training, inserted(data(), range(99)))
    with (
        Pruner(model, groups, recipe, learner, data(1)) as pruner,
        pytest.raises(InputError, match="no step before 3 gave scores that are finite"),
    ):
        for step in range(9):
            pruner.before_step(step)
            pruner.train_step()


def test_a_row_of_bad_batches_says_what_to_try() -> None:
    recipe = recipe_for(**{"training.max_skipped": 3})
    with pytest.raises(Diverged, match=r"3 updates in a row were not finite \(step 4\); lower training.learning_rate"):
        trained(recipe, inserted(data(), at=(1, 2, 3, 4)), 9)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25, 3e38])
def test_gradients_are_clipped_also_where_their_square_is_beyond_float32(size: float) -> None:
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full((4,), size)
    norm = clip_gradients(parameters, 0.5)
    assert norm == pytest.approx(size * math.sqrt(12), rel=1e-5)
    clipped = torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])
    assert float(clipped.norm()) == pytest.approx(min(norm, 0.5), rel=1e-4)
    parameters[1].grad = torch.full((4,), math.nan)
    assert not math.isfinite(clip_gradients(parameters, 0.5))


def test_a_teacher_that_is_silent_somewhere_can_be_followed() -> None:
    teacher = torch.zeros(1, 3, 4)
    student = torch.ones(1, 3, 4, requires_grad=True)
    distance = hidden_distance([student], [teacher])
    distance.backward()
    assert float(distance.detach()) == 1.0
    assert torch.isfinite(student.grad).all()


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def probe_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload in this process: a fresh one takes seconds, and other tests have it."""

    fresh = subprocess.run

    def run(command: list[str], **given: Any) -> Any:
        if str(PROBE) not in command:
            return fresh(command, **given)
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            reload_probe.main(*command[3:])
        report = {**json.loads(told.getvalue()), "regrow_imported": False}
        return subprocess.CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setattr("regrow.checkpoint.verify.subprocess.run", run)
    monkeypatch.setattr("regrow.evaluation.compare.complete", lambda model, tokenizer, prompt: "…")


def checkpoint_in(dtype: torch.dtype, checkpoint: Path, folder: Path, scale: float = 1.0) -> Path:
    """The tiny LLaMA in another dtype, its embedding scaled."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(scale)
    model.to(dtype).save_pretrained(folder)
    for file in checkpoint.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def prune(model: Path, text: Path, out: Path, **settings: object) -> regrow.Result:
    overrides = {**QUICK, "training.learning_rate": 1e-2, **settings}
    return regrow.prune(str(model), out, "loraprune", data=str(text), steps=4, overrides=overrides)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_run_in_every_dtype(
    dtype: torch.dtype, checkpoint: Path, text: Path, tmp_path: Path, probe_here: None
) -> None:
    result = prune(checkpoint_in(dtype, checkpoint, tmp_path / "model"), text, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(result.model / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(result.model, dtype="auto").dtype == dtype
    verification = result.results["verification"]
    assert verification["passed"]
    losses = verification["losses"]
    assert list(losses) == ["trained", "merged", "saved", "reloaded"]
    assert max(losses.values()) - min(losses.values()) <= verification["loss_allowed"]
    assert losses["trained"] == pytest.approx(losses["merged"], abs=1e-5)  # computed in float32 on a CPU
    assert "Loss on the way" in (result.folder / "report.md").read_text()
    assert result.results["training"]["compute_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_are_merged_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model, _ = wrapped(dtype)
    for parameter in adapter_parameters(model):
        parameter.data = 0.1 * torch.randn_like(parameter)
    layer = model.model.layers[0].mlp.up_proj
    weight, a, b = (
        layer.get_parameter(name).detach().clone()
        for name in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    merge_lora(model)
    exact = weight.double() + 2.0 * b.double() @ a.double()
    got = model.model.layers[0].mlp.up_proj.weight
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def corrupted_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(model: PreTrainedModel) -> None:
        merge_lora(model)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(-3)

    monkeypatch.setattr("regrow.checkpoint.verify.merge_lora", merge)


def corrupted_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: PreTrainedModel, tokenizer: object, folder: Path, **given: object) -> None:
        save_checkpoint(model, tokenizer, folder, **given)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    from regrow.checkpoint.save import save_checkpoint

    monkeypatch.setattr("regrow.walk.save_checkpoint", save)


def interrupted_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise OSError("no process to be had")

    monkeypatch.setattr("regrow.checkpoint.verify.subprocess.run", run)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (corrupted_merge, InputError, r"is not the one that was trained: losses are trained \d\.\d+, merged "),
        (corrupted_save, InputError, r"is not the one that was trained: .* saved .* reloaded "),
        (interrupted_check, OSError, "no process to be had"),
    ],
)
def test_no_broken_model_is_left(
    damage: Callable[[pytest.MonkeyPatch], None], error: type[Exception], words: str,
    checkpoint: Path, text: Path, tmp_path: Path, probe_here: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    damage(monkeypatch)
    model = checkpoint_in(torch.float32, checkpoint, tmp_path / "model", scale=30.0)
    with pytest.raises(error, match=words):
        prune(model, text, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "running"
    assert not (tmp_path / "out" / "results.json").exists()


def test_weights_that_the_files_cannot_hold_are_noticed(
    checkpoint: Path, text: Path, tmp_path: Path, probe_here: None
) -> None:
    model = checkpoint_in(torch.float32, checkpoint, tmp_path / "model", scale=1e8)
    with pytest.raises(InputError, match=r"losses are trained \d.*, saved nan, .* set output.dtype=float32"):
        prune(model, text, tmp_path / "out", **{"output.dtype": "float16"})
    assert not (tmp_path / "out" / "model").exists()


def test_losses_that_differ_are_told_apart_from_logits_that_do() -> None:
    fine = Verification("C", "5", 0.0, 1.0, False, {"trained": 2.0, "merged": 2.0005}, 1e-3)
    fine.check(Path("m"))
    for losses in ({"trained": 2.0, "merged": 2.1}, {"trained": math.nan, "merged": math.nan}, {"saved": math.inf}):
        with pytest.raises(InputError, match="not the one that was trained"):
            Verification("C", "5", 0.0, 1.0, False, losses, 1e-3).check(Path("m"))
    assert fine.after({"before": 2.02}, torch.bfloat16).passed  # computed in bfloat16, saved in float32
    assert not fine.after({"before": 2.02}, torch.float32).passed
    with pytest.raises(InputError, match="logits differ by 2, allowed 1"):
        Verification("C", "5", 2.0, 1.0, False).check(Path("m"))


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_diverged_run_says_what_to_try_and_keeps_its_checkpoint(
    checkpoint: Path, text: Path, tmp_path: Path, probe_here: None
) -> None:
    """An `InputError` is one line and exit code 2 (`test_bad_input.py`)."""
    out, heard = tmp_path / "out", Heard()
    wanted = {
        **QUICK, "training.learning_rate": 1e30, "training.max_skipped": 3, "training.checkpoint_interval": 1,
        "training.warm_up": 0.0,
    }  # fmt: skip
    with pytest.raises(Diverged, match=r"3 updates in a row were not finite \(step \d\); lower training.learning_rate"):
        regrow.prune(str(checkpoint), out, "magnitude", data=str(text), steps=9, overrides=wanted, progress=heard)
    assert sum("update skipped, the loss (nan) or a gradient is not finite" in line for line in heard.said) == 2
    assert not (out / "model").exists()
    assert Journal(out, heard.say).latest() == ("train", 3)

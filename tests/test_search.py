"""Search, the supernet it tries candidates on, joint damage, and scores that know what can be repaired."""

import itertools
import json
import math
from mmap import ALLOCATIONGRANULARITY
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, build, logits, with_lora
from safetensors.torch import load_file

import regrow
from regrow.checkpoint.journal import Forgetful
from regrow.compensation.moments import InputMoments
from regrow.criteria.evidence import Evidence, Linear
from regrow.criteria.repair import obs, repairable_fisher
from regrow.errors import InputError
from regrow.planning.allocation import settle
from regrow.planning.demand import most_removed
from regrow.planning.interactions import least_joint_damage
from regrow.planning.plan import Plan
from regrow.planning.search import Ladder, exchange_search
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.compensate import Compensator
from regrow.recovery.losses import FullTarget, divergence, sampled_labels
from regrow.recovery.preparation import Preparation
from regrow.recovery.shelf import Shelf
from regrow.recovery.supernet import Fitness, Supernet
from regrow.settings import Compensation, Pruning
from regrow.structure.adapters import adapter_parameters
from regrow.structure.depth import remove_layers
from regrow.structure.finding import find_groups
from regrow.structure.gates import GateMoments, Gates

IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(5))


def ladder_of(family: str, levels: int = 4) -> tuple[Ladder, int]:
    groups = find_groups(build(family))
    pruning = Pruning(sparsity=0.4, shape="free")
    return Ladder.of(groups, most_removed(groups, pruning), levels), int(0.4 * groups.block_parameters)


def test_rungs_end_at_the_limit_and_begin_at_nothing() -> None:
    ladder, _ = ladder_of("llama-gqa")
    for name, rungs in ladder.rungs.items():
        assert rungs[0] == 0
        assert list(rungs) == sorted(set(rungs))
        assert rungs[-1] < (3 if "attention" in name else 40)


def test_nearest_rungs_reach_the_target() -> None:
    ladder, target = ladder_of("llama-gqa")
    counts = ladder.nearest(dict.fromkeys(ladder.rungs, 1), target)
    assert ladder.removed(counts) >= target
    assert all(counts[name] in rungs for name, rungs in ladder.rungs.items())


def test_an_exchange_keeps_the_target_and_gives_something_back() -> None:
    ladder, target = ladder_of("llama-gqa")
    chance = torch.Generator().manual_seed(0)
    counts = ladder.nearest(dict.fromkeys(ladder.rungs, 1), target)
    made = [ladder.exchange(counts, target, 2, chance) for _ in range(50)]
    for other in (one for one in made if one is not None):
        assert ladder.removed(other) >= target
        change = [other[name] - counts[name] for name in counts]
        assert sum(one > 0 for one in change) == 1
        assert any(one < 0 for one in change)
    assert any(made)


def test_an_exchange_may_reach_over_rungs() -> None:
    ladder = Ladder({name: tuple(range(9)) for name in "ab"}, dict.fromkeys("ab", 1))
    chance = torch.Generator().manual_seed(0)
    made = [ladder.exchange({"a": 4, "b": 4}, 8, 3, chance) for _ in range(50)]
    assert {max(one.values()) for one in made if one is not None} == {5, 6, 7}


def test_the_search_finds_the_best_of_a_small_space() -> None:
    ladder = Ladder({name: tuple(range(9)) for name in "abc"}, dict.fromkeys("abc", 1))
    wanted = {"a": 6, "b": 1, "c": 5}

    def distance(counts: dict[str, int]) -> float:
        return float(sum((counts[name] - wanted[name]) ** 2 for name in wanted))

    found = exchange_search([{"a": 4, "b": 4, "c": 4}], ladder, 12, distance, 200, seed=0)
    assert found.counts == wanted
    assert list(found.trace) == sorted(found.trace, reverse=True)
    assert len(found.trace) <= 200


def test_the_first_half_of_a_search_reaches_over_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = Ladder({name: tuple(range(30)) for name in "abc"}, dict.fromkeys("abc", 1))
    exchange, measured, reaches = Ladder.exchange, [], []

    def noted(self: Ladder, counts: dict[str, int], target: int, reach: int, chance: torch.Generator):
        reaches.append((len(measured), reach))
        return exchange(self, counts, target, reach, chance)

    monkeypatch.setattr(Ladder, "exchange", noted)
    fitness = lambda counts: measured.append(counts) or float(-len(measured))  # noqa: E731
    exchange_search([{"a": 9, "b": 9, "c": 9}, {"a": 3, "b": 12, "c": 12}], ladder, 27, fitness, 20, seed=0)
    assert len(measured) == 20
    assert {reach for count, reach in reaches if count < 10} == {3}
    assert {reach for count, reach in reaches if count >= 10} == {1}


@pytest.mark.parametrize("beside", [-3, 0, 3])
def test_settled_counts_remove_what_is_asked_by_channels_first(beside: int) -> None:
    groups = find_groups(build("llama-gqa"))
    pruning = Pruning(sparsity=0.4, shape="free")
    ladder, target = ladder_of("llama-gqa")
    near = ladder.nearest(dict.fromkeys(ladder.rungs, 1), target)
    most = max((group.name for group in groups if group.kind == "ffn"), key=near.__getitem__)
    near[most] += beside
    counts = settle(groups, near, pruning)
    assert all(counts[group.name] == near[group.name] for group in groups if group.kind == "attention")
    removed = sum(group.cost * counts[group.name] for group in groups)
    wanted = 0.4 * groups.block_parameters
    assert wanted <= removed < wanted + groups.by_name("layers.0.ffn").cost


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha-tied", "qwen3", "llama-biases"])
@pytest.mark.parametrize(
    "settings",
    [
        Compensation(method="least-squares", selection="obs"),
        Compensation(method="least-squares", selection="criterion"),
        Compensation(method="least-squares", selection="obs", carrier="adapter"),
        Compensation(method="bias"),
        Compensation(method="none"),
    ],
    ids=["obs", "criterion", "adapter", "bias", "none"],
)
def test_a_supernet_computes_what_a_compensated_first_group_does_and_gets_whole_again(
    family: str, settings: Compensation, tmp_path: Path
) -> None:
    model = build(family)
    groups = with_lora(model, rank=40, fill=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = logits(model)
    with torch.no_grad():
        dense = model(IDS).logits
    scores = {group.name: torch.arange(group.units).float().flip(0) for group in groups}
    with Gates(model, groups.groups) as gates:
        supernet = Supernet(model, groups, gates, Compensator(model, gates, settings), tmp_path)
        rungs = {"layers.0.attention": [1], "layers.1.ffn": [5, 20]}
        supernet.build(rungs, scores, [IDS], Silent())
        assert torch.equal(logits(model), whole)
        fitness = Fitness(supernet, [IDS])
        assert fitness(dict.fromkeys((g.name for g in groups), 0)) == pytest.approx(0, abs=1e-6)
        some, more = fitness({"layers.1.ffn": 5}), fitness({"layers.1.ffn": 20})
        assert 0 < some < more
        assert fitness({"layers.1.ffn": 5}) == some, "whatever was tried before"
        supernet.close()
        assert fitness({"layers.1.ffn": 20}) == more
        with torch.no_grad():
            told_apart = float(divergence(model(IDS).logits, FullTarget(dense, 1.0), 1.0))
        assert more == pytest.approx(told_apart, rel=1e-4), "all 64 tokens are among the likeliest"
        supernet.close()
        assert torch.equal(logits(model), whole)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        # The first group's prefix is the dense one, so that the ready-made refit is the proper one.
        supernet.set({"layers.0.attention": 1})
        ready = logits(model)
        supernet.close()
        keep = {"layers.0.attention": np.arange(groups.by_name("layers.0.attention").units - 1)}
        Compensator(model, gates, settings).run(groups, keep, [IDS], Silent())
        torch.testing.assert_close(logits(model), ready, rtol=1e-4, atol=1e-5)


def test_least_joint_damage_against_all_subsets() -> None:
    chance = torch.Generator().manual_seed(3)
    samples = torch.randn(30, 7, generator=chance, dtype=torch.float64) @ torch.randn(7, 7, generator=chance).double()
    damage = {
        subset: float(samples[:, list(subset)].sum(1).square().mean()) for subset in itertools.combinations(range(7), 2)
    }
    first = int(samples.square().mean(0).argmin())
    greedy = min((pair for pair in damage if first in pair), key=lambda pair: damage[pair])
    assert tuple(least_joint_damage(samples, 2, 7).tolist()) == greedy


def test_twins_do_not_both_go() -> None:
    twin = torch.tensor([1.0, -1.0, 1.0, -1.0])
    samples = torch.stack([twin, twin, 1.2 * torch.tensor([1.0, 1.0, -1.0, -1.0])], 1)
    assert least_joint_damage(samples, 2, 3).tolist() == [0, 2]
    assert least_joint_damage(samples, 2, 2).tolist() == [0, 1]


def evidence_of(copies: float) -> Evidence:
    """Three channels of equal damage, of which the last is `copies` times the first, plus noise of its own."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=chance)
    x[:, 2] = copies * x[:, 0] + 0.1 * x[:, 2]
    moments = InputMoments.zeros(3)
    moments.add(x)
    gate = GateMoments(torch.zeros(3).double(), torch.full((3,), 2.0).double(), 2)
    consumer = Linear("down", torch.eye(3), 1, torch.arange(3)[:, None])
    return Evidence("layers.0.ffn", "ffn", 3, (consumer,), gate, inputs=moments)


def test_what_others_can_make_up_for_counts_less() -> None:
    scores = repairable_fisher(evidence_of(copies=1.0))
    assert scores[2] < 0.1 * scores[1]
    assert scores[1] == pytest.approx(0.5, rel=0.05)
    assert int(obs(evidence_of(copies=1.0)).argmin()) != 1


def test_without_moments_nothing_is_discounted() -> None:
    evidence = evidence_of(1.0)
    bare = Evidence("layers.0.ffn", "ffn", 3, evidence.linears, evidence.gate)
    torch.testing.assert_close(repairable_fisher(bare), torch.full((3,), 0.5).double())


def test_sampled_labels_follow_the_models_own_distribution() -> None:
    logits_BTV = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(1, 20_001, 3)
    labels = sampled_labels(logits_BTV, torch.Generator().manual_seed(0))
    shares = torch.bincount(labels[0, 1:], minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.01, rtol=0)


OVERRIDES = QUICK | {"search.evaluations": 6, "search.windows": 4, "search.judge_windows": 4, "compensation.windows": 4}


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_the_default_recipe_searches_refits_and_reports_it(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None, shape: str
) -> None:
    result = regrow.prune(
        str(checkpoint),
        tmp_path / "run",
        data=str(text),
        steps=4,
        sparsity=0.4,
        overrides=OVERRIDES | {"pruning.shape": shape},
    )
    training = result.results["training"]
    assert training["search"]["best"] == min(training["search"].get("trace") or training["search"]["divergence"])
    assert set(training["compensation"]["validation_loss"]) == {"0.5", "0.75", "1.0"}
    assert training["distillation"]["teacher_steps"] == {"cached": 4}
    assert result.results["sparsity"]["block"] == pytest.approx(0.4, abs=0.02)
    assert result.plan == Plan.parse((result.folder / "plan.json").read_text())


def test_finalists_are_trained_and_leave_nothing_behind(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None
) -> None:
    settings = OVERRIDES | {"compensation.carrier": "adapter", "lora.dropout": 0.2, "search.trial_steps": 6}
    settings |= {"training.learning_rate": 0.02, "training.schedule": "constant", "distillation.weight": 0.0}
    runs = [
        regrow.prune(
            str(checkpoint), tmp_path / str(count), data=str(text), steps=3, sparsity=0.25,
            overrides=settings | {"search.finalists": count},
        )
        for count in (1, None, 2)
    ]  # fmt: skip
    alone, default, asked = (run.results["training"]["search"] for run in runs)
    assert len(alone["candidates"]) == 2
    assert "finalists" not in alone
    assert default == asked
    before = [default["divergence"][number] for number in default["finalists"]]
    assert before == sorted(before)
    trained = default["divergence_trained"]
    assert all(abs(after - first) > 1e-4 for after, first in zip(trained, before, strict=True))
    taken = default["finalists"][int(np.argmin(trained))]
    assert default["best"] == default["divergence"][taken]
    widths = {kind: len(runs[1].plan.groups[f"layers.0.{kind}"].keep) for kind in ("attention", "ffn")}
    assert default["candidates"][taken] == {"layers": 3, **widths}
    assert "After a short training of each, the nearest 2 were at" in (tmp_path / "None" / "report.md").read_text()


def test_finalists_train_on_what_judges_them_where_there_is_no_more(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None
) -> None:
    few = {"search.judge_windows": 500, "search.trial_steps": 2, "search.evaluations": 2, "compensation.windows": 2}
    result = regrow.prune(
        str(checkpoint), tmp_path, data=str(text), steps=1, sparsity=0.25,
        overrides=OVERRIDES | few | {"search.finalists": 2, "data.max_tokens": 2000},
    )  # fmt: skip
    assert len(result.results["training"]["search"]["divergence_trained"]) == 2


def test_no_finalist_is_a_candidate_that_is_not_finite(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter((float("nan"), 1.0))
    monkeypatch.setattr("regrow.recovery.preparation.Fitness", lambda *given: lambda counts: next(values))
    result = regrow.prune(
        str(checkpoint), tmp_path, data=str(text), steps=1, sparsity=0.25, overrides=OVERRIDES | {"search.finalists": 2}
    )
    search = result.results["training"]["search"]
    assert (search["best"], "finalists" in search) == (1.0, False)


def test_a_finalist_that_diverges_is_the_worst() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    recipe = load_recipe("regrow", {"search.trial_steps": 3, "training.max_skipped": 2})
    gates = Gates(model, groups.groups)
    preparation = Preparation(model, gates, recipe, [IDS], lambda: 0.0, Silent(), Forgetful(), Path())
    nothing = {group.name: 0 for group in groups}
    before = [parameter.clone() for parameter in adapter_parameters(model)]

    def set_widths(counts: dict[str, int]) -> None:
        value = 1.0 if counts is nothing else float("nan")
        for group in groups:
            gates.set(group.name, torch.full((group.units,), value))

    supernet = SimpleNamespace(set=set_widths)
    with gates:
        trained = preparation._trained([{}, nothing], supernet, lambda counts: 0.5)
    assert trained == [math.inf, 0.5]
    assert all(torch.equal(one, other) for one, other in zip(before, adapter_parameters(model), strict=True))


@pytest.mark.parametrize("better", [0, 1])
def test_the_finalist_nearest_after_training_is_taken(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None, monkeypatch: pytest.MonkeyPatch, better: int
) -> None:
    def trained(self: Preparation, candidates, supernet, fitness) -> list[float]:
        found.append(original(self, candidates, supernet, fitness))
        return [float(number != better) for number in range(len(candidates))]

    found: list[list[float]] = []
    original = Preparation._trained
    settings = OVERRIDES | {"compensation.carrier": "adapter", "lora.dropout": 0.2, "distillation.weight": 0.0}
    losses = []
    for each in (lambda *given: [0.0, 1.0][:: 1 - 2 * better], trained):  # without training, and with it
        monkeypatch.setattr(Preparation, "_trained", each)
        result = regrow.prune(
            str(checkpoint), tmp_path / str(len(losses)), data=str(text), steps=3, sparsity=0.25,
            overrides=settings | {"search.finalists": 2, "search.trial_steps": 3},
        )  # fmt: skip
        search = result.results["training"]["search"]
        assert search["best"] == sorted(search["divergence"])[better]
        losses.append([step["loss"] for step in json.loads((result.folder / "history.json").read_text())["steps"]])
    assert found
    assert losses[0] == losses[1], "it leaves adapters and chance as they were"


@pytest.mark.parametrize(
    "settings",
    [
        {"pruning.criterion": "repairable-fisher"},
        {"pruning.criterion": "obs", "pruning.allocation": "local"},
        {"pruning.interactions": 2.0},
        {"pruning.labels": "model"},
        {"pruning.kinds": ["attention", "ffn", "layer"]},
    ],
)
def test_variants_of_the_default_recipe_run(checkpoint: Path, text: Path, tmp_path: Path, lean: None, settings) -> None:
    result = regrow.prune(
        str(checkpoint), tmp_path / "run", data=str(text), steps=2, sparsity=0.4, overrides=OVERRIDES | settings
    )
    assert result.results["sparsity"]["block"] >= 0.4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"search.evaluations": 4}, "search.evaluations goes with"),
        ({"pruning.criterion": "obs"}, "pruning.criterion=obs goes with"),
        ({"pruning.interactions": 2.0, "pruning.criterion": "gate-fisher"}, "pruning.interactions goes with"),
        ({"compensation.method": "least-squares", "compensation.carrier": "adapter"}, "carrier=adapter goes with"),
    ],
)
def test_what_is_done_once_wants_a_one_shot_schedule(
    checkpoint: Path, text: Path, tmp_path: Path, settings, complaint: str
) -> None:
    recipe = load_recipe("loraprune", QUICK | settings)
    with pytest.raises(InputError, match=complaint):
        regrow.prune(str(checkpoint), tmp_path / "run", recipe, data=str(text), steps=2)
    assert not (tmp_path / "run").exists()


def test_a_trial_that_was_refitted_is_built_anew_as_it_was(
    checkpoint: Path, text: Path, tmp_path: Path, lean: None
) -> None:
    settings = OVERRIDES | {"pruning.target_trials": 2, "training.eval_interval": 1}
    aimed = regrow.prune(
        str(checkpoint), tmp_path / "aimed", data=str(text), steps=2, target="perplexity=+900%", overrides=settings
    )
    share = aimed.results["target"]["sparsity"]
    plain = regrow.prune(
        str(checkpoint), tmp_path / "plain", data=str(text), steps=2, sparsity=share, overrides=settings
    )
    assert aimed.plan == plain.plan
    weights = [load_file(result.model / "model.safetensors") for result in (aimed, plain)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_a_supernet_goes_without_a_whole_layer_of_experts(tmp_path: Path) -> None:
    model = zoo.build("Mixtral")
    groups = find_groups(model)
    gone = {group.name: group.units for group in groups if group.layer == 1}
    with Gates(model, groups.groups, groups.layers) as gates:
        supernet = Supernet(model, groups, gates, Compensator(model, gates, Compensation(method="none")), tmp_path)
        supernet.set(gone)
        closed = zoo.logits_of(model)
        supernet.close()
    remove_layers(model, groups, [1])
    torch.testing.assert_close(closed, zoo.logits_of(model), rtol=1e-4, atol=1e-5)


def test_a_search_that_would_fill_the_disk_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and what is left of it at each rung: hidden 48, 40 channels of which 30 or 10 stay, float32."""
    model = build("llama-gqa")
    groups, settings = with_lora(model), Compensation(method="least-squares")
    rungs = {"layers.1.ffn": [0, 10, 30, 40]}
    scores = {group.name: torch.arange(group.units).float() for group in groups}
    with Gates(model, groups.groups) as gates:
        supernet = Supernet(model, groups, gates, Compensator(model, gates, settings), tmp_path)
        supernet.build(rungs, scores, [IDS], Silent())
        needed = 4 * 48 * (40 + 30 + 10)
        assert supernet.room(rungs) == needed
        assert needed <= supernet._shelf._file.seek(0, 2) < needed + 3 * ALLOCATIONGRANULARITY
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=needed - 1))
        with pytest.raises(InputError, match=r"search's refits will take about 0 MiB of disk, .* search.evaluations=0"):
            supernet.build(rungs, scores, [IDS], Silent())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_put_aside_is_what_it_was_and_leaves_no_file(dtype: torch.dtype, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    tensors = [torch.randn(size).to(dtype) for size in ((3, 5), (1,), (700, 11), (0, 4))]
    tensors.append(tensors[2].T)
    reads = [shelf.put(tensor) for tensor in tensors]
    reads[0]().zero_()
    for read, tensor in [*zip(reads, tensors, strict=True)][::-1]:
        torch.testing.assert_close(read(), tensor, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())

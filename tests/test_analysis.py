"""Sensitivity: trials are full forward passes at half the price, and plans make use of what they find."""

import itertools
import json
import math
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, CommandLine, build, logits, with_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from transformers import AutoModelForCausalLM

import regrow
from regrow.analysis.sensitivity import mean_loss, measure_sensitivity, units_removed
from regrow.analysis.stage import conditions_of
from regrow.checkpoint import fingerprint
from regrow.checkpoint.fingerprint import checkpoint_sha256
from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.planning.allocation import choose
from regrow.planning.curves import least_damage, measured_damage
from regrow.planning.plan import Plan
from regrow.planning.sensitivity import Conditions, Curve, GroupSensitivity, Prior, Sensitivity, fit_curve
from regrow.progress import Silent
from regrow.recipe import Recipe
from regrow.report.heat import heat_of, rounded_lines
from regrow.report.sensitivity import draw_sensitivity, show_sensitivity
from regrow.settings import Pruning
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Group, Groups
from regrow.structure.prefix import LayerWalk

CONDITIONS = Conditions(
    model_sha256="m", dtype="float32", tokens_sha256="t", windows=5, length=9, calibration_sha256="c",
    calibration_batches=1, batch_size=2, seed=0, criterion="random", scoring_sha256="s",
    shares=(0.25, 0.5),
)  # fmt: skip


def held_out(seed: int = 0) -> Windows:
    return Windows(torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(seed)), "here", "none")


def scores_of(groups: Groups, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=generator) for group in groups}


def power_law(a: float, p: float) -> Curve:
    """`a k^p` at every hundredth."""
    shares = tuple(k / 100 for k in range(101))
    return Curve(shares, tuple(a * share**p for share in shares))


def sensitivity_of(deltas: dict[str, tuple[float, ...]], units: int = 8) -> Sensitivity:
    groups = {
        name: GroupSensitivity(units=units, cost=1, removed=(units // 4, units // 2), deltas=both)
        for name, both in deltas.items()
    }
    together = {"ffn": GroupSensitivity(units=units, cost=1, removed=(1,), deltas=(0.5,))}
    return Sensitivity(conditions=CONDITIONS, dense_nll=1.0, groups=groups, together=together)


# --- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "qwen3"])
def test_trials_are_full_forward_passes_at_half_the_price(family: str) -> None:
    model = build(family)
    groups, windows = with_lora(model), held_out()
    scores, before = scores_of(groups), logits(model)
    forwards: list[int] = []
    for number in range(2):
        mlp = model.get_submodule(f"model.layers.{number}.mlp")
        mlp.register_forward_hook(lambda *_, number=number: forwards.append(number))
    found = measure_sensitivity(model, groups, scores, windows, (0.25, 0.5), Silent(), conditions=CONDITIONS)
    per_layer = 2 if family == "llama-mqa" else 4  # a single KV head is not pruned
    batches = 3
    assert forwards.count(0) == batches * (1 + 2 * per_layer)  # of the layer alone, and of a kind in all layers
    assert forwards.count(1) == batches * (1 + 3 * per_layer)
    assert torch.equal(logits(model), before)
    assert not any("forward" in vars(layer) for layer in model.model.layers)

    dense = held_out_nll(model, windows, 2)
    assert found.dense_nll == pytest.approx(dense, abs=1e-6)
    assert set(found.groups) == {group.name for group in groups if group.units > 1}
    assert set(found.together) == {name.split(".")[2] for name in found.groups}
    trials = {name: (group, [name]) for name, group in found.groups.items()}
    trials |= {k: (group, [name for name in found.groups if name.endswith(k)]) for k, group in found.together.items()}
    for group, names in trials.values():
        assert group.units == sum(found.groups[name].units for name in names)
        for removed, delta in zip(group.removed, group.deltas, strict=True):
            with Gates(model, groups.groups) as gates:
                for name in names:
                    present = torch.ones(groups.by_name(name).units)
                    present[torch.argsort(scores[name])[: removed // len(names)]] = 0.0
                    gates.set(name, present)
                assert delta == pytest.approx(held_out_nll(model, windows, 2) - dense, abs=1e-6)
        assert any(abs(delta) > 1e-5 for delta in group.deltas), "trials that change nothing prove nothing"


def test_what_computes_nothing_is_missed_by_nobody() -> None:
    model = build("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    groups = find_groups(model)
    found = measure_sensitivity(
        model, groups, scores_of(groups), held_out(), (0.3, 0.7), Silent(), conditions=CONDITIONS
    )
    assert found.groups["layers.1.attention"].deltas == (0.0, 0.0)
    assert found.groups["layers.1.attention"].removed == (1, 2)
    assert found.groups["layers.1.ffn"].mean != 0


class ReturnsTuple(torch.nn.Module):
    """A decoder layer as older modeling code has them: its output is the first of several."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, *args, **kwargs):
        return self.layer(x[0] if isinstance(x, tuple) else x, *args, **kwargs), None


def test_layers_that_return_tuples() -> None:
    model, windows = build("llama-gqa"), held_out()
    expected = held_out_nll(model, windows, 2)
    model.model.layers = torch.nn.ModuleList(map(ReturnsTuple, model.model.layers))
    model.model.norm.register_forward_pre_hook(lambda _, args: args[0][:1])
    walk = LayerWalk(model, torch.split(windows.ids_NT, 2))
    for _ in range(2):
        assert mean_loss(walk) == pytest.approx(expected, abs=1e-6)
        if walk.position == 0:
            walk.advance()


def test_one_unit_at_least_goes_and_one_stays() -> None:
    assert [units_removed(share, 3) for share in (0.01, 0.25, 0.5, 0.99)] == [1, 1, 2, 2]
    assert [units_removed(share, 40) for share in (0.25, 0.5)] == [10, 20]


def test_a_broken_model_is_told() -> None:
    model = build("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    groups = find_groups(model)
    with pytest.raises(InputError, match="the model as it is is nan"):
        measure_sensitivity(model, groups, scores_of(groups), held_out(), (0.5,), Silent(), conditions=CONDITIONS)


# --- what it says --------------------------------------------------------------------------------


def test_protected_by_hand() -> None:
    means = [1.0, 1.1, 0.9, 1.0, 5.0, 1.2, 0.8, 1.0, 4.0, 1.0, 1.1, 0.9, 3.0, 1.0]
    found = sensitivity_of({f"layers.{n}.ffn": (mean - 0.5, mean + 0.5) for n, mean in enumerate(means)})
    # The median is 1.0, the median absolute deviation 0.1: all above 1.3 are outliers.
    assert found.protected(0.5) == ("layers.4.ffn", "layers.8.ffn", "layers.12.ffn")
    assert found.protected() == ("layers.4.ffn", "layers.8.ffn")  # 15 % of 14 groups
    assert found.protected(0.0) == ()
    assert sensitivity_of({f"layers.{n}.ffn": (1.0, 2.0) for n in range(9)}).protected(0.9) == ()


def test_a_curve_by_hand() -> None:
    """0.3 at 0.5 lies above the line from 0.1 at 0.25 to 0.4 at 1; -0.2 is noise, and so is what falls again."""
    curve = fit_curve([0.5, 0.25, 1.0], [0.3, 0.1, 0.4])
    assert curve == Curve((0.0, 0.25, 1.0), (0.0, 0.1, 0.4))
    assert [curve(share) for share in (0.0, 0.125, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.05, 0.1, 0.2, 0.4])
    assert fit_curve([0.25, 0.5], [-0.2, 0.3]) == Curve((0.0, 0.25, 0.5), (0.0, 0.0, 0.3))
    assert fit_curve([0.25, 0.5, 0.75], [0.2, 0.1, 0.9])(0.5) == pytest.approx(0.1)
    assert fit_curve([0.25, 0.5, 0.75], [0.2, 0.1, 0.9])(0.25) == pytest.approx(0.05)
    beyond = fit_curve([0.25, 0.5], [0.1, 0.3])
    assert beyond(1.0) == pytest.approx(0.3 + 0.5 * 0.8)
    assert fit_curve([0.5], [0.3])(0.25) == pytest.approx(0.15)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4))
def test_no_curve_falls_or_gets_flatter(deltas: list[float]) -> None:
    shares = [0.2, 0.4, 0.6, 0.8][: len(deltas)]
    curve = fit_curve(shares, deltas)
    values = [curve(k / 20) for k in range(21)]
    steps = np.diff(values)
    assert values[0] == 0
    assert (steps >= 0).all()
    assert (np.diff(steps) >= -1e-9).all()
    assert all(curve(k) <= max(delta, 0) + 1e-9 for k, delta in zip(shares, deltas, strict=True))
    assert curve(shares[-1]) == pytest.approx(max(deltas[-1], 0))  # nothing pulls the last point down
    convex = [k**2 for k in shares]
    assert [fit_curve(shares, convex)(k) for k in shares] == pytest.approx(convex)


def test_it_survives_json_and_nonsense_does_not() -> None:
    found = sensitivity_of({"layers.0.ffn": (0.1, 0.30000000000000004), "layers.1.ffn": (-0.1, 1e-17)})
    assert Sensitivity.parse(json.dumps(found.to_json())) == found
    assert found.conditions.fingerprint != CONDITIONS.model_copy(update={"shares": (0.5,)}).fingerprint
    older = json.dumps({key: value for key, value in found.to_json().items() if key != "together"})
    for text in ("", "[]", json.dumps(found.to_json()).replace("0.1", "NaN"), older):
        with pytest.raises(InputError, match="not a valid sensitivity file"):
            Sensitivity.parse(text)


# --- what a plan makes of it ---------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(1, 4)), min_size=3, max_size=3), st.integers(1, 9))
def test_greedy_is_optimal_where_all_units_cost_the_same(laws: list[tuple[float, float]], amount: int) -> None:
    names, units = ["a", "b", "c"], 3
    curves = {name: power_law(*law) for name, law in zip(names, laws, strict=True)}
    groups = dict.fromkeys(names, Group("", 0, "ffn", units, (), 7))
    price, limit, gone = (dict.fromkeys(names, each) for each in (7, units, 0))
    counts = least_damage(groups, curves, price, limit, gone, 7 * amount)
    best = min(
        sum(curves[name](k / units) for name, k in zip(names, each, strict=True))
        for each in itertools.product(range(units + 1), repeat=3)
        if sum(each) == amount
    )
    assert sum(counts.values()) == amount
    assert sum(curves[name](count / units) for name, count in counts.items()) == pytest.approx(best, rel=1e-9)


def test_the_last_unit_may_be_too_much_if_it_is_of_the_cheapest() -> None:
    """A dearer one is not taken for what is left; 3 of `a` cost as much damage as is measured anywhere."""
    groups = {name: Group("", 0, "ffn", 3, (), 0) for name in "ab"}
    curves = {"a": power_law(1, 1), "b": power_law(2, 1)}
    limit, gone = dict.fromkeys("ab", 3), dict.fromkeys("ab", 0)
    for amount, expected in (
        (1, (1, 0)),
        (3, (2, 0)),
        (5, (3, 0)),
        (6, (3, 0)),
        (7, (3, 0)),
        (9, (3, 1)),
        (14, (3, 2)),
    ):
        counts = least_damage(groups, curves, {"a": 2, "b": 3}, limit, gone, amount)
        assert (counts["a"], counts["b"]) == expected


FOUND: dict[str, Groups] = {}


def find_groups_once(family: str = "llama-mha-tied") -> Groups:
    if family not in FOUND:
        FOUND[family] = find_groups(build(family))
    return FOUND[family]


@settings(max_examples=60)
@given(
    shape=st.sampled_from(["uniform", "free"]),
    basis=st.sampled_from(["block", "total"]),
    sparsity=st.floats(0.05, 0.5),
    seed=st.integers(0, 1000),
    protect=st.booleans(),
)
def test_by_curves_the_target_is_reached_to_one_unit(shape, basis, sparsity, seed, protect) -> None:
    groups = find_groups_once()
    chance = np.random.default_rng(seed)
    curves = {group.name: power_law(chance.uniform(0, 1), chance.uniform(1, 4)) for group in groups}
    prior = Prior(frozenset(["layers.1.attention"] if protect else []), curves)
    pruning = Pruning(sparsity=sparsity, shape=shape, basis=basis, allocation="curves")
    plan = choose(groups, Plan.whole(groups), scores_of(groups, seed), pruning, prior=prior)
    whole = groups.block_parameters if basis == "block" else groups.total_parameters
    step = groups.by_name("layers.0.ffn").cost * (2 if shape == "uniform" else 1)
    assert -1e-6 <= plan.removed_parameters - sparsity * whole < step
    if protect and shape == "free":
        assert len(plan.groups["layers.1.attention"].keep) == 6
    if shape == "uniform":
        assert len({len(g.keep) for name, g in plan.groups.items() if name.endswith("ffn")}) == 1


def test_by_curves_the_sturdy_layer_gives() -> None:
    groups = find_groups_once()
    curves = {group.name: power_law(10.0 if group.layer else 0.1, 2.0) for group in groups}
    prior = Prior(frozenset(), curves)
    pruning = Pruning(sparsity=0.3, shape="free", allocation="curves")
    plan = choose(groups, Plan.whole(groups), scores_of(groups), pruning, prior=prior)
    for kind in ("attention", "ffn"):
        assert len(plan.groups[f"layers.0.{kind}"].keep) < len(plan.groups[f"layers.1.{kind}"].keep)
    capped = choose(groups, Plan.whole(groups), scores_of(groups), pruning.model_copy(update={"cap": 0.4}), prior=prior)
    assert min(len(g.keep) / g.units for g in capped.groups.values()) >= 0.6
    assert capped.sparsity.block >= 0.3


def test_in_the_uniform_shape_curves_trade_heads_for_channels() -> None:
    groups = find_groups_once()
    for sturdy, heads in (("attention", 4), ("ffn", 6)):
        curves = {group.name: power_law(0.0 if group.kind == sturdy else 1.0, 1.0) for group in groups}
        pruning = Pruning(sparsity=0.25, allocation="curves")
        plan = choose(groups, Plan.whole(groups), scores_of(groups), pruning, prior=Prior(frozenset(), curves))
        assert {len(g.keep) for name, g in plan.groups.items() if name.endswith("attention")} == {heads}


def test_in_the_uniform_shape_the_curves_of_all_layers_at_once_decide() -> None:
    """Each layer alone could do without heads, all of them cannot; and the other way round."""
    groups = find_groups_once()
    kinds = {group.kind: power_law(0.0 if group.kind == "attention" else 1.0, 1.0) for group in groups}
    alone = {group.name: kinds[group.kind] for group in groups}
    pruning = Pruning(sparsity=0.25, allocation="curves")
    for together, heads in ((kinds, 4), (dict(zip(kinds, reversed(kinds.values()), strict=True)), 6), ({}, 4)):
        prior = Prior(frozenset(), alone, together)
        plan = choose(groups, Plan.whole(groups), scores_of(groups), pruning, prior=prior)
        assert {len(g.keep) for name, g in plan.groups.items() if name.endswith("attention")} == {heads}


def test_what_counts_cost_by_the_curves_by_hand() -> None:
    groups = find_groups_once()
    alone = {group.name: power_law(1.0, 2.0) for group in groups}
    counts = {group.name: group.units // 2 if group.layer or group.kind == "ffn" else 0 for group in groups}
    layers = len(groups.layers)
    assert measured_damage(groups.groups, counts, Prior(frozenset(), alone)) == pytest.approx((2 * layers - 1) / 4)
    prior = Prior(frozenset(), alone, {"ffn": power_law(10.0, 1.0)})
    assert measured_damage(groups.groups, counts, prior) == pytest.approx(5 + (layers - 1) / 4)


@pytest.mark.parametrize("allocation", ["local", "global", "curves"])
def test_protected_groups_lose_nothing(allocation: str) -> None:
    groups = find_groups_once()
    prior = Prior(frozenset(["layers.0.ffn"]), {group.name: power_law(1.0, 2.0) for group in groups})
    pruning = Pruning(sparsity=0.3, shape="free", allocation=allocation)
    plan = choose(groups, Plan.whole(groups), scores_of(groups), pruning, prior=prior)
    assert len(plan.groups["layers.0.ffn"].keep) == 40
    assert plan.sparsity.block >= 0.3


# --- the verb, and the run -----------------------------------------------------------------------


class Listening(Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.said: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def say(self, message: str) -> None:
        self.said.append(message)


SMALL = {"training.batch_size": 4, "data.sequence_length": 32, "analysis.calibration_batches": 1}


def test_a_second_analysis_finds_the_first(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def again(**changed: object) -> tuple[Sensitivity, Listening]:
        progress = Listening()
        found = regrow.analyze(
            str(checkpoint), str(text), tmp_path, **{"windows": 4, "overrides": SMALL, **changed}, progress=progress
        )
        return found, progress

    first, progress = again()
    assert "sensitivity" in progress.stages
    assert Sensitivity.parse((tmp_path / "sensitivity.json").read_text()) == first
    assert first.conditions.windows == 4
    assert "</svg>" in (tmp_path / "sensitivity.svg").read_text()
    (tmp_path / "sensitivity.svg").unlink()
    second, progress = again()
    assert second == first
    assert "</svg>" in (tmp_path / "sensitivity.svg").read_text()
    assert "sensitivity" not in progress.stages
    assert "not measured again" in progress.said[0]
    third, progress = again(shares=(0.5,))
    assert "sensitivity" in progress.stages
    assert all(len(group.deltas) == 1 for group in third.groups.values())
    (tmp_path / "sensitivity.json").write_text("{")
    assert again(shares=(0.5,))[0] == third


def test_what_the_scores_depend_on_is_part_of_the_conditions(checkpoint: Path, tmp_path: Path) -> None:
    def conditions(**settings: object) -> Conditions:
        recipe = Recipe().override({key.replace("__", "."): value for key, value in settings.items()})
        return conditions_of(checkpoint, torch.float32, recipe, held_out(), held_out(1))

    file = tmp_path / "mine.py"
    file.write_text("def score(evidence): ...")
    mine = {"analysis__criterion": f"{file}:score"}
    before = conditions(**mine)
    assert conditions(**mine) == before
    file.write_text("def score(evidence): return evidence")
    assert conditions(**mine) != before
    several = {
        "pruning__labels": "model", "pruning__ema": None, "pruning__perturbations": 2, "pruning__kinds": ["ffn"],
        "training__precision": "bfloat16", "training__accumulate": 2, "training__clip": 2.0, "lora__rank": 3,
    }  # fmt: skip
    for key, value in several.items():
        assert conditions(**{key: value}) != conditions(), key
    assert conditions(training__steps=7, evaluation__speed=False) == conditions()


def perturbed(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint as after a little training: other numbers, nothing else."""
    shutil.copytree(checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    model.save_pretrained(folder)
    return folder


def test_a_fine_tuned_model_is_another_model(checkpoint: Path, tmp_path: Path) -> None:
    other = perturbed(checkpoint, tmp_path / "other")
    assert (other / "model.safetensors").stat().st_size == (checkpoint / "model.safetensors").stat().st_size
    assert checkpoint_sha256(other) != checkpoint_sha256(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert checkpoint_sha256(tmp_path / "copy") == checkpoint_sha256(checkpoint)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_read_of_a_checkpoint(
    whole: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 16)
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    shutil.copytree(checkpoint, tmp_path / "copy")
    file, before = tmp_path / "copy" / "model.safetensors", checkpoint_sha256(checkpoint)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert (checkpoint_sha256(tmp_path / "copy") != before) == whole, "the last byte is no sample"
    file.write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert checkpoint_sha256(tmp_path / "copy") == before
    (tmp_path / "copy" / "generation_config.json").write_text('{"temperature": 0.5}')
    assert checkpoint_sha256(tmp_path / "copy") != before
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        checkpoint_sha256(tmp_path / "copy")


@pytest.mark.usefixtures("lean")
def test_a_run_analyses_plans_and_uses_it_again(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    wanted = QUICK | {"analysis.enabled": True, "analysis.windows": 3, "pruning.allocation": "curves"}
    wanted |= {"pruning.shape": "free", "training.steps": 1, "analysis.protect": 0.34}
    first = regrow.prune(str(checkpoint), tmp_path / "a", data=str(text), sparsity=0.3, overrides=wanted)
    file = tmp_path / "a" / "sensitivity.json"
    found = Sensitivity.parse(file.read_text())
    for name in found.protected(0.34):
        assert len(first.plan.groups[name].keep) == first.plan.groups[name].units
    assert first.results["sparsity"]["block"] >= 0.3
    progress = Listening()
    second = regrow.prune(
        str(checkpoint), tmp_path / "b", data=str(text), sparsity=0.3,
        overrides=wanted | {"analysis.from_file": str(file)}, progress=progress,
    )  # fmt: skip
    assert second.plan == first.plan
    assert "sensitivity" not in progress.stages
    assert (tmp_path / "b" / "sensitivity.json").read_text() == file.read_text()
    other = perturbed(checkpoint, tmp_path / "other")
    with pytest.raises(InputError, match="another model"):
        regrow.prune(str(other), tmp_path / "c", data=str(text), overrides=wanted | {"analysis.from_file": str(file)})
    assert not (tmp_path / "c").exists()


def test_analyze_shows_a_table(command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    words = ["analyze", checkpoint, "--data", text, "--shares", "0.3,0.6", "--windows", "4", "--out", tmp_path / "out"]
    done = command(*words, *settings)
    assert done.code == 0, done.stderr
    for word in ("−30%", "−60%", "by the share", "ffn", "attention", "held-out loss of the whole model"):
        assert word in done.stdout
    again = command(*words, *settings, "--json")
    assert "not measured again" in again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "sensitivity.json").read_text())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("analyze LLAMA --data TEXT --shares 0.5,x", "--shares 'x'"),
        ("analyze LLAMA --data TEXT --shares 1.5", "analysis.shares.0 = 1.5"),
        ("analyze LLAMA --data TEXT --out note.txt", "note.txt is a file"),
        ("prune LLAMA --data TEXT --out out --set pruning.allocation=curves", "set analysis.enabled=true"),
        (
            "prune LLAMA --data TEXT --out out --set analysis.enabled=true --set analysis.from_file=no.json "
            "--set data.sequence_length=32 --set evaluation.windows=[32]",
            "no.json: cannot be read",
        ),
        (
            "prune LLAMA --data TEXT --out out --set analysis.enabled=true --set analysis.from_file=older.json "
            "--set data.sequence_length=32 --set evaluation.windows=[32]",
            "older.json: not a valid sensitivity file: format",
        ),
    ],
)
def test_bad_input(
    words: str, complaint: str, command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("")
    (tmp_path / "older.json").write_text('{"format": "regrow-sensitivity-2"}')
    done = command(*[{"LLAMA": checkpoint, "TEXT": text}.get(word, word) for word in words.split()], cwd=tmp_path)
    assert done.code == 2
    assert complaint in done.stderr
    assert len(done.complaint.splitlines()) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"note.txt", "older.json"}


def test_the_heat_map_can_be_read() -> None:
    found = sensitivity_of({f"layers.{n}.{kind}": (n / 3, -0.1) for n in range(9) for kind in ("attention", "ffn")})
    figure = draw_sensitivity(found, ["layers.8.ffn"])
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = figure.axes[0].texts
    extents = [text.get_window_extent(renderer) for text in texts]
    assert not [1 for n, one in enumerate(extents) for other in extents[:n] if one.overlaps(other)]
    assert all(figure.bbox.contains(*one.min) and figure.bbox.contains(*one.max) for one in extents)
    words = [text.get_text() for text in texts]
    assert [word for word in words if word.endswith("●")] == [f"{(8 / 3 - 0.1) / 2:.4f} ●"]
    assert words[words.index("all layers") + 1] == "0.5000"
    assert "● protected" in words
    bare = [text.get_text() for text in draw_sensitivity(found, []).axes[0].texts]
    assert not [word for word in bare if "●" in word]


def test_few_units_are_told_as_what_was_removed() -> None:
    """Of four KV heads a tenth and a quarter are one: a single trial, and a quarter."""
    conditions = CONDITIONS.model_copy(update={"shares": (0.1, 0.25, 0.5)})
    few = GroupSensitivity(units=4, cost=1, removed=(1, 1, 2), deltas=(0.1, 0.1, 0.4))
    many = GroupSensitivity(units=40, cost=1, removed=(4, 10, 20), deltas=(0.1, 0.1, 0.4))
    groups, together = {"layers.0.attention": few, "layers.0.ffn": many}, {"attention": few, "ffn": many}
    found = Sensitivity(conditions=conditions, dense_nll=1.0, groups=groups, together=together)
    assert few.mean == pytest.approx(0.25)
    assert many.mean == pytest.approx(0.2)
    assert rounded_lines(found) == ["attention: 25%, 50%, as it has few units"]
    assert rounded_lines(found)[0] in [text.get_text() for text in draw_sensitivity(found, []).axes[0].texts]
    screen = StringIO()
    show_sensitivity(found, [], Console(file=screen, width=160))
    assert screen.getvalue().count("+0.100 (−25%)") == 2  # alone, and in all layers
    assert "protected" not in screen.getvalue()
    heat = heat_of(found, 0.0)
    assert [cell["text"] for cell in heat["rows"][-1]["cells"]] == ["0.2500", "0.2000"]
    assert "removed (attention: 25%, 50%" in heat["told"]

"""Schedules and plans: targets are reached to one step, and nothing comes back."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import build, plan_of, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, LlamaConfig

from regrow.errors import InputError
from regrow.planning.allocation import choose
from regrow.planning.demand import demands, kernel_multiple, most_removed, protected_layers, settle_counts
from regrow.planning.plan import Plan
from regrow.planning.schedule import cubic_sparsity, cut_events
from regrow.settings import Pruning
from regrow.structure.finding import find_groups
from regrow.structure.groups import Groups

GROUPS: dict[str, Groups] = {}


def groups_of(family: str) -> Groups:
    if family not in GROUPS:
        GROUPS[family] = find_groups(build(family))
    return GROUPS[family]


def scores_of(groups: Groups, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=generator) for group in groups}


def demanded(groups: Groups, pruning: Pruning) -> float:
    return pruning.sparsity * (groups.block_parameters if pruning.basis == "block" else groups.total_parameters)


@settings(max_examples=150)
@given(
    family=st.sampled_from(["llama-gqa", "llama-mha-tied", "llama-mqa", "llama-biases", "qwen3"]),
    sparsity=st.floats(0.02, 0.6),
    shape=st.sampled_from(["uniform", "free"]),
    allocation=st.sampled_from(["local", "global", "by-kind"]),
    basis=st.sampled_from(["block", "total"]),
    multiple=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 100),
)
def test_the_target_is_reached_to_one_step(family, sparsity, shape, allocation, basis, multiple, seed) -> None:
    groups = groups_of(family)
    pruning = Pruning(
        sparsity=sparsity, shape=shape, allocation=allocation, basis=basis, multiple=multiple, criterion="random"
    )
    try:
        plan = choose(groups, Plan.whole(groups), scores_of(groups, seed), pruning)
    except InputError as error:
        assert "use at most" in str(error) or "lower pruning.multiple" in str(error)  # noqa: PT017
        return
    surplus = plan.removed_parameters - demanded(groups, pruning)
    channel = groups.by_name("layers.0.ffn").cost
    step = channel * multiple * (len(groups.layers) if shape == "uniform" else 1)
    # With whole multiples, widths start from 40 channels: the first step down to a multiple may be shorter.
    assert -1e-6 <= surplus < step
    widths = {name: len(group.keep) for name, group in plan.groups.items()}
    assert all(width % multiple == 0 or width == 40 for name, width in widths.items() if name.endswith("ffn"))
    if shape == "uniform":
        assert len({widths[f"layers.{n}.ffn"] for n in range(2)}) == 1
        assert len({widths[f"layers.{n}.attention"] for n in range(2)}) == 1


@pytest.mark.parametrize("shape", ["uniform", "free"])
@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.66])
def test_by_count_every_kind_loses_its_share(shape: str, sparsity: float) -> None:
    groups = groups_of("llama-mha-tied")
    pruning = Pruning(sparsity=sparsity, shape=shape, basis="units")
    plan = choose(groups, Plan.whole(groups), scores_of(groups, 0), pruning)
    for kind, units in (("attention", 12), ("ffn", 80)):
        lost = sum(g.units - len(g.keep) for name, g in plan.groups.items() if name.endswith(kind))
        slack = 2 if shape == "uniform" else 1
        assert 0 <= lost - math.ceil(sparsity * units - 1e-6) < slack


def test_the_lowest_scores_go() -> None:
    groups = groups_of("llama-gqa")
    scores = scores_of(groups, 3)
    plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.4, shape="free"))
    for name, group in plan.groups.items():
        gone = sorted(set(range(group.units)) - set(group.keep))
        if gone:
            assert scores[name][gone].max() <= scores[name][list(group.keep)].min()


def test_global_takes_the_cheapest_damage_wherever_it_is() -> None:
    groups = groups_of("llama-gqa")
    scores = {group.name: torch.full((group.units,), 1000.0) for group in groups}
    scores["layers.1.ffn"] = torch.zeros(40)
    plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.1, shape="free", allocation="global"))
    assert {name for name, group in plan.groups.items() if len(group.keep) < group.units} == {"layers.1.ffn"}
    capped = Pruning(sparsity=0.1, shape="free", allocation="global", cap=0.25)
    plan = choose(groups, Plan.whole(groups), scores, capped)
    assert len(plan.groups["layers.1.ffn"].keep) == 30


@pytest.mark.parametrize(
    ("name", "share", "most"), [("cap", 0.57, 57), ("cap", 0.29, 29), ("floor", 0.07, 93), ("floor", 0.55, 45)]
)
def test_limits_are_not_a_unit_off_by_what_floats_round(name: str, share: float, most: int) -> None:
    groups = groups_of("llama-gqa")
    ffn = replace(groups.by_name("layers.0.ffn"), units=100)
    pruning = Pruning(shape="free", **{name: share})
    (only,) = demands(replace(groups, groups=(ffn,)), {ffn.name: 0}, pruning, frozenset())
    assert only.limit == {ffn.name: most}


def test_of_two_that_multiples_bring_the_one_whose_next_is_worth_more_gets_them_back() -> None:
    """One channel of each of two layers goes; whole pairs: both of the layer whose second is worth less."""
    groups = groups_of("llama-gqa")
    scores = {group.name: torch.full((group.units,), 100.0) for group in groups}
    scores["layers.0.ffn"][:3] = torch.tensor([2.0, 4.0, 5.0])
    scores["layers.1.ffn"][:2] = torch.tensor([1.0, 3.0])
    two = 2 * groups.by_name("layers.0.ffn").cost / groups.block_parameters
    pruning = Pruning(sparsity=two - 1e-9, shape="free", allocation="global", multiple=2, kinds=("ffn",))
    plan = choose(groups, Plan.whole(groups), scores, pruning)
    assert {name: group.removed for name, group in plan.groups.items() if group.removed} == {"layers.1.ffn": 2}


def test_of_equal_worth_the_one_that_has_lost_the_smaller_share_goes() -> None:
    groups = groups_of("llama-mha-tied")
    scores = {group.name: torch.full((group.units,), float(group.cost)) for group in groups}
    plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.4, shape="free", allocation="global"))
    shares = [1 - len(group.keep) / group.units for group in plan.groups.values()]
    assert max(shares) - min(shares) < 1 / 6 + 1 / 40


@pytest.mark.parametrize("seed", range(3))
def test_by_kind_takes_as_many_of_a_kind_as_local_but_the_worst_of_all_layers(seed: int) -> None:
    groups = groups_of("llama-mha-tied")
    scores = scores_of(groups, seed)
    taken = {}
    for way in ("local", "by-kind"):
        plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.35, shape="free", allocation=way))
        for kind in ("attention", "ffn"):
            gone = torch.cat([scores[g.name][sorted(set(range(g.units)) - set(plan.groups[g.name].keep))]
                              for g in groups if g.kind == kind])  # fmt: skip
            taken[way, kind] = sorted(gone.tolist())
    for kind in ("attention", "ffn"):
        found, every = (
            taken["by-kind", kind],
            sorted(s for g in groups if g.kind == kind for s in scores[g.name].tolist()),
        )
        assert len(found) == len(taken["local", kind]) > 1
        assert found == every[: len(found)]


def test_global_in_the_uniform_shape_trades_heads_for_channels() -> None:
    groups = groups_of("llama-mha-tied")
    # A quarter of a layer's 14,976 parameters is 2 heads of 1,536 and 5 channels of 144, or 26 channels.
    for worthless, heads in (("attention", 4), ("ffn", 6)):
        scores = {g.name: torch.full((g.units,), 0.0 if g.kind == worthless else 1.0) for g in groups}
        plan = choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.25, allocation="global"))
        kept = {len(group.keep) for name, group in plan.groups.items() if name.endswith("attention")}
        assert kept == {heads}


def test_floor_keeps_its_share() -> None:
    groups = groups_of("llama-gqa")
    scores = {group.name: torch.zeros(group.units) for group in groups}
    scores["layers.0.ffn"] += 1
    pruning = Pruning(sparsity=0.3, shape="free", allocation="global", floor=0.5)
    plan = choose(groups, Plan.whole(groups), scores, pruning)
    assert all(len(group.keep) >= group.units / 2 for group in plan.groups.values())


def test_protected_layers_are_left_alone_in_the_free_shape_only() -> None:
    groups = groups_of("llama-gqa")
    pruning = Pruning(sparsity=0.2, shape="free", protect_last=1)
    assert protected_layers(groups, pruning) == {1}
    plan = choose(groups, Plan.whole(groups), scores_of(groups, 0), pruning)
    assert all(len(g.keep) == g.units for name, g in plan.groups.items() if name.startswith("layers.1."))
    assert plan.sparsity.block >= 0.2
    assert protected_layers(groups, Pruning(sparsity=0.2, shape="free", protect_first=0.5)) == {0}
    assert protected_layers(groups, Pruning(sparsity=0.2, shape="free", protect_first=0.4)) == set()
    assert protected_layers(groups, Pruning(sparsity=0.2, shape="uniform", protect_last=1)) == set()


@pytest.mark.parametrize("start", ["nothing", "all"])
@pytest.mark.parametrize("share", [0.1, 0.47, 0.5])
def test_counts_settle_within_their_limits(start: str, share: float) -> None:
    """Whether units have to be added or given back, also where nearly everything that may go has to."""
    groups = groups_of("llama-gqa")
    pruning = Pruning(shape="free", cap=0.5)
    (asked,) = demands(groups, {group.name: 0 for group in groups}, pruning, frozenset())
    asked = replace(asked, amount=int(2 * share * asked.within()))
    counts = {group.name: 0 if start == "nothing" else asked.limit[group.name] for group in groups}
    order = sorted(asked.limit, key=lambda name: asked.price[name])
    found = settle_counts(asked, counts, order)
    assert asked.limit == {"layers.0.attention": 1, "layers.0.ffn": 20, "layers.1.attention": 1, "layers.1.ffn": 20}
    assert all(0 <= found[name] <= most for name, most in asked.limit.items())
    assert 0 <= asked.surplus(found) < min(asked.price[name] for name, count in found.items() if count)


def test_the_most_that_may_go_by_hand() -> None:
    """Of 3 heads and 40 channels in a layer; nothing of what the recipe protects or does not name."""
    groups = groups_of("llama-gqa")
    half = most_removed(groups, Pruning(shape="free", protect_last=1, cap=0.5, multiple=8))
    assert half == {"layers.0.attention": 1, "layers.0.ffn": 16, "layers.1.attention": 0, "layers.1.ffn": 0}
    floor = most_removed(groups, Pruning(kinds=("ffn",), floor=0.3))
    assert floor == {"layers.0.attention": 0, "layers.0.ffn": 28, "layers.1.attention": 0, "layers.1.ffn": 28}


def test_out_of_reach_says_what_is_within() -> None:
    groups = groups_of("llama-gqa")
    with pytest.raises(InputError, match=r"use at most 0\.(\d\d)") as caught:
        choose(groups, Plan.whole(groups), scores_of(groups, 0), Pruning(sparsity=0.99))
    within = float(str(caught.value).rpartition(" ")[2])
    assert choose(groups, Plan.whole(groups), scores_of(groups, 0), Pruning(sparsity=within)).sparsity.block >= within
    with pytest.raises(InputError):
        choose(groups, Plan.whole(groups), scores_of(groups, 0), Pruning(sparsity=within + 0.02))


@settings(max_examples=40)
@given(
    shape=st.sampled_from(["uniform", "free"]),
    allocation=st.sampled_from(["local", "global", "by-kind"]),
    sparsity=st.floats(0.1, 0.7),
    seed=st.integers(0, 1000),
)
def test_on_the_way_nothing_comes_back_and_the_end_is_exact(shape, allocation, sparsity, seed) -> None:
    groups = groups_of("llama-mha-tied")
    pruning = Pruning(sparsity=sparsity, shape=shape, allocation=allocation, schedule="cubic", criterion="random")
    plan, before = Plan.whole(groups), 0
    for number, fraction in enumerate(cut_events(pruning, 100).values()):
        following = choose(groups, plan, scores_of(groups, seed + number), pruning, fraction)
        for name, group in following.groups.items():
            assert set(group.keep) <= set(plan.groups[name].keep)
        assert following.removed_parameters >= before
        plan, before = following, following.removed_parameters
    step = groups.by_name("layers.0.ffn").cost * (2 if shape == "uniform" else 1)
    surplus = plan.removed_parameters - demanded(groups, pruning)
    # Scores change at random between the events; heads that an early event took are not given back.
    head = groups.by_name("layers.0.attention").cost * (2 if shape == "uniform" else 1)
    assert -1e-6 <= surplus < (step if allocation == "local" else max(step, head))


# --- schedules --------------------------------------------------------------------------------


def test_cubic_by_hand() -> None:
    values = [cubic_sparsity(t, 100, 0.1, 0.1, 0.5) for t in (0, 10, 50, 90, 100)]
    assert values == pytest.approx([0, 0, 0.5 * (1 - 0.5**3), 0.5, 0.5])
    assert cubic_sparsity(30, 100, 0.1, 0.1, 0.5, start=0.2) == pytest.approx(0.5 - 0.3 * 0.75**3)


@pytest.mark.parametrize("steps", [1, 3, 17, 100, 4000])
@pytest.mark.parametrize("interval", [1, 10, 5000])
def test_events_rise_to_exactly_the_target(steps: int, interval: int) -> None:
    events = cut_events(Pruning(schedule="cubic", interval=interval), steps)
    fractions = list(events.values())
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(0 < fraction < 1 for fraction in fractions[:-1])
    assert all(0.1 * steps < step for step in list(events)[:-1])
    assert max(events) <= 0.9 * steps


def test_one_shot_is_one_event() -> None:
    assert cut_events(Pruning(schedule="one-shot"), 400) == {0: 1.0}
    assert cut_events(Pruning(schedule="cubic"), 0) == {0: 1.0}


# --- the plan as a document -------------------------------------------------------------------


def test_a_plan_survives_json() -> None:
    groups = groups_of("llama-gqa")
    plan = plan_of(groups, random_keep(groups, 1))
    assert Plan.parse(json.dumps(plan.to_json())) == plan
    document = plan.to_json()
    del document["residual"]
    before = Plan.parse(json.dumps(document))
    assert (before.residual, before.groups) == (None, plan.groups)
    assert (before.parts, before.narrows) == (before.groups, False)
    whole = Plan.whole(groups)
    assert whole.parts == {**whole.groups, "residual": whole.residual}


@pytest.mark.parametrize(
    "change",
    [
        {"keep": [3, 1]},
        {"keep": [1, 1]},
        {"keep": [40]},
        {"keep": [-1]},
        {"keep": []},
        {"keep": "all"},
        {"colour": "red"},
    ],
)
def test_a_broken_plan_is_refused_by_name(change: dict[str, object]) -> None:
    document = Plan.whole(groups_of("llama-gqa")).to_json()
    document["groups"]["layers.0.ffn"] = {**document["groups"]["layers.0.ffn"], **change}
    with pytest.raises(InputError, match=r"layers\.0\.ffn"):
        Plan.parse(json.dumps(document))


def test_a_plan_stays_as_it_was_made() -> None:
    plan = Plan.whole(groups_of("llama-gqa"))
    for part, name in ((plan, "total_parameters"), (plan.groups["layers.0.ffn"], "units")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)


def test_a_plan_without_hidden_channels_is_refused() -> None:
    document = Plan.whole(groups_of("llama-gqa")).to_json()
    document["residual"]["keep"] = []
    with pytest.raises(InputError, match="residual: keep must name at least one hidden channel"):
        Plan.parse(json.dumps(document))


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_nonsense_is_no_plan(text: str) -> None:
    with pytest.raises(InputError, match="not a valid plan"):
        Plan.parse(text)


def test_ratios_by_hand() -> None:
    groups = groups_of("llama-gqa")
    keep = random_keep(groups, 4)
    plan = plan_of(groups, keep)
    removed = sum(g.cost * (g.units - len(keep[g.name])) for g in groups)
    assert plan.sparsity.block == removed / groups.block_parameters
    assert plan.sparsity.total == removed / groups.total_parameters
    assert plan.sparsity.units == 1 - sum(map(len, keep.values())) / sum(g.units for g in groups)


@pytest.mark.parametrize(
    ("width", "multiple"), [(512, 1), (1023, 1), (1024, 8), (2047, 8), (2048, 16), (5504, 32), (8192, 64), (28672, 64)]
)
def test_what_wide_matrices_are_cut_to(width: int, multiple: int) -> None:
    assert kernel_multiple(width) == multiple


@pytest.mark.parametrize("shape", ["uniform", "free"])
def test_wide_ffns_keep_widths_that_kernels_like_unless_told_otherwise(shape: str) -> None:
    config = LlamaConfig(
        hidden_size=48, intermediate_size=1100, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=64,
    )  # fmt: skip
    groups = find_groups(AutoModelForCausalLM.from_config(config))
    scores = scores_of(groups, 0)
    plan, fine = (
        choose(groups, Plan.whole(groups), scores, Pruning(sparsity=0.3, shape=shape, multiple=multiple))
        for multiple in (None, 1)
    )
    assert all(len(group.keep) % 8 == 0 for name, group in plan.groups.items() if name.endswith("ffn"))
    assert any(len(group.keep) % 8 for name, group in fine.groups.items() if name.endswith("ffn"))
    assert 0.3 <= fine.sparsity.block <= plan.sparsity.block < 0.3 + 8 / 1100

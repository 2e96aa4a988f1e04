"""The peers' formulas, allocations and biases: by hand, against float64 references, masked ≡ cut, saved ≡ reloaded."""

import copy
import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import QUICK, build, logits, two_by_two, uniform_keep, with_lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import regrow
from regrow.checkpoint.biases import check_biases
from regrow.checkpoint.shape import describe
from regrow.compensation.moments import ChannelMoments
from regrow.criteria.activation import flap, mini_llm, wanda, wanda_norm
from regrow.criteria.evidence import Evidence, Linear
from regrow.criteria.registry import CRITERIA, find_criterion
from regrow.criteria.taylor import taylor_mix, taylor_second
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.planning.allocation import final_counts
from regrow.planning.plan import Plan
from regrow.preflight import check_settings
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.compensate import Compensator
from regrow.recovery.losses import language_loss
from regrow.recovery.probe import Probes
from regrow.recovery.scoring import Scorer
from regrow.settings import Compensation, Pruning
from regrow.structure.adapters import merge_lora
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups
from regrow.structure.gates import Gates
from regrow.structure.groups import Groups
from regrow.structure.prefix import watching_inputs

IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(5))
NEW = ("taylor-second", "taylor-mix", "wanda", "wanda-norm", "flap", "mini-llm")


# --- by hand ------------------------------------------------------------------------------------


def measured(axis: int) -> Linear:
    """W + sBA = [[5, 4], [-1, 2]]; inputs (1, 2) and (3, 0): mean squares 5 and 2, variances 1 and 1."""
    inputs = ChannelMoments.zeros(2)
    inputs.add(torch.tensor([[1.0, 2.0]]))
    inputs.add(torch.tensor([[3.0, 0.0]]))
    return replace(
        two_by_two(axis),
        inputs=inputs,
        squared_grad=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        estimated_grad=torch.tensor([[1.0, -2.0], [0.0, 3.0]]),
    )


def evidence(*linears: Linear, kind: str = "ffn") -> Evidence:
    return Evidence("g", kind, 2, linears)


# W'²h = [[25, 32], [3, 16]]; W'∘G − ½ of it = [[5, -4], [-2, 1]] − [[12.5, 16], [1.5, 8]]
@pytest.mark.parametrize(("axis", "second", "mix"), [(0, [57.0, 19.0], [27.5, 10.5]), (1, [28.0, 48.0], [11.0, 27.0])])
def test_second_order_taylor_by_hand(axis: int, second: list[float], mix: list[float]) -> None:
    assert taylor_second(evidence(measured(axis))).tolist() == second
    assert taylor_mix(evidence(measured(axis))).tolist() == mix


def test_activation_scores_by_hand() -> None:
    rows, columns = measured(0), measured(1)
    five, two = math.sqrt(5), math.sqrt(2)
    torch.testing.assert_close(wanda(evidence(rows, columns)).float(), torch.tensor([3 * five, 3 * two]))
    # squares of |W'|·‖X‖ are [[125, 32], [5, 8]]: rows 157 and 13, columns 130 and 40
    torch.testing.assert_close(wanda_norm(evidence(rows, columns)), torch.tensor([287.0, 53.0]).sqrt())
    expected = torch.tensor([5 * five + 8 * two, 6 * two]) + torch.tensor([5 * five, 14 * two])
    torch.testing.assert_close(mini_llm(evidence(rows, columns)), expected)
    # Var·‖W'_:j‖² is (26, 20): as many standard deviations (√18) off the mean whatever is done to two numbers
    for kind in ("ffn", "attention"):
        torch.testing.assert_close(flap(evidence(columns, kind=kind)).float(), torch.tensor([1.0, -1.0]) / math.sqrt(2))


@pytest.mark.parametrize("name", NEW)
def test_the_order_of_elements_within_a_unit_does_not_matter(name: str) -> None:
    chance = torch.Generator().manual_seed(0)
    inputs = ChannelMoments.zeros(6)
    inputs.add(torch.randn(9, 6, generator=chance))
    tensors = {key: torch.randn(6, 6, generator=chance) for key in ("weight", "weight_grad", "estimated_grad")}
    squares = torch.rand(6, 6, generator=chance)
    positions = torch.tensor([[0, 3, 5], [1, 4, 2]])
    linears = [Linear("m", axis=a, positions=positions, inputs=inputs, squared_grad=squares, **tensors) for a in (0, 1)]
    mixed = [replace(linear, positions=positions[:, [2, 0, 1]]) for linear in linears]
    score = CRITERIA[name].score
    expected = score(Evidence("g", "attention", 2, linears))
    torch.testing.assert_close(score(Evidence("g", "attention", 2, mixed)), expected)


@pytest.mark.parametrize("name", ["magnitude", "taylor", *NEW])
def test_a_score_leaves_a_weight_without_adapter_as_it_was(name: str) -> None:
    linears = [replace(measured(axis), lora_a=None, lora_b=None) for axis in (0, 1)]
    CRITERIA[name].score(evidence(*linears))
    assert all(linear.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]] for linear in linears)


# --- a whole model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> tuple[torch.nn.Module, Groups]:
    """A model that nothing may write to; copy it."""
    model = build("llama-gqa")
    return model, find_groups(model)


@pytest.fixture(scope="module")
def adapted() -> tuple[torch.nn.Module, Groups]:
    """The same with live LoRA."""
    model = build("llama-gqa")
    return model, with_lora(model)


def scores_of(subject: tuple[torch.nn.Module, Groups], name: str, splits: list[int]) -> dict[str, Tensor]:
    """Scores from batches of these sizes; the mean of one score for each, or one of all moments added up."""
    model, groups = subject
    gates, plan = Gates(model, groups.groups), Plan.whole(groups)
    scorer = Scorer(model, plan, gates, find_criterion(name), None, seed=0, perturbations=2)
    scorer.watch(groups)
    model.train()
    at_once = "channels" in scorer.criterion.needs
    with gates:
        for part in IDS.split(splits):
            scorer.look(Batch(part))
            with scorer.recording(part[:, 1:].numel()):
                language_loss(model(input_ids=part, use_cache=False).logits, part).backward()
            if not at_once:
                scorer.update(groups, plan, plan)
            model.zero_grad()
        if at_once:
            scorer.update(groups, plan, plan)
    scorer.close()
    return scorer.average.scores


def effective(model: torch.nn.Module, linear: str) -> np.ndarray:
    weight, a, b = (
        model.get_parameter(f"{linear}.{name}.weight").detach().double().numpy()
        for name in ("base_layer", "lora_A.default", "lora_B.default")
    )
    return weight + 2 * b @ a


def inputs_of(model: torch.nn.Module, linears: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every token's input of every linear, `[tokens, channels]`."""
    seen: dict[str, np.ndarray] = {}

    def see(name: str, x: Tensor) -> None:
        seen[name] = x.double().flatten(0, 1).numpy()

    model.eval()
    with ExitStack() as stack, torch.no_grad():
        for name in linears:
            stack.enter_context(watching_inputs(model.get_submodule(name), partial(see, name)))
        model(input_ids=IDS, use_cache=False)
    return seen


@pytest.mark.parametrize("name", ["wanda", "wanda-norm", "flap"])
def test_activation_scores_are_the_float64_reference(adapted, name: str) -> None:
    scores, (model, groups) = scores_of(adapted, name, [4]), adapted
    inputs = inputs_of(model, groups.linears)
    for group in groups:
        total = np.zeros(group.units)
        for piece in (s for s in group.slices if not s.is_adapter and s.module in inputs):
            weight, x = effective(model, piece.module), inputs[piece.module]
            norms = np.sqrt((x**2).mean(0))
            if name == "wanda-norm":
                entries = (np.abs(weight) * norms) ** 2
                total += entries.sum(1 - (1 if piece.is_input else 0))[piece.index].sum(1)
            elif name == "wanda" and piece.is_input:
                total += (np.abs(weight).mean(0) * norms)[piece.index].sum(1)
            elif name == "flap" and piece.is_input:
                fluctuation = x.var(0) * (weight**2).sum(0)
                fluctuation = fluctuation**2 if group.kind == "attention" else fluctuation
                total += ((fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1))[piece.index].mean(1)
        expected = np.sqrt(total) if name == "wanda-norm" else total
        np.testing.assert_allclose(scores[group.name].numpy(), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["taylor-second", "wanda", "wanda-norm", "flap"])
def test_how_the_text_is_split_into_batches_does_not_matter(adapted, name: str) -> None:
    whole, parts = scores_of(adapted, name, [4]), scores_of(adapted, name, [2, 2])
    for group, score in whole.items():
        torch.testing.assert_close(parts[group], score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-gqa", "OPT"])  # OPT flattens sequences and tokens
def test_squared_gradients_are_those_of_one_backward_pass_per_sequence(family: str) -> None:
    model = zoo.build(family) if family == "OPT" else build(family)
    if family == "OPT":
        for layer in model.model.decoder.layers:
            layer.dropout = 0.0
    groups = with_lora(model)
    scores = scores_of((model, groups), "taylor-second", [4])
    weights = {name: model.get_parameter(f"{name}.base_layer.weight") for name in groups.linears}
    squares = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for ids in IDS.split(1):
        model.zero_grad()
        language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
        for name, weight in weights.items():
            squares[name] += weight.grad.double().numpy() ** 2 / len(IDS)
    for weight in weights.values():
        weight.requires_grad_(False)
    model.zero_grad()
    for group in groups:
        expected = np.zeros(group.units)
        for piece in (s for s in group.slices if not s.is_adapter and s.parameter.endswith(".weight")):
            entries = effective(model, piece.module) ** 2 * squares[piece.module]
            expected += entries.sum(0 if piece.is_input else 1)[piece.index].sum(1)
        np.testing.assert_allclose(scores[group.name].numpy(), expected, rtol=1e-3, atol=1e-12)


def test_probes_measure_the_slope_along_what_they_would_add(plain) -> None:
    model, groups = copy.deepcopy(plain[0]).double(), plain[1]
    probes = Probes(model, seed=3, perturbations=2)
    probes.linears = {name: model.get_submodule(name) for name in groups.linears}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probes.take(Batch(IDS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    language_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
    (seed, first), (other, second) = probes._slopes.items()
    gradients = {name: model.get_parameter(f"{name}.weight").grad for name in groups.linears}
    for slope, direction in ((first, seed), (second, other)):
        z = {name: probes.direction(name, direction, model.device) for name in groups.linears}
        exact = sum(float((gradients[name] * z[name]).sum()) for name in groups.linears)
        assert slope == pytest.approx(exact, rel=1e-2, abs=1e-3)
    name = groups.linears[0]
    assert not torch.equal(*(probes.direction(name, each, model.device) for each in (seed, other)))
    terms = (slope * probes.direction(name, s, model.device) for s, slope in ((seed, first), (other, second)))
    torch.testing.assert_close(probes.gradient(name), sum(terms) / 2)
    with probes.perturbed(seed, 0.1):
        perturbed = logits(model)
    with torch.no_grad():
        for linear in groups.linears:
            model.get_parameter(f"{linear}.weight").add_(0.1 * probes.direction(linear, seed, model.device))
    torch.testing.assert_close(logits(model), perturbed, rtol=1e-4, atol=1e-4)


# --- allocations --------------------------------------------------------------------------------


def counts_of(groups: Groups, allocation: str, **settings: object) -> tuple[dict[str, int], dict[str, Tensor]]:
    nothing = {group.name: 0 for group in groups}
    chance = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=chance) for group in groups}
    pruning = Pruning(allocation=allocation, shape="free", **settings)
    return final_counts(groups, nothing, scores, pruning), scores


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("allocation", ["pooled", "log-increasing"])
def test_allocations_reach_the_target_to_one_unit(plain, allocation: str, sparsity: float) -> None:
    groups = plain[1]
    counts, _ = counts_of(groups, allocation, sparsity=sparsity)
    removed = sum(group.cost * counts[group.name] for group in groups)
    assert 0 <= removed - sparsity * groups.block_parameters < min(group.cost for group in groups)


def test_pooled_takes_the_lowest_scores_whatever_they_cost(plain) -> None:
    groups = plain[1]
    counts, scores = counts_of(groups, "pooled", sparsity=0.5)
    gone = torch.cat([scores[group.name].sort().values[: counts[group.name]] for group in groups])
    channels = [scores[g.name].sort().values[counts[g.name] :] for g in groups if g.kind == "ffn"]
    assert gone.max() <= torch.cat(channels).min() + 0.1  # heads too dear for the rest of the budget apart
    assert counts != counts_of(groups, "global", sparsity=0.5)[0]


def test_shares_grow_with_the_logarithm_of_the_depth(plain) -> None:
    groups = plain[1]
    counts, _ = counts_of(groups, "log-increasing", sparsity=0.4, first_share=0.5)
    layers = [[group for group in groups if group.layer == number] for number in (0, 1)]
    shares = [sum(g.cost * counts[g.name] for g in each) / sum(g.cost * g.units for g in each) for each in layers]
    assert shares == pytest.approx([0.2, 0.6], abs=0.03)  # half the mean, and what is left for the other of the two
    flat, _ = counts_of(groups, "log-increasing", sparsity=0.4, first_share=0.999)
    assert flat["layers.0.ffn"] == pytest.approx(flat["layers.1.ffn"], abs=1)


# --- selection and biases -----------------------------------------------------------------------


def test_selection_on_the_prefix_sees_what_has_gone_before(plain) -> None:
    model, groups = copy.deepcopy(plain[0]), plain[1]
    keep = uniform_keep(groups, 2, 20)
    wanda_by_name = find_criterion("wanda")
    with Gates(model, groups.groups) as gates:
        settings = Compensation(selection="prefix")
        done = Compensator(model, gates, settings, wanda_by_name).run(groups, keep, list(IDS.split(2)), Silent())
        assert not done.repaired
        dense_would = {}
        for prefix in ("pruned", "dense"):
            group = groups.by_name("layers.1.ffn")
            if prefix == "dense":
                gates.open()
            gates.keep(group.name, range(group.units))
            consumer = group.consumers[0].module
            x = inputs_of(model, (consumer,))[consumer]
            weight = model.get_parameter(f"{consumer}.weight").detach().double().numpy()
            scores = np.abs(weight).mean(0) * np.sqrt((x**2).mean(0))
            dense_would[prefix] = np.sort(np.argsort(scores)[-20:])
    assert np.array_equal(done.keep["layers.1.ffn"], dense_would["pruned"])
    assert not np.array_equal(done.keep["layers.1.ffn"], dense_would["dense"])


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("magnitude", {"compensation.selection": "prefix"}, "criterion of inputs alone"),
        ("wanda-sp", {"search.evaluations": 4}, "goes without a search"),
        ("mini-llm", {"pruning.schedule": "cubic"}, "one-shot only"),
        (
            "regrow",
            {"pruning.decay_steps": 8},
            "decay_steps=8 lets units fade that .*=least-squares has already",
        ),
        (
            "lorashear",
            {"compensation.method": "bias", "analysis.enabled": False, "pruning.allocation": "global"},
            "pruning.schedule=lhspg lets units fade that compensation.method=bias has already made up for",
        ),
    ],
)
def test_settings_that_do_not_go_together(recipe: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_settings(load_recipe(recipe, settings))


def compensated(
    adapted: tuple[torch.nn.Module, Groups], heads: tuple[int, int], channels: tuple[int, int]
) -> tuple[torch.nn.Module, Groups, Groups, Tensor]:
    """A LLaMA without biases of which two layers keep so many units, FLAP's biases in their place, LoRA merged."""
    model, groups = copy.deepcopy(adapted[0]), adapted[1]
    keep = {group.name: np.arange((heads if group.kind == "attention" else channels)[group.layer]) for group in groups}
    with Gates(model, groups.groups) as gates:
        compensator = Compensator(model, gates, Compensation(method="bias"))
        compensator.make_room(groups)
        compensator.run(groups, keep, [IDS], Silent())
        masked = logits(model)
    now = cut(model, groups, keep)
    merge_lora(model)
    return model, groups, now, masked


@pytest.mark.parametrize(
    ("heads", "channels", "saved_as"),
    [((2, 2), (20, 20), "llama"), ((1, 1), (20, 20), "llama"), ((2, 1), (30, 20), "granite")],
)
def test_added_biases_are_cut_and_saved(
    adapted, heads: tuple[int, int], channels: tuple[int, int], saved_as: str, tmp_path: Path
) -> None:
    model, groups, now, masked = compensated(adapted, heads, channels)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)
    describe(model, groups, now)
    assert (model.config.model_type, model.config.attention_bias, model.config.mlp_bias) == (saved_as, True, True)
    assert model.get_submodule("model.layers.1.mlp.down_proj").bias.any()
    assert not model.get_submodule("model.layers.1.mlp.up_proj").bias.any()
    if saved_as == "llama":  # an uneven one's modeling file is written by a run, see below
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_the_bias_is_the_exact_minimiser(plain) -> None:
    model, groups = copy.deepcopy(plain[0]), plain[1]
    group = groups.by_name("layers.0.ffn")
    consumer = group.consumers[0].module
    x = inputs_of(model, (consumer,))[consumer]
    weight = model.get_parameter(f"{consumer}.weight").detach().double().numpy()
    with Gates(model, groups.groups) as gates:
        compensator = Compensator(model, gates, Compensation(method="bias"))
        compensator.make_room(groups)
        assert not any(p.any() for n, p in model.named_parameters() if n.endswith(".bias"))
        compensator.run(groups, {group.name: np.arange(0, group.units, 2)}, list(IDS.split(3)), Silent())
    lost = x[:, 1::2] @ weight[:, 1::2].T
    bias = model.get_parameter(f"{consumer}.bias").detach().double().numpy()
    ones = np.ones((len(lost), 1))
    np.testing.assert_allclose(bias, np.linalg.lstsq(ones, lost, rcond=None)[0][0], rtol=1e-4, atol=1e-6)


def test_a_class_that_can_have_no_bias_is_refused() -> None:
    for family, can in (("qwen3", True), ("mistral", False)):
        model = build(family)
        groups = find_groups(model)
        if can:
            check_biases(model, groups)
        else:
            with pytest.raises(InputError, match="have no bias to carry it"):
                check_biases(model, groups)


@pytest.mark.usefixtures("lean")
def test_what_flap_leaves_can_be_applied_to_the_checkpoint_on_disk(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    run = regrow.prune(str(checkpoint), tmp_path / "run", "flap", data=str(text), steps=1, overrides=QUICK)
    regrow.apply(str(checkpoint), tmp_path / "again", run=run.folder)
    saved, again = (load_file(folder / "model.safetensors") for folder in (run.model, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert any(name.endswith("down_proj.bias") and tensor.any() for name, tensor in saved.items())
    for name, tensor in saved.items():
        torch.testing.assert_close(again[name], tensor)

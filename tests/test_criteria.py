"""Every published formula against a hand-worked case and a plain float64 reference."""

import pytest
import torch
from conftest import build, two_by_two, with_lora
from torch import Tensor

from regrow.criteria.evidence import ROWS_AT_ONCE, Evidence, Linear
from regrow.criteria.lora import lora, lora_gradient, lora_squared
from regrow.criteria.registry import CRITERIA, find_criterion
from regrow.criteria.simple import magnitude, random
from regrow.criteria.taylor import taylor, taylor_vector
from regrow.data.tokens import Batch
from regrow.errors import InputError
from regrow.planning.plan import Plan
from regrow.recovery.average import Average
from regrow.recovery.losses import language_loss
from regrow.recovery.scoring import Scorer, gather_evidence
from regrow.structure.gates import GateMoments, Gates


# dB·A = [[2, 1], [0, 0]]; B·dA = [[0, 1], [0, -1]]; dB·dA = [[0, 1], [0, 0]]  ->  Ĝ = [[2, 1], [0, -1]]
# W + sBA = [[1, 2], [3, 4]] + 2·[[2, 1], [-2, -1]] = [[5, 4], [-1, 2]]          ->  Ĝ∘W' = [[10, 4], [0, -2]]
def test_lora_gradient_by_hand() -> None:
    linear = two_by_two(0)
    got = lora_gradient(linear.lora_a, linear.lora_b, linear.lora_a_grad, linear.lora_b_grad)
    assert got.tolist() == [[2.0, 1.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("axis", "absolute", "squares"), [(0, [14.0, 2.0], [116.0, 4.0]), (1, [10.0, 6.0], [100.0, 20.0])]
)
def test_lora_scores_by_hand(axis: int, absolute: list[float], squares: list[float]) -> None:
    evidence = Evidence("g", "ffn", 2, (two_by_two(axis),))
    expected = torch.tensor(absolute) / torch.tensor(absolute).norm()
    torch.testing.assert_close(lora(evidence), expected)
    torch.testing.assert_close(lora_squared(evidence), torch.tensor(squares))


# W' = [[5, 4], [-1, 2]], G = [[1, -1], [2, 0.5]]  ->  W'∘G = [[5, -4], [-2, 1]]
@pytest.mark.parametrize(("axis", "element", "vector"), [(0, [9.0, 3.0], [1.0, 1.0]), (1, [7.0, 5.0], [3.0, 3.0])])
def test_taylor_scores_by_hand(axis: int, element: list[float], vector: list[float]) -> None:
    evidence = Evidence("g", "ffn", 2, (two_by_two(axis),))
    assert taylor(evidence).tolist() == element
    assert taylor_vector(evidence).tolist() == vector


def test_magnitude_by_hand() -> None:
    evidence = Evidence("g", "ffn", 2, (two_by_two(0), two_by_two(1)))
    torch.testing.assert_close(magnitude(evidence), torch.tensor([26.0, 20.0]).sqrt())  # columns of [[5, 4], [-1, 2]]


@pytest.mark.parametrize("score", [magnitude, taylor])
def test_a_weight_without_adapter_is_left_as_it_is(score) -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    linear = Linear("down_proj", weight, 1, torch.tensor([[0], [1]]), weight_grad=torch.full((2, 2), 2.0))
    score(Evidence("layers.0.ffn", "ffn", 2, (linear,)))
    assert weight.tolist() == [[1.0, -2.0], [3.0, 4.0]]


def test_gate_scores_by_hand() -> None:
    moments = GateMoments.zeros(2)
    moments.add(torch.tensor([[1.0, -2.0], [3.0, 2.0]]))
    evidence = Evidence("g", "ffn", 2, (), moments)
    assert CRITERIA["gate-fisher"].score(evidence).tolist() == [2.5, 2.0]
    assert CRITERIA["gate-second-order"].score(evidence).tolist() == [0.5, 2.0]


def test_random_is_the_runs_own() -> None:
    draw = lambda seed: random(Evidence("g", "ffn", 9, (), None, torch.Generator().manual_seed(seed)))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# --- float64 references on a whole model ------------------------------------------------------


def reference_units(group, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each linear: an elementwise value, summed over everything that each unit owns of it."""
    summed = {}
    for piece in group.slices:
        if not piece.is_adapter and piece.module in values:
            value = values[piece.module]
            per_position = value.sum(1 - piece.axis)
            summed[piece.module] = per_position[torch.from_numpy(piece.index)].sum(1)
    return summed


@pytest.fixture
def trained_step():
    """A model after one backward pass, weights' gradients included."""
    model = build("llama-gqa")
    groups = with_lora(model)
    model.train()
    for name in groups.linears:
        model.get_parameter(f"{name}.base_layer.weight").requires_grad_(True)
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
    return model, groups


def factors(model, name: str) -> list[Tensor]:
    a, b = (model.get_parameter(f"{name}.lora_{x}.default.weight") for x in "AB")
    weight = model.get_parameter(f"{name}.base_layer.weight")
    return [t.detach().double() for t in (weight, weight.grad, a, b, a.grad, b.grad)]


@pytest.mark.parametrize("name", ["lora", "lora-squared", "taylor"])
def test_scores_are_the_float64_reference(trained_step, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.criteria.evidence.ROWS_AT_ONCE", 7)  # rows in several blocks, the last one short
    model, groups = trained_step
    scaling = 6 / 3
    values = {}
    for linear in groups.linears:
        weight, gradient, a, b, grad_a, grad_b = factors(model, linear)
        effective = weight + scaling * b @ a
        estimate = grad_b @ a + b @ grad_a - grad_b @ grad_a
        values[linear] = {
            "lora": (estimate * effective).abs(),
            "lora-squared": (estimate * effective).square(),
            "taylor": (effective * gradient).abs(),
        }[name]
    for group in groups:
        per_linear = reference_units(group, values)
        if name == "lora":
            per_linear = {key: value / value.norm() for key, value in per_linear.items()}
        expected = torch.stack(list(per_linear.values())).sum(0)
        evidence = gather_evidence(model, group, None, torch.Generator())
        torch.testing.assert_close(CRITERIA[name].score(evidence).double(), expected, rtol=1e-4, atol=1e-9)


def test_a_linear_without_adapter_gives_the_lora_criterion_nothing() -> None:
    from regrow.structure.adapters import attach_lora
    from regrow.structure.finding import find_groups

    model = build("llama-gqa")
    attach_lora(model, find_groups(model).linears, rank=2, alpha=4, dropout=0.0, targets=["q_proj", "down_proj"])
    groups = find_groups(model)
    ids = torch.randint(0, 64, (2, 9))
    language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
    scores = lora(gather_evidence(model, groups.by_name("layers.0.ffn"), None, torch.Generator()))
    assert scores.shape == (40,)
    assert bool(torch.isfinite(scores).all())


# --- the scorer -------------------------------------------------------------------------------


def scorer_for(name: str, decay: float | None = 0.9):
    model = build("llama-gqa")
    groups = with_lora(model)
    gates = Gates(model, groups.groups, groups.layers)
    mask = lambda group: torch.linspace(0.1, 0.9, group.units)  # noqa: E731
    scorer = Scorer(model, Plan.whole(groups), gates, find_criterion(name), decay, seed=0, depth=True, mask=mask)
    scorer.watch(groups)
    return model, groups, gates, scorer


def backward(model, gates: Gates, scorer: Scorer, seed: int = 0) -> None:
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(seed))
    model.train()
    with gates:
        scorer.look(Batch(ids))
    with gates, scorer.recording(ids[:, 1:].numel()):
        language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()


def test_a_closed_scorer_holds_no_moments_of_inputs() -> None:
    scorer = scorer_for("obs")[-1]
    assert scorer._inputs
    scorer.close()
    assert not scorer._inputs


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_unit(name: str) -> None:
    model, groups, gates, scorer = scorer_for(name)
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    assert scorer.update(groups, plan, plan)
    scores = scorer.average.scores
    scored = CRITERIA[name].scores
    for group in groups:
        assert scores[group.name].shape == (group.units,)
        assert (len(scores[group.name].unique()) > 1) == ("width" in scored)
    layers = [scores.get(layer.unit) for layer in groups.layers]
    assert all((score is not None) == ("depth" in scored) for score in layers)
    assert len({float(score) for score in layers if score is not None}) in (0, len(layers))


@pytest.mark.parametrize("name", ["lora", "gate-fisher"])
def test_no_gradient_of_a_weights_shape_is_alive(name: str) -> None:
    model, _, gates, scorer = scorer_for(name)
    backward(model, gates, scorer)
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_weight_gradients_are_gone_after_scoring() -> None:
    model, groups, gates, scorer = scorer_for("taylor")
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    assert model.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight").grad is not None
    scorer.update(groups, plan, plan)
    scorer.close()
    base = [p for n, p in model.named_parameters() if ".lora_" not in n]
    assert all(p.grad is None and not p.requires_grad for p in base)


def test_a_score_that_is_not_finite_counts_for_nothing() -> None:
    model, groups, gates, scorer = scorer_for("lora")
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    model.get_parameter("model.layers.1.mlp.up_proj.lora_B.default.weight").grad.fill_(float("nan"))
    assert not scorer.update(groups, plan, plan)
    assert scorer.average.count == 0


def test_moving_average_is_bias_corrected_and_the_mean_plain() -> None:
    plan = Plan.whole(with_lora(build("llama-gqa")))
    one = {name: torch.ones(group.units) for name, group in plan.groups.items()}
    three = {name: 3 * score for name, score in one.items()}
    for decay, expected in ((0.9, (0.9 * 0.1 + 0.3) / 0.19), (None, 2.0)):
        average = Average({name: group.units for name, group in plan.groups.items()}, decay)
        average.add(one, plan)
        assert average.scores["layers.0.ffn"][0] == pytest.approx(1.0)
        average.add(three, plan)
        assert average.scores["layers.0.ffn"][0] == pytest.approx(expected)


# --- by name, and one's own -------------------------------------------------------------------


def test_a_criterion_of_ones_own(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('NEEDS = {"gate"}\n\ndef loudest(evidence):\n    return evidence.gate.mean.abs()\n')
    criterion = find_criterion(f"{file}:loudest")
    assert criterion.needs == {"gate"}
    evidence = Evidence("g", "ffn", 2, (), GateMoments(torch.tensor([2.0, -4.0]), torch.ones(2), 2))
    assert criterion.score(evidence).tolist() == [1.0, 2.0]


def test_a_criterions_file_may_hold_what_python_may_hold(tmp_path) -> None:
    file = tmp_path / "random.py"  # no other module of that name is in its way, nor is it in theirs
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport random\n\n"
        "@dataclass\nclass Weight:\n    by: float\n\n"
        "def one(evidence):\n    return Weight(random.choice([2.0])).by * evidence.gate.mean\n"
    )
    evidence = Evidence("g", "ffn", 2, (), GateMoments(torch.tensor([2.0, -4.0]), torch.ones(2), 2))
    assert find_criterion(f"{file}:one").score(evidence).tolist() == [2.0, -4.0]


def test_a_criterion_that_gives_too_few_scores_is_refused(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(evidence):\n    import torch\n    return torch.zeros(1)\n")
    model, groups, gates, scorer = scorer_for(f"{file}:short")
    plan = Plan.whole(groups)
    backward(model, gates, scorer)
    with pytest.raises(InputError, match="wanted a tensor of 3 scores for layers"):
        scorer.update(groups, plan, plan)


def test_a_criterion_that_fails_says_where(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("NEEDS = set()\n\ndef blind(evidence):\n    return evidence.gate.mean\n")
    said = rf"criterion '{file}:blind' fails for layers\.0\.ffn: AttributeError: 'NoneType' .*NEEDS"
    with pytest.raises(InputError, match=said) as caught:
        find_criterion(f"{file}:blind").score(Evidence("layers.0.ffn", "ffn", 2, ()))
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("name", "words"),
    [("gate-fischer", "did you mean 'gate-fisher'"), ("nofile.py:f", "no file nofile.py"), ("xyz", "known: lora")],
)
def test_an_unknown_criterion_says_what_there_is(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_criterion(name)


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 40), ("meta", 3)])
def test_an_accelerator_takes_more_rows_at_once(device: str, blocks: int) -> None:
    weight = torch.empty(40 * ROWS_AT_ONCE, 16384, device=device, dtype=torch.uint8)
    found = list(Linear("m", weight, 0, torch.zeros(1, 1, dtype=torch.long)).row_blocks())
    assert len(found) == blocks
    assert sum(len(range(*rows.indices(len(weight)))) for rows in found) == len(weight)

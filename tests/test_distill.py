"""Distillation: the divergence is what it should be, and every teacher says what the whole model says."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HEADS, QUICK, SIZES, build, logits, random_keep, with_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import regrow
from regrow.checkpoint.stock import prunable_groups
from regrow.data.corpus import Corpus, Source
from regrow.data.tokens import Batch, Windows, batches
from regrow.errors import InputError
from regrow.progress import Silent
from regrow.recipe import Recipe, load_recipe
from regrow.recovery import losses
from regrow.recovery.cached import CachedTeacher, top_distribution, write_cache
from regrow.recovery.distillation import check_distillation, distil
from regrow.recovery.learner import Learner
from regrow.recovery.losses import FullTarget, divergence, hidden_distance, language_loss
from regrow.recovery.objective import Objective
from regrow.recovery.outcome import Trained
from regrow.recovery.pruner import Pruner
from regrow.recovery.teacher import AutoTeacher, ModelTeacher, SelfTeacher, Wish, layer_outputs
from regrow.recovery.train import train
from regrow.settings import Distillation, Training
from regrow.structure.adapters import adapter_parameters, merge_lora
from regrow.structure.cut import cut
from regrow.structure.gates import Gates
from regrow.structure.quantised import kept_as, quantised_linears

B, T, V = 2, 7, 19
PLAIN = Wish(temperature=1.0)
IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(7))


def pair(seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(B, T, V, generator=generator) for _ in range(2))
    return student.requires_grad_(True), teacher


def mask(seed: int = 0) -> torch.Tensor:
    scored = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.5
    scored[0, 3] = True
    return scored


def reference(student, teacher, temperature: float, scored) -> torch.Tensor:
    """Σ p (log p - log q), in float64, as the formula stands."""
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)[:, :-1]
    counts = torch.ones(B, T - 1) if scored is None else scored[:, 1:].double()
    return (kl * counts).sum() / counts.sum()


def number(value: torch.Tensor) -> float:
    return value.item()


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, student)[0]


# --- the losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("scored", [None, mask()], ids=["all", "masked"])
@pytest.mark.parametrize("at_once", [1, 3 * B * V, 2**24])
def test_divergence_and_its_gradient_are_the_formulas(temperature, scored, at_once, monkeypatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    student, teacher = pair()
    value = divergence(student, FullTarget(teacher, temperature), temperature, scored)
    expected = reference(student, teacher, temperature, scored)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(3 * value, student), gradient(3 * expected, student), rtol=1e-5, atol=1e-7)


def test_chunks_change_nothing(monkeypatch) -> None:
    student, teacher = pair()
    results = []
    for at_once in (1, 2**24):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
        value = divergence(student, FullTarget(teacher, 1.0), 1.0)
        results.append((value.item(), gradient(value, student)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_divergence_in_half_precision_is_computed_in_float32() -> None:
    student, teacher = (tensor.detach().bfloat16() for tensor in pair())
    student.requires_grad_(True)
    value = divergence(student, FullTarget(teacher, 1.0), 1.0)
    assert value.item() == pytest.approx(reference(student, teacher, 1.0, None).item(), rel=1e-5)
    assert gradient(value, student).dtype == torch.bfloat16


def test_a_token_that_the_teacher_rules_out_adds_nothing() -> None:
    student, teacher = pair()
    teacher[:, :, 5] = -math.inf
    value = divergence(student, FullTarget(teacher, 1.0), 1.0)
    lower = teacher.clone()
    lower[:, :, 5] = -60.0
    assert value.item() == pytest.approx(reference(student, lower, 1.0, None).item(), rel=1e-5)
    assert gradient(value, student).isfinite().all()


def test_what_is_not_scored_may_be_anything() -> None:
    student, teacher = pair()
    scored = mask()
    value = divergence(student, FullTarget(teacher, 1.0), 1.0, scored)
    spoilt = teacher.clone()
    spoilt[:, :-1][~scored[:, 1:]] = math.nan
    other = divergence(student, FullTarget(spoilt, 1.0), 1.0, scored)
    assert torch.equal(value, other)
    assert torch.equal(gradient(value, student), gradient(other, student))


def test_the_bucket_is_one_outcome() -> None:
    """Σ over K tokens and the rest as one, in float64 and differentiated by autograd."""
    student, teacher = pair()
    for temperature, scored in ((1.0, None), (2.0, mask())):
        value = divergence(student, top_distribution(teacher, 4, temperature), temperature, scored)
        p, q = ((logits.double() / temperature).softmax(-1)[:, :-1] for logits in (teacher, student))
        top = p.topk(4).indices
        p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, True)], -1) for x in (p, q))
        counts = torch.ones(B, T - 1) if scored is None else scored[:, 1:].double()
        expected = ((p * (p / q).log()).sum(-1) * counts).sum() / counts.sum()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient(value, student), gradient(expected, student), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [V, V + 5])
def test_all_tokens_kept_is_the_full_divergence(k: int) -> None:
    student, teacher = pair()
    full = divergence(student, FullTarget(teacher, 1.5), 1.5)
    kept = divergence(student, top_distribution(teacher, k, 1.5), 1.5)
    assert kept.item() == pytest.approx(full.item(), rel=1e-6)
    torch.testing.assert_close(gradient(kept, student), gradient(full, student), rtol=1e-5, atol=1e-8)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 30))
def test_knowing_less_never_makes_the_divergence_larger(seed: int, spread: float) -> None:
    student, teacher = pair(seed, spread)
    values = [number(divergence(student, top_distribution(teacher, k, 1.0), 1.0)) for k in (1, 3, 8, V)]
    values.append(number(divergence(student, FullTarget(teacher, 1.0), 1.0)))
    assert values[0] > -1e-5
    assert all(fewer <= more + 1e-5 * (1 + more) for fewer, more in itertools.pairwise(values))


def test_nll_of_scored_tokens() -> None:
    student, _ = pair()
    ids, scored = torch.randint(0, V, (B, T)), mask()
    log_q = student.double().log_softmax(-1)
    by_hand = [-log_q[b, t - 1, ids[b, t]] for b in range(B) for t in range(1, T) if scored[b, t]]
    assert number(language_loss(student, ids, scored)) == pytest.approx(number(sum(by_hand)) / len(by_hand), rel=1e-6)
    everything = torch.ones(B, T, dtype=torch.bool)
    assert number(language_loss(student, ids, everything)) == number(language_loss(student, ids))
    assert Batch(ids, scored).tokens == len(by_hand)


def test_hidden_distance_by_hand() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])  # squared norms 25 and 4, then one that never counts
    student = torch.tensor([[[3.0, 3.0], [2.0, 2.0], [0.0, 0.0]]])  # squared errors 1 and 4
    assert number(hidden_distance([student], [teacher])) == pytest.approx((1 / 25 + 1) / 2)
    assert number(hidden_distance([student, teacher], [teacher, teacher])) == pytest.approx((1 / 25 + 1) / 4)
    only_last = torch.tensor([[False, False, True]])
    assert number(hidden_distance([student], [teacher], only_last)) == pytest.approx(1)


# --- teachers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-biases", "qwen3-tied"])
def test_the_self_teacher_says_what_the_whole_model_said(family: str) -> None:
    model = build(family)
    dense = logits(model)
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))  # those of `logits`
    groups = with_lora(model, dropout=0.3)
    seen: list[str] = []
    with Gates(model, groups.groups) as gates:
        for name, keep in random_keep(groups, 0).items():
            gates.set(name, torch.zeros(groups.by_name(name).units).index_fill(0, torch.from_numpy(keep), 1.0))
        values = {group.name: gates.value(group.name).clone() for group in groups}
        student = logits(model)
        model.train()
        model.lm_head.eval()
        language_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
        gradients = [parameter.grad.clone() for parameter in adapter_parameters(model)]
        with gates.recording(1.0, lambda name, c: seen.append(name)):
            said = SelfTeacher(model, gates, PLAIN).logits(ids)
        assert model.training
        assert not model.lm_head.training
        assert not said.requires_grad
        assert torch.equal(said, dense)
        assert torch.equal(logits(model), student)
        assert not torch.equal(student, dense)
        assert all(torch.equal(gates.value(name), value) for name, value in values.items())
        for parameter, before in zip(adapter_parameters(model), gradients, strict=True):
            assert parameter.requires_grad
            assert torch.equal(parameter.grad, before)
    assert not seen


@pytest.mark.parametrize("family", ["llama-biases", "qwen3-tied"])
def test_a_copy_is_frozen_and_its_own(family: str) -> None:
    model = build(family)
    dense = logits(model)
    groups = with_lora(model)
    with Gates(model, groups.groups) as gates:
        gates.set(groups[0].name, torch.zeros(groups[0].units))
        teacher = ModelTeacher(model, PLAIN)
        cut(model, groups, {groups[0].name: np.array([0])})
        gates.rebuild(groups.groups, {group.name: torch.ones(group.units) for group in groups})
    merge_lora(model)
    assert torch.equal(logits(teacher.model), dense)
    assert not any(parameter.requires_grad or ".lora_" in name for name, parameter in teacher.model.named_parameters())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.model.parameters()}


def test_a_copy_in_bfloat16_takes_half_and_says_nearly_the_same() -> None:
    model = build("qwen3-tied")
    with_lora(model)
    exact, half = ModelTeacher(model, PLAIN), ModelTeacher(model, PLAIN, torch.bfloat16)
    assert exact.bytes == sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)
    assert exact.bytes == 2 * half.bytes
    said, nearly = (teacher.lesson(Batch(IDS)).target for teacher in (exact, half))
    assert 0 < number(divergence(nearly.logits_BTV, said, 1.0)) < 0.01


@pytest.mark.parametrize(("kind", "share", "close"), [("int8", 0.45, 0.003), ("nf4", 0.4, 0.3)])
def test_a_quantised_copy_is_small_frozen_and_says_nearly_the_same(kind: str, share: float, close: float) -> None:
    pytest.importorskip("bitsandbytes")
    wide = {**SIZES, "hidden_size": 192, "intermediate_size": 128}
    config = LlamaConfig(**wide, **HEADS, head_dim=64)  # rows end where nf4's blocks of scales do
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with_lora(model)
    exact, rounded = ModelTeacher(model, PLAIN), ModelTeacher(model, PLAIN, kind)
    assert {kept_as(linear.weight) for linear in quantised_linears(rounded.model)} == {kind}
    assert len(list(quantised_linears(rounded.model))) == 7 * 2
    assert rounded.bytes < share * exact.bytes
    assert not any(p.requires_grad or ".lora_" in name for name, p in rounded.model.named_parameters())
    said, nearly = (teacher.lesson(Batch(IDS)).target for teacher in (exact, rounded))
    assert 0 < number(divergence(nearly.logits_BTV, said, 1.0)) < close
    assert torch.equal(rounded.lesson(Batch(IDS)).target.logits_BTV, nearly.logits_BTV)  # nothing is repacked


def progressive(**changes: object) -> Recipe:
    return load_recipe(
        "loraprune",
        {
            "training.steps": 12,
            "training.learning_rate": 3e-3,
            "pruning.interval": 3,
            "pruning.decay_steps": 2,
            "pruning.sparsity": 0.5,
            "pruning.calibration_batches": 1,
            "distillation.weight": 0.7,
            **changes,
        },
    )


def random_data():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield Batch(torch.randint(0, 64, (3, 10), generator=generator))


@pytest.mark.parametrize("kind", ["auto", "self", "model"])
def test_a_teacher_never_changes_its_mind(kind: str) -> None:
    """Fading gates, cuts and training pass; it says to the last what the dense model said. `auto` changes at a cut."""
    recipe = progressive(**{"distillation.teacher": kind})
    model = build("llama-gqa")
    dense = ModelTeacher(model, PLAIN).logits(IDS)
    groups = with_lora(model, fill=False)
    learner = Learner(model, recipe.training, random_data())
    kinds, cuts = [], []
    with Pruner(model, groups, recipe, learner, random_data(), cut_early=kind != "self") as pruner:
        pruner.calibrate()
        learner.objective = distil(
            recipe.distillation, learner, pruner.gates, random_text(), everything, Path(), Silent()
        )
        teacher = learner.objective.teacher
        assert teacher is not None
        for step in range(recipe.training.steps):
            pruner.before_step(step)
            cuts.append(pruner.cut_plan.removed_parameters > 0)
            kinds.append(teacher.kind)
            assert torch.equal(teacher.logits(IDS), dense)
            pruner.train_step()
            assert set(learner.terms) == {"ce", "kl"}
        assert learner.terms["kl"] > 0.01
        assert pruner.finished
    assert kinds == {"auto": ["model" if gone else "self" for gone in cuts]}.get(kind, [kind] * len(cuts))
    assert cuts[0] is False
    assert cuts[-1] is (kind != "self")
    steps = learner.objective.summary()["teacher_steps"]
    assert steps == {name: kinds.count(name) for name in dict.fromkeys(kinds)}


def test_self_refuses_a_change_of_its_weights() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    with Gates(model, groups.groups) as gates, pytest.raises(InputError, match="choose auto, model or cached"):
        Objective(Distillation(weight=0.5), SelfTeacher(model, gates, PLAIN)).before_change()


def random_text(count: int = 11, length: int = 8) -> Windows:
    ids = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(3))
    return Windows(ids, "random", "none")


def everything() -> torch.Tensor:
    return torch.arange(11)


def test_the_cache_gives_back_what_was_written(tmp_path: Path) -> None:
    teacher, windows, counted = ModelTeacher(build("llama-gqa"), PLAIN), random_text(), []
    drawn = list(itertools.islice(batches(windows, 3, seed=1), 3))
    numbers = torch.cat([batch.numbers_B for batch in drawn]).sort().values
    write_cache(
        tmp_path / "teacher", teacher.logits, windows, numbers, batch_size=4, top_k=5, temperature=1.5,
        on_batch=counted.append,
    )  # fmt: skip
    cached = CachedTeacher(tmp_path / "teacher")
    assert counted == [4, 4, 1]
    assert cached.bytes == sum(file.stat().st_size for file in (tmp_path / "teacher").iterdir()) > 9 * 7 * 44
    for batch in drawn:
        assert torch.equal(windows.ids_NT[batch.numbers_B], batch.ids_BT)
        got = cached.lesson(batch).target
        wanted = top_distribution(teacher.logits(batch.ids_BT), 5, 1.5)
        assert torch.equal(got.tokens_BTK, wanted.tokens_BTK)
        torch.testing.assert_close(got.log_probs_BTK, wanted.log_probs_BTK)
        torch.testing.assert_close(got.log_tail_BT, wanted.log_tail_BT)
    others = sorted(set(range(11)) - set(numbers.tolist()))
    for number in others:
        with pytest.raises(AssertionError, match="was not written down"):
            cached.lesson(windows.batch(torch.tensor([number])))
    cached.close()
    assert not list(tmp_path.iterdir())


# --- the objective -------------------------------------------------------------------------------


def pruned_student(hidden_weight: float = 0.0, temperature: float = 1.0, **changes: object):
    """A cut model with live adapters, its learner and its teacher."""
    model = build("llama-gqa")
    groups = with_lora(model)
    layers = "model.layers" if hidden_weight else None
    teacher = ModelTeacher(model, Wish(temperature, layers))
    cut(model, groups, random_keep(groups, 0))
    chosen = Distillation(weight=0.7, hidden_weight=hidden_weight, temperature=temperature)
    data = changes.pop("data", [Batch(IDS)])
    learner = Learner(model, Training(**{"steps": 9, "learning_rate": 1e-3, **changes}), itertools.cycle(data))
    learner.objective = Objective(chosen, teacher, layers)
    return learner


def test_the_loss_is_the_sum_it_is_said_to_be() -> None:
    learner = pruned_student(hidden_weight=0.3, temperature=2.0)
    model, teacher = learner.model, learner.objective.teacher
    batch = Batch(IDS, torch.rand(IDS.shape) < 0.6)
    loss, terms = learner.objective.loss(model, batch, learner.objective.lesson(batch))
    student = model(input_ids=IDS, use_cache=False).logits
    assert number(terms["ce"]) == pytest.approx(number(language_loss(student, IDS, batch.scored_BT)))
    target = FullTarget(teacher.logits(IDS), 2.0)
    assert number(terms["kl"]) == pytest.approx(number(divergence(student, target, 2.0, batch.scored_BT)))
    own, wanted = (m(input_ids=IDS, output_hidden_states=True).hidden_states for m in (model, teacher.model))
    # transformers gives the first layer's output as the second of its hidden states, the last one's only normalised
    first = hidden_distance(own[1:2], wanted[1:2], batch.scored_BT)
    with layer_outputs(model, "model.layers") as outputs:
        model(input_ids=IDS)
    assert torch.equal(outputs[0], own[1])
    assert len(outputs) == 2
    assert 0 < first.item() < 2 * number(terms["hidden"])
    expected = 0.3 * terms["ce"] + 0.7 * 4 * terms["kl"] + 0.3 * terms["hidden"]
    assert loss.item() == pytest.approx(expected.item())


def test_layers_are_matched_by_their_numbers() -> None:
    learner = pruned_student(hidden_weight=1.0)
    objective, batch = learner.objective, Batch(IDS)
    lesson = objective.lesson(batch)
    with layer_outputs(learner.model, "model.layers") as own:
        learner.model(input_ids=IDS)
    wanted = number(hidden_distance(own[1:], lesson.hidden[1:]))
    del learner.model.model.layers[0]
    learner.model.config.num_hidden_layers = 1
    objective.layer_numbers = [1]
    with layer_outputs(learner.model, "model.layers") as left:
        terms = objective.loss(learner.model, batch, lesson)[1]
    assert number(terms["hidden"]) == pytest.approx(number(hidden_distance(left, lesson.hidden[1:])))
    assert number(terms["hidden"]) != pytest.approx(wanted)


def test_a_layer_that_is_closed_is_matched_no_more_than_one_that_is_gone() -> None:
    first = []
    for teacher in ("model", "self"):
        settings = {
            "training.steps": 1, "training.batch_size": 2, "lora.dropout": 0.0, "pruning.calibration_batches": 2,
            "distillation.weight": 0.0, "distillation.hidden_weight": 1.0, "distillation.teacher": teacher,
            "pruning.sparsity": 0.5, "pruning.kinds": ["layer"],
        }  # fmt: skip
        model = build("llama-gqa")
        with_lora(model, fill=False)
        text = Corpus((Source("text", "pretrain", 1.0, random_text(20, 10), random_text(4, 10)),))
        done = train(
            model, prunable_groups(model), load_recipe("shortgpt", settings), text, Silent(),
            teacher_folder=Path("unused"), on_cut=lambda event: None, on_validation=lambda history: None,
        )  # fmt: skip
        assert len(done.plan.removed_layers) == 1
        first.append(done.history.steps[0])
    assert first[1]["hidden"] == pytest.approx(first[0]["hidden"], abs=1e-6)
    assert first[1]["loss"] == pytest.approx(first[0]["loss"])


def gradients_of(learner: Learner) -> list[torch.Tensor]:
    learner.backward(learner.data)
    return [parameter.grad.clone() for parameter in learner.parameters]


def test_accumulation_is_one_large_batch() -> None:
    whole, parts = (
        pruned_student(hidden_weight=0.2, data=data, accumulate=len(data))
        for data in ([Batch(IDS)], [Batch(part) for part in IDS.split(2)])
    )
    for one, other in zip(gradients_of(whole), gradients_of(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert whole.terms == pytest.approx(parts.terms, rel=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = (
        pruned_student(hidden_weight=0.2, gradient_checkpointing=checkpointing) for checkpointing in (False, True)
    )
    for one, other in zip(gradients_of(plain), gradients_of(saving), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_self_teacher_does_not_cost_the_student_its_gradients() -> None:
    """Neither through autocast, which keeps the casts of weights for later passes, nor by freezing adapters."""
    model = build("llama-gqa")
    groups = with_lora(model)
    weight = model.get_parameter(groups[0].consumers[0].parameter)
    weight.requires_grad_(True)
    learner = Learner(model, Training(steps=1, precision="bfloat16"), itertools.cycle([Batch(IDS)]))
    with Gates(model, groups.groups) as gates:
        learner.objective = Objective(Distillation(weight=0.5), SelfTeacher(model, gates, PLAIN))
        learner.backward(learner.data)
    assert weight.grad is not None
    assert all(parameter.grad.any() for parameter in learner.parameters)


def test_gate_scores_measure_the_mixed_loss() -> None:
    """At an unpruned student the divergence has no gradient, so that what is left is the NLL's share."""
    moments = []
    for weight in (0.0, 0.7):
        model = build("llama-gqa")
        groups = with_lora(model, fill=False)
        learner = Learner(model, Training(steps=1), itertools.cycle([Batch(IDS)]))
        got: dict[str, torch.Tensor] = {}
        with Gates(model, groups.groups) as gates:
            if weight:
                learner.objective = Objective(Distillation(weight=weight), SelfTeacher(model, gates, PLAIN))
            learner.backward(learner.data, lambda scale: gates.recording(scale, got.__setitem__))  # noqa: B023
        moments.append(got)
    assert set(moments[0]) == set(moments[1])
    for name, c in moments[0].items():
        torch.testing.assert_close(0.3 * c, moments[1][name], rtol=1e-4, atol=1e-5)


def test_a_teacher_alone_brings_its_student_closer() -> None:
    learner = pruned_student(learning_rate=1e-2, steps=60)
    learner.objective.settings = Distillation(weight=1.0)
    distances = []
    for _ in range(60):
        learner.step()
        distances.append(learner.terms["kl"])
    assert distances[-1] < 0.6 * distances[0]


# --- whole runs ----------------------------------------------------------------------------------


def trained(folder: Path, **changes: object) -> Trained:
    model = build("llama-gqa")
    quick = {"training.steps": 6, "pruning.interval": 1, "training.batch_size": 3, "training.eval_interval": 2}
    corpus = Corpus((Source("text", "pretrain", 1.0, random_text(20, 10), random_text(4, 10)),))
    return train(
        model, with_lora(model, fill=False), progressive(**quick, **changes), corpus, Silent(),
        teacher_folder=folder / "teacher", on_cut=lambda event: None, on_validation=lambda history: None,
    )  # fmt: skip


def test_all_teachers_teach_the_same(tmp_path: Path) -> None:
    found, validations = {}, {}
    for kind in ("auto", "self", "model", "cached"):
        changes = {"distillation.temperature": 2.0, "distillation.top_k": 64, "distillation.teacher": kind}
        result = trained(tmp_path, **changes)
        assert not list(tmp_path.iterdir())
        found[kind] = [(step["loss"], step["ce"], step["kl"]) for step in result.history.steps]
        validations[kind] = [validation["loss"] for validation in result.history.validations]
        assert result.plan.sparsity.block >= 0.5
        assert result.groups.by_name("layers.0.ffn").units < 40
        taught = result.summary["distillation"]
        assert sum(taught["teacher_steps"].values()) == 6
        assert set(taught["teacher_steps"]) == ({"self", "model"} if kind == "auto" else {kind})
        assert (taught["teacher_bytes"] == 0) == (kind == "self")
    for kind, steps in found.items():
        assert np.array(steps) == pytest.approx(np.array(found["auto"]), abs=2e-4), kind
        assert validations[kind] == pytest.approx(validations["auto"], abs=2e-4), kind
    assert found["auto"][-1][2] > 0.01


def test_no_weight_is_no_distillation(tmp_path: Path) -> None:
    runs = []
    for changes in ({}, {"distillation.temperature": 4.0, "distillation.teacher": "self"}):
        result = trained(tmp_path, **{"distillation.weight": 0.0, **changes})
        assert set(result.history.steps[0]) == {"step", "loss", "seconds"}
        assert "distillation" not in result.summary
        runs.append((result.adapters, [step["loss"] for step in result.history.steps]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], tensor) for name, tensor in runs[1][0].items())


def test_a_distilled_run_leaves_a_plain_checkpoint(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    chosen = {"weight": 0.5, "hidden_weight": 0.5, "teacher": "auto", "teacher_dtype": "int8"}
    overrides = {**QUICK, **{f"distillation.{key}": value for key, value in chosen.items()}}
    result = regrow.prune(str(checkpoint), tmp_path / "out", data=str(text), steps=4, overrides=overrides)
    history = json.loads((result.folder / "history.json").read_text())
    assert all(step["hidden"] > 0 for step in history["steps"])
    assert result.results["training"]["distillation"]["teacher_steps"] == {"model": 4}
    assert result.results["verification"]["passed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation.teacher": "cached", "distillation.hidden_weight": 1.0}, "no hidden states"),
        ({"distillation.weight": 1.0, "pruning.calibration_batches": 0}, "a lower weight"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_distillation(progressive(**changes))
    check_distillation(progressive())


def test_auto_needs_no_copy_when_there_is_nothing_left_to_teach() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    with Gates(model, groups.groups) as gates:
        teacher = AutoTeacher(model, gates, PLAIN)
        objective = Objective(Distillation(weight=0.5), teacher)
        objective.close()
        objective.before_change()
    assert teacher.kind == "self"
    assert objective.lesson(Batch(IDS)) is None

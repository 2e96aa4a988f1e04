"""Tracing, gates and the cut: masked ≡ cut, and a gate's gradient is what it should be."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import build, logits, random_keep, with_lora
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from regrow.errors import InputError
from regrow.recovery.losses import language_loss
from regrow.structure.adapters import adapter_parameters, adapters_off, attach_lora, merge_lora
from regrow.structure.channels import reshape
from regrow.structure.cut import cut
from regrow.structure.gates import GateMoments, Gates
from regrow.structure.groups import find_groups

CLOSE = 1e-4


def closed(gates: Gates, groups, keep) -> Gates:
    for group in groups:
        value = torch.zeros(group.units)
        value[torch.from_numpy(keep[group.name])] = 1.0
        gates.set(group.name, value)
    return gates


@pytest.mark.parametrize("seed", range(3))
def test_masked_is_cut(family: str, seed: int) -> None:
    model = build(family, seed)
    groups = with_lora(model)
    keep = random_keep(groups, seed)
    whole = logits(model)
    with closed(Gates(model, groups.groups), groups, keep):
        masked = logits(model)
    cut(model, groups, keep)
    assert (masked - logits(model)).abs().max() < CLOSE
    if any(len(keep[group.name]) < group.units for group in groups):
        assert (masked - whole).abs().max() > 1e-2, "a mask that changes nothing proves nothing"


def test_open_gates_change_no_bit(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    before = logits(model)
    with Gates(model, groups.groups):
        assert torch.equal(before, logits(model))


def test_merged_is_adapted(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    cut(model, groups, random_keep(groups, 5))
    adapted = logits(model)
    with adapters_off(model):
        assert (adapted - logits(model)).abs().max() > 1e-2
    assert torch.equal(adapted, logits(model))
    merge_lora(model)
    assert not adapter_parameters(model)
    assert (adapted - logits(model)).abs().max() < CLOSE


def test_groups_count_every_prunable_parameter(family: str) -> None:
    model = build(family)
    groups = find_groups(model)
    counted = sum(group.units * group.cost for group in groups)
    # o_proj's and down_proj's biases lie on the residual stream: no unit takes them along.
    consumers = {s.module for group in groups for s in group.consumers}
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias") and n[:-5] in consumers)
    assert counted + biases == groups.block_parameters
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    assert groups.block_parameters == sum(p.numel() for m in linears for p in m.parameters())
    assert groups.total_parameters == sum(p.numel() for p in model.parameters())
    assert len(groups.linears) == len(linears)


def test_head_size_is_read_off_the_graph() -> None:
    groups = find_groups(build("qwen3-tied"))
    attention = groups.by_name("layers.0.attention")
    per_unit = {s.module.rpartition(".")[2]: s.index.shape[1] for s in attention.slices}
    assert attention.units == 3
    assert per_unit == {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}


def test_lora_factors_belong_to_their_linear() -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    for group in groups:
        adapters = {
            (s.module.rpartition(".")[2], s.parameter.split(".lora_")[1][0], s.axis)
            for s in group.slices
            if s.is_adapter
        }
        if group.kind == "attention":
            assert adapters == {("q_proj", "B", 0), ("k_proj", "B", 0), ("v_proj", "B", 0), ("o_proj", "A", 1)}
        else:
            assert adapters == {("gate_proj", "B", 0), ("up_proj", "B", 0), ("down_proj", "A", 1)}
    without = find_groups(build("llama-gqa"))
    assert [(g.name, g.units, g.cost) for g in groups] == [(g.name, g.units, g.cost) for g in without]


def test_groups_after_a_cut_are_what_tracing_finds(family: str) -> None:
    model = build(family)
    groups = with_lora(model)
    left = cut(model, groups, random_keep(groups, 2))
    traced = find_groups(model)
    assert (left.block_parameters, left.total_parameters) == (traced.block_parameters, traced.total_parameters)
    assert left.layers == traced.layers
    for ours, theirs in zip(left, traced, strict=True):
        assert (ours.name, ours.units, ours.cost) == (theirs.name, theirs.units, theirs.cost)
        assert {(s.parameter, s.axis): s.index.tolist() for s in ours.slices} == {
            (s.parameter, s.axis): s.index.tolist() for s in theirs.slices
        }


def test_two_cuts_are_one(family: str) -> None:
    once, twice = build(family), build(family)
    groups = find_groups(once)
    first = random_keep(groups, 3)
    second = {name: units[::2] for name, units in first.items()}
    cut(once, groups, second)
    left = cut(twice, find_groups(twice), first)
    cut(twice, left, {name: np.searchsorted(first[name], units) for name, units in second.items()})
    assert torch.equal(logits(once), logits(twice))


def test_alike_layers_are_traced_once() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups = find_groups(model)
    assert len(groups) == 80
    assert [group.units for group in groups if group.kind == "attention"] == [2] * 40
    assert {s.parameter.split(".")[2] for g in groups if g.layer == 39 for s in g.slices} == {"39"}


class Cubed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_an_unknown_operator_is_named() -> None:
    model = build("llama-gqa")
    model.model.layers[0].mlp.act_fn = Cubed()
    model.model.layers[1].mlp.act_fn = Cubed()
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.act_fn.*special_bessel_j0"):
        find_groups(model)


def test_reshape_keeps_what_batch_and_time_do_not_touch() -> None:
    heads = np.arange(6).reshape(1, 1, 6, 1)
    flat = reshape(heads, (2, 7, 6, 4), (2, 7, 24))
    assert flat.shape == (1, 1, 24)
    assert flat[0, 0].tolist() == np.repeat(np.arange(6), 4).tolist()
    assert np.array_equal(reshape(flat, (2, 7, 24), (14, 3, 8)).reshape(-1), np.repeat(np.arange(6), 4))


# --- gate gradients ---------------------------------------------------------------------------


def summed_losses(model, ids: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids, use_cache=False).logits
    nll = nn.functional.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nll.sum(1)


def recorded(model, gates: Gates, ids: torch.Tensor, pieces: int = 1) -> dict[str, torch.Tensor]:
    got: dict[str, list[torch.Tensor]] = {}
    for part in ids.chunk(pieces):
        with gates.recording(ids[:, 1:].numel(), lambda name, c: got.setdefault(name, []).append(c)):
            (language_loss(model(input_ids=part, use_cache=False).logits, part) / pieces).backward()
    return {name: torch.cat(parts) for name, parts in got.items()}


IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(7))


def test_gate_gradient_is_the_weights_own(family: str) -> None:
    """`c = ⟨W', ∂L/∂W'⟩` on the consumer's columns, W' = W + sBA; per sample."""
    model = build(family).double()
    groups = with_lora(model)
    model.double().train()
    with Gates(model, groups.groups) as gates:
        got = recorded(model, gates, IDS)
    merge_lora(model)
    model.double()
    for sample in range(len(IDS)):
        model.zero_grad()
        summed_losses(model, IDS[sample : sample + 1]).sum().backward()
        for group in groups:
            weight = model.get_submodule(group.consumers[0].module).weight
            columns = (weight * weight.grad).sum(0)
            expected = columns[torch.from_numpy(group.consumers[0].index)].sum(1)
            torch.testing.assert_close(got[group.name][sample].double(), expected.detach(), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("recording", [False, True])
def test_what_lies_before_a_gate_learns_through_it(recording: bool) -> None:
    """As through the consumer's columns times the gate."""
    model = build("llama-gqa")
    groups = find_groups(model)
    chance = torch.Generator().manual_seed(3)
    values = {group.name: torch.rand(group.units, generator=chance) for group in groups}
    embedding = model.get_input_embeddings().weight

    def gradient() -> torch.Tensor:
        model.zero_grad()
        summed_losses(model, IDS).sum().backward()
        return embedding.grad.clone()

    with Gates(model, groups.groups) as gates:
        for name, value in values.items():
            gates.set(name, value)
        with gates.recording(1.0, lambda name, c: None) if recording else nullcontext():
            found = gradient()
    for group in groups:
        weight, index = model.get_submodule(group.consumers[0].module).weight, group.consumers[0].index
        with torch.no_grad():
            weight[:, index.reshape(-1)] *= values[group.name].repeat_interleave(index.shape[1])
    torch.testing.assert_close(found, gradient(), rtol=1e-4, atol=1e-5)


def test_a_gate_before_every_adapter_has_a_gradient_too() -> None:
    model = build("llama-gqa")
    attach_lora(model, find_groups(model).linears, rank=2, alpha=4, dropout=0.0, targets=["down_proj"])
    groups = find_groups(model)
    with Gates(model, groups.groups) as gates:
        got = recorded(model, gates, IDS)
    assert set(got) == {group.name for group in groups}
    assert all(bool(c.any()) for c in got.values())


@pytest.mark.parametrize("way", ["accumulated", "checkpointed", "scaled", "autocast"])
def test_gate_gradient_does_not_depend_on_how_training_runs(way: str) -> None:
    model = build("llama-gqa")
    groups = with_lora(model)
    model.train()
    with Gates(model, groups.groups) as gates:
        plain = recorded(model, gates, IDS)
        tolerance = 1e-4
        if way == "accumulated":
            other = recorded(model, gates, IDS, pieces=2)
        elif way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            other = recorded(model, gates, IDS)
        elif way == "scaled":
            other = {}
            with gates.recording(IDS[:, 1:].numel() / 1024, lambda name, c: other.update({name: c})):
                (language_loss(model(input_ids=IDS, use_cache=False).logits, IDS) * 1024).backward()
        else:
            tolerance = 0.1
            with torch.autocast("cpu", torch.bfloat16):
                other = recorded(model, gates, IDS)
    for name, expected in plain.items():
        assert (other[name] - expected).norm() <= tolerance * expected.norm(), name


def test_removing_a_unit_costs_what_its_gate_says_for_a_small_step() -> None:
    model = build("llama-gqa")
    groups = find_groups(model)
    model.double()
    with Gates(model, groups.groups) as gates:
        c = recorded(model, gates, IDS)["layers.1.ffn"].sum(0)
        with torch.no_grad():
            before = summed_losses(model, IDS).sum()
            value = torch.ones(40)
            value[3] = 1 - 1e-3
            gates.set("layers.1.ffn", value)
            after = summed_losses(model, IDS).sum()
    assert float(after - before) == pytest.approx(-1e-3 * float(c[3]), rel=2e-2, abs=1e-6)


def test_fisher_does_not_depend_on_how_sequences_are_batched() -> None:
    c = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = GateMoments.zeros(5), GateMoments.zeros(5)
    whole.add(c)
    for part in c.split(2):
        parts.add(part)
    torch.testing.assert_close(whole.mean_square, parts.mean_square)
    torch.testing.assert_close(whole.mean, c.double().mean(0))
    torch.testing.assert_close(whole.mean_square, c.double().square().mean(0))

"""Several sources of text: shares that follow degradation, the sampler, instructions, stages and rounds."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, STORY, build, with_lora
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import regrow
from regrow.data.corpus import Corpus, Source, list_sources, read_corpus
from regrow.data.instructions import Example, make_examples, pack_examples
from regrow.data.mixture import (
    Shares,
    degradation_weights,
    drpruning_weights,
    moved_reference,
    reweight,
    sheared_weights,
)
from regrow.data.sampler import Sampler, SamplerState
from regrow.data.scaling import LossLaw, fit_loss_law
from regrow.data.source import load_records
from regrow.data.tokens import Windows, batches, join_windows
from regrow.errors import InputError
from regrow.evaluation.compare import held_out_nll
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.losses import language_loss
from regrow.recovery.mixing import DataMix, calibration_batches
from regrow.recovery.train import train
from regrow.settings import Data, TextSource

# --- shares --------------------------------------------------------------------------------------

RULES = ("degradation", "sheared", "drpruning")
SMOOTHING = 1e-4
"""What the rule `sheared` spreads evenly."""


@st.composite
def degraded(draw: st.DrawFn) -> tuple[tuple[float, ...], list[float]]:
    """Initial shares of some sources, and how much each has degraded."""
    count = draw(st.integers(2, 6))
    weights = draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    gaps = draw(st.lists(st.floats(-0.5, 5), min_size=count, max_size=count))
    return Shares.start(weights).initial, gaps


def shares_of(initial: tuple[float, ...]) -> Shares:
    return Shares(initial, initial, initial)


@pytest.mark.parametrize("rule", RULES)
@given(degraded())
def test_shares_sum_to_one_and_keep_their_floor(rule: str, case: tuple[tuple[float, ...], list[float]]) -> None:
    initial, gaps = case
    for floor in (None, 0.5):
        moved = reweight(rule, shares_of(initial), gaps, floor)
        assert math.isclose(sum(moved.current), 1, abs_tol=1e-12)
        assert moved.initial == initial
        low = {"degradation": 0.3, "sheared": SMOOTHING, "drpruning": 0.2}[rule] if floor is None else floor
        least = [low / len(initial)] * len(initial) if rule == "sheared" else [low * share for share in initial]
        assert all(share >= bound - 1e-12 for share, bound in zip(moved.current, least, strict=True))


@pytest.mark.parametrize("rule", RULES)
@given(degraded(), st.integers(0, 5), st.floats(0.1, 3))
def test_more_degradation_never_means_less(
    rule: str, case: tuple[tuple[float, ...], list[float]], which: int, more: float
) -> None:
    initial, gaps = case
    which %= len(gaps)
    before = reweight(rule, shares_of(initial), gaps).current[which]
    gaps[which] += more
    after = reweight(rule, shares_of(initial), gaps).current[which]
    assert after >= before - 1e-9
    if gaps[which] > max(gaps[:which] + gaps[which + 1 :]) + 0.1:
        assert after > initial[which] - SMOOTHING


@pytest.mark.parametrize("rule", RULES)
@given(degraded(), st.floats(0, 4))
def test_alike_degraded_sources_keep_their_shares(
    rule: str, case: tuple[tuple[float, ...], list[float]], gap: float
) -> None:
    initial, gaps = case
    moved = reweight(rule, shares_of(initial), [gap] * len(gaps), progress=1.0)
    assert moved.current == pytest.approx(initial, abs=SMOOTHING)
    assert moved.reference == pytest.approx(initial, abs=1e-9)


def test_shares_by_hand() -> None:
    """Δ = (0.3, 0.1): τ = 0.2, so the exponents are 1.5 and 0.5, and e^1.5 / (e^1.5 + e^0.5) = e / (e + 1)."""
    favoured = math.e / (math.e + 1)
    assert degradation_weights((0.5, 0.5), (0.3, 0.1))[0] == pytest.approx(0.7 * favoured + 0.15)
    assert degradation_weights((0.5, 0.5), (-0.3, -0.1)) == (0.5, 0.5)
    assert degradation_weights((0.8, 0.2), (0.2, -5.0))[0] == pytest.approx(
        0.7 * 0.8 * math.exp(2) / (0.8 * math.exp(2) + 0.2) + 0.3 * 0.8
    )
    # w e^max(Δ, 0): 0.75 · 2 against 0.25 · 1, then a ten-thousandth of all spread evenly.
    sheared = sheared_weights((0.75, 0.25), (math.log(2), -1.0))
    assert sheared[0] == pytest.approx((1 - 1e-4) * 1.5 / 1.75 + 1e-4 / 2)
    # Two equal sources, q = (1 ± d) / 2: the divergence is d² / 2, so at its bound d = sqrt(2 · 0.05).
    assert drpruning_weights((0.5, 0.5), (1.0, 0.4)) == pytest.approx((0.5 + 0.1**0.5 / 2, 0.5 - 0.1**0.5 / 2))
    assert drpruning_weights((0.5, 0.5), (1.0, 0.4), radius=9.0) == pytest.approx((0.9, 0.1)), "only the floor holds"
    # A tenth of the way from 0.5 to 0.9 and 0.1; then, from beyond the bounds, back to them.
    assert moved_reference((0.5, 0.5), (0.9, 0.1), (0.5, 0.5)) == pytest.approx((0.54, 0.46))
    assert moved_reference((0.4, 0.6), (1.0, 0.0), (0.2, 0.8)) == pytest.approx((0.4, 0.6))


@example(((0.75, 0.25), [5.0, math.nextafter(5.0, 0.0)]), 0)
@example(((0.75, 0.25), [5e-324, 0.0]), 0)
@given(degraded(), st.integers(0, 2**32 - 1))
def test_drpruning_is_the_worst_case_of_its_ball(case: tuple[tuple[float, ...], list[float]], seed: int) -> None:
    initial, gaps = case
    p, gap, floor, radius = np.array(initial), np.array(gaps), 0.2, 0.05

    def divergence(q: np.ndarray) -> float:
        return float(0.5 * (p * (q / p - 1) ** 2).sum())

    worst = np.array(drpruning_weights(initial, gaps, floor, radius))
    assert divergence(worst) <= radius + 1e-9
    if worst.min() > (floor * p).max() + 1e-6 and np.ptp(gap) > 1e-3:
        assert divergence(worst) == pytest.approx(radius, rel=1e-6), "as long as no floor is in the way it is used up"
    chance = np.random.default_rng(seed)
    for _ in range(50):
        direction = chance.normal(size=len(p))
        direction -= direction.mean()
        reach = math.sqrt(radius / divergence(p + direction))
        reach = min(reach, *((floor - 1) * p / direction)[direction < 0])
        other = p + reach * direction
        assert divergence(other) <= radius + 1e-9
        assert worst @ gap >= other @ gap - 1e-9


@settings(max_examples=20)
@given(degraded(), st.integers(0, 2**32 - 1))
def test_the_reference_stays_near_the_initial_shares(case: tuple[tuple[float, ...], list[float]], seed: int) -> None:
    initial, gaps = case
    shares = shares_of(initial)
    chance = np.random.default_rng(seed)
    for _ in range(30):
        shares = reweight("drpruning", shares, np.array(gaps) + chance.normal(size=len(gaps)), progress=0.5)
        assert math.isclose(sum(shares.reference), 1, abs_tol=1e-9)
        ratios = np.array(shares.reference) / np.array(initial)
        assert (ratios > 0.5 - 1e-9).all()
        assert (ratios < 2 + 1e-9).all()
    early = reweight("drpruning", shares_of(initial), gaps, progress=0.1)
    assert early.reference == initial


# --- the sampler ---------------------------------------------------------------------------------


def numbered(count: int, start: int = 0) -> Windows:
    return Windows(torch.arange(start * 3, (start + count) * 3).view(count, 3), "numbers", "none")


def sampler(sizes: list[int], weights: list[float], seed: int = 0, state: SamplerState | None = None) -> Sampler:
    bounds = list(itertools.accumulate(sizes, initial=0))
    ranges = [range(*pair) for pair in itertools.pairwise(bounds)]
    return Sampler(numbered(sum(sizes)), ranges, 4, seed, state or SamplerState(weights, [0] * len(sizes)))


def test_one_source_is_drawn_from_as_ever() -> None:
    alone, plain = sampler([10], [1.0], seed=3), batches(numbered(10), 4, seed=3)
    for _ in range(9):
        drawn, expected = next(alone), next(plain)
        assert torch.equal(drawn.ids_BT, expected.ids_BT)
        assert torch.equal(drawn.numbers_B, expected.numbers_B)
        assert drawn.scored_BT is None


def test_sources_are_drawn_by_their_weights_and_walked_through_whole() -> None:
    mixed = sampler([12, 5, 7], [0.6, 0.1, 0.3])
    numbers = [int(number) for batch in itertools.islice(mixed, 500) for number in batch.numbers_B]
    drawn = [[n for n in numbers if n < 12], [n for n in numbers if 12 <= n < 17], [n for n in numbers if n >= 17]]
    assert [len(part) for part in drawn] == mixed.state.taken
    assert [len(part) / 2000 for part in drawn] == pytest.approx([0.6, 0.1, 0.3], abs=0.03)
    for part, size in zip(drawn, (12, 5, 7), strict=True):
        counts = Counter(part)
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1
    mixed.state.weights = [0.0, 1.0, 0.0]
    assert all(12 <= int(n) < 17 for batch in itertools.islice(mixed, 20) for n in batch.numbers_B)


def test_a_sampler_goes_on_where_another_stood() -> None:
    first = sampler([12, 5], [0.7, 0.3], seed=8)
    for _ in range(11):
        next(first)
    state = SamplerState(list(first.state.weights), list(first.state.taken), first.state.batches)
    second = sampler([12, 5], [], seed=8, state=state)
    other = sampler([12, 5], [], seed=9, state=SamplerState([0.7, 0.3], [0, 0]))
    same = [next(first).numbers_B.tolist() for _ in range(9)]
    assert same == [next(second).numbers_B.tolist() for _ in range(9)]
    assert same != [next(other).numbers_B.tolist() for _ in range(9)]


# --- instructions --------------------------------------------------------------------------------

RECORDS = [
    {"instruction": "Name a tree.", "input": "", "output": "The oak."},
    {"instruction": "Which of these is older?", "input": "a pear, a stone", "output": "The stone."},
    {"instruction": "Say nothing.", "output": "  "},
    {"instruction": "Count.", "input": None, "output": "One, two."},
]
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETFUL = CHATML.replace("m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else '(cut)')")


@pytest.fixture
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def scored_text(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The whole text of windows, and what is scored of it."""
    assert windows.scored_NT is not None
    return tokenizer.decode(windows.ids_NT.flatten()), tokenizer.decode(windows.ids_NT[windows.scored_NT])


def test_alpaca_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = make_examples(RECORDS, tokenizer, "auto", "a.json")
    first, second, third = (example.pieces for example in examples)  # the blank response is gone
    assert first == (
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nName a tree.\n\n### Response:\n",
            False,
        ),
        ("The oak.", True),
    )
    assert second[0][0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nWhich of these is older?\n\n"
        "### Input:\na pear, a stone\n\n### Response:\n"
    )
    assert "### Input" not in third[0][0]
    tokens = sum(len(tokenizer("".join(text for text, _ in one.pieces))["input_ids"]) for one in examples)
    windows = pack_examples(examples, tokenizer, tokens + 6, bos="document", source="a.json")
    whole, scored = scored_text(windows, tokenizer)
    assert whole == "".join(f"<s>{prompt[0]}{response[0]}</s>" for prompt, response in (first, second, third))
    assert scored == "The oak.</s>The stone.</s>One, two.</s>"
    for bos, count in (("once", 1), ("none", 0)):
        windows = pack_examples(examples, tokenizer, tokens + 3 + count, bos=bos, source="a.json")
        assert scored_text(windows, tokenizer)[0].count("<s>") == count
        assert scored_text(windows, tokenizer)[1] == scored


def test_windows_without_a_response_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = make_examples(RECORDS, tokenizer, "alpaca", "a.json")
    windows = pack_examples(examples, tokenizer, 16, bos="document", source="a.json")
    assert windows.scored_NT[:, 1:].any(1).all()
    everything = sum(len(tokenizer(text)["input_ids"]) for example in examples for text, _ in example.pieces)
    assert len(windows) < everything // 16
    fewer = pack_examples(examples, tokenizer, 8, bos="document", source="", max_tokens=1)
    assert fewer.tokens < windows.tokens
    chosen = windows.first(2)
    assert torch.equal(chosen.scored_NT, windows.scored_NT[[0, -1]])
    batch = windows.batch(torch.tensor([1]))
    assert batch.tokens == int(windows.scored_NT[1, 1:].sum())
    assert join_windows([windows, chosen]).tokens == windows.tokens + chosen.tokens
    with pytest.raises(InputError, match=r"a\.json: \d+ tokens hold no window of 9999 with a response"):
        pack_examples(examples, tokenizer, 9999, bos="document", source="a.json")


def test_the_models_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    chat = {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"},
        {"role": "assistant", "content": "D."},
    ]}  # fmt: skip
    examples = make_examples([chat, RECORDS[1]], tokenizer, "auto", "a.json")
    text = "".join(piece for example in examples for piece, _ in example.pieces)
    length = sum(len(tokenizer("".join(text for text, _ in one.pieces))["input_ids"]) for one in examples)
    windows = pack_examples(examples, tokenizer, length, bos="document", source="a.json")
    whole, scored = scored_text(windows, tokenizer)
    assert whole == text
    assert text.startswith("<|system|>Be brief.</s><|user|>A?</s><|assistant|>B.</s><|user|>C?</s>")
    assert text.endswith("<|user|>Which of these is older?\n\na pear, a stone</s><|assistant|>The stone.</s>")
    assert scored == "B.</s>D.</s>The stone.</s>"
    tokenizer.chat_template = FORGETFUL
    [example] = make_examples([chat], tokenizer, "chat", "a.json")
    assert [piece for piece, counts in example.pieces if counts] == ["D.</s>"], "never written as it would be read"
    assert "(cut)" in example.pieces[0][0]


def test_a_response_is_tokenized_as_it_follows_its_prompt() -> None:
    """A tokenizer that marks the start of a text gives a response no mark of its own; one token across both counts."""
    letters = Tokenizer(models.BPE({"_": 0, "a": 1, "b": 2, "ab": 3, "</s>": 4}, [("a", "b")]))
    letters.normalizer = normalizers.Prepend("_")
    plain = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    for pieces, ids, scored in (
        ((("bb", False), ("aa", True)), [0, 2, 2, 1, 1, 4], [0, 0, 0, 1, 1, 1]),
        ((("ba", False), ("ba", True)), [0, 2, 3, 1, 4], [0, 0, 1, 1, 1]),
        ((("b", False), ("a", True), ("b", False), ("a", True)), [0, 2, 3, 1, 4], [0, 0, 0, 1, 1]),
    ):
        windows = pack_examples([Example(pieces, ended=False)], plain, len(ids), bos="document", source="")
        assert windows.ids_NT.tolist() == [ids]
        assert windows.scored_NT.int().tolist() == [scored]


@pytest.mark.parametrize(
    ("record", "template", "complaint"),
    [
        ({"instruction": "x"}, "", "record 2 has no field 'output' but instruction"),
        ({"output": "x", "input": "y"}, "", "record 2 has no field 'instruction' but output, input"),
        ({"instruction": 3, "output": "x"}, "", "record 2: field 'instruction' is of type int, not text"),
        ({"instruction": "x", "input": [1], "output": "x"}, "", "record 2: field 'input' is of type list, not text"),
        ({"messages": "hello"}, CHATML, "record 2: field 'messages' is not a list of objects"),
        ({"messages": [{"role": "user"}]}, CHATML, "record 2, message 1 has no field 'content' but role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, CHATML, "record 2: no turn of the assistant follows"),
        ({"instruction": "x", "output": "y"}, "{{ raise_exception('no') }}", "chat template refuses it: no"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "", "holds messages, for which .* no template"),
    ],
)
def test_what_is_wrong_with_a_record(
    record: dict[str, object], template: str, complaint: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template or None
    good = {"instruction": "x", "output": " "}
    with pytest.raises(InputError, match=f"a.json: .*{complaint}|a.json: {complaint}|a.json: record.*{complaint}"):
        make_examples([good, record], tokenizer, "auto", "a.json")


def test_what_is_wrong_with_instructions(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json holds no responses"):
        make_examples(RECORDS[2:3], tokenizer, "auto", "a.json")
    with pytest.raises(InputError, match="no chat template; use alpaca"):
        make_examples(RECORDS, tokenizer, "chat", "a.json")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"give a \.jsonl, \.json or \.parquet file"):
        load_records(str(tmp_path / "a.txt"))
    with pytest.raises(InputError, match=r"a\.json holds no records"):
        load_records(str(tmp_path / "a.json"))
    with pytest.raises(InputError, match="there is no text file"):
        load_records(str(tmp_path / "b.json"))


def test_records_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:2], indent=4))
    assert load_records(str(tmp_path / "a.json")) == RECORDS[:2]
    chats = [{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(chats[0]))
    assert load_records(str(tmp_path / "a.jsonl")) == chats


# --- the loss ------------------------------------------------------------------------------------


def test_only_scored_tokens_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    scored = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    nll = -logits.double().log_softmax(-1)
    expected = (nll[0, 1, ids[0, 2]] + nll[0, 2, ids[0, 3]] + nll[1, 3, ids[1, 4]]) / 3  # the first has no context
    assert float(language_loss(logits, ids, scored)) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(language_loss(logits, ids, torch.ones_like(scored)), language_loss(logits, ids))


def test_the_held_out_loss_is_the_same_masked_mean() -> None:
    model = build("llama-gqa")
    ids = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    windows = Windows(ids, "", "none", scored)
    with torch.no_grad():
        expected = language_loss(model(input_ids=ids, use_cache=False).logits, ids, scored)
    assert held_out_nll(model, windows, 2) == pytest.approx(float(expected), rel=1e-6)
    assert windows.sha256 != Windows(ids, "", "none").sha256


# --- stages and rounds ---------------------------------------------------------------------------


def corpus(*stages: str, weights: tuple[float, ...] = ()) -> Corpus:
    weights = weights or (1.0,) * len(stages)
    sources = zip("abcdef", stages, weights, strict=False)
    return Corpus(tuple(
        Source(name, stage, weight, numbered(8, 10 * number), numbered(2, 10 * number))
        for number, (name, stage, weight) in enumerate(sources)
    ))  # fmt: skip


class Losses:
    """A model whose loss on source n is what a test says."""

    def __init__(self, *losses: float) -> None:
        self.losses = list(losses)
        self.measured = 0

    def __call__(self, windows: Windows) -> float:
        self.measured += 1
        return self.losses[int(windows.ids_NT[0, 0]) // 30]


def mix_of(text: Corpus, losses: Losses, steps: int = 20, size: int = 8, **settings: object) -> DataMix:
    named = {f"recovery.{key}": value for key, value in settings.items()}
    named |= {"training.steps": steps, "training.batch_size": size, "recovery.interval": 4}
    mix = DataMix(text, load_recipe("magnitude", named), losses)
    mix.remember_dense()
    return mix


def test_what_is_calibrated_on_is_pretraining_text_in_its_shares_and_mixed() -> None:
    """Windows of source n have numbers from 30 n on (8 of them, at most 3 tokens apart)."""
    text = corpus("pretrain", "instruct", "pretrain", weights=(3, 1, 1)).pretrain
    for windows in (text.sample(8), text.held_out(2)):
        assert {int(ids[0]) // 30 for ids in windows.ids_NT} <= {0, 2}
    of_source = [int(ids[0]) // 30 for ids in text.sample(8).ids_NT]
    assert (of_source.count(0), of_source.count(2)) == (6, 2)
    assert of_source[:4].count(2) == of_source[4:].count(2) == 1, "head and tail are alike"
    assert len(text.sample(100).ids_NT) == 16, "all that there is"
    alone = corpus("pretrain", "instruct").pretrain
    assert torch.equal(alone.sample(3).ids_NT, numbered(8).first(3).ids_NT)
    assert torch.equal(alone.held_out(9).ids_NT, numbered(2).ids_NT)


def test_shares_follow_the_rounds() -> None:
    losses = Losses(1.0, 2.0)
    mix = mix_of(corpus("pretrain", "pretrain", weights=(3, 1)), losses, mixture="degradation")
    assert mix.dense == [1.0, 2.0]
    mix.before_step(0, all_cut=False)
    assert mix.stage.sampler.state.weights == [0.75, 0.25], "nothing has degraded yet"
    for step in range(1, 4):
        losses.losses = [1.1, 2.4]
        mix.before_step(step, all_cut=True)
        assert len(mix.history) == 1
    mix.before_step(4, all_cut=True)
    expected = degradation_weights((0.75, 0.25), (0.1, 0.4))
    assert mix.stage.sampler.state.weights == pytest.approx(expected)
    assert expected[1] > 0.25
    entry = mix.history[1]
    assert (entry["step"], entry["stage"], entry["losses"]) == (4, "pretrain", {"a": 1.1, "b": 2.4})
    assert entry["weights"] == pytest.approx({"a": expected[0], "b": expected[1]})
    assert entry["degradation"] == pytest.approx({"a": 0.1, "b": 0.4})
    losses.losses = [math.nan, 2.4]
    mix.before_step(8, all_cut=True)
    assert mix.stage.sampler.state.weights == pytest.approx(expected), "what is not finite moves nothing"


def test_instructions_come_last() -> None:
    mix = mix_of(corpus("pretrain", "instruct", "pretrain"), Losses(1, 2, 3), steps=20, instruct_share=0.3)
    stages = []
    for step in mix.steps():
        mix.before_step(step, all_cut=True)
        stages.append(mix.stage.name)
        numbers = set(next(mix).numbers_B.tolist())
        assert numbers <= (set(range(8, 16)) if stages[-1] == "instruct" else {*range(8), *range(16, 24)})
    assert stages == ["pretrain"] * 14 + ["instruct"] * 6
    assert [entry["step"] for entry in mix.history] == [0, 4, 8, 12, 14, 18], "a stage begins with a round"
    assert mix.history[-1]["weights"] == {"a": 0.0, "b": 1.0, "c": 0.0}
    # A half each of what is left of the seven tenths, and three tenths of the second.
    assert mix.validation_loss(20) == pytest.approx(0.35 * 1 + 0.3 * 2 + 0.35 * 3)
    drawn = {name: one["sequences_drawn"] for name, one in mix.summary()["sources"].items()}
    assert drawn["b"] == 6 * 8
    assert drawn["a"] + drawn["c"] == 14 * 8


@pytest.mark.parametrize("mixture", ["fixed", "degradation"])
def test_what_will_be_drawn_is_known_before(mixture: str) -> None:
    """To the window while the shares stand; else any window may come."""
    mix = mix_of(corpus("pretrain", "instruct"), Losses(1, 2), steps=2, size=3, instruct_share=0.5, mixture=mixture)
    both = mix_of(corpus("pretrain", "pretrain"), Losses(1, 2), steps=2, size=3, mixture=mixture)
    upcoming, of_both = mix.upcoming().tolist(), both.upcoming().tolist()
    for each in (mix, both):
        drawn = set()
        for step in each.steps():
            each.before_step(step, all_cut=True)
            drawn |= set(next(each).numbers_B.tolist())
        assert drawn <= set(each.upcoming().tolist())
        assert sorted(drawn) == (upcoming if each is mix else of_both) or mixture != "fixed"
    assert len(upcoming) == 6, "one source a stage: nothing moves"
    assert len(of_both) == (6 if mixture == "fixed" else 16)


def test_a_stage_ends_when_it_gains_nothing() -> None:
    losses = Losses(1.0, 1.0)
    mix = mix_of(corpus("pretrain", "instruct"), losses, steps=40, instruct_share=0.5, tolerance=0.05)
    gaps = {0: 1.0, 4: 0.5, 8: 0.49, 20: 0.3, 24: 0.2, 28: 0.1, 32: 0.09}
    taken = []
    for step in mix.steps():
        losses.losses = [1.0 + gaps.get(step, 0.0)] * 2
        mix.before_step(step, all_cut=step > 0)
        if not mix.has_ended(step):
            taken.append(step)
    # Measured when all is cut: 0.5 at step 4, 0.49 at step 8, a gain of two per cent.
    assert taken == [*range(8), *range(20, 40)]
    assert mix.summary()["ended_early_at"] == {"pretrain": 8}


def test_a_stage_ends_after_its_rounds() -> None:
    mix = mix_of(corpus("pretrain"), Losses(1.0), steps=40, max_rounds=2)
    taken = []
    for step in mix.steps():
        mix.before_step(step, all_cut=step >= 10)  # the round that begins at step 12 is the first that counts
        if not mix.has_ended(step):
            taken.append(step)
    assert taken == list(range(20))


def test_a_single_source_is_not_measured() -> None:
    losses = Losses(1.5)
    mix = mix_of(corpus("pretrain"), losses, mixture="drpruning")
    for step in mix.steps():
        mix.before_step(step, all_cut=True)
    mix.record(20)
    assert (losses.measured, mix.history, mix.in_rounds) == (0, [], False)
    assert mix.validation_loss(20) == 1.5
    assert torch.equal(next(mix).ids_BT, next(batches(numbered(8), 8, seed=0)).ids_BT)
    scored_on = calibration_batches(mix.corpus, mix.recipe)
    assert torch.equal(next(scored_on).ids_BT, next(batches(numbered(8), 8, seed=1)).ids_BT)


# --- what a law foretells ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law", [LossLaw(3.0, 0.5, 0.25, 1.2), LossLaw(40.0, 1.0, 0.0, 0.0), LossLaw(0.7, 0.1, 2.0, 3.0)]
)
def test_a_law_is_found_again(law: LossLaw) -> None:
    points = [(64.0 * n, 0.05 * n + 0.01) for n in range(1, 9)] + [(64.0 * n, 0.5) for n in range(9, 17)]
    found = fit_loss_law(*zip(*points, strict=True), [law(*point) for point in points])
    for point in (*points, (1e4, 0.5)):
        assert found(*point) == pytest.approx(law(*point), rel=1e-6)


def test_where_as_much_was_removed_throughout_only_the_sequences_tell() -> None:
    law = LossLaw(5.0, 0.3, 0.0, 2.0)
    counts = [8.0 * n for n in range(1, 20)]
    found = fit_loss_law(counts, [0.5] * 19, [law(n, 0.5) for n in counts])
    assert (found.c, found.b) == (0.0, pytest.approx(0.3))
    assert found(1e5, 0.5) == pytest.approx(law(1e5, 0.5), rel=1e-6)


@given(st.lists(st.floats(0.1, 9), min_size=3, max_size=12), st.integers(0, 99))
def test_a_law_is_no_worse_than_the_mean_and_never_below_zero(losses: list[float], seed: int) -> None:
    chance = np.random.default_rng(seed)
    counts = np.cumsum(chance.integers(1, 50, len(losses))).tolist()
    removed = chance.uniform(0.01, 0.9, len(losses)).tolist()
    law = fit_loss_law(counts, removed, losses)
    assert min(law.a, law.b, law.c, law.e) >= 0
    errors = [law(n, s) - y for n, s, y in zip(counts, removed, losses, strict=True)]
    assert np.square(errors).sum() <= np.square(losses - np.mean(losses)).sum() * (1 + 1e-9) + 1e-12


def test_shares_follow_what_the_losses_are_foretold_to_come_to() -> None:
    """After ten measurements; until then the dense model's losses are what counts."""
    laws = LossLaw(2.0, 0.5, 0.5, 0.9), LossLaw(6.0, 0.25, 0.1, 0.5)
    losses = Losses(1.0, 1.0)
    mix = mix_of(corpus("pretrain", "pretrain"), losses, steps=80, mixture="drpruning")
    removed, aim, expected = (lambda step: min(0.5, 0.01 * (step + 4))), 0.5, []
    seen: list[list[float]] = []
    for step in mix.steps():
        drawn, state = list(mix.stage.sampler.state.taken), mix.stage.state
        if all(drawn):
            losses.losses = [law(n, removed(step)) for law, n in zip(laws, drawn, strict=True)]
        shares = state.shares
        mix.before_step(step, all_cut=False, removed=removed(step), aim=aim)
        if step % 4 == 0 and step:
            seen.append(losses.losses)
            if step >= 44:
                now = [law(n * 80 / step, aim) for law, n in zip(laws, drawn, strict=True)]
                lowest = [min(each) for each in zip(*seen, strict=True)]
                expected = [min(each) for each in zip(now, lowest, expected or now, strict=True)]
                assert state.foretold == pytest.approx(expected, rel=1e-3)
                assert mix.history[-1]["foretold"] == dict(zip("ab", state.foretold, strict=True))
            else:
                assert not state.foretold
                assert "foretold" not in mix.history[-1]
            references = state.foretold or [1.0, 1.0]
            gaps = [loss - reference for loss, reference in zip(losses.losses, references, strict=True)]
            assert state.shares.current == pytest.approx(drpruning_weights(shares.reference, gaps))
        next(mix)
    assert len(state.seen) == 19


def test_what_is_gated_off_counts_as_removed_where_shares_are_found() -> None:
    """DRPruning foretells losses once something is removed, be it cut (a teacher on disk) or closed (`self`)."""
    rounds = []
    for teacher in ("auto", "self"):
        settings = {
            "training.steps": 16, "training.batch_size": 2, "training.eval_interval": 100, "lora.dropout": 0.0,
            "recovery.interval": 1, "recovery.mixture": "drpruning", "pruning.sparsity": 0.5,
            "distillation.weight": 0.5, "distillation.teacher": teacher,
        }  # fmt: skip
        model = build("llama-gqa")
        done = train(
            model, with_lora(model, fill=False), load_recipe("magnitude", settings), corpus("pretrain", "pretrain"),
            Silent(), teacher_folder=Path("unused"), on_cut=lambda event: None, on_validation=lambda history: None,
        )  # fmt: skip
        rounds.append(done.history.mixture)
    assert sum("foretold" in each for each in rounds[0]) == sum("foretold" in each for each in rounds[1]) > 0
    for cut, closed in zip(*rounds, strict=True):
        assert closed["weights"] == pytest.approx(cut["weights"], rel=1e-3)


def test_nothing_is_foretold_above_what_has_been_seen() -> None:
    losses = Losses(1.0, 1.0)
    mix = mix_of(corpus("pretrain", "pretrain"), losses, steps=80, mixture="drpruning")
    for step in mix.steps():
        losses.losses = [2.0 + 0.01 * step, 3.0]  # one rises, one stays
        mix.before_step(step, all_cut=True, removed=0.5)
        next(mix)
    assert mix.stage.state.foretold == [pytest.approx(2.04), pytest.approx(3.0)]
    again = mix_of(corpus("pretrain", "pretrain"), losses, steps=80, mixture="drpruning")
    again.go_on(mix.state(), 79)
    assert again.stage.state == mix.stage.state


# --- sources in a recipe -------------------------------------------------------------------------


def test_sources_are_listed_once() -> None:
    [single] = list_sources(Data(source="texts/a.jsonl", text_field="body"))
    assert (single.name, single.source, single.text_field, single.stage) == (
        "a.jsonl",
        "texts/a.jsonl",
        "body",
        "pretrain",
    )
    both = list_sources(Data(source="a.txt", instructions="b.json"))
    assert [(source.source, source.stage) for source in both] == [("a.txt", "pretrain"), ("b.json", "instruct")]
    [own] = list_sources(Data())
    assert own.stage == "pretrain"
    several = (TextSource(name="a", source="a.txt"), TextSource(name="a", source="b.txt"))
    for data, complaint in (
        (Data(sources=(TextSource(name="b", source="b.json", stage="instruct"),)), "no text of the pretrain stage"),
        (Data(source="a.txt", sources=several), "are both given"),
        (Data(sources=several), "2 sources of text are called 'a'"),
    ):
        with pytest.raises(InputError, match=complaint):
            list_sources(data)
    with pytest.raises(InputError, match=r"unknown key 'data\.sources\.0\.wieght' \(did you mean 'weight'\?\)"):
        load_recipe("regrow", {"data.sources": [{"name": "a", "source": "a.txt", "wieght": 2}]})


@pytest.fixture
def several(text: Path, tmp_path: Path) -> dict[str, object]:
    """Two texts and instructions, as settings."""
    lines = [{"body": STORY.format(number=n)[::-1]} for n in range(120)]
    (tmp_path / "reversed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [{"instruction": f"What is {n}?", "input": "", "output": STORY.format(number=n)} for n in range(150)]
    (tmp_path / "instructions.json").write_text(json.dumps(records))
    return {
        "data.sources": [
            {"name": "stories", "source": str(text), "weight": 3},
            {"name": "reversed", "source": str(tmp_path / "reversed.jsonl"), "text_field": "body"},
        ],
        "data.instructions": str(tmp_path / "instructions.json"),
    }


def test_every_source_is_held_out_of(several: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_recipe("regrow", {**several, "data.sequence_length": 32}).data
    found, test = read_corpus(data, tokenizer, max_tokens=10**6, eval_windows=4, seed=0)
    assert [(s.name, s.stage, s.weight) for s in found.sources] == [
        ("stories", "pretrain", 3), ("reversed", "pretrain", 1), ("instructions", "instruct", 1)
    ]  # fmt: skip
    assert [len(source.validation) for source in found.sources] == [4, 4, 4]
    assert [part.stop for part in found.ranges][-1] == len(found.train) == sum(len(s.train) for s in found.sources)
    for source, part in zip(found.sources, found.ranges, strict=True):
        assert torch.equal(found.train.ids_NT[part.start : part.stop], source.train.ids_NT)
    assert found.train.scored_NT[: found.ranges[2].start].all()
    assert any(document.startswith("Once upon") for document in test)
    assert any(document.endswith("nopu ecnO") for document in test)
    assert not any("instruction" in document for document in test)
    limited, none = read_corpus(
        data.model_copy(update={"eval_source": "other.txt"}), tokenizer, max_tokens=100, eval_windows=4, seed=0
    )
    assert [len(source.train) for source in limited.sources[:2]] == [3, 3]
    assert not none


def test_a_run_with_several_sources(several: dict[str, object], checkpoint: Path, tmp_path: Path) -> None:
    changes = {**QUICK, **several, "recovery.mixture": "degradation", "recovery.interval": 3}
    changes["recovery.instruct_share"] = 0.4
    result = regrow.prune(str(checkpoint), tmp_path / "out", "magnitude", steps=10, overrides=changes)
    results = json.loads((result.folder / "results.json").read_text())
    mixture = results["training"]["mixture"]
    history = json.loads((result.folder / "history.json").read_text())
    assert history["mixture"] == mixture["rounds"]
    assert [(one["step"], one["stage"]) for one in mixture["rounds"]] == [
        (0, "pretrain"), (3, "pretrain"), (6, "instruct"), (9, "instruct"), (10, "instruct")
    ]  # fmt: skip
    first = mixture["rounds"][0]
    assert first["weights"]["stories"] + first["weights"]["reversed"] == pytest.approx(1)
    assert all(abs(gap) > 0 for gap in first["degradation"].values()), "half of the model is gone"
    assert mixture["sources"]["stories"]["initial_share"] == 0.75
    assert sum(one["sequences_drawn"] for one in mixture["sources"].values()) == 10 * 4
    report = (result.folder / "report.md").read_text()
    assert "## Data over time" in report
    for one in mixture["rounds"]:
        assert f"{one['weights']['stories']:.1%}, {one['losses']['stories']:.4f}" in report
    assert results["perplexity"]["pruned"]["window-32"]["source"].endswith("reversed.jsonl (held-out documents)")


def test_training_goes_on_with_the_next_stage() -> None:
    """A stage that ends early takes its steps, and their learning rates, with it."""
    recipe = load_recipe(
        "magnitude",
        {"training.steps": 12, "training.batch_size": 2, "training.eval_interval": 100, "lora.dropout": 0.0}
        | {"training.schedule": "linear", "training.warm_up": 0.0, "training.learning_rate": 1e-3}
        | {"recovery.interval": 2, "recovery.max_rounds": 2, "recovery.instruct_share": 0.25},
    )
    model = build("llama-gqa")
    groups = with_lora(model, fill=False)
    rates, seen = [], []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trained = train(
        model, groups, recipe, corpus("pretrain", "instruct"), Silent(), teacher_folder=Path("unused"),
        on_cut=lambda event: seen.append(event.step), on_validation=lambda history: None,
    )  # fmt: skip
    hook.remove()
    taken = [0, 1, 2, 3, 9, 10, 11]
    assert [entry["step"] for entry in trained.history.steps] == taken
    assert rates == pytest.approx([1e-3 * (1 - step / 12) for step in taken])
    assert seen == [0]
    assert [entry["step"] for entry in trained.history.validations] == [0, 4, 12], "also where a stage ends"
    assert [(entry["step"], entry["stage"]) for entry in trained.history.mixture] == [
        (0, "pretrain"), (2, "pretrain"), (4, "pretrain"), (9, "instruct"), (11, "instruct"), (12, "instruct")
    ]  # fmt: skip
    assert trained.summary["steps"] == 7
    assert trained.summary["tokens"] == 7 * 2 * 3
    assert trained.summary["mixture"]["ended_early_at"] == {"pretrain": 4}

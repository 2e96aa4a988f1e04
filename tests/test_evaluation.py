"""Perplexity, size, speed, memory and sample text, each against something worked out without the package."""

import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
)

from regrow.checkpoint.load import check_length, load_tokenizer, pick_device
from regrow.checkpoint.offloaded import load
from regrow.errors import InputError
from regrow.evaluation import perplexity as perplexity_module
from regrow.evaluation.compare import compare
from regrow.evaluation.generate import complete
from regrow.evaluation.memory import Memory, measure_memory
from regrow.evaluation.perplexity import perplexity, window_losses
from regrow.evaluation.size import measure_size
from regrow.evaluation.speed import Rate, Speed, Speedup, measure_speed, ratios
from regrow.planning.plan import Plan
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.structure.finding import find_groups

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 32, 2, 4, 2, 8, 48, 50


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def windows(count: int = 5, length: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def reference_losses(model: LlamaForCausalLM, windows_NT: Tensor) -> list[float]:
    """One window at a time, position by position, log-sum-exp in float64."""
    losses = []
    for ids_T in windows_NT:
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0].double()
        scored = zip(logits_TV[:-1], ids_T[1:], strict=True)
        losses.append(sum(float(row.exp().sum().log() - row[target]) for row, target in scored))
    return losses


# Perplexity


def test_perplexity_equals_a_float64_reference() -> None:
    model, windows_NT = tiny().eval(), windows()
    per_token = [loss / 8 for loss in reference_losses(model, windows_NT)]
    mean = sum(per_token) / 5
    variance = sum((loss - mean) ** 2 for loss in per_token) / 4

    found = perplexity(model, windows_NT, batch_size=2)

    assert found.nll == pytest.approx(mean, rel=1e-6)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.standard_error == pytest.approx(math.sqrt(variance / 5), rel=1e-4)
    assert (found.tokens, found.windows, found.window) == (5 * 8, 5, 9)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_losses_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, windows_NT = tiny(), windows()
    seen: list[int] = []
    losses_N = window_losses(model, windows_NT, batch_size, seen.append)
    assert losses_N.shape == (5,)
    assert losses_N.dtype == torch.float64
    assert losses_N.tolist() == pytest.approx(reference_losses(model.eval(), windows_NT), rel=1e-6)
    assert sum(seen) == 5
    assert max(seen) <= batch_size


def test_losses_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows_NT = tiny(), windows()
    whole = window_losses(model, windows_NT, 5, None)
    monkeypatch.setattr(perplexity_module, "LOGITS_AT_ONCE", 3 * 5 * VOCABULARY)  # 3 positions, of 8
    assert window_losses(model, windows_NT, 5, None).tolist() == pytest.approx(whole.tolist(), rel=1e-12)


def test_an_indifferent_model_has_the_vocabulary_as_its_perplexity() -> None:
    model = tiny()
    nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, windows())
    assert found.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def test_a_single_window_has_no_standard_error() -> None:
    assert perplexity(tiny(), windows(count=1)).standard_error is None


def test_every_module_gets_its_mode_back_and_dropout_is_off() -> None:
    model = tiny(attention_dropout=0.5).train()
    model.lm_head.eval()
    first, second = perplexity(model, windows()), perplexity(model, windows())
    assert first == second
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_nan_weights_are_the_users_to_mend() -> None:
    model = tiny()
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, math.nan)
    with pytest.raises(InputError, match=r"window 0 is nan \(5 of 5 .* weights"):
        perplexity(model, windows())


def test_the_error_names_the_window_with_the_bad_loss() -> None:
    model, windows_NT = tiny(), windows() % (VOCABULARY - 1)
    windows_NT[3, 2] = VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = math.inf
    with pytest.raises(InputError, match=r"window 3 is nan \(1 of 5"):
        perplexity(model, windows_NT)


# Size

BLOCK_LINEARS = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * WIDTH
NORMS = HIDDEN * (2 * LAYERS + 1)
EMBEDDING = VOCABULARY * HIDDEN


@pytest.mark.parametrize("tied", [False, True])
def test_size_equals_a_count_by_hand(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    length = 16
    size = measure_size(model, length)

    inner = LAYERS * BLOCK_LINEARS + NORMS
    assert size.non_embedding == inner
    assert size.total == inner + (1 if tied else 2) * EMBEDDING
    rotary = 2 * HEAD_DIM // 2  # transformers keeps the inverse frequencies twice, as buffers
    assert size.bytes == 4 * (size.total + rotary)
    attention = 2 * HEADS * HEAD_DIM * length  # per token: scores and weighted sum over all positions
    products = LAYERS * (BLOCK_LINEARS + attention) + EMBEDDING
    assert size.macs_per_token in (products, products + HEAD_DIM // 2)  # older transformers: rotary angles are one, too
    assert size.length == length


def test_no_more_positions_are_counted_than_there_are() -> None:
    """GPT-Neo keeps its masks in buffers of its positions."""
    assert measure_size(zoo.build("GPT-Neo"), 256).length == 64
    assert measure_size(zoo.build("BLOOM"), 256).length == 256, "it states no limit"


def test_bytes_follow_the_type() -> None:
    single, half = measure_size(tiny()), measure_size(tiny().bfloat16())
    assert single.total == half.total
    assert half.bytes * 2 == pytest.approx(single.bytes, rel=1e-3)


def test_measuring_size_leaves_the_model_as_it_was() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_size(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Speed


def test_speed_interleaves_the_models_and_gives_all_the_same_ids() -> None:
    models = {"dense": tiny(), "pruned": tiny(vocab_size=30)}
    calls: list[tuple[str, tuple[int, ...]]] = []
    prompts: dict[str, list[Tensor]] = {"dense": [], "pruned": []}

    def record(name: str, model: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, tuple(kwargs["input_ids"].shape)))
            if kwargs["input_ids"].shape[1] > 1:
                prompts[name].append(kwargs["input_ids"])

        model.register_forward_pre_hook(hook, with_kwargs=True)

    for name, model in models.items():
        record(name, model)
    measure_speed(models, batches=(1, 2), prompt=6, new_tokens=2, repeats=2, warm_up=1)

    expected = []
    for batch in (1, 2):
        for _ in range(3):
            for name in ("dense", "pruned"):
                expected += [(name, (batch, 6)), (name, (batch, 1)), (name, (batch, 1))]
    assert calls == expected
    for one, other in zip(prompts["dense"], prompts["pruned"], strict=True):
        assert torch.equal(one, other)
        assert int(one.max()) < 30


def test_speed_divides_tokens_by_seconds_and_forgets_the_warm_up() -> None:
    # Three readings a turn: start, prompt read, written. Warm-up, then two timed turns with other durations.
    ticks = iter([0.0, 9.0, 99.0, 100.0, 102.0, 103.0, 200.0, 201.0, 205.0])
    turns: list[str] = []
    models = {"only": tiny().train()}
    clock = ticks.__next__
    found = measure_speed(models, (2,), 8, 4, repeats=2, warm_up=1, on_repeat=turns.append, clock=clock)
    (speed,) = found["only"]
    assert speed.prefill == Rate(median=12.0, low=10.0, high=14.0)  # of 16/2 and 16/1
    assert speed.decode == Rate(median=5.0, low=3.5, high=6.5)  # of 8/1 and 8/4
    assert (speed.batch, speed.prompt, speed.new_tokens, speed.repeats) == (2, 8, 4, 2)
    assert (speed.threads, speed.device) == (torch.get_num_threads(), "cpu")
    assert turns == ["only"] * 3


def test_timed_decoding_is_greedy_generation() -> None:
    model = tiny().eval()
    fed: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    measure_speed({"only": model}, (2,), 6, 5, repeats=1, warm_up=0)
    handle.remove()
    expected = model.generate(fed[0], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    # The end token is barred in `generate` until the last step and never in the timed loop.
    assert model.generation_config.eos_token_id not in torch.cat(fed, 1)
    assert torch.equal(torch.cat(fed, 1), expected)


def test_a_model_that_keeps_nothing_is_given_everything_again() -> None:
    config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = OpenAIGPTLMHeadModel(config).eval()
    fed: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    measure_speed({"only": model}, (1,), 4, 3, repeats=1, warm_up=0)
    handle.remove()
    assert [ids.shape[1] for ids in fed] == [4, 5, 6, 7]
    assert torch.equal(fed[-1], model.generate(fed[0], max_new_tokens=3, do_sample=False, pad_token_id=0))


def test_prompts_are_clipped_to_the_smallest_model() -> None:
    models = {"long": tiny(), "short": tiny(max_position_embeddings=16)}
    found = measure_speed(models, (1,), 128, 6, repeats=1, warm_up=0)
    assert [speed.prompt for (speed,) in found.values()] == [10, 10]
    with pytest.raises(InputError, match="short has only 16 positions; 16 new tokens"):
        measure_speed(models, (1,), 128, 16)


def test_ratios_compare_medians() -> None:
    def speed(prefill: float, decode: float) -> Speed:
        return Speed(4, 8, 8, Rate(prefill, 0, 0), Rate(decode, 0, 0), 3, 1, "cpu")

    assert ratios([speed(10, 2)], [speed(25, 3)]) == (Speedup(4, 2.5, 1.5),)


# Memory


def test_a_bigger_checkpoint_takes_more_memory(tmp_path: Path) -> None:
    peaks = {}
    for name, hidden in (("small", 128), ("large", 512)):
        model = tiny(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4)
        model.save_pretrained(tmp_path / name)
        size = measure_size(model).bytes
        memory = measure_memory(tmp_path / name, pick_device(), batch=2, length=32)
        peaks[name] = (size, memory.peak_bytes)
        if memory.device == "cpu":
            assert memory.peak_bytes >= size
        assert (memory.batch, memory.length) == (2, 32)
    sizes, measured = zip(peaks["small"], peaks["large"], strict=True)
    difference = sizes[1] - sizes[0]
    assert difference > 50e6
    assert 0.8 * difference < measured[1] - measured[0] < 2.5 * difference


def test_a_checkpoint_that_cannot_be_served_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"serving .*nothing.* failed: "):
        measure_memory(tmp_path / "nothing", torch.device("cpu"))


# Sample text


def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_what_is_completed_stays_within_the_models_positions() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 12}
    model, tokenizer = AutoModelForCausalLM.from_config(GPT2Config(**sizes)), words()
    model.generation_config.eos_token_id = None
    prompt = [f"w{number % 7}" for number in range(20)]
    text = complete(model, tokenizer, " ".join(prompt), new_tokens=5)
    assert text == complete(model, tokenizer, " ".join(prompt[-7:]), new_tokens=5)
    assert len(text.split()) == 5
    assert len(complete(model, tokenizer, "w1 w2", new_tokens=40).split()) == 11
    check_length(model.config, 12)
    with pytest.raises(InputError, match="longer than the 12 positions"):
        check_length(model.config, 13)


def test_complete_is_what_greedy_generation_writes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, prompt = tiny().train(), words(), "w3 w1 w4"
    ids = torch.tensor([[3, 1, 4]])
    model.generation_config.eos_token_id = VOCABULARY - 1
    expected = model.eval().generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, 3:]
    model.train()

    # What a checkpoint's own generation settings may say besides must neither sample nor complain.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, num_beams=2, max_length=5)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = complete(model, tokenizer, prompt, new_tokens=7)

    assert text.split() == tokenizer.convert_ids_to_tokens(expected.tolist())
    assert text.startswith(" ")  # the prompt is left out, the space after it is not
    assert caplog.text == ""
    assert model.training


# Dense beside pruned


@pytest.mark.parametrize("room", ["for both", "for one", "for none"])
def test_what_does_not_fit_is_evaluated_all_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """On a device that a model fills, as a quantised base may have been trained on one."""
    alive: list[weakref.ref[Any]] = []

    def crowded(name: str, device: torch.device, *, offload: str, trust_remote_code: bool) -> Any:
        there = sum(ref() is not None for ref in alive)
        if offload == "none" and there >= {"for both": 2, "for one": 1, "for none": 0}[room]:
            raise torch.OutOfMemoryError("no room")
        model = load(name, device, offload=offload, trust_remote_code=trust_remote_code)
        alive.append(weakref.ref(model))
        return model

    def served(checkpoint: Path, device: torch.device, trust_remote_code: bool) -> Memory:
        if room == "for none":
            raise InputError(f"serving {checkpoint} failed: torch.OutOfMemoryError")
        return Memory(1, 1, 256, "cpu")

    monkeypatch.setattr("regrow.evaluation.compare.load", crowded)
    monkeypatch.setattr("regrow.evaluation.compare.measure_memory", served)
    groups = find_groups(load(str(checkpoint), torch.device("cpu")))
    settings = {"evaluation.windows": [16], "evaluation.max_windows": 4, "evaluation.speed_batches": [1]}
    recipe = load_recipe("loraprune", settings | {"evaluation.completions": 1})
    heard = Hearing()
    found = compare(
        str(checkpoint), str(checkpoint), groups, Plan.whole(groups), ["one two three " * 20] * 8, "words",
        load_tokenizer(str(checkpoint)), recipe, torch.device("cpu"), heard,
    )  # fmt: skip
    told = {kind: found["perplexity"][kind]["window-16"]["value"] for kind in ("dense", "cut", "pruned")}
    assert math.isfinite(told["dense"])
    assert told["dense"] == told["cut"] == pytest.approx(told["pruned"])
    assert found["size"]["dense"] == found["size"]["pruned"]
    assert ("speed" in found) == ("speedup" in found) == ("memory" in found) == (room != "for none")
    layer_by_layer = [line for line in heard.said if "layer by layer" in line]
    assert (len(layer_by_layer), sum("not measured" in line for line in heard.said)) == (
        (2, 2) if room == "for none" else (0, 0)
    )


class Hearing(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_device_without_float64_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device("auto").type == "cpu"
    zeros = torch.zeros

    def on_apple(size: int, dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return zeros(size, dtype=dtype)

    monkeypatch.setattr("torch.zeros", on_apple)
    with pytest.raises(InputError, match="device 'mps' has no float64, in which losses and scores are added up"):
        pick_device("mps")

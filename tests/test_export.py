"""What is exported computes what the checkpoint does: padded, as GGUF, as ONNX."""

import ctypes
import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from conftest import FAMILIES, CommandLine, make_tokenizer, random_keep, uniform_keep
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu, softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import regrow
from regrow.checkpoint.load import load_model, load_tokenizer
from regrow.checkpoint.save import needs_remote_code, save_checkpoint
from regrow.checkpoint.shape import describe
from regrow.checkpoint.verify import verify_checkpoint
from regrow.errors import InputError
from regrow.structure.cut import cut
from regrow.structure.finding import find_groups

gguf = pytest.importorskip("gguf")

VOCABULARY = 300
IDS = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def random_model(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update({"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 0, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def shrink(model: PreTrainedModel, even: bool) -> None:
    whole = find_groups(model)
    left = cut(model, whole, uniform_keep(whole, heads=2, channels=30) if even else random_keep(whole, 4))
    describe(model, whole, left)


def a_granite(family: str) -> PreTrainedModel:
    """A model with biases that has lost a head in five, which a LLaMA's config class refuses."""
    model = random_model(family, num_attention_heads=5, num_key_value_heads=5, head_dim=8, hidden_size=40)
    whole = find_groups(model)
    left = cut(model, whole, {group.name: np.arange(3) for group in whole if group.kind == "attention"})
    describe(model, whole, left)
    assert model.config.model_type == "granite"
    return model


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    make_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    save_checkpoint(model, tokenizer, folder / "model", dtype=dtype, shard_size="20KB", extras={})
    return folder / "model"


def checkpoint_of(family: str, even: bool, folder: Path, **changes: object) -> tuple[PreTrainedModel, Path]:
    model = random_model(family, **changes)
    shrink(model, even)
    return model, save(model, folder)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def close(got: Tensor, expected: Tensor, share: float = 1e-12) -> bool:
    return float((got - expected).abs().max()) <= share * float(expected.abs().max())


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3-tied"])
def test_padded_layers_are_equal_and_compute_the_same(family: str, tmp_path: Path) -> None:
    model, folder = checkpoint_of(family, False, tmp_path)
    assert needs_remote_code(folder)
    done = regrow.export(tmp_path, tmp_path / "padded", pad=True, multiple=8)
    padded = load_model(str(tmp_path / "padded"))
    assert len({layer.mlp.up_proj.weight.shape for layer in padded.model.layers}) == 1
    assert (done["channels"] % 8, padded.config.intermediate_size) == (0, done["channels"])
    assert close(logits(padded.double()), logits(model.double()))
    assert load_tokenizer(str(tmp_path / "padded")).bos_token_id == 0


def test_a_fresh_process_loads_what_was_padded(tmp_path: Path) -> None:
    model, folder = checkpoint_of("llama-gqa", False, tmp_path)
    regrow.export(folder, tmp_path / "padded", pad=True)
    verification = verify_checkpoint(model, tmp_path / "padded", IDS)
    assert verification.model_class == "MistralForCausalLM"
    assert verification.passed


def without_ffn(folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model of which the last layer's FFN is gone."""
    model = random_model("mistral")
    for linear, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(model.model.layers[1].mlp, linear).weight
        weight.data = weight.data.narrow(axis, 0, 0)
    model.config.per_layer_config = {"0": {"intermediate_size": 40}, "1": {"intermediate_size": 0}}
    return model, save(model, folder)


def test_a_half_that_is_gone_comes_back_as_zeros(tmp_path: Path) -> None:
    model, folder = without_ffn(tmp_path)
    regrow.export(folder, tmp_path / "padded", pad=True)
    padded = load_model(str(tmp_path / "padded"))
    assert not padded.model.layers[1].mlp.down_proj.weight.any()
    assert close(logits(padded.double()), logits(model.double()))


@pytest.mark.parametrize("family", ["Phi-3", "Mixtral", "StarCoder2"])
def test_what_a_stock_class_would_not_load_is_not_written(family: str, tmp_path: Path) -> None:
    """Fused and otherwise named linears are none that padding knows."""
    folder = save(zoo.build(family), tmp_path)
    with pytest.raises(InputError, match="it cannot be padded with zeros"):
        regrow.export(folder, tmp_path / "padded", pad=True, multiple=64)
    assert not (tmp_path / "padded" / "config.json").exists()


def test_experts_of_a_width_of_their_own_are_not_padded(tmp_path: Path) -> None:
    config = zoo.FAMILIES["Qwen3-MoE"]()
    config.mlp_only_layers = [0]
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path)
    with pytest.raises(InputError, match=r"experts\.0\..*_proj\.weight .* cannot be padded with zeros: experts have"):
        regrow.export(folder, tmp_path / "padded", pad=True)
    assert not (tmp_path / "padded").exists()


def test_a_norm_over_all_heads_is_not_padded(tmp_path: Path) -> None:
    _, folder = checkpoint_of("mistral", False, tmp_path)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    for number, width in enumerate((20, 30)):
        tensors[f"model.layers.{number}.self_attn.q_norm.weight"] = torch.ones(width)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"self_attn\.q_norm\.weight .* differs from layer to layer"):
        regrow.export(folder, tmp_path / "padded", pad=True)
    assert not (tmp_path / "padded").exists()


# --- GGUF, read back with the package that llama.cpp maintains ------------------------------------


class Read:
    """A GGUF file, and what llama.cpp computes from it: written from its documentation, in float64."""

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).double()
            for tensor in reader.tensors
        }
        self.architecture = self.fields["general.architecture"]

    def hyper(self, key: str, layer: int | None = None) -> float:
        value = self.fields[f"{self.architecture}.{key}"]
        return value[layer] if layer is not None and isinstance(value, list) else value

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", torch.zeros(1).double())

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.hyper("attention.layer_norm_rms_epsilon")).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]

    def rope(self, x_TND: Tensor) -> Tensor:
        size = x_TND.shape[-1]
        factors = self.tensors.get("rope_freqs.weight", torch.ones(size // 2).double())
        turns = self.hyper("rope.freq_base") ** -(torch.arange(0, size, 2).double() / size) / factors
        angle = torch.outer(torch.arange(len(x_TND)).double(), turns)[:, None]
        if self.architecture == "qwen3":  # pairs from either half
            first, second = x_TND[..., : size // 2], x_TND[..., size // 2 :]
        else:  # neighbours
            first, second = x_TND[..., ::2], x_TND[..., 1::2]
        turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
        return torch.cat(turned, -1)  # the order does not matter to a product of queries and keys

    def attention(self, number: int, x: Tensor) -> Tensor:
        name, size = f"blk.{number}.attn_", int(self.hyper("attention.key_length"))
        heads, kv_heads = int(self.hyper("attention.head_count", number)), self.hyper("attention.head_count_kv", number)
        q, k, v = (self.linear(name + part, x).unflatten(-1, (-1, size)) for part in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
        if f"{name}q_norm.weight" in self.tensors:
            q, k = self.norm(f"{name}q_norm", q), self.norm(f"{name}k_norm", k)
        q, k = self.rope(q), self.rope(k).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("tnd,snd->nts", q, k) / size**0.5
        scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
        mixed = torch.einsum("nts,snd->tnd", softmax(scores, -1), v.repeat_interleave(heads // kv_heads, 1))
        return self.linear(f"{name}output", mixed.flatten(1))

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tensors["token_embd.weight"][ids]
        for number in range(int(self.hyper("block_count"))):
            name = f"blk.{number}"
            x = x + self.attention(number, self.norm(f"{name}.attn_norm", x))
            n = self.norm(f"{name}.ffn_norm", x)
            assert self.tensors[f"{name}.ffn_up.weight"].shape[0] == self.hyper("feed_forward_length", number) > 0
            inner = silu(self.linear(f"{name}.ffn_gate", n)) * self.linear(f"{name}.ffn_up", n)
            x = x + self.linear(f"{name}.ffn_down", inner)
        x = self.norm("output_norm", x)
        return x @ self.tensors.get("output.weight", self.tensors["token_embd.weight"]).T


@pytest.mark.parametrize(
    ("family", "even", "architecture", "changes"),
    [
        ("llama-gqa", True, "llama", {}),
        ("llama-gqa", True, "llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama-biases", True, "llama", {}),
        ("qwen2", True, "llama", {}),
        ("qwen3", True, "qwen3", {}),
        ("llama-gqa", False, "deci", {}),
        ("qwen2", False, "deci", {}),
        ("qwen3-tied", False, "qwen3", {}),
    ],
)
def test_gguf_computes_what_the_checkpoint_does(
    family: str, even: bool, architecture: str, changes: dict[str, object], tmp_path: Path
) -> None:
    if family == "llama-biases":
        model = random_model(family)
        folder = save(model, tmp_path)
    else:
        model, folder = checkpoint_of(family, even, tmp_path, **changes)
    done = regrow.export(folder, tmp_path / "model.gguf", "gguf")
    read = Read(tmp_path / "model.gguf")
    assert (done["architecture"], read.architecture, done["type"]) == (architecture, architecture, "f32")
    assert done["padded"] == (not even and architecture == "qwen3")
    model.double()
    for ids in IDS:
        # float32 where RoPE's frequencies are
        assert close(read.logits(ids), logits(model, ids[None])[0], 1e-6)


@pytest.mark.parametrize("family", ["llama-biases", "qwen2"])
def test_a_granite_that_is_a_llama_by_its_numbers_is_written_as_one(family: str, tmp_path: Path) -> None:
    model = a_granite(family)
    folder = save(model, tmp_path)
    assert regrow.export(folder, tmp_path / "model.gguf", "gguf")["architecture"] == "llama"
    assert close(Read(tmp_path / "model.gguf").logits(IDS[0]), logits(model.double(), IDS[:1])[0], 1e-6)
    stock = AutoModelForCausalLM.from_pretrained(folder).double()
    assert close(logits(stock), logits(model), 1e-6)
    model.config.logits_scaling = 2.0
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="'granite' models"):
        regrow.export(save(model, tmp_path / "other"), tmp_path / "other.gguf", "gguf")


def test_deci_gets_one_channel_of_zeros_for_an_ffn_that_is_gone(tmp_path: Path) -> None:
    model, folder = without_ffn(tmp_path)
    regrow.export(folder, tmp_path / "model.gguf", "gguf")
    read = Read(tmp_path / "model.gguf")
    assert read.fields["deci.feed_forward_length"] == [40, 1]
    assert close(read.logits(IDS[0]), logits(model.double(), IDS[:1])[0], 1e-6)


@pytest.mark.parametrize(
    ("kind", "share"), [("q8_0", 1e-2), ("q5_1", 6e-2), ("q4_0", 2e-1), ("f16", 1e-3), ("bf16", 1e-2)]
)
def test_types(kind: str, share: float, tmp_path: Path) -> None:
    model = random_model("mistral", hidden_size=64)
    folder = save(model, tmp_path)
    done = regrow.export(folder, tmp_path / "model.gguf", "gguf", kind=kind)
    read = Read(tmp_path / "model.gguf")
    assert read.types["blk.0.attn_norm.weight"] == "F32"
    assert read.types["blk.0.ffn_up.weight"] == kind.upper()
    got, weight = read.tensors["blk.0.ffn_up.weight"], model.model.layers[0].mlp.up_proj.weight.detach().double()
    assert 0 < float((got - weight).abs().max()) <= share * float(weight.abs().max())
    if kind[0] == "q":  # rows of 40 and 60 are no whole number of blocks of 32
        assert read.types["token_embd.weight"] == "Q8_0"
        assert read.types["blk.0.ffn_down.weight"] == "F16"
        assert set(done["wider"]) == {f"blk.{n}.{part}.weight" for n in (0, 1) for part in ("ffn_down", "attn_output")}


@pytest.mark.parametrize(("kind", "share"), [("q4_k_m", 2e-1), ("q6_k", 6e-2)])
def test_k_types_are_llama_cpps(kind: str, share: float, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = random_model("mistral", hidden_size=256)
    folder = save(model, tmp_path, torch.bfloat16)
    done = regrow.export(folder, tmp_path / "model.gguf", "gguf", kind=kind)
    read = Read(tmp_path / "model.gguf")
    assert done["type"] == kind
    assert done["held"] == {name.lower(): list(read.types.values()).count(name) for name in set(read.types.values())}
    assert read.types["blk.0.ffn_up.weight"] == kind[:4].upper()
    got, weight = read.tensors["blk.0.ffn_up.weight"], model.model.layers[0].mlp.up_proj.weight.detach().double()
    assert 0 < float((got - weight).abs().max()) <= share * float(weight.abs().max())
    assert not list(tmp_path.glob(".*"))


def test_k_types_want_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = checkpoint_of("llama-gqa", True, tmp_path)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install 'regrow\[gguf-check\]'"):
        regrow.export(folder, tmp_path / "model.gguf", "gguf", kind="q4_k_m")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("code", [0, 1])
def test_the_quantiser_gets_a_plain_file_and_leaves_nothing_else(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another in llama.cpp's place, which copies; what the real one does with the file is tested above."""
    _, folder = checkpoint_of("llama-gqa", True, tmp_path)
    asked = []

    def quantise(plain: bytes, out: bytes, wanted: object) -> int:
        asked.append(wanted._obj.ftype)  # what `byref` holds
        shutil.copy(plain.decode(), out.decode())
        return code

    class Wanted(ctypes.Structure):
        _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int))

    stand_in = SimpleNamespace(llama_model_quantize_default_params=Wanted, llama_model_quantize=quantise)
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setitem(sys.modules, "regrow.formats.llamacpp_quantise", None)
    del sys.modules["regrow.formats.llamacpp_quantise"]  # to be imported anew, and forgotten afterwards
    out = tmp_path / "out" / "model.gguf"
    if code:
        with pytest.raises(InputError, match="does not make a q5_k_s file"):
            regrow.export(folder, out, "gguf", kind="q5_k_s")
        assert not out.parent.exists()
    else:
        done = regrow.export(folder, out, "gguf", kind="q5_k_s")
        assert (done["type"], set(done["held"])) == ("q5_k_s", {"f32"})
        assert list(out.parent.iterdir()) == [out]
    assert asked == [gguf.LlamaFileType.MOSTLY_Q5_K_S]


def test_bfloat16_stays_what_it_is(tmp_path: Path) -> None:
    model = random_model("qwen3")
    folder = save(model, tmp_path, torch.bfloat16)
    assert regrow.export(folder, tmp_path / "model.gguf", "gguf")["type"] == "bf16"
    got = Read(tmp_path / "model.gguf").tensors["blk.1.attn_q.weight"]
    assert torch.equal(got, model.model.layers[1].self_attn.q_proj.weight.double())


def test_metadata(tmp_path: Path) -> None:
    _, folder = checkpoint_of("mistral", True, tmp_path, sliding_window=32)
    regrow.export(folder, tmp_path / "model.gguf", "gguf")
    fields = Read(tmp_path / "model.gguf").fields
    assert fields["general.name"] == tmp_path.name
    assert fields["llama.context_length"] == 32  # where the window does not matter yet
    assert (fields["llama.attention.key_length"], fields["llama.rope.dimension_count"]) == (10, 10)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in stored]


# --- tokenizers ----------------------------------------------------------------------------------

TEXT = "Once upon a time a gardener cut the old tree back to its trunk; the naïve tree grew 12 pears — again. "


def sentencepiece_like(folder: Path) -> None:
    """A BPE with byte fallback as LLaMA's: spaces are letters, the first one added."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator([TEXT.replace("ï", "i")], trainers.BpeTrainer(vocab_size=75, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def join_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """Sentencepiece's BPE: join the neighbours whose union scores highest, leftmost first; what is unknown as bytes."""
    number = {token: index for index, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[number[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in number]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [
        found
        for piece in pieces
        for found in ([number[piece]] if piece in number else [number[f"<0x{b:02X}>"] for b in piece.encode()])
    ]


def test_scores_split_text_as_the_merges_do(tmp_path: Path) -> None:
    model = random_model("llama-gqa", vocab_size=420)
    folder = save(model, tmp_path)
    sentencepiece_like(folder)
    regrow.export(folder, tmp_path / "model.gguf", "gguf")
    fields = Read(tmp_path / "model.gguf").fields
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.bos_token_id"]) == (True, 1)
    types = fields["tokenizer.ggml.token_type"]
    assert (types[:3], set(types[3:259]), types[-1]) == ([2, 3, 3], {6}, 5)  # unknown, control; bytes; unused
    got = join_by_score(TEXT, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
    assert [1, *got] == load_tokenizer(str(folder))(TEXT)["input_ids"]
    assert len(set(got)) > 30


HARD = TEXT + "I've WE'RE they'll 3.14 1234567 $$ \n\n  tabs\t\tand   spaces \r\n 🦙🦙 ——— привет 你好"


def byte_level(folder: Path, name: str, whole_words: bool) -> None:
    """A byte-level BPE that splits text into words as GPT-2, Llama 3 or Qwen2 do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from regrow.formats.llamacpp_vocabulary import SPLITTERS

    pattern = next(pattern for pattern, known in SPLITTERS.items() if known == name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    words = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, whole]) if words else whole
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([HARD], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize(("name", "whole_words"), [("gpt-2", False), ("llama-bpe", True), ("qwen2", False)])
def test_llama_cpp_splits_text_alike(name: str, whole_words: bool, tmp_path: Path) -> None:
    folder = save(random_model("llama-gqa"), tmp_path)
    byte_level(folder, name, whole_words)
    regrow.export(folder, tmp_path / "model.gguf", "gguf")
    assert Read(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"] == name
    llama_cpp = pytest.importorskip("llama_cpp")
    vocabulary = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert vocabulary.tokenize(HARD.encode(), add_bos=True) == load_tokenizer(str(folder))(HARD)["input_ids"]


def test_a_splitter_that_llama_cpp_uses_otherwise_is_refused(tmp_path: Path) -> None:
    folder = save(random_model("llama-gqa"), tmp_path)
    byte_level(folder, "qwen2", whole_words=True)
    with pytest.raises(InputError, match=r"pre-tokenizer Split \+ ByteLevel"):
        regrow.export(folder, tmp_path / "model.gguf", "gguf")


def real_models(real_data: Path) -> list[Path]:
    return [real_data / "models" / name for name in ("stories260K", "stories3M")]


def test_scores_split_real_text_as_the_merges_do(real_data: Path, tmp_path: Path) -> None:
    text = (real_data / "text/tinystories/valid.txt").read_text()[:3000].replace("<|endoftext|>", "").replace("\n", " ")
    for folder in real_models(real_data):
        regrow.export(folder, tmp_path / "model.gguf", "gguf", kind="q8_0")
        fields = Read(tmp_path / "model.gguf").fields
        got = join_by_score(text, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
        assert [1, *got] == load_tokenizer(str(folder))(text)["input_ids"]


# --- what cannot be --------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = checkpoint_of("llama-gqa", True, tmp_path)
    out = tmp_path / "model.gguf"
    for given, reason in (
        ({}, "say what to write"),
        ({"to": "ggml"}, "--to 'ggml': choose gguf or onnx"),
        ({"pad": True, "multiple": 0}, "--multiple 0: give at least 1"),
        ({"to": "gguf", "kind": "q4_k_x"}, "choose auto, f32, f16"),
        ({"to": "onnx", "kind": "f16"}, "go with --to gguf"),
        ({"to": "gguf", "multiple": 8}, "goes with --pad"),
        ({"to": "gguf", "converter": tmp_path / "convert.py"}, "there is no"),
    ):
        with pytest.raises(InputError, match=reason):
            regrow.export(folder, out, **given)
    with pytest.raises(InputError, match="is a folder; give a file"):
        regrow.export(folder, tmp_path, "gguf")
    with pytest.raises(InputError, match="not empty"):
        regrow.export(folder, tmp_path, pad=True)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        regrow.export(tmp_path / "tokenizer", out, "gguf")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="pre-tokenizer Whitespace"):
        regrow.export(folder, out, "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'regrow\[gguf\]'"):
        regrow.export(folder, out, "gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "computes silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE"),
        ({"model_type": "olmo2"}, "--converter"),
    ],
)
def test_what_llama_cpp_would_compute_differently(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    _, folder = checkpoint_of("llama-gqa", True, tmp_path)
    described = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=reason):
        regrow.export(folder, tmp_path / "model.gguf", "gguf")


def test_llama_cpps_converter_gets_equal_layers(tmp_path: Path) -> None:
    _, folder = checkpoint_of("llama-gqa", False, tmp_path)
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, sys\nconfig = json.load(open(sys.argv[1] + '/config.json'))\n"
        "open(sys.argv[3], 'w').write(json.dumps([sys.argv[2:], config['architectures']]))\n"
    )
    out = tmp_path / "model.gguf"
    regrow.export(folder, out, "gguf", converter=converter, kind="q8_0")
    assert json.loads(out.read_text()) == [["--outfile", str(out), "--outtype", "q8_0"], ["MistralForCausalLM"]]
    converter.write_text("raise SystemExit('no such model')")
    with pytest.raises(InputError, match="no such model"):
        regrow.export(folder, out, "gguf", converter=converter)


def test_the_verb(command: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    done = command("export", checkpoint, "--to", "gguf", "--type", "f16", "--out", tmp_path / "m.gguf", "--json")
    assert (done.code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["architecture"] == "llama"
    assert Read(tmp_path / "m.gguf").types["output.weight"] == "F16"
    done = command("export", checkpoint, "--to", "ggml", "--out", tmp_path / "m.gguf")
    assert (done.code, done.stderr) == (2, "regrow: --to 'ggml': choose gguf or onnx\n")


# --- the engines -----------------------------------------------------------------------------------


def engine(file: Path) -> Callable[[list[int]], Tensor]:
    """llama.cpp's logits of token ids, everything in float32 (its KV cache is float16 by default)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    exact = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=exact, type_v=exact, flash_attn=False
    )

    def run(ids: list[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))

    run.model = model  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    ("family", "even"),
    [("llama-gqa", True), ("llama-biases", True), ("qwen2", True), ("qwen3", True), ("mistral", False),
     ("qwen2", False), ("qwen3-tied", False), ("granite", True)],
)  # fmt: skip
def test_llama_cpp_computes_the_same(family: str, even: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    if family in ("llama-biases", "granite"):
        model = random_model(family) if family == "llama-biases" else a_granite("llama-biases")
        folder = save(model, tmp_path)
    else:
        model, folder = checkpoint_of(family, even, tmp_path)
    regrow.export(folder, tmp_path / "model.gguf", "gguf")
    run = engine(tmp_path / "model.gguf")
    assert close(run(IDS[0].tolist()), logits(model, IDS[:1])[0], 1e-4)
    tokens = run.model.tokenize(TEXT.encode(), add_bos=True)
    assert tokens == load_tokenizer(str(folder))(TEXT)["input_ids"]


def test_llama_cpp_on_real_models(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    story = "Once upon a time, there was a little girl. Her name was Zoë — she liked pears."
    for folder in real_models(real_data):
        regrow.export(folder, tmp_path / "model.gguf", "gguf")
        run, ids = engine(tmp_path / "model.gguf"), load_tokenizer(str(folder))(story)["input_ids"]
        assert run.model.tokenize(story.encode(), add_bos=True) == ids
        assert close(run(ids), logits(load_model(str(folder)), torch.tensor([ids]))[0], 1e-4)


@pytest.mark.parametrize("even", [True, False])
def test_onnxruntime_computes_the_same(even: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from regrow.formats.onnx_graph import run_onnx

    model, folder = checkpoint_of("qwen3", even, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = regrow.export(folder, tmp_path / "onnx", "onnx", trust_remote_code=not even)
    ids = torch.randint(0, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(5))
    assert close(run_onnx(Path(done["out"]), ids), logits(model, ids), 1e-5)
    assert load_tokenizer_of(tmp_path / "onnx")
    assert (tmp_path / "onnx" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def load_tokenizer_of(folder: Path) -> bool:
    """Whether the tokenizer lies there, whole."""
    return bool(AutoTokenizer.from_pretrained(folder)("a")["input_ids"])

"""Whatever is given wrongly: one line that says what is wrong and what to do, exit code 2, nothing left behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, CommandLine, Done, make_tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import regrow
from regrow.checkpoint.files import new_folder
from regrow.checkpoint.load import load_skeleton
from regrow.errors import InputError
from regrow.given import listed
from regrow.planning.plan import Plan
from regrow.structure.finding import find_groups

Maker = Callable[[Path, Path], object]
"""Given the tiny LLaMA and the folder in which the command will run: makes the input there."""


def nothing(checkpoint: Path, here: Path) -> None:
    """Make nothing: the command itself is wrong, or what it names is not there."""


def file(name: str, content: str | bytes) -> Maker:
    """Write one file."""

    def make(checkpoint: Path, here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def copy(change: Callable[[Path], object]) -> Maker:
    """Copy the tiny LLaMA to `model` and damage it."""

    def make(checkpoint: Path, here: Path) -> None:
        shutil.copytree(checkpoint, here / "model")
        change(here / "model")

    return make


def other(model: Callable[[], PreTrainedModel]) -> Maker:
    """Another kind of model as `model`."""

    def make(checkpoint: Path, here: Path) -> None:
        model().save_pretrained(here / "model")
        make_tokenizer(here / "model")

    return make


def bert() -> PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(**shape, vocab_size=300, max_position_embeddings=32))


def t5() -> PreTrainedModel:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**shape, vocab_size=300))


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def flip_header(model: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(bytes(byte ^ 0xFF for byte in content[:16]) + content[16:])


def lose_a_shard(model: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="50KB")
    sorted(model.glob("model-*.safetensors"))[1].unlink()


def index_of(content: object) -> Maker:
    """The tiny LLaMA in one file that an index names, the index changed."""

    def change(model: Path) -> None:
        (model / "model.safetensors").rename(model / "part.safetensors")
        (model.parent / "elsewhere.safetensors").write_bytes((model / "part.safetensors").read_bytes())
        (model / "model.safetensors.index.json").write_text(json.dumps(content))

    return copy(change)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("unpickled",)


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, model / "pytorch_model.bin")


def config(**changes: object) -> Maker:
    """The tiny LLaMA with another config.json."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return copy(change)


def config_file(text: str) -> Maker:
    return copy(lambda model: (model / "config.json").write_text(text))


def remote_code(checkpoint: Path, here: Path) -> None:
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config(auto_map=auto_map, model_type="own")(checkpoint, here)
    (here / "model" / "own.py").write_text("import os\nos.mkdir('executed')\n")


def without_tokenizer(model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()


def larger_tokenizer(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(310 - len(tokenizer))])
    tokenizer.save_pretrained(model)


def no_special_tokens(model: Path) -> None:
    path = model / "tokenizer_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in described.items() if "_token" not in key}))


@dataclass(frozen=True)
class Case:
    """A command and what it must answer. In `argv`, LLAMA is the tiny checkpoint and TEXT a text that suits it."""

    name: str
    make: Maker
    argv: str
    expected: tuple[str, ...]


def case(name: str, make: Maker, argv: str, *expected: str) -> Case:
    return Case(name, make, argv, expected)


PRUNE = "prune LLAMA --data TEXT --out out "
PRUNE_MODEL = "prune model --data TEXT --out out"
PRUNE_ON = "prune LLAMA --out out --data "
EVALUATE = "evaluate LLAMA --data TEXT "
EVALUATE_MODEL = "evaluate model --data TEXT"
A_FOLDER = "give a checkpoint's folder, or a repository on the hub"
NOT_ON_HUB = ("there is no folder nobody/nothing", "hub", "couldn't connect", "check the name and the connection")
ANEW = "get it anew"
OWN = "prune LLAMA --out out "
LONGER = "give more text or a shorter window"
TRUST = ("model runs Python files of its own", "--trust-remote-code")
RECIPE = "--recipe my.yaml"
CRITERION = "--criterion my.py:score"

MODELS = [
    case("no model folder, absolute", nothing, "inspect /not/there", "no model folder /not/there", A_FOLDER),
    case("no model folder, relative", nothing, "prune ./absent --data TEXT --out out", "folder ./absent", A_FOLDER),
    case("no model folder, deep", nothing, "inspect some/deep/path", "no model folder some/deep/path", A_FOLDER),
    case("no such model on the hub", nothing, "prune nobody/nothing --data TEXT --out out", *NOT_ON_HUB),
    case("no such model to evaluate", nothing, "evaluate nobody/nothing --data TEXT", *NOT_ON_HUB),
    case("no such model to inspect", nothing, "inspect nobody/nothing", *NOT_ON_HUB),
    case("no such model to bench", nothing, "bench LLAMA nobody/nothing", *NOT_ON_HUB),
    case("not a model's name", nothing, "inspect 'my model?'", "there is no folder my model?", "check the name"),
    case("file as model", file("a.gguf", b"GGUF"), "inspect a.gguf", "a.gguf is a file", "give the folder"),
    case("bench of one model twice", nothing, "bench LLAMA LLAMA", "named twice"),
    case("no config", file("model/x", ""), PRUNE_MODEL, "model holds no config.json", "give the folder"),
    case("run for its checkpoint", file("model/model/config.json", "{}"), PRUNE_MODEL, "is a run's folder", "give"),
    case("config is not JSON", config_file("{"), PRUNE_MODEL, "config.json of model cannot be read", "JSON", ANEW),
    case("config is a list", config_file("[]"), EVALUATE_MODEL, "config.json of model", "not a JSON object", ANEW),
    case("config is empty", config_file("{}"), "inspect model", "Unrecognized model in model; get it anew"),
    case("config of the future", config(model_type="llama9"), "inspect model", "config.json of model", "`llama9`"),
    case("config of a wrong type", config(hidden_size="big"), "inspect model", "hidden_size", "got str"),
    case("config without heads", config(num_attention_heads=0), "inspect model", "config.json of model"),
    case("truncated weights", copy(truncate), PRUNE_MODEL, "weights of model are damaged", "get them anew"),
    case("damaged header", copy(flip_header), EVALUATE_MODEL, "weights of model are damaged", "get them anew"),
    case("lost shard", copy(lose_a_shard), PRUNE_MODEL, "missing", "model-00002-of-0000", "get them anew"),
    case("lost layer", config(num_hidden_layers=4), EVALUATE_MODEL, "no model.layers.3.", "9 such", "get both anew"),
    case("other width", config(intermediate_size=40), EVALUATE_MODEL, "is [32, 48], not [32, 40]", "get both anew"),
    case(
        "index-leads-out", index_of({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}), PRUNE_MODEL,
        "names '../elsewhere.safetensors', which is no safetensors file of its folder", "get it anew",
    ),
    case("index-of-pickles", index_of({"weight_map": {"lm_head.weight": "part.bin"}}), PRUNE_MODEL, "names 'part.bin'"),
    case("index-of-numbers", index_of({"weight_map": {"lm_head.weight": 3}}), PRUNE_MODEL, "names 3"),
    case("index-of-nothing", index_of([]), PRUNE_MODEL, "index.json cannot be read", "get it anew"),
    case("pickle", copy(only_pickle), PRUNE_MODEL, "no weights as safetensors", "can run code", "convert"),
    case("pickle to export", copy(only_pickle), "export model --to gguf --out m.gguf", "as safetensors", "convert"),
    case("encoder", other(bert), PRUNE_MODEL, "model is a BertForMaskedLM", "decoder-only", "ForCausalLM"),
    case("encoder-decoder", other(t5), "inspect model", "model is a T5ForConditionalGeneration", "decoder-only"),
    case("own code to prune", remote_code, PRUNE_MODEL, *TRUST),
    case("own code to evaluate", remote_code, EVALUATE_MODEL, *TRUST),
    case("own code to inspect", remote_code, "inspect model", *TRUST),
    case("own code to bench", remote_code, "bench model", *TRUST),
    case(
        "quantised", config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), PRUNE_MODEL,
        "model is quantised (bitsandbytes)", "give the checkpoint it was made of",
    ),
    case("no tokenizer", copy(without_tokenizer), PRUNE_MODEL, "model holds no tokenizer", "put tokenizer.json"),
    case("no tokenizer to evaluate", copy(without_tokenizer), EVALUATE_MODEL, "no tokenizer", "put tokenizer.json"),
    case(
        "damaged tokenizer", copy(lambda model: (model / "tokenizer.json").write_text("{")), PRUNE_MODEL,
        "tokenizer of model cannot be used", "get its files anew",
    ),
    case(
        "larger tokenizer", copy(larger_tokenizer), PRUNE_MODEL,
        "tokenizer has 310 tokens, the model embeds 300", "put the model's own there",
    ),
    case("larger tokenizer to evaluate", copy(larger_tokenizer), EVALUATE_MODEL, "310 tokens, the model embeds 300"),
]  # fmt: skip

TEXTS = [
    case("own text too long", nothing, OWN + "--set generate.length=999", "than the 256 positions", "shorten it"),
    case("too little own text", nothing, OWN + "--set generate.tokens=99", "too little", "at least 12800", "--data"),
    case("own text, no start", copy(no_special_tokens), "prune model --out out", "neither BOS nor EOS", "give --data"),
    case("empty --data", nothing, PRUNE_ON + "''", "'' is a folder", "give a .txt"),
    case("no text file to compare on", nothing, "compare LLAMA --data a.txt --out out", "no text file a.txt", "check"),
    case("no text file", nothing, PRUNE_ON + "absent.txt", "no text file absent.txt", "check its path"),
    case("no text file, other suffix", nothing, PRUNE_ON + "./absent.md", "no text file ./absent.md", "check its path"),
    case("no text to evaluate on", nothing, PRUNE + "--eval-data absent.txt", "no text file absent.txt", "check"),
    case("no such data set", nothing, PRUNE_ON + "nobody/texts", "no file nobody/texts", "hub", "check the name"),
    case("data set without a connection", nothing, "evaluate LLAMA --data wikitext", "wikitext", "the connection"),
    case("folder as text", file("texts/a.txt", "x"), PRUNE_ON + "texts", "'texts' is a folder", "give a .txt"),
    case("folder named as a file", file("a.txt/a", "x"), PRUNE_ON + "a.txt", "'a.txt' is a folder", "give a .txt"),
    case("empty text", file("a.txt", ""), PRUNE_ON + "a.txt", "a.txt holds no text", "give another file"),
    case("blank text", file("a.txt", " \n\t\n"), PRUNE_ON + "a.txt", "a.txt holds no text", "give another file"),
    case("empty records", file("a.jsonl", ""), PRUNE_ON + "a.jsonl", "a.jsonl holds no text", "give another file"),
    case("blank records", file("a.jsonl", "\n\n"), PRUNE_ON + "a.jsonl", "a.jsonl holds no text", "give another file"),
    case("no records", file("a.json", "[]"), PRUNE_ON + "a.json", "a.json holds no text", "give another file"),
    case("a line", file("a.txt", "So short."), PRUNE_ON + "a.txt", "too short to hold some of it", "give more text"),
    case("a few lines", file("a.txt", "So\nshort\na\ntext."), PRUNE_ON + "a.txt", "fewer than one window", LONGER),
    case("a line to evaluate", file("a.txt", "So short."), "evaluate LLAMA --data a.txt", "one window of 256", LONGER),
    case("a window too long", nothing, EVALUATE + "--window 999", "longer than the 256 positions", "shorten it"),
    case("not UTF-8", file("a.txt", b"Gr\xfcn"), PRUNE_ON + "a.txt", "a.txt is not UTF-8 text (byte 2)", "convert it"),
    case("binary", file("a.docx", b"PK\x03\x04\xff"), PRUNE_ON + "a.docx", "a.docx is not UTF-8 text", "convert it"),
    case("records not UTF-8", file("a.jsonl", b'{"text": "\xff"}\n'), PRUNE_ON + "a.jsonl", "a.jsonl", "utf-8"),
    case(
        "no field of that name", file("a.jsonl", '{"body": "x", "title": "y"}\n'), PRUNE_ON + "a.jsonl",
        "a.jsonl has no field 'text' but body, title", "--set data.text_field=",
    ),
    case("no field to evaluate", nothing, EVALUATE + "--text-field body", "no field 'body' but text", "--text-field"),
    case("field of lists", file("a.jsonl", '{"text": ["x"]}'), PRUNE_ON + "a.jsonl", "'text' holds", "another field"),
    case(
        "broken records", file("a.jsonl", '{"text": "x"}\n{"text": \n'), PRUNE_ON + "a.jsonl",
        "a.jsonl is not one JSON object a line", "line 2",
    ),
    case("records that are lists", file("a.jsonl", "[1]\n[2]\n"), PRUNE_ON + "a.jsonl", "not one JSON object a line"),
    case("broken array", file("a.json", '[{"text": "x"}'), PRUNE_ON + "a.json", "is not an array of JSON objects"),
    case("broken Parquet", file("a.parquet", "PAR1"), PRUNE_ON + "a.parquet", "a.parquet is not a Parquet table"),
]  # fmt: skip

LAUGHS = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
"""YAML of some lines that is 9⁹ values when its aliases are written out."""
APPLY = "apply LLAMA --plan plan.json --out out"
FFN = "groups.layers.0.ffn"


def plan(**changes: object) -> Maker:
    """A plan of one group, as `plan.json`."""
    group = {"units": 4, "cost": 9, "keep": [0, 2], **changes}
    content = {"groups": {"layers.0.ffn": group}, "block_parameters": 99, "total_parameters": 99}
    return file("plan.json", json.dumps(content))


PLANS = [
    case("no plan", nothing, APPLY, "plan plan.json", "give a run's plan.json"),
    case("plan is not JSON", file("plan.json", "{"), APPLY, "not a valid plan", "JSON"),
    case("plan of nothing", file("plan.json", "{}"), APPLY, "not a valid plan: groups", "required"),
    case("plan with a unit twice", plan(keep=[1, 1]), APPLY, FFN, "ascending without repeats"),
    case("plan with a unit too many", plan(keep=[4]), APPLY, FFN, "units from 0 to 3"),
    case("plan with a unit below 0", plan(keep=[-1]), APPLY, FFN + ".keep.0", "greater than or equal to 0"),
    case("plan without units", plan(units=0, keep=[]), APPLY, FFN + ".units", "greater than or equal to 1"),
    case("plan with true for a number", plan(keep=[True]), APPLY, FFN + ".keep.0", "valid integer"),
    case("plan that removes everything", plan(cost=50), APPLY, "not a valid plan", "removes 100 of 99 parameters"),
    case("plan with huge numbers", plan(cost=10**30), APPLY, FFN + ".cost"),
    case("plan of another model", plan(), APPLY, "the plan is of another model"),
    case("plan with a key of its own", plan(colour="red"), APPLY, FFN + ".colour", "extra inputs"),
]

SETTINGS = [
    case("sparsity 0", nothing, PRUNE + "--sparsity 0", "pruning.sparsity = 0.0", "greater than 0"),
    case("sparsity 1", nothing, PRUNE + "--sparsity 1", "pruning.sparsity = 1.0", "less than 1"),
    case("sparsity -1", nothing, PRUNE + "--sparsity=-1", "pruning.sparsity = -1.0", "greater than 0"),
    case("sparsity abc", nothing, PRUNE + "--sparsity abc", "--sparsity 'abc'", "give a number"),
    case("sparsity in percent", nothing, PRUNE + "--sparsity 50%", "--sparsity '50%'", "give a number"),
    case("sparsity nan", nothing, PRUNE + "--sparsity nan", "pruning.sparsity = nan", "finite"),
    case("sparsity out of reach", nothing, PRUNE + "--sparsity 0.99999", "out of reach", "use at most 0.73"),
    case("sparsity and target", nothing, PRUNE + "--sparsity 0.5 --target size=1GB", "give --sparsity or --target"),
    case("target", nothing, PRUNE + "--target smaller", "target 'smaller'", "write one of params=2.0B, size=3GB"),
    case("target of a wrong kind", nothing, PRUNE + "--target memory=3GB", "'memory=3GB'", "write one of params=2.0B"),
    case("target of a huge number", nothing, PRUNE + "--target params=1e400", "too large a number", "2.0B, 500M"),
    case("target too large", nothing, PRUNE + "--target params=1M", "out of reach", "47,072 parameters", "26,624"),
    case("target too small", nothing, PRUNE + "--target size=9KB", "out of reach", "cut to 109,", "ask for so many"),
    case(
        "sparsity twice", nothing, "compare LLAMA --data TEXT --recipes random --sparsity 0.3,0.30 --out out",
        "a sparsity is named twice", "name each once",
    ),
    case("steps -1", nothing, PRUNE + "--steps=-1", "training.steps = -1", "greater than or equal to 0"),
    case("steps abc", nothing, PRUNE + "--steps abc", "--steps 'abc'", "give a whole number"),
    case("steps 1.5", nothing, PRUNE + "--steps 1.5", "--steps '1.5'", "give a whole number"),
    case("seed -1", nothing, PRUNE + "--seed=-1", "seed = -1", "greater than or equal to 0"),
    case("seed abc", nothing, PRUNE + "--seed abc", "--seed 'abc'", "give a whole number"),
    case("shape", nothing, PRUNE + "--shape sideways", "pruning.shape = 'sideways'", "'uniform' or 'free'"),
    case("device", nothing, EVALUATE + "--device abacus", "device 'abacus'", "choose cpu"),
    case("device that is not there", nothing, "bench LLAMA --device cuda:77", "device 'cuda:77'", "choose cpu"),
    case("device to prune on", nothing, PRUNE + "--device cuda:77", "device 'cuda:77'", "choose cpu"),
    case("device without values", nothing, EVALUATE + "--device meta", "device 'meta'", "choose cpu"),
    case("device in a recipe", nothing, PRUNE + "--set device=abacus", "device 'abacus'", "choose cpu"),
    case("window 1", nothing, EVALUATE + "--window 1", "--window 1", "at least 2 tokens"),
    case("window 0", nothing, EVALUATE + "--window 256 --window 0", "--window 0", "at least 2 tokens"),
    case("window abc", nothing, EVALUATE + "--window abc", "--window 'abc'", "give a whole number"),
    case("bos", nothing, EVALUATE + "--bos sideways", "--bos 'sideways'", "choose document, once or none"),
    case("too many new tokens", nothing, "bench LLAMA --new-tokens 600", "only 256 positions"),
    case("demo sparsity", nothing, "demo --out out --sparsity all", "--sparsity 'all'", "give a number"),
    case("demo recipe", nothing, "demo --out out --recipe mine", "no recipe 'mine'", "shipped: ", "give a YAML file"),
    case("recipe that is not there", nothing, PRUNE + RECIPE, "no recipe 'my.yaml'", "give a YAML file"),
    case("unknown recipe", nothing, PRUNE + "--recipe lora-prune", "'lora-prune'", "did you mean 'loraprune'?"),
    case("unknown recipe to print", nothing, "recipes magnitud", "'magnitud'", "did you mean 'magnitude'?"),
    case("recipe is not YAML", file("my.yaml", "a: [\nb"), PRUNE + RECIPE, "my.yaml line 2", "not valid YAML"),
    case("recipe is not text", file("my.yaml", b"\xff\x00"), PRUNE + RECIPE, "recipe my.yaml", "cannot be read"),
    case("recipe with code", file("my.yaml", "!!python/object/apply:os.mkdir [executed]"), PRUNE + RECIPE, "YAML"),
    case("recipe is a list", file("my.yaml", "- a\n- b"), PRUNE + RECIPE, "must be a mapping of keys to values"),
    case("unknown key", file("my.yaml", "prunning: {}"), PRUNE + RECIPE, "'prunning'", "did you mean 'pruning'?"),
    case(
        "unknown key in a section", file("my.yaml", "pruning: {sparcity: 0.5}"), PRUNE + RECIPE,
        "unknown key 'pruning.sparcity'", "did you mean 'sparsity'?",
    ),
    case("outlandish key", file("my.yaml", "lora: {xyz: 1}"), PRUNE + RECIPE, "'lora.xyz'", "known here: rank, alpha"),
    case("number as key", file("my.yaml", "lora: {1: 2}"), PRUNE + RECIPE, "lora.1", "keys should be strings"),
    case("wrong type", file("my.yaml", "training: {steps: many}"), PRUNE + RECIPE, "steps = 'many'", "integer"),
    case("recipe that grows", file("my.yaml", LAUGHS), PRUNE + RECIPE, "more than 100,000 values", "no recipe"),
    case("recipe that holds itself", file("my.yaml", "name: &a [*a]"), PRUNE + RECIPE, "more than 100,000 values"),
    case("recipe with a wrong date", file("my.yaml", "seed: 2001-99-99"), PRUNE + RECIPE, "my.yaml", "not valid YAML"),
    case("recipe with half a character", file("my.yaml", 'name: "\\ud800"'), PRUNE + RECIPE, "that are no text"),
    case("recipe nested deeply", file("my.yaml", 3000 * "["), PRUNE + RECIPE, "not valid YAML"),
    case("value for a section", file("my.yaml", "training: 3"), PRUNE + RECIPE, "training = 3", "dictionary"),
    case("wrong value of lines", file("my.yaml", "seed: |\n  a\n  b\n"), PRUNE + RECIPE, "'a\\nb\\n'", "integer"),
    case("--set without a value", nothing, PRUNE + "--set lora.rank", "'lora.rank'", "write key.path=value"),
    case("--set unknown key", nothing, PRUNE + "--set lora.rnak=3", "'lora.rnak'", "did you mean 'rank'?"),
    case("--set unknown section", nothing, PRUNE + "--set lara.rank=3", "'lara'", "did you mean 'lora'?"),
    case("--set below a value", nothing, PRUNE + "--set seed.x=1", "'seed' is a value, not a section"),
    case("huge seed", nothing, PRUNE + "--seed 99999999999999999999", "seed", "less than 4294967296"),
    case("no windows", nothing, PRUNE + "--set evaluation.windows=[]", "evaluation.windows", "at least 1 item"),
    case("window of one", nothing, PRUNE + "--set evaluation.windows=[1]", "evaluation.windows.0", "equal to 2"),
    case("batch of none", nothing, PRUNE + "--set evaluation.speed_batches=[0]", "speed_batches.0", "equal to 1"),
    case(
        "teacher whose weights change", nothing, PRUNE + "--set distillation.teacher=self",
        "distillation.teacher=self", "compensation would change", "or another teacher",
    ),
    case(
        "analysis by whole layers", nothing, "analyze LLAMA --data TEXT --set analysis.criterion=block-influence",
        "analysis.criterion=block-influence scores whole layers only", "take another",
    ),
    case(
        "analysis by masks", nothing, PRUNE + "--set analysis.enabled=true --set analysis.criterion=learned-mask",
        "analysis.criterion=learned-mask reads masks", "take another",
    ),
    case("shard size", nothing, PRUNE + "--set output.shard_size=big", "output.shard_size = 'big'"),
    case("shards of nothing", nothing, PRUNE + "--set output.shard_size=0GB", "'0GB': wanted: largest size"),
    case("all held out", nothing, PRUNE + "--set data.held_out=0.6", "data.held_out", "less than 0.5"),
    case("--set not YAML", nothing, PRUNE + "--set 'lora.rank=[3'", "--set 'lora.rank=[3'", "not valid YAML"),
    case("--set a wrong date", nothing, PRUNE + "--set seed=2001-99-99", "not valid YAML"),
    case("--set a wrong tag", nothing, PRUNE + "--set 'seed=!!int x'", "not valid YAML"),
    case("--set wrong type", nothing, PRUNE + "--set lora.rank=big", "lora.rank = 'big'", "integer"),
    case(
        "unknown needs", file("my.py", "NEEDS = {'hessian'}\nscore = len\n"), PRUNE + CRITERION,
        "NEEDS may hold lora, gate, weight", "'hessian'",
    ),
    case("unknown criterion", nothing, PRUNE + "--criterion gatefisher", "did you mean 'gate-fisher'?"),
    case("outlandish criterion", nothing, PRUNE + "--criterion xyz", "'xyz'", "known: lora, ", "FILE.py:FUNCTION"),
    case("no criterion file", nothing, PRUNE + CRITERION, "there is no file my.py"),
    case("no such function", file("my.py", "scores = 1"), PRUNE + CRITERION, "my.py has no function 'score'"),
    case("criterion's syntax", file("my.py", "def score(e:"), PRUNE + CRITERION, "my.py fails", "SyntaxError"),
    case("criterion fails to load", file("my.py", "1 / 0"), PRUNE + CRITERION, "my.py fails", "ZeroDivisionError"),
    case(
        "--out holds the model", copy(lambda folder: None), "prune model --data TEXT --out .",
        "model: this run would replace or delete model", "choose another --out",
    ),
    case("--out is a file", file("out", "x"), PRUNE, "out is a file", "give a folder"),
    case("--out below a file", file("a", "x"), "prune LLAMA --data TEXT --out a/out", "a/out: Not a directory"),
    case("--out is another's", file("out/thesis.txt", "x"), PRUNE, "out is not empty", "give another folder"),
    case("--out has a long name", nothing, "prune LLAMA --data TEXT --out " + 300 * "x", "name too long", "choose"),
]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder, but for what Python caches of a user's criterion."""
    there = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in there}


def assert_one_line(done: Done, *expected: str) -> None:
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert done.complaint.startswith("regrow: ")
    assert done.complaint.endswith("\n")
    assert done.complaint.count("\n") == 1, done.complaint
    for words in expected:
        assert words.lower() in done.complaint.lower()


@pytest.fixture(scope="session")
def told(request: pytest.FixtureRequest) -> Iterator[list[tuple[Case, str, int]]]:
    """Each case with its message and exit code; `--bad-input-table FILE` makes a page of them."""
    rows: list[tuple[Case, str, int]] = []
    yield rows
    if page := request.config.getoption("--bad-input-table"):
        Path(page).write_text(bad_input_page(rows), encoding="utf-8")


def bad_input_page(rows: Sequence[tuple[Case, str, int]]) -> str:
    def cell(text: str) -> str:
        fence = "``" if "`" in text else "`"
        return f"{fence} {text} {fence}".replace("|", "\\|")

    table = [f"| {case.name} | {cell('regrow ' + case.argv)} | {cell(words)} | {code} |" for case, words, code in rows]
    head = ["| what is wrong | command | what regrow says | exit code |", "|---|---|---|---|"]
    return "\n".join([BAD_INPUT_HEAD, *head, *table]) + "\n"


BAD_INPUT_HEAD = """# Bad input

What can be wrong with what regrow is given, and what it answers: one line on standard error that says what is wrong and
what to do, exit code 2, and nothing left behind. In the commands `LLAMA` is a tiny checkpoint, `TEXT` a text that suits
it; `model`, `my.yaml` and the like are made for the case.

This page is made by the test that holds every line of it true:
`pytest tests/test_bad_input.py --bad-input-table docs/bad-input.md`.
"""


@pytest.mark.parametrize("case", [*MODELS, *TEXTS, *PLANS, *SETTINGS], ids=lambda case: case.name)
def test_bad_input(
    case: Case, command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path, told: list[tuple[Case, str, int]]
) -> None:
    case.make(checkpoint, tmp_path)
    before = tree(tmp_path)
    argv = [{"LLAMA": checkpoint, "TEXT": text}.get(word, word) for word in shlex.split(case.argv)]
    done = command(*argv, cwd=tmp_path)
    assert_one_line(done, *case.expected)
    assert tree(tmp_path) == before
    message = done.complaint.strip()
    for path, name in ((checkpoint, "LLAMA"), (text, "TEXT"), (tmp_path, ".")):
        message = message.replace(str(path), name)
    told.append((case, message, done.code))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("prune LLAMA --data TEXT", "Missing option '--out'"),
        ("prune --data TEXT --out out", "Missing argument 'MODEL'"),
        ("prune LLAMA --data TEXT --out out --sparcity 0.5", "No such option: --sparcity"),
        ("evaluate LLAMA", "Missing option '--data'"),
        ("bench", "Missing argument 'MODEL"),
        ("bench LLAMA --repeats 0", "Invalid value for '--repeats'"),
        ("trim LLAMA", "No such command 'trim'"),
    ],
)
def test_usage_errors(argv: str, expected: str, command: CommandLine, tmp_path: Path) -> None:
    done = command(*argv.split(), cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not tree(tmp_path)


def test_libraries_are_silent_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    """As `test_bad_input`, but with nothing imported beforehand."""
    file("a.jsonl", '{"text": "x"}\n{"text": \n')(checkpoint, tmp_path)
    line = [sys.executable, "-m", "regrow", "prune", str(checkpoint), "--out", "out", "--data", "a.jsonl"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert_one_line(Done(done.returncode, done.stdout, done.stderr), "a.jsonl is not one JSON object a line")


# --- a disk that is full or cannot be written ----------------------------------------------------

SHORT = ["--steps=0", *(f"--set={key}={json.dumps(value)}" for key, value in QUICK.items())]
"""A run of a few seconds."""

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system in memory, where that is permitted, and takes it away afterwards."""
    folder = tmp_path / "disk"

    def make(options: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def assert_stops_whole(done: Done, out: Path) -> None:
    """A run under way has said how far it came; its last line is the complaint, and no file is half-written."""
    assert "Traceback" not in done.stderr
    assert_one_line(
        Done(done.code, done.stdout, done.stderr.splitlines(True)[-1]), "no space left to write", "free some"
    )
    names = {path.name for path in out.rglob("*")}
    assert "model" not in names
    assert not [name for name in names if name.startswith(".")]
    for path in out.glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.parametrize("limit", [1_000, 20_000, 64_000], ids=["recipe", "adapters", "model"])
def test_file_larger_than_the_limit(
    limit: int, command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.txt"
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    plain.write_text("\n<|endoftext|>\n".join(documents))
    out = tmp_path / "out"
    done = command("prune", checkpoint, "--data", plain, "--out", out, *SHORT, file_limit=limit)
    assert_stops_whole(done, out)


@pytest.mark.parametrize("size", ["4k", "40k", "100k"])
def test_full_disk(size: str, command: CommandLine, checkpoint: Path, text: Path, mount: Mount) -> None:
    out = mount(f"size={size}") / "out"
    done = command("prune", checkpoint, "--data", text, "--out", out, *SHORT)
    assert_stops_whole(done, out)


def test_read_only_disk(command: CommandLine, checkpoint: Path, text: Path, mount: Mount) -> None:
    folder = mount("ro")
    done = command("prune", checkpoint, "--data", text, "--out", folder / "out", *SHORT)
    assert_one_line(done, "Read-only file system", "choose a folder that can be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    done = command("prune", checkpoint, "--data", text, "--out", tmp_path / "closed" / "out", *SHORT)
    assert_one_line(done, "Permission denied", "choose a folder that can be written")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with new_folder(target) as partial:
        (partial / "weights").write_text("first")
    with pytest.raises(IsADirectoryError), new_folder(target) as partial:
        partial.write_text("second")
    assert tree(tmp_path) == {"model": b"", "model/weights": b"first"}

    rename = os.replace

    def failing(source: Path, destination: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError("the disk is gone")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"), new_folder(target):
        pass
    assert tree(tmp_path) == {"model": b"", "model/weights": b"first"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"windows": [1]}, "a window needs at least 2 tokens"),
        ({"windows": [256, 0]}, "--window 0: a window"),
        ({"windows": []}, "a window needs"),
        ({"bos": "foo"}, "choose document, once or none"),
        ({"max_windows": 0}, "evaluate at least one"),
    ],
)
def test_python_refuses_to_evaluate_what_the_command_line_does(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        regrow.evaluate("nobody/nothing", "absent.txt", **wrong)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"models": []}, "models = 0; give at least 1"),
        ({"batches": ()}, "batch = 0"),
        ({"batches": (4, 0)}, "batch = 0"),
        ({"prompt": 0}, "prompt = 0"),
        ({"new_tokens": -1}, "new-tokens = -1"),
        ({"repeats": 0}, "repeats = 0"),
        ({}, "no folder absent"),
    ],
)
def test_python_refuses_to_measure_nothing(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        regrow.bench(**{"models": "absent", **wrong})


def test_settings_in_python_are_a_mapping() -> None:
    for use in (
        lambda wrong: regrow.prune("absent", "out", overrides=wrong),
        lambda wrong: regrow.analyze("absent", "absent.txt", overrides=wrong),
    ):
        with pytest.raises(InputError, match=r"give a mapping, such as \{'lora.rank': 16\}"):
            use(["lora.rank=4"])


def test_a_single_name_is_not_taken_apart() -> None:
    assert listed("magnitude") == ["magnitude"]
    assert listed(Path("a/b")) == ["a/b"]
    assert listed((Path("a"), "b")) == ["a", "b"]


def test_paths_are_taken_wherever_names_are(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(Plan.whole(find_groups(load_skeleton(str(checkpoint)))).to_json()))
    (tmp_path / "model").symlink_to(checkpoint)
    (tmp_path / "text.jsonl").symlink_to(text)
    absent, plan, out = Path("absent"), Path("plan.json"), Path("out")
    for use in (
        lambda: regrow.evaluate(absent, Path("text.jsonl")),
        lambda: regrow.analyze(absent, Path("text.jsonl")),
        lambda: regrow.bench([absent, Path("model")]),
        lambda: regrow.bench(absent),
        lambda: regrow.apply(absent, out, plan=plan),
        lambda: regrow.compare(absent, out, "magnitude", data=Path("text.jsonl")),
        lambda: regrow.prune(absent, out, data=Path("text.jsonl")),
    ):
        with pytest.raises(InputError, match="there is no folder absent"):
            use()
    for use in (
        lambda data: regrow.evaluate(Path("model"), data),
        lambda data: regrow.analyze(Path("model"), data),
        lambda data: regrow.prune(Path("model"), out, Path("my.yaml"), data=data),
        lambda data: regrow.prune(Path("model"), out, overrides={"data.source": data}),
    ):
        (tmp_path / "my.yaml").write_text("name: mine\n")
        with pytest.raises(InputError, match=r"there is no text file absent\.txt"):
            use(Path("absent.txt"))
    found = regrow.evaluate(Path("model"), Path("text.jsonl"), windows=16, max_windows=1)
    assert found["model"] == "model"
    assert found["perplexity"]["window-16"]["source"] == "text.jsonl"

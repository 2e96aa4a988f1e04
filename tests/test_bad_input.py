"""Whatever is given wrongly: one line that says what is wrong and what to do, exit code 2, nothing left behind."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import CommandLine, write_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

Maker = Callable[[Path, Path], None]
"""Makes the input in a folder (the second) from the tiny LLaMA (the first)."""

PRUNE = "prune LLAMA --data TEXT --out out"
EVALUATE = "evaluate LLAMA --data TEXT"


def nothing(llama: Path, here: Path) -> None:
    """What the command names is not there."""


def file(name: str, content: str | bytes) -> Maker:
    """Write one file."""

    def make(llama: Path, here: Path) -> None:
        path = here / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def copy(change: Callable[[Path], object]) -> Maker:
    """Copy the tiny LLaMA to `model` and damage it."""

    def make(llama: Path, here: Path) -> None:
        shutil.copytree(llama, here / "model")
        change(here / "model")

    return make


def other(model: Callable[[], PreTrainedModel]) -> Maker:
    """Another kind of model as `model`."""

    def make(llama: Path, here: Path) -> None:
        model().save_pretrained(here / "model")
        write_tokenizer(here / "model")

    return make


def bert() -> PreTrainedModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(**shape, vocab_size=320, max_position_embeddings=32))


def t5() -> PreTrainedModel:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**shape, vocab_size=320))


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_header(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:16] = bytes(byte ^ 0xFF for byte in content[:16])
    path.write_bytes(content)


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(model.parent / "whole").save_pretrained(model, max_shard_size="50KB")
    sorted(model.glob("model-0*.safetensors"))[1].unlink()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("unpickled"),)


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, model / "pytorch_model.bin")


def config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def remote_code(model: Path) -> None:
    config(auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, model_type="own")(model)
    (model / "own.py").write_text("from pathlib import Path\nPath('executed').touch()\n")


def without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def folder_of_someone_else(llama: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")


@dataclass(frozen=True)
class Case:
    name: str
    argv: str
    expected: tuple[str, ...]
    make: Maker = field(default=nothing)


def case(name: str, make: Maker, argv: str, *expected: str) -> Case:
    return Case(name, argv, expected, make)


HUB = "neither a usable folder nor to be had from the hub"
CASES = [
    case("absent model, absolute path", nothing, "prune /not/there --data TEXT --out out", "no model folder /not/there"),
    case("absent model, relative path", nothing, "prune ./absent --data TEXT --out out", "no model folder ./absent"),
    case("absent model, deep path", nothing, "prune a/b/c --data TEXT --out out", "no model folder a/b/c"),
    case("model not on the hub", nothing, "prune nobody/nothing --data TEXT --out out", "nobody/nothing", HUB),
    case("model with a plain name not on the hub", nothing, "evaluate nothing --data TEXT", "nothing", HUB),
    case("inspect a model not on the hub", nothing, "inspect nobody/nothing", "nobody/nothing", HUB),
    case("a file given as model", file("model.bin", "x"), "inspect model.bin", "model.bin"),
    case("no such name, odd", nothing, "inspect 'a b?c'", "a b"),
    case("bench absent model", nothing, "bench LLAMA ./absent", "no model folder ./absent"),
    case("bench twice the same", nothing, "bench LLAMA LLAMA", "named twice"),
    case("folder without config", file("model/readme", ""), "prune model --data TEXT --out out", "model holds no config.json"),
    case("config that is not JSON", copy(lambda m: (m / "config.json").write_text("{")), "prune model --data TEXT --out out", "config.json"),
    case("config that is a list", copy(lambda m: (m / "config.json").write_text("[]")), "prune model --data TEXT --out out", "config.json"),
    case("config without model_type", copy(lambda m: (m / "config.json").write_text("{}")), "inspect model", "model_type"),
    case("config of an unknown type", copy(config(model_type="llama9")), "inspect model", "llama9"),
    case("config of impossible shape", copy(config(num_key_value_heads=3)), "inspect model", "model"),
    case("config with hidden_size string", copy(config(hidden_size="big")), "inspect model", "model"),
    case("truncated weights", copy(truncate), "prune model --data TEXT --out out", "model cannot be loaded"),
    case("damaged header", copy(flip_header), "evaluate model --data TEXT", "model cannot be loaded"),
    case("wrong shapes", copy(config(intermediate_size=40)), "evaluate model --data TEXT", "model cannot be loaded"),
    case("missing weights", copy(config(num_hidden_layers=3)), "evaluate model --data TEXT", "model cannot be loaded"),
    case("lost shard", copy(lose_a_shard), "prune model --data TEXT --out out", "model cannot be loaded"),
    case("only a pickle", copy(only_pickle), "prune model --data TEXT --out out", "safetensors"),
    case("encoder", other(bert), "prune model --data TEXT --out out", "BertForMaskedLM", "ForCausalLM"),
    case("encoder and decoder", other(t5), "inspect model", "T5", "ForCausalLM"),
    case("remote code", copy(remote_code), "prune model --data TEXT --out out", "x"),
    case("remote code, evaluate", copy(remote_code), "evaluate model --data TEXT", "--trust-remote-code"),
    case("remote code, inspect", copy(remote_code), "inspect model", "--trust-remote-code"),
    case("remote code, bench", copy(remote_code), "bench model", "--trust-remote-code"),
    case("no tokenizer", copy(without_tokenizer), "prune model --data TEXT --out out", "tokenizer"),
    case("no tokenizer, evaluate", copy(without_tokenizer), "evaluate model --data TEXT", "tokenizer"),
    case("damaged tokenizer", copy(lambda m: (m / "tokenizer.json").write_text("{")), "prune model --data TEXT --out out", "tokenizer"),
    case("tokenizer of another model", copy(lambda m: write_tokenizer(m, 330)), "prune model --data TEXT --out out", "tokenizer has 330", "model embeds 320"),
    case("tokenizer of another model, evaluate", copy(lambda m: write_tokenizer(m, 330)), "evaluate model --data TEXT", "tokenizer has 330", "model embeds 320"),
    # text
    case("absent text", nothing, "prune LLAMA --data absent.txt --out out", "no text file absent.txt"),
    case("absent text, no suffix", nothing, "prune LLAMA --data absent --out out", "absent"),
    case("absent text path", nothing, "prune LLAMA --data ./texts/absent --out out", "absent"),
    case("data set not on hub", nothing, "prune LLAMA --data nobody/texts --out out", "absent"),
    case("hub c4", nothing, "evaluate LLAMA --data wikitext", "absent"),
    case("odd suffix", file("text.docx", b"PK\x03\x04\xff"), "prune LLAMA --data text.docx --out out", "absent"),
    case("empty text", file("text.txt", ""), "prune LLAMA --data text.txt --out out", "no text"),
    case("blank text", file("text.txt", " \n\t\n"), "prune LLAMA --data text.txt --out out", "no text"),
    case("short text", file("text.txt", "Too\nshort\nfor\nanything\n."), "prune LLAMA --data text.txt --out out", "short"),
    case("one-line text", file("text.txt", "Too short."), "prune LLAMA --data text.txt --out out", "short"),
    case("short text, evaluate", file("text.txt", "Too short."), "evaluate LLAMA --data text.txt", "tokens are fewer than one window of 256"),
    case("window longer", nothing, "evaluate LLAMA --data TEXT --window 9999999", "tokens are fewer than one window of 256"),
    case("window longer than positions", nothing, "evaluate LLAMA --data TEXT --window 1024 --max-windows 1", "positions"),
    case("eval text short", file("text.txt", "Too short."), PRUNE + " --eval-data text.txt", "tokens are fewer than one window of 256"),
    case("eval text absent", nothing, PRUNE + " --eval-data absent.txt", "no text file"),
    case("no field", file("a.jsonl", '{"body": "x", "title": "y"}\n'), "prune LLAMA --data a.jsonl --out out", "body", "title", "data.text_field"),
    case("no field eval", file("a.jsonl", '{"body": "x", "title": "y"}\n'), "evaluate LLAMA --data a.jsonl", "body", "title", "--text-field"),
    case("broken jsonl", file("a.jsonl", '{"text": "x"}\n{"text": \n'), "prune LLAMA --data a.jsonl --out out", "a.jsonl"),
    case("jsonl of lists", file("a.jsonl", '[1]\n[2]\n'), "prune LLAMA --data a.jsonl --out out", "a.jsonl"),
    case("jsonl of strings", file("a.jsonl", '"a"\n"b"\n'), "prune LLAMA --data a.jsonl --out out", "a.jsonl"),
    case("jsonl of number text", file("a.jsonl", '{"text": 1}\n{"text":[2]}'), "prune LLAMA --data a.jsonl --out out", "a.jsonl"),
    case("jsonl not utf8", file("a.jsonl", b'{"text": "\xff\xfe"}\n'), "prune LLAMA --data a.jsonl --out out", "a.jsonl"),
    case("broken json", file("a.json", '[{"text": "x"}'), "prune LLAMA --data a.json --out out", "a.json"),
    case("empty jsonl", file("a.jsonl", ''), "prune LLAMA --data a.jsonl --out out", "a.json"),
    case("blank jsonl", file("a.jsonl", '\n\n'), "prune LLAMA --data a.jsonl --out out", "a.json"),
    case("empty json array", file("a.json", '[]'), "prune LLAMA --data a.json --out out", "a.json"),
    case("broken parquet", file("a.parquet", 'PAR1 no'), "prune LLAMA --data a.parquet --out out", "a.parquet"),
    case("not utf8", file("text.txt", "Grün".encode("latin-1")), "prune LLAMA --data text.txt --out out", "not UTF-8"),
    case("folder as text", file("texts/a.txt", "x"), "prune LLAMA --data texts --out out", "is a folder"),
    case("folder as text.txt", file("texts.txt/a.txt", "x"), "prune LLAMA --data texts.txt --out out", "is a folder"),
    case("no data", nothing, "prune LLAMA --out out", "--data"),
    case("empty data", nothing, "prune LLAMA --data '' --out out", "--data"),
    # numbers
    *(case(f"sparsity {x}", nothing, PRUNE + f" --sparsity={x}", "sparsity") for x in ("0", "1", "-1", "abc", "nan", "inf", "0.99999", "", "50%")),
    *(case(f"steps {x}", nothing, PRUNE + f" --steps={x}", "steps") for x in ("-1", "abc", "1.5")),
    *(case(f"seed {x}", nothing, PRUNE + f" --seed={x}", "seed") for x in ("-1", "abc", "99999999999999999999999")),
    case("demo sparsity", nothing, "demo --out out --sparsity x", "--sparsity"),
    case("demo recipe", nothing, "demo --out out --recipe x", "--recipe"),
    # recipe
    case("recipe absent", nothing, PRUNE + " --recipe my.yaml", "my.yaml"),
    case("recipe folder", file("my.yaml/x", ""), PRUNE + " --recipe my.yaml", "my.yaml"),
    case("recipe unknown", nothing, PRUNE + " --recipe lora-prune", "loraprune"),
    case("recipe unknown show", nothing, "recipes lora-prune", "loraprune"),
    case("recipe not yaml", file("my.yaml", "a: [\nb"), PRUNE + " --recipe my.yaml", "my.yaml"),
    case("recipe binary", file("my.yaml", b"\xff\x00"), PRUNE + " --recipe my.yaml", "my.yaml"),
    case("recipe control", file("my.yaml", b"a: \x01"), PRUNE + " --recipe my.yaml", "my.yaml"),
    case("recipe list", file("my.yaml", "- a\n- b"), PRUNE + " --recipe my.yaml", "mapping"),
    case("recipe tag", file("my.yaml", "!!python/object/apply:os.system ['touch x']"), PRUNE + " --recipe my.yaml", "YAML"),
    case("recipe key", file("my.yaml", "prunning: {sparsity: 0.5}"), PRUNE + " --recipe my.yaml", "did you mean 'pruning'"),
    case("recipe nested key", file("my.yaml", "pruning: {sparcity: 0.5}"), PRUNE + " --recipe my.yaml", "did you mean 'sparsity'"),
    case("recipe strange key", file("my.yaml", "pruning: {xyz: 0.5}"), PRUNE + " --recipe my.yaml", "known here"),
    case("recipe number key", file("my.yaml", "1: 2"), PRUNE + " --recipe my.yaml", "known here"),
    case("recipe number key nested", file("my.yaml", "pruning: {1: 2}"), PRUNE + " --recipe my.yaml", "known here"),
    case("recipe type", file("my.yaml", "training: {steps: many}"), PRUNE + " --recipe my.yaml", "training.steps"),
    case("recipe section is value", file("my.yaml", "training: 3"), PRUNE + " --recipe my.yaml", "training"),
    case("recipe section is null", file("my.yaml", "training:\n"), PRUNE + " --recipe my.yaml", "training"),
    case("recipe long wrong value", file("my.yaml", "training: {steps: \"" + "many\\n" * 30 + "\"}"), PRUNE + " --recipe my.yaml", "training"),
    case("set without =", nothing, PRUNE + " --set lora.rank", "key.path=value"),
    case("set unknown", nothing, PRUNE + " --set lora.rnak=3", "did you mean 'rank'"),
    case("set unknown section", nothing, PRUNE + " --set lara.rank=3", "did you mean 'lora'"),
    case("set below value", nothing, PRUNE + " --set seed.x=1", "seed"),
    case("set below value2", nothing, PRUNE + " --set pruning.sparsity.x=1", "sparsity"),
    case("set below null", nothing, PRUNE + " --set training.learning_rate.x=1", "learning_rate"),
    case("set section", nothing, PRUNE + " --set lora=3", "lora"),
    case("set wrong yaml", nothing, PRUNE + " --set 'lora.rank=[3'", "YAML"),
    case("set wrong value", nothing, PRUNE + " --set lora.rank=big", "lora.rank"),
    case("set empty part", nothing, PRUNE + " --set lora..rank=big", "lora.rank"),
    case("set targets", nothing, PRUNE + " --set lora.targets=[nope]", "lora.targets"),
    case("set shard size", nothing, PRUNE + " --set output.shard_size=big --set pruning.calibration_batches=1 --steps 0", "output.shard_size"),
    case("set window 1", nothing, PRUNE + " --set evaluation.windows=[1]", "evaluation.windows"),
    case("set speed_batches 0", nothing, PRUNE + " --set evaluation.speed_batches=[0]", "evaluation.windows"),
    case("set windows none", nothing, PRUNE + " --set evaluation.windows=[]", "evaluation.windows"),
    case("set device", nothing, PRUNE + " --set device=abacus", "abacus"),
    case("set heldout", nothing, PRUNE + " --set data.held_out=0.6", "abacus"),
    case("device", nothing, EVALUATE + " --device abacus", "abacus"),
    case("device cuda", nothing, EVALUATE + " --device cuda:77", "cuda"),
    case("device bench", nothing, "bench LLAMA --device abacus", "abacus"),
    case("device meta", nothing, EVALUATE + " --device meta", "abacus"),
    case("criterion", nothing, PRUNE + " --criterion gatefisher", "did you mean 'gate-fisher'"),
    case("criterion far", nothing, PRUNE + " --criterion xyz", "known"),
    case("criterion file", nothing, PRUNE + " --criterion my.py:score", "no file my.py"),
    case("criterion func", file("my.py", "def scores(e): pass"), PRUNE + " --criterion my.py:score", "no function 'score'"),
    case("criterion syntax", file("my.py", "def score(e):\n  return ("), PRUNE + " --criterion my.py:score", "SyntaxError"),
    case("criterion not py", file("my.txt", "def score(e):\n  return ("), PRUNE + " --criterion my.txt:score", "not a Python"),
    case("criterion raises", file("my.py", "1/0"), PRUNE + " --criterion my.py:score", "ZeroDivisionError"),
    case("criterion exits", file("my.py", "raise SystemExit('bye')"), PRUNE + " --criterion my.py:score", "ZeroDivisionError"),
    case("criterion needs", file("my.py", "NEEDS={'x'}\ndef score(e): return 1"), PRUNE + " --criterion my.py:score", "NEEDS"),
    case("criterion wrong", file("my.py", "def score(e): return 1"), PRUNE + " --criterion my.py:score --steps 0 --set pruning.calibration_batches=1", "my.py"),
    case("criterion crash", file("my.py", "def score(e): return 1/0"), PRUNE + " --criterion my.py:score --steps 0 --set pruning.calibration_batches=1", "my.py"),
    case("shape", nothing, PRUNE + " --shape sideways", "shape"),
    case("out file", file("out", "x"), PRUNE, "out is a file"),
    case("out full", folder_of_someone_else, PRUNE, "not empty"),
    case("out below file", file("a", "x"), "prune LLAMA --data TEXT --out a/out", "a"),
    case("window 1", nothing, EVALUATE + " --window 1", "--window 1"),
    case("window 0", nothing, EVALUATE + " --window 0", "--window 0"),
    case("window abc", nothing, EVALUATE + " --window abc", "--window"),
    case("bos", nothing, EVALUATE + " --bos sideways", "--bos"),
    case("text field", nothing, EVALUATE + " --text-field body", "body"),
    case("bench new tokens", nothing, "bench LLAMA --new-tokens 600", "positions"),
]


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, regrow: CommandLine, tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").symlink_to(tiny_llama)
    case.make(tiny_llama, tmp_path)
    before = tree(tmp_path)
    argv = [{"LLAMA": tiny_llama, "TEXT": tiny_text}.get(word, word) for word in shlex.split(case.argv)]
    import time
    t=time.time()
    done = regrow(*argv, cwd=tmp_path)
    t=time.time()-t
    with open("/tmp/table.txt","a") as f:
        new = sorted(set(tree(tmp_path))-set(before))
        f.write(f"### {case.name} | {case.argv} | code {done.code} {t:.1f}s {new if new else ''}\n{done.complaint[-1500:] if done.code!=2 or done.complaint.count(chr(10))!=1 else done.complaint}")

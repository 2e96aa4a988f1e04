"""The command line when all is well: help, recipes, inspect, evaluate, bench, and where output goes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from conftest import QUICK, STAGE, CommandLine
from transformers import AutoConfig, AutoModelForCausalLM

import regrow
from regrow.cli import app, main
from regrow.console import SPIN_COUNT, expand_home, share_cores
from regrow.recipe import Recipe, dump_recipe, explain_fields, load_recipe, shipped_recipes
from regrow.terminal import terminal_progress

VERBS = sorted(typer.main.get_command(app).commands)


def leaves(tree: dict[str, object], prefix: str = "") -> set[str]:
    """Dotted paths of all values of a tree."""
    found = set()
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, {"GOMP_SPINCOUNT": "10000"}), ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
     ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"})],
)  # fmt: skip
def test_idle_threads_wait_as_the_user_says(given: dict[str, str], found: dict[str, str]) -> None:
    environment = dict(given)
    share_cores(environment)
    assert environment == found


def test_idle_threads_are_told_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(sys, "argv", ["regrow", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT


def test_an_encoding_that_lacks_a_character_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["regrow", "recipes", "--explain"])
    with pytest.raises(SystemExit, match="0"):
        main()
    screen.flush()
    assert b"?" in screen.buffer.getvalue()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--out=~/x", "--out=HOME/x"), ("--out=~", "--out=HOME"), ("data.source=~/x", "data.source=HOME/x"),
        ("--out=~x/y", "--out=~x/y"), ("--out=a~/b", "--out=a~/b"), ("~/x=~/y", "~/x=~/y"),
    ],
)  # fmt: skip
def test_home_is_read_where_shells_leave_it(given: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["regrow", "prune", given])
    expand_home()
    assert sys.argv == ["regrow", "prune", read.replace("HOME", "/home/me")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("printing", [["--version"], ["recipes", "--explain"]], ids=["little", "much"])
def test_printing_to_a_full_disk(printing: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "regrow", *printing], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("regrow: no space left to write what is printed")


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "regrow", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "regrow.cli" in imported
    assert not imported & {"torch", "transformers", "datasets", "peft", "numpy", "pydantic"}


def test_version(command: CommandLine) -> None:
    done = command("--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"regrow {version('regrow')}\n", "")


def test_help_names_every_verb(command: CommandLine) -> None:
    assert VERBS == [
        "analyze", "apply", "bench", "compare", "demo", "evaluate", "export", "inspect", "prune", "recipes", "report",
        "scatter",
    ]  # fmt: skip
    for flag in ("-h", "--help"):
        done = command(flag)
        assert (done.code, done.stderr) == (0, "")
        assert set(VERBS) <= set(done.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option(verb: str, command: CommandLine) -> None:
    done = command(verb, "--help")
    assert (done.code, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    for parameter in typer.main.get_command(app).commands[verb].params:
        assert parameter.help
        assert max(parameter.opts, key=len).lstrip("-").lower() in shown.lower()
        assert re.sub(r"\[/?b\]", "", parameter.help).split()[0] in shown


# --- recipes -------------------------------------------------------------------------------------


def test_recipes_lists_what_ships(command: CommandLine) -> None:
    done = command("recipes")
    assert (done.code, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(shipped_recipes())
    for line in done.stdout.splitlines():
        assert line.split(maxsplit=1)[1] == load_recipe(line.split()[0]).description


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_printed_recipe_is_the_recipe(name: str, command: CommandLine, tmp_path: Path) -> None:
    done = command("recipes", name)
    assert (done.code, done.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    printed = load_recipe(str(tmp_path / "printed.yaml"))
    assert printed == load_recipe(name)
    assert dump_recipe(printed) == done.stdout


def test_explain_covers_every_key(command: CommandLine) -> None:
    done = command("recipes", "--explain")
    assert (done.code, done.stderr) == (0, "")
    explained = dict(re.findall(r"^(\S+) = .*\n    (.+)$", done.stdout, re.MULTILINE))
    assert set(explained) == leaves(Recipe().model_dump())
    assert explained == {path: description for path, description, _ in explain_fields()}


def test_explain_shows_a_recipes_own_values(command: CommandLine) -> None:
    done = command("recipes", "wanda-sp", "--explain")
    assert (done.code, done.stderr) == (0, "")
    assert "pruning.criterion = 'wanda'\n" in done.stdout


def test_the_public_names_are_shown() -> None:
    assert set(regrow.__all__) <= set(dir(regrow))


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_adds_up(command: CommandLine, checkpoint: Path) -> None:
    done = command("inspect", checkpoint, "--json")
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    blocks = [p.numel() for name, p in model.named_parameters() if "self_attn" in name or "mlp" in name]
    assert sum(group["units"] * group["parameters_per_unit"] for group in found["groups"]) == sum(blocks)
    assert found["block_parameters"] == sum(blocks)
    assert found["total_parameters"] == sum(p.numel() for p in model.parameters())
    # Two KV heads, each with two query heads, of 12 channels on a residual stream of 32; an FFN of 48 channels.
    layers = range(model.config.num_hidden_layers)
    shapes = {(g["layer"], g["kind"]): (g["units"], g["parameters_per_unit"]) for g in found["groups"]}
    assert shapes == {(n, "attention"): (2, (2 + 1 + 1 + 2) * 12 * 32) for n in layers} | {
        (n, "ffn"): (48, 3 * 32) for n in layers
    }
    assert len(found["layers"]) == len(layers)
    assert (found["residual"]["kind"], found["residual"]["units"]) == ("hidden", 32)
    assert sum(group["share_of_total"] for group in found["groups"]) == pytest.approx(
        found["block_parameters"] / found["total_parameters"]
    )


def test_inspect_needs_no_weights(command: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    done = command("inspect", tmp_path)
    assert (done.code, done.stderr) == (0, "")
    whole = command("inspect", checkpoint)
    assert whole.stdout == done.stdout
    assert "layers.0" not in done.stdout
    assert f"{3 * 18_432 // 2:,} in the blocks" in done.stdout


# --- evaluate and bench --------------------------------------------------------------------------

WINDOWS = ("--window", "32", "--window", "64", "--bos", "once", "--max-windows", "8")


def test_evaluate_is_the_function(command: CommandLine, checkpoint: Path, text: Path) -> None:
    done = command("evaluate", checkpoint, "--data", text, *WINDOWS, "--json")
    assert done.code == 0
    expected = regrow.evaluate(str(checkpoint), str(text), windows=(32, 64), bos="once", max_windows=8)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))
    assert [one["windows"] for one in expected["perplexity"].values()] == [8, 8]


def test_results_and_progress_go_apart(command: CommandLine, checkpoint: Path, text: Path) -> None:
    """Without a terminal: results on standard output, one plain line per stage on standard error."""
    done = command("evaluate", checkpoint, "--data", text, *WINDOWS)
    assert done.code == 0
    assert re.fullmatch(
        r"window-32: perplexity \d+\.\d{4} \(248 tokens in 8 windows, BOS once\)\n"
        r"window-64: perplexity \d+\.\d{4} \(504 tokens in 8 windows, BOS once\)\n",
        done.stdout,
    )
    assert done.stderr.splitlines() == ["perplexity, window 32 …", "perplexity, window 64 …"]
    assert all(STAGE.fullmatch(line) for line in done.stderr.splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Terminal()
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal_progress() as progress:
        progress.stage("load model")
        progress.stage("train", 3)
        progress.advance(2, "loss [2.5]")
        progress.say("something [notable]")
        progress.advance(1, "loss [1.5]")
        until = time.monotonic() + 10  # bars are drawn a few times a second
        while "loss [1.5]" not in screen.getvalue() and time.monotonic() < until:
            time.sleep(0.05)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in ("load model", "1/1", "train", "3/3", "something [notable]", "loss [1.5]"):
        assert words in shown
    assert capsys.readouterr().out == ""


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    log, seconds = io.StringIO(), iter([0.0, 0.0, 4.0, 12.0, 13.0, 30.0, 30.0, 31.0, 41.0])
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr("regrow.terminal.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with terminal_progress() as progress:
        progress.stage("train", 10)
        for _ in range(3):
            progress.advance(2, "loss [2.5]")
        progress.say("something [notable]")
        progress.advance(2)
        progress.stage("go on", 40)
        progress.advance(30)  # what had been done before
        progress.advance(2)
    assert log.getvalue().splitlines() == [
        "train …",
        "train: 4/10, 24 s left, loss [2.5]",
        "something [notable]",
        "train: 8/10, 9 s left",
        "go on …",
        "go on: 32/40, 40 s left",
    ]


def test_bench_compares_both_models(command: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller[one]"  # what rich would take for markup
    config = AutoConfig.from_pretrained(checkpoint, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(smaller)
    quick = ("--batch", "1", "--batch", "2", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--threads", "1")
    done = command("bench", checkpoint, smaller, *quick)
    assert done.code == 0
    assert [line for line in done.stderr.splitlines() if STAGE.fullmatch(line)] == [
        "load models …",
        "speed …",
        "memory …",
    ]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    for name, (first, second) in ((checkpoint, rows[:2]), (smaller, rows[2:])):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(name).parameters())
        assert first[:3] == [str(name), f"{parameters:,}", "1"]
        assert second[:3] == [str(name), f"{parameters:,}", "2"]
        assert all(float(cell.replace(",", "")) > 0 for cell in (*first[3:5], *second[3:5]))
        assert first[5] == second[5]
        assert first[5].endswith(" MiB")
    ratios = re.findall(r"^(.+): batch (\d): prefill ([\d.]+)×, decode ([\d.]+)×$", done.stdout, re.MULTILINE)
    assert [(name, batch) for name, batch, *_ in ratios] == [(str(smaller), "1"), (str(smaller), "2")]


def test_prune_does_what_its_options_say(command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    given = ["--recipe", "magnitude", "--sparsity", "0.4", "--steps", "1", "--seed", "3", "--criterion", "random"]
    settings = {**QUICK, "lora.rank": 2, "seed": 4}
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    out = tmp_path / "out"
    done = command("prune", checkpoint, "--out", out, "--data", text, *given, "--shape", "uniform", *assigned)
    assert done.code == 0, done.stderr
    used = load_recipe(str(out / "recipe.yaml"))
    assert used == load_recipe(
        "magnitude",
        {"data.source": str(text), "pruning.sparsity": 0.4, "training.steps": 1, "pruning.criterion": "random"}
        | settings,
    )
    results = json.loads((out / "results.json").read_text())
    assert f"{results['sparsity']['block']:.2%} of the block parameters" in done.stdout
    assert done.stdout.rstrip().endswith(str(out / "report.html"))
    stages = [line for line in done.stderr.splitlines() if STAGE.fullmatch(line)]
    assert [stages[0], stages[-1]] == ["read text …", "perplexity, window 32 …"]
    assert not [line for line in stages if line in done.stdout]

"""A comparison: its grid, what is made of it, and that it goes on where it stopped."""

import csv
import itertools
import json
import math
import shutil
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUICK, STORY, CommandLine
from filelock import FileLock
from typer.testing import CliRunner

import regrow
from regrow.checkpoint.files import LOCK_FILE
from regrow.checkpoint.verify import Verification
from regrow.cli import app
from regrow.comparison import grid
from regrow.comparison.cell import DENSE_FILE
from regrow.comparison.grid import Cell, Contender, lay_out
from regrow.comparison.page import markdown
from regrow.comparison.pictures import quality_against_speed
from regrow.comparison.run import Comparison
from regrow.comparison.table import Row, Spread, cost_table, doubts, short_table, task_table
from regrow.data.overlap import overlap
from regrow.data.tokens import Windows
from regrow.errors import InputError
from regrow.evaluation.compare import measure_perplexities
from regrow.evaluation.dense import DenseFigures
from regrow.evaluation.tasks import task_fingerprint
from regrow.recipe import parse_recipe

IN_A_PROCESS = grid._run
SMALL = {**QUICK, "evaluation.max_windows": 4}


@pytest.fixture(scope="module")
def started() -> list[str]:
    """Names of the cells that have run."""
    return []


@pytest.fixture(scope="module")
def measured() -> list[int]:
    """What perplexities have been measured on: windows of each protocol."""
    return []


@pytest.fixture(scope="module")
def compared(tmp_path_factory, checkpoint: Path, text: Path, started: list[str], measured: list[int]):
    """A grid of two contenders, two sparsities and two seeds, its cells run in this process."""

    def run(cell: Cell, model: str, threads: int | None) -> str:
        grid.write_json(cell.beside(".json"), cell.request(model, threads))
        recipe = parse_recipe(cell.request(model, threads)["recipe"])
        regrow.prune(model, cell.folder, recipe, dense_file=cell.folder.parents[1] / DENSE_FILE)
        cell.beside(".cost.json").write_text('{"peak_bytes_above_imports": 1048576}')
        started.append(cell.name)
        return ""

    def measure(model, protocols, progress):
        measured.extend(len(windows) for windows in protocols)
        return measure_perplexities(model, protocols, progress)

    passed = Verification("LlamaForCausalLM", "", 0.0, 1.0, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "_run", run)
        patch.setattr("regrow.walk.verify_checkpoint", lambda model, folder, ids: passed)
        patch.setattr("regrow.evaluation.compare.measure_perplexities", measure)
        patch.setattr("regrow.evaluation.compare.complete", lambda model, tokenizer, prompt: "…")
        out = tmp_path_factory.mktemp("comparison")
        other = tmp_path_factory.mktemp("text") / "other.jsonl"
        words = STORY.split()
        other.write_text("".join(json.dumps({"text": " ".join(words[::-1]) * n}) + "\n" for n in (2, 3, 4)))

        def again(**changed):
            given = {"sparsities": (0.25, 0.5), "seeds": 2, "steps": 2, "data": str(text), "eval_data": str(other)}
            contenders = ["magnitude", "loraprune+random"]
            return regrow.compare(str(checkpoint), out, contenders, overrides=SMALL, **{**given, **changed})

        again()
        yield again


def test_every_cell_has_a_run_and_every_row_its_mean(compared, started: list[str], measured: list[int]) -> None:
    found = compared()
    assert len(started) == len(set(started)) == 8  # the second call ran nothing
    assert len(measured) == 2 * 8 + 1  # the plan alone and the result of each, the dense model once
    assert len({json.dumps(run["perplexity"]["dense"]) for row in found.rows for run in row.runs}) == 1
    assert [(row.contender, row.asked, len(row.runs)) for row in found.rows] == [
        (name, asked, 2) for asked in (0.25, 0.5) for name in ("magnitude", "loraprune+random")
    ]
    row = found.rows[1]
    assert {run["seed"] for run in row.runs} == {0, 1}
    values = [run["perplexity"]["pruned"]["window-32"]["value"] for run in row.runs]
    dense = row.runs[0]["perplexity"]["dense"]["window-32"]["value"]
    assert row.perplexity("pruned", "window-32").mean == pytest.approx(statistics.mean(values))
    assert row.delta("window-32").mean == pytest.approx(statistics.mean(math.log(v / dense) for v in values))
    assert row.peak_bytes == Spread((2**20, 2**20))
    assert row.seconds.mean == pytest.approx(
        statistics.mean(run["seconds"]["total"] - run["seconds"]["evaluate"] for run in row.runs)
    )


def test_the_same_figures_stand_in_every_file(compared) -> None:
    found = compared()
    row = found.rows[-1]
    shown = row.perplexity("pruned", "window-32").text()
    for name in ("comparison.md", "comparison.html"):
        assert shown in (found.folder / name).read_text()
    told = json.loads((found.folder / "comparison.json").read_text())
    assert told["rows"][-1]["perplexity"]["window-32"]["pruned"]["mean"] == row.perplexity("pruned", "window-32").mean
    with (found.folder / "comparison.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 8
    assert float(records[-1]["window-32_pruned"]) == row.runs[-1]["perplexity"]["pruned"]["window-32"]["value"]


def test_the_page_needs_nothing_else(compared) -> None:
    page = (compared().folder / "comparison.html").read_text()
    assert "<p>Peak memory is" in page
    assert "<dt>overlap</dt><dd>at most" in page
    assert page.count("<figure") == page.count("<svg") == 2  # without measured speed
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert "<script" not in page
    assert "<link" not in page


def test_a_grid_can_grow_but_not_change(compared, started: list[str]) -> None:
    before = len(started)
    assert len(compared(sparsities=(0.25, 0.5, 0.4), seeds=1).rows) == 6
    assert len(started) == before + 2
    with pytest.raises(InputError, match=r"0.25-0 holds a run with training\.steps = 2, not 3; choose another --out"):
        compared(steps=3)
    with pytest.raises(InputError, match="holds a run with threads = None, not 4"):
        compared(threads=4)
    with pytest.raises(InputError, match="a sparsity is named twice"):
        compared(sparsities=(0.5, 0.5))
    for key, option in (("seed", "--seeds"), ("pruning.sparsity", "--sparsity")):
        with pytest.raises(InputError, match=f"{key} is what a comparison goes through; give {option}"):
            lay_out(["magnitude"], [0.5], 1, {key: 0.3}, Path("out"))
    for own, option in (("seed=7", "--seeds"), ("pruning.sparsity=0.3", "--sparsity")):
        with pytest.raises(InputError, match=f"would be the same in 2 rounds; give {option} one only"):
            lay_out([f"magnitude@{own}"], [0.2, 0.5], 2, {}, Path("out"))
        assert len(lay_out([f"magnitude@{own}"], [0.5], 1, {}, Path("out"))) == 1


@pytest.mark.parametrize("changed", ["mine.py", "text.txt", "model/tokenizer.json"])
def test_a_comparison_is_of_what_its_files_hold(changed: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    for name in ("mine.py", "text.txt"):
        (tmp_path / name).write_text("def score(evidence): ...\n")
    settings = {"data.source": str(tmp_path / "text.txt")}
    (cell,) = lay_out([f"random+{tmp_path / 'mine.py'}:score"], [0.5], 1, settings, tmp_path / "out")
    before = cell.request(str(tmp_path / "model"), 1)
    assert json.loads(json.dumps(before)) == cell.request(str(tmp_path / "model"), 1) == before
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    assert cell.request(str(tmp_path / "model"), 1) != before


def test_a_comparison_goes_on_however_its_paths_are_spelled(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "model")
    shutil.copy(text, "text.jsonl")

    def cell(name: str) -> Cell:
        return lay_out(["random"], [0.5], 1, {"data.source": name}, tmp_path / "out")[0]

    (tmp_path / "out" / "cells").mkdir(parents=True)
    file = cell("text.jsonl").beside(".json")
    grid.write_json(file, cell("text.jsonl").request("model", None))
    for model, source in (("model/", "./text.jsonl"), (str(tmp_path / "model"), str(tmp_path / "text.jsonl"))):
        cell(source).check_same(model, None)
    with (tmp_path / "text.jsonl").open("a") as opened:
        opened.write("\n")
    with pytest.raises(InputError, match=r"holds a run of another data\.source; choose another --out"):
        cell("text.jsonl").check_same("model", None)
    file.write_text("{")
    with pytest.raises(InputError, match="choose another --out: not valid JSON"):
        cell("text.jsonl").check_same("model", None)


def test_a_cell_runs_in_a_process_of_its_own(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_run", IN_A_PROCESS)
    found = regrow.compare(
        str(checkpoint), tmp_path, ["magnitude", "random@data.source=absent.txt"],
        data=str(text), sparsities=(0.5,), seeds=1, steps=1, threads=1, overrides=SMALL,
    )  # fmt: skip
    assert [row.contender for row in found.rows] == ["magnitude"]
    assert found.rows[0].peak_bytes.mean > 0
    assert set(json.loads((tmp_path / DENSE_FILE).read_text())) == {"perplexity"}
    (reason,) = found.failed.values()
    assert reason.startswith("there is no text file absent.txt")
    assert reason.split(" failed: ")[0] in (tmp_path / "comparison.md").read_text()


def test_figures_are_only_taken_where_they_hold(tmp_path: Path) -> None:
    file, count = tmp_path / "dense.json", itertools.count()

    def figure(model: str = "a", part: str = "perplexity", text: str = "t") -> int:
        return DenseFigures(file, {"model": model}).once(part, (text,), lambda: {"value": next(count)})["value"]

    assert [figure(), figure(), figure(part="tasks"), figure(part="tasks"), figure()] == [0, 0, 1, 1, 0]
    assert [figure(text="other"), figure(), figure(model="b"), figure(part="tasks")] == [2, 3, 4, 1]
    file.write_text(file.read_text()[:-9])
    assert [figure(), figure()] == [5, 5]
    assert DenseFigures(None, {}).once("tasks", "t", lambda: {"value": 7}) == {"value": 7}


def test_a_task_file_is_told_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text("one")
    before = task_fingerprint(str(file))
    file.write_text("two")
    assert task_fingerprint(str(file)) != before
    assert task_fingerprint("boolq") == "boolq"


def test_a_task_is_told_by_the_bytes_of_what_its_file_names(tmp_path: Path) -> None:
    """Another YAML file, data by its whole path or in a folder, a module of a function; else nothing changes."""
    files = {
        "task.yaml": f"include: more/base.yaml\ndoc_to_text: !function utils.read\ndoc_to_choice: {'x' * 5000}",
        "more/base.yaml": f"include: ../more/base.yaml\ndata_files: {{test: '{tmp_path / 'data.jsonl'}'}}"
        f"\ndataset_path: {tmp_path / 'parts'}",
        "data.jsonl": "{}", "utils.py": "", "parts/of/it.jsonl": "{}", "other.jsonl": "{}",
    }  # fmt: skip
    (tmp_path / "more").mkdir()
    (tmp_path / "parts" / "of").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    told = [task_fingerprint(str(tmp_path / "task.yaml"))]
    for name in files:
        with (tmp_path / name).open("a") as file:
            file.write("\n# more")
        told.append(task_fingerprint(str(tmp_path / "task.yaml")))
    assert len(set(told)) == len(files), "all but the last are different"
    assert all(each.startswith("task.yaml ") for each in told)
    assert told[-1] == told[-2]


def test_a_cell_stops_with_whoever_started_it(
    command: CommandLine, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    settings = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    killed = command(
        "compare", checkpoint, "--recipes", "magnitude", "--sparsity", "0.5", "--seeds", "1", "--steps", "100000",
        "--data", text, "--out", tmp_path, *settings,
        when=f"{tmp_path}/cells/*/checkpoint/*-train-000000", signal=signal.SIGKILL,
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL
    run = tmp_path / "cells" / "magnitude-0.5-0"
    alone = FileLock(run / LOCK_FILE)
    with alone.acquire(timeout=60):
        assert "stopped before step" in run.with_name(run.name + ".log").read_text()
    assert list(run.glob("checkpoint/*-train-*"))


def test_contenders_are_read_as_they_are_written() -> None:
    assert Contender.parse("loraprune+magnitude@lora.rank=4@training.patience=2") == Contender(
        "loraprune+magnitude@lora.rank=4@training.patience=2",
        "loraprune",
        {"pruning.criterion": "magnitude", "lora.rank": 4, "training.patience": 2},
    )
    cells = lay_out(["random", "random@seed=7"], [0.2], 1, {"training.steps": 3}, Path("out"))
    assert [(cell.recipe.seed, cell.recipe.training.steps) for cell in cells] == [(0, 3), (7, 3)]
    assert [cell.name for cell in cells] == ["random-0.2-0", "random@seed=7-0.2-0"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "regrow,regrow"], "a contender is named twice"),
        (["--recipes", "nobody"], "there is no recipe 'nobody'"),
        (["--sparsity", "half"], "--sparsity 'half': give numbers parted by commas"),
        (["--sparsity", "1.5"], "pruning.sparsity = 1.5"),
        (["--recipes", "regrow@lora.rank"], "write key.path=value"),
        (["--tasks", "absent.jsonl"], "there is no task file absent.jsonl"),
        (["--data", "absent.txt"], "there is no text file absent.txt"),
        (["--eval-data", "absent.txt"], "there is no text file absent.txt"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    options: list[str], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["compare", str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_run_can_take_is_refused_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(InputError, match=r"model holds no tokenizer.*put tokenizer\.json"):
        regrow.compare(str(tmp_path / "model"), tmp_path / "out", ["random"], data=str(text))
    assert not (tmp_path / "out").exists()


def test_the_verb_shows_the_table_and_what_failed(compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    found = compared()

    def compare(model: str, out: Path, contenders: list[str], **given: object) -> Comparison:
        asked.update(given, model=model, out=out, contenders=contenders)
        return found

    monkeypatch.setattr("regrow.comparison.run.compare", compare)
    several = "magnitude@pruning.kinds=[attention,ffn]"
    options = ["--recipes", f"{several},random,", "--sparsity", "0.25,0.5", "--tasks", "a,b", "--set", "lora.rank=2"]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", "m", "--out", str(tmp_path), *options])
    assert (done.exit_code, done.exception) == (0, None)
    head, lines = short_table(found.rows)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    assert [line for line in shown if line] == lines
    assert [*map(str.strip, done.stdout.splitlines()[2].split("┃")[1:-1])] == head
    assert "perplexity, window-32" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{found.folder / 'comparison.html'}; also .md, .csv and .json"
    assert (asked["model"], asked["out"], asked["contenders"]) == ("m", tmp_path, [several, "random"])
    assert (asked["sparsities"], asked["seeds"], asked["steps"]) == ([0.25, 0.5], 3, None)
    assert (asked["tasks"], asked["threads"], asked["overrides"]) == (["a", "b"], None, {"lora.rank": 2})

    found = replace(found, failed={"random-0.5-0": "no text", "random-0.5-1": "no text"})
    done = CliRunner().invoke(app, ["compare", "m", "--out", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    assert str(done.exception) == "2 runs failed, the first of them random-0.5-0: no text"
    assert "comparison.html" in done.stdout
    assert asked["tasks"] == ()


def test_spread() -> None:
    assert Spread((1.0, 2.0, 3.0)).text() == "2.00 ± 1.00"
    assert Spread((1.25,)).text(1) == "1.2"


def test_doubts_are_told(compared) -> None:
    rows = compared().rows
    assert doubts(rows[2:]) == []
    other = {**rows[3].runs[0], "training": {**rows[3].runs[0]["training"], "tokens": 1}}
    seen = {**other, "overlap": {"ngram": 13, "share": 0.5, "windows": 3}}
    told = doubts([rows[2], type(rows[3])("loraprune+random", 0.5, (seen,))])
    assert len(told) == 3
    assert "different numbers of tokens" in told[0]
    assert told[1] == "Fewer seeds than others: loraprune+random."
    assert told[2].startswith("50.0% of the evaluated text's 13-grams")


def test_cost_speed_and_tasks_have_their_spread_and_say_what_they_are() -> None:
    runs = tuple(
        {
            "seed": seed,
            "sparsity": {"units": 0.5, "block": 0.5, "total": 0.4},
            "perplexity": {
                k: {"window-8": {"value": 9.0, "nll": 2.2, "tokens_sha256": ""}} for k in ("dense", "cut", "pruned")
            },
            "tasks": {k: {"a": {"value": 0.5 + seed / 10}, "b": {"value": 0.5}} for k in ("dense", "pruned")},
            "training": {"rank": 2, "trainable_parameters_at_the_end": 3, "tokens": 5},
            "size": {"pruned": {"total": 1000}},
            "seconds": {"total": 12.0 + 2 * seed, "evaluate": 2.0},
            "cost": {"peak_bytes_above_imports": 2**20 * (2 + 2 * seed)},
            "speedup": [{"batch": 4, "prefill": 1.5 + seed, "decode": 1.25}],
            "overlap": {"ngram": 13, "share": 0.004 * seed, "windows": 1},
        }
        for seed in (0, 1)
    )
    rows = [Row("magnitude", 0.5, runs)]
    head, (line,) = cost_table(rows)
    assert head[-2:] == ["prefill speed-up, batch 4", "decode speed-up, batch 4"]
    assert line[2:] == ["11 ± 1", "3 ± 1", "1,000", "2.00 ± 0.71", "1.25 ± 0.00"]
    assert task_table(rows)[1][1][2:] == ["55.0 ± 7.1%", "50.0 ± 0.0%", "52.5 ± 3.5%"]
    text = markdown(rows, {"model": "m"}, {})
    assert "A speed-up is the result's speed ÷ the dense model's.\n\n| contender" in text
    assert doubts(rows) == []
    unmeasured = tuple({key: part for key, part in run.items() if key != "speedup"} for run in runs)
    stopped = {**runs[0], "cost": {**runs[0]["cost"], "went_on": True}}
    mixed = [Row("random", 0.5, unmeasured), Row("flap", 0.5, (stopped, unmeasured[1])), *rows]
    head, lines = cost_table(mixed)
    assert head[-1] == "decode speed-up, batch 4"
    assert [each[-2:] for each in lines] == [["", ""], ["", ""], ["2.00 ± 0.71", "1.25 ± 0.00"]]
    assert quality_against_speed(mixed[:2]) is None
    drawn = quality_against_speed(mixed)
    assert drawn is not None
    assert [text.get_text() for text in drawn.axes[0].get_legend().get_texts()] == ["magnitude"]
    assert doubts(mixed) == ["Runs of flap had been stopped: their peak memory is of what was done since."]
    assert text.endswith("* overlap: at most 0.40% of the evaluated text's 13-grams stand in the training text\n")


def test_overlap_counts_shared_runs_of_tokens() -> None:
    chance = torch.Generator().manual_seed(0)
    train, test = (Windows(torch.randint(0, 90, (n, 32), generator=chance), "", "none") for n in (40, 5))
    assert overlap(train, test).share == 0
    test.ids_NT[3, 4:20] = train.ids_NT[17, 10:26]  # 16 tokens hold 4 runs of 13
    found = overlap(train, test)
    assert (found.share, found.windows, found.ngram) == (pytest.approx(4 / (5 * 20)), 1, 13)
    assert overlap(train, train).share == 1
    assert overlap(train, test, ngram=99).ngram == 32

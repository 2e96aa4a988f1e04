"""Two processes come to what one does; whoever counts them is not deceived."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import together
import torch
from accelerate import PartialState

import regrow
from regrow import cli
from regrow.checkpoint.journal import Journal
from regrow.console import tell
from regrow.data.tokens import Batch
from regrow.errors import InputError, LostOther
from regrow.launcher import NUMBERS, Launch, rank, read_launch
from regrow.preflight import check_processes
from regrow.processes import ALONE, Processes, join
from regrow.recipe import load_recipe

FOLDERS = [str(Path(__file__).parents[1] / name) for name in ("src", "scripts", "tests")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Launched:
    """What two processes left, and said."""

    folder: Path
    found: dict[str, Any]
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def launched(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """All that is done by two processes, in one launch: starting is most of the time."""
    folder = tmp_path_factory.mktemp("together")
    settings = [word for key, value in together.CHANGES.items() for word in ("--set", f"{key}={value}")]
    prune = ["prune", checkpoint, "--recipe", "loraprune", "--data", text, "--steps", 4, "--processes", 2, *settings]
    words = [together.__file__, folder, *prune, "--out", folder / "out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Launched(folder, json.loads((folder / "found.json").read_text()), done.stdout, done.stderr)


def assert_close(one: Any, other: Any) -> None:
    """The same tree, its numbers equal within what float32 can tell."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    elif isinstance(one, str):
        assert one == other
    else:
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", together.WORK)
def test_two_processes_train_as_one(name: str, launched: Launched, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(together.outcome(together.session(together.WORK[name], tmp_path))))
    assert launched.found[name]["plan"] == alone["plan"]
    assert_close(launched.found[name]["numbers"], alone["numbers"])
    assert launched.found[name]["adapters"] == pytest.approx(alone["adapters"], rel=1e-4, abs=1e-6)


def test_two_processes_end_on_the_original_weights_as_one(launched: Launched, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = together.on_originals(tmp_path)
    assert done.summary["quantization"]["original_from"] == 2
    alone = json.loads(json.dumps(together.outcome(done)))
    assert launched.found["originals"]["plan"] == alone["plan"]
    assert_close(launched.found["originals"]["numbers"], alone["numbers"])
    assert launched.found["originals"]["adapters"] == pytest.approx(alone["adapters"], rel=1e-4, abs=1e-6)


def test_two_processes_analyse_as_one(launched: Launched) -> None:
    assert_close(launched.found["sensitivity"], json.loads(json.dumps(together.sensitivity())))


@pytest.mark.usefixtures("lean")
def test_two_processes_prune_as_one(launched: Launched, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The same plan, losses and files as one process leaves; one of the two speaks."""
    two, one = launched.folder / "out", tmp_path / "one"
    alone = regrow.prune(str(checkpoint), one, "loraprune", data=str(text), steps=4, overrides=together.CHANGES)
    assert (two / "plan.json").read_bytes() == (one / "plan.json").read_bytes()
    losses = [
        [step["loss"] for part in ("steps", "validations") for step in json.loads(file.read_text())[part]]
        for file in (two / "history.json", one / "history.json")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    left = [sorted(str(file.relative_to(out)) for file in out.rglob("*")) for out in (two, one)]
    assert left[0] == left[1]
    results = [json.loads((out / "results.json").read_text()) for out in (two, one)]
    assert [each["machine"]["processes"] for each in results] == [2, 1]
    perplexities = [each["perplexity"]["pruned"]["window-32"]["value"] for each in results]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert alone.results == results[1]
    again = regrow.prune(str(checkpoint), two, "loraprune", data=str(text), steps=4, overrides=together.CHANGES)
    assert again.results == results[0], "one process takes what two have finished"
    assert launched.stderr.count("attach LoRA …") == 1
    assert launched.stdout.count("perplexity, window-32") == 1


@pytest.mark.parametrize(("rows", "count"), [(5, 2), (2, 3), (8, 4), (0, 2), (7, 1)])
def test_parts_are_the_whole(rows: int, count: int) -> None:
    whole = Batch(torch.arange(rows * 2).view(rows, 2), torch.ones(rows, 2, dtype=torch.bool), torch.arange(rows))
    parts = []
    for number in range(count):
        one = Processes()
        one.rank, one.count = number, count
        parts.append(whole.rows(one.rows(rows)))
        assert [len(ids) for ids in one.parts([whole.ids_BT])] == [len(parts[-1].ids_BT)] * (len(parts[-1].ids_BT) > 0)
    assert torch.cat([part.ids_BT for part in parts]).equal(whole.ids_BT)
    assert torch.cat([part.numbers_B for part in parts if part.numbers_B is not None]).equal(torch.arange(rows))
    assert sum(part.tokens for part in parts) == whole.tokens
    assert max(map(len, (part.ids_BT for part in parts))) - min(map(len, (part.ids_BT for part in parts))) <= 1


def test_one_process_is_left_alone() -> None:
    held = torch.nn.Parameter(torch.ones(2))
    held.grad = torch.ones(2)
    ALONE.add_gradients([held])
    ALONE.add([held.grad])
    assert held.grad.tolist() == [1, 1]
    assert ALONE.own_seed(7) == 7
    assert join("cpu") is ALONE


def test_what_launchers_say() -> None:
    assert read_launch({}) == Launch()
    assert read_launch({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2"}) == Launch(4, 3, 2, "WORLD_SIZE")
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert read_launch(mpi) == Launch(2, 1, 2, "OMPI_COMM_WORLD_SIZE")
    for local in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"):
        assert read_launch({**mpi, local: "1"}).local == 1
    for wrong in ({"RANK": "1"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}):
        with pytest.raises(InputError, match="launcher's"):
            read_launch(wrong)
    # What `accelerate launch --cpu --num_processes 2` gives to the one process that it starts.
    with pytest.raises(InputError, match="has started one by itself"):
        read_launch({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("variables", "words", "complaint"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, [], "says 2 processes, but they do not meet"),
        ({"RANK": "1"}, [], "the launcher's variables do not go together"),
        ({}, ["--processes", "2"], "the number that runs is 1; start with torchrun --nproc-per-node 2 -m regrow"),
    ],
)
def test_a_world_of_another_size(
    variables: dict[str, str], words: list[str], complaint: str, checkpoint: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in (*NUMBERS, *NUMBERS.values(), "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that whatever becomes of it is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    PartialState._reset_state()  # a tracker of an earlier test may have left one of a process by itself
    out = tmp_path / "out"
    argv = ["regrow", "prune", str(checkpoint), "--data", str(text), "--out", str(out), "--set", "device=cpu", *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1
    assert not out.exists()
    assert rank() == 0


def test_only_prune_is_shared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["regrow", "recipes"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "only prune is shared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"training.batch_size": 2}, "training.batch_size=2 is less than one for each of 3"),
        ({"compensation.windows": 2}, "compensation.windows=2"),
        ({"search.windows": 1}, "search.windows=1"),
        ({"pruning.target": "perplexity=+5%"}, "--target perplexity"),
    ],
)
def test_what_cannot_be_shared(settings: dict[str, Any], complaint: str) -> None:
    recipe = load_recipe("regrow", settings)
    check_processes(recipe, 1)
    with pytest.raises(InputError, match=complaint):
        check_processes(recipe, 3)


def test_parts_are_of_several_processes(text: Path) -> None:
    recipe = load_recipe("regrow", {"training.offload": "shards"})
    check_processes(recipe, 2)
    with pytest.raises(InputError, match=r"shards parts .* there is one: start with torchrun .*--offload disk"):
        check_processes(recipe, 1)
    with pytest.raises(InputError, match="analyze works in one process"):
        regrow.analyze("anything", str(text), overrides={"training.offload": "shards"})


@pytest.mark.usefixtures("lean")
def test_weights_in_parts_are_pruned_as_whole_ones(
    launched: Launched, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """To the end, where the main process is alone with weights of which it had half."""
    one = regrow.prune(
        str(checkpoint), tmp_path / "one", "loraprune", data=str(text), steps=4, offload="disk",
        overrides=together.CHANGES,
    )  # fmt: skip
    two = regrow.Result.read(launched.folder / "parts")
    assert two.plan == one.plan
    assert two.results["verification"]["passed"]
    assert two.results["machine"]["processes"] == 2
    values = [each.results["perplexity"]["pruned"]["window-32"]["value"] for each in (one, two)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_one_process_goes_on_with_what_two_began(launched: Launched, tmp_path: Path) -> None:
    """Their journal holds the chance of both; a single process has its own."""
    shutil.copytree(launched.folder / "broken", tmp_path / "broken")
    work = together.DROPPED_OUT
    journal = Journal(tmp_path / "broken", print)
    begun = journal.read("train")
    assert begun is not None
    assert {name.partition("/")[0] for name in journal.chance_of} == {"0", "1"}
    assert not [name for name in begun.tensors if "chance-of" in name]
    done = together.session(work, tmp_path / "broken")
    assert len(done.history.steps) == 5


@pytest.mark.parametrize(("number", "error", "told"), [
    ("0", InputError("no\nroom"), "regrow: no room\n"),
    ("1", InputError("no room"), "regrow: process 1: no room\n"),
    ("1", LostOther("gone"), ""),
])  # fmt: skip
def test_who_complains(
    number: str, error: InputError, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", number)
    monkeypatch.setattr("regrow.console.SECONDS_TO_END", 0.0)
    tell(error)
    assert capsys.readouterr().err == told

"""What a run leaves, used again: the verbs `apply`, `scatter` and `report` (floor 4)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from regrow.checkpoint.files import check_new, parse_json, storage_errors, write_text
from regrow.checkpoint.licence import licence_of
from regrow.checkpoint.load import load_config, load_skeleton, load_tokenizer, output_dtype, weights_folder
from regrow.checkpoint.lock import alone_in, alone_in_new
from regrow.checkpoint.peft_folder import Adapter
from regrow.checkpoint.processors import processor_files
from regrow.checkpoint.source import Source
from regrow.checkpoint.stream import check_plan, open_adapters, stream_checkpoint
from regrow.errors import InputError
from regrow.planning.plan import Plan, expert_of
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe, load_recipe
from regrow.report.card import model_card
from regrow.report.facts import check_finished, read_facts
from regrow.report.markdown import write_report
from regrow.report.page import write_page
from regrow.settings import Output
from regrow.structure.finding import find_groups
from regrow.structure.positions import index_map


def apply(
    model: str | Path,
    out: str | Path,
    *,
    plan: str | Path | None = None,
    adapters: str | Path | None = None,
    run: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Cut a checkpoint to a plan and merge a run's adapters into it, tensor by tensor, never loading the model.

    Args:
        model: the checkpoint that the plan was made for: a folder, or a repository on the hub.
        out: a new or empty folder.
        plan: a run's `plan.json`.
        adapters: its `adapters.safetensors`, with the factors and the refitted parameters; None: plain cut.
        run: instead of both, the run's folder; dtype and size of files are then its recipe's, unless given.
        dtype: `float32`, `bfloat16`, `float16`; by default (`auto`) as the checkpoint.
        shard_size: largest size of a safetensors file, for example 5GB.

    Returns:
        `out`: a plain checkpoint, as `regrow.prune` leaves it in `model/`.

    Raises:
        InputError: if what is given does not fit together, or another process writes there; nothing half-written is
            left.
    """
    model = str(model)
    if (plan is None) == (run is None) or (run is not None and adapters is not None):
        raise InputError("apply needs a plan (and adapters), or a run's folder, which has both; give --plan or --run")
    recipe, results = None, None
    if run is not None:
        if not (Path(run) / "recipe.yaml").is_file():
            raise InputError(f"{run} holds no recipe.yaml; give the folder of a run of regrow prune")
        plan, adapters = Path(run) / "plan.json", Path(run) / "adapters.safetensors"
        recipe = load_recipe(Path(run) / "recipe.yaml")
        finished = Path(run) / "results.json"
        results = _results(finished) if finished.is_file() else None
    given = {"output.dtype": dtype, "output.shard_size": shard_size}
    output = (recipe or Recipe()).override({key: value for key, value in given.items() if value is not None}).output
    folder = Path(out)
    check_new(folder)
    assert plan is not None
    chosen = read_plan(Path(plan))
    load_config(model)
    tokenizer = load_tokenizer(model)
    source = Source(model, weights_folder(model))
    with storage_errors(), alone_in_new(folder):
        stream_checkpoint(
            source,
            folder,
            chosen,
            None if adapters is None else open_adapters(Path(adapters)),
            tokenizer,
            dtype=output_dtype(model, output.dtype),
            shard_size=output.shard_size,
            extras=texts(model, recipe, chosen, results),
            progress=progress or Silent(),
        )
    return folder


def scatter(adapter: str | Path, out: str | Path, *, plan: str | Path, model: str | Path) -> Path:
    """Carry an adapter trained on a pruned model over to the full one; see `Adapter.scatter`.

    Args:
        adapter: a PEFT folder.
        out: a new or empty folder.
        plan: the `plan.json` that the model was pruned by.
        model: the full one; its weights are not read.

    Raises:
        InputError: if what is given does not fit together, or another process writes there.
    """
    folder, model = Path(out), str(model)
    check_new(folder)
    chosen, small, skeleton = read_plan(Path(plan)), Adapter.read(Path(adapter)), load_skeleton(model)
    whole = find_groups(skeleton)
    check_plan(chosen, whole, model)
    positions = index_map(skeleton, whole, chosen.positions_within(Plan.whole(whole)))
    with storage_errors(), alone_in_new(folder):
        small.scatter(positions, skeleton, model).write(folder)
    return folder


def keep_adapter(
    model: str, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> list[Path]:
    """Split a run's result into `base/`, pruned and refitted, and `adapter/`, which PEFT puts on it.

    Args:
        folder: the run's, with its plan and adapters.

    Returns:
        The files.
    """
    plan = read_plan(folder / "plan.json")
    stream_checkpoint(
        Source(model, weights_folder(model)), folder / "base", plan, open_adapters(folder / "adapters.safetensors"),
        tokenizer, dtype=output_dtype(model, recipe.output.dtype), shard_size=recipe.output.shard_size,
        extras={"plan.json": texts(model, recipe, plan)["plan.json"]}, progress=progress, merge=False,
    )  # fmt: skip
    factors = load_file(folder / "adapters.safetensors")
    mixture = any(expert_of(name) is not None for name in plan.groups)
    Adapter.of_run(factors, recipe.lora, str((folder / "base").resolve()), mixture).write(folder / "adapter")
    return [file for part in ("base", "adapter") for file in sorted((folder / part).rglob("*")) if file.is_file()]


def save_streamed(
    model: str,
    folder: Path,
    output: Output,
    tokenizer: PreTrainedTokenizerBase,
    extras: Mapping[str, str],
    progress: Progress,
) -> None:
    """Write a run's result into `model/` from the original files, its plan and its adapters; as `save_checkpoint`.

    Args:
        folder: the run's, with its plan and adapters.
    """
    stream_checkpoint(
        Source(model, weights_folder(model)), folder / "model", read_plan(folder / "plan.json"),
        open_adapters(folder / "adapters.safetensors"), tokenizer, dtype=output_dtype(model, output.dtype),
        shard_size=output.shard_size, extras=extras, progress=progress,
    )  # fmt: skip


def report(run: str | Path) -> tuple[Path, Path]:
    """Make a finished run's `report.md` and `report.html` anew from its other files.

    Returns:
        The two files.

    Raises:
        InputError: if the folder holds no finished run, a file in it is damaged, or another process works there.
    """
    folder = Path(run)
    check_finished(folder)
    with storage_errors(), alone_in(folder):
        return write_reports(folder)


def write_reports(folder: Path) -> tuple[Path, Path]:
    """As `report`, for whoever works in the folder already."""
    facts = read_facts(folder)
    text, page = folder / "report.md", folder / "report.html"
    write_text(text, write_report(facts))
    write_text(page, write_page(facts))
    return text, page


def texts(model: str, recipe: Recipe | None, plan: Plan, results: dict[str, Any] | None = None) -> dict[str, str]:
    """The text files that go with a pruned checkpoint: its card and its plan, and what the original has for images."""
    return {
        **processor_files(model),
        "README.md": model_card(model, recipe, plan, licence_of(model), results),
        "plan.json": json.dumps(plan.to_json(), indent=2) + "\n",
    }


def _results(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8", errors="replace")
    found: dict[str, Any] = parse_json(text, f"{file}: give a run's folder as the run left it")
    return found


def read_plan(file: Path) -> Plan:
    """A plan from its file.

    Raises:
        InputError: if there is none, or it is not a plan.
    """
    try:
        return Plan.parse(file.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"plan {file}: {error.strerror}; give a run's plan.json") from error

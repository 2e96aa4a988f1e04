"""`regrow.prune`: settle the recipe, then walk."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.files import check_folder, storage_errors
from regrow.checkpoint.lock import alone_in
from regrow.checkpoint.state import same_bits
from regrow.given import gathered
from regrow.processes import join
from regrow.progress import Progress, Silent
from regrow.recipe import Recipe, load_recipe
from regrow.results import Result, everywhere
from regrow.resume import check_spared
from regrow.walk import Walk


def prune(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "regrow",
    *,
    data: str | Path | None = None,
    instructions: str | Path | None = None,
    eval_data: str | Path | None = None,
    sparsity: float | None = None,
    target: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    criterion: str | None = None,
    quantize: str | None = None,
    offload: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
    argv: Sequence[str] = (),
    dense_file: Path | None = None,
) -> Result:
    """Prune a causal LM, regrow its skill, and leave a plain checkpoint and an honest report in `out`.

    Args:
        model: a folder, or a repository on the hub.
        out: a new or empty folder, or that of an interrupted run, which then goes on, or of a finished one, which is
            returned; either must have been asked for the same.
        recipe: a shipped recipe's name, a YAML file, or a recipe.
        data: text to score and train on; see `regrow.data.source.load_documents`. By default the model writes it.
        instructions: records to train on after the text; see `regrow.data.instructions`.
        eval_data: text to evaluate on; by default documents held out of `data`.
        target: instead of `sparsity`, what the result shall be: see `regrow.planning.target.parse_target`.
        quantize: int8 or nf4: how the frozen weights are kept while scoring and training.
        offload: cpu, disk or shards (each of several processes has a part): where the frozen weights lie when they are
            not computed with.
        overrides: `key.path` -> value, applied to the recipe last.
        fresh: do it from the start, whatever run `out` holds.
        processes: how many have to take part; by default as many as a launcher (torchrun) has started. All of them call
            this function alike; the main one alone writes to `out` and tells progress.
        argv: the command line that asked for the run, without the program's name, for the report; by default it tells
            how to call this function with the run's recipe.
        dense_file: where perplexity and tasks of the dense model are kept for other runs that measure them alike.

    Raises:
        InputError: if something given cannot work, or another process works in `out`; nothing half-written is left.
        Stopped: a KeyboardInterrupt, if a signal asks for it while training; the same call goes on.
    """
    given = {
        "data.source": data,
        "data.instructions": instructions,
        "data.eval_source": eval_data,
        "pruning.sparsity": sparsity,
        "pruning.target": target,
        "training.steps": steps,
        "seed": seed,
        "pruning.criterion": criterion,
        "training.quantization": quantize,
        "training.offload": offload,
    }
    settings, model = gathered(given, overrides), str(model)
    chosen = recipe.override(settings) if isinstance(recipe, Recipe) else load_recipe(recipe, settings)
    folder, together = Path(out), join(chosen.device, processes)
    told = progress if progress is not None and together.is_main else Silent()
    with storage_errors(), ExitStack() as until_the_end:
        with together.main_first():
            check_spared(folder, model, chosen, "" if isinstance(recipe, Recipe) else str(recipe), fresh)
            begun = check_folder(folder) and not fresh
            shown = begun and not os.access(folder, os.W_OK)  # all that can be done where nobody may write
            if together.is_main and not shown:
                until_the_end.enter_context(alone_in(folder))
        if chosen.training.deterministic and chosen.device != "cpu" and torch.cuda.is_available():
            until_the_end.enter_context(same_bits())
        result = Walk(model, folder, chosen, told, fresh, argv, together, dense_file).walk()
        return everywhere(result, folder, together)

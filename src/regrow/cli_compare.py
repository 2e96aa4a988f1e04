"""The verb `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from regrow.console import going_on_later, quiet, shown_progress
from regrow.errors import InputError


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or a repository on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and the runs; the same again goes on there.")],
    recipes: Annotated[
        str,
        typer.Option(help="Names or YAML files, parted by commas; RECIPE+CRITERION and RECIPE@key.path=value as well."),
    ] = "magnitude,llm-pruner,loraprune,lorashear,regrow",
    sparsity: Annotated[str, typer.Option(help="Shares of the block parameters to remove.")] = "0.2,0.5",
    seeds: Annotated[int, typer.Option(min=1, help="So many seeds, from 0.")] = 3,
    data: Annotated[str | None, typer.Option(help="Text to score and train on, as for prune.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Text to evaluate on, as for prune.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps, the same for all; without it each recipe's own.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks, parted by commas: the harness' names, .yaml or .jsonl files.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each run.")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key.path=value", help="Change a setting of all recipes; may be repeated."),
    ] = None,
) -> None:
    """Run several recipes on MODEL, alike in text, tokens and evaluation, and put the results side by side."""
    from regrow.recipe import parse_assignments

    try:
        shares = [float(part) for part in sparsity.split(",")]
    except ValueError as error:
        raise InputError(f"--sparsity {sparsity!r}: give numbers parted by commas, such as 0.2,0.5") from error
    settings = parse_assignments(assign or [])
    quiet()
    with going_on_later(), shown_progress() as progress:
        from regrow.comparison.run import compare as run

        found = run(
            model, out, _parted(recipes), data=data, eval_data=eval_data,
            sparsities=shares, seeds=seeds, steps=steps, tasks=(tasks or "").split(",") if tasks else (),
            threads=threads, overrides=settings, progress=progress,
        )  # fmt: skip
    from rich.console import Console
    from rich.table import Table

    from regrow.comparison.table import short_table

    head, lines = short_table(found.rows)
    table = Table(*head, title=f"perplexity, {found.rows[0].protocols[0]}")
    for line in lines:
        table.add_row(*line)
    Console().print(table, markup=False)
    print(f"{found.folder / 'comparison.html'}; also .md, .csv and .json")
    if found.failed:
        name, reason = next(iter(found.failed.items()))
        raise InputError(f"{len(found.failed)} runs failed, the first of them {name}: {reason}")


def _parted(recipes: str) -> list[str]:
    """Names parted by commas, but for those within brackets, which belong to a setting's value."""
    parts, depth = [""], 0
    for letter in recipes:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]

"""The results on the screen, at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regrow.report.markdown import asked_lines
from regrow.report.words import figure, plain, quoted, short_name


def show(results: dict[str, Any], folder: Path, console: Console) -> None:
    """Before and after, a completion of each model, and where everything lies."""
    title = f"{short_name(results['model'])} · {results['recipe']}"
    table = Table("", "dense", "cut", "pruned and recovered", title=escape(title))
    quality, size = results["perplexity"], results["size"]
    for name in quality["dense"]:
        table.add_row(f"perplexity, {name}", *(figure(quality[kind][name]["value"], ".2f") for kind in quality))
    table.add_row("parameters", f"{size['dense']['total']:,}", "", f"{size['pruned']['total']:,}")
    table.add_row(
        "multiply-accumulates a token",
        f"{size['dense']['macs_per_token']:,}",
        "",
        f"{size['pruned']['macs_per_token']:,}",
    )
    for task, score in results.get("tasks", {}).get("dense", {}).items():
        table.add_row(task, f"{score['value']:.1%}", "", f"{results['tasks']['pruned'][task]['value']:.1%}")
    if "memory" in results:
        peak = {name: f"{item['peak_bytes'] / 2**20:,.0f} MiB" for name, item in results["memory"].items()}
        table.add_row("peak memory of a forward pass", peak["dense"], "", peak["pruned"])
    if "speed" in results:
        for dense, pruned in zip(results["speed"]["dense"], results["speed"]["pruned"], strict=True):
            for phase in ("prefill", "decode"):
                label = f"{phase} tokens/s, batch {dense['batch']}"
                table.add_row(label, f"{dense[phase]['median']:,.0f}", "", f"{pruned[phase]['median']:,.0f}")
    console.print(table, markup=False)
    sparsity = results["sparsity"]
    console.print(
        f"removed {sparsity['units']:.2%} of the units, {sparsity['block']:.2%} of the block parameters, "
        f"{sparsity['total']:.2%} of all parameters"
    )
    for line in asked_lines(results):
        console.print(plain(line), markup=False, highlight=False)
    for item in results["completions"]:
        console.print()
        for kind in ("prompt", "dense", "cut", "pruned"):
            console.print(f"[b]{kind}[/b] ", end="")
            console.print(quoted(item[kind]), markup=False, highlight=False)
    console.print(
        f"\ncheckpoint {folder / 'model'}\nreport     {folder / 'report.html'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )

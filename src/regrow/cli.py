"""The command line. Nothing heavy is imported before it is needed: `regrow --help` is instant."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from regrow.cli_compare import compare
from regrow.cli_reuse import apply, export, report, scatter
from regrow.console import (
    AsJson,
    Trust,
    expand_home,
    given_up,
    going_on_later,
    print_anything,
    printed,
    quiet,
    share_cores,
    shown_progress,
    tell,
)
from regrow.errors import InputError
from regrow.launcher import rank, read_launch

app = typer.Typer(
    name="regrow",
    help="Cut a large language model back to the size its hardware can carry, and regrow its skill through LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or a repository on the hub.")]
DEVICE_HELP = "cpu, cuda, cuda:1, …; auto: the first CUDA GPU, else the CPU."
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
SOURCE_HELP = "A .txt, .jsonl (field text), .json or .parquet file, or a data set on the hub (wikitext, c4)."


def main() -> None:
    """Run the command line: an `InputError` is one line on standard error and exit code 2."""
    share_cores()
    print_anything()
    expand_home()
    try:
        with printed():
            app()
    except InputError as error:
        tell(error)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if context.invoked_subcommand != "prune" and (count := read_launch().count) > 1:
        raise InputError(f"{count} processes have been launched; only prune is shared, start anything else once")
    if show:
        print(f"regrow {version('regrow')}")
        raise typer.Exit


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    recipe: Annotated[
        str, typer.Option(help="A shipped recipe (see [b]regrow recipes[/b]) or a YAML file.")
    ] = "regrow",
    sparsity: Annotated[
        str | None, typer.Option(help="Share of the block parameters to remove, for example 0.5.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Instead of --sparsity: params=2.0B, size=3GB, speedup=1.6x, perplexity=+5% or =6.5."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Text to score and train on; without it the model writes its own. {SOURCE_HELP}"),
    ] = None,
    instructions: Annotated[
        str | None,
        typer.Option(help="Instructions to train on after the text: .jsonl, .json, .parquet, or from the hub."),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Text to evaluate on; by default documents held out of --data.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps of LoRA training.")] = None,
    seed: Annotated[str | None, typer.Option(help="Source of all chance in the run.")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="What a unit is worth: a name, or your own FILE.py:FUNCTION.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="uniform: same widths in every layer, loads everywhere. free: each its own.")
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Leave base/ (pruned, not merged) and adapter/ (PEFT) as well.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(help="Keep the frozen weights in int8 or nf4 while scoring and training; the result is plain."),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="For a model too large: keep the frozen weights in the host's memory (cpu), in their files (disk), "
            "or in parts, one with each process (shards; with torchrun)."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key.path=value", help="Change anything in the recipe; may be repeated."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do it from the start, whatever run --out holds; else that one goes on.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse to start unless a launcher (torchrun) has started so many processes."),
    ] = None,
) -> None:
    """Prune MODEL and regrow its skill: leaves model/, plan.json, results.json and report.html in --out."""
    from regrow.recipe import load_recipe, parse_assignments

    given = {
        "pruning.sparsity": _number("--sparsity", sparsity, float),
        "pruning.target": target,
        "data.source": data,
        "data.instructions": instructions,
        "data.eval_source": eval_data,
        "training.steps": _number("--steps", steps, int),
        "seed": _number("--seed", seed, int),
        "pruning.criterion": criterion,
        "pruning.shape": shape,
        "output.keep_adapter": keep_adapter or None,
        "training.quantization": quantize,
        "training.offload": offload,
        "device": device,
    }
    settings = {key: value for key, value in given.items() if value is not None} | parse_assignments(assign or [])
    load_recipe(recipe, settings)  # before anything heavy is imported
    quiet()
    with going_on_later(), shown_progress() as progress:
        from regrow.processes import leave
        from regrow.run import prune as run

        result = run(
            model, out, recipe, overrides=settings, fresh=fresh, processes=processes, progress=progress,
            argv=sys.argv[1:],
        )  # fmt: skip
        leave()
    if rank() == 0:
        _summary(result.results, result.folder)


@app.command()
def inspect(
    model: Model,
    graph: Annotated[
        Path | None, typer.Option(help="Draw a decoder layer's dependency graph into this .svg or .html file.")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="The layer that --graph draws, counted from 0.")] = 0,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what MODEL is made of: per layer its units, what one costs, and its share of the whole."""
    quiet()
    from regrow.checkpoint.load import load_skeleton
    from regrow.checkpoint.offer import choices
    from regrow.structure.finding import find_groups

    skeleton = load_skeleton(model, trust_remote_code)
    groups = find_groups(skeleton)
    possible = choices(skeleton.config, groups)
    if graph is not None:
        from regrow.measure import draw_layer

        draw_layer(skeleton, groups, layer, graph)
    if as_json:
        print(json.dumps(groups.to_json() | {"choices": possible}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "kind", "units", "parameters a unit", "share of total", "slices")
    for group in (*groups, *([groups.residual] if groups.residual else [])):
        share = group.units * group.cost / groups.total_parameters
        names = ", ".join(
            f"{s.parameter.removesuffix('.weight').split('.')[-1]}{'[:, …]' if s.is_input else '[…]'}"
            for s in group.slices
            if "bias" not in s.parameter and group.layer >= 0
        )
        names = names or f"{len(group.slices)} parameters, from the embeddings to the head"
        where = str(group.layer) if group.layer >= 0 else "all"
        kind = group.kind if group.expert is None else f"{group.kind}, expert {group.expert}"
        table.add_row(where, kind, str(group.units), f"{group.cost:,}", f"{share:.2%}", names)
    console = Console()
    console.print(table, markup=False)
    console.print(
        f"{groups.total_parameters:,} parameters, {groups.block_parameters:,} in the blocks "
        f"({groups.block_parameters / groups.total_parameters:.1%}); {len(groups.layers)} layers as depth units "
        f"of {groups.layers[0].parameters:,} parameters"
    )
    print("What a pruned model of a stock class can have:")
    for name, choice in possible.items():
        print(f"  {name}: {choice}")


@app.command()
def analyze(
    model: Model,
    data: Annotated[str, typer.Option(help=f"Text to score and measure on. {SOURCE_HELP}")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for sensitivity.json and sensitivity.svg; what is there is used again.")
    ] = None,
    shares: Annotated[str, typer.Option(help="Shares of a group's units to remove in turn.")] = "0.1,0.25,0.5,0.75",
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of held-out text (default 32).")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key.path=value", help="Change a recipe's setting; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how sensitive MODEL is, layer by layer: what pruning each group alone does to the loss."""
    from regrow.recipe import load_recipe, parse_assignments

    parts = [_number("--shares", part, float) for part in shares.split(",")]
    settings = {"analysis.shares": parts} | parse_assignments(assign or [])
    protect = load_recipe("regrow", settings).analysis.protect
    quiet()
    with given_up(), shown_progress() as progress:
        from regrow.measure import analyze as measure

        found = measure(model, data, out, windows=windows, overrides=settings, progress=progress)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    from rich.console import Console

    from regrow.report.sensitivity import show_sensitivity

    show_sensitivity(found, found.protected(protect), Console())


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=f"Text to evaluate on. {SOURCE_HELP}")],
    window: Annotated[list[str] | None, typer.Option(help="Tokens in a window (default 256); may be repeated.")] = None,
    bos: Annotated[
        str, typer.Option(help="Where BOS goes: document, once (as the literature does with WikiText-2), none.")
    ] = "document",
    text_field: Annotated[str, typer.Option(help="The field of a record that holds its text.")] = "text",
    max_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate at most so many windows.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL's perplexity on a text."""
    lengths = [_number("--window", text, int) for text in window or ["256"]]
    quiet()
    with given_up(), shown_progress() as progress:
        from regrow.measure import evaluate as measure

        results = measure(
            model, data, windows=lengths, bos=bos, text_field=text_field, max_windows=max_windows,  # type: ignore[arg-type]
            device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for name, one in results["perplexity"].items():
        text = f"{one['tokens']:,} tokens in {one['windows']:,} windows, BOS {one['bos']}"
        print(f"{name}: perplexity {one['value']:.4f} ({text})")


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [MODEL …]", help="Checkpoints; ratios are to the first.")
    ],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size (default 1 and 4); may be repeated.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, of which the median is shown.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; pin them for ratios to trust.")] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure size, prefill and decode speed, and peak memory of one or more models, in turns."""
    quiet()
    with given_up(), shown_progress() as progress:
        from regrow.measure import bench as measure

        results = measure(
            models, batches=batch or [1, 4], prompt=prompt, new_tokens=new_tokens, repeats=repeats, threads=threads,
            device=device, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(results, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "parameters", "batch", "prefill tokens/s", "decode tokens/s", "peak memory")
    for name in models:
        for one in results["speed"][name]:
            table.add_row(
                name, f"{results['size'][name]['total']:,}", str(one["batch"]), f"{one['prefill']['median']:,.0f}",
                f"{one['decode']['median']:,.0f}", f"{results['memory'][name]['peak_bytes'] / 2**20:,.0f} MiB",
            )  # fmt: skip
    Console().print(table, markup=False)
    for name, each in results["speedup"].items():
        for one in each:
            print(f"{name}: batch {one['batch']}: prefill {one['prefill']:.2f}×, decode {one['decode']:.2f}×")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, every key written out.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="List every key with its meaning and default, or value in that recipe.")
    ] = False,
) -> None:
    """List the shipped recipes, print one, or explain every key."""
    from regrow.recipe import Recipe, dump_recipe, explain_fields, load_recipe, shipped_recipes

    if explain:
        shown = Recipe() if name is None else load_recipe(name)
        for path, description, _ in explain_fields():
            print(f"{path} = {attrgetter(path)(shown)!r}\n    {description}")
    elif name is not None:
        print(dump_recipe(load_recipe(name)), end="")
    else:
        for known in shipped_recipes():
            print(f"{known:12} {load_recipe(known).description}")


app.command()(compare)
app.command()(apply)
app.command()(scatter)
app.command()(report)
app.command()(export)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("regrow-demo"),
    sparsity: Annotated[str, typer.Option(help="Share of the block parameters to remove.")] = "0.5",
    steps: Annotated[str, typer.Option(help="Optimizer steps of LoRA training.")] = "120",
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a YAML file.")] = "regrow",
) -> None:
    """Prune a small LLaMA that comes with regrow, on Python's own documentation. Offline, some five minutes."""
    from regrow.recipe import load_recipe

    share, count = _number("--sparsity", sparsity, float), _number("--steps", steps, int)
    load_recipe(recipe, {"pruning.sparsity": share, "training.steps": count})  # before the corpus is gathered
    quiet()
    with going_on_later(), shown_progress() as progress:
        from regrow.demo.show import run_demo

        result = run_demo(out, recipe, share, count, progress, sys.argv[1:])
    _summary(result.results, result.folder)


def _number(option: str, text: str | None, kind: Callable[[str], Any]) -> Any:
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r}: give a {'whole ' if kind is int else ''}number") from error


def _summary(results: dict[str, Any], folder: Path) -> None:
    from rich.console import Console

    from regrow.report.terminal import show

    show(results, folder, Console())

"""The verbs that use again what a run has left: `apply` and `scatter`."""

from pathlib import Path
from typing import Annotated

import typer

from regrow.console import quiet, shown_progress


def apply(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint that the plan was made for.")],
    out: Annotated[Path, typer.Option(help="New folder for the pruned checkpoint.")],
    plan: Annotated[Path | None, typer.Option(help="A run's plan.json.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="The run's adapters.safetensors; without it the model is only cut.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Instead of both: the run's folder.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; auto (default): as the checkpoint.")
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest size of a safetensors file (default 5GB).")] = None,
) -> None:
    """Cut MODEL to a plan and merge adapters, tensor by tensor: a model of any size, in memory for one tensor."""
    quiet()
    with shown_progress() as progress:
        from regrow.reuse import apply as work

        folder = work(
            model, out, plan=plan, adapters=adapters, run=run, dtype=dtype, shard_size=shard_size, progress=progress
        )
    print(f"{folder}: a plain checkpoint")


def scatter(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT folder of an adapter of the pruned model.")],
    plan: Annotated[Path, typer.Option(help="The plan.json that the model was pruned by.")],
    model: Annotated[str, typer.Option(help="The full model that the plan was made for.")],
    out: Annotated[Path, typer.Option(help="New folder for the full model's adapter.")],
) -> None:
    """Carry an adapter trained on a pruned model over to the full one: zeros where something was removed."""
    quiet()
    from regrow.reuse import scatter as work

    print(f"{work(adapter, out, plan=plan, model=model)}: a PEFT adapter of {model}")

"""The verbs that use again what a run has left: `apply`, `scatter`, `report` and `export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from regrow.console import AsJson, Trust, given_up, quiet, shown_progress


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
    with given_up(), shown_progress() as progress:
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


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run of regrow prune.")],
) -> None:
    """Make a run's report.md and report.html anew from its results, history, scores and plan."""
    quiet()
    from regrow.reuse import report as work

    for file in work(folder):
        print(file)


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder, or a run's.")],
    out: Annotated[Path, typer.Option(help="Where to: a new folder; for GGUF a file.")],
    to: Annotated[str | None, typer.Option(help="gguf or onnx; without it, with --pad, safetensors.")] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Make uneven layers equal with zeros, so that stock classes load them.")
    ] = False,
    multiple: Annotated[int, typer.Option(min=1, help="With --pad: make the FFN width a multiple of this.")] = 1,
    kind: Annotated[
        str,
        typer.Option("--type", help="GGUF: f32, f16, bf16, q8_0, q5_1, …, q4_k_m and its like; auto: as stored."),
    ] = "auto",
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for families that regrow does not write.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint in DIR for other programs: GGUF, ONNX, or padded to equal layers."""
    quiet()
    from regrow.formats.export import export as write

    with given_up():
        done = write(
            folder, out, to, pad=pad, multiple=multiple, kind=kind, converter=converter,  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    print(json.dumps(done, indent=2) if as_json else ", ".join(f"{key} {value}" for key, value in done.items()))

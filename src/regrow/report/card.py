"""The checkpoint's README: metadata for the hub, then what was done to the model, at what cost, and its limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from regrow.planning.plan import Plan
from regrow.recipe import Recipe
from regrow.report.cautions import cautions
from regrow.report.markdown import asked_lines, before_after, checked_line, ratios_line, training_line
from regrow.report.words import short_name, short_source

CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def model_card(
    model: str,
    recipe: Recipe | None,
    plan: Plan,
    licence: Mapping[str, str],
    results: dict[str, Any] | None = None,
) -> str:
    """The card as Markdown with the hub's YAML in front.

    Args:
        model: a folder, or a repository on the hub; only the latter is named as the base model.
        recipe: None: the model was only cut.
        licence: of the base model, by the hub's keys, as far as it is known.
        results: of the finished run.
    """
    name = short_name(model)
    metadata = ModelCardData(
        base_model=None if Path(model).is_dir() else model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["regrow", "pruned", *(["lora"] if recipe else [])],
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    trained = ""
    if recipe:
        trained = (
            f" (recipe `{recipe.name}`, seed {recipe.seed}) and LoRA adapters, trained to make up for them, were "
            "merged in"
        )
    body = [
        f"# {name}, {plan.sparsity.block:.0%} of its block parameters removed",
        f"A plain checkpoint: {_what_went(plan)} were cut out with [regrow](https://pypi.org/project/regrow/)"
        f"{trained}. It loads like any other; if `modeling_regrow.py` lies beside this card, layers "
        "differ in width and `trust_remote_code=True` is needed.",
        CODE,
    ]
    if results:
        body += [
            "## Before and after",
            *asked_lines(results),
            before_after(results),
            _protocol(results),
            ratios_line(results),
        ]
    if results and recipe:
        body += ["## How it was made", _made(recipe, results), training_line(results), checked_line(results)]
    if results:
        body += ["## Limits", "\n".join(f"* {caution}" for caution in cautions(results))]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _what_went(plan: Plan) -> str:
    layers = f"{len(plan.removed_layers)} of {len(plan.layers)} layers" if plan.removed_layers else ""
    narrower = {name for name, group in plan.groups.items() if 0 < len(group.keep) < group.units}
    fewer = {name for name in narrower if name.endswith(".expert")}
    experts = "whole experts" if fewer else ""
    widths = ""
    if narrower - fewer or not (layers or experts or plan.narrows):
        widths = "whole attention heads and FFN channels"
    hidden = ""
    if plan.narrows and plan.residual is not None:
        hidden = f"{plan.residual.removed} of {plan.residual.units} hidden channels"
    return " and ".join(part for part in (layers, experts, widths, hidden) if part)


def _protocol(results: dict[str, Any]) -> str:
    told = [
        f"{name}: {one['tokens']:,} tokens of {short_source(one['source'])} in {one['windows']:,} windows, "
        f"BOS {one['bos']}, SHA-256 of the tokens {one['tokens_sha256'][:16]}…"
        for name, one in results["perplexity"]["dense"].items()
    ]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return f"Perplexity on {'; '.join(told)}. Measured on: {machine}."


def _made(recipe: Recipe, results: dict[str, Any]) -> str:
    pruning = recipe.pruning
    return (
        f"regrow {results['regrow']}, recipe `{recipe.name}`: criterion `{pruning.criterion}`, allocation "
        f"`{pruning.allocation}`, schedule `{pruning.schedule}`, shape `{pruning.shape}`, LoRA of rank "
        f"{recipe.lora.rank}, seed {recipe.seed}."
    )

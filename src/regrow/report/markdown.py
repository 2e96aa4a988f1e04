"""The report and the model card, from the same facts that `results.json` holds."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regrow.planning.plan import Plan
from regrow.recipe import Recipe

CARRIED = "the adapters began at the best approximation of it that their rank allows"
"""How a refit is told of that left the base weights alone."""


def write_report(
    results: dict[str, Any], cuts: Sequence[dict[str, float]], validations: Sequence[dict[str, float]]
) -> str:
    """The whole run on one page."""
    parts = [
        f"# {short_name(results['model'])}, pruned with `{results['recipe']}`",
        _summary(results),
        *_asked(results),
        "## Before and after",
        _before_after(results),
        "## What was removed",
        _removed(results, cuts),
        *_prepared(results["training"]),
        "## Side by side",
        *(_completion(item) for item in results["completions"]),
        "## Training",
        _training(results, validations),
        *(["## Data over time", _mixture(results["training"]["mixture"])] if "mixture" in results["training"] else []),
        "## Checked",
        _checked(results),
        "## Where the time went",
        _table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]),
        "## Measured on",
        _table(["", ""], [[key, str(value)] for key, value in results["machine"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


def model_card(name: str, recipe: Recipe | None, plan: Plan, results: dict[str, Any] | None = None) -> str:
    """The checkpoint's README: metadata for the hub, then what was done to the model (without a recipe: only cut)."""
    name = short_name(name)
    metadata = ("---", f"base_model: {name}", "library_name: transformers", "pipeline_tag: text-generation")
    head = "\n".join([*metadata, "tags: [pruned, regrow]", "---", ""])
    done = (
        ""
        if recipe is None
        else (
            f" (recipe `{recipe.name}`, seed {recipe.seed}) and LoRA "
            "adapters, trained to make up for them, were merged in"
        )
    )
    body = [
        f"# {name}, {plan.sparsity.block:.0%} of its block parameters removed",
        f"A plain checkpoint: {_what_went(plan)} were cut out with "
        f"[regrow](https://pypi.org/project/regrow/){done}. It loads like any other.",
    ]
    if results:
        body += [*_asked(results), _before_after(results), _ratios(results)]
    return head + "\n" + "\n\n".join(body) + "\n"


def _what_went(plan: Plan) -> str:
    layers = f"{len(plan.removed_layers)} of {len(plan.layers)} layers" if plan.removed_layers else ""
    narrowed = {name for name, group in plan.groups.items() if 0 < len(group.keep) < group.units}
    experts = {name for name in narrowed if name.endswith(".expert")}
    widths = "whole attention heads and FFN channels" if narrowed - experts or not (layers or experts) else ""
    return " and ".join(part for part in (layers, "whole experts" if experts else "", widths) if part)


def short_name(model: str) -> str:
    """A folder's own name; a repository's as it is."""
    return Path(model).name if Path(model).is_dir() else model


def _summary(results: dict[str, Any]) -> str:
    protocol, values = next(iter(_perplexities(results).items()))
    size = results["size"]
    text = (
        f"**{_millions(size['dense']['total'])} → {_millions(size['pruned']['total'])} parameters; "
        f"perplexity {values['dense']:.2f} → {values['pruned']:.2f}** "
        f"({values['cut']:.2f} before recovery; {protocol})"
    )
    if "speedup" in results:
        text += "".join(
            f"; batch {one['batch']}: prefill {one['prefill']:.2f}×, decode {one['decode']:.2f}×"
            for one in results["speedup"]
        )
    return text + "."


def _asked(results: dict[str, Any]) -> list[str]:
    """What was asked for besides a sparsity and what came of it, and whose text it was: nothing for a plain run."""
    return [
        tell(results[key]) for key, tell in (("target", target_line), ("own_text", own_text_line)) if key in results
    ]


def target_line(target: dict[str, Any]) -> str:
    """The target, the sparsity it came to, and what was reached."""
    said = f"Target `{target['asked']}`: {target['sparsity']:.4f} of the block parameters to remove"
    reached, limit = target["reached"], target["limit"]
    match target["kind"]:
        case "params":
            return f"{said}; {reached:,} parameters reached, at most {limit:,.0f} asked for."
        case "size":
            return f"{said}; the weight files have {reached:,} bytes, at most {limit:,.0f} asked for."
        case "speedup":
            short = "" if reached >= limit else ", which is **short of the target**"
            return (
                f"{said}; predicted from this machine's latency table {target['predicted']:.2f}×, measured "
                f"{reached:.2f}× ({target['phase']}, one text at a time){short}."
            )
        case _:
            trials = ", ".join(
                f"{one['sparsity']:.3f} → {one['recovered']:.3f} ({'holds' if one['holds'] else 'too much'})"
                for one in target["trials"]
            )
            return (
                f"{said}; perplexity on the validation text {reached:.3f}, at most {limit:.3f} asked for, dense "
                f"{target['dense']:.3f}. Trials, sparsity → validation perplexity: {trials}. The smallest model that "
                "holds was taken; the text evaluated below decided nothing."
            )


def own_text_line(own: dict[str, Any]) -> str:
    """That nobody gave a text, and what that means for the figures."""
    said = (
        f"No text was given: calibrated and recovered on {own['texts']} texts ({own['tokens']:,} tokens) generated by "
        f"the model itself (`{own['file']}`; {own['dropped_texts']} more were dropped)."
    )
    if own["evaluated_on_it"]:
        return f"{said} **Perplexity below is on such text (held out)**, and says little about text of people."
    return said


def _perplexities(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    measured = results["perplexity"]
    return {name: {kind: measured[kind][name]["value"] for kind in measured} for name in measured["dense"]}


def _before_after(results: dict[str, Any]) -> str:
    size, rows = results["size"], []
    for name, values in _perplexities(results).items():
        note = f"perplexity, {name}"
        rows.append([note, f"{values['dense']:.3f}", f"{values['cut']:.3f}", f"{values['pruned']:.3f}"])
    for key, label in (
        ("total", "parameters"),
        ("non_embedding", "… without embeddings"),
        ("macs_per_token", "multiply-accumulates per token"),
    ):
        rows.append([label, _millions(size["dense"][key]), "", _millions(size["pruned"][key])])
    rows.append(["weights in memory", _bytes(size["dense"]["bytes"]), "", _bytes(size["pruned"]["bytes"])])
    if "memory" in results:
        peak = {name: _bytes(item["peak_bytes"]) for name, item in results["memory"].items()}
        rows.append(["peak memory of a forward pass", peak["dense"], "", peak["pruned"]])
    for dense, pruned in zip(*(results.get("speed", {}).get(k, []) for k in ("dense", "pruned")), strict=True):
        for phase in ("prefill", "decode"):
            label = f"{phase} tokens/s, batch {dense['batch']}"
            rows.append([label, f"{dense[phase]['median']:.0f}", "", f"{pruned[phase]['median']:.0f}"])
    return _table(["", "dense", "cut, not recovered", "pruned and recovered"], rows)


def _ratios(results: dict[str, Any]) -> str:
    sparsity = results["sparsity"]
    return (
        f"Asked for {sparsity['requested']:.1%} (of {sparsity['basis']}). "
        f"Removed: {sparsity['units']:.2%} of the units, {sparsity['block']:.2%} of the block parameters, "
        f"{sparsity['total']:.2%} of all parameters."
    )


def _removed(results: dict[str, Any], cuts: Sequence[dict[str, float]]) -> str:
    layers: dict[str, dict[str, int]] = {}
    for name, width in results["widths"].items():
        _, layer, *_, kind = name.split(".")
        each = layers.setdefault(layer, {})
        each[kind] = max(width, each.get(kind, 0))  # of experts' channels: of those that stay
    kinds = sorted({kind for widths in layers.values() for kind in widths})
    widths = _table(
        ["layer", *kinds],
        [
            [layer, *(str(widths.get(kind, "")) if any(widths.values()) else "removed" for kind in kinds)]
            for layer, widths in layers.items()
        ],
    )
    events = _table(
        ["before step", "of the target", "block parameters removed"],
        [[f"{cut['step']:.0f}", f"{cut['fraction']:.1%}", f"{cut['block']:.2%}"] for cut in cuts],
    )
    return "\n\n".join([_ratios(results), "Units left in each layer:", widths, "Cuts:", events])


def _completion(item: dict[str, str]) -> str:
    kinds = (f"**{kind}:** {_quoted(text)}" for kind, text in item.items() if kind != "prompt")
    return "\n\n".join([f"> {_quoted(item['prompt'])}", *kinds])


def _training(results: dict[str, Any], validations: Sequence[dict[str, float]]) -> str:
    training = results["training"]
    lines = (
        f"{training['steps']} steps, {training['tokens']:,} tokens, "
        f"peak learning rate {training['learning_rate']:.2e}, "
        f"{training['trainable_parameters_at_the_end']:,} trainable parameters, "
        f"{training['skipped_updates']} updates skipped. Best validation loss at step {training['best_step']}."
    )
    if base := training.get("quantization"):
        lines += (
            f" While scored and trained the base was kept in {base['kind']} ({_bytes(base['bytes'])} with adapters, "
            "before any cut): losses here are of that model. Plan and adapters then went to the original weights."
        )
    curve = _table(["step", "validation loss"], [[f"{v['step']:.0f}", f"{v['loss']:.4f}"] for v in validations])
    return f"{lines}\n\n{curve}"


def _prepared(training: dict[str, Any]) -> list[str]:
    """What was done between choosing units and training: nothing, for most recipes."""
    lines = []
    if search := training.get("search"):
        best = f"divergence {search['best']:.3f} nats a token from the dense model, before recovery"
        if "candidates" in search:
            rows = [
                [*(str(each.get(kind, "")) for kind in ("layers", "attention", "ffn")), f"{value:.3f}"]
                for each, value in zip(search["candidates"], search["divergence"], strict=True)
            ]
            lines += [f"Widths searched; the best: {best}.", _table(["layers", "KV heads", "channels", ""], rows)]
        else:
            lines.append(
                f"Widths searched in {len(search['trace'])} trials from {search['starts']} starting points; "
                f"from {search['trace'][0]:.3f} to {best}."
            )
    if done := training.get("compensation"):
        how = f"{done['blend']:.0%} of the refit was best on held-out text" if "blend" in done else CARRIED
        lines.append(
            f"What stays was refitted: {done['repaired']:.0%} of the cut's output error taken away on average, on the "
            f"windows it was fitted to; {how}."
        )
    if teacher := training.get("distillation"):
        steps = ", ".join(f"{count} steps by `{kind}`" for kind, count in teacher["teacher_steps"].items())
        lines.append(f"Taught by the dense model: {steps}.")
    return ["## Before training", *lines] if lines else []


def _mixture(mixture: dict[str, Any]) -> str:
    """Where the training text came from, and how that changed."""
    sources = mixture["sources"]
    drawn = _table(
        ["source", "stage", "first share", "sequences drawn", "dense loss"],
        [
            [
                name,
                one["stage"],
                f"{one['initial_share']:.1%}",
                f"{one['sequences_drawn']:,}",
                f"{one['dense_loss']:.4f}",
            ]
            for name, one in sources.items()
        ],
    )
    rounds = _table(
        ["before step", "stage", *sources],
        [[str(one["step"]), one["stage"], *(_of_source(one, name) for name in sources)] for one in mixture["rounds"]],
    )
    ended = [f"Stage {stage} had converged by step {step}." for stage, step in mixture["ended_early_at"].items()]
    text = (
        f"Shares by the rule `{mixture['rule']}`. In a cell: share, held-out loss (and that minus the dense model's)."
    )
    return "\n\n".join([drawn, " ".join([text, *ended]), rounds])


def _of_source(one: dict[str, Any], name: str) -> str:
    return f"{one['weights'][name]:.1%}, {one['losses'][name]:.4f} ({one['degradation'][name]:+.4f})"


def _checked(results: dict[str, Any]) -> str:
    verification = results["verification"]
    return (
        f"A fresh process with stock transformers {verification['transformers']} loaded the checkpoint as "
        f"`{verification['model_class']}`; its logits differ from those in memory by at most "
        f"{verification['difference']:.2g} (allowed {verification['allowed']:.2g})."
    )


def _quoted(text: str) -> str:
    return " ".join(text.split())


def _millions(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

"""The report as one HTML file that needs no other file and no network."""

from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from regrow.planning.demand import UNIT_NAMES
from regrow.report.cautions import cautions, error_factor
from regrow.report.facts import Facts
from regrow.report.figures import NAMES, mixture_charts, quality_charts, score_charts, training_charts
from regrow.report.heat import heat_of
from regrow.report.markdown import (
    asked_lines,
    before_after_rows,
    checked_line,
    prepared_lines,
    ratios_line,
    training_line,
)
from regrow.report.words import figure, place, plain, short_bytes, short_count, short_name, short_source

SECTIONS = (
    ("summary", "Summary"),
    ("widths", "Widths"),
    ("sensitivity", "Sensitivity"),
    ("scores", "Scores"),
    ("training", "Training"),
    ("data", "Data weights"),
    ("quality", "Quality, size, speed"),
    ("side-by-side", "Side by side"),
    ("reproduce", "Make it again"),
)


def write_page(facts: Facts) -> str:
    """The whole run as HTML. The same facts give the same bytes."""
    results, history = facts.results, facts.history
    validations = history["validations"]
    heat = facts.sensitivity and heat_of(facts.sensitivity, facts.recipe.analysis.protect)
    parts: dict[str, Any] = {
        "scores": list(score_charts(facts.scores, facts.plan)),
        "training": list(training_charts(results, history)),
        "mixture": list(mixture_charts(results["training"]["mixture"])) if "mixture" in results["training"] else [],
        "heat": heat,
    }
    empty = {
        "sensitivity": not heat,
        "scores": not parts["scores"],
        "training": not parts["training"],
        "data": not parts["mixture"],
        "side-by-side": not results["completions"],
    }
    environment = Environment(
        loader=PackageLoader("regrow.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("report.html").render(
        title=f"{short_name(results['model'])}, pruned with {results['recipe']}",
        sections=[(key, name) for key, name in SECTIONS if not empty.get(key)],
        results=results,
        recipe=facts.recipe,
        numbers=list(_numbers(results)),
        sentences=[*_sentences(results), *map(plain, asked_lines(results))],
        cautions=cautions(results),
        before_after=before_after_rows(results),
        removed=ratios_line(results),
        widths=_widths(facts),
        trained=[plain(line) for line in (*prepared_lines(results["training"]), training_line(results))],
        cuts=[[f"{c['step']:.0f}", f"{c['fraction']:.1%}", f"{c['block']:.2%}"] for c in history["cuts"]],
        validations=[[f"{v['step']:.0f}", figure(v["loss"], ".4f")] for v in validations],
        quality=list(quality_charts(results)),
        answers=list(NAMES.items()),
        command=facts.command,
        recipe_sha256=facts.recipe_sha256,
        environment=_environment(results),
        checked=plain(checked_line(results)),
        seconds=_seconds(results["seconds"]),
        **parts,
    )
    return text + "\n"


def _numbers(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What became smaller, what it cost, what became faster: one figure each."""
    size = results["size"]
    before, after = size["dense"]["total"], size["pruned"]["total"]
    yield {
        "name": "Size",
        "figure": f"−{1 - after / before:.0%}",
        "detail": f"{short_count(before)} → {short_count(after)} parameters; weights in memory "
        f"{short_bytes(size['dense']['bytes'])} → {short_bytes(size['pruned']['bytes'])}",
    }
    dense, pruned = (next(iter(results["perplexity"][kind].values())) for kind in ("dense", "pruned"))
    factor = error_factor(pruned)
    sure = "" if factor is None else f", each ± {factor - 1:.1%}"
    ratio = pruned["value"] / dense["value"]
    yield {
        "name": "Perplexity (lower is better)",
        "figure": f"{ratio - 1:+.1%}".replace("-", "−") if ratio < 2 else f"{ratio:.1f} ×",
        "detail": f"{dense['value']:.2f} → {pruned['value']:.2f}{sure}; windows of {pruned['window']} tokens",
    }
    if "speedup" not in results:
        yield {"name": "Speed", "figure": "–", "detail": "not measured"}
        return
    first, on = results["speedup"][0], results["speed"]["dense"][0]
    texts = "one text at a time" if on["batch"] == 1 else f"{on['batch']} texts at a time"
    yield {
        "name": "Speed of writing",
        "figure": f"{first['decode']:.2f} ×",
        "detail": f"{texts}, on {on['device']}; of reading a prompt: {first['prefill']:.2f} ×",
    }


def _sentences(results: dict[str, Any]) -> list[str]:
    """The run in two sentences."""
    training, sparsity = results["training"], results["sparsity"]
    measured = {kind: next(iter(one.values())) for kind, one in results["perplexity"].items()}
    nll = {kind: one["nll"] for kind, one in measured.items()}
    did = (
        f"{short_name(results['model'])} lost {sparsity['total']:.1%} of its parameters ({sparsity['block']:.1%} of "
        f"those in its blocks), the ones that mattered least by their scores, and was then trained for "
        f"{training['steps']:,} steps on {training['tokens']:,} tokens to make up for them."
    )
    harm, won = nll["cut"] - nll["dense"], nll["cut"] - nll["pruned"]
    back = f", so that training undid {won / harm:.0%} of the harm" if harm > 0 and won > 0 else ""
    cost = (
        f"How surprised it is by a text that it has not seen ({short_source(measured['dense']['source'])}) went from a "
        f"perplexity of {measured['dense']['value']:.2f} to {measured['cut']['value']:.2f} by the cut and to "
        f"{measured['pruned']['value']:.2f} after training{back}."
    )
    return [did, cost]


def _widths(facts: Facts) -> dict[str, Any]:
    layers: dict[int, dict[str, dict[str, int]]] = {}
    for name, group in facts.plan.groups.items():
        layer, kind = place(name)
        cell = layers.setdefault(layer, {}).setdefault(kind, {"kept": 0, "units": 0})
        cell["kept"] += len(group.keep)
        cell["units"] += group.units
    kinds = sorted({kind for cells in layers.values() for kind in cells})
    gone = facts.plan.removed_layers
    return {
        "kinds": kinds,
        "names": {kind: UNIT_NAMES.get(kind.removesuffix(" (experts)"), "units") for kind in kinds},
        "rows": [
            {"layer": f"{layer} (removed)" if layer in gone else layer, "cells": [cells.get(kind) for kind in kinds]}
            for layer, cells in sorted(layers.items())
        ],
    }


def _environment(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    measured = next(iter(results["perplexity"]["dense"].values()))
    training = results["training"]
    text = {
        "evaluated on": measured["source"],
        "tokens evaluated on, SHA-256": measured["tokens_sha256"],
        "tokens trained on, SHA-256": training["train_sha256"],
        "seed": results["seed"],
    }
    return [
        ("Measured on", [(key, str(value)) for key, value in results["machine"].items()]),
        ("Text", [(key, str(value)) for key, value in text.items()]),
    ]


def _seconds(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    total = max(seconds["total"], 1e-9)
    return [(stage, value, min(value / total, 1.0)) for stage, value in seconds.items() if stage != "total"]

"""What a reader must know before believing a run's figures: short sentences, the gravest first."""

import math
from collections.abc import Iterator
from typing import Any

from regrow.data.corpus import HELD_OUT
from regrow.report.words import short_count

MUCH_WORSE = 1.5
"""From this ratio of perplexities on, the result is called much worse."""
FEW_TOKENS = 50_000
"""Scored tokens, below which a perplexity is called uncertain (WikiText-2's test text has some 280,000)."""
MUCH_SEEN = 0.05
"""Share of the evaluated text that stands in the training text too, from which on it is spoken of."""
TINY = 200_000_000
"""Parameters, below which fixed costs weigh on the speed."""


def cautions(results: dict[str, Any]) -> list[str]:
    """Everything that holds of a run, as plain text.

    Args:
        results: as `results.json` holds them.
    """
    return [*_quality(results), *_text(results), *_speed(results), *_use(results)]


def error_factor(measured: dict[str, Any]) -> float | None:
    """What a perplexity may be too high or too low by, as a factor: two standard errors of its logarithm."""
    error = measured["standard_error"]
    return None if error is None else math.exp(2 * error)


def _quality(results: dict[str, Any]) -> Iterator[str]:
    kinds = ("dense", "cut", "pruned")
    dense, cut, pruned = (next(iter(results["perplexity"][kind].values()))["value"] for kind in kinds)
    if pruned >= MUCH_WORSE * dense:
        yield (
            f"The result is much worse than the original: its perplexity is {pruned / dense:.1f} times as high. "
            "Remove less, or train longer and on more text."
        )
    training = results["training"]
    if training["steps"] and pruned > cut:
        yield (
            "Training made it worse: the cut alone had the lower perplexity. Lower the learning rate, or give other "
            "text."
        )
    if training["steps"] and training["best_step"] == training["steps"]:
        yield "The validation loss was still falling at the last step: training longer would probably help."
    if training["skipped_updates"]:
        yield f"{training['skipped_updates']} updates were skipped because they were not finite."
    target = results.get("target", {})
    if target.get("kind") == "speedup" and target["reached"] is None:
        yield "Whether the speed-up is the target's was not measured."
    elif target.get("kind") == "speedup" and target["reached"] < target["limit"]:
        yield "The measured speed-up is short of the target."


def _text(results: dict[str, Any]) -> Iterator[str]:
    measured = next(iter(results["perplexity"]["pruned"].values()))
    own = results.get("own_text")
    if own and own["evaluated_on_it"]:
        yield (
            "No text was given: the model was trained and evaluated on text that it wrote itself, "
            "which says little about text of people."
        )
    elif own:
        yield "No text was given: the model was trained on text that it wrote itself."
    elif measured["source"].endswith(HELD_OUT):
        yield (
            "It was evaluated on documents held out of the text that it was trained on: other kinds of text may have "
            "suffered more."
        )
    if results["overlap"]["share"] > MUCH_SEEN:
        seen = results["overlap"]
        yield (
            f"{seen['share']:.0%} of the evaluated text's {seen['ngram']}-grams stand in the training text too: "
            "perplexities of the recovered model flatter it."
        )
    if measured["tokens"] < FEW_TOKENS:
        factor = error_factor(measured)
        known = "" if factor is None else f"; each may be off by some {factor - 1:.0%} (two standard errors)"
        yield f"Perplexities are of {measured['tokens']:,} tokens only, in {measured['windows']:,} windows{known}."


def _speed(results: dict[str, Any]) -> Iterator[str]:
    if "speedup" not in results:
        yield "Speed was not measured."
        return
    size, speed = results["size"]["dense"]["total"], results["speed"]
    if size < TINY:
        yield (
            f"Speed was measured on a model of {short_count(size)} parameters, where fixed costs weigh most: "
            "the ratio says little about larger ones."
        )
    first = speed["pruned"][0]
    if first["device"] == "cpu":
        threads = "one thread" if first["threads"] == 1 else f"{first['threads']} threads"
        yield f"Speed is that of a CPU with {threads} and plain transformers, without a serving engine."
    alike = [
        f"{phase} at batch {dense['batch']}"
        for dense, pruned in zip(speed["dense"], speed["pruned"], strict=True)
        for phase in ("prefill", "decode")
        if dense[phase]["high"] >= pruned[phase]["low"] and pruned[phase]["high"] >= dense[phase]["low"]
    ]
    if alike:
        yield f"Repeats scatter so much that dense and pruned are about as fast: {', '.join(alike)}."


def _use(results: dict[str, Any]) -> Iterator[str]:
    if results["verification"]["model_class"].startswith("Uneven"):
        yield "Layers differ in width: the checkpoint brings a modeling file and loads with trust_remote_code=True."
    measured = "perplexity and the tasks above were" if results.get("tasks") else "perplexity was"
    yield (
        f"Only {measured} measured. Following instructions, knowledge, reasoning, other languages and safety "
        "may have suffered otherwise: try what you need."
    )

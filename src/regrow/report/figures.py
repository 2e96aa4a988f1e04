"""A run's charts: training, quality against size and speed, scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from regrow.planning.plan import Plan
from regrow.report.svg import (
    BOTTOM,
    Point,
    across,
    bar,
    curve,
    dot,
    frame,
    letters,
    level,
    picture,
    stairs,
    upright,
    upward,
)
from regrow.report.words import figure, is_finite, place

MOST_POINTS = 300
"""Of a curve; longer ones are averaged over equal spans."""
BINS = 36
COLOURS = 6
NAMES = {"dense": "original", "cut": "only cut", "pruned": "recovered"}
COLOUR_OF = {"dense": "c0", "cut": "c1", "pruned": "c2"}
KINDS = {
    "attention": "KV heads, each with its query heads",
    "ffn": "FFN channels",
    "ffn (experts)": "FFN channels of experts",
    "expert": "whole experts",
    "layer": "whole layers",
}


Scored = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""One score per unit of a group, and whether it was kept."""


@dataclass(frozen=True)
class Chart:
    """A drawing and what is written beneath it."""

    name: str
    svg: Markup
    caption: str
    keys: tuple[tuple[str, str], ...] = ()
    """Colour class and meaning of what is not labelled in the drawing."""


def training_charts(results: dict[str, Any], history: dict[str, Any]) -> Iterator[Chart]:
    """Loss and sparsity over the steps, and the validation loss."""
    if finite := [(one["step"], one["loss"]) for one in history["steps"] if is_finite(one["loss"])]:
        yield _loss(finite, history["cuts"], results["training"]["steps"])
    points = [(one["step"], one["loss"]) for one in history["validations"] if is_finite(one["loss"])]
    if len(points) > 1:
        best = (results["training"]["best_step"], results["training"]["best_validation_loss"])
        x, y = across(p[0] for p in points), upward((p[1] for p in points), pad=0.15)
        parts = [
            *frame(x, y, "step", "nats per token"),
            curve(x, y, points, "c0"),
            dot(x, y, best, "c1", "best", below=True),
        ]
        told = f"From {points[0][1]:.3f} at step {points[0][0]:.0f} to {best[1]:.3f} at step {best[0]}, the best."
        yield Chart("Validation loss", picture("Validation loss", told, parts), told)


def _loss(points: Sequence[Point], cuts: Sequence[Mapping[str, float]], steps: int) -> Chart:
    height, floor, gap = 320.0, 204.0, 34.0
    end = max(steps, 1)
    x = across([0, end])
    y = upward((p[1] for p in points), bottom=floor)
    most = max(0.01, *(cut["block"] for cut in cuts))
    share = upward([0, most], floor + gap, height - BOTTOM, percent=True, pad=0)
    removed = [(0.0, 0.0), *((cut["step"], cut["block"]) for cut in cuts)]
    parts = [
        *frame(x, y, "", "training loss, nats per token"),
        *frame(x, share, "step", "removed"),
        *(upright(x, y, cut["step"], "event") for cut in cuts),
        curve(x, y, thinned(points), "c0 raw"),
        curve(x, y, thinned(smoothed(points)), "c0"),
        stairs(x, share, removed, end, "c1"),
    ]
    told = (
        f"Loss from {points[0][1]:.3f} to {points[-1][1]:.3f} over {steps} steps; {cuts[-1]['block']:.1%} of the block "
        f"parameters were removed in {len(cuts)} pruning {'events' if len(cuts) > 1 else 'event'}, "
        f"the last before step {cuts[-1]['step']:.0f}."
    )
    keys = (
        ("c0", "training loss, smoothed"),
        ("c1", "block parameters removed"),
        ("event", "pruning event"),
    )
    return Chart("Loss and sparsity", picture("Loss and sparsity", told, parts, height), told, keys)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each value's mean with its neighbours, over a twentieth of the row in all."""
    reach = len(points) // 40
    values = np.array([value for _, value in points])
    sums = np.concatenate([[0.0], values.cumsum()])
    first = np.maximum(np.arange(len(points)) - reach, 0)
    last = np.minimum(np.arange(len(points)) + reach + 1, len(points))
    means = (sums[last] - sums[first]) / (last - first)
    return [(at, float(mean)) for (at, _), mean in zip(points, means, strict=True)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: means over equal spans."""
    if len(points) <= most:
        return list(points)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in np.array_split(np.array(points), most)]


def mixture_charts(mixture: dict[str, Any]) -> Iterator[Chart]:
    """The sources' shares, and what the model has lost on each, round by round."""
    rounds, sources = mixture["rounds"], list(mixture["sources"])
    keys = tuple((f"c{number % COLOURS}", name) for number, name in enumerate(sources))
    end = max(rounds[-1]["step"], 1)
    x, y = across([0, end]), upward([0, max(w for one in rounds for w in one["weights"].values())], percent=True)
    lines = [stairs(x, y, [(one["step"], one["weights"][name]) for one in rounds], end, css) for (css, name) in keys]
    told = "; ".join(
        f"{name} from {rounds[0]['weights'][name]:.1%} to {rounds[-1]['weights'][name]:.1%}" for name in sources
    )
    told = f"Shares by the rule {mixture['rule']}: {told}."
    yield Chart("Data weights", picture("Data weights", told, [*frame(x, y, "step", "share"), *lines]), told, keys)
    finite = [v for one in rounds for v in one["degradation"].values() if is_finite(v)]
    if len(rounds) > 1 and finite:
        y = upward([0.0, *finite])
        lost = {name: [(one["step"], one["degradation"][name]) for one in rounds] for name in sources}
        lines = [curve(x, y, [p for p in lost[name] if is_finite(p[1])], css) for css, name in keys]
        told = "; ".join(f"{name} {figure(rounds[-1]['degradation'][name], '+.3f')}" for name in sources)
        told = f"Held-out loss above the original model's on every source; at the end: {told}."
        parts = [*frame(x, y, "step", "nats per token"), *lines]
        yield Chart("What was lost on each source", picture("Degradation by source", told, parts), told, keys)


def quality_charts(results: dict[str, Any]) -> Iterator[Chart]:
    """Perplexity against parameters and measured speeds, and the trials that a target needed."""
    protocol = next(iter(results["perplexity"]["dense"]))
    quality = {kind: one[protocol]["value"] for kind, one in results["perplexity"].items()}
    quality = {kind: value for kind, value in quality.items() if is_finite(value)}
    size = {kind: float(results["size"]["dense" if kind == "dense" else "pruned"]["total"]) for kind in quality}
    yield _against("Quality against size", "parameters", size, quality)
    if "speed" in results:
        for phase, name in (("decode", "writing"), ("prefill", "reading")):
            speed = {k: results["speed"]["dense" if k == "dense" else "pruned"][0][phase]["median"] for k in quality}
            batch = results["speed"]["dense"][0]["batch"]
            yield _against(f"Quality against speed of {name}", f"{phase}, tokens/s, batch {batch}", speed, quality)
    if trials := results.get("target", {}).get("trials"):
        yield _trials(trials, results["target"]["limit"])


def _against(name: str, x_name: str, at: Mapping[str, float], quality: Mapping[str, float]) -> Chart:
    steep = max(quality.values()) > 4 * min(quality.values())
    x, y = across([*at.values()], pad=0.15), upward(quality.values(), log=steep, pad=0.1)
    points = {kind: (at[kind], quality[kind]) for kind in quality}
    parts = [
        *frame(x, y, x_name, "perplexity, lower is better" + (" (log scale)" if steep else "")),
        curve(x, y, list(points.values()), "way"),
        *(dot(x, y, points[kind], COLOUR_OF[kind], NAMES[kind]) for kind in points),
    ]
    told = "; ".join(f"{NAMES[kind]}: perplexity {quality[kind]:.2f} at {_figure(at[kind])}" for kind in quality)
    return Chart(name, picture(name, told, parts), f"{told}.")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _trials(trials: Sequence[Mapping[str, Any]], limit: float) -> Chart:
    points = [(one["sparsity"], one["recovered"]) for one in trials]
    x = across([0.0, *(p[0] for p in points)], percent=True, pad=0.1)
    y = upward([limit, trials[0]["dense"], *(p[1] for p in points)], pad=0.1)
    parts = [
        *frame(x, y, "block parameters removed", "validation perplexity"),
        level(x, y, limit, "event"),
        letters(x.end, y.at(limit) - 5, "to hold", "label end"),
        dot(x, y, (0.0, trials[0]["dense"]), "c0", "original"),
        *(dot(x, y, point, "c2" if one["holds"] else "c1") for point, one in zip(points, trials, strict=True)),
    ]
    told = f"{len(trials)} trainings, of which the smallest model at or below {limit:.3f} was taken."
    keys = (("c2", "holds"), ("c1", "too much"))
    return Chart("Trials for the target", picture("Trials for the target", told, parts), told, keys)


def score_charts(scores: Mapping[str, NDArray[np.float64]], plan: Plan) -> Iterator[Chart]:
    """By kind of unit: how many had which score, those removed apart from those kept, and the threshold."""
    by_kind: dict[str, dict[str, Scored]] = {}
    for name, group in plan.groups.items():
        layer, kind = place(name)
        if name in scores and layer not in plan.removed_layers:
            kept = np.isin(np.arange(group.units), group.keep)
            by_kind.setdefault(kind, {})[name] = (scores[name], kept)
    layers = [number for number in range(len(plan.layers)) if f"layers.{number}" in scores]
    if layers:
        values = np.concatenate([scores[f"layers.{number}"] for number in layers])
        by_kind["layer"] = {"layer": (values, ~np.isin(layers, plan.removed_layers))}  # chosen among each other
    for kind, groups in by_kind.items():
        values, _ = _together(groups)
        if np.isfinite(values).all() and values.min() < values.max():
            yield _scores(kind, groups)


def _together(groups: Mapping[str, Scored]) -> Scored:
    return np.concatenate([values for values, _ in groups.values()]), np.concatenate([k for _, k in groups.values()])


def _scores(kind: str, groups: Mapping[str, Scored]) -> Chart:
    values, kept = _together(groups)
    positive = values[values > 0]
    log = len(positive) == len(values) and positive.max() > 30 * positive.min()
    x = across([values.min(), values.max()], log=log, pad=0.02)
    edges = np.geomspace(x.low, x.high, BINS + 1) if log else np.linspace(x.low, x.high, BINS + 1)
    stayed, went = (np.histogram(values[which], edges)[0] for which in (kept, ~kept))
    y = upward([0, (stayed + went).max()], whole=True, pad=0)
    bars = []
    for left, right, low, high in zip(edges[:-1], edges[1:], went, stayed, strict=True):
        a, b = x.at(left) + 0.4, x.at(right) - 0.4
        for first, last, css in ((0, low, "c1"), (low, low + high, "c0")):
            if last > first:
                bars.append(bar(a, y.at(last), b - a, y.at(first) - y.at(last), css))
    found, mixed = thresholds(groups)
    marks = [upright(x, y, value, "event") for value in ({min(found), max(found)} if found else ())]
    parts = [*frame(x, y, "score" + (" (log scale)" if log else ""), "units"), *bars, *marks]
    told = _tell_thresholds(int((~kept).sum()), len(values), found, mixed, len(groups))
    name = f"Scores of {KINDS.get(kind, kind)}"
    meanings = {"c1": "removed" if went.any() else "", "c0": "kept", "event": "thresholds" if found else ""}
    keys = tuple((css, meaning) for css, meaning in meanings.items() if meaning)
    return Chart(name, picture(name, told, parts), told, keys)


def thresholds(groups: Mapping[str, Scored]) -> tuple[list[float], int]:
    """For each group that lost exactly its lowest units: halfway between the last removed and the first kept.

    Returns:
        The thresholds, and in how many groups a unit was removed that scored higher than one that stayed.
    """
    found, mixed = [], 0
    for values, kept in groups.values():
        if kept.all() or not kept.any():
            continue
        last, first = values[~kept].max(), values[kept].min()
        if last <= first:
            found.append(float(last + first) / 2)
        else:
            mixed += 1
    return found, mixed


def _tell_thresholds(removed: int, units: int, found: Sequence[float], mixed: int, groups: int) -> str:
    told = f"{removed:,} of {units:,} removed, at the scores of the last choice."
    if found:
        spread = f"at {found[0]:.3g}" if min(found) == max(found) else f"between {min(found):.3g} and {max(found):.3g}"
        told += f" In {len(found)} of {groups} groups the lowest went, with the threshold {spread}."
    if mixed:
        told += (
            f" In {mixed} of {groups} what went was not simply the lowest: it was chosen earlier, or by more than this "
            "score."
        )
    return told

"""What a grid has found: one row per contender and sparsity, over the seeds."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.comparison.grid import Cell

Results = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Values over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None with a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """`mean ± deviation`, both times `scale`."""
        deviation = "" if self.deviation is None else f" ± {self.deviation * scale:.{digits}f}"
        return f"{self.mean * scale:.{digits}f}{deviation}"


@dataclass(frozen=True)
class Row:
    """A contender at a sparsity. Every figure is a mean over the seeds, with their spread where it matters."""

    contender: str
    asked: float
    runs: tuple[Results, ...]

    @property
    def removed(self) -> dict[str, float]:
        """Shares of the units, of the blocks' parameters and of all parameters."""
        shares = ("units", "block", "total")
        return {share: statistics.mean(run["sparsity"][share] for run in self.runs) for share in shares}

    @property
    def protocols(self) -> list[str]:
        """How perplexity was measured: `window-256`."""
        return list(self.runs[0]["perplexity"]["dense"])

    def perplexity(self, kind: str, protocol: str) -> Spread:
        """Of the `dense` model, of the plan alone (`cut`), of the result (`pruned`)."""
        return self._spread(lambda run: run["perplexity"][kind][protocol]["value"])

    def delta(self, protocol: str) -> Spread:
        """ln(perplexity) − ln(dense perplexity): nats a token."""
        return self._spread(
            lambda run: run["perplexity"]["pruned"][protocol]["nll"] - run["perplexity"]["dense"][protocol]["nll"]
        )

    @property
    def tasks(self) -> list[str]:
        """Names of the zero-shot tasks."""
        return list(self.runs[0].get("tasks", {}).get("dense", {}))

    def task(self, kind: str, *names: str) -> Spread:
        """Score of the `dense` or the `pruned` model: the mean over some tasks."""
        return self._spread(lambda run: statistics.mean(run["tasks"][kind][name]["value"] for name in names))

    @property
    def rank(self) -> int:
        """Of the adapters."""
        return int(self.runs[0]["training"]["rank"])

    @property
    def trainable(self) -> int:
        """Adapter parameters left at the end."""
        return int(self.runs[0]["training"]["trainable_parameters_at_the_end"])

    @property
    def tokens(self) -> int:
        """Trained on."""
        return int(self.runs[0]["training"]["tokens"])

    @property
    def parameters(self) -> int:
        """Of the result."""
        return int(self.runs[0]["size"]["pruned"]["total"])

    @property
    def seconds(self) -> Spread:
        """The whole run, its evaluation not counted."""
        return self._spread(lambda run: run["seconds"]["total"] - run["seconds"].get("evaluate", 0.0))

    @property
    def peak_bytes(self) -> Spread:
        """Peak memory: on the GPU where one was used, else of the process above its imports."""
        return self._spread(
            lambda run: run["cost"].get("cuda_peak_bytes", run["cost"]["peak_bytes_above_imports"]),
        )

    def speedups(self, phase: str) -> dict[int, Spread]:
        """Batch size -> speed of the result ÷ the dense model's (`prefill`, `decode`), where all runs have it."""
        measured = [{one["batch"]: one[phase] for one in run.get("speedup", [])} for run in self.runs]
        return {
            batch: Spread(tuple(each[batch] for each in measured))
            for batch in measured[0]
            if all(batch in each for each in measured)
        }

    @property
    def overlap(self) -> float:
        """Largest share of the evaluated text's n-grams that the training text has too."""
        return max(float(run["overlap"]["share"]) for run in self.runs)

    def _spread(self, of: Callable[[Results], float]) -> Spread:
        return Spread(tuple(float(of(run)) for run in self.runs))


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """A row for each contender and sparsity that has a finished run."""
    runs: dict[tuple[float, str], list[Results]] = {}
    for cell in cells:
        if cell.finished:
            runs.setdefault((cell.sparsity, cell.contender), []).append(cell.results())
    return [Row(contender, asked, tuple(found)) for (asked, contender), found in runs.items()]


def doubts(rows: Sequence[Row]) -> list[str]:
    """What makes the rows less comparable than they look, one sentence each."""
    told = []
    runs = [run for row in rows for run in row.runs]
    evaluated = {tuple(one["tokens_sha256"] for one in run["perplexity"]["dense"].values()) for run in runs}
    if len(evaluated) > 1:
        told.append("The runs were not evaluated on the same windows of text: perplexities cannot be compared.")
    if len({row.tokens for row in rows}) > 1:
        told.append(
            "Contenders trained on different numbers of tokens: "
            + ", ".join(sorted({f"{row.contender} {row.tokens:,}" for row in rows}))
            + "."
        )
    if short := sorted({row.contender for row in rows if len(row.runs) < max(len(each.runs) for each in rows)}):
        told.append(f"Fewer seeds than others: {', '.join(short)}.")
    if stopped := sorted({row.contender for row in rows for run in row.runs if run["cost"].get("went_on")}):
        told.append(f"Runs of {', '.join(stopped)} had been stopped: their peak memory is of what was done since.")
    by_asked: dict[float, list[float]] = {}
    for row in rows:
        by_asked.setdefault(row.asked, []).append(row.removed["block"])
    for asked, removed in by_asked.items():
        if max(removed) - min(removed) > 0.01:
            told.append(f"At {asked:.0%} between {min(removed):.1%} and {max(removed):.1%} of the blocks were removed.")
    if (seen := max((row.overlap for row in rows), default=0.0)) > 0.01:
        ngram = runs[0]["overlap"]["ngram"]
        told.append(f"{seen:.1%} of the evaluated text's {ngram}-grams stand in the training text too.")
    return told


def overlap_line(rows: Sequence[Row]) -> str:
    """How much of the evaluated text was trained on, in any run."""
    ngram = rows[0].runs[0]["overlap"]["ngram"]
    most = max(row.overlap for row in rows)
    return f"at most {most:.2%} of the evaluated text's {ngram}-grams stand in the training text"


def quality_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: how good each is, and what it was given."""
    protocols = rows[0].protocols
    head = ["contender", "asked", "units", "blocks", "all", "rank", "trainable", "seeds"]
    for protocol in protocols:
        head += [f"dense, {protocol}" if len(protocols) > 1 else "dense", "cut only", "recovered", "Δ"]
    lines = []
    for row in rows:
        line = [row.contender, f"{row.asked:.0%}", *(f"{row.removed[key]:.2%}" for key in ("units", "block", "total"))]
        line += [str(row.rank), f"{row.trainable:,}", str(len(row.runs))]
        for protocol in protocols:
            line += [f"{row.perplexity('dense', protocol).mean:.2f}"]
            line += [row.perplexity(kind, protocol).text() for kind in ("cut", "pruned")]
            line += [row.delta(protocol).text(3)]
        lines.append(line)
    return head, lines


def short_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of what fits a screen."""
    protocol = rows[0].protocols[0]
    lines = [
        [
            row.contender,
            f"{row.asked:.0%}",
            f"{row.perplexity('dense', protocol).mean:.2f}",
            row.perplexity("pruned", protocol).text(),
            f"{row.delta(protocol).mean:.3f}",
            f"{row.seconds.mean:.0f} s",
            f"{row.peak_bytes.mean / 2**20:.0f} MiB",
        ]
        for row in rows
    ]
    return ["contender", "asked", "dense", "recovered", "Δ", "run", "peak memory"], lines


def cost_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: what each run took, and how fast its result is."""
    batches = list(dict.fromkeys(batch for row in rows for batch in row.speedups("decode")))
    head = ["contender", "asked", "run without evaluation, s", "peak memory, MiB", "parameters"]
    head += [f"{phase} speed-up, batch {batch}" for batch in batches for phase in ("prefill", "decode")]
    lines = []
    for row in rows:
        line = [row.contender, f"{row.asked:.0%}", row.seconds.text(0), row.peak_bytes.text(0, 2**-20)]
        line += [f"{row.parameters:,}"]
        ratios = {phase: row.speedups(phase) for phase in ("prefill", "decode")}
        line += [ratios[phase][batch].text() if batch in ratios[phase] else "" for batch in batches for phase in ratios]
        lines.append(line)
    return head, lines


def task_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: zero-shot scores; the dense model's first, the mean of all tasks last."""
    tasks = rows[0].tasks
    columns = [*((name,) for name in tasks), tuple(tasks)]
    lines = [["dense", "", *(f"{rows[0].task('dense', *names).mean:.1%}" for names in columns)]]
    for row in rows:
        lines.append(
            [row.contender, f"{row.asked:.0%}", *(f"{row.task('pruned', *names).text(1, 100)}%" for names in columns)]
        )
    return ["contender", "asked", *tasks, "mean"], lines


def to_csv(rows: Sequence[Row]) -> str:
    """One line per run, every figure in full."""
    buffer = io.StringIO()
    records = [record for row in rows for record in _records(row)]
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for record in records for key in record)))
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _records(row: Row) -> Iterable[dict[str, Any]]:
    for run in row.runs:
        record = {"contender": row.contender, "asked": row.asked, "seed": run["seed"]}
        record |= {f"removed_{key}": run["sparsity"][key] for key in ("units", "block", "total")}
        for protocol in row.protocols:
            for kind in ("dense", "cut", "pruned"):
                record[f"{protocol}_{kind}"] = run["perplexity"][kind][protocol]["value"]
        for name in row.tasks:
            record |= {f"{name}_{kind}": run["tasks"][kind][name]["value"] for kind in ("dense", "pruned")}
        record |= {"rank": row.rank, "trainable": row.trainable, "tokens": run["training"]["tokens"]}
        record |= {"parameters": run["size"]["pruned"]["total"], "overlap": run["overlap"]["share"]}
        record |= {f"seconds_{stage}": seconds for stage, seconds in run["seconds"].items()}
        record |= run["cost"]
        for one in run.get("speedup", []):
            record |= {f"{phase}_speedup_batch_{one['batch']}": one[phase] for phase in ("prefill", "decode")}
        yield record


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Every row's means, and every run's results without its history."""
    return {
        "rows": [
            {
                "contender": row.contender,
                "asked": row.asked,
                "removed": row.removed,
                "rank": row.rank,
                "trainable": row.trainable,
                "tokens": row.tokens,
                "parameters": row.parameters,
                "perplexity": {
                    protocol: {
                        **{kind: _plain(row.perplexity(kind, protocol)) for kind in ("dense", "cut", "pruned")},
                        "delta": _plain(row.delta(protocol)),
                    }
                    for protocol in row.protocols
                },
                "tasks": {
                    name: {kind: _plain(row.task(kind, name)) for kind in ("dense", "pruned")} for name in row.tasks
                },
                "seconds": row.seconds.mean,
                "peak_bytes": row.peak_bytes.mean,
                "speedup": {
                    phase: {batch: ratio.mean for batch, ratio in row.speedups(phase).items()}
                    for phase in ("prefill", "decode")
                },
                "runs": [{key: value for key, value in run.items() if key != "history"} for run in row.runs],
            }
            for row in rows
        ]
    }


def _plain(spread: Spread) -> dict[str, float | int | None]:
    mean = spread.mean
    return {"mean": mean if math.isfinite(mean) else None, "deviation": spread.deviation, "seeds": len(spread.values)}

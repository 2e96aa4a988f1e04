"""How names, numbers and tables are written, in every kind of report alike."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeGuard


def short_name(model: str) -> str:
    """A folder's own name; a repository's as it is."""
    return Path(model).name if Path(model).is_absolute() or Path(model).is_dir() else model


def place(group: str) -> tuple[int, str]:
    """A group's layer and kind, from `layers.<number>.<kind>`; the channels of all experts share one of their own."""
    _, layer, *parts = group.split(".")
    return int(layer), parts[0] if len(parts) == 1 else f"{parts[-1]} (experts)"


def short_source(source: str) -> str:
    """Where text came from, several sources parted by commas, without the folders."""
    return ", ".join(short_name(part) for part in source.split(", "))


def short_count(count: float) -> str:
    """A number of parameters or operations: `1.24B`, `0.26M`."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def short_bytes(count: float) -> str:
    """An amount of memory: `1.50 GiB`, `0.6 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a figure is one: what was not finite is `null` in a run's files."""
    return value is not None and math.isfinite(value)


def figure(value: float | None, form: str) -> str:
    """A number that may not have been finite, such as the loss of a model that has diverged.

    Args:
        form: as for `format`.
    """
    return format(value, form) if is_finite(value) else "not finite"


def quoted(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """A sentence without Markdown's signs."""
    return text.replace("**", "").replace("`", "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], figures: bool = False) -> str:
    """A table in Markdown.

    Args:
        figures: all columns but the first are, and stand to the right.
    """
    lines = [head, ["---", *(["---:" if figures else "---"] * (len(head) - 1))], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

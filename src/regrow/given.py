"""What a caller in Python may give in several ways, as the rest of regrow takes it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regrow.errors import InputError


def listed(names: str | Path | Iterable[str | Path]) -> list[str]:
    """Names or paths as text; a single one stands for a list of it."""
    return [str(name) for name in ([names] if isinstance(names, str | Path) else names)]


def numbered(numbers: int | Iterable[int]) -> list[int]:
    """Whole numbers; a single one stands for a list of it."""
    return [numbers] if isinstance(numbers, int) else list(numbers)


def gathered(given: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings as `key.path` -> value: what is given by name, None left out, and what overrides it.

    Raises:
        InputError: if the overrides are no mapping.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise InputError(f"overrides = {overrides!r:.100}: give a mapping, such as {{'lora.rank': 16}}")
    settings = {key: value for key, value in given.items() if value is not None} | dict(overrides or {})
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}

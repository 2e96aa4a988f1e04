"""What has been measured of the dense model, kept for the other runs of a comparison."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regrow.checkpoint.files import write_json


class DenseFigures:
    """Figures in a file, each with what it holds for: it is taken from there only where that is the same.

    The tokenizer is taken to be the model's own.
    """

    def __init__(self, file: Path | None, holds_for: Mapping[str, Any]) -> None:
        """Look at what is there when it is asked for.

        Args:
            file: None: nothing is kept.
            holds_for: what all figures depend on, plain data.
        """
        self._file = file
        self._holds_for = dict(holds_for)

    def once(self, part: str, depends_on: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part's figures: as another run has left them, or measured, and left for the next.

        Args:
            depends_on: what this part depends on besides, plain data.
        """
        holds_for = json.loads(json.dumps({**self._holds_for, part: depends_on}))
        known = self._read()
        if part in known and known[part]["holds_for"] == holds_for:
            figures: dict[str, Any] = known[part]["figures"]
            return figures
        figures = measure()
        if self._file is not None:
            write_json(self._file, {**self._read(), part: {"holds_for": holds_for, "figures": figures}})
        return figures

    def _read(self) -> dict[str, Any]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError:  # damaged: measured anew
            return {}
        return found

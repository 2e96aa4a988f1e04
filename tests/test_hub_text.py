"""What is done with the rows of data sets on the hub, without a hub."""

from pathlib import Path

import pytest
from conftest import build

import regrow
from regrow.checkpoint.load import check_length
from regrow.data.source import articles, upto
from regrow.errors import InputError

ROWS = [
    "",
    " = Robert = \n",
    "",
    " Robert acts . \n",
    " = = Career = = \n",
    " On . \n",
    " = Du Fu = \n",
    " A poet . \n",
]


def test_rows_of_wikitext_become_articles() -> None:
    found = list(articles(ROWS))
    assert [article.split("\n")[0] for article in found] == ["", " = Robert = ", " = Du Fu = "]
    assert " = = Career = = \n On . \n" in found[1]
    assert "".join(found) == "".join(row if row.endswith("\n") else f"{row}\n" for row in ROWS)


def test_reading_stops_after_enough() -> None:
    endless = (f"{n:04}" for n in iter(int, 1))
    assert list(upto(endless, 9)) == ["0000"] * 3


def test_windows_longer_than_the_models_positions_are_refused(checkpoint: Path, text: Path) -> None:
    config = build("llama-gqa").config
    check_length(config, config.max_position_embeddings)
    with pytest.raises(InputError, match="longer than the 256 positions"):
        regrow.evaluate(str(checkpoint), str(text), windows=[512])

"""Text that has been tokenized before: rows of token ids in a column `input_ids`.

A folder of `datasets.save_to_disk`, a folder of `.parquet` or `.arrow` files, or one such file. Rows are drawn at
random (of `.parquet`: groups of rows, and rows within them) and read only until there are enough, so that memory
follows what a run uses, not the size of the corpus.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from regrow.data.source import upto
from regrow.data.store import Ids
from regrow.errors import InputError

COLUMN = "input_ids"
SAVED = ("dataset_dict.json", "state.json")
"""Files that mark what `save_to_disk` has left: a dictionary of splits, a single data set."""
SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 256


def holds_tokens(source: str, text_field: str) -> bool:
    """Whether a source is of token ids: by its files' names, a `.parquet` file by its columns."""
    path = Path(source)
    if source and path.is_dir():
        return any((path / name).is_file() for name in SAVED) or bool(_shards(path))
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return False
    if path.suffix.lower() == ".arrow":
        return True
    names = _columns(path)
    return COLUMN in names and text_field not in names


def load_rows(source: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int) -> list[Ids]:
    """Rows of token ids drawn at random, until they hold so many tokens or there are no more.

    Raises:
        InputError: if they cannot be read, or are not of this tokenizer.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = list(upto(_rows(source, seed), max_tokens, len))
    except InputError:
        raise
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, TypeError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise InputError(f"{source} cannot be read as token ids: {cause}") from error
    if not rows:
        raise InputError(f"{source} holds no tokens; give another file or folder")
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or high >= len(tokenizer):
        raise InputError(
            f"{source}: token id {low if low < 0 else high} is none of the model's {len(tokenizer)}; "
            "tokenize the text with this model's own tokenizer"
        )
    return rows


def _rows(source: str, seed: int) -> Iterator[Ids]:
    path = Path(source)
    files = _shards(path) if path.is_dir() else [path]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if parquet and len(parquet) < len(files):
        raise InputError(f"{source} holds both .parquet and .arrow files; give one kind")
    for row in _of_parquet(parquet, source, seed) if parquet else _of_arrow(path, files, source, seed):
        ids = np.asarray(row)
        if ids.ndim == 1 and not len(ids):  # of no type that says anything
            continue
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{source}: column {COLUMN!r} holds no lists of token ids; give text, or token ids")
        yield ids.astype(np.int64)


def _of_arrow(path: Path, files: list[Path], source: str, seed: int) -> Iterator[Any]:
    """Mapped into memory; any row is as near as any other."""
    import datasets

    if any((path / name).is_file() for name in SAVED):
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise InputError(f"{source} has no split 'train' but {', '.join(data)}; name one of its folders")
            data = data["train"]
    else:
        data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    _check_column(data.column_names, source)
    shuffled = data.select_columns([COLUMN]).shuffle(seed, keep_in_memory=True).with_format("numpy")
    for batch in shuffled.iter(ROWS_AT_ONCE):
        yield from batch[COLUMN]


def _of_parquet(files: list[Path], source: str, seed: int) -> Iterator[Any]:
    """One group of rows at a time."""
    from pyarrow.parquet import ParquetFile

    chance = random.Random(seed)
    groups = [(file, number) for file in files for number in range(ParquetFile(file).num_row_groups)]
    chance.shuffle(groups)
    for file, number in groups:
        with ParquetFile(file) as shard:
            _check_column(shard.schema_arrow.names, source)
            rows = list(shard.read_row_group(number, columns=[COLUMN])[COLUMN].to_numpy())
        chance.shuffle(rows)
        yield from rows


def _check_column(names: list[str], source: str) -> None:
    if COLUMN not in names:
        raise InputError(f"{source} has no column {COLUMN!r} but {', '.join(names)}; give text, or token ids")


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _columns(path: Path) -> list[str]:
    from pyarrow.parquet import read_schema

    try:
        return list(read_schema(path).names)
    except (OSError, ValueError):  # whoever reads it will say what is wrong
        return []

"""Documents from files and from data sets on the hub."""

import bisect
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from regrow.errors import InputError

SEPARATOR = "<|endoftext|>"
"""A line that parts the documents of a plain text file."""

HUB_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
"""Short names for data sets that papers use: repository and configuration."""

HUB_LIMIT = 100_000
"""Documents read of a data set on the hub, which may have no end."""


def load_documents(source: str, text_field: str = "text", split: str = "train") -> list[str]:
    """The documents of a source, blank ones dropped.

    Args:
        source: a `.txt` file (documents parted by `<|endoftext|>` lines, else one document), a `.jsonl`,
            `.json` or `.parquet` file (one document per record), or a data set's name on the hub, with
            `:configuration` if it has several.
        text_field: the field of a record that holds its text.
        split: of a data set on the hub.

    Raises:
        InputError: if the source is not there, cannot be read, or holds no text.
    """
    path = Path(source)
    if path.suffix in (".txt", ".raw", ".jsonl", ".json", ".parquet") and not path.is_file():
        raise InputError(f"there is no text file {source}")
    if path.is_dir():
        raise InputError(f"{source} is a folder; give a .txt, .jsonl, .json or .parquet file")
    if path.suffix in (".jsonl", ".json", ".parquet"):
        documents = _from_records(path, text_field)
    elif path.is_file():
        documents = _from_text(path)
    else:
        documents = _from_hub(source, text_field, split)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{source} holds no text")
    return documents


def _from_text(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return [part.strip("\n") for part in text.split(SEPARATOR)]


def _from_records(path: Path, text_field: str) -> list[str]:
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if path.suffix == ".parquet" else "json"
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        records = datasets.load_dataset(kind, data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"{path} is not a valid {path.suffix} file: {reason}") from error
    return list(_field_of(records, records.column_names, text_field, str(path)))


def _from_hub(source: str, text_field: str, split: str) -> list[str]:
    import datasets

    name, _, configuration = source.partition(":")
    repository, default = HUB_NAMES.get(name, (name, None))
    try:
        records = datasets.load_dataset(repository, configuration or default, split=split, streaming=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source!r} is neither a file nor a data set that can be loaded from the hub: {reason}"
        ) from error
    columns = records.column_names or []
    return list(itertools.islice(_field_of(records, columns, text_field, source), HUB_LIMIT))


def _field_of(records: Iterable[dict[str, object]], columns: Sequence[str], field: str, source: str) -> Iterator[str]:
    if field not in columns:
        raise InputError(f"{source} has no field {field!r}; it has {', '.join(columns)}: set data.text_field")
    for record in records:
        text = record[field]
        if text is not None:
            yield str(text)


def split_documents(documents: Sequence[str], shares: Sequence[float], seed: int) -> list[list[str]]:
    """Part documents at random: one list per share of the characters, then the rest.

    A text of too few documents is parted at its line ends instead, in order.

    Raises:
        InputError: if a part would get nothing.
    """
    pieces = list(documents)
    if len(pieces) <= len(shares):
        pieces = [line for document in documents for line in document.splitlines(keepends=True)]
        join = True
    else:
        random.Random(seed).shuffle(pieces)
        join = False
    reached = list(itertools.accumulate(map(len, pieces)))
    starts = [0]
    for bound in itertools.accumulate(shares):
        starts.append(max(bisect.bisect_left(reached, bound * reached[-1]) + 1, starts[-1] + 1))
    parts = [pieces[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    if not all(parts):
        raise InputError("the text is too short to hold some of it out; give more text, or data.eval_source")
    return [["".join(part)] for part in parts] if join else parts

"""Documents from files and from data sets on the hub."""

import bisect
import glob
import itertools
import json
import operator
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from regrow.errors import InputError

Record = dict[str, Any]
Piece = TypeVar("Piece")

SEPARATOR = "<|endoftext|>"
"""What parts the documents of a plain text file."""

HUB_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
"""Short names for data sets that papers use: repository, configuration, and the split to evaluate on."""

ROWS_AT_ONCE = 256
HUB_CHARACTERS = 200_000_000
"""Read at most so much of a data set on the hub, which may have no end."""

FILE_CHARACTERS = 200_000_000
"""Read the first so many of a file, or more if a run can use more: memory does not follow the file's size."""

TITLE = re.compile(r" = [^=].* = ?")
"""A line of WikiText that begins an article; sections have more equals signs."""

FORMS = {".jsonl": "one JSON object a line", ".json": "an array of JSON objects", ".parquet": "a Parquet table"}
"""Files of records, by suffix, and what such a file must be."""


FINER: tuple[Callable[[str], list[str]], ...] = (
    lambda document: [document],
    lambda document: document.splitlines(keepends=True),
    re.compile(r"\s*\S+\s*").findall,
)
"""What a document may be parted into, one after another until what is held out has its share."""


def looks_like_path(name: str) -> bool:
    """Whether a name that may be a path or a repository on the hub can only be a path."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def load_documents(
    source: str, text_field: str = "text", split: str = "train", max_characters: int = HUB_CHARACTERS
) -> list[str]:
    """The documents of a source, blank ones dropped.

    Args:
        source: a `.txt` file (documents parted by `<|endoftext|>`, else one document), a `.jsonl`,
            `.json` or `.parquet` file (one document per record), or a data set's name on the hub, with
            `:configuration` if it has several.
        text_field: the field of a record that holds its text.
        split: of a data set on the hub; `test` is whatever the data set calls it.
        max_characters: stop reading after so many; of a file not before `FILE_CHARACTERS`.

    Raises:
        InputError: if the source is not there, cannot be read, or holds no text.
    """
    path = path_of(source)
    if path is None:
        documents = _from_hub(source, text_field, split, max_characters)
    else:
        limit = max(max_characters, FILE_CHARACTERS)
        if path.suffix.lower() in FORMS:
            documents = list(upto(_field_of(_from_records(path, limit), text_field, str(path)), limit))
        else:
            documents = _from_text(path, limit)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{source} holds no text; give another file or data set")
    return documents


def load_records(source: str, max_characters: int = HUB_CHARACTERS) -> list[Record]:
    """The records of a `.jsonl`, `.json` or `.parquet` file, or of a data set's training split on the hub.

    Raises:
        InputError: if the source is not there, cannot be read, or holds no records.
    """
    path = path_of(source)
    if path is None:
        with _hub_errors(source):
            records = list(upto(_hub_records(source, "train"), max_characters, lambda record: len(str(record))))
    elif path.suffix.lower() in FORMS:
        limit = max(max_characters, FILE_CHARACTERS)
        records = list(upto(_from_records(path, limit), limit, lambda record: len(str(record))))
    else:
        raise InputError(f"{source} holds no records; give a .jsonl, .json or .parquet file, or a hub data set")
    if not records:
        raise InputError(f"{source} holds no records; give another file or data set")
    return records


def path_of(source: str) -> Path | None:
    """The file that a source is, or None if it is a data set on the hub.

    Raises:
        InputError: if it can only be a file, and there is none.
    """
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"{source!r} is a folder; give a .txt, .jsonl, .json or .parquet file (prune --data takes token ids, too)"
        )
    if path.is_file():
        return path
    if path.suffix.lower() in (".txt", ".raw", *FORMS) or looks_like_path(source):
        raise InputError(f"there is no text file {source}; check its path")
    return None


def _from_text(path: Path, limit: int) -> list[str]:
    try:
        if path.stat().st_size <= limit:
            text = path.read_text(encoding="utf-8-sig")
        else:
            with path.open(encoding="utf-8-sig") as file:
                read = file.read(limit)
                text = read.rpartition("\n")[0] or read  # all of it where there are no lines
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return [part.strip("\n") for part in text.split(SEPARATOR)]


def _from_records(path: Path, limit: int) -> Iterator[Record]:
    """The records of a file, one after another; a large one is read as it goes."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _from_lines(path)
    elif path.stat().st_size:
        yield from _from_table(path, suffix, limit)


def _from_table(path: Path, suffix: str, limit: int) -> Iterator[Record]:
    """Those of a file of one schema."""
    import datasets

    datasets.disable_progress_bars()
    try:
        kind = "parquet" if suffix == ".parquet" else "json"
        if path.stat().st_size > limit:
            yield from _streamed(path, kind)
            return
        # A copy that outlives the reading would need a home that can be written, and room there.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            builder = datasets.load_dataset_builder(kind, data_files=glob.escape(str(path)), cache_dir=scratch)
            builder.download_and_prepare()
            if builder.info.splits["train"].num_examples:
                yield from builder.as_dataset("train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            where = tempfile.gettempdir()
            raise InputError(f"{path} cannot be read: {cause.strerror} (it is unpacked in {where})") from error
        raise InputError(f"{path} is not {FORMS[suffix]}: {_reason(cause)}") from error


def _from_lines(path: Path) -> Iterator[Record]:
    """The records of a file of one a line, as it is read. Each has the fields that it has: one schema would fit few."""
    seen = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                seen += 1
                if line.strip():
                    yield _object(line)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:  # read ahead of the lines
        raise InputError(f"{path} is not {FORMS['.jsonl']}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        reason = _reason(error).partition(": line ")[0]  # json's own count begins with each line
        raise InputError(f"{path} is not {FORMS['.jsonl']}: line {seen}: {reason}") from error


def _object(line: str) -> Record:
    """What a line says.

    Raises:
        ValueError: if that is no JSON object, or holds half a surrogate pair, which no text can.
    """
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escape stands for what is no character") from error
    return found


def _from_hub(source: str, text_field: str, split: str, max_characters: int) -> list[str]:
    with _hub_errors(source):
        rows = _field_of(_hub_records(source, split), text_field, source)
        is_wikitext = source.partition(":")[0] in ("wikitext", HUB_NAMES["wikitext"][0])
        return list(upto(articles(rows) if is_wikitext else rows, max_characters))


def _hub_records(source: str, split: str) -> Iterable[Record]:
    import datasets

    name, _, configuration = source.partition(":")
    known = HUB_NAMES | {entry[0]: entry for entry in HUB_NAMES.values()}
    repository, default, evaluation_split = known.get(name, (name, None, "test"))
    split = evaluation_split if split == "test" else split
    records: Iterable[Record] = datasets.load_dataset(repository, configuration or default, split=split, streaming=True)
    return records


def _streamed(path: Path, kind: str) -> Iterator[Record]:
    """The records of a large file, as it is read."""
    import datasets
    from pyarrow.parquet import ParquetFile

    if kind == "json":
        yield from datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
        return
    # datasets reads Parquet ahead in threads that do not survive being left off in the middle.
    with ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"there is no file {source}, and no data set of that name comes from the hub: {_reason(error)}; "
            "check the name and the connection"
        ) from error


def upto(pieces: Iterable[Piece], characters: int, length: Callable[[Any], int] = len) -> Iterator[Piece]:
    """Pieces until `characters` of them have been seen; the one that passes the mark is the last."""
    for piece in pieces:
        yield piece
        characters -= length(piece)
        if characters <= 0:
            return


def articles(rows: Iterable[str]) -> Iterator[str]:
    """Put the rows of WikiText, which are lines, together again: an article starts at each ` = Title = `."""
    article: list[str] = []
    for row in rows:
        if TITLE.fullmatch(row.rstrip("\n")) and article:
            yield "".join(article)
            article = []
        article.append(row if row.endswith("\n") else f"{row}\n")
    yield "".join(article)


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _field_of(records: Iterable[dict[str, object]], field: str, source: str) -> Iterator[str]:
    for number, record in enumerate(records):
        if field not in record and not number:
            raise InputError(
                f"{source} has no field {field!r} but {', '.join(record)}; say which one with "
                "--set data.text_field=… (evaluate: --text-field)"
            )
        text = record.get(field)
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(
                f"{source}: field {field!r} holds values of type {type(text).__name__}, not text; choose another field"
            )
        yield text


def split_documents(documents: Sequence[str], shares: Sequence[float], seed: int) -> list[list[str]]:
    """Part documents at random: one list per share of the characters, then the rest.

    Documents stay whole if every part then has between half its share and twice that. Else, as with few documents or a
    long one, those that a part would end in are parted at their line ends; or between words, if lines are too long.

    Raises:
        InputError: if a part would get nothing.
    """
    shuffled = _shuffled(documents, seed)
    for finer in FINER:
        pieces = [(number, piece) for number, document in enumerate(shuffled) for piece in finer(document)]
        parts = [_joined(part) for part in _part(pieces, shares, lambda numbered: len(numbered[1]))]
        if _is_fair(parts, shares):
            break
    return _checked(parts)


def split_pieces(
    pieces: Sequence[Piece], shares: Sequence[float], seed: int, length: Callable[[Piece], int]
) -> list[list[Piece]]:
    """Part whatever has a length at random: one list per share of the whole length, then the rest.

    Raises:
        InputError: if a part would get nothing.
    """
    return _checked(_part(_shuffled(pieces, seed), shares, length))


def _shuffled(pieces: Sequence[Piece], seed: int) -> list[Piece]:
    shuffled = list(pieces)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _part(pieces: Sequence[Piece], shares: Sequence[float], length: Callable[[Piece], int]) -> list[list[Piece]]:
    reached = list(itertools.accumulate(map(length, pieces)))
    starts = [0]
    for bound in itertools.accumulate(shares):
        starts.append(max(bisect.bisect_left(reached, bound * reached[-1]) + 1, starts[-1] + 1))
    return [list(pieces[start:stop]) for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def _joined(part: Iterable[tuple[int, str]]) -> list[str]:
    """Pieces with the numbers of their documents, put together again."""
    return ["".join(piece for _, piece in each) for _, each in itertools.groupby(part, key=operator.itemgetter(0))]


def _is_fair(parts: Sequence[Sequence[str]], shares: Sequence[float]) -> bool:
    sizes = [sum(map(len, part)) for part in parts]
    wanted = [share * sum(sizes) for share in (*shares, 1 - sum(shares))]
    return all(share / 2 <= size <= 2 * share for size, share in zip(sizes, wanted, strict=True))


def _checked(parts: list[list[Piece]]) -> list[list[Piece]]:
    if not all(parts):
        raise InputError("the text is too short to hold some of it out; give more text, or --eval-data")
    return parts

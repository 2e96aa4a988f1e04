"""Text in, windows out: sources, windows, the split by documents, and batches."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regrow.data.source import load_documents, looks_like_path, split_documents
from regrow.data.tokens import Windows, batches, make_windows
from regrow.errors import InputError

# --- sources -------------------------------------------------------------------------------------

DOCUMENTS = ["The first.\nIn two lines.", "The second: ä, 好, 🙂.", "The third."]
RECORDS = [{"text": text, "number": number} for number, text in enumerate(DOCUMENTS)]


def as_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")


def as_array(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")


def as_parquet(path: Path, records: list[dict[str, object]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


KINDS = {"a.jsonl": as_lines, "a.JSONL": as_lines, "a.json": as_array, "a.parquet": as_parquet, "[a] *.jsonl": as_lines}


@pytest.mark.parametrize(("name", "write"), KINDS.items(), ids=KINDS)
def test_records(name: str, write: Callable[[Path, list[dict[str, object]]], None], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, RECORDS)
    assert load_documents(str(path)) == DOCUMENTS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [as_lines, as_array, as_parquet])
def test_records_without_text_are_dropped(
    write: Callable[[Path, list[dict[str, object]]], None], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ {as_lines: 'jsonl', as_array: 'json', as_parquet: 'parquet'}[write] }"
    write(path, [{"body": "one"}, {"body": None}, {"body": " \n"}, {"body": "two"}])
    assert load_documents(str(path), "body") == ["one", "two"]


def test_fields_of_lines_may_come_late_or_change(tmp_path: Path) -> None:
    """What a schema made of the first ten megabytes would not hold."""
    lines: list[dict[str, object]] = [{"text": "once upon a time " * 60, "title": None}] * 10_500
    as_lines(
        tmp_path / "a.jsonl", [*lines, {"text": "2020-01-01", "title": "x", "url": 3}, {"url": "y"}, {"text": "z"}]
    )
    assert load_documents(str(tmp_path / "a.jsonl"))[10_500:] == ["2020-01-01", "z"]


@pytest.mark.parametrize("line", ['{"text": "\\ud800"}', "[" * 100_000, "1", '{"text": 1e5}{', '{"text": "a\tb"}'])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line)
    with pytest.raises(InputError, match=r"a\.jsonl is not one JSON object a line: line 3: "):
        load_documents(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "byte-order-mark"])
def test_text(start: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(start + "\n<|endoftext|>\n".join([*DOCUMENTS, " \n"]) + "\n", encoding="utf-8")
    assert load_documents(str(path)) == DOCUMENTS


def test_text_of_one_document(tmp_path: Path) -> None:
    path = tmp_path / "story"  # a file is a file, whatever its name
    path.write_text("One.\n\nTwo.\n")
    assert load_documents(str(path)) == ["One.\n\nTwo."]


def test_what_can_only_be_a_path() -> None:
    assert all(map(looks_like_path, ("/a", "./a", "../a", "~/a", "a/b/c", ".")))
    assert not any(map(looks_like_path, ("a", "a/b", "wikitext", "Qwen/Qwen3-0.6B")))


# --- splitting -----------------------------------------------------------------------------------

texts = st.lists(st.text("ab\n", min_size=1, max_size=30), min_size=12, max_size=40)


@given(texts, st.integers(0, 2**32))
def test_a_split_is_disjoint_and_complete(documents: list[str], seed: int) -> None:
    documents = [f"{number} {text}" for number, text in enumerate(documents)]
    parts = split_documents(documents, [0.1, 0.2], seed)
    assert len(parts) == 3
    assert all(parts)
    pieces = list(itertools.chain(*parts))
    assert len(documents) <= len(pieces) <= len(documents) + 2, "at most one is parted at each bound"
    whole = "".join(pieces)
    assert Counter(whole) == Counter("".join(documents))
    assert all(document in whole for document in documents)
    assert parts == split_documents(documents, [0.1, 0.2], seed)


def test_a_split_has_its_shares_and_is_by_the_seed() -> None:
    documents = [f"{number:03}" + "x" * 97 for number in range(100)]
    parts = split_documents(documents, [0.05, 0.15], 0)
    assert [len(part) for part in parts] == [5, 15, 80]
    assert parts != split_documents(documents, [0.05, 0.15], 1)
    assert documents == sorted(documents), "what was given is left alone"


def test_a_single_document_is_parted_at_its_lines() -> None:
    document = "".join(f"line {number:03}\n" for number in range(200))
    parts = split_documents([document], [0.1, 0.1], 0)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(text for [text] in parts) == document
    assert [text.count("\n") for [text] in parts] == [20, 20, 160]


lengths = st.lists(st.integers(1, 4000), min_size=1, max_size=12).filter(lambda each: sum(each) > 600)


@given(lengths, st.sampled_from([[0.05], [0.05, 0.05], [0.2, 0.3]]), st.integers(0, 2**32), st.sampled_from("\n "))
def test_few_documents_of_any_length_are_held_out_by_their_shares(
    lengths: list[int], shares: list[float], seed: int, end: str
) -> None:
    documents = [f"word{end}" * length for length in lengths]
    parts = split_documents(documents, shares, seed)
    for part, share in zip(parts, [*shares, 1 - sum(shares)], strict=True):
        assert share / 2 <= sum(map(len, part)) / sum(map(len, documents)) <= 2 * share


@pytest.mark.parametrize("seed", range(6))
def test_one_long_document_among_short_ones(seed: int) -> None:
    documents = ["a line of it\n" * 1000, "short\n" * 3, "shorter\n"]
    sizes = [sum(map(len, part)) / 13026 for part in split_documents(documents, [0.05, 0.05], seed)]
    assert sizes == pytest.approx([0.05, 0.05, 0.9], abs=0.005)


@pytest.mark.parametrize("count", [20, 60, 400])
def test_many_documents_stay_whole(count: int) -> None:
    documents = [f"{number:03}\n" * (9 + number % 3) for number in range(count)]
    random.Random(3).shuffle(shuffled := list(documents))
    assert list(itertools.chain(*split_documents(documents, [0.05, 0.05], 3))) == shuffled


@pytest.mark.parametrize("documents", [["one line"], ["two\nlines"], ["a", "b"], ["a\n" * 2]])
def test_a_text_too_short_to_part_is_refused(documents: list[str]) -> None:
    with pytest.raises(InputError, match="too short to hold some of it out"):
        split_documents(documents, [0.1, 0.1], 0)


# --- windows -------------------------------------------------------------------------------------

BOS = 0


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A token for every letter: `<s>` is 0, a is 1, b is 2, …; a line end is 27."""
    vocabulary = {"<s>": BOS, **{chr(ord("a") + n): n + 1 for n in range(26)}, "\n": 27, "?": 28}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


POLICIES = {
    "document": [[0, 1, 2, 3, 0], [4, 5, 0, 6, 7]],
    "once": [[0, 1, 2, 3, 27], [27, 4, 5, 27, 27]],
    "none": [[1, 2, 3, 4, 5]],
}


@pytest.mark.parametrize(("bos", "expected"), POLICIES.items(), ids=POLICIES)
def test_windows_by_hand(bos: str, expected: list[list[int]], letters: PreTrainedTokenizerFast) -> None:
    documents = ["abc", "de", "fgh"]  # whose last tokens do not fill a window: they are dropped
    windows = make_windows(documents, letters, 5, bos=bos, source="letters")
    assert windows.ids_NT.tolist() == expected
    assert (len(windows), windows.length, windows.bos, windows.source) == (len(expected), 5, bos, "letters")


def test_windows_without_a_bos_token(letters: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer)
    assert make_windows(["abc", "de"], plain, 5, bos="document", source="").ids_NT.tolist() == [[1, 2, 3, 4, 5]]


def test_many_documents_are_one_stream(letters: PreTrainedTokenizerFast) -> None:
    documents = ["ab"] * 1000
    windows = make_windows(documents, letters, 7, bos="document", source="")
    stream = ([BOS, 1, 2] * 1000)[: 3000 // 7 * 7]
    assert windows.ids_NT.flatten().tolist() == stream
    assert windows.ids_NT.dtype == torch.int64
    limited = make_windows(documents, letters, 7, bos="document", source="", max_tokens=1000)
    assert limited.ids_NT.flatten().tolist() == stream[: 1000 // 7 * 7]


def test_a_text_shorter_than_a_window_is_counted(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"a\.txt: 4 tokens are fewer than one window of 5"):
        make_windows(["abc"], letters, 5, bos="document", source="a.txt")
    assert len(make_windows(["abc"], letters, 4, bos="document", source="a.txt")) == 1


def numbered(count: int, length: int = 3) -> Windows:
    return Windows(torch.arange(count * length).view(count, length), "numbers", "none")


def test_fewer_windows_are_spread_evenly() -> None:
    windows = numbered(100)
    assert (windows.first(5).ids_NT[:, 0] // 3).tolist() == [0, 24, 49, 74, 99]
    assert windows.first(None) is windows.first(100) is windows.first(1000) is windows
    for count in range(1, 100):
        chosen = (windows.first(count).ids_NT[:, 0] // 3).tolist()
        assert len(set(chosen)) == count
        gaps = {after - before for before, after in itertools.pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_hash_tells_texts_apart() -> None:
    assert numbered(4).sha256 == numbered(4).sha256
    assert len({numbered(4).sha256, numbered(5).sha256, numbered(4).first(3).sha256}) == 3


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation(count: int, size: int) -> None:
    windows = numbered(count)
    epochs = 6
    drawn = list(itertools.islice(batches(windows, size, seed=0), epochs * count // size))
    assert all(batch.ids_BT.shape == (size, 3) for batch in drawn)
    order = [int(row[0]) // 3 for batch in drawn for row in batch.ids_BT]
    assert order == [int(number) for batch in drawn for number in batch.numbers_B]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    if count > 3:
        assert order[:count] != order[count : 2 * count]


def test_batches_are_by_the_seed_alone() -> None:
    windows = numbered(10)

    def rows(seed: int, disturb: int = 0) -> list[list[list[int]]]:
        torch.manual_seed(disturb)
        return [batch.ids_BT.tolist() for batch in itertools.islice(batches(windows, 4, seed), 9)]

    assert rows(0) == rows(0, disturb=1)
    assert rows(0) != rows(1)


def test_batches_resume() -> None:
    """Skipping what has been seen of a new stream continues as the old one would have."""
    windows = numbered(10)
    stream = batches(windows, 4, seed=7)
    for _ in range(11):
        next(stream)
    resumed = itertools.islice(batches(windows, 4, seed=7), 11, None)
    for _ in range(5):
        assert torch.equal(next(stream).ids_BT, next(resumed).ids_BT)

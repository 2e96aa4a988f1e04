"""Tokens kept on disk, text tokenized beforehand, and memory that does not follow the size of a file."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regrow.data import source, store
from regrow.data.corpus import read_corpus
from regrow.data.shards import holds_tokens, load_rows
from regrow.data.source import load_documents
from regrow.data.tokens import Windows, make_windows
from regrow.demo.show import model_folder
from regrow.errors import InputError
from regrow.settings import Data

DOCUMENTS = [f"Return the number {n} of {'something ' * (n % 7)}or raise an error.\n" for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("REGROW_CACHE", str(folder))
    return folder


def windows(tokenizer: PreTrainedTokenizerFast, documents: list[str] = DOCUMENTS, **changed: object) -> Windows:
    settings = {"length": 16, "bos": "document", "source": "text"} | changed
    return make_windows(documents, tokenizer, settings.pop("length"), **settings)


# --- tokens kept on disk -------------------------------------------------------------------------


def test_what_killed_processes_left_goes_after_a_day(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    cache.mkdir()
    for name, age in ((".old.partial", 2 * 24 * 3600), (".new.partial", 60)):
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (time.time() - age,) * 2)
    windows(tokenizer)
    assert sorted(path.name for path in cache.iterdir() if path.suffix == ".partial") == [".new.partial"]


def test_a_tokenizer_that_splits_special_tokens_is_another(cache: Path) -> None:
    plain, splitting = (AutoTokenizer.from_pretrained(model_folder(), split_special_tokens=s) for s in (False, True))
    assert store.name_of(["text"], plain, "how") != store.name_of(["text"], splitting, "how")


@pytest.mark.parametrize(
    "changed", [{}, {"max_tokens": 999}, {"bos": "once"}, {"bos": "none"}, {"length": 31}], ids=str
)
def test_kept_tokens_are_the_tokens(
    changed: dict[str, object], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = windows(tokenizer, **changed)
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "a" / "b"))
    for _ in range(2):
        kept = windows(tokenizer, **changed)
        assert torch.equal(kept.ids_NT, fresh.ids_NT)
        assert kept.ids_NT.dtype == torch.int64
        assert kept.sha256 == fresh.sha256
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1


def test_a_text_is_tokenized_once(
    cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = windows(tokenizer)
    called = []
    monkeypatch.setattr("regrow.data.tokens._tokenized", lambda *given: called.append(given) or iter(()))
    again = windows(AutoTokenizer.from_pretrained(model_folder()), length=32)
    assert not called, "another length is the same row of tokens"
    assert torch.equal(again.ids_NT.flatten()[:512], first.ids_NT.flatten()[:512])
    assert again.batch(torch.tensor([1, 0])).ids_BT.shape == (2, 32)
    others = [DOCUMENTS[1:], [*DOCUMENTS[:-1], "x"], ["".join(DOCUMENTS[:2]), *DOCUMENTS[2:]]]
    for documents in others:
        with pytest.raises(InputError, match="0 tokens are fewer"):
            windows(tokenizer, documents)
    other = AutoTokenizer.from_pretrained(model_folder())
    other.add_tokens(["something"])
    with pytest.raises(InputError, match="0 tokens are fewer"):
        windows(other)
    assert len(called) == len(others) + 1


def test_what_reads_kept_tokens_cannot_change_them(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = windows(tokenizer)
    expected = first.ids_NT.clone()
    first.ids_NT.fill_(7)
    assert torch.equal(windows(tokenizer).ids_NT, expected)


def test_tokens_used_least_lately_go(
    cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there() -> int:
        return len(list(cache.iterdir()))

    sizes = [windows(tokenizer, DOCUMENTS[n:]).ids_NT.numel() * 8 for n in range(3)]
    assert there() == 3
    old = sorted(cache.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    windows(tokenizer)  # used again: the oldest is now the second
    monkeypatch.setattr(store, "LIMIT", 3.5 * max(sizes))
    windows(tokenizer, DOCUMENTS[3:])
    assert there() == 3
    assert [file.exists() for file in old] == [True, False, True]


def test_without_a_place_tokens_stay_in_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = windows(tokenizer)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "file"))
    assert torch.equal(windows(tokenizer).ids_NT, fresh.ids_NT)


# --- text tokenized beforehand -------------------------------------------------------------------


def save_folder(data: datasets.Dataset, path: Path) -> None:
    data.save_to_disk(str(path), num_shards=3)


def save_splits(data: datasets.Dataset, path: Path) -> None:
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(str(path))


def save_shards(data: datasets.Dataset, path: Path) -> None:
    path.mkdir()
    for number in range(3):
        data.shard(3, number).to_parquet(path / f"{number}.parquet", batch_size=7)


def save_file(data: datasets.Dataset, path: Path) -> None:
    data.to_parquet(path)


def save_arrow(data: datasets.Dataset, path: Path) -> None:
    save_folder(data, path)
    for file in path.glob("*.json"):
        file.unlink()


WAYS = {
    "folder": save_folder,
    "arrow": save_arrow,
    "splits": save_splits,
    "shards": save_shards,
    "file.parquet": save_file,
}


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    ids = tokenizer(DOCUMENTS, add_special_tokens=False)["input_ids"]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]})


@pytest.mark.parametrize(("name", "save"), WAYS.items(), ids=WAYS)
def test_rows_are_read_once_each(
    name: str,
    save: Callable[[datasets.Dataset, Path], None],
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    save(rows, tmp_path / name)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert holds_tokens(str(tmp_path / name), "text")
    found = load_rows(str(tmp_path / name), tokenizer, 10**9, 0)
    assert sorted(row.tolist() for row in found) == sorted(rows["input_ids"])
    some = load_rows(str(tmp_path / name), tokenizer, 500, 0)
    assert sum(map(len, some[:-1])) < 500 <= sum(map(len, some))
    assert [row.tolist() for row in some] != rows["input_ids"][: len(some)], "drawn at random"
    again = load_rows(str(tmp_path / name), tokenizer, 500, 0)
    assert [row.tolist() for row in again] == [row.tolist() for row in some]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing is left beside them"


def test_tokenized_or_not_the_windows_are_the_same(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    marked = rows.map(lambda row: {"input_ids": [tokenizer.bos_token_id, *row["input_ids"]]})
    for name, data in {"bare": rows, "marked": marked}.items():
        data.save_to_disk(str(tmp_path / name))
    found = {}
    for name in ("text.jsonl", "bare", "marked"):
        data = Data(source=str(tmp_path / name), sequence_length=8)
        corpus, test = read_corpus(data, tokenizer, max_tokens=10**6, eval_windows=10**6, seed=0)
        held_out = {text.strip() for text in test}
        assert held_out <= {text.strip() for text in DOCUMENTS}, "decoded to what they were"
        parts = [corpus.train.ids_NT, corpus.validation.ids_NT]
        starts = sum(int((part == tokenizer.bos_token_id).sum()) for part in parts)
        assert 0 <= 300 - len(held_out) - starts <= 3, "one BOS to a document, but where the last window was dropped"
        found[name] = sum(part.numel() for part in parts)
    assert found["bare"] == found["marked"]
    assert abs(found["bare"] - found["text.jsonl"]) < 200, "another draw of the documents, as many tokens"


def test_a_parquet_file_with_text_is_text(tmp_path: Path) -> None:
    file = tmp_path / "both.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "input_ids": [1]}]), file)
    assert not holds_tokens(str(file), "text")
    assert holds_tokens(str(file), "body")
    assert not holds_tokens(str(tmp_path / "none.parquet"), "text")
    assert not holds_tokens("", "text")


BAD = {
    "another tokenizer": ({"input_ids": [[1, 2], [3, 2048]]}, "token id 2048 is none of the model's 2048; tokenize"),
    "negative": ({"input_ids": [[1, -100]]}, "token id -100 is none of the model's 2048"),
    "no such column": ({"text": ["a"]}, "has no column 'input_ids' but text"),
    "text in the column": ({"input_ids": ["a"]}, "column 'input_ids' holds no lists of token ids"),
    "numbers in the column": ({"input_ids": [1]}, "column 'input_ids' holds no lists of token ids"),
    "nothing": ({"input_ids": [[], []]}, "holds no tokens"),
}


@pytest.mark.parametrize(("columns", "complaint"), BAD.values(), ids=BAD)
def test_rows_of_no_use_are_refused(
    columns: dict[str, list[object]], complaint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(InputError, match=complaint) as refused:
        load_rows(str(tmp_path / "rows"), tokenizer, 10**6, 0)
    assert str(refused.value).startswith(str(tmp_path / "rows"))


def test_a_damaged_shard_is_told(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"a\.arrow cannot be read as token ids: "):
        load_rows(str(tmp_path / "a.arrow"), tokenizer, 10, 0)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_memory_does_not_follow_the_size_of_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FILE_CHARACTERS", 300_000)
    documents = [f"{number} " + "some words of a text " * 50 for number in range(45_000)]
    peaks, first = [], []
    for count in (15_000, 45_000):  # the reader takes 10 MB at a time
        file = tmp_path / f"{count}-{name}"
        if name == "a.parquet":
            table = pyarrow.table({"text": documents[:count]})
            pyarrow.parquet.write_table(table, file, row_group_size=100, compression="none", use_dictionary=False)
        else:
            lines = documents[:count] if name == "a.txt" else (json.dumps({"text": each}) for each in documents[:count])
            file.write_text(("\n<|endoftext|>\n" if name == "a.txt" else "\n").join(lines))
        assert file.stat().st_size > 1000 * count
        load_documents(str(file), max_characters=1000)  # imports are over
        tracemalloc.start()
        found = load_documents(str(file), max_characters=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found[:-1] == documents[: len(found) - 1]
        assert 290_000 < sum(map(len, found)) < 310_000
        first.append(found)
    assert first[0] == first[1]
    assert peaks[1] < 1.2 * peaks[0]
    longer = load_documents(str(tmp_path / f"45000-{name}"), max_characters=2_000_000)
    assert sum(map(len, longer)) > 1_900_000, "a run that can use more gets more"


def test_a_large_file_of_one_line_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FILE_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("words " * 500)
    assert load_documents(str(tmp_path / "a.txt"), max_characters=10) == [("words " * 500)[:1000]]


def test_tokens_are_made_piece_by_piece(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    peaks = []
    for times in (2, 20):
        documents = DOCUMENTS * times
        documents[0] = str(times)
        tracemalloc.start()
        made = windows(tokenizer, documents)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made.ids_NT.numel() > 3000 * times
    assert peaks[1] < 1.2 * peaks[0]
    assert np.frombuffer(next(cache.iterdir()).read_bytes(), dtype=np.int64).max() < len(tokenizer)

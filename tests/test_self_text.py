"""Text by the model itself: the same seed writes the same, what surprises the model goes, and the run says so."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import regrow
from regrow.data.source import load_documents
from regrow.errors import InputError
from regrow.progress import Silent
from regrow.recipe import load_recipe
from regrow.recovery.self_text import (
    OwnText,
    _least_surprising,
    _lengths,
    _mean_losses,
    _write,
    start_token,
    tokens_to_write,
    write_own_text,
)
from regrow.settings import Generate

SHORT = Generate(length=20, batch_size=5)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def write(model, tokenizer, wanted: Generate = SHORT, tokens: int = 300, seed: int = 0) -> OwnText:
    return write_own_text(model, tokenizer, wanted, tokens, seed, Silent())


def test_progress_ends_with_what_was_asked_for(model, tokenizer) -> None:
    """Whole batches are written, which may be more."""
    steps: list[int] = []
    progress = Silent()
    progress.advance = lambda count=1, note="": steps.append(count)
    write_own_text(model, tokenizer, SHORT, 300, 0, progress)
    assert sum(steps) == 300
    assert all(steps)


def test_the_seed_decides_and_nothing_else(model, tokenizer) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = write(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert write(model, tokenizer) == first
    assert write(model, tokenizer, seed=1).documents != first.documents
    assert len(set(first.documents)) == len(first.documents)


def test_enough_is_written_and_a_share_dropped(model, tokenizer) -> None:
    whole = write(model, tokenizer, SHORT.model_copy(update={"drop": 0.0}))
    assert (whole.dropped, len(whole.documents) % 5) == (0, 0)
    assert 300 <= whole.tokens < 300 + 5 * 19
    kept = write(model, tokenizer)
    assert kept.dropped == len(whole.documents) // 5
    assert len(kept.documents) + kept.dropped == len(whole.documents)
    left = iter(whole.documents)
    assert all(document in left for document in kept.documents)  # in the same order


def test_what_surprises_most_goes() -> None:
    assert _least_surprising([3.0, 1.0, 9.0, 2.0, 8.0], 0.4) == [0, 1, 3]
    assert _least_surprising([3.0, math.inf, 9.0, 2.0, 8.0], 0.4) == [0, 3, 4]  # a blank text counts as dropped
    assert _least_surprising([math.inf, 1.0, math.nan], 0.0) == [1]
    assert _least_surprising([1.0], 0.9) == [0]


def test_a_text_ends_where_the_model_ends_it() -> None:
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 1, 1], [1, 1, 1, 1], [1, 5, 6, 1]])
    assert _lengths(ids, 1).tolist() == [4, 3, 2, 4]
    assert _lengths(ids, None).tolist() == [4, 4, 4, 4]


def test_losses_leave_the_padding_out(model) -> None:
    ids = torch.randint(2, 300, (6, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 2, 7, 9, 3])
    with torch.inference_mode():
        found = _mean_losses(model, ids, lengths)
        for row, length, loss in zip(ids, lengths.tolist(), found.tolist(), strict=True):
            logits = model(input_ids=row[None, :length]).logits[0].double()
            assert loss == pytest.approx(float(functional.cross_entropy(logits[:-1], row[1:length])), rel=1e-5)


def test_texts_begin_with_the_start_and_no_special_token(model, tokenizer) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        ids = _write(model, tokenizer, Generate(length=6, prefix_tokens=3, batch_size=200), start_token(tokenizer))
        cut_short = _write(model, tokenizer, Generate(length=3, prefix_tokens=9, batch_size=2), 0)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert not torch.isin(ids[:, 1:4], torch.tensor(tokenizer.all_special_ids)).any()
    assert ids.max() < len(tokenizer)
    assert ids.shape[1] <= 6
    assert cut_short.shape == (2, 3)


def test_a_prefix_is_sampled_from_the_model_as_it_is(model, tokenizer) -> None:
    torch.manual_seed(0)
    count = 4000
    with torch.inference_mode():
        ids = _write(model, tokenizer, Generate(length=2, prefix_tokens=1, batch_size=count), start_token(tokenizer))
        logits = model(input_ids=torch.tensor([[start_token(tokenizer)]])).logits[0, -1, : len(tokenizer)]
        logits[tokenizer.all_special_ids] = -math.inf
    expected = logits.softmax(0) * count
    seen = torch.bincount(ids[:, 1], minlength=len(tokenizer)).float()
    there = expected > 0
    chi_square = float(((seen - expected)[there].square() / expected[there]).sum())
    freedom = int(there.sum()) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_start_may_be_what_ends_the_text_before(tokenizer) -> None:
    class Bare:
        bos_token_id: int | None = None
        eos_token_id: int | None = 7

    assert start_token(Bare()) == 7  # type: ignore[arg-type]
    Bare.eos_token_id = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        start_token(Bare())  # type: ignore[arg-type]


def test_no_more_is_written_than_the_run_can_use() -> None:
    recipe = load_recipe("regrow", {"data.held_out": 0.1, "generate.drop": 0.5, "evaluation.windows": [32]})
    assert tokens_to_write(recipe, 40_000) == 100_000  # 80 % of the half that is kept is to train on
    assert tokens_to_write(recipe, 10**9) == 200_000
    # Two windows of 256 tokens in the tenth that is held out, of the half that is kept.
    assert tokens_to_write(recipe, 10) == 10_240
    with pytest.raises(InputError, match="use at least 10240, or give your own text"):
        tokens_to_write(recipe.override({"generate.tokens": 10_239}), 10)


@pytest.mark.usefixtures("lean")
def test_a_run_without_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "generate.length": 40, "data.held_out": 0.1}
    own = regrow.prune(str(checkpoint), tmp_path / "own", "regrow", steps=2, overrides=settings)
    told = own.results["own_text"]
    documents = load_documents(str(own.folder / "generated.jsonl"))
    assert told["texts"] == len(documents)
    assert told["evaluated_on_it"]
    report, card = ((own.folder / name).read_text() for name in ("report.md", "model/README.md"))
    for page in (report, card):
        assert f"No text was given: calibrated and recovered on {len(documents)} texts" in page
        assert "Perplexity below is on such text (held out)" in page
    # Repeated with the file, the run is the same to the byte.
    again = regrow.prune(
        str(checkpoint), tmp_path / "again", "regrow", data=str(own.folder / "generated.jsonl"), steps=2,
        overrides=settings,
    )  # fmt: skip
    assert "own_text" not in again.results
    assert (own.model / "model.safetensors").read_bytes() == (again.model / "model.safetensors").read_bytes()
    elsewhere = regrow.prune(
        str(checkpoint), tmp_path / "own", "magnitude", eval_data=str(text), steps=1, overrides=settings, fresh=True
    )
    assert not elsewhere.results["own_text"]["evaluated_on_it"]
    assert elsewhere.results["perplexity"]["dense"]["window-32"]["source"] == str(text)
    assert "Perplexity below is on such text" not in (elsewhere.folder / "report.md").read_text()
    assert json.loads((elsewhere.folder / "run.json").read_text())["state"] == "finished"

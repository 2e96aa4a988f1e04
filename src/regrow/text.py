"""What a run reads: windows to train on and to validate with, documents to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data.corpus import HELD_OUT, Corpus, list_sources, read_corpus
from regrow.data.source import load_documents
from regrow.evaluation.compare import protocol_windows
from regrow.recipe import Recipe


@dataclass(frozen=True)
class Text:
    """Windows for training and for the validation loss, and documents to evaluate on."""

    corpus: Corpus
    test_documents: list[str]
    test_source: str

    @property
    def probe(self) -> Tensor:
        """Tokens on which a checkpoint is compared with the model that was trained: held out, `[2, 128]` at most."""
        return self.corpus.validation.ids_NT[:2, :128]


def training_tokens(recipe: Recipe) -> int:
    """How many tokens scoring and training can use."""
    data, training = recipe.data, recipe.training
    use = (training.steps * training.accumulate + recipe.pruning.calibration_batches) * training.batch_size
    return data.max_tokens or (use + 1) * data.sequence_length


def read_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, own_documents: Sequence[str] | None = None) -> Text:
    """Documents of all sources, parted once by the seed, as windows.

    Args:
        own_documents: what the model has written, if no text was given.

    Raises:
        InputError: if a source cannot be read, or holds too little.
    """
    data, training = recipe.data, recipe.training
    corpus, test = read_corpus(
        data, tokenizer, max_tokens=training_tokens(recipe), eval_windows=training.eval_windows,
        seed=recipe.seed, own_documents=own_documents,
    )  # fmt: skip
    if data.eval_source is not None:
        test, source = load_documents(data.eval_source, data.text_field, split="test"), data.eval_source
    else:
        names = ", ".join(source.source for source in list_sources(data) if source.stage == "pretrain")
        source = f"{names} {HELD_OUT}"
    protocol_windows(test, tokenizer, source, recipe)  # too short a text is better found now than at the end
    return Text(corpus, test, source)

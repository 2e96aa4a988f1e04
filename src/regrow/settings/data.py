"""Where the text comes from."""

from pydantic import Field

from regrow.settings.base import Bos, Count, Length, Section, Share, Stage, Template


class TextSource(Section):
    """One of several sources of text."""

    name: str = Field(description="What reports call it.")
    source: str = Field(description="A file or a data set on the hub, as `data.source`.")
    text_field: str = Field(default="text", description="pretrain: the field of a record that holds its text.")
    weight: float = Field(
        default=1.0, gt=0, description="What it contributes at first, relative to the other sources of its stage."
    )
    stage: Stage = Field(
        default="pretrain",
        description="pretrain: text. instruct: records with instruction, input and output, or with messages; trained "
        "on after the text, responses only.",
    )


class Data(Section):
    """Text: where it comes from and how it is cut into windows."""

    source: str | None = Field(
        default=None,
        description="Text to score and train on: a .txt, .jsonl, .json or .parquet file, a data set on the hub, or "
        "token ids (see docs/data.md); null: text that the model writes itself (see `generate`).",
    )
    sources: tuple[TextSource, ...] = Field(
        default=(),
        description="Several sources in place of `source`: a list of {name, source, text_field, weight, stage}; scored "
        "and evaluated on are those of stage pretrain.",
    )
    instructions: str | None = Field(
        default=None,
        description="Instructions to train on after the text, responses only: a .jsonl, .json or .parquet file or a "
        "data set on the hub, of records with instruction, input and output, or with messages.",
    )
    template: Template = Field(
        default="auto",
        description="How instructions become text. alpaca: the Alpaca prompt. chat: the tokenizer's chat template. "
        "auto: chat if the tokenizer has one.",
    )
    eval_source: str | None = Field(
        default=None, description="Text to evaluate on; without it, documents held out of `source`."
    )
    text_field: str = Field(default="text", description="The field of a record that holds its text.")
    held_out: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Share of the documents of each source held out for the validation loss.",
    )
    sequence_length: int = Field(default=256, ge=8, description="Tokens in a training window.")
    bos: Bos = Field(
        default="document",
        description="Where the tokenizer's BOS goes: before each document, once at the start of the text, nowhere.",
    )
    max_tokens: Count | None = Field(
        default=None, description="Read at most this many tokens of `source`; by default what the run can use."
    )


class Generate(Section):
    """Text that the model writes itself, when `data.source` gives none."""

    tokens: Count = Field(
        default=200_000, description="Tokens to write at most, dropped texts included; fewer if the run needs fewer."
    )
    length: Length = Field(
        default=256, description="Tokens of a text at most, its start token included; the model may end it earlier."
    )
    prefix_tokens: Count = Field(
        default=2, description="First tokens of a text, sampled from the model as it is, so that texts differ."
    )
    temperature: float = Field(default=0.7, gt=0, description="Of the tokens after the prefix.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Sample among the likeliest tokens of this much mass.")
    top_k: Count = Field(default=50, description="Sample among at most so many tokens.")
    repetition_penalty: float = Field(
        default=1.1, gt=0, description="Divides the logits of tokens that the text already has; 1: none."
    )
    drop: Share = Field(default=0.2, description="Share of the texts to drop: those that surprise the model most.")
    batch_size: Count = Field(default=16, description="Texts written at once.")

"""Sections of a config that name the corpora, and the tokenizer.

Imports neither torch nor datasets nor transformers, so that `--help` stays quick.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from textdiff.section import Number, PathText, Section, Whole


class Source(Section):
    """One corpus.

    The first reading that fits wins: `python-docs`, a local path or glob, a hub id.
    """

    source: PathText = Field(
        description="`python-docs`, a file of text or rows, a folder or pattern of them, a "
        "`save_to_disk` folder, or a Hugging Face dataset id",
    )
    name: str | None = Field(None, description="configuration name of a hub dataset")
    split: str = Field("train", description="split of a hub dataset")
    text_column: str = Field("text", description="column (or JSON key) that holds the text")
    weight: Number | None = Field(
        None,
        gt=0.0,
        description="share of the training tokens, relative to the other sources' weights; null: "
        "each source is read once per epoch",
    )
    streaming: bool = Field(
        False, description="read a hub dataset over the network without downloading it first"
    )
    skip_documents: Whole = Field(0, ge=0, description="documents passed over at the beginning")
    max_documents: Whole | None = Field(
        None, ge=1, description="documents taken after those; null: all"
    )


class DataConfig(Section):
    """The corpus and how it is cut into training sequences."""

    sources: tuple[Source, ...] = Field(
        (Source(source="python-docs"),), description="corpora, read one after another"
    )
    on_bad_rows: Literal["refuse", "skip"] = Field(
        "refuse",
        description="what becomes of rows without usable text (invalid JSON, no such column, null, "
        "...): stop with the first one, or skip and count them",
    )
    validation: Number = Field(
        0.05, gt=0.0, lt=0.5, description="fraction of the text that is held out (whole documents)"
    )
    sequence_length: Whole = Field(128, ge=1, description="tokens per training sequence")
    document_mask: bool = Field(False, description="attention stays inside documents")
    num_proc: Whole = Field(1, ge=1, description="processes that tokenise (the result is the same)")
    num_workers: Whole = Field(0, ge=0, description="processes that prepare training batches")
    cache_dir: PathText | None = Field(None, description="token cache; null: the datasets cache")

    @model_validator(mode="after")
    def _weighted(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("sources is empty: name at least one corpus")
        bare = [i for i, source in enumerate(self.sources) if source.weight is None]
        if bare and len(bare) < len(self.sources):
            raise ValueError(
                f"sources.{bare[0]} has no weight, others have: give every source one, or none"
            )
        return self


class BpeTokenizer(Section):
    """Byte-level byte-pair encoding, trained on the training split."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Whole = Field(2048, ge=260, description="vocabulary size, special tokens included")


class CharTokenizer(Section):
    """One token per character of the training split; other characters become one unknown token."""

    kind: Literal["char"] = "char"


class ByteTokenizer(Section):
    """One token per UTF-8 byte; needs no training."""

    kind: Literal["byte"] = "byte"


class PretrainedTokenizer(Section):
    """Any Hugging Face tokenizer; a mask token is added if it has none."""

    kind: Literal["pretrained"] = "pretrained"
    path: PathText = Field(description="folder or hub id of the tokenizer")


Tokenizer = Annotated[
    BpeTokenizer | CharTokenizer | ByteTokenizer | PretrainedTokenizer, Field(discriminator="kind")
]

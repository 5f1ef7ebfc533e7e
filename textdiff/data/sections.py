"""Sections of a config that name the corpora and the tokenizer.

Imports neither torch nor datasets nor transformers, so that `--help` stays quick.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from textdiff.data.document_stream import split_long
from textdiff.data.sources import known_sources
from textdiff.registry import OneOf, Registry
from textdiff.section import Number, PathText, Section, Whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Model
    from transformers import PreTrainedTokenizerFast

EOS, PAD, MASK, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>"
TRAINING_PIECE_CHARACTERS = 100_000  # the trainer holds hundreds of texts at a time

# --- corpora -------------------------------------------------------------------------------------


class Source(Section):
    """One corpus.

    The first kind that fits reads it: `python-docs`, a local path or glob, a hub id; see `sources`.
    """

    source: PathText = Field(description=known_sources())
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


class Conversations(Section):
    """Prompt–answer training: rows are conversations, and the loss is of their answers alone."""

    template: str | None = Field(
        None,
        description="chat template in Jinja, which the export carries; null: that of the tokenizer",
    )
    packing: Literal["padded", "packed"] = Field(
        "padded",
        description="one conversation per sequence, or as many as fit, each attending to itself",
    )
    too_long: Literal["refuse", "drop", "cut"] = Field(
        "refuse",
        description="what becomes of conversations that are longer than a sequence: stop, drop and "
        "count them, or keep the turns that fit",
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
    conversations: Conversations | None = Field(
        None,
        description="prompt–answer training on rows with messages, prompt and completion, or "
        "question and answer: {template, packing, too_long}; null: plain text",
    )
    num_proc: Whole = Field(1, ge=1, description="processes that tokenise (the result is the same)")
    num_workers: Whole = Field(0, ge=0, description="processes that prepare training batches")
    cache_dir: PathText | None = Field(None, description="token cache; null: the datasets cache")

    @model_validator(mode="after")
    def _weighted(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("sources is empty: name at least one corpus")
        if self.conversations is not None and self.weights:
            raise ValueError(
                "conversations are read one source after another: leave the weights of sources out"
            )
        bare = [i for i, source in enumerate(self.sources) if source.weight is None]
        if bare and len(bare) < len(self.sources):
            raise ValueError(
                f"sources.{bare[0]} has no weight, others have: give every source one, or none"
            )
        return self

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources; None: they are read one after another."""
        return [source.weight for source in self.sources if source.weight is not None] or None


# --- tokenizers ----------------------------------------------------------------------------------


class TokenizerKind(Section):
    """One way to come to a tokenizer."""

    kind: str

    def prepare(self, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
        """Return the tokenizer, trained on texts or loaded.

        Raises:
            DataError: the tokenizer does not exist.
        """
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """Return a hash of how a tokenizer that is not trained encodes; it names the token cache.

        Raises:
            DataError: see `prepare`.
        """
        return None


class TrainedTokenizer(TokenizerKind):
    """Base of the tokenizers that are trained on the training split."""

    unknown: ClassVar[str | None] = None
    """Token of what the tokenizer cannot encode; None: it encodes every text."""

    def backend(self, texts: Iterable[str]) -> "Backend":
        """Train what turns text into ids, without special tokens."""
        raise NotImplementedError

    def prepare(self, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
        """See `TokenizerKind`."""
        from textdiff.data.tokenizer import train_tokenizer

        return train_tokenizer(self, texts)


TOKENIZERS: Registry[TokenizerKind] = Registry("tokenizer")


@TOKENIZERS.register
class BpeTokenizer(TrainedTokenizer):
    """Byte-level byte-pair encoding, trained on the training split."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Whole = Field(2048, ge=260, description="vocabulary size, special tokens included")

    def backend(self, texts: Iterable[str]) -> "Backend":
        """See `TrainedTokenizer`; a small corpus may yield fewer tokens than `vocab_size`."""
        from tokenizers import models, pre_tokenizers, trainers

        backend = _byte_level(models.BPE(), use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - len((EOS, PAD, MASK)),
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in split_long(text, TRAINING_PIECE_CHARACTERS))
        backend.train_from_iterator(pieces, trainer)
        return backend


@TOKENIZERS.register
class CharTokenizer(TrainedTokenizer):
    """One token per character of the training split; other characters become one unknown token."""

    kind: Literal["char"] = "char"
    unknown: ClassVar[str | None] = UNKNOWN

    def backend(self, texts: Iterable[str]) -> "Backend":
        """See `TrainedTokenizer`."""
        from tokenizers import Tokenizer, decoders, models

        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        vocab = {character: index for index, character in enumerate(sorted(characters))}
        vocab[UNKNOWN] = len(vocab)
        # BPE without merges goes character by character and is faster than a regex split.
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
        backend.decoder = decoders.Fuse()
        return backend


@TOKENIZERS.register
class ByteTokenizer(TrainedTokenizer):
    """One token per UTF-8 byte; needs no training."""

    kind: Literal["byte"] = "byte"

    def backend(self, texts: Iterable[str]) -> "Backend":
        """See `TrainedTokenizer`; texts are not read."""
        from tokenizers import models

        from textdiff.data.backend import byte_characters

        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        return _byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False)


@TOKENIZERS.register
class PretrainedTokenizer(TokenizerKind):
    """Any Hugging Face tokenizer; a mask token is added if it has none."""

    kind: Literal["pretrained"] = "pretrained"
    path: PathText = Field(description="folder or hub id of the tokenizer")
    mask_token: str | None = Field(
        None,
        min_length=1,
        description="token of it that is the mask, such as a reserved one; null: its own mask, or "
        "an added one",
    )

    def prepare(self, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
        """See `TokenizerKind`; texts are not read."""
        from textdiff.data.tokenizer import pretrained_tokenizer

        return pretrained_tokenizer(self.path, self.mask_token)

    def fingerprint(self) -> str:
        """See `TokenizerKind`."""
        from textdiff.data.backend import encoding_fingerprint

        return encoding_fingerprint(self.prepare(()))


Tokenizer = Annotated[TokenizerKind, OneOf(TOKENIZERS)]


def _byte_level(model: "Model", use_regex: bool) -> "Backend":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    return backend

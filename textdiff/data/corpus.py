"""From the config's `data` and `tokenizer` sections to what training needs."""

import platform
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from textdiff.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    PretrainedTokenizer,
    Source,
)
from textdiff.data.loader import PackedSequences
from textdiff.data.packing import tokenize
from textdiff.data.python_docs import corpus_fingerprint
from textdiff.data.sources import iterate_texts, load_documents
from textdiff.data.split import split_documents
from textdiff.data.tokenizer import prepare_tokenizer, tokenizer_fingerprint, vocabulary_size


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        train: the training sequences.
        validation: the held-out documents, as text.
        tokenizer: trained on the training split, or loaded.
        record: what the run writes down about its data; plain JSON values.
    """

    train: PackedSequences
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]


def prepare_corpus(
    data: DataConfig,
    tokenizer: BpeTokenizer | CharTokenizer | ByteTokenizer | PretrainedTokenizer,
    seed: int,
) -> Corpus:
    """Loads the sources, holds out validation text, makes the tokenizer and tokenises.

    Args:
        data: the config's section.
        tokenizer: the config's section; a tokenizer is trained on the training split alone.
        seed: of the order of the training sequences.

    Raises:
        DataError: a source or the tokenizer cannot be loaded, or the corpus is too short.
    """
    loaded = [load_documents(source) for source in data.sources]
    split = split_documents(_joined(loaded), data.validation)
    prepared = prepare_tokenizer(tokenizer, iterate_texts(split.train))
    stream = tokenize(split.train, prepared, num_proc=data.num_proc, cache_dir=data.cache_dir)
    train = PackedSequences(stream, data.sequence_length, seed)
    validation = list(iterate_texts(split.validation))
    record = {
        "sources": [_describe(*pair) for pair in zip(data.sources, loaded, strict=True)],
        "train": {
            "documents": len(split.train),
            "tokens": len(stream),
            "sequences_per_epoch": len(train),
        },
        "validation": {
            "documents": len(validation),
            "characters": sum(map(len, validation)),
            "sha256": corpus_fingerprint(validation),
        },
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocabulary": vocabulary_size(prepared),
            "sha256": tokenizer_fingerprint(prepared),
        },
    }
    return Corpus(train, validation, prepared, record)


def _joined(loaded: list[Dataset]) -> Dataset:
    if len(loaded) == 1:
        return loaded[0]
    if any(documents.features != loaded[0].features for documents in loaded):
        features = Features({"text": Value("large_string")})
        loaded = [documents.cast(features) for documents in loaded]
    return concatenate_datasets(loaded)


def _describe(source: Source, documents: Dataset) -> dict[str, Any]:
    described: dict[str, Any] = {
        **source.model_dump(mode="json", exclude_none=True),
        "documents": len(documents),
        "characters": sum(map(len, iterate_texts(documents))),
        "sha256": corpus_fingerprint(iterate_texts(documents)),
    }
    if source.source == "python-docs":
        described["python"] = platform.python_version()
    return described

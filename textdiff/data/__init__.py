"""Corpora, tokenizers and training sequences: from a source of text to rows of token ids."""

from textdiff.data.backend import tokenizer_fingerprint
from textdiff.data.continuation import continuation, opening
from textdiff.data.corpus import Corpus, prepare_corpus
from textdiff.data.documents import Documents
from textdiff.data.encode import encode_documents
from textdiff.data.files import read_texts
from textdiff.data.loader import PackedSequences, Rows
from textdiff.data.losses import Encoded, Loss, encode_checked
from textdiff.data.mixture import Mixture
from textdiff.data.packing import tokenize
from textdiff.data.python_docs import corpus_fingerprint, python_docs
from textdiff.data.sources import load_documents
from textdiff.data.split import Split, split_documents
from textdiff.data.stream import TokenStream
from textdiff.data.tokenizer import (
    ensure_special_tokens,
    excluded_ids,
    load_tokenizer,
    prepare_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

__all__ = [
    "Corpus",
    "Documents",
    "Encoded",
    "Loss",
    "Mixture",
    "PackedSequences",
    "Rows",
    "Split",
    "TokenStream",
    "continuation",
    "corpus_fingerprint",
    "encode_checked",
    "encode_documents",
    "ensure_special_tokens",
    "excluded_ids",
    "load_documents",
    "load_tokenizer",
    "opening",
    "prepare_corpus",
    "prepare_tokenizer",
    "python_docs",
    "read_texts",
    "split_documents",
    "tokenize",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "vocabulary_size",
]

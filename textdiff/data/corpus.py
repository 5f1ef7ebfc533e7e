"""From the config's `data` and `tokenizer` sections to what training needs.

Preparing reads the sources (which documents are held out?), trains or loads the tokenizer and
tokenises. The result is kept beside the tokens, so that the next run reads no text at all. Its name
is made of the sources' signatures and the settings.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.answer_rows import AnswerSequences
from textdiff.data.answers import conversation_markup
from textdiff.data.backend import tokenizer_fingerprint
from textdiff.data.conversation_rows import CONVERSATIONS
from textdiff.data.document_stream import (
    Documents,
    Omissions,
    corpus_fingerprint,
    iterate_texts,
    join,
)
from textdiff.data.packing import Verify, cache_root, locked, tokenize, writing_cache
from textdiff.data.preparation import Preparation, read_preparation, write_preparation
from textdiff.data.sections import (
    TRAINING_PIECE_CHARACTERS,
    ByteTokenizer,
    DataConfig,
    Source,
    TokenizerKind,
)
from textdiff.data.sequences import Mixture, PackedSequences
from textdiff.data.sources import kind_of_source, load_documents
from textdiff.data.split import join_scans, scan_documents, split_each
from textdiff.data.spool import spooled
from textdiff.data.statistics import refuse_excluded, source_facts
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import vocabulary_size
from textdiff.errors import DataError

_FORMAT = 2  # part of a preparation's name: raise it when what is kept of unchanged inputs changes

Progress = Callable[[str, int, int | None], None]

# Text that a process may prepare while others wait for it, half an hour at most. GPT-2's tokenizer
# reads 3 to 4 MB a second on one core, so that this takes ten minutes; reading it, and training a
# tokenizer on it, may take as long again.
MOST_WHILE_OTHERS_WAIT = 2_000_000_000


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        train: the training sequences.
        validation: the held-out documents, as text.
        tokenizer: trained on the training split, or loaded.
        record: what the run writes down about its data; plain JSON values.
        streams: the tokens: of every source where they are mixed by weight, else of all.
        cached: whether all of it was in the cache.
        omissions: what each source leaves out.
    """

    train: PackedSequences | Mixture | AnswerSequences
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]
    streams: tuple[TokenStream, ...]
    cached: bool
    omissions: tuple[Omissions, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Sentences about what the sources, and rows of conversations, leave out."""
        sources = self.record["sources"]
        pairs = zip(sources, self.omissions, strict=True)
        lines = [line for source, left in pairs for line in left.sentences(source["source"])]
        return lines + (self.train.notes if isinstance(self.train, AnswerSequences) else [])


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerKind,
    seed: int,
    *,
    block_sizes: Sequence[int | None] = (None,),
    verify: Verify = "changed",
    others_wait: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Corpus:
    """Load the sources, hold out validation text, make the tokenizer and tokenise.

    Args:
        data: the config's section.
        tokenizer: the config's section; a tokenizer is trained on the training split alone.
        seed: of the order of the training sequences.
        block_sizes: those that are trained; rows of conversations depend on them.
        verify: files of tokens in the cache that are compared with their hashes.
        others_wait: whether other processes wait: a large corpus then has to be ready.
        progress: called with the stage, what it has done and, where known, its whole.

    Raises:
        DataError: a source or tokenizer cannot be loaded, or the corpus is too short or too large.
    """
    corpora = [load_documents(source, data.on_bad_rows == "skip") for source in _sources(data)]
    entry = cache_root(data.cache_dir) / f"prepared-{_key(data, tokenizer, corpora)}"
    prepared = read_preparation(entry, verify)
    cached = prepared is not None
    if prepared is None:
        if others_wait:
            _refuse_large(corpora)
        prepared = _prepare(entry, data, tokenizer, corpora, verify, progress)
    train = _sequences(data, prepared, seed, block_sizes)
    omissions = tuple(
        Omissions(unread=documents.omissions.unread, **kept).joined()
        for kept, documents in zip(prepared.omissions, corpora, strict=True)
    )
    record, streams = _record(data, tokenizer, prepared, train), tuple(prepared.streams)
    texts = prepared.validation
    return Corpus(train, texts, prepared.tokenizer, record, streams, cached, omissions)


def _refuse_large(corpora: Sequence[Documents]) -> None:
    """Refuse to prepare a large corpus before anything of it is read.

    Raises:
        DataError: with the command that prepares it.
    """
    size = sum(documents.known_bytes for documents in corpora)
    if size > MOST_WHILE_OTHERS_WAIT:
        raise DataError(
            f"the corpus of about {size / 1e9:,.1f} GB is not prepared, and the other processes "
            "would give up before the first one has tokenised it; run `textdiff data prepare "
            "CONFIG` first, with the same config and flags",
            code="unprepared_corpus",
        )


def _sources(data: DataConfig) -> list[Source]:
    """Return the sources as they are read: for text, or for conversations."""
    if data.conversations is None:
        return list(data.sources)
    column = {"text_column": CONVERSATIONS}
    return [source.model_copy(update=column) for source in data.sources]


def _key(data: DataConfig, section: TokenizerKind, corpora: Sequence[Documents]) -> str:
    settings: list[Any] = [
        _FORMAT,
        [documents.signature for documents in corpora],
        data.weights is not None,
        data.validation,
        section.model_dump(mode="json"),
    ]
    if data.conversations is not None:
        settings.append({"template": data.conversations.template})
    fingerprint = section.fingerprint()
    if fingerprint is not None:
        settings.append(fingerprint)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


# --- preparing -----------------------------------------------------------------------------------


def _prepare(
    entry: Path,
    data: DataConfig,
    section: TokenizerKind,
    corpora: Sequence[Documents],
    verify: Verify,
    progress: Progress,
) -> Preparation:
    with writing_cache(entry.parent), locked(entry):
        if (prepared := read_preparation(entry, verify)) is None:  # else another was faster
            with spooled(corpora, data.sources, entry.parent) as kept:
                prepared = _prepare_kept(data, section, kept, progress)
            write_preparation(entry, prepared)
    return prepared


def _prepare_kept(
    data: DataConfig, section: TokenizerKind, corpora: Sequence[Documents], progress: Progress
) -> Preparation:
    names = [source.source for source in data.sources]
    reading = _stage("reading", join(corpora).size, progress)
    scans = [scan_documents(documents, reading) for documents in corpora]
    omissions = [documents.omissions.record() for documents in corpora]
    if data.weights is None:
        whole = data.conversations is not None
        splits = split_each([join(corpora)], [join_scans(scans)], data.validation, whole=whole)
    else:
        splits = split_each(corpora, scans, data.validation, names)
    validation = [text for split in splits for text in iterate_texts(split.validation)]
    characters = sum(int(scan.characters.sum()) for scan in scans) - sum(map(len, validation))
    train = join([split.train for split in splits])
    training = _stage("training the tokenizer", characters, progress)
    tokenizer = section.prepare(_training_texts(data, train, training))
    if data.conversations is not None and data.conversations.template:
        tokenizer.chat_template = data.conversations.template
    encoding = _stage("tokenising", characters, progress)
    options: dict[str, Any] = {"num_proc": data.num_proc, "cache_dir": data.cache_dir}
    options |= {"progress": encoding, "conversations": data.conversations is not None}
    streams = [tokenize(split.train, tokenizer, **options) for split in splits]
    trained = np.concatenate([split.train_rows for split in splits])
    held_out = np.concatenate([split.validation_rows for split in splits])
    if data.conversations is None:  # a template writes tokens that no answer may have
        refuse_excluded(names, scans, trained, streams, tokenizer)
    facts = source_facts(scans, trained, held_out, streams, validation)
    return Preparation(facts, streams, validation, tokenizer, omissions)


def _stage(name: str, total: int | None, progress: Progress) -> Callable[[int], None]:
    """Return a function that adds up what one stage has done and passes it on."""
    done = 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        progress(name, done, total)

    return add


def _training_texts(
    data: DataConfig, documents: Documents, progress: Callable[[int], None]
) -> Iterator[str]:
    """Yield text for a tokenizer's training; of conversations, what a template adds included."""
    if data.conversations is None:
        for text, _ in documents.pieces(TRAINING_PIECE_CHARACTERS):
            progress(len(text))
            yield text
        return
    writer = ByteTokenizer().prepare(())  # any tokenizer: the template alone matters here
    writer.chat_template = data.conversations.template
    for text in iterate_texts(documents):
        progress(len(text))
        yield conversation_markup(text, writer)


def _sequences(
    data: DataConfig, prepared: Preparation, seed: int, block_sizes: Sequence[int | None]
) -> PackedSequences | Mixture | AnswerSequences:
    streams = prepared.streams
    if data.conversations is not None:
        special = prepared.tokenizer.eos_token_id, prepared.tokenizer.pad_token_id
        return AnswerSequences(
            streams[0], data.sequence_length, seed, data.conversations, block_sizes, special
        )
    if data.weights is None:
        return PackedSequences(streams[0], data.sequence_length, seed)
    sources = []
    for number, (source, stream) in enumerate(zip(data.sources, streams, strict=True)):
        try:
            sources.append(PackedSequences(stream, data.sequence_length, seed, number))
        except DataError as error:
            raise DataError(f"{source.source}: {error}", code=error.code) from None
    return Mixture(sources, data.weights)


def _record(
    data: DataConfig,
    section: TokenizerKind,
    prepared: Preparation,
    train: PackedSequences | Mixture | AnswerSequences,
) -> dict[str, Any]:
    sources = [_describe(*pair) for pair in zip(data.sources, prepared.sources, strict=True)]
    if isinstance(train, Mixture):
        for described, sequences, share in zip(sources, train.sources, train.shares, strict=True):
            described |= {"share": share, "sequences_per_epoch": len(sequences)}
    return {
        "sources": sources,
        "train": {
            "documents": sum(facts["train_documents"] for facts in prepared.sources),
            "tokens": sum(len(stream) for stream in prepared.streams),
            "sequences_per_epoch": len(train),
        },
        "validation": {
            "documents": len(prepared.validation),
            "characters": sum(map(len, prepared.validation)),
            "sha256": corpus_fingerprint(prepared.validation),
        },
        "tokenizer": {
            "kind": section.kind,
            "vocabulary": vocabulary_size(prepared.tokenizer),
            "sha256": tokenizer_fingerprint(prepared.tokenizer),
        },
    }


def _describe(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    plain = source.model_dump(mode="json", exclude_none=True)
    return {**plain, **facts, **kind_of_source(source.source).facts()}

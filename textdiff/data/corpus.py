"""From the config's `data` and `tokenizer` sections to what training needs.

Preparing reads the sources (which documents are held out?), trains or loads the tokenizer and
tokenises. The result is kept beside the tokens, so that the next run reads no text at all. Its name
is made of the sources' signatures and the settings.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import tokenizer_fingerprint
from textdiff.data.document_stream import (
    Documents,
    Omissions,
    corpus_fingerprint,
    iterate_texts,
    join,
)
from textdiff.data.packing import cache_root, find_stream, locked, tokenize, writing_cache
from textdiff.data.sections import TRAINING_PIECE_CHARACTERS, DataConfig, Source, TokenizerKind
from textdiff.data.sequences import Mixture, PackedSequences
from textdiff.data.sources import kind_of_source, load_documents
from textdiff.data.split import join_scans, scan_documents, split_each
from textdiff.data.statistics import refuse_excluded, source_facts
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import pretrained_tokenizer, vocabulary_size
from textdiff.errors import DataError

_FORMAT = 2  # part of a preparation's name: raise it when what is kept of unchanged inputs changes

Progress = Callable[[str, int, int | None], None]


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

    train: PackedSequences | Mixture
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]
    streams: tuple[TokenStream, ...]
    cached: bool
    omissions: tuple[Omissions, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Sentences about what the sources leave out."""
        sources = self.record["sources"]
        pairs = zip(sources, self.omissions, strict=True)
        return [line for source, left in pairs for line in left.sentences(source["source"])]


@dataclass(frozen=True)
class _Prepared:
    """Content of a preparation on disk.

    Attributes:
        sources: facts about the text of every source.
        streams: the tokens, see `Corpus`.
        validation: the held-out documents.
        tokenizer: trained or loaded.
        omissions: what reading each source left out, as plain data.
    """

    sources: list[dict[str, Any]]
    streams: list[TokenStream]
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    omissions: list[dict[str, Any]]


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerKind,
    seed: int,
    *,
    verify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Corpus:
    """Load the sources, hold out validation text, make the tokenizer and tokenise.

    Args:
        data: the config's section.
        tokenizer: the config's section; a tokenizer is trained on the training split alone.
        seed: of the order of the training sequences.
        verify: compare tokens that are in the cache with their hashes.
        progress: called with the stage, what it has done and, where known, its whole.

    Raises:
        DataError: a source or the tokenizer cannot be loaded, or the corpus is too short.
    """
    corpora = [load_documents(source, data.on_bad_rows == "skip") for source in data.sources]
    entry = cache_root(data.cache_dir) / f"prepared-{_key(data, tokenizer, corpora)}"
    prepared = _read(entry, verify)
    cached = prepared is not None
    if prepared is None:
        with writing_cache(entry.parent), locked(entry):
            prepared = _read(entry, verify) or _prepare(data, tokenizer, corpora, progress)
            _write(entry, prepared)
    train = _sequences(data, prepared.streams, seed)
    omissions = tuple(
        Omissions(unread=documents.omissions.unread, **kept).joined()
        for kept, documents in zip(prepared.omissions, corpora, strict=True)
    )
    record, streams = _record(data, tokenizer, prepared, train), tuple(prepared.streams)
    return Corpus(
        train, prepared.validation, prepared.tokenizer, record, streams, cached, omissions
    )


def _key(data: DataConfig, section: TokenizerKind, corpora: Sequence[Documents]) -> str:
    settings: list[Any] = [
        _FORMAT,
        [documents.signature for documents in corpora],
        data.weights is not None,
        data.validation,
        section.model_dump(mode="json"),
    ]
    fingerprint = section.fingerprint()
    if fingerprint is not None:
        settings.append(fingerprint)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


# --- preparing -----------------------------------------------------------------------------------


def _prepare(
    data: DataConfig, section: TokenizerKind, corpora: Sequence[Documents], progress: Progress
) -> _Prepared:
    names = [source.source for source in data.sources]
    reading = _stage("reading", join(corpora).size, progress)
    scans = [scan_documents(documents, reading) for documents in corpora]
    omissions = [documents.omissions.record() for documents in corpora]
    if data.weights is None:
        splits = split_each([join(corpora)], [join_scans(scans)], data.validation)
    else:
        splits = split_each(corpora, scans, data.validation, names)
    validation = [text for split in splits for text in iterate_texts(split.validation)]
    characters = sum(int(scan.characters.sum()) for scan in scans) - sum(map(len, validation))
    train = join([split.train for split in splits])
    tokenizer = section.prepare(
        _pieces(train, _stage("training the tokenizer", characters, progress))
    )
    encoding = _stage("tokenising", characters, progress)
    streams = [
        tokenize(
            split.train,
            tokenizer,
            num_proc=data.num_proc,
            cache_dir=data.cache_dir,
            progress=encoding,
        )
        for split in splits
    ]
    trained = np.concatenate([split.train_rows for split in splits])
    held_out = np.concatenate([split.validation_rows for split in splits])
    refuse_excluded(names, scans, trained, streams, tokenizer)
    facts = source_facts(scans, trained, held_out, streams, validation)
    return _Prepared(facts, streams, validation, tokenizer, omissions)


def _stage(name: str, total: int | None, progress: Progress) -> Callable[[int], None]:
    """Return a function that adds up what one stage has done and passes it on."""
    done = 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        progress(name, done, total)

    return add


def _pieces(documents: Documents, progress: Callable[[int], None]) -> Iterator[str]:
    """Yield pieces for a tokenizer's training."""
    for text, _ in documents.pieces(TRAINING_PIECE_CHARACTERS):
        progress(len(text))
        yield text


def _sequences(
    data: DataConfig, streams: Sequence[TokenStream], seed: int
) -> PackedSequences | Mixture:
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
    data: DataConfig, section: TokenizerKind, prepared: _Prepared, train: PackedSequences | Mixture
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


# --- the preparation on disk ---------------------------------------------------------------------


def _write(entry: Path, prepared: _Prepared) -> None:
    """Write a preparation beside its place and rename it."""
    scratch = entry.with_name(f".partial-{entry.name}-{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        prepared.tokenizer.save_pretrained(scratch / "tokenizer")
        lines = [json.dumps(text) + "\n" for text in prepared.validation]
        (scratch / "validation.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {
            "sources": prepared.sources,
            "omissions": prepared.omissions,
            "streams": [stream.folder.name for stream in prepared.streams],
            "validation": corpus_fingerprint(prepared.validation),
            "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        }
        (scratch / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        if entry.exists():
            shutil.rmtree(entry)
        os.rename(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read(entry: Path, verify: bool) -> _Prepared | None:
    """Return what an earlier preparation kept; None where any of it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        lines = (entry / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        validation = [json.loads(line) for line in lines]
        tokenizer = pretrained_tokenizer(str(entry / "tokenizer"))
        hashes = (corpus_fingerprint(validation), tokenizer_fingerprint(tokenizer))
        if hashes != (facts["validation"], facts["tokenizer"]):
            return None
        streams = [find_stream(entry.parent / name, verify) for name in facts["streams"]]
        whole = [stream for stream in streams if stream is not None]
        if len(whole) == len(streams):
            omissions = facts.get("omissions", [{} for _ in facts["sources"]])
            return _Prepared(facts["sources"], whole, validation, tokenizer, omissions)
    return None

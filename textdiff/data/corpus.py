"""From the config's `data` and `tokenizer` sections to what training needs.

Preparing reads the sources (which documents are held out?), trains or loads the tokenizer and
tokenises. What comes of it is kept beside the tokens under a name made of the sources' signatures
and the settings, so that the next run reads no text at all.
"""

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import encoding_fingerprint, tokenizer_fingerprint
from textdiff.data.document_stream import Documents, Omissions, iterate_texts, join
from textdiff.data.packing import cache_root, find_stream, locked, tokenize
from textdiff.data.python_docs import corpus_fingerprint
from textdiff.data.sequences import Mixture, PackedSequences
from textdiff.data.settings import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    PretrainedTokenizer,
    Source,
)
from textdiff.data.sources import load_documents
from textdiff.data.split import Scan, Split, join_scans, scan_documents, split_each
from textdiff.data.token_stream import TokenStream
from textdiff.data.tokenizer import (
    TRAINING_PIECE_CHARACTERS,
    load_tokenizer,
    prepare_tokenizer,
    vocabulary_size,
)
from textdiff.data.training_tokens import refuse_excluded
from textdiff.errors import DataError

_FORMAT = 2  # part of a preparation's name: raise it when what is kept of unchanged inputs changes

TokenizerSection = BpeTokenizer | CharTokenizer | ByteTokenizer | PretrainedTokenizer
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
        found: whether all of it lay in the cache.
        omissions: what each source leaves out.
    """

    train: PackedSequences | Mixture
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]
    streams: tuple[TokenStream, ...]
    found: bool
    omissions: tuple[Omissions, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Sentences about what the sources leave out."""
        sources = self.record["sources"]
        pairs = zip(sources, self.omissions, strict=True)
        return [line for source, left in pairs for line in left.sentences(source["source"])]


@dataclass(frozen=True)
class _Prepared:
    """What a preparation keeps.

    Attributes:
        sources: of every source documents, characters, bytes and sha256, and what of them trains.
        streams: the tokens, see `Corpus`.
        validation: the held-out documents.
        tokenizer: trained or loaded.
        omissions: what reading each source left out.
    """

    sources: list[dict[str, Any]]
    streams: list[TokenStream]
    validation: list[str]
    tokenizer: PreTrainedTokenizerFast
    omissions: list[Omissions]


def prepare_corpus(
    data: DataConfig,
    tokenizer: TokenizerSection,
    seed: int,
    *,
    verify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Corpus:
    """Loads the sources, holds out validation text, makes the tokenizer and tokenises.

    Args:
        data: the config's section.
        tokenizer: the config's section; a tokenizer is trained on the training split alone.
        seed: of the order of the training sequences.
        verify: compare tokens that lie in the cache with their hashes.
        progress: told what is being done, how far it is and, where known, how far it goes.

    Raises:
        DataError: a source or the tokenizer cannot be loaded, or the corpus is too short.
    """
    skip = data.on_bad_rows == "skip"
    corpora = [load_documents(source, skip) for source in data.sources]
    entry = cache_root(data.cache_dir) / f"prepared-{_key(data, tokenizer, corpora)}"
    prepared = _find(entry, verify)
    found = prepared is not None
    if prepared is None:
        try:
            with locked(entry):
                prepared = _find(entry, verify) or _prepare(data, tokenizer, corpora, progress)
                _keep(entry, prepared)
        except OSError as error:
            raise DataError(
                f"cannot write the token cache {entry.parent} ({error.strerror or error}); make "
                "room or choose another folder with data.cache_dir"
            ) from None
    train = _sequences(data, prepared.streams, seed)
    record = _record(data, tokenizer, prepared, train)
    omissions = tuple(
        omitted.with_files(documents.left_out)
        for omitted, documents in zip(prepared.omissions, corpora, strict=True)
    )
    streams = tuple(prepared.streams)
    return Corpus(train, prepared.validation, prepared.tokenizer, record, streams, found, omissions)


def _weights(data: DataConfig) -> list[float] | None:
    weights = [source.weight for source in data.sources if source.weight is not None]
    return weights or None


def _key(data: DataConfig, section: TokenizerSection, corpora: Sequence[Documents]) -> str:
    settings: list[Any] = [
        _FORMAT,
        [documents.signature for documents in corpora],
        _weights(data) is not None,
        data.validation,
        section.model_dump(mode="json"),
    ]
    if isinstance(section, PretrainedTokenizer):
        settings.append(encoding_fingerprint(load_tokenizer(section.path)))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


# --- preparing -----------------------------------------------------------------------------------


def _prepare(
    data: DataConfig,
    section: TokenizerSection,
    corpora: Sequence[Documents],
    progress: Progress,
) -> _Prepared:
    size = join(corpora).size
    reading = _Stage("reading", size, progress)
    scans = [scan_documents(documents, reading) for documents in corpora]
    omissions = [Omissions.of(documents.tally) for documents in corpora]
    splits, owners = _splits(data, corpora, scans)
    train = join([split.train for split in splits])
    characters = sum(int(scan.characters.sum()) for scan in scans)
    validation = [text for split in splits for text in iterate_texts(split.validation)]
    characters -= sum(map(len, validation))
    learning = _Stage("training the tokenizer", characters, progress)
    tokenizer = prepare_tokenizer(section, learning.texts(train))
    encoding = _Stage("tokenising", characters, progress)
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
    for split, numbers, stream in zip(splits, owners, streams, strict=True):
        refuse_excluded(stream, tokenizer, partial(_document, data, scans, split, numbers))
    facts = _facts(scans, splits, owners, streams, validation)
    return _Prepared(facts, streams, validation, tokenizer, omissions)


def _document(
    data: DataConfig, scans: Sequence[Scan], split: Split, sources: Sequence[int], row: int
) -> str:
    """Return the name of a split's training document: its number in its source."""
    number = int(np.flatnonzero(split.train_rows)[row])
    for source in sources:
        count = len(scans[source].digests)
        if number < count:
            return f"document {number + 1} of {data.sources[source].source}"
        number -= count
    raise IndexError(row)


class _Stage:
    """Adds up what one stage has done and passes it on."""

    def __init__(self, name: str, total: int | None, progress: Progress) -> None:
        self.name, self.total, self.progress, self.done = name, total, progress, 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress(self.name, self.done, self.total)

    def texts(self, documents: Documents) -> Any:
        """Yields pieces for a tokenizer's training."""
        for text, _ in documents.pieces(TRAINING_PIECE_CHARACTERS):
            self(len(text))
            yield text


def _splits(
    data: DataConfig, corpora: Sequence[Documents], scans: Sequence[Scan]
) -> tuple[list[Split], list[list[int]]]:
    """The splits, one per stream of tokens, and which sources each of them holds."""
    if _weights(data) is None:
        joined = split_each([join(corpora)], [join_scans(scans)], data.validation)
        return joined, [list(range(len(corpora)))]
    names = [source.source for source in data.sources]
    splits = split_each(corpora, scans, data.validation, names)
    return splits, [[number] for number in range(len(corpora))]


def _facts(
    scans: Sequence[Scan],
    splits: Sequence[Split],
    owners: Sequence[Sequence[int]],
    streams: Sequence[TokenStream],
    validation: Sequence[str],
) -> list[dict[str, Any]]:
    facts = []
    held_out = iter(validation)
    for split, sources, stream in zip(splits, owners, streams, strict=True):
        edges = np.cumsum([len(scans[number].digests) for number in sources])[:-1]
        train_rows = np.split(split.train_rows, edges)
        validation_rows = np.split(split.validation_rows, edges)
        lengths = iter(stream.document_lengths)
        for number, training, rest in zip(sources, train_rows, validation_rows, strict=True):
            scan = scans[number]
            size = int(scan.utf8.sum())
            kept = int(training.sum())
            taken = sum(len(next(held_out).encode()) for _ in range(int(rest.sum())))
            facts.append(
                {
                    "documents": len(scan.digests),
                    "characters": int(scan.characters.sum()),
                    "bytes": size,
                    "sha256": scan.fingerprint,
                    "train_documents": kept,
                    "train_bytes": size - taken,
                    "train_tokens": int(sum(next(lengths) for _ in range(kept))),
                }
            )
    return facts


def _sequences(
    data: DataConfig, streams: Sequence[TokenStream], seed: int
) -> PackedSequences | Mixture:
    weights = _weights(data)
    if weights is None:
        return PackedSequences(streams[0], data.sequence_length, seed)
    parts = []
    for number, (source, stream) in enumerate(zip(data.sources, streams, strict=True)):
        try:
            parts.append(PackedSequences(stream, data.sequence_length, seed, number))
        except DataError as error:
            raise DataError(f"{source.source}: {error}") from None
    return Mixture(parts, weights)


def _record(
    data: DataConfig,
    section: TokenizerSection,
    prepared: _Prepared,
    train: PackedSequences | Mixture,
) -> dict[str, Any]:
    sources = [_describe(*pair) for pair in zip(data.sources, prepared.sources, strict=True)]
    if isinstance(train, Mixture):
        for described, part, share in zip(sources, train.parts, train.shares, strict=True):
            described |= {"share": share, "sequences_per_epoch": len(part)}
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
    described = {**source.model_dump(mode="json", exclude_none=True), **facts}
    if source.source == "python-docs":
        described["python"] = platform.python_version()
    return described


# --- keeping and finding -------------------------------------------------------------------------


def _keep(entry: Path, prepared: _Prepared) -> None:
    """Writes a preparation beside its place and renames it."""
    scratch = entry.with_name(f".partial-{entry.name}-{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        prepared.tokenizer.save_pretrained(scratch / "tokenizer")
        lines = [json.dumps(text) + "\n" for text in prepared.validation]
        (scratch / "validation.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {
            "sources": prepared.sources,
            "omissions": [asdict(omitted) for omitted in prepared.omissions],
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


def _find(entry: Path, verify: bool) -> _Prepared | None:
    """What an earlier preparation kept; None where something of it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, DataError):
        facts = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        validation = [
            json.loads(line)
            for line in (entry / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        tokenizer = load_tokenizer(str(entry / "tokenizer"))
        hashes = (corpus_fingerprint(validation), tokenizer_fingerprint(tokenizer))
        if hashes != (facts["validation"], facts["tokenizer"]):
            return None
        streams = [find_stream(entry.parent / name, verify) for name in facts["streams"]]
        whole = [stream for stream in streams if stream is not None]
        if len(whole) == len(streams):
            kept = facts.get("omissions", [{} for _ in facts["sources"]])
            omissions = [Omissions(**omitted) for omitted in kept]
            return _Prepared(facts["sources"], whole, validation, tokenizer, omissions)
    return None

"""Tokenises a corpus once, into Arrow files that are memory-mapped ever after.

A cache entry is a folder named by a hash of the documents and of the tokenizer. It grows in a
folder `.partial-<name>` beside its final place, a shard at a time, and is renamed when it is whole:
a half-written entry is never read. A process that is killed leaves whole shards that the next one
keeps. A shard that no longer has the hash it was written with is encoded again. A lock lets one
process build while the others wait.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import filterfalse, groupby
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from textdiff.data.answers import encode_turns
from textdiff.data.backend import encoding_fingerprint, text_backends
from textdiff.data.document_stream import Documents, TextBlock, iterate_texts
from textdiff.data.encode import EncodingBatch, encode_tasks, tasks_of
from textdiff.data.shards import Shard, describe_shards, whole_shards
from textdiff.data.split import ChangedSource
from textdiff.data.token_stream import Piece, TokenStream, note_states
from textdiff.data.tokenizer import vocabulary_size
from textdiff.errors import DataError

_FORMAT = 2  # part of the key: raise it when the tokens of unchanged inputs change
_ABANDONED_SECONDS = 7 * 24 * 3600.0

Verify = Literal["all", "changed", "nothing"]
"""Files of an entry that are compared with their hashes: all; those whose size or time is not as it
was when they were last right; or none."""

_log = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of all token caches; None is the cache of `datasets`."""
    if cache_dir is None:
        import datasets

        cache_dir = str(datasets.config.HF_DATASETS_CACHE)
    return Path(cache_dir).expanduser() / "textdiff"


def tokenize(
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_proc: int,
    cache_dir: str | None,
    verify: Verify = "changed",
    progress: Callable[[int], None] = lambda characters: None,
    conversations: bool = False,
) -> TokenStream:
    """Turn documents into one memory-mapped stream of tokens, or find it in the cache.

    Every document, or answer, is followed by the end-of-text token if the tokenizer has one.

    Args:
        documents: the corpus; its signature is part of the entry's name.
        tokenizer: any fast tokenizer.
        num_proc: processes that encode; the stream is the same for every number.
        cache_dir: where `textdiff/<key>/` is kept; None is the cache of `datasets`.
        verify: files of an entry that exists that are compared with their hashes.
        progress: called with the characters encoded since its last call.
        conversations: whether documents are conversations; their turns are two pieces each.

    Raises:
        DataError: the cache cannot be written, or the corpus cannot be read.
    """
    settings = f"{_FORMAT} {documents.signature} {encoding_fingerprint(tokenizer)}"
    settings += f" turns {tokenizer.chat_template}" if conversations else ""
    folder = cache_root(cache_dir) / hashlib.sha256(settings.encode()).hexdigest()
    if (stream := find_stream(folder, verify)) is not None:
        return stream
    with writing_cache(folder):
        _remove_abandoned(folder.parent)
        with locked(folder):
            if TokenStream.open(folder) is None:  # else another process was faster
                _build(folder, documents, tokenizer, num_proc, progress, conversations)
    stream = TokenStream.open(folder)
    if stream is None:
        raise DataError(f"token cache {folder} cannot be read back; set data.cache_dir")
    return stream


def find_stream(folder: Path, verify: Verify) -> TokenStream | None:
    """Open a cache entry; None if it is missing or damaged.

    A damaged entry loses its place: what is whole in it is kept for the building that follows.
    """
    stream = TokenStream.open(folder)
    if stream is not None and (verify == "nothing" or not stream.damaged(verify == "changed")):
        return stream
    if folder.exists():
        _log.warning("the token cache %s is damaged and will be repaired", folder)
        with suppress(OSError), locked(folder):
            shutil.rmtree(_partial(folder), ignore_errors=True)
            os.rename(folder, _partial(folder))
    return None


def _partial(folder: Path) -> Path:
    return folder.with_name(f".partial-{folder.name}")


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn errors of the file system, while entered, into one that names the cache.

    Raises:
        DataError: the cache cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {folder} ({error.strerror or error}); make room or "
            "choose another folder with data.cache_dir",
            code="cache",
        ) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache entry; the system releases it when a process is killed."""
    # Beside the cache, not in it: a lock's file may not be deleted while others wait for it.
    place = folder.parent.with_name(f".{folder.parent.name}-locks")
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is preparing %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_abandoned(parent: Path) -> None:
    """Delete what unfinished preparations left more than a week ago."""
    for folder in parent.glob(".partial-*"):
        with suppress(OSError):  # another process may be cleaning up too
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                _log.warning("removing %s, left by an unfinished preparation", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _encoded(
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    num_proc: int,
    conversations: bool,
    is_done: Callable[[EncodingBatch], bool],
) -> Iterator[tuple[EncodingBatch, list[Piece]]]:
    """Yield tasks that are not done, with the tokens of their pieces."""
    if conversations:
        whole = (TextBlock(text, True) for text in iterate_texts(documents))
        return encode_turns(filterfalse(is_done, tasks_of(whole)), tokenizer)
    tasks = filterfalse(is_done, tasks_of(documents.pieces()))
    return encode_tasks(tasks, text_backends(tokenizer), num_proc)


def _build(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    num_proc: int,
    progress: Callable[[int], None],
    conversations: bool,
) -> None:
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    finished = whole_shards(partial)
    eos = None if conversations else tokenizer.eos_token_id  # their answers have theirs
    vocabulary = vocabulary_size(tokenizer)

    def is_done(task: EncodingBatch) -> bool:
        if done := task.shard in finished:
            progress(task.characters)
        return done

    encoded = _encoded(documents, tokenizer, num_proc, conversations, is_done)
    try:
        for number, tasks in groupby(encoded, key=lambda pair: pair[0].shard):
            with Shard(partial, number, eos, vocabulary) as shard:
                for task, pieces in tasks:
                    shard.write(pieces)
                    progress(task.characters)
            finished[number] = shard.description()
            describe_shards(partial, finished, eos)
    except ChangedSource:
        finished.clear()  # a part of the changed text may be in what is finished
        raise
    finally:
        if finished:
            describe_shards(partial, finished, eos)
        else:
            shutil.rmtree(partial, ignore_errors=True)
    note_states(partial, [finished[number] for number in sorted(finished)])
    os.rename(partial, folder)

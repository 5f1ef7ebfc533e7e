"""Tokenises a corpus once, into Arrow files that are memory-mapped ever after.

A cache entry is a folder named by a hash of the documents and of the tokenizer. It grows in a
folder `.partial-<name>` beside its final place, a shard at a time, and is renamed when it is whole:
a half-written entry is never read. Whoever is killed leaves whole shards that the next one keeps,
and a shard that no longer has the hash it was written with is encoded again. A lock lets one
process build while the others wait.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import TextBackends, encoding_fingerprint, text_backends
from textdiff.data.documents import Block, Documents
from textdiff.data.encode import Encoder
from textdiff.data.split import ChangedSource
from textdiff.data.stream import DESCRIPTION_NAME, TokenStream
from textdiff.data.workers import workers
from textdiff.errors import DataError
from textdiff.storage import file_hash, whole_file

_FORMAT = 2  # part of the key: raise it when the tokens of unchanged inputs change
_TASK_CHARACTERS = 2_000_000
_SHARD_CHARACTERS = 32_000_000  # what a kill loses at most
_ABANDONED_SECONDS = 7 * 24 * 3600.0
_SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.field("item", pa.int32(), nullable=False))),
        pa.field("last", pa.bool_(), nullable=False),  # whether the document ends with this piece
    ]
)

Encoded = list[tuple[NDArray[np.int32], bool]]

_log = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all token caches; None is the cache of `datasets`."""
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
    verify: bool = True,
    progress: Callable[[int], None] = lambda characters: None,
) -> TokenStream:
    """Turns documents into one stream of tokens, or finds that stream in the cache.

    Every document is followed by the end-of-text token if the tokenizer has one.

    Args:
        documents: the corpus; its signature is part of the entry's name.
        tokenizer: any fast tokenizer.
        num_proc: processes that encode; the stream is the same for every number.
        cache_dir: where `textdiff/<key>/` is kept; None is the cache of `datasets`.
        verify: compare an entry that is there with its hashes, file by file.
        progress: told the characters encoded (or found encoded) since it was told before.

    Returns:
        The memory-mapped stream.

    Raises:
        DataError: the cache folder cannot be written, or the corpus cannot be read.
    """
    folder = cache_root(cache_dir) / _key(documents, tokenizer)
    stream = find_stream(folder, verify)
    if stream is not None:
        return stream
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        with locked(folder):
            if TokenStream.open(folder) is None:  # else another process was faster
                _build(folder, documents, tokenizer, num_proc, progress)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {folder} ({error.strerror or error}); make room or "
            "choose another folder with data.cache_dir"
        ) from None
    stream = TokenStream.open(folder)
    if stream is None:
        raise DataError(f"the token cache {folder} cannot be read back; set data.cache_dir")
    return stream


def find_stream(folder: Path, verify: bool) -> TokenStream | None:
    """Opens a cache entry; None if it is missing or damaged.

    A damaged entry loses its place: what is whole in it is kept for the building that follows.
    """
    stream = TokenStream.open(folder)
    if stream is not None and not (verify and stream.damaged()):
        return stream
    if folder.exists():
        _log.warning("the token cache %s is damaged and will be mended", folder)
        with suppress(OSError), locked(folder):
            shutil.rmtree(_partial(folder), ignore_errors=True)
            os.rename(folder, _partial(folder))
    return None


def _key(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> str:
    settings = f"{_FORMAT} {documents.signature} {encoding_fingerprint(tokenizer)}"
    return hashlib.sha256(settings.encode()).hexdigest()


def _partial(folder: Path) -> Path:
    return folder.with_name(f".partial-{folder.name}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a cache entry; the system releases it when a process is killed."""
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
    """Deletes what unfinished preparations left and nobody came back to for a week."""
    for folder in parent.glob(".partial-*"):
        with suppress(OSError):  # another process may be cleaning up too
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                _log.warning("removing %s, left by an unfinished preparation", folder)
                shutil.rmtree(folder, ignore_errors=True)


# --- building ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Pieces that are encoded together, and the shard that their tokens go to.

    Attributes:
        shard: its number.
        pieces: of documents, in order.
        goes_on: whether the first of them goes on from the task before.
    """

    shard: int
    pieces: list[Block]
    goes_on: bool

    @property
    def later(self) -> list[bool]:
        """Whether each piece goes on from a piece before it."""
        return [self.goes_on, *(not piece.last for piece in self.pieces[:-1])]

    @property
    def characters(self) -> int:
        return sum(len(piece.text) for piece in self.pieces)


def _build(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    num_proc: int,
    progress: Callable[[int], None],
) -> None:
    partial = _partial(folder)
    partial.mkdir(exist_ok=True)
    finished = _finished(partial)
    eos = tokenizer.eos_token_id

    def unfinished() -> Iterator[_Task]:
        for task in _tasks(documents.pieces()):
            if task.shard in finished:
                progress(task.characters)
            else:
                yield task

    shard: _Shard | None = None
    try:
        for task, encoded in _encode(unfinished(), text_backends(tokenizer), num_proc):
            if shard is not None and shard.number != task.shard:
                finished[shard.number] = shard.close()
                _describe(partial, finished, eos)
                shard = None
            if shard is None:
                shard = _Shard(partial, task.shard)
            shard.write(encoded, eos)
            progress(task.characters)
        if shard is not None:
            finished[shard.number] = shard.close()
            shard = None
    except ChangedSource:
        finished.clear()  # a part of the changed text may be in what is finished
        raise
    finally:
        if shard is not None:
            shard.discard()
        if finished:
            _describe(partial, finished, eos)
        else:
            shutil.rmtree(partial, ignore_errors=True)
    os.rename(partial, folder)


class _Shard:
    """One Arrow file of a cache entry while it is written, under a name that says so."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.path = folder / _shard_name(number)
        self.unfinished = self.path.with_suffix(".unfinished")
        self.documents = self.tokens = 0
        self._file = pa.OSFile(str(self.unfinished), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)

    def write(self, encoded: Encoded, eos: int | None) -> None:
        batch = _record_batch(encoded, eos)
        self._writer.write_batch(batch)
        self.documents += sum(last for _, last in encoded)
        self.tokens += len(batch.column(0).values)

    def close(self) -> dict[str, Any]:
        """Gives the file its name; returns its description."""
        self._writer.close()
        self._file.close()
        os.replace(self.unfinished, self.path)
        return {
            "name": self.path.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.path.stat().st_size,
            "sha256": file_hash(self.path),
        }

    def discard(self) -> None:
        with suppress(OSError, pa.ArrowException):
            self._file.close()
        self.unfinished.unlink(missing_ok=True)


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.arrow"


def _finished(partial: Path) -> dict[int, dict[str, Any]]:
    """The shards of an unfinished (or damaged) entry that are whole, by number."""
    try:
        described = json.loads((partial / DESCRIPTION_NAME).read_text(encoding="utf-8"))["shards"]
        listed = {int(s["name"][len("tokens-") : -len(".arrow")]): dict(s) for s in described}
        kept = {n: s for n, s in listed.items() if file_hash(partial / s["name"]) == s["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        listed = kept = {}
    for number in listed.keys() - kept.keys():
        _log.warning("%s is damaged and is encoded again", partial / _shard_name(number))
    names = {s["name"] for s in kept.values()} | {DESCRIPTION_NAME}
    for path in partial.iterdir():
        if path.name not in names:
            path.unlink()
    return kept


def _describe(partial: Path, finished: dict[int, dict[str, Any]], eos: int | None) -> None:
    shards = [finished[number] for number in sorted(finished)]
    description = {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "eos_token_id": eos,
        "shards": shards,
    }
    with whole_file(partial / DESCRIPTION_NAME) as file:
        file.write_text(json.dumps(description, indent=1), encoding="utf-8")


def _record_batch(encoded: Encoded, eos: int | None) -> pa.RecordBatch:
    end = np.array([] if eos is None else [eos], dtype=np.int32)
    none = end[:0]
    values = np.concatenate(
        [part for ids, last in encoded for part in (ids, end if last else none)]
    )
    lengths = np.array([len(ids) + len(end) * last for ids, last in encoded], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=_SCHEMA[0].type)
    lasts = pa.array([last for _, last in encoded], pa.bool_())
    return pa.RecordBatch.from_arrays([lists, lasts], schema=_SCHEMA)


def _tasks(pieces: Iterable[Block]) -> Iterator[_Task]:
    """Groups pieces so that a task is large enough to be worth sending to a process.

    Where tasks and shards end depends on the text alone.
    """
    held: list[Block] = []
    shard = size = shard_size = 0
    goes_on = False
    for piece in pieces:
        held.append(piece)
        size += len(piece.text) + 1
        if size >= _TASK_CHARACTERS:
            yield _Task(shard, held, goes_on)
            shard_size += size
            held, size, goes_on = [], 0, not piece.last
            if shard_size >= _SHARD_CHARACTERS:
                shard, shard_size = shard + 1, 0
    if held:
        yield _Task(shard, held, goes_on)


def _encode(
    tasks: Iterator[_Task], backends: TextBackends, num_proc: int
) -> Iterator[tuple[_Task, Encoded]]:
    """Yields tasks with their ids in the order of the tasks, whatever process finishes first."""
    if num_proc == 1:
        encoder = Encoder(*backends)
        for task in tasks:
            yield task, _encode_task(encoder, task)
        return
    with workers(num_proc, _start_worker, *backends) as submit:
        # Two tasks in hand per process: the corpus must not pile up in the queue.
        pending: deque[tuple[_Task, Future[Encoded]]] = deque()
        for task in tasks:
            pending.append((task, submit(_encode_in_worker, task)))
            if len(pending) >= 2 * num_proc:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _encode_task(encoder: Encoder, task: _Task) -> Encoded:
    ids = encoder([piece.text for piece in task.pieces], task.later)
    return [(part, piece.last) for part, piece in zip(ids, task.pieces, strict=True)]


_worker_encoder: list[Encoder] = []


def _start_worker(first: str, later: str) -> None:
    _worker_encoder.append(Encoder(first, later))


def _encode_in_worker(task: _Task) -> Encoded:
    return _encode_task(_worker_encoder[0], task)

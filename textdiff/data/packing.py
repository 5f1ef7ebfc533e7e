"""Tokenises a corpus once, into an Arrow file that is memory-mapped ever after.

A cache entry is a folder named by a hash of the documents and of the tokenizer. It is written
beside its final place and renamed, so that a half-written entry is never read and processes that
race for the same entry all end with a good one; an entry that cannot be opened is built again.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from textdiff.data.encode import Encoder, serialize
from textdiff.data.python_docs import corpus_fingerprint
from textdiff.data.sources import iterate_texts
from textdiff.data.stream import DESCRIPTION_NAME, TOKENS_NAME, TokenStream
from textdiff.data.tokenizer import tokenizer_fingerprint
from textdiff.errors import DataError

_FORMAT = 1  # part of the key: raise it when the tokens of unchanged inputs change
_TASK_CHARACTERS = 2_000_000
_SCHEMA = pa.schema([("tokens", pa.large_list(pa.field("item", pa.int32(), nullable=False)))])

_log = logging.getLogger(__name__)


def tokenize(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_proc: int,
    cache_dir: str | None,
) -> TokenStream:
    """Turns documents into one stream of tokens, or finds that stream in the cache.

    Every document is followed by the end-of-text token if the tokenizer has one.

    Args:
        documents: a dataset with the column `text`.
        tokenizer: any fast tokenizer.
        num_proc: processes that encode; the stream is the same for every number.
        cache_dir: where `textdiff/<key>/` is kept; None is the cache of `datasets`.

    Returns:
        The memory-mapped stream.

    Raises:
        DataError: the cache folder cannot be written.
    """
    root = Path(cache_dir if cache_dir is not None else datasets.config.HF_DATASETS_CACHE)
    folder = root.expanduser() / "textdiff" / _key(documents, tokenizer)
    stream = TokenStream.open(folder)
    if stream is not None:
        return stream
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _build(folder, documents, tokenizer, num_proc)
    except OSError as error:
        raise DataError(
            f"cannot write the token cache {folder} ({error.strerror or error}); make room or "
            "choose another folder with data.cache_dir"
        ) from None
    stream = TokenStream.open(folder)
    if stream is None:
        raise DataError(f"the token cache {folder} cannot be read back; set data.cache_dir")
    return stream


def _key(documents: Dataset, tokenizer: PreTrainedTokenizerFast) -> str:
    content = corpus_fingerprint(iterate_texts(documents))
    settings = f"{_FORMAT} {content} {tokenizer_fingerprint(tokenizer)}"
    return hashlib.sha256(settings.encode()).hexdigest()


def _build(
    folder: Path, documents: Dataset, tokenizer: PreTrainedTokenizerFast, num_proc: int
) -> None:
    scratch = _new_folder(folder.parent)
    try:
        _write(scratch, documents, tokenizer, num_proc)
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    """Moves a finished entry to its place unless another process put a good one there first."""
    try:
        os.rename(scratch, folder)
        return
    except OSError:
        if TokenStream.open(folder) is not None:
            return
    _log.warning("the token cache %s was damaged and has been built again", folder)
    # Moved aside, not deleted in place: no process can see an entry that is half gone.
    doomed = _new_folder(folder.parent)
    try:
        os.rename(folder, doomed / "entry")
        os.rename(scratch, folder)
    except OSError:
        if TokenStream.open(folder) is None:
            raise
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    # Not from tempfile: its folders are closed to the other users of a shared cache.
    folder = parent / f".partial-{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def _write(
    folder: Path, documents: Dataset, tokenizer: PreTrainedTokenizerFast, num_proc: int
) -> None:
    eos = tokenizer.eos_token_id
    num_documents = num_tokens = 0
    path = folder / TOKENS_NAME
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        tasks = _tasks(iterate_texts(documents))
        for encoded in _encode(tasks, serialize(tokenizer), num_proc):
            batch = _record_batch(encoded, eos)
            writer.write_batch(batch)
            num_documents += batch.num_rows
            num_tokens += len(batch.column(0).values)
    description = {
        "documents": num_documents,
        "tokens": num_tokens,
        "bytes": path.stat().st_size,
        "eos_token_id": eos,
    }
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description), encoding="utf-8")


def _record_batch(encoded: list[NDArray[np.int32]], eos: int | None) -> pa.RecordBatch:
    end = np.array([] if eos is None else [eos], dtype=np.int32)
    values = np.concatenate([part for ids in encoded for part in (ids, end)])
    lengths = np.array([len(ids) + len(end) for ids in encoded], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=_SCHEMA[0].type)
    return pa.RecordBatch.from_arrays([lists], schema=_SCHEMA)


def _tasks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents so that a task is large enough to be worth sending to a process."""
    task: list[str] = []
    size = 0
    for text in texts:
        task.append(text)
        size += len(text) + 1
        if size >= _TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode(
    tasks: Iterator[list[str]], serialized: str, num_proc: int
) -> Iterator[list[NDArray[np.int32]]]:
    """Yields the tasks' ids in the order of the tasks, whatever process finishes first."""
    if num_proc == 1:
        yield from map(Encoder(serialized), tasks)
        return
    with _pool(serialized, num_proc) as pool:
        # Two tasks in hand per process: the corpus must not pile up in the queue.
        pending: deque[Future[list[NDArray[np.int32]]]] = deque()
        for task in tasks:
            pending.append(pool.submit(_encode_in_worker, task))
            if len(pending) >= 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _pool(serialized: str, num_proc: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: the threads of torch and of tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(
        num_proc, get_context("spawn"), initializer=_start_worker, initargs=(serialized,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[Encoder] = []


def _start_worker(serialized: str) -> None:
    _worker_encoder.append(Encoder(serialized))


def _encode_in_worker(texts: list[str]) -> list[NDArray[np.int32]]:
    return _worker_encoder[0](texts)

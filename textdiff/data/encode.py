"""Text to token ids, the same way in training and in evaluation.

`Encoder` differs from calling the tokenizer in three points: text never becomes a special token,
not even where it spells one; truncation and padding that a tokenizer file may carry are off; and a
long document is encoded in pieces, which bounds memory, and of which only the first one begins it.
"""

import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import TextBackends, byte_characters, is_plain_bpe, text_backends
from textdiff.data.document_stream import TextBlock, brief, split_long
from textdiff.data.shards import SHARDS_OF_A_SIZE
from textdiff.data.token_stream import Piece
from textdiff.errors import DataError

Ids = NDArray[np.int32]
Submit = Callable[..., Future[Any]]

_TASK_CHARACTERS = 2_000_000
_SHARD_CHARACTERS = 32_000_000  # what a kill loses at most, until shards grow
_GROUP_CHARACTERS = 2_000_000  # an encoding takes some hundred bytes per token until it is read


class Encoder:
    """Encodes documents with a private copy of a tokenizer's backend.

    Args:
        first: the backend as JSON, from `text_backends`; a string, so that it can be handed to
            other processes.
        later: the backend for text that goes on; None: the same.
    """

    def __init__(self, first: str, later: str | None = None) -> None:
        self._bytes = _byte_ids(first)
        self._first = _backend(first)
        self._later = self._first if later in (None, first) else _backend(later)

    def __call__(self, texts: Sequence[str], later: Iterable[bool] = repeat(False)) -> list[Ids]:
        """Return the token ids of every text, int32 [tokens] each.

        Args:
            texts: whole documents, or pieces of them.
            later: whether each goes on from a piece before it.

        Raises:
            DataError: the tokenizer fails at a text.
        """
        if self._bytes is not None:
            return [self._bytes[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        pieces: list[list[Ids]] = [[] for _ in texts]
        group: list[tuple[int, str, bool]] = []
        size = 0
        for index, (text, goes_on) in enumerate(zip(texts, later, strict=False)):
            for piece in split_long(text):
                group.append((index, piece, goes_on))
                goes_on, size = True, size + len(piece)
                if size >= _GROUP_CHARACTERS:
                    self._encode(group, pieces)
                    group, size = [], 0
        self._encode(group, pieces)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in pieces]

    def _encode(self, group: list[tuple[int, str, bool]], pieces: list[list[Ids]]) -> None:
        # A document's first piece comes before the others, here too.
        for backend, later in ((self._first, False), (self._later, True)):
            chosen = [(index, piece) for index, piece, goes_on in group if goes_on == later]
            texts = [piece for _, piece in chosen]
            try:
                encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            except Exception as error:  # the library raises nothing narrower
                raise DataError(
                    f"the tokenizer cannot encode the text ({brief(error)}); train with a byte or "
                    "bpe tokenizer, or choose one that has an unknown token",
                    code="not_encoded",
                ) from None
            for (index, _), encoding in zip(chosen, encodings, strict=True):
                pieces[index].append(np.asarray(encoding.ids, dtype=np.int32))


@lru_cache(maxsize=4)
def encoder_of(backends: TextBackends) -> Encoder:
    """Make an encoder; the last ones are kept."""
    return Encoder(*backends)


def _backend(serialized: str) -> Tokenizer:
    backend = Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    return backend


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[Ids]:
    """Encode documents without adding or recognising any special token.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        texts: the documents.

    Returns:
        One array of ids per document, int32 [tokens].

    Raises:
        DataError: half of a surrogate pair, which no tokenizer can read.
    """
    return encoder_of(text_backends(tokenizer))(readable(texts))


def readable(texts: Iterable[str]) -> list[str]:
    """Return texts that can be encoded.

    Raises:
        DataError: half of a surrogate pair, which no tokenizer can read.
    """
    documents = list(texts)
    for text in documents:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text {text[:40]!a} has half of a surrogate pair as character "
                f"{error.start + 1}, which no tokenizer can read; remove it",
                code="surrogate",
            ) from None
    return documents


def _byte_ids(serialized: str) -> NDArray[np.int32] | None:
    """Return the id of every byte, [256], if the tokenizer only looks up bytes; else None.

    A merge-free BPE goes through the motions of merging, some hundred times slower than a table.
    """
    settings = json.loads(serialized)
    model = settings["model"]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if not (is_plain_bpe(settings) and plain.items() <= (settings["pre_tokenizer"] or {}).items()):
        return None
    names = byte_characters()
    if model["merges"] or not set(names) <= model["vocab"].keys():
        return None
    return np.array([model["vocab"][name] for name in names], dtype=np.int32)  # [256]


# --- a corpus, in this process or in several others ----------------------------------------------


@dataclass(frozen=True)
class EncodingBatch:
    """Pieces that are encoded together, and the shard that their tokens go to.

    Attributes:
        shard: its number.
        pieces: of documents, in order.
        goes_on: whether the first of them goes on from the task before.
        before: documents that ended before it.
    """

    shard: int
    pieces: list[TextBlock]
    goes_on: bool
    before: int

    @property
    def characters(self) -> int:
        """Characters of all pieces."""
        return sum(len(piece.text) for piece in self.pieces)


def tasks_of(pieces: Iterable[TextBlock]) -> Iterator[EncodingBatch]:
    """Group pieces so that a task is large enough to be worth sending to a process.

    Where tasks and shards end depends on the text alone.
    """
    held: list[TextBlock] = []
    shard = size = shard_size = before = 0
    goes_on = False
    for piece in pieces:
        held.append(piece)
        size += len(piece.text) + 1
        if size >= _TASK_CHARACTERS:
            yield EncodingBatch(shard, held, goes_on, before)
            shard_size += size
            before += sum(each.last for each in held)
            held, size, goes_on = [], 0, not piece.last
            if shard_size >= _SHARD_CHARACTERS << (shard // SHARDS_OF_A_SIZE):
                shard, shard_size = shard + 1, 0
    if held:
        yield EncodingBatch(shard, held, goes_on, before)


def encode_tasks(
    tasks: Iterable[EncodingBatch], backends: TextBackends, num_proc: int
) -> Iterator[tuple[EncodingBatch, list[Piece]]]:
    """Yield tasks with the tokens of their pieces, in order, whichever process finishes first."""
    if num_proc == 1:
        encoder = Encoder(*backends)
        for task in tasks:
            yield task, _encode_task(encoder, task)
        return
    with workers(num_proc, _start_worker, *backends) as submit:
        # Two tasks in hand per process: the corpus must not pile up in the queue.
        pending: deque[tuple[EncodingBatch, Future[list[Piece]]]] = deque()
        for task in tasks:
            pending.append((task, submit(_encode_in_worker, task)))
            if len(pending) >= 2 * num_proc:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _encode_task(encoder: Encoder, task: EncodingBatch) -> list[Piece]:
    texts, lasts = zip(*task.pieces, strict=True)
    goes_on = [task.goes_on, *(not last for last in lasts[:-1])]
    return list(zip(encoder(texts, goes_on), lasts, strict=True))


_worker_encoder: list[Encoder] = []


def _start_worker(first: str, later: str) -> None:
    _worker_encoder.append(Encoder(first, later))


def _encode_in_worker(task: EncodingBatch) -> list[Piece]:
    return _encode_task(_worker_encoder[0], task)


@contextmanager
def workers(count: int, start: Callable[..., None], *values: Any) -> Iterator[Submit]:
    """Yield a function that runs another one in one of several processes.

    They are spawned, not forked: the threads of torch and of tokenizers do not survive a fork.

    Args:
        count: processes, at most.
        start: called once in each of them; importable, not from `__main__`.
        values: its arguments.

    Raises:
        DataError: a process ended before its work.
    """
    pool = ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_begin, initargs=(start, *values)
    )

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with _without_main():  # processes start here
            return pool.submit(function, *arguments)

    try:
        yield submit
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises ended unexpectedly, perhaps for lack of memory; start again, "
            "with a smaller data.num_proc if it happens again: what was finished is kept",
            code="lost_worker",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], *values: Any) -> None:
    """Prepare a process; signals for the whole group are for the one that started it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    start(*values)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep spawned processes from importing the caller's script.

    One without `if __name__ == "__main__":` would run once more in each of them, and wait there for
    the corpus that this process prepares.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script

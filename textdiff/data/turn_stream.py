"""Encoded conversations on disk: three arrays that are memory-mapped, and their hashes."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from textdiff.data.answers import Turn, encode_conversations
from textdiff.data.backend import encoding_fingerprint
from textdiff.data.document_stream import Documents, iterate_texts
from textdiff.data.encode import Ids
from textdiff.data.packing import cache_root

_FORMAT = 1  # part of the key: raise it when the tokens of unchanged inputs change
_FILES = {"tokens": np.int32, "pieces": np.int64, "turns": np.int64}


class TurnStream:
    """Conversations in tokens, one after another.

    The tokens are those of every turn's prompt and answer, an answer's end-of-text token included.

    Attributes:
        folder: where the arrays are.

    Args:
        folder: written by `write`.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._load()

    def _load(self) -> None:
        arrays = {name: np.load(_path(self.folder, name), mmap_mode="r") for name in _FILES}
        self._tokens: Ids = arrays["tokens"]  # [T]
        self._pieces = np.concatenate([[0], np.cumsum(arrays["pieces"])])  # [2 turns + 1]
        self._first = np.concatenate([[0], np.cumsum(arrays["turns"])])  # [conversations + 1]

    def __getstate__(self) -> dict[str, Any]:
        """Keep the path only: data-loader processes map the same files."""
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._load()

    @classmethod
    def write(cls, folder: Path, conversations: Sequence[Sequence[Turn]]) -> "TurnStream":
        """Write conversations into a folder, and open them."""
        pieces = [
            x for turns in conversations for turn in turns for x in (turn.prompt, turn.answer)
        ]
        arrays = {
            "tokens": np.concatenate(pieces),
            "pieces": np.array([len(piece) for piece in pieces]),
            "turns": np.array([len(turns) for turns in conversations]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, kind in _FILES.items():
            np.save(_path(folder, name), arrays[name].astype(kind))
        (folder / "hashes.json").write_text(json.dumps(_hashes(folder)), encoding="utf-8")
        return cls(folder)

    def damaged(self) -> bool:
        """Return whether a file is not what was written."""
        written = json.loads((self.folder / "hashes.json").read_text(encoding="utf-8"))
        return bool(written != _hashes(self.folder))

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Name and size of every file."""
        paths = [_path(self.folder, name) for name in _FILES]
        return [{"name": path.name, "bytes": path.stat().st_size} for path in paths]

    @property
    def num_documents(self) -> int:
        """Number of conversations."""
        return len(self._first) - 1

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """[conversations] tokens of each."""
        lengths: NDArray[np.int64] = np.diff(self._pieces[2 * self._first])
        return lengths

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Ids:
        """Return tokens by their places, int32 [stop - start]."""
        return self._tokens[start:stop]

    def turn_lengths(self, number: int) -> list[tuple[int, int]]:
        """Return the tokens of prompt and answer of every turn of a conversation."""
        first, last = 2 * self._first[number : number + 2]
        lengths = np.diff(self._pieces[first : last + 1]).tolist()
        return list(zip(lengths[::2], lengths[1::2], strict=True))

    def turns(self, number: int) -> list[tuple[Ids, Ids]]:
        """Return prompt and answer of every turn of a conversation."""
        first, last = 2 * self._first[number : number + 2]
        edges = self._pieces[first : last + 1].tolist()
        pieces = [self._tokens[a:b] for a, b in pairwise(edges)]
        return list(zip(pieces[::2], pieces[1::2], strict=True))


def tokenize_turns(
    documents: Documents,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache_dir: str | None,
    progress: Callable[[int], None] = lambda characters: None,
) -> TurnStream:
    """Turn conversations into tokens, or find these in the cache.

    Args:
        documents: the JSON texts of conversations.
        tokenizer: any fast tokenizer.
        cache_dir: see `packing.tokenize`.
        progress: called with the characters encoded since its last call.

    Raises:
        DataError: a conversation that cannot be encoded.
    """
    facts = (_FORMAT, documents.signature, encoding_fingerprint(tokenizer), tokenizer.chat_template)
    folder = cache_root(cache_dir) / f"turns-{hashlib.sha256(repr(facts).encode()).hexdigest()}"
    stream = find_turns(folder, verify=True)
    if stream is not None:
        return stream

    def read() -> Iterator[str]:
        for text in iterate_texts(documents):
            progress(len(text))
            yield text

    scratch = folder.with_name(f".partial-{folder.name}-{uuid.uuid4().hex}")
    try:
        TurnStream.write(scratch, list(encode_conversations(read(), tokenizer)))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TurnStream(folder)


def find_turns(folder: Path, verify: bool) -> TurnStream | None:
    """Open encoded conversations; None if they are missing or damaged."""
    with suppress(OSError, ValueError, KeyError):
        stream = TurnStream(folder)
        if not (verify and stream.damaged()):
            return stream
    return None


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _hashes(folder: Path) -> dict[str, str]:
    paths = {name: _path(folder, name) for name in _FILES}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

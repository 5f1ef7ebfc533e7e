"""Answers of earlier starts, in a SQLite file under keys of everything that they depend on."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import ConfigError

RequestKey = tuple[Any, ...]
"""Kind of a request and everything that its answer depends on, besides the model and its settings:
plain values whose `repr` tells them apart."""

Computed = tuple[NDArray[np.float64], list[Any]]
"""Draws of a log-likelihood, none for written answers, and facts that JSON can hold."""

_TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, facts TEXT, draws BLOB)"


class AnswerCache:
    """Cache of answers. Several models and settings may share a file: none takes another's answers.

    Args:
        path: the file, which is made where there is none.
        state: the model and all settings that answers depend on.

    Raises:
        ConfigError: it is another kind of file, or cannot be opened.
    """

    def __init__(self, path: Path, state: str):
        self.path, self.state = path, state
        with self._explained():
            self.base = sqlite3.connect(path, timeout=60.0)
            self.base.execute(_TABLE)

    def known(self, keys: Iterable[RequestKey]) -> dict[RequestKey, Computed]:
        """Return the answers that the file has, by their keys.

        Raises:
            ConfigError: the file cannot be read.
        """
        answers: dict[RequestKey, Computed] = {}
        query = "SELECT facts, draws FROM answers WHERE key = ?"
        with self._explained():
            for key in keys:
                for facts, draws in self.base.execute(query, (self._digest(key),)):
                    answers[key] = np.frombuffer(draws, dtype=np.float64), json.loads(facts)
        return answers

    def add(self, answers: Mapping[RequestKey, Computed]) -> None:
        """Write answers; after it they are in the file, whatever happens next.

        Raises:
            ConfigError: the file cannot be written.
        """
        rows = [
            (self._digest(key), json.dumps(facts), draws.astype(np.float64).tobytes())
            for key, (draws, facts) in answers.items()
        ]
        with self._explained(), self.base:
            self.base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def _digest(self, key: RequestKey) -> bytes:
        return hashlib.sha256(f"{self.state}\0{key!r}".encode()).digest()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"--use-cache {self.path} is not usable as a cache of answers ({error}); name "
                "another file",
                code="unusable_cache",
            ) from None

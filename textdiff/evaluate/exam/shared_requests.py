"""Requests that processes divide among themselves, with a cache of answers.

Every process is called with the same requests and returns all answers in their order. Whatever
follows is therefore the same on each process, and the same as on one alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from textdiff.errors import ConfigError, TextDiffError
from textdiff.evaluate.exam.answer_cache import AnswerCache, Computed, RequestKey

Compute = Callable[[Sequence[int], Callable[[int], Any]], list[Computed]]
"""Function of indices of requests and of a progress, which takes counts of them."""

CHUNK = 256
"""Answers that a process computes before they are exchanged and kept."""


class SharedRequests:
    """Requests of all processes.

    Args:
        state: the processes.
        cache: answers of earlier starts, on the first process.

    Attributes:
        reused: answers that came from the cache.
    """

    def __init__(self, state: PartialState, cache: AnswerCache | None = None):
        self.rank, self.count, self.cache = state.process_index, state.num_processes, cache
        self.reused = 0

    def answers(
        self,
        keys: Sequence[RequestKey],
        questions: Sequence[object],
        compute: Compute,
        title: str,
        quiet: bool = False,
    ) -> list[Computed]:
        """Return the answers to requests; equal requests are computed once.

        Args:
            keys: key of each request.
            questions: question of each request; those of one question stay on one process.
            compute: what gives answers.
            title: of the progress bar.
            quiet: whether there is none.

        Raises:
            ConfigError: processes have different requests.
            TextDiffError: whatever `compute` raises, on all processes.
        """
        self._check_same(keys)
        known = self._on_first(lambda cache: cache.known(keys))
        self.reused += sum(key in known for key in keys)
        wanted = [n for key, n in _first_places(keys).items() if key not in known]
        size = min(CHUNK, -(-len(wanted) // self.count))
        chunks = [wanted[each] for each in _chunks([questions[n] for n in wanted], size)]
        total = sum(map(len, chunks[self.rank :: self.count]))
        hidden = True if quiet or self.rank else None  # None: hidden in pipes
        with tqdm(total=total, desc=title, disable=hidden) as bar:
            for start in range(0, len(chunks), self.count):
                turn = chunks[start : start + self.count]
                own = turn[self.rank] if self.rank < len(turn) else []
                fresh = self._exchanged(compute, own, bar.update)
                added = dict(zip((keys[n] for n in chain(*turn)), fresh, strict=True))
                known |= added
                if self.cache is not None:
                    self.cache.add(added)
        return [known[key] for key in keys]

    def _on_first(self, read: Callable[[AnswerCache], dict[Any, Any]]) -> dict[Any, Any]:
        """Return what the first process reads from its cache, on all of them."""
        own = {} if self.cache is None else read(self.cache)
        return own if self.count == 1 else gather_object([own])[0]

    def _exchanged(
        self, compute: Compute, own: Sequence[int], progress: Callable[[int], Any]
    ) -> list[Computed]:
        """Return the answers of all processes; an error of one is raised on all."""
        answers: list[Computed] | TextDiffError = []
        try:
            answers = compute(own, progress) if own else []
        except TextDiffError as error:
            if self.count == 1:
                raise
            answers = error
        every = [answers] if self.count == 1 else gather_object([answers])
        for each in every:
            if isinstance(each, TextDiffError):
                raise each
        return list(chain(*every))

    def _check_same(self, keys: Sequence[RequestKey]) -> None:
        digest = hashlib.sha256(repr(keys).encode()).hexdigest()
        if self.count > 1 and len(set(gather_object([digest]))) > 1:
            raise ConfigError(
                "processes have different requests; start all of them alike, and leave out the "
                "harness's own cache, which each of them would have for itself",
                code="different_requests",
            )


def _first_places(keys: Sequence[RequestKey]) -> dict[RequestKey, int]:
    """Return the first place of each key, in order."""
    places: dict[RequestKey, int] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, place)
    return places


def _chunks(questions: Sequence[object], size: int) -> Iterator[slice]:
    """Yield slices of about `size` that leave questions whole."""
    start = 0
    for stop in range(1, len(questions) + 1):
        last = stop == len(questions)
        if last or (stop - start >= size and questions[stop] != questions[stop - 1]):
            yield slice(start, stop)
            start = stop

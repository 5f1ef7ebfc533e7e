"""Requests that processes share: each is answered once, all have all answers, errors are common."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from refusals import refused

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.exam import shared_requests
from textdiff.evaluate.exam.answer_cache import AnswerCache
from textdiff.evaluate.exam.shared_requests import SharedRequests

QUESTIONS = [0, 0, 1, 1, 1, 2, 2, 3, 4, 4]
KEYS = [("answer", q, n) for n, q in enumerate(QUESTIONS)]
KEYS[-1] = KEYS[0]


@pytest.fixture
def processes(monkeypatch):
    """Threads in place of processes; returns what calls function(rank) on all of them."""
    ranks, slots = threading.local(), [None] * 8

    def run(count, function):
        barrier = threading.Barrier(count)

        def gather(objects):
            slots[ranks.number] = objects[0]
            barrier.wait(30)
            every = list(slots[:count])
            barrier.wait(30)
            return every

        def one(rank):
            ranks.number = rank
            return function(SimpleNamespace(process_index=rank, num_processes=count))

        monkeypatch.setattr(shared_requests, "gather_object", gather)
        with ThreadPoolExecutor(count) as pool:
            return [pool.submit(one, rank) for rank in range(count)]

    return run


def computer(record):
    def compute(which, progress):
        record.append(list(which))
        progress(len(which))
        return [(np.array([float(n)]), [n]) for n in which]

    return compute


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("chunk", [2, 256])
def test_processes_answer_every_request_once(processes, monkeypatch, tmp_path, count, chunk):
    monkeypatch.setattr(shared_requests, "CHUNK", chunk)
    record: list[list[int]] = []

    def work(state):
        cache = None
        if state.process_index == 0:
            cache = AnswerCache(tmp_path / "cache", "model")
        shared = SharedRequests(state, cache)
        answers = shared.answers(KEYS, QUESTIONS, computer(record), "", quiet=True)
        return [facts for _, facts in answers], shared.reused

    wanted = [[n] for n in [*range(9), 0]]  # the last is the first request again
    first, again = ([job.result() for job in processes(count, work)] for _ in range(2))
    assert first == [(wanted, 0)] * count
    assert again == [(wanted, 10)] * count
    assert sorted(n for which in record for n in which) == list(range(9))
    for which in record:  # questions stay whole
        asked = {QUESTIONS[n] for n in which}
        assert set(which) == {n for n in range(9) if QUESTIONS[n] in asked}
    assert len(record) >= min(count, 3)


def test_an_error_of_one_process_is_raised_on_all(processes):
    def compute(which, progress):
        if KEYS.index(("answer", 3, 7)) in which:
            raise DataError("question 7", code="foreign_characters")
        return computer([])(which, progress)

    def work(state):
        return SharedRequests(state).answers(KEYS, QUESTIONS, compute, "", quiet=True)

    for job in processes(2, work):
        with refused(DataError, "foreign_characters"):
            job.result()


def test_processes_with_different_requests_are_refused(processes):
    def work(state):
        shared, count = SharedRequests(state), 9 - state.process_index
        return shared.answers(KEYS[:count], QUESTIONS[:count], computer([]), "", quiet=True)

    for job in processes(2, work):
        with refused(ConfigError, "different_requests"):
            job.result()

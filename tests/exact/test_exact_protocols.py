"""Published evaluations against a second implementation of them: their chunks and their number.

The reference knows lists and loops alone. Its number is the expectation of what the published codes
compute: one uniform time in [0.001, 1] per chunk, weight 1 / t, masks with the schedule's own
rates, nats of all counted tokens over their number.
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact_stats import beta_cdf
from exact_tables import CLEAN, LENGTH, Table, TableDenoiser, family, random_table, subsets

from textdiff.likelihood.protocols import PROTOCOLS, published_windows
from textdiff.likelihood.replicates import estimate

BOS, EOS = CLEAN[1], CLEAN[2]
EPS = 1e-3


def documents(count: int) -> list[list[int]]:
    """Token ids of up to five tokens; some documents are empty, and any may hold special ids."""
    source = random.Random(5)
    return [[source.choice(CLEAN) for _ in range(source.randrange(6))] for _ in range(count)]


def by_hand(name: str, texts: list[list[int]], length: int) -> tuple[list[list[int]], set[int]]:
    """Chunks, and the places of a chunk that are scored and counted."""
    chunks = []
    for start in range(0, len(texts), 1000):  # what is left over of a batch of documents is lost
        stream = []
        for text in texts[start : start + 1000]:
            stream += text if name == "bd3lm" else [*text, EOS]
        room = length - 2 if name == "mdlm" else length
        while len(stream) >= room:
            body, stream = stream[:room], stream[room:]
            chunks.append([BOS, *body, EOS] if name == "mdlm" else body)
    return chunks, set(range(1 if name == "bd3lm" else 0, length))


def windows(name: str, texts: list[list[int]], length: int):
    tokenizer = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, cls_token_id=0, sep_token_id=0)
    arrays = [np.array(text, dtype=np.int32) for text in texts]
    clean = family().process.vocabulary.clean
    return published_windows(
        PROTOCOLS[name], tokenizer, arrays, ["é" * len(text) for text in texts], length, clean
    )


@pytest.mark.parametrize("length", [3, 7])
@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_chunks_and_what_is_counted_in_them(name, length):
    texts = documents(2100)
    found, (chunks, counted) = windows(name, texts, length), by_hand(name, texts, length)
    assert [tokens.tolist() for tokens in found.tokens] == chunks
    assert found.document_tokens.tolist() == [len(counted)] * len(chunks)
    for mask in found.scored or [np.ones(length, bool)]:
        assert set(np.flatnonzero(mask).tolist()) == counted


def chunk_nats(table: Table, chunk: list[int], counted: set[int], left: float) -> float:
    """What a chunk expects to cost where the schedule leaves `left` of the tokens at its end."""
    low, high = (1.0 - left) * EPS, 1.0 - left
    total = 0.0
    for hit in subsets():
        k, n = len(hit), len(counted)
        if counted.issuperset(hit):
            upper, lower = (float(beta_cdf(torch.tensor(x).double(), k, n)) for x in (high, low))
            cost = table.cross_entropy(torch.tensor(chunk), hit)
            total += cost * (upper - lower) / (k * math.comb(n, k))
    return total / (1.0 - EPS)


@pytest.mark.parametrize(("name", "left"), [("sedd", EPS), ("mdlm", EPS), ("bd3lm", 0.0)])
def test_number_is_the_published_one(name, left):
    texts, table = documents(60), random_table(0)
    chunks, counted = by_hand(name, texts, LENGTH)
    exact = sum(chunk_nats(table, c, counted, left) for c in chunks) / len(chunks) / len(counted)
    found = estimate(
        TableDenoiser(table),
        family(schedule={"kind": "loglinear", "eps": left}),
        windows(name, texts, LENGTH),
        seed=3,
        replicates=100,
        batch_tokens=2**14,
        **PROTOCOLS[name].settings({}),
    ).bound()
    assert found.tokens == len(chunks) * len(counted)
    assert found.stderr < 0.03 * exact
    assert abs(found.mean - exact) < 4 * found.stderr
    assert not found.is_bound

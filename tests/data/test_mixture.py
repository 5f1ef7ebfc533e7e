import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from textdiff.config.reading import validate
from textdiff.data.corpus import prepare_corpus
from textdiff.data.sections import BpeTokenizer, ByteTokenizer, DataConfig, Source
from textdiff.data.sequences import Mixture, PackedSequences, whole_weights
from textdiff.errors import ConfigError, DataError


class Numbered:
    """A stream of one number, which says whose it is."""

    num_documents = 1

    def __init__(self, number: int, total: int) -> None:
        self.number, self.total = number, total

    def __len__(self) -> int:
        return self.total

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.number * 1000 + np.arange(start, stop, dtype=np.int32)

    def documents(self, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.int32)


def mixture(weights: list[float], totals: list[int], seed: int = 0) -> Mixture:
    pairs = enumerate(totals)
    return Mixture([PackedSequences(Numbered(n, t), 1, seed, n) for n, t in pairs], weights)


WEIGHTS = [
    [1.0],
    [1, 1],
    [3, 1],
    [0.7, 0.3],
    [7, 2, 1],
    [0.5, 0.001, 0.3],
    [1, 1, 1, 1, 1],
    [99, 1],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_has_the_shares_of_the_weights(weights: list[float]):
    made = mixture(weights, [10] * len(weights))
    sources, _ = made.locate(range(3000))
    share = np.array(weights) / np.sum(weights)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    error = np.abs(counts - np.arange(1, 3001)[:, None] * share)
    assert (error <= (1 + len(weights) * share) / 2 + 1e-9).all()
    assert np.allclose(made.shares, share)


def test_periods_are_exact():
    sources, _ = mixture([0.7, 0.2, 0.1], [5, 5, 5]).locate(range(10_000))
    for start in range(0, 10_000, 10):
        assert np.bincount(sources[start : start + 10]).tolist() == [7, 2, 1]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_draws_from_a_source_are_its_samples_in_order(weights: list[float]):
    made = mixture(weights, [10] * len(weights))
    indices = list(range(5000))
    sources, draws = made.locate(indices)
    for number in range(len(weights)):
        mine = draws[sources == number]
        assert mine.tolist() == list(range(len(mine)))


def test_every_source_goes_through_epochs_of_its_own():
    made = mixture([2, 1], [7, 5], seed=3)
    rows = made.rows(range(210)).tokens[:, 0]
    for number, total in enumerate((7, 5)):
        mine = rows[rows // 1000 == number] % 1000
        epochs = mine[: len(mine) // total * total].reshape(-1, total)
        assert len(epochs) >= 10
        assert (np.sort(epochs, axis=1) == np.arange(total)).all()
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_samples_are_a_function_of_seed_and_index():
    indices = [5, 0, 999_999_937, 17, 5, 1_000_003]
    together = mixture([5, 3], [50, 20]).rows(indices)
    for place, index in enumerate(indices):
        alone = pickle.loads(pickle.dumps(mixture([5, 3], [50, 20]))).rows([index])
        assert np.array_equal(alone.tokens[0], together.tokens[place])
    other = mixture([5, 3], [50, 20], seed=1).rows(range(64)).tokens
    same = mixture([5, 3], [50, 20]).rows(range(64)).tokens
    assert np.array_equal(other // 1000, same // 1000)  # the pattern of sources has no seed
    assert not np.array_equal(other, same)


def test_sources_of_equal_length_have_different_orders():
    rows = mixture([1, 1], [40, 40]).rows(range(80)).tokens[:, 0]
    assert (rows[rows < 1000] != rows[rows >= 1000] - 1000).any()


def test_pattern_is_what_it_was():
    # Resuming an old run must find the same samples: these numbers never change.
    sources, _ = mixture([0.6, 0.3, 0.1], [9, 9, 9]).locate(range(10))
    assert sources.tolist() == [0, 1, 0, 0, 1, 2, 0, 0, 1, 0]


def test_epoch_is_when_every_source_was_read():
    made = mixture([3, 1], [30, 25])
    rows = made.rows(range(len(made))).tokens
    assert len(made) == 100
    assert len(np.unique(rows)) == 55
    assert len(np.unique(made.rows(range(len(made) - 4)).tokens)) < 55


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([2.0, 4.0], [1, 2]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1e-3, 1.0], [1, 1000]),
        ([5.0], [1]),
        ([9035582198.0, 117.0e6], [987217, 12783]),
    ],
)
def test_weights_become_whole_numbers(weights: list[float], whole: list[int]):
    assert whole_weights(weights) == whole


def test_vanishing_weight_is_refused():
    with refused(DataError, "small_weight", "sources.1: weight 1 "):
        whole_weights([1e9 + 7, 1.0])


# --- from the config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 0.0], r"data\.sources\.1\.weight`: .*greater than 0 \(given: 0\.0\)"),
        ([-2, 1], r"data\.sources\.0\.weight`: .*greater than 0 \(given: -2\)"),
        ([float("nan"), 1], r"data\.sources\.0\.weight`: .*finite number"),
        ([float("inf"), 1], r"data\.sources\.0\.weight`: .*finite number"),
        ([1, None], r"sources\.1 has no weight, others have: give every source one, or none"),
    ],
)
def test_bad_weights_name_the_source(weights: list, said: str):
    sources = [{"source": "x", "weight": weight} for weight in weights]
    with pytest.raises(ConfigError, match=said):
        validate({"data": {"sources": sources}})


def two_sources(folder: Path, weights: tuple | None, repeated: str = "") -> DataConfig:
    for name, count in (("a", 300), ("b", 60)):
        rows = [{"text": f"{name} {i} " + name * (i % 50)} for i in range(count)]
        rows.append({"text": repeated or f"{name}!"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sources = [Source(source=str(folder / f"{n}.jsonl")) for n in "ab"]
    if weights:
        sources = [
            source.model_copy(update={"weight": weight})
            for source, weight in zip(sources, weights, strict=True)
        ]
    return DataConfig(
        sources=tuple(sources), validation=0.1, sequence_length=16, cache_dir=str(folder / "cache")
    )


def test_mixed_corpus_has_the_shares_in_tokens(tmp_path: Path):
    corpus = prepare_corpus(two_sources(tmp_path, (1.0, 3.0)), ByteTokenizer(), seed=2)
    tokens = corpus.train.rows(range(400)).tokens
    from_b = (tokens == ord("b")).any(axis=1)
    assert from_b.mean() == pytest.approx(0.75, abs=0.02)
    shares = [source["share"] for source in corpus.record["sources"]]
    assert shares == [0.25, 0.75]
    assert json.loads(json.dumps(corpus.record)) == corpus.record
    assert len(corpus.streams) == 2


def test_both_sources_hold_text_out_and_none_trains_on_it(tmp_path: Path):
    data = two_sources(tmp_path, (1.0, 1.0))
    corpus = prepare_corpus(data, ByteTokenizer(), seed=0)
    assert {text[0] for text in corpus.validation} == {"a", "b"}
    trained = {"".join(map(chr, stream.read(0, len(stream)))) for stream in corpus.streams}
    eos = chr(corpus.tokenizer.eos_token_id)
    documents = {text for joined in trained for text in joined.split(eos)}
    assert not documents & set(corpus.validation)
    assert sum(s["train_documents"] for s in corpus.record["sources"]) + len(
        corpus.validation
    ) == sum(s["documents"] for s in corpus.record["sources"])


@pytest.mark.parametrize("number", range(12))
def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path, number: int):
    shared = f"the same {number}"
    corpus = prepare_corpus(two_sources(tmp_path, (1.0, 1.0), shared), ByteTokenizer(), seed=0)
    held = corpus.validation.count(shared)
    streams = ["".join(map(chr, s.read(0, len(s)))) for s in corpus.streams]
    assert (held, [shared in text for text in streams]) in [
        (0, [True, True]),
        (2, [False, False]),
    ]


def test_without_weights_sources_are_one_stream(tmp_path: Path):
    plain = prepare_corpus(two_sources(tmp_path, None), BpeTokenizer(vocab_size=300), seed=1)
    assert isinstance(plain.train, PackedSequences)
    assert len(plain.streams) == 1
    (stream,) = plain.streams
    text = plain.tokenizer.decode(stream.read(0, len(stream)))
    assert text.index("b") > text.rindex("a ")
    counted = [source["train_tokens"] for source in plain.record["sources"]]
    assert sum(counted) == len(stream)
    first = plain.tokenizer.decode(stream.read(0, counted[0]))
    assert "b" not in first.replace("<|endoftext|>", "")


def test_short_source_of_a_mixture_is_named(tmp_path: Path):
    data = two_sources(tmp_path, (1.0, 1.0))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with refused(DataError, "short_corpus", "b.jsonl"):
        prepare_corpus(data, ByteTokenizer(), seed=0)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with refused(DataError, "short_corpus", "b.jsonl of 1 characters"):
        prepare_corpus(data, ByteTokenizer(), seed=0)


def test_a_bad_weight_is_one_complaint_and_no_source_is_another():
    with pytest.raises(ConfigError) as caught:
        validate({"data": {"sources": [{"source": "x", "weight": 0}]}})
    assert ";" not in str(caught.value)
    with refused(ConfigError, None, "sources is empty: name at least one corpus"):
        validate({"data": {"sources": []}})

import random

import pytest
from refusals import refused

from textdiff.data.document_stream import from_texts, iterate_texts
from textdiff.data.split import split_documents
from textdiff.errors import DataError


def split(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    result = split_documents(from_texts(texts), fraction)
    return list(iterate_texts(result.train)), list(iterate_texts(result.validation))


def many(seed: int, num: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [f"{n} " + "x" * rng.randrange(1, 300) for n in range(num)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whole_documents_partition_the_corpus(seed: int, fraction: float):
    texts = many(seed)
    train, validation = split(texts, fraction)
    assert sorted(train + validation) == sorted(texts)
    held_out = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.8 * fraction <= held_out <= 1.05 * fraction


def test_sides_keep_the_order_of_the_corpus():
    texts = many(0)
    for side in split(texts, 0.2):
        assert side == [text for text in texts if text in set(side)]


def test_choice_depends_on_content_alone():
    texts = many(3)
    shuffled = random.Random(0).sample(texts, len(texts))
    assert set(split(texts, 0.1)[1]) == set(split(shuffled, 0.1)[1])


def test_identical_documents_end_on_one_side():
    texts = many(4, 200) * 3
    train, validation = split(texts, 0.1)
    assert validation
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == len(texts)


def test_one_document_is_cut_where_nanogpt_cuts():
    text = "".join(chr(97 + n % 26) for n in range(12_345))
    train, validation = split([text], 0.1)
    assert train == [text[: int(0.9 * len(text))]]
    assert validation == [text[int(0.9 * len(text)) :]]


def test_tiny_shakespeare_gives_the_published_split(shared_data):
    text = (shared_data / "tinyshakespeare/input.txt").read_bytes().decode()
    train, validation = split([text], 0.1)
    assert (len(train[0]), len(validation[0])) == (1_003_854, 111_540)
    assert train[0] + validation[0] == text


def test_few_long_documents_are_all_cut():
    texts = ["a" * 1000, "b" * 2000, "c" * 10]
    train, validation = split(texts, 0.1)
    assert train == ["a" * 900, "b" * 1800, "c" * 9]
    assert validation == ["a" * 100, "b" * 200, "c"]


def test_cut_keeps_every_character_and_drops_empty_sides():
    train, validation = split(["x" * 100, "y"], 0.1)
    assert train == ["x" * 90]
    assert validation == ["x" * 10, "y"]


def test_only_copies_of_one_document_are_cut():
    train, validation = split(["abcdefghij"] * 50, 0.2)
    assert set(train) == {"abcdefgh"}
    assert set(validation) == {"ij"}


@pytest.mark.parametrize("texts", [["x"], ["x", "y"], []])
def test_too_short_a_corpus_is_refused(texts: list[str]):
    with refused(DataError, "short_corpus", f"corpus of {len(texts)} characters"):
        split(texts, 0.1)

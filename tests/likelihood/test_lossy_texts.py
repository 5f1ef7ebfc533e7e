"""A figure is a bound on a text, and has bits per byte, only if the tokens give the text back."""

import json
import math

import pytest
from small_tokenizers import bpe, model_of, unigram, wordpiece

from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError
from textdiff.evaluate import evaluation_record
from textdiff.evaluate.bound_record import document_records
from textdiff.likelihood.difference import compare

CLEAN, CASED, UNKNOWN = "the cat sat", "The Cat sat", "the cat ☃ sat"


@pytest.fixture(scope="module")
def words():
    return model_of(wordpiece())


@pytest.fixture(scope="module")
def letters():
    return model_of(train_tokenizer(ByteTokenizer(), []))


def test_each_text_says_whether_it_is_bounded(words):
    clean, cased, unknown = words.score([CLEAN, CASED, UNKNOWN])
    assert (clean.is_bound, clean.lossy, clean.note) == (True, 0, "")
    assert clean.bits_per_byte == pytest.approx(clean.mean * 3 / len(CLEAN) / math.log(2))
    for bound in (cased, unknown):
        assert (bound.is_bound, bound.lossy, bound.bits_per_byte) == (False, 1, None)
        assert bound.note
        assert json.loads(json.dumps(bound.to_dict()))["bits_per_byte"] is None
    assert (clean.tokens, cased.tokens) == (3, 3)
    # What is bounded of a text in capitals is its text in small letters.
    assert words.score([CASED])[0].mean == words.score([CASED.lower()])[0].mean


def test_unknown_tokens_are_not_scored(words):
    found = words.estimate([UNKNOWN], attribute=True)
    assert found.windows.document_tokens.tolist() == [3]
    (nats,) = found.token_nats()
    assert [bool(value) for value in nats] == [True, True, False, True]
    assert found.windows.scored is not None
    with pytest.raises(DataError) as error:
        words.score(["a" * 1000 + "☃", "☃"])
    assert error.value.code == "all_tokens_unknown"
    with pytest.raises(DataError) as error:
        words.score([CLEAN, "☃"])
    assert error.value.code == "no_token_to_score"


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_unknown_tokens_in_blocks(block_size):
    held = model_of(wordpiece(), block_size=block_size)
    bound = held.score([UNKNOWN + " the ☃ cat"])[0]
    assert bound.tokens == 5
    assert not bound.is_bound
    assert math.isfinite(bound.mean)


def test_one_text_among_others_keeps_all_of_them_from_being_a_bound(words):
    found = words.estimate([CLEAN, CASED, CLEAN, UNKNOWN])
    bound = found.bound()
    assert (bound.is_bound, bound.bits_per_byte, bound.lossy) == (False, None, 2)
    record = evaluation_record(words, found, {})
    assert record["lossy_documents"] == [2, 4]
    assert (record["is_bound"], record["bits_per_byte"]) == (False, None)
    lines = list(document_records(words, found))
    assert [line["is_bound"] for line in lines] == [True, False, True, False]
    assert [line["bits_per_byte"] is None for line in lines] == [False, True, False, True]
    assert [line.get("lost", {}).get("unknown") for line in lines] == [None, 0, None, 1]


def test_texts_without_loss_are_what_they_were(words):
    alone = words.estimate([CLEAN, CLEAN])
    assert alone.windows.scored is None
    assert (alone.windows.losses, alone.windows.unknown) == ({}, None)
    record = evaluation_record(words, alone, {})
    assert record["lossy_documents"] == []
    assert record["is_bound"]


def test_the_windows_of_lossy_texts_are_not_those_of_what_comes_back(words):
    digests = {words.windows([text]).digest for text in (CASED, CASED.lower())}
    assert len(digests) == 2


def test_models_are_compared_where_both_give_the_text_back(words, letters):
    texts = [CLEAN, CASED, "the cat", UNKNOWN]
    found = letters.compare(words, texts)
    assert (found.unit, found.documents, found.left_out) == ("bits/byte", 2, 2)
    assert found.tokens == len(CLEAN) + len("the cat")
    kept = [0, 2]
    bytes_kept = sum(len(texts[d]) for d in kept)
    # The error of a difference is that of its pairs: as many replicates as either needs.
    options = {"replicates": found.replicates}
    nats = [m.estimate(texts, **options).nats[:, kept].sum(1) for m in (letters, words)]
    difference = (nats[0] - nats[1]).mean() / bytes_kept / math.log(2)
    assert found.mean == pytest.approx(float(difference), rel=1e-6)
    assert words.compare(letters, texts).mean == pytest.approx(-found.mean)
    with pytest.raises(DataError) as error:
        letters.compare(words, [CASED, UNKNOWN])
    assert error.value.code == "every_document_lossy"


def test_models_of_one_tokenizer_are_compared_in_tokens_of_what_comes_back(words):
    other = model_of(wordpiece(), block_size=2)
    found = words.compare(other, [CASED, UNKNOWN])
    assert (found.unit, found.left_out, found.tokens) == ("nats/token", 0, 6)


def test_equal_tokens_of_different_texts_do_not_compare_in_tokens():
    small, cased = model_of(wordpiece()), model_of(wordpiece(lower=False))
    a, b = small.estimate([CASED]), cased.estimate([CASED.lower()])
    assert a.windows.tokens[0].tolist() == b.windows.tokens[0].tolist()
    with pytest.raises(DataError):
        compare(a, b)


def test_a_prompt_that_is_not_seen_as_written_is_reported_and_the_rest_bounded(words, caplog):
    bound = words.score(["the cat"], prompts=["The Cat "])[0]
    assert bound.is_bound
    assert "document 1" in caplog.text
    caplog.clear()
    assert words.score(["the cat"], prompts=["the "])[0].is_bound is True
    assert len(caplog.records) == 1  # the space behind it is not seen
    caplog.clear()
    assert words.score(["The cat"], prompts=["the"])[0].is_bound is False
    assert not caplog.records


def test_spans_lose_what_is_scored_of_them(words):
    text = "the The the"
    inside, around = words.score([text] * 2, spans=[[(4, 7)], [(8, 11)]])
    assert (inside.is_bound, inside.lossy) == (False, 1)
    assert around.is_bound


@pytest.mark.parametrize("make", [unigram, lambda: bpe(prefix=True)])
def test_pieces_of_a_text_gain_no_space(make):
    held = model_of(make())
    text = "the cat sat"
    prompted = held.windows([text[3:]], prompts=[text[:3]])
    spanned = held.windows([text], spans=[[(3, 7)]])
    for windows in (prompted, spanned):
        assert not windows.losses
        assert held.decode(windows.tokens[0].tolist()) == text
    assert held.score(["at"], prompts=["the c"])[0].tokens == 1


def test_protocols_report_lossy_chunks(words):
    texts = [CLEAN] * 20 + [CASED] + [CLEAN] * 20
    found = words.estimate(texts, protocol="bd3lm")
    assert len(found.windows.losses) == 1
    assert found.bound().bits_per_byte is None
    assert words.estimate(texts[:20], protocol="bd3lm").bound().lossy == 0

"""The chunks of published protocols."""

import numpy as np
import pytest
import torch

from textdiff.data.encode import encode_documents
from textdiff.data.sections import ByteTokenizer
from textdiff.data.tokenizer import excluded_ids, train_tokenizer, vocabulary_size
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.protocols import PROTOCOLS, find_protocol, published_windows

TEXTS = ["abcdefg", "hé", "ijklmnopqrstu"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ByteTokenizer(), [])


def clean(tokenizer) -> torch.Tensor:
    allowed = torch.ones(vocabulary_size(tokenizer), dtype=torch.bool)
    allowed[list(excluded_ids(tokenizer))] = False
    return allowed


def chunks(name, tokenizer, texts=TEXTS, length=8):
    encoded = encode_documents(tokenizer, texts)
    return published_windows(PROTOCOLS[name], tokenizer, encoded, texts, length, clean(tokenizer))


def stream(tokenizer, end: bool) -> list[int]:
    ids = []
    for text in TEXTS:
        ids += list(text.encode()) + [tokenizer.eos_token_id] * end
    return ids


@pytest.mark.parametrize(("name", "end"), [("sedd", True), ("bd3lm", False)])
def test_documents_in_a_row_without_the_rest(tokenizer, name, end):
    found = chunks(name, tokenizer)
    whole = stream(tokenizer, end)
    assert np.concatenate(found.tokens).tolist() == whole[: len(whole) // 8 * 8]
    assert found.document.tolist() == list(range(len(found.tokens)))


def test_frames(tokenizer):
    found = chunks("mdlm", tokenizer)
    whole, end = stream(tokenizer, True), tokenizer.eos_token_id
    assert len(found.tokens) == len(whole) // 6
    for index, chunk in enumerate(found.tokens):
        assert chunk.tolist() == [end, *whole[6 * index : 6 * index + 6], end]
    assert found.document_tokens.tolist() == [8] * len(found.tokens)


def test_bytes_are_those_of_the_text_alone(tokenizer):
    assert chunks("sedd", tokenizer).document_bytes.tolist() == [7, 7, 8]
    assert chunks("mdlm", tokenizer).document_bytes.tolist() == [6, 4, 6, 6]


def test_the_first_token_is_context(tokenizer):
    found = chunks("bd3lm", tokenizer)
    assert found.document_tokens.tolist() == [7, 7]
    assert [mask.tolist() for mask in found.scored] == [[False] + [True] * 7] * 2


def test_the_rest_of_every_thousand_documents_is_dropped(tokenizer):
    texts = ["ab"] * 1002
    assert len(chunks("bd3lm", tokenizer, texts, length=16).tokens) == 2000 // 16
    assert len(chunks("bd3lm", tokenizer, texts * 2, length=16).tokens) == 2 * (2000 // 16)


def test_special_tokens_that_the_model_cannot_predict(tokenizer):
    allowed = clean(tokenizer)
    allowed[tokenizer.eos_token_id] = False
    encoded = encode_documents(tokenizer, TEXTS)
    with pytest.raises(ConfigError) as error:
        published_windows(PROTOCOLS["mdlm"], tokenizer, encoded, TEXTS, 8, allowed)
    assert error.value.code == "special_token_not_predicted"
    assert published_windows(PROTOCOLS["bd3lm"], tokenizer, encoded, TEXTS, 8, allowed).tokens


def test_too_little_text(tokenizer):
    with pytest.raises(DataError) as error:
        chunks("sedd", tokenizer, length=64)
    assert error.value.code == "less_than_a_chunk"


def test_settings_of_the_published_estimator():
    protocol = find_protocol("mdlm")
    assert protocol.settings({})["complete"] is False
    assert protocol.settings({"eps": 0.1})["eps"] == 0.1
    assert protocol.settings({}, block_size=1) == {"estimator": "masked_count"}
    assert protocol.settings({"estimator": "masked_count"}) == {"estimator": "masked_count"}

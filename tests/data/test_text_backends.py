"""Texts never become special tokens, whatever the tokenizer, and begin where they begin."""

import numpy as np
import pytest
from small_tokenizers import bpe, unigram, wordpiece
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import (
    encoding_fingerprint,
    serialize,
    special_ids,
    text_backends,
    tokenizer_fingerprint,
    unknown_id,
)
from textdiff.data.document_stream import Documents, TextBlock
from textdiff.data.encode import encode_documents, split_long
from textdiff.data.losses import encode_checked
from textdiff.data.packing import tokenize
from textdiff.data.sections import BpeTokenizer, ByteTokenizer, CharTokenizer
from textdiff.data.tokenizer import train_tokenizer

SPELLED = ["<pad>", "</s>", "<unk>", "[MASK]", "[PAD]", "[UNK]", "[SEP]", "<|mask|>", "<m>"]
TOKENIZERS = {
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "unigram, first": lambda: unigram(scheme="first"),
    "unigram, lower case": lambda: unigram(lower=True),
    "wordpiece": wordpiece,
    "wordpiece, cased": lambda: wordpiece(lower=False),
    "bpe": bpe,
    "bpe of whole words": lambda: bpe(ignore_merges=True),
    "bpe whose merges spell specials": lambda: bpe(specials_by_merge=True),
    "bpe with a space before": lambda: bpe(prefix=True),
}


def settings_unknown(tokenizer: PreTrainedTokenizerFast) -> int | None:
    import json

    return unknown_id(json.loads(serialize(tokenizer)), special_ids(tokenizer))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_gives_a_special_token(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens({"mask_token": "<m>"})
    texts = [f"{before}{s}{after}" for s in SPELLED for before in ("", "the ") for after in ("", s)]
    never = special_ids(tokenizer) - {settings_unknown(tokenizer)}
    for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
        assert not never & set(ids.tolist()), text


@pytest.mark.parametrize("name", ["unigram with bytes", *(n for n in TOKENIZERS if "bpe" in n)])
def test_such_text_comes_back(name):
    tokenizer = TOKENIZERS[name]()
    texts = [*SPELLED, "a</s>b", "x <0x41><0x0A>", "cat<pad>cat", "<0x4", "é☃ <0xE9>"]
    encoded = encode_checked(tokenizer, texts)
    assert not encoded.losses
    assert all(len(ids) for ids in encoded.ids)


def test_a_piece_of_a_special_token_that_is_an_ordinary_one_is_used():
    tokenizer = bpe(specials_by_merge=True)
    names = tokenizer.convert_ids_to_tokens(encode_documents(tokenizer, ["<pad>"])[0].tolist())
    assert names == ["<p", "ad>"]


def test_end_of_text_that_the_file_does_not_call_special():
    tokenizer = bpe()
    tokenizer.add_tokens(["<end>"])
    tokenizer.eos_token = "<end>"
    (ids,) = encode_documents(tokenizer, ["a<end>b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<end>b"


def test_ids_of_other_tokens_stay():
    tokenizer = unigram()
    tokenizer.add_tokens(["cats!"])
    tokenizer.add_special_tokens({"mask_token": "<m>"})
    tokenizer.add_tokens(["dogs!"])
    backend = Tokenizer.from_str(text_backends(tokenizer).first)
    for name in ("cats!", "dogs!", "▁cat", "a"):
        assert backend.token_to_id(name) == tokenizer.convert_tokens_to_ids(name)
    (ids,) = encode_documents(tokenizer, ["dogs!cats!"])
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["dogs!", "cats!"]


def test_a_special_token_of_one_character_leaves_its_text_unknown():
    backend = Tokenizer(models.WordLevel({"a": 0, "#": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="#", unk_token="?")
    encoded = encode_checked(tokenizer, ["#", "a", "?"])
    assert [ids.tolist() for ids in encoded.ids] == [[2], [0], [2]]
    assert {text: loss.unknown for text, loss in encoded.losses.items()} == {0: 1, 2: 1}


def test_own_tokenizers_encode_by_their_backend_as_it_is(corpus):
    for section in (BpeTokenizer(vocab_size=300), CharTokenizer(), ByteTokenizer()):
        tokenizer = train_tokenizer(section, corpus)
        assert text_backends(tokenizer) == (serialize(tokenizer),) * 2
        assert encoding_fingerprint(tokenizer) == tokenizer_fingerprint(tokenizer)


def test_the_key_of_cached_tokens_knows_how_they_are_made():
    kinds = [unigram(), unigram(byte_fallback=True), wordpiece(), bpe(prefix=True)]
    assert all(encoding_fingerprint(t) != tokenizer_fingerprint(t) for t in kinds)
    assert encoding_fingerprint(bpe()) == tokenizer_fingerprint(bpe())
    assert encoding_fingerprint(unigram()) == encoding_fingerprint(unigram())


# --- beginnings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unigram, lambda: bpe(prefix=True)], ids=["metaspace", "bytes"])
@pytest.mark.parametrize("newlines", [True, False])
def test_long_documents_gain_no_space(make, newlines, monkeypatch):
    tokenizer = make()
    text = ("the cat sat\n" if newlines else "thecatsat") * 6
    (whole,) = encode_documents(tokenizer, [text])
    monkeypatch.setattr("textdiff.data.encode.split_long", lambda t: split_long(t, 20))
    (cut,) = encode_documents(tokenizer, [text])
    encoded = encode_checked(tokenizer, [text, "the cat"])
    assert not encoded.losses
    assert np.array_equal(encoded.ids[0], cut)
    assert np.array_equal(encoded.ids[1], encode_documents(tokenizer, ["the cat"])[0])
    if newlines:  # nothing but the cuts differs, and these lie where words end
        assert np.array_equal(cut, whole)


@pytest.mark.parametrize("processes", [1])
def test_long_training_documents_gain_no_space(processes, monkeypatch, tmp_path):
    tokenizer = bpe(prefix=True)
    monkeypatch.setattr("textdiff.data.encode._TASK_CHARACTERS", 25)
    pieces = [TextBlock("the cat\n", False), TextBlock("cat cat\n", False), TextBlock("at", True)]
    pieces += [TextBlock("the end", True)]
    documents = Documents(lambda: iter(pieces), "signature")
    monkeypatch.setattr(Documents, "pieces", lambda self, limit=0: iter(pieces))
    options = {"num_proc": processes, "cache_dir": str(tmp_path)}
    stream = tokenize(documents, tokenizer, **options)
    end = tokenizer.eos_token_id
    wanted = encode_documents(tokenizer, ["the cat\ncat cat\nat", "the end"])
    tokens = np.concatenate([part for ids in wanted for part in (ids, [end])])
    assert np.array_equal(stream.read(0, len(stream)), tokens)

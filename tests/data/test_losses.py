"""What tokens do not give back is found, and what tokenizers add by design is not held against."""

import json

import pytest
from refusals import refused
from small_tokenizers import bpe, unigram, wordpiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import text_backends
from textdiff.data.losses import encode_checked, loses_nothing
from textdiff.data.sections import ByteTokenizer, CharTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError


def lossy(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[bool]:
    losses = encode_checked(tokenizer, texts).losses
    return [index in losses for index in range(len(texts))]


def byte_level(normalizer=None, before=None, **options) -> PreTrainedTokenizerFast:
    """A byte-level BPE with something done to texts first."""
    vocab = {name: i for i, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for name in options.pop("without", ()):
        del vocab[name]
    backend = Tokenizer(models.BPE(vocab, [], **options))
    if normalizer is not None:
        backend.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = last if before is None else pre_tokenizers.Sequence([before, last])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def test_words_that_a_tokenizer_lacks_are_unknown():
    encoded = encode_checked(wordpiece(), ["the " + "a" * 160_000 + " cat"])
    assert len(encoded.ids[0]) == 3
    assert encoded.losses[0].unknown == 1
    assert encoded.losses[0].at == 4
    assert encoded.unknown == wordpiece().unk_token_id


@pytest.mark.parametrize(
    ("text", "is_lossy"),
    [
        ("the cat", False), ("the cat, the cat.", False), ("The cat", True), ("the  cat", True),
        (" the cat", True), ("the cat\n", True), ("thé cat", True), ("☃", True), ("", False),
        ("[UNK]", True), ("[MASK]", True),
    ],
)  # fmt: skip
def test_wordpiece(text, is_lossy):
    assert lossy(wordpiece(), text) == [is_lossy]


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_sentencepiece(scheme, byte_fallback):
    tokenizer = unigram(scheme=scheme, byte_fallback=byte_fallback)
    texts = ("the cat", "the  cat", "  the", "T\n\n.", "", "cat ")
    assert not any(lossy(tokenizer, *texts))
    # A space at the beginning is the one that is put there anyway, and a stand-in is a space.
    assert lossy(tokenizer, " the cat", "the▁cat") == [True, True]
    assert lossy(tokenizer, "the ☃", "é") == [not byte_fallback] * 2
    assert lossy(unigram(lower=True, byte_fallback=byte_fallback), "The", "the") == [True, False]


def test_texts_that_lose_nothing_have_tokens_of_their_own():
    texts = ["a", " a", "  a", "\na", " \na", "\n a", "a ", "", " ", "the a", " the a"]
    for tokenizer in (unigram(), unigram(scheme="first"), bpe(prefix=True), wordpiece(), bpe()):
        encoded = encode_checked(tokenizer, texts)
        kept = [tuple(ids) for i, ids in enumerate(encoded.ids) if i not in encoded.losses]
        assert len(set(kept)) == len(kept) > 1


def test_a_space_before_a_text_is_no_loss():
    tokenizer = bpe(prefix=True)
    assert lossy(tokenizer, "cat", "\ncat", "  cat", " cat") == [False, False, False, True]
    assert encode_checked(tokenizer, [" cat"]).losses[0].at == 0


def test_text_that_goes_on_has_its_own_spaces():
    for tokenizer in (unigram(), bpe(prefix=True)):
        encoded = encode_checked(tokenizer, ["the", " cat", "at"], [False, True, True])
        assert not encoded.losses
        ids = [i for part in encoded.ids for i in part]
        assert tokenizer.decode(ids).strip() == "the catat"


@pytest.mark.parametrize(
    "step",
    [
        normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip(), normalizers.NFC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        normalizers.Replace("  ", " "),
    ],
)  # fmt: skip
def test_normalisers(step):
    tokenizer = byte_level(step)
    texts = ["plain text", " Ünï, ﬁ ", "two  spaces", "e\u0301"]
    assert lossy(tokenizer, *texts) == [step.normalize_str(text) != text for text in texts]
    assert any(lossy(tokenizer, *texts))


def test_characters_that_are_dropped_or_split_away():
    assert lossy(byte_level(without="☃é"[1:]), "aé", "ab") == [False, False]  # é is two bytes
    assert lossy(byte_level(without="b"), "abc", "ac") == [True, False]
    split = pre_tokenizers.WhitespaceSplit()
    assert lossy(byte_level(before=split), "a b", "ab") == [True, False]


def test_backends_that_lose_nothing_are_known_by_their_settings():
    def proven(tokenizer) -> bool:
        return loses_nothing(json.loads(text_backends(tokenizer).first))

    assert proven(byte_level())
    assert proven(bpe())
    assert proven(bpe(specials_by_merge=True))
    assert proven(byte_level(before=pre_tokenizers.Digits(individual_digits=True)))
    assert proven(byte_level(before=pre_tokenizers.Split(" ", "isolated")))
    for other in (
        byte_level(normalizers.NFC()),
        byte_level(without="b"),
        byte_level(before=pre_tokenizers.Split(" ", "removed")),
        byte_level(before=pre_tokenizers.WhitespaceSplit()),
        byte_level(end_of_word_suffix="</w>"),
        bpe(prefix=True),
        unigram(),
    ):
        assert not proven(other)
    odd = byte_level()
    odd.add_tokens(["é"])  # which its decoder takes for a byte
    assert not proven(odd)
    assert lossy(odd, "é") == [True]


def test_own_tokenizers_are_never_decoded(monkeypatch):
    def decoder(names):
        raise AssertionError("decoded")

    monkeypatch.setattr("textdiff.data.losses._decoder", decoder)
    assert lossy(train_tokenizer(ByteTokenizer(), []), "☃ A  ") == [False]
    assert lossy(bpe(), "☃ A  ") == [False]
    char = train_tokenizer(CharTokenizer(), ["ab A"])
    assert lossy(char, "ab  A", "") == [False, False]


def test_unseen_characters_are_a_loss():
    char = train_tokenizer(CharTokenizer(), ["ab A"])
    encoded = encode_checked(char, ["ab", "a☃b☃"])
    assert list(encoded.losses) == [1]
    assert (encoded.losses[1].unknown, encoded.losses[1].at) == (2, 1)


def test_a_tokenizer_that_fails_at_a_text():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    with refused(DataError, "not_encoded"):
        encode_checked(PreTrainedTokenizerFast(tokenizer_object=backend), ["b"])

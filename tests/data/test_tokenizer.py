import json
import random
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from small_tokenizers import bpe, model_of, unigram, wordpiece
from transformers import AutoTokenizer

from textdiff.data.backend import serialize, tokenizer_fingerprint
from textdiff.data.document_stream import split_long
from textdiff.data.encode import Encoder, encode_documents
from textdiff.data.sections import BpeTokenizer, ByteTokenizer, CharTokenizer, PretrainedTokenizer
from textdiff.data.tokenizer import (
    excluded_ids,
    pretrained_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from textdiff.errors import DataError

KINDS = ["bpe", "char", "byte"]
LITERALS = "<|endoftext|> <|mask|><|pad|>x<|unk|> [MASK][SEP]"


def ids(tokenizer, text: str) -> list[int]:
    return encode_documents(tokenizer, [text])[0].tolist()


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(500))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_seen_text(tokenizers, kind: str, corpus: list[str]):
    for document, encoded in zip(corpus, encode_documents(tokenizers[kind], corpus), strict=True):
        assert encoded.dtype == np.int32
        assert tokenizers[kind].decode(encoded) == document
        assert tokenizers[kind].decode(encoded, skip_special_tokens=True) == document


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "a\r\nb\rc", " , . ' n't 's", LITERALS, "\0\x1f", *map(random_text, range(5))],
)
def test_bytes_lose_nothing(tokenizers, kind: str, text: str):
    assert tokenizers[kind].decode(ids(tokenizers[kind], text)) == text


def test_byte_ids_are_the_bytes(tokenizers):
    text = "né \U0001f9ff\n"
    assert ids(tokenizers["byte"], text) == list(text.encode())
    assert vocabulary_size(tokenizers["byte"]) == 259


def test_char_ids_are_in_code_point_order(story: str):
    tokenizer = train_tokenizer(CharTokenizer(), [story])
    characters = sorted(set(story))
    assert ids(tokenizer, "".join(characters)) == list(range(len(characters)))
    assert vocabulary_size(tokenizer) == len(characters) + 4


def test_unseen_characters_become_one_unknown_token_each():
    tokenizer = train_tokenizer(CharTokenizer(), ["ab\n"])
    unknown = tokenizer.unk_token_id
    assert ids(tokenizer, "aXYb\u0301\n") == [1, unknown, unknown, 2, unknown, 0]
    assert unknown in excluded_ids(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_last_and_excluded_but_for_the_end(tokenizers, kind: str):
    tokenizer = tokenizers[kind]
    size = vocabulary_size(tokenizer)
    assert size == len(tokenizer)
    last = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert last == (size - 3, size - 2, size - 1)
    unknown = () if kind != "char" else (size - 4,)
    assert excluded_ids(tokenizer) == (*unknown, size - 2, size - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_special_tokens_stays_text(tokenizers, kind: str):
    tokenizer = tokenizers[kind]
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    assert not special & set(ids(tokenizer, LITERALS))


@pytest.mark.parametrize("kind", KINDS)
def test_reloads_through_auto_tokenizer(tokenizers, kind: str, tmp_path: Path, story: str):
    saved = tokenizers[kind]
    saved.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = story + " .  ,x 's " + LITERALS
    assert ids(loaded, text) == ids(saved, text)
    assert loaded(text, split_special_tokens=True)["input_ids"] == ids(saved, text)
    every_id = list(range(vocabulary_size(saved)))
    assert loaded.decode(every_id) == saved.decode(every_id)
    assert excluded_ids(loaded) == excluded_ids(saved)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(saved)
    assert tokenizer_fingerprint(pretrained_tokenizer(str(tmp_path))) == tokenizer_fingerprint(
        saved
    )


@pytest.mark.parametrize(
    "section", [BpeTokenizer(vocab_size=400), CharTokenizer(), ByteTokenizer()]
)
def test_training_is_deterministic(tokenizers, section, corpus: list[str]):
    again = section.prepare(iter(corpus))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizers[section.kind])


def test_bpe_reaches_its_size_and_shortens_text(tokenizers, corpus: list[str], story: str):
    assert vocabulary_size(tokenizers["bpe"]) <= 400
    larger = train_tokenizer(BpeTokenizer(vocab_size=300), corpus)
    assert vocabulary_size(larger) == 300
    assert len(ids(tokenizers["bpe"], story)) < len(ids(larger, story)) < len(story.encode())


def test_bpe_on_a_tiny_corpus_is_smaller_than_asked():
    tokenizer = train_tokenizer(BpeTokenizer(vocab_size=4096), ["abab"])
    assert 259 <= vocabulary_size(tokenizer) < 270


def test_fingerprints_differ(tokenizers, corpus: list[str]):
    others = [*tokenizers.values(), train_tokenizer(CharTokenizer(), [*corpus, "☃"])]
    assert len({tokenizer_fingerprint(t) for t in others}) == 4


def test_calls_do_not_change_fingerprint_or_encoding(corpus: list[str], story: str):
    tokenizer = train_tokenizer(BpeTokenizer(vocab_size=300), corpus)
    before = tokenizer_fingerprint(tokenizer), ids(tokenizer, story)
    tokenizer([story, "x"], padding=True, truncation=True, max_length=4)
    assert (tokenizer_fingerprint(tokenizer), ids(tokenizer, story)) == before


# --- long documents ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [""]),
        ("abcd", ["abcd"]),
        ("abcde", ["abcd", "e"]),
        ("a\nb\ncd", ["a\nb\n", "cd"]),
        ("abcd\nef", ["abcd", "\nef"]),
        ("\n\n\n\n\n\n", ["\n\n\n\n", "\n\n"]),
    ],
)
def test_pieces(text: str, pieces: list[str]):
    assert list(split_long(text, limit=4)) == pieces


@pytest.mark.parametrize("kind", KINDS)
def test_long_document_is_the_concatenation_of_its_pieces(tokenizers, kind: str, story: str):
    text = (story * (2_300_000 // len(story)))[:-7]
    encoded = encode_documents(tokenizers[kind], ["before", text, "", "after"])
    pieces = encode_documents(tokenizers[kind], list(split_long(text)))
    assert len(pieces) == 3
    assert np.array_equal(encoded[1], np.concatenate(pieces))
    assert encoded[2].size == 0
    assert tokenizers[kind].decode(encoded[3]) == "after"


# --- loaded tokenizers ---------------------------------------------------------------------------


def test_gpt2_files_alone(shared_data: Path, story: str):
    tokenizer = pretrained_tokenizer(str(shared_data / "gpt2-tokenizer"))
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (50257, 50258)
    assert tokenizer.eos_token_id == 50256
    assert excluded_ids(tokenizer) == (50257, 50258)
    assert ids(tokenizer, "Hello world") == [15496, 995]
    assert 50256 not in ids(tokenizer, LITERALS)
    assert tokenizer.decode(ids(tokenizer, story + LITERALS)) == story + LITERALS


def test_bert_keeps_its_own_special_tokens(shared_data: Path, tmp_path: Path):
    tokenizer = pretrained_tokenizer(str(shared_data / "bert-base-uncased-tokenizer"))
    assert len(tokenizer) == vocabulary_size(tokenizer) == 30522
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (103, None)
    # [UNK] (100) stands in encoded text, so a model must be able to predict it.
    assert excluded_ids(tokenizer) == (0, 101, 102, 103)
    assert ids(tokenizer, "Hello \U0001f9ff") == [7592, 100]
    # The published file truncates at 128 and pads.
    assert len(ids(tokenizer, "x " * 600)) == 600
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(pretrained_tokenizer(str(tmp_path))) == tokenizer_fingerprint(
        tokenizer
    )


def test_padding_never_is_the_end(tmp_path: Path, corpus: list[str]):
    tokenizer = train_tokenizer(BpeTokenizer(vocab_size=300), corpus)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = pretrained_tokenizer(str(tmp_path))
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.pad_token_id in excluded_ids(loaded)
    assert loaded.eos_token_id not in excluded_ids(loaded)


def test_ids_that_name_nothing_are_excluded():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 4, "[M]": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[M]")
    assert vocabulary_size(tokenizer) == 5
    assert excluded_ids(tokenizer) == (1, 2, 3)


def test_missing_tokenizers(tmp_path: Path, monkeypatch):
    with refused(DataError, "no_folder"):
        pretrained_tokenizer(str(tmp_path / "nope"))
    with refused(DataError, "no_tokenizer"):
        pretrained_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with refused(DataError, "not_loaded"):
        pretrained_tokenizer(str(tmp_path))
    with refused(DataError, "file"):
        pretrained_tokenizer(str(tmp_path / "tokenizer.json"))

    def offline(*args: object, **keys: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("textdiff.data.tokenizer.HfApi.model_info", offline)
    with refused(DataError, "not_loaded", "'own/er' (no network)"):
        PretrainedTokenizer(path="own/er").prepare([])


@pytest.mark.parametrize(
    ("make", "role"),
    [
        (bpe, "eos_token"), (bpe, "pad_token"), (unigram, "unk_token"), (unigram, "eos_token"),
        (wordpiece, "cls_token"), (wordpiece, "sep_token"), (wordpiece, "unk_token"),
    ],
)  # fmt: skip
def test_a_mask_that_is_another_special_token(make, role, tmp_path: Path):
    tokenizer = make()
    tokenizer.mask_token = getattr(tokenizer, role)
    tokenizer.save_pretrained(tmp_path)
    with refused(DataError, "mask_role", role.replace("_", " ")):
        pretrained_tokenizer(str(tmp_path))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = pretrained_tokenizer(str(tmp_path))
    assert loaded.mask_token_id not in {loaded.eos_token_id, loaded.unk_token_id}


def test_a_token_that_is_there_becomes_the_mask_and_text_never_holds_it(tmp_path: Path):
    bpe().save_pretrained(tmp_path)
    size = len(bpe())
    chosen = pretrained_tokenizer(str(tmp_path), mask_token="cat")
    assert chosen.mask_token_id == bpe().convert_tokens_to_ids("cat")
    assert len(chosen) == size  # nothing is added
    (ids,) = encode_documents(chosen, ["a cat"])
    assert chosen.mask_token_id not in ids.tolist()
    assert chosen.decode(ids) == "a cat"
    with refused(DataError, "unknown_mask", "'<m>'", "null", str(tmp_path)):
        PretrainedTokenizer(path=str(tmp_path), mask_token="<m>").prepare([])
    with refused(DataError, "mask_role", "eos token"):
        pretrained_tokenizer(str(tmp_path), mask_token="</s>")


@pytest.fixture
def no_questions(monkeypatch):
    def asked(*words):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr("builtins.input", asked)


def test_an_export_is_a_tokenizer_path(no_questions, tmp_path: Path):
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    model_of(tokenizer).save_pretrained(tmp_path)
    # As in a process that has not loaded textdiff's own classes for `model_type: textdiff`.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    loaded = pretrained_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_custom_code_is_never_run_nor_asked_for(no_questions, tmp_path: Path):
    train_tokenizer(ByteTokenizer(), []).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "evil.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with refused(DataError, "not_loaded", "custom code"):
        pretrained_tokenizer(str(tmp_path))


def test_byte_table_is_what_the_tokenizer_does(tokenizers):
    encoder = Encoder(serialize(tokenizers["byte"]))
    assert encoder._bytes is not None
    text = "".join(map(chr, [*range(1, 0x900), 0x4E16, 0x1F9FF])) + "<|mask|> <|endoftext|>"
    fast = encoder([text, "", text[:7]])
    encoder._bytes = None
    for a, b in zip(fast, encoder([text, "", text[:7]]), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    assert all(Encoder(serialize(tokenizers[kind]))._bytes is None for kind in ("bpe", "char"))

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from refusals import refused
from small_tokenizers import bpe, unigram

from textdiff.data import formats, text_files
from textdiff.data.corpus import prepare_corpus
from textdiff.data.document_stream import corpus_fingerprint
from textdiff.data.encode import encode_documents
from textdiff.data.packing import tokenize
from textdiff.data.sections import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    PretrainedTokenizer,
    Source,
)
from textdiff.data.sources import load_documents
from textdiff.data.split import split_documents
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError


def config(folder: Path, *paths: Path, **keys: object) -> DataConfig:
    sources = tuple(Source(source=str(path)) for path in paths)
    return DataConfig(sources=sources, cache_dir=str(folder / "cache"), **keys)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_one_file_end_to_end(tmp_path: Path, story: str):
    text = story * 30
    path = write(tmp_path / "a.txt", text)
    corpus = prepare_corpus(config(tmp_path, path, validation=0.1), CharTokenizer(), seed=1)
    cut = int(0.9 * len(text))
    assert corpus.validation == [text[cut:]]
    stream = corpus.train.stream
    decoded = corpus.tokenizer.decode(stream.read(0, len(stream) - 1))
    assert decoded == text[:cut]
    assert stream.read(len(stream) - 1, len(stream)).tolist() == [corpus.tokenizer.eos_token_id]
    assert corpus.train.seed == 1
    assert corpus.train.sequence_length == 128


def test_tokenizer_never_sees_validation_text(tmp_path: Path):
    path = write(tmp_path / "a.txt", "a" * 900 + "z" * 100)
    corpus = prepare_corpus(config(tmp_path, path, validation=0.1), CharTokenizer(), seed=0)
    assert "z" not in corpus.tokenizer.get_vocab()
    unknown = encode_documents(corpus.tokenizer, corpus.validation)[0]
    assert set(unknown.tolist()) == {corpus.tokenizer.unk_token_id}


def test_sources_are_read_in_order_and_recorded(tmp_path: Path, story: str):
    first = write(tmp_path / "z.txt", story * 9)
    Dataset.from_dict({"text": ["é" * 500, story]}).save_to_disk(tmp_path / "saved")
    data = config(tmp_path, first, tmp_path / "saved", validation=0.1, sequence_length=16)
    corpus = prepare_corpus(data, ByteTokenizer(), seed=0)
    record = json.loads(json.dumps(corpus.record))
    assert record == corpus.record
    assert [s["documents"] for s in record["sources"]] == [1, 2]
    assert [s["characters"] for s in record["sources"]] == [9 * len(story), 500 + len(story)]
    assert record["sources"][0]["sha256"] == corpus_fingerprint([story * 9])
    assert record["sources"][1]["sha256"] == corpus_fingerprint(["é" * 500, story])
    assert record["train"]["tokens"] == len(corpus.train.stream)
    assert record["train"]["sequences_per_epoch"] == len(corpus.train)
    assert record["validation"]["sha256"] == corpus_fingerprint(corpus.validation)
    assert record["tokenizer"]["vocabulary"] == 259
    assert "python" not in record["sources"][0]


def test_everything_is_equal_the_second_time(tmp_path: Path, corpus: list[str]):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    data = config(tmp_path, path, validation=0.2, sequence_length=32)
    first = prepare_corpus(data, BpeTokenizer(vocab_size=300), seed=4)
    second = prepare_corpus(data, BpeTokenizer(vocab_size=300), seed=4)
    assert first.record == second.record
    assert first.validation == second.validation
    assert set(first.validation) < set(corpus)
    indices = [0, 1, 500]
    assert np.array_equal(first.train.rows(indices).tokens, second.train.rows(indices).tokens)


def test_python_docs_records_the_version(tmp_path: Path, documentation, monkeypatch):
    monkeypatch.setattr("textdiff.data.python_docs.python_docs", lambda: documentation)
    corpus = prepare_corpus(DataConfig(cache_dir=str(tmp_path)), ByteTokenizer(), seed=0)
    assert corpus.record["sources"][0]["python"] == platform.python_version()
    held_out = corpus.record["validation"]["characters"]
    assert 0.04 <= held_out / corpus.record["sources"][0]["characters"] <= 0.0525


def test_corpus_shorter_than_a_sequence(tmp_path: Path):
    path = write(tmp_path / "a.txt", "too short")
    with refused(DataError, "short_corpus", "128"):
        prepare_corpus(config(tmp_path, path, validation=0.2), ByteTokenizer(), seed=0)


def test_pretrained_tokenizer(tmp_path: Path, shared_data: Path, story: str):
    path = write(tmp_path / "a.txt", story * 30)
    section = PretrainedTokenizer(path=str(shared_data / "gpt2-tokenizer"))
    corpus = prepare_corpus(config(tmp_path, path), section, seed=0)
    assert corpus.record["tokenizer"]["vocabulary"] == 50259
    assert corpus.train.rows([0]).tokens.max() <= 50256


# --- what is kept --------------------------------------------------------------------------------


def forbid_reading(monkeypatch) -> None:
    monkeypatch.setattr(text_files, "read_file", lambda *a: pytest.fail("read the text again"))


def jsonl(folder: Path, corpus: list[str]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    return path


@pytest.mark.parametrize("section", [BpeTokenizer(vocab_size=300), CharTokenizer()])
def test_second_preparation_reads_no_text(tmp_path, corpus, monkeypatch, section):
    data = config(tmp_path, jsonl(tmp_path, corpus), validation=0.2, sequence_length=32)
    first = prepare_corpus(data, section, seed=4)
    assert not first.cached
    forbid_reading(monkeypatch)
    second = prepare_corpus(data, section, seed=4)
    assert second.cached
    assert second.record == first.record
    assert second.validation == first.validation
    assert np.array_equal(second.train.rows([7]).tokens, first.train.rows([7]).tokens)
    longer = data.model_copy(update={"sequence_length": 64})
    assert prepare_corpus(longer, section, seed=4).cached


def test_changed_source_or_setting_is_prepared_anew(tmp_path, corpus):
    path = jsonl(tmp_path, corpus)
    data = config(tmp_path, path, validation=0.2, sequence_length=32)
    before = prepare_corpus(data, ByteTokenizer(), seed=0)
    assert not prepare_corpus(data, CharTokenizer(), seed=0).cached
    other = data.model_copy(update={"validation": 0.3})
    assert not prepare_corpus(other, ByteTokenizer(), seed=0).cached
    jsonl(tmp_path, [*corpus[:-1], corpus[-1][:-1] + "!"])
    after = prepare_corpus(data, ByteTokenizer(), seed=0)
    assert not after.cached
    assert after.record["sources"][0]["sha256"] != before.record["sources"][0]["sha256"]


@pytest.mark.parametrize("name", ["facts.json", "validation.jsonl", "tokenizer/tokenizer.json"])
def test_damaged_preparation_is_made_again(tmp_path, corpus, name):
    data = config(tmp_path, jsonl(tmp_path, corpus), validation=0.2, sequence_length=32)
    before = prepare_corpus(data, CharTokenizer(), seed=0)
    (entry,) = (tmp_path / "cache" / "textdiff").glob("prepared-*")
    path = entry / name
    path.write_text(path.read_text().replace("Chapter", "chapter").replace('"a"', '"ä"')[:-9])
    after = prepare_corpus(data, CharTokenizer(), seed=0)
    assert not after.cached
    assert after.record == before.record
    assert after.validation == before.validation
    assert prepare_corpus(data, CharTokenizer(), seed=0).cached


def test_damaged_tokens_are_found_unless_told_not_to_look(tmp_path, corpus):
    data = config(tmp_path, jsonl(tmp_path, corpus), validation=0.2, sequence_length=32)
    corpus_before = prepare_corpus(data, ByteTokenizer(), seed=0)
    path = corpus_before.streams[0].folder / "tokens-00000.arrow"
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    path.write_bytes(damaged)
    assert prepare_corpus(data, ByteTokenizer(), seed=0, verify="nothing").cached
    assert not prepare_corpus(data, ByteTokenizer(), seed=0).cached
    assert path.read_bytes() == good


def test_missing_source_is_named_although_its_tokens_exist(tmp_path, corpus):
    path = jsonl(tmp_path, corpus)
    data = config(tmp_path, path, validation=0.2, sequence_length=32)
    held = prepare_corpus(data, ByteTokenizer(), seed=0)
    path.unlink()
    assert held.train.rows([10**6]).tokens.shape == (1, 32)  # what runs needs no source
    with refused(DataError, "no_file", "a.jsonl"):
        prepare_corpus(data, ByteTokenizer(), seed=0)


def test_vanished_cache_does_not_stop_who_reads_it(tmp_path, corpus):
    data = config(tmp_path, jsonl(tmp_path, corpus), validation=0.2, sequence_length=32)
    held = prepare_corpus(data, ByteTokenizer(), seed=0)
    before = held.train.rows(range(50)).tokens
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(held.train.rows(range(50)).tokens, before)


def test_progress_ends_at_the_whole(tmp_path, corpus):
    told: dict[str, tuple[int, int | None]] = {}
    data = config(tmp_path, jsonl(tmp_path, corpus), validation=0.2, sequence_length=32)
    prepare_corpus(
        data,
        BpeTokenizer(vocab_size=300),
        seed=0,
        progress=lambda stage, done, total: told.__setitem__(stage, (done, total)),
    )
    names = [name.split(" (")[0] for name in told]
    assert names == ["reading", "training the tokenizer", "tokenising"]
    assert [done == total for done, total in list(told.values())[1:]] == [True, True]


def test_split_is_cut_at_the_same_character_in_blocks(tmp_path, story, monkeypatch):
    text = story.replace("lamp", "läm\U0001f9ffp") * 40
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(formats, "_READ_BYTES", 97)
    corpus = prepare_corpus(config(tmp_path, path, validation=0.1), CharTokenizer(), seed=1)
    cut = int(0.9 * len(text))
    assert corpus.validation == [text[cut:]]
    (stream,) = corpus.streams
    assert corpus.tokenizer.decode(stream.read(0, len(stream) - 1)) == text[:cut]
    assert stream.num_documents == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_source_that_disappears_between_passes_is_named(tmp_path, corpus, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": corpus}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    documents = load_documents(Source(source=str(path)))
    split = split_documents(documents, 0.1)
    path.unlink()
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    with refused(DataError, "unreadable", str(path), "No such file"):
        tokenize(split.train, tokenizer, num_proc=1, cache_dir=str(tmp_path / "cache"))


def rows(path: Path, texts: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("weights", [False, True])
def test_training_text_that_no_model_may_predict_is_refused(tmp_path: Path, weights: bool):
    train_tokenizer(CharTokenizer(), ["the cat 0123456789"]).save_pretrained(tmp_path / "char")
    section = PretrainedTokenizer(path=str(tmp_path / "char"))
    texts = [f"the cat {number}" * 20 for number in range(20)]
    good = rows(tmp_path / "a.jsonl", texts)
    bad = rows(tmp_path / "b.jsonl", [*(text[::-1] for text in texts), *["the ☃ cat" * 20] * 2])
    data = config(tmp_path, good, bad, validation=0.05, sequence_length=16)
    if weights:
        sources = [source.model_copy(update={"weight": 0.5}) for source in data.sources]
        data = data.model_copy(update={"sources": tuple(sources)})
    for _ in range(2):  # tokens in the cache are not what makes it right
        with pytest.raises(DataError) as error:
            prepare_corpus(data, section, seed=0)
        assert f"document 21 of {bad}" in str(error.value)
        assert "'<|unk|>'" in str(error.value)
    rows(tmp_path / "b.jsonl", [text[::-1] for text in texts])
    assert len(prepare_corpus(data, section, seed=0).train)


@pytest.mark.parametrize("make", [unigram, lambda: bpe(ignore_merges=True)])
def test_training_text_that_spells_special_tokens_is_text(tmp_path: Path, make):
    make().save_pretrained(tmp_path / "own")
    section = PretrainedTokenizer(path=str(tmp_path / "own"))
    texts = [f"cat <pad> at </s> {number}" * 20 for number in range(40)]
    data = config(tmp_path, rows(tmp_path / "a.jsonl", texts), sequence_length=16)
    corpus = prepare_corpus(data, section, seed=0)
    tokens = corpus.train.stream.read(0, len(corpus.train.stream))
    tokenizer = corpus.tokenizer
    ends = int((tokens == tokenizer.eos_token_id).sum())
    assert ends == corpus.train.stream.num_documents
    assert not (tokens == tokenizer.pad_token_id).any()

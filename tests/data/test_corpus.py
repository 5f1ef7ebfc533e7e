import json
import platform
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from textdiff.config import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    DataConfig,
    PretrainedTokenizer,
    Source,
)
from textdiff.data import corpus_fingerprint, encode_documents, prepare_corpus
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


def test_python_docs_records_the_version(tmp_path: Path):
    corpus = prepare_corpus(DataConfig(cache_dir=str(tmp_path)), ByteTokenizer(), seed=0)
    assert corpus.record["sources"][0]["python"] == platform.python_version()
    held_out = corpus.record["validation"]["characters"]
    assert 0.04 <= held_out / corpus.record["sources"][0]["characters"] <= 0.0525


def test_corpus_shorter_than_a_sequence(tmp_path: Path):
    path = write(tmp_path / "a.txt", "too short")
    with pytest.raises(DataError, match="fewer than one sequence of 128"):
        prepare_corpus(config(tmp_path, path, validation=0.2), ByteTokenizer(), seed=0)


def test_pretrained_tokenizer(tmp_path: Path, shared_data: Path, story: str):
    path = write(tmp_path / "a.txt", story * 30)
    section = PretrainedTokenizer(path=str(shared_data / "gpt2-tokenizer"))
    corpus = prepare_corpus(config(tmp_path, path), section, seed=0)
    assert corpus.record["tokenizer"]["vocabulary"] == 50259
    assert corpus.train.rows([0]).tokens.max() <= 50256
